"""`repbnn sweep`: runs the cells of an experiment, each by the commands a person would type, several at a time."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from repbnn_cli import checkpoint, report, result, runs, source, views, zoo
from repbnn_cli import rules as rulebook
from repbnn_cli.commands import pupils, targets
from repbnn_cli.data import check_spec, check_there
from repbnn_cli.errors import RepbnnError, StoppedError, UsageError
from repbnn_cli.runs import experiments, sweeps
from repbnn_cli.runs.experiments import Cell, Experiment
from repbnn_cli.runs.sweeps import Budget, Sweep
from repbnn_cli.train import recipes
from repbnn_cli.train.guards import stopping
from repbnn_cli.wording import some

COMMAND = (sys.executable, "-m", "repbnn_cli")


def sweep(
    file: str, *, data: str | None, epochs: int | None, sets: list[str], out: str | None, jobs: int, only: list[str],
    device: str | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Every cell that is not finished, or those that `only` names; then the table of what there is."""
    experiment = experiments.load(file)
    cells = _chosen(experiment.cells, only)
    budget = Budget(data or experiment.file.data, epochs or experiment.file.epochs, tuple(sets))
    folder = Path(out) if out else Path("runs") / experiment.name
    _check(experiment, budget, device)
    if dry_run:  # for another computer, perhaps: the data need not be here
        steps = {cell.name: [shlex.join(("repbnn", *step)) for step in _steps(experiment, cell, budget, folder, device)]
                 for cell in cells}  # fmt: skip
        if as_json:
            views.print_json({"cells": [{"name": name, "commands": commands} for name, commands in steps.items()]})
        else:
            views.print_text("\n".join(line for commands in steps.values() for line in commands))
        return
    if not all(runs.is_run(folder / cell.name) for cell in cells):
        check_there(budget.data)
    sweeps.begin(folder, experiment, budget)
    failed = _run_all(experiment, cells, budget, folder, jobs, device)
    read = sweeps.read(folder)
    if as_json:
        views.print_json(report.sweep_as_dict(read))
    else:
        views.console().print(_table(read))
        views.say(*report.sweep_explanation(read))
    if failed:
        logs = ", ".join(str(folder / sweeps.LOGS / f"{name}.log") for name in failed)
        raise RepbnnError(f"{len(failed)} of {len(cells)} cells failed; see {logs}")


def _chosen(cells: Sequence[Cell], patterns: list[str]) -> list[Cell]:
    """The cells whose names match one of the patterns, all where there is none. Raises UsageError."""
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            names = some([cell.name for cell in cells])
            raise UsageError(f"--only {pattern}: matches no cell; they are {names} (`--dry-run` shows all)")
    return [cell for cell in cells if not patterns or any(fnmatchcase(cell.name, p) for p in patterns)]


def _check(experiment: Experiment, budget: Budget, device: str | None) -> None:
    """What every cell would fail by, before a folder is claimed for them. Recipes of checkpoints are known once these
    are read, by their cells."""
    if device is not None:
        pupils.device_of(device)
    check_spec(budget.data)
    made = experiment.file
    for name, variant in made.variants.items():
        fitting = {"fit": variant.fit, "latents": variant.latents} if variant.inherit == "none" else {}
        if not variant.transforms:
            fitting = {key: getattr(variant, key) for key in ("distill", "fit", "spread", "latents")}
        for key, value in fitting.items():
            if value:
                what = "inherits nothing" if variant.transforms else "is not transformed"
                raise UsageError(f"{made.name}: variants.{name}.{key}: has no meaning for a network that {what}")
        sets = (*variant.set, *budget.sets)
        pupils.check_once(sets, {"epochs": budget.epochs, "distillation.weight": variant.distill or None})
        if variant.transforms:
            rule_set = rulebook.load(variant.rules or targets.DEFAULT_RULES)
            rule_set.with_options(variant.beta, variant.inherit, variant.last_layer)
    transforms = next((name for name, variant in made.variants.items() if variant.transforms), None)
    for network in made.networks:
        name, origin = network.checkpoint, network.origin
        arch = name if name in zoo.ARCHS else None
        file = checkpoint.load(name, key=network.key) if arch is None else None
        if file is not None and transforms and result.payload_in(file) is not None:
            raise UsageError(f"{made.name}: networks: {name} is a result of `repbnn transform`, which "
                             f"variants.{transforms} would transform again; name its source")  # fmt: skip
        known = targets.found(name, **origin).source if origin else None
        if made.recipe is not None:
            recipe = recipes.load(made.recipe, arch)
        elif known is not None or arch is not None:
            recipe = recipes.for_network(known.origin if known else source.zoo_origin(str(arch)))
        else:
            continue
        for variant in made.variants.values():
            recipes.override(recipe, (*variant.set, *budget.sets))


def _table(read: Sweep) -> Table:
    """As in the report, for 80 columns: networks above their variants, epochs left to the notes, no figure broken."""
    columns = [name for name in report.SWEEP_COLUMNS if name != "epochs"]
    made = views.table("variant")
    made.padding = (0, 1, 0, 0)
    for name in columns:
        made.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    network = None
    for row in read.rows:
        if row.network != network:
            made.add_row(row.network)
        network, texts = row.network, report.sweep_figures(row)
        made.add_row(f"  {row.variant}", *(texts[name] for name in columns))
    return made


def _steps(
    experiment: Experiment, cell: Cell, budget: Budget, folder: Path, device: str | None
) -> tuple[tuple[str, ...], ...]:
    """The commands of a cell: what is there already is not made again, a run that was begun is resumed."""
    variant, network, run_dir = cell.variant, experiment.networks[cell.network], folder / cell.name
    start, told, steps = network.checkpoint, network.origin, []
    if variant.transforms:
        start = str(folder / sweeps.STARTS / cell.result_name)
        how = {key: getattr(variant, key) for key in experiments.TRANSFORM}
        if not Path(start).exists():
            steps.append(("transform", network.checkpoint, *_options(**told, **how, seed=cell.seed), "-o", start))
        told = {"model": network.model}  # all else the result says itself
    recipe = _options(
        **told, data=budget.data, seed=cell.seed, run_dir=run_dir, recipe=experiment.file.recipe, epochs=budget.epochs
    )
    sets = [text for change in (*variant.set, *budget.sets) for text in ("--set", change)]
    distill = variant.distill or None
    fit = _options(
        distill=distill, fit=variant.fit, spread=variant.spread, latents=variant.latents, device=device or None
    )
    resume = ["--resume"] if runs.is_run(run_dir) else []
    return (*steps, ("finetune", start, *recipe, *sets, *fit, *resume))


def _options(**values: object) -> list[str]:
    """As a command line writes them, without those that are None."""
    given = {key.replace("_", "-"): str(value) for key, value in values.items() if value is not None}
    return [text for key, value in given.items() for text in (f"--{key}", value)]


@dataclass
class _Running:
    """The processes at work; a signal is handed on to them, and they save their states."""

    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    # Held while a process starts, so that `stop` misses none; a second signal may interrupt `stop` itself.
    lock: AbstractContextManager[Any] = field(default_factory=threading.RLock)
    stopped: int = 0

    def stop(self, number: int, frame: object = None) -> None:
        with self.lock:
            self.stopped = number
            for process in list(self.processes):
                process.send_signal(number)

    def run(self, command: Sequence[str], log: Path, threads: int | None) -> int:
        environment = dict(os.environ)
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        with log.open("ab") as stream:
            stream.write(f"$ {shlex.join(('repbnn', *command))}\n".encode())
            stream.flush()
            with self.lock:
                if self.stopped:
                    return 128 + self.stopped
                # A session of its own: Ctrl-C in a terminal reaches this process alone, which hands it on once.
                process = subprocess.Popen((*COMMAND, *command), stdout=stream, stderr=stream, env=environment,
                                           start_new_session=True)  # fmt: skip
                self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        return code


def _run_all(
    experiment: Experiment, cells: list[Cell], budget: Budget, folder: Path, jobs: int, device: str | None
) -> list[str]:
    """Runs those cells that are not finished; the names of those that failed. Raises StoppedError after a signal.

    All transforms come before the first training: they take seconds, and tell at once what does not fit.
    """
    running, failed = _Running(), []
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None

    def ran(cell: Cell, step: Sequence[str]) -> bool:
        log = folder / sweeps.LOGS / f"{cell.name}.log"
        code = running.run(step, log, threads)
        if code and not running.stopped:
            failed.append(cell.name)
            views.say(f"{cell.name}: failed with exit code {code}: {_last_line(log)}")
        return not code

    def transform(cell: Cell) -> None:
        if not _finished(folder, cell):
            for step in _steps(experiment, cell, budget, folder, device)[:-1]:
                ran(cell, step)

    def train(cell: Cell) -> None:
        if _finished(folder, cell):
            views.say(f"{cell.name}: finished before")
        elif cell.name not in failed and not running.stopped:
            views.say(f"{cell.name}: begins")
            if ran(cell, _steps(experiment, cell, budget, folder, device)[-1]):
                views.say(f"{cell.name}: {runs.read(folder / cell.name).best_top1:.2f} % best top-1")

    def guarded(work: Callable[[Cell], None], cell: Cell) -> None:
        try:
            work(cell)
        except (RepbnnError, OSError) as error:  # a damaged folder: the other cells go on
            if cell.name not in failed:
                failed.append(cell.name)
                views.say(f"{cell.name}: failed: {error}")

    before = {n: signal.signal(n, running.stop) for n in stopping()}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for work in (transform, train):
                list(pool.map(partial(guarded, work), cells))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if running.stopped:
        raise StoppedError(
            f"{folder}: stopped; the same command continues, runs that had begun from their states", running.stopped
        )
    return failed


def _finished(folder: Path, cell: Cell) -> bool:
    return runs.is_run(folder / cell.name) and runs.read(folder / cell.name).finished


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
