"""A training run read back from its folder, for reports: plain values, no torch. What writes it is `train/state.py`.

`read(folder)` works on a run at any moment, also while it is being written: a row that is only half there is left out.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repbnn_cli.errors import CheckpointError, UsageError

RECORD, ENVIRONMENT, RECIPE, METRICS, TABLE, TIMING = (
    "run.json", "environment.json", "recipe.yaml", "metrics.jsonl", "metrics.csv", "timing.jsonl",
)  # fmt: skip
_DAMAGED = "the run's folder was changed or damaged"


@dataclass(frozen=True)
class Progress:
    """Where a running run is, with averages over the epoch so far; epoch and batch count from 1."""

    stage: str
    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float
    top1: float
    images_per_s: float


@dataclass(frozen=True)
class StageRecord:
    """A stage of the recipe. published: the top-1 in percent that a paper states for this network after it; table:
    where it stands."""

    name: str
    epochs: int
    published: float | None = None
    table: str | None = None


@dataclass(frozen=True)
class Reached:
    """The best epoch of a stage so far. published, table: see StageRecord; distance: top1 − published, in points."""

    stage: str
    top1: float
    epoch: int
    published: float | None
    table: str | None
    distance: float | None


@dataclass(frozen=True)
class RunRecord:
    """What a run is and what it has reached; accuracies in percent.

    network: the name to call it by; arch: its zoo name; beta: None for a source network; target: the file or zoo name
    that was trained, start_sha256 the file's hash; source_top1: what the source checkpoint states, before the
    transform. rows: one per epoch as in metrics.jsonl, epoch 0 being the accuracy before the first step where that was
    measured; timing: seconds and images_per_s of the same epochs. best_*, last_top1: of the last stage that has a row.
    environment: everything that environment.json holds.
    """

    path: Path
    network: str
    arch: str | None
    beta: int | None
    target: str | None
    start_sha256: str | None
    source_top1: float | None
    recipe: str
    recipe_text: str
    seed: int
    data: str
    data_notes: tuple[str, ...]
    stages: tuple[StageRecord, ...]
    rows: tuple[Mapping[str, Any], ...]
    timing: tuple[Mapping[str, Any], ...]
    best_top1: float | None
    best_epoch: int | None
    last_top1: float | None
    finished: bool
    state: str
    environment: Mapping[str, Any]

    @property
    def epochs(self) -> int:
        """Of all stages together."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def reached(self) -> tuple[Reached, ...]:
        """What each stage that has a row reached, in their order."""
        found = []
        for stage in self.stages:
            rows = [row for row in self.rows if row["epoch"] and row["stage"] == stage.name]
            if rows:
                best = max(rows, key=lambda row: row["test_top1"])  # the first of equals, as best.pt is
                distance = None if stage.published is None else best["test_top1"] - stage.published
                found.append(
                    Reached(stage.name, best["test_top1"], best["epoch"], stage.published, stage.table, distance)
                )
        return tuple(found)

    @property
    def distance(self) -> float | None:
        """best_top1 minus the published accuracy of its stage, in points; None where nothing is published."""
        return self.reached[-1].distance if self.reached else None


def read(folder: str | os.PathLike[str]) -> RunRecord:
    """The run in a folder. Raises UsageError where there is none, CheckpointError where a file of it is damaged."""
    path = Path(folder)
    if not (path / RECORD).is_file():
        raise UsageError(
            f"{path}: holds no run ({RECORD} is not there); expected a folder that `repbnn finetune` wrote"
        )
    environment = json_object(path / ENVIRONMENT)
    try:
        about = dict(environment.get("network") or {})
        stages = tuple(StageRecord(**stage) for stage in environment.get("stages", ()))
        seed, data = environment["seed"], environment["data"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / ENVIRONMENT}: is not what a run records ({type(error).__name__}: {error}); {_DAMAGED}"
        ) from None
    rows = _rows(path / METRICS, "stage", "epoch", "test_top1")
    measured = [row for row in rows if row["epoch"] and row["stage"] == rows[-1]["stage"]]
    best = max(measured, key=lambda row: row["test_top1"], default=None)  # the first of equals, as best.pt is
    finished = (path / "checkpoints" / "last.pt").is_file()
    return RunRecord(
        path=path,
        network=about.get("name") or path.name,
        arch=about.get("arch"),
        beta=about.get("beta"),
        target=about.get("target"),
        start_sha256=about.get("sha256"),
        source_top1=about.get("source_top1"),
        recipe=environment.get("recipe") or "",
        recipe_text=_text(path / RECIPE),
        seed=seed,
        data=data,
        data_notes=tuple(environment.get("data_notes", ())),
        stages=stages,
        rows=rows,
        timing=_rows(path / TIMING),
        best_top1=best["test_top1"] if best else None,
        best_epoch=best["epoch"] if best else None,
        last_top1=measured[-1]["test_top1"] if measured else None,
        finished=finished,
        state="finished" if finished else _unfinished(path, stages),
        environment=environment,
    )


def other_rank() -> str | None:
    """The rank of this process, where torchrun started several and it is not the first of them."""
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    return None if rank == "0" else rank


def folder_of(checkpoint: str | os.PathLike[str]) -> Path | None:
    """The run that a file is of: RUN for RUN/checkpoints/best.pt; None for files from elsewhere."""
    place = Path(os.path.abspath(checkpoint)).parent.parent
    return place if (place / RECORD).is_file() else None


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a run, begun or done."""
    return (Path(folder) / RECORD).is_file()


def check_free(folder: str | os.PathLike[str]) -> None:
    """Raises UsageError where a new run would meet another one, or what is no folder."""
    path = Path(folder)
    if is_run(path):
        raise UsageError(f"{folder}: holds a run already; --resume continues it, or give another folder")
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not writable" if there.is_dir() else "is no folder"
        raise UsageError(f"{folder}: cannot be a run's folder ({there} {why}); choose another place")
    logs = (path / name for name in (METRICS, TABLE, TIMING))
    left = [place for place in (*logs, *(path / "checkpoints").glob("*.pt")) if place.exists()]
    if left:  # a state of another run would pass for the new one's
        raise UsageError(f"{left[0]}: is of a run that is gone; remove it, or give another folder")


def check_resumable(folder: str | os.PathLike[str]) -> None:
    """Raises UsageError where there is no run to go on with."""
    if not is_run(folder):
        raise UsageError(f"{folder}: holds no run to resume; start one without --resume")


def begun_by(folder: str | os.PathLike[str]) -> str | None:
    """The command line that a run began with, where it is on record and names a network."""
    command = json_object(Path(folder) / ENVIRONMENT).get("command")
    words = [str(word) for word in command[1:]] if isinstance(command, list) else []
    named = words[:1] == ["finetune"] and len(words) > 1 and not words[1].startswith("-")
    return f"`repbnn {shlex.join(words)}`" if named else None


def states(path: Path) -> list[tuple[tuple[int, ...], Path]]:
    """The states that a run's folder holds, the oldest first: (stage, epoch, batch) and file of each."""
    found = []
    for file in (path / "checkpoints").glob("state-*.pt"):
        numbers = file.stem.split("-")[1:]
        if len(numbers) == 3 and all(number.isdigit() for number in numbers):
            found.append((tuple(map(int, numbers)), file))
    return sorted(found)


def _unfinished(path: Path, stages: tuple[StageRecord, ...]) -> str:
    """Where the last state stands: the steps after it are lost when the run is not running any more."""
    found = states(path)
    if not found:
        return "unfinished: no state saved yet"
    (stage, epoch, batch), _ = found[-1]
    if stage >= len(stages):
        return "unfinished: all epochs done, not written out"
    step = f", batch {batch + 1}" if batch else ""
    return f"unfinished: goes on at stage {stages[stage].name}, epoch {epoch + 1} of {stages[stage].epochs}{step}"


def _rows(path: Path, *needed: str) -> tuple[dict[str, Any], ...]:
    """One object a line; `needed`: keys that each has."""
    if not path.exists():
        return ()
    rows = []
    for number, line in enumerate(_text(path).splitlines(keepends=True), 1):
        if not line.endswith("\n"):  # being written, or a killed run was in the middle of it
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise CheckpointError(f"{path}:{number}: is not JSON; {_DAMAGED}") from None
        if not isinstance(row, dict) or not row.keys() >= set(needed):
            raise CheckpointError(f"{path}:{number}: is no row of a run (expected {', '.join(needed)}); {_DAMAGED}")
        rows.append(row)
    return tuple(rows)


def json_object(path: Path) -> dict[str, Any]:
    """What a run's JSON file holds. Raises CheckpointError where it is damaged."""
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}:{error.lineno}: is not JSON; {_DAMAGED}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is no JSON object; {_DAMAGED}")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); the run's folder is incomplete") from None
