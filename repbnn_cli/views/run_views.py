"""What a training run says on a terminal: a bar with what it is doing now, a line per epoch, what it reached.

Everything goes to stderr, so that stdout holds results alone.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from repbnn_cli import runs
from repbnn_cli.source import Origin
from repbnn_cli.views import networks as views

QUIET_SECONDS = 60.0  # without a terminal: the longest silence within an epoch


class Bar:
    """On a terminal: a bar over the epochs of the present stage, with the time that is left; epochs scroll above it."""

    def __init__(self, epochs: Mapping[str, int | None]) -> None:
        self._epochs, self._tasks = epochs, dict[str, TaskID]()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=12), TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[state]}"), TimeRemainingColumn(compact=True), TextColumn("left"),
            console=views.console(error=True),
        )  # fmt: skip

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, now: runs.Progress) -> None:
        """After some steps of an epoch."""
        if now.stage not in self._tasks:
            for task in self._tasks.values():
                self._bar.remove_task(task)
            self._tasks[now.stage] = self._bar.add_task("", total=now.batches * now.epochs, state="")
        self._bar.update(
            self._tasks[now.stage], completed=(now.epoch - 1) * now.batches + now.batch, state=_state(now),
            description=f"epoch {now.epoch}/{now.epochs}",
        )  # fmt: skip

    def epoch(self, row: Mapping[str, Any]) -> None:
        """After an epoch."""
        self._bar.console.print(epoch_line(row, self._epochs), soft_wrap=True)


class Lines:
    """Elsewhere: a line per epoch, and one a minute within it."""

    def __init__(self, epochs: Mapping[str, int | None]) -> None:
        self._epochs, self._spoke = epochs, time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, now: runs.Progress) -> None:
        """After some steps of an epoch."""
        if time.monotonic() - self._spoke >= QUIET_SECONDS:
            self._say(f"epoch {now.epoch}/{now.epochs} batch {now.batch}/{now.batches}  {_state(now)}")

    def epoch(self, row: Mapping[str, Any]) -> None:
        """After an epoch."""
        self._say(epoch_line(row, self._epochs))

    def _say(self, line: str) -> None:
        views.say(line)
        sys.stderr.flush()
        self._spoke = time.monotonic()


def watcher(epochs: Mapping[str, int | None]) -> Bar | Lines:
    """Who shows a run here; epochs: the length of each stage, None where it is in iterations."""
    return Bar(epochs) if sys.stderr.isatty() else Lines(epochs)


@contextmanager
def transfer(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Shows how far a download is, by (bytes so far, bytes in all if known): a bar on a terminal, else every tenth."""
    if sys.stderr.isatty():
        columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=views.console(error=True)) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    said = 0

    def say(done: int, total: int | None) -> None:
        nonlocal said
        part = done * 10 // total if total else done // (16 * 2**20)
        if part > said:
            said = part
            views.say(f"{name}: {done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f}" if total else ""))

    yield say


def fitted_line(path: str, before: float, after: float) -> str:
    """How much of the source's values behind a convolution the Rep network misses, before and after fitting it."""
    return f"  {path}: misses {100 * after:.1f} % of the source's variance, {100 * before:.1f} % before"


def spread_line(spread: float, norms: int, convs: int) -> str:
    """Of how many RepConvs the copies start apart."""
    rest = "; no BatchNorm takes the repeated output of the others" if norms < convs else ""
    return f"BatchNorm shifts from -{spread:g} to {spread:g} behind {norms} of {convs} RepConvs{rest}"


def epoch_line(row: Mapping[str, Any], epochs: Mapping[str, int | None]) -> str:
    """A row of metrics as one line; the stage is named where there are several."""
    stage = f"{row['stage']} " if len(epochs) > 1 else ""
    if row["epoch"] == 0:
        return f"{stage}before the first step: top-1 {row['test_top1']:.2f} % test"
    total = epochs.get(row["stage"])
    parts = [
        f"{stage}epoch {row['epoch']}" + (f"/{total}" if total else ""),
        f"loss {row['loss']:.3f}",
        f"top-1 {row['train_top1']:.2f} train, {row['test_top1']:.2f} test, {row['best_top1']:.2f} best %",
    ]
    if row.get("images_per_s"):
        parts.append(f"{row['images_per_s']:.0f} images/s")
    return "  ".join(parts)


def stage_lines(stages: Sequence[tuple[str, int, str, str, str]]) -> list[str]:
    """What the stages are and hand over: (name, length, unit, kernels, hands_over) each; a single one needs no word."""
    if len(stages) < 2:
        return []
    lines = []
    for number, (name, length, unit, kernels, hands_over) in enumerate(stages, 1):
        many = unit if length > 1 else unit.removesuffix("s")
        line = f"stage {number} of {len(stages)}, {name}: {length} {many}, {kernels} kernels"
        lines.append(f"{line}; hands over {hands_over}" if hands_over and number < len(stages) else line)
    return lines


def distance_lines(reached: Sequence[runs.Reached]) -> list[str]:
    """How far each stage is from what is published after it; nothing for a stage after which nothing is."""
    lines = []
    for stage in reached:
        if stage.published is not None and stage.distance is not None:
            name = f"stage {stage.stage}: " if len(reached) > 1 else ""
            way = "above" if stage.distance > 0 else "below"
            lines.append(f"{name}{stage.top1:.2f} % top-1, {abs(stage.distance):.2f} points {way} the published "
                         f"{stage.published} % ({stage.table})")  # fmt: skip
    return lines


def next_line(best: str, origin: Origin, *, rep: bool) -> str:
    """What to do with the network of a finished run; a result has the arguments of the user's own code in it."""
    own = views.own_code(origin.model)
    if origin.model_args and not rep:
        own += f" --model-args {shlex.quote(json.dumps(origin.model_args))}"
    return f"next: repbnn {'report' if rep else 'transform'} {shlex.quote(best)}{own}"


def _state(now: runs.Progress) -> str:
    return f"loss {now.loss:.3f}  top-1 {now.top1:.1f} %  {now.images_per_s:.0f} images/s"
