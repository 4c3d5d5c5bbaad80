"""A sweep's folder read back: its experiment, and for each network and variant the runs that there are.

OUT/experiment.yaml          the experiment, as it was given
OUT/budget.json              what the command line put in its place: data, epochs, overrides of the recipe; and the
                             SHA-256 of the files that the experiment names
OUT/starts/CELL.repbnn.pt    transformed networks that runs start from
OUT/CELL/                    an ordinary run each
OUT/logs/CELL.log            what its command printed
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from repbnn_cli import paper, rules, zoo
from repbnn_cli.errors import CheckpointError, UsageError
from repbnn_cli.paper import Accuracy
from repbnn_cli.runs import experiments
from repbnn_cli.runs import records as runs
from repbnn_cli.runs.experiments import Cell, Experiment, Variant
from repbnn_cli.runs.records import RunRecord
from repbnn_cli.writing import atomic_write_text
from repbnn_cli.zoo import Arch

EXPERIMENT, BUDGET, STARTS, LOGS = "experiment.yaml", "budget.json", "starts", "logs"


@dataclass(frozen=True)
class Budget:
    """What the command line decides for all cells alike: both sides of every comparison get the same."""

    data: str
    epochs: int | None = None
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class OverSeeds:
    """Mean of n values and their sample standard deviation, which one value does not have."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """One network and variant over all seeds; top-1 in percent, differences in points.

    runs: those that were begun; best, last: over finished runs, the best epoch's and the last epoch's accuracy.
    gain: best minus that of the same network's source variant with the same seed, over the seeds that both finished.
    published, published_gain: the paper's figure, and its difference to the source network's in the same row.
    """

    network: str
    variant: str
    transforms: bool
    seeds: int
    runs: tuple[RunRecord, ...]
    best: OverSeeds | None
    last: OverSeeds | None
    gain: OverSeeds | None
    published: float | None
    published_gain: float | None

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        return tuple(run for run in self.runs if run.finished)

    @property
    def epochs(self) -> tuple[int, ...]:
        """Of the runs that were begun, each number once."""
        return tuple(sorted({run.epochs for run in self.runs}))


@dataclass(frozen=True)
class Sweep:
    """path: its folder; notes: what a reader of the table has to know."""

    path: Path
    experiment: Experiment
    budget: Budget
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def begin(path: Path, experiment: Experiment, budget: Budget) -> None:
    """Claims a folder for a sweep, or checks that the sweep in it is this one. Raises UsageError."""
    if not (path / EXPERIMENT).exists():
        for folder in (path / STARTS, path / LOGS):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = error.strerror
                raise UsageError(f"{path}: cannot be a sweep's folder ({why}); choose another place") from None
        stored = {**asdict(budget), "files": _contents(experiment)}
        atomic_write_text(path / BUDGET, json.dumps(stored, ensure_ascii=False) + "\n", force=True)
        atomic_write_text(path / EXPERIMENT, experiment.text, force=True)
        return
    _, known_experiment, known, contents = _opened(path)
    now_there = _contents(experiment)
    changed = [
        *(["the experiment file"] if experiment.text != known_experiment.text else []),
        *(f"what is in {name}" for name, content in contents.items() if now_there.get(name, content) != content),
        *(f"{key} (was {was}, is {now})" for (key, was), now in zip(asdict(known).items(), asdict(budget).values(),
                                                                    strict=True) if was != now),
    ]  # fmt: skip
    if changed:
        raise UsageError(f"{path}: holds another sweep; changed: {', '.join(changed)}; give another folder with --out")


def read(folder: str | os.PathLike[str]) -> Sweep:
    """The sweep in a folder, also while it runs. Raises UsageError where there is none."""
    path, experiment, budget, _ = _opened(Path(folder))
    begun = {cell: runs.read(path / cell.name) for cell in experiment.cells if runs.is_run(path / cell.name)}
    rows: list[Row] = []
    for network in experiment.networks:
        sources = [n for n, variant in experiment.file.variants.items() if not variant.transforms]
        for name in experiment.file.variants:
            rows.append(_row(experiment, budget, begun, network, name, sources[0] if sources else None))
    return Sweep(path, experiment, budget, tuple(rows), _notes(rows))


def _contents(experiment: Experiment) -> dict[str, str]:
    """SHA-256 by name: with another checkpoint, recipe or rule file under the same name, cells would not compare."""
    digests = {}
    for name in experiment.files:
        with open(name, "rb") as stream:
            digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _opened(path: Path) -> tuple[Path, Experiment, Budget, dict[str, str]]:
    if not (path / EXPERIMENT).is_file():
        raise UsageError(f"{path}: holds no sweep ({EXPERIMENT} is not there); expected a folder of `repbnn sweep`")
    experiment = experiments.loads((path / EXPERIMENT).read_text("utf-8"), str(path / EXPERIMENT))
    try:
        stored = json.loads((path / BUDGET).read_text("utf-8"))
        budget = Budget(stored["data"], stored["epochs"], tuple(stored["sets"]))
        return path, experiment, budget, dict(stored.get("files", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / BUDGET}: cannot be read ({error}); the sweep's folder was changed") from None


def _row(
    experiment: Experiment, budget: Budget, begun: dict[Cell, RunRecord], network: str, name: str, source: str | None
) -> Row:  # fmt: skip
    variant = experiment.file.variants[name]
    cells = [c for c in experiment.cells if (c.network, c.variant_name) == (network, name)]
    of_seed = {c.seed: begun[c] for c in cells if c in begun}
    finished = {seed: run for seed, run in of_seed.items() if run.finished and run.best_top1 is not None}
    gains = []
    if source not in (None, name):
        for cell in begun:
            run = begun[cell]
            if (cell.network, cell.variant_name) == (network, source) and run.finished and cell.seed in finished:
                gains.append((finished[cell.seed].best_top1 or 0.0) - (run.best_top1 or 0.0))
    table = None if variant.spread else experiment.table_of(name)  # the paper's networks start with copies alike
    arch = zoo.ARCHS.get(experiment.networks[network].checkpoint)
    if arch is not None and not paper.same_data(arch.data, budget.data.partition(":")[0]):
        arch = None
    stated = _stated(arch, table, variant) if arch is not None and table else None
    published = None if stated is None else stated.rep if variant.transforms else stated.raw
    gain = None
    if stated is not None and variant.transforms and None not in (stated.raw, stated.rep):
        assert stated.raw is not None
        assert stated.rep is not None
        gain = stated.rep - stated.raw
    best = [run.best_top1 for run in finished.values() if run.best_top1 is not None]
    last = [run.last_top1 for run in finished.values() if run.last_top1 is not None]
    return Row(network, name, variant.transforms, len(cells), tuple(of_seed.values()), _over_seeds(best),
               _over_seeds(last), _over_seeds(gains), published, gain)  # fmt: skip


def _stated(arch: Arch, table: str, variant: Variant) -> Accuracy | None:
    """The network's row in the paper's table that a variant is, by the setting it names or by its options.

    The first row of every table has the paper's defaults, and the source network's figure, which all rows share.
    """
    if variant.setting is not None or not variant.transforms:
        return paper.row(arch, table, variant.setting)
    name = variant.rules or "reptran"
    if name not in rules.names():
        return None
    made = rules.load(name).with_options(variant.beta, variant.inherit, variant.last_layer).options
    own, default = paper.setting(made.beta, made.last_layer, name), paper.setting(2, "all", "reptran")
    return None if own is None else paper.row(arch, table, None if own == default else own)


def _over_seeds(values: Sequence[float]) -> OverSeeds | None:
    if not values:
        return None
    return OverSeeds(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _notes(rows: Sequence[Row]) -> tuple[str, ...]:
    """What the data are, equal and unequal budgets, missing runs, one seed."""
    notes = [note for row in rows for run in row.runs for note in run.data_notes]
    notes += _budgets(rows)
    missing = sum(row.seeds - len(row.finished) for row in rows)
    if missing:
        notes.append(f"{missing} of {sum(row.seeds for row in rows)} runs are not finished and not in the figures")
    if any(row.best and row.best.n == 1 for row in rows):
        notes.append("figures of one seed have no spread: differences of a few tenths of a point mean nothing")
    return tuple(dict.fromkeys(notes))


def _budgets(rows: Sequence[Row]) -> Iterator[str]:
    """Comparisons are within a network: two networks may have as many epochs as their own recipes say."""
    of_network: dict[str, set[int]] = {}
    for row in rows:
        of_network.setdefault(row.network, set()).update(row.epochs)
    found = set[int]().union(*of_network.values())
    unequal = {network: epochs for network, epochs in of_network.items() if len(epochs) > 1}
    for network, epochs in unequal.items():
        yield f"{network}: budgets differ between its runs: {', '.join(map(str, sorted(epochs)))} epochs"
    if len(found) == 1:
        yield f"epochs of every run: {found.pop()}"
    elif found and not unequal:
        yield "all runs of a network have the same number of epochs, so both sides of every comparison do"
