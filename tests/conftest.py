"""Settings that every test shares."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # tests run side by side, and results must not depend on how a sum is split
