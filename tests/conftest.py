"""Settings that every test shares."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter. Triton reads this when it is imported, so that has to happen before a test
    # that takes it away; torch.compile on the CPU does not care. With a GPU the same tests run the compiled kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with contextlib.suppress(ImportError):
        import triton.language  # noqa: F401

torch.set_num_threads(1)  # tests run side by side, and results must not depend on how a sum is split


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # a network that a test builds is the same whichever tests ran before
