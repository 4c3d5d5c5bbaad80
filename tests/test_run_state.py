"""A run's folder: all random numbers are the seed's, and nothing damaged or of another run is taken for its own."""

from __future__ import annotations

import os
import random
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_engine import assert_same_run
from torch import Tensor, nn
from train_examples import Tiny, run

from repbnn_cli.errors import CheckpointError, StoppedError, UsageError
from repbnn_cli.runs import Progress
from repbnn_cli.train import engine


class Coins(Tiny):
    """Draws from Python's and NumPy's generators, as data-dependent code of one's own does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 + random.gauss(0, 0.1) + float(np.random.randn()) / 10))


def test_python_s_and_numpy_s_random_numbers_are_the_seed_s_and_resume_exactly(tmp_path: Path) -> None:
    def coins() -> nn.Module:
        torch.manual_seed(0)
        return Coins()

    random.seed(7)
    np.random.seed(7)
    run(tmp_path / "a", network=coins())
    after = random.random(), np.random.rand()
    random.seed(7)
    np.random.seed(7)
    assert (random.random(), np.random.rand()) == after  # a run leaves the caller's generators as they were

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.batch) == (2, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        run(tmp_path / "b", network=coins(), on_step=stop, options=engine.Options(log_every=1))
    random.seed(8)
    run(tmp_path / "b", network=coins(), resume=True, options=engine.Options(log_every=1))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_what_is_left_of_a_run_that_is_gone_is_not_taken_for_this_one_s(tmp_path: Path) -> None:
    run(tmp_path)
    for name in ("run.json", "environment.json", "recipe.yaml"):
        (tmp_path / name).unlink()
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"metrics\.jsonl: is of a run that is gone; remove it"):
        run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == left


def test_a_flipped_bit_in_a_state_is_noticed(tmp_path: Path) -> None:
    run(tmp_path)
    path = sorted((tmp_path / "checkpoints").glob("state-*.pt"))[-1]
    content = bytearray(path.read_bytes())
    tensors = [i for i in zipfile.ZipFile(path).infolist() if "/data/" in i.filename]
    content[max(tensors, key=lambda i: i.file_size).header_offset + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read .*; remove it to resume from the one before"):
        run(tmp_path, resume=True)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    for name in ("environment.json", "run.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(CheckpointError, match=rf"{name}:1: is not JSON"):
            run(tmp_path, resume=True)


def test_of_another_recipe_the_lines_that_differ_are_said(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(
        UsageError, match=r"another run \(recipe was epochs: 3, is epochs: 4\); give the same arguments"
    ):
        run(tmp_path, "epochs=4", resume=True)
