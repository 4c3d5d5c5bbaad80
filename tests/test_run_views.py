"""What a run says: lines without a terminal, a bar on one; stages, distances."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from repbnn_cli.runs import Progress, Reached
from repbnn_cli.views import run_views

ROW = {"stage": "train", "epoch": 12, "loss": 0.9123, "train_top1": 67.1, "test_top1": 66.2, "best_top1": 66.8,
       "images_per_s": 612.3}  # fmt: skip
NOW = Progress("train", 12, 60, 50, 391, 0.95, 66.66, 612.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_epoch_is_one_line_of_a_terminals_width() -> None:
    line = run_views.epoch_line(ROW, {"train": 60})
    assert line == "epoch 12/60  loss 0.912  top-1 67.10 train, 66.20 test, 66.80 best %  612 images/s"
    before = {"stage": "train", "epoch": 0, "test_top1": 9.5}
    assert run_views.epoch_line(before, {"train": 60}) == "before the first step: top-1 9.50 % test"
    two: dict[str, Any] = {"train": None, "other": 2}  # a length in iterations has no number of epochs here
    assert run_views.epoch_line(ROW, two).startswith("train epoch 12  loss")


def test_without_a_terminal_there_are_lines_and_no_long_silence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(run_views.time, "monotonic", lambda: now[0])
    with run_views.watcher({"train": 60}) as watcher:
        assert isinstance(watcher, run_views.Lines)
        for seconds in (10, 40, 11, 30, 30, 1):
            now[0] += seconds
            watcher.step(NOW)
        watcher.epoch(ROW)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["epoch 12/60 batch 50/391  loss 0.950  top-1 66.7 %  612 images/s"] * 2 + [
        run_views.epoch_line(ROW, {"train": 60})
    ]


def test_on_a_terminal_a_bar_shows_what_is_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with run_views.watcher({"train": 60}) as watcher:
        assert isinstance(watcher, run_views.Bar)
        watcher.step(NOW)
        watcher.epoch(ROW)
    shown = stream.getvalue()
    for part in ("epoch 12/60", " 19 %", "loss 0.950  top-1 66.7 %  612 images/s", "left", "66.80 best"):
        assert part in shown


def test_stages_and_distances_are_said_where_there_is_something_to_say() -> None:
    one = ("train", 60, "epochs", "binary", "")
    assert run_views.stage_lines([one]) == []
    two = [("activations", 1, "epochs", "float", "every tensor"), ("kernels", 6, "iterations", "binary", "nothing")]
    assert run_views.stage_lines(two) == [
        "stage 1 of 2, activations: 1 epoch, float kernels; hands over every tensor",
        "stage 2 of 2, kernels: 6 iterations, binary kernels",
    ]
    known, unknown = Reached("b", 62.2, 3, 87.6, "Table 7", 62.2 - 87.6), Reached("a", 50.0, 1, None, None, None)
    text = "62.20 % top-1, 25.40 points below the published 87.6 % (Table 7)"
    assert run_views.distance_lines([known]) == [text]
    assert run_views.distance_lines([unknown, known]) == [f"stage b: {text}"]


def test_a_download_says_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with run_views.transfer("cifar10") as progress:
        for done in range(1001):
            progress(done * 170_000, 170_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert (lines[0], lines[-1]) == ("cifar10: 17.0 MB of 170.0", "cifar10: 170.0 MB of 170.0")
    with run_views.transfer("cifar10") as progress:
        progress(40 * 2**20, None)
    assert capsys.readouterr().err == "cifar10: 41.9 MB\n"


def test_a_download_has_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with run_views.transfer("cifar10") as progress:
        progress(85_000_000, 170_000_000)
    assert "85.0/170.0 MB" in terminal.getvalue()
