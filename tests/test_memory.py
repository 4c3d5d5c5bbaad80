"""Out of memory: which batch fits is measured, and the last good state stays."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from train_examples import Tiny, run

from repbnn_cli.errors import MemoryExceededError
from repbnn_cli.train import engine, memory


class Hungry(Tiny):
    """Runs out of memory when it gets more than `limit` images, in training or in eval mode."""

    def __init__(self, limit: int, *, training: bool) -> None:
        super().__init__()
        self.limit, self.when, self.tried = limit, training, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        if self.training == self.when:
            self.tried.append(len(x))
            if len(x) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().forward(x)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 500), st.integers(2, 600))
def test_bisection_finds_the_largest_that_fits(limit: int, below: int) -> None:
    tried = []

    def attempt(n: int) -> None:
        tried.append(n)
        if n > limit:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    with mock.patch.object(memory, "release"):  # a full garbage collection takes long
        assert memory.largest_fitting(attempt, below) == max(1, min(limit, below - 1))
    assert len(tried) <= 10
    assert all(1 < n < below for n in tried)


def test_other_errors_are_not_taken_for_it() -> None:
    def attempt(n: int) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        memory.largest_fitting(attempt, 8)


@pytest.mark.parametrize(
    ("limit", "changes", "advice"),
    [
        (11, (), "measured: 11 images fit; {}; start another run with --set batch=11, or with --set accumulate=2 "),
        (3, ("accumulate=2",), "6 images fit; {}; start another run with --set batch=6, or with --set accumulate=6 "),
        (1, (), "nor do 2 images; {}; use a smaller network"),
    ],
)  # fmt: skip
def test_a_step_that_is_too_large_says_what_fits(tmp_path: Path, limit: int, changes: Any, advice: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(MemoryExceededError) as stopped:
        run(tmp_path / "run", *changes, network=Hungry(limit, training=True))
    state = tmp_path / "run" / "checkpoints" / "state-0-0000-000000.pt"
    message = str(stopped.value)
    assert message.startswith("a step with batch 16 does not fit into the memory of cpu")
    assert advice.format(f"the last good state is {state}") in message
    assert torch.load(state, weights_only=True)["step"] == 0
    # What it advises works.
    if "batch=" in message:
        batch = message.split("batch=")[1].split(",")[0]
        run(tmp_path / "next", *changes, f"batch={batch}", "epochs=2", network=Hungry(limit, training=True))
        parts = message.split("accumulate=")[1].split(" ")[0]
        run(tmp_path / "parts", f"accumulate={parts}", "epochs=2", network=Hungry(limit, training=True))


def test_test_images_that_are_too_many_say_how_many_fit_and_the_run_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(MemoryExceededError) as stopped:
        run(tmp_path / "run", network=Hungry(13, training=False))
    assert str(stopped.value).startswith(
        "32 test images at a time do not fit into the memory of cpu; measured: 13 fit; the last good state is "
    )
    assert "--resume --eval-batch 13 goes on" in str(stopped.value)
    network: nn.Module = Hungry(13, training=False)
    run(tmp_path / "run", network=network, resume=True, options=engine.Options(eval_batch=13))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


STEPS = """
import resource, sys, torch
from repbnn_cli.train import memory
if sys.argv[1] == "kept":
    memory.keep_freed(torch.device("cpu"))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1 << 24) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(9)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is glibc's allocator's")
def test_memory_that_a_step_frees_is_kept_for_the_next() -> None:
    """192 MiB are 49,152 pages; after a few steps nearly none of them is new."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", STEPS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    assert faults("kept") < 4000 < 10_000 < faults("by default")
