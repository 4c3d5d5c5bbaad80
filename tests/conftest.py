"""Settings that every test shares."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter. Triton reads this when it is imported, so it has to be set before any test;
    # torch.compile on the CPU does not care. With a GPU the same tests run the compiled kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # tests run side by side, and results must not depend on how a sum is split
