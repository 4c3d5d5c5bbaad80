"""Runs read back from their folders: finished, stopped, half written, damaged."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from train_examples import run, toy

from repbnn_cli import runs
from repbnn_cli.errors import CheckpointError, StoppedError, UsageError
from repbnn_cli.runs import Progress
from repbnn_cli.train import engine
from repbnn_cli.train.inheritance import Preparation
from repbnn_cli.views import run_views

PUBLISHED = "published={irnet_resnet20: {table: Table 7, raw: 86.5, rep: 87.6}}"
ABOUT = {"name": "net", "arch": "irnet_resnet20", "beta": 2, "target": "rep.pt", "sha256": "ab", "source_top1": 62.4}


def test_a_finished_run_says_what_it_is_and_what_it_reached(tmp_path: Path) -> None:
    bars = dataclasses.replace(toy(), name="cifar10")
    outcome = run(
        tmp_path / "run",
        PUBLISHED,
        "epochs=2",
        "data=cifar10",
        dataset=bars,
        about=ABOUT,
        seed=3,
        prepare=Preparation(2),
    )
    found = runs.read(tmp_path / "run")
    assert found.rows == outcome.rows
    assert [row["epoch"] for row in found.rows] == [0, 1, 2]
    assert [timing.get("epoch") for timing in found.timing] == [None, 1, 2]
    assert (found.network, found.arch, found.beta, found.target, found.start_sha256) == (
        "net", "irnet_resnet20", 2, "rep.pt", "ab",
    )  # fmt: skip
    assert (found.recipe, found.seed, found.data, found.source_top1) == ("toy", 3, "cifar10", 62.4)
    assert found.stages == (runs.StageRecord("train", 2, 87.6, "Table 7"),)
    assert (found.best_top1, found.best_epoch, found.last_top1) == (
        outcome.best_top1, outcome.best_epoch, outcome.top1,
    )  # fmt: skip
    assert found.distance == pytest.approx(outcome.best_top1 - 87.6)
    assert (found.finished, found.state, found.epochs) == (True, "finished", 2)
    assert found.recipe_text == (tmp_path / "run" / "recipe.yaml").read_text()
    (reached,) = found.reached
    assert (reached.top1, reached.epoch, reached.table) == (outcome.best_top1, outcome.best_epoch, "Table 7")
    assert runs.folder_of(outcome.best) == tmp_path / "run"
    assert runs.folder_of(tmp_path / "elsewhere.pt") is None


def test_accuracies_published_on_other_data_are_no_measure(tmp_path: Path) -> None:
    run(tmp_path / "run", PUBLISHED, "epochs=1", "schedule.warmup=0", about=ABOUT)  # on what is called digits
    found = runs.read(tmp_path / "run")
    assert found.distance is None
    assert run_views.distance_lines(found.reached) == []


def test_a_stopped_run_says_where_it_goes_on(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.batch) == (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        run(tmp_path / "run", on_step=stop, options=engine.Options(log_every=1))
    found = runs.read(tmp_path / "run")
    assert found.state == "unfinished: goes on at stage train, epoch 2 of 3, batch 4"
    assert (found.finished, len(found.rows), found.distance) == (False, 1, None)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "tr')
    assert runs.read(tmp_path / "run").rows == found.rows


def test_what_is_no_run_or_damaged_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        runs.read(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}: holds no run (run.json is not there); expected a folder that `repbnn finetune` wrote"
    )
    run(tmp_path / "run", "epochs=1", "schedule.warmup=0")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}}\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:1: is not JSON; the run's folder was changed"):
        runs.read(tmp_path / "run")
    (tmp_path / "run" / "environment.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"environment\.json: cannot be read \(.*; the run's folder is incomplete"
    ):
        runs.read(tmp_path / "run")


def test_reading_a_run_needs_no_torch() -> None:
    code = "import sys, repbnn_cli.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_in_the_root_folder_are_of_no_run() -> None:
    assert runs.folder_of("/ckpt.pt") is None
