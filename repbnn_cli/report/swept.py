"""What a report says of a sweep: its table, top-1 by epoch, our gains beside the paper's, its runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

from repbnn_cli import paper
from repbnn_cli.report import charts
from repbnn_cli.report.document import Block, Code, Document, Figures, Folded, Items, Line, Listing, Section, Table
from repbnn_cli.report.svg import Plot
from repbnn_cli.report.trained import points
from repbnn_cli.runs.sweeps import OverSeeds, Row, Sweep

COLUMNS = ("runs", "epochs", "best top-1", "last top-1", "gain", "paper", "paper's gain")


def document(sweep: Sweep) -> Document:
    """The whole report, also while the sweep runs."""
    rows: list[tuple[Line, ...]] = [(Code(row.network), row.variant, *figures(row).values()) for row in sweep.rows]
    begun, written = _runs(sweep), Folded("The experiment file", [Listing(sweep.experiment.text, "yaml")])
    sections = [
        Section(
            "results", "Results", [Table(("network", "variant", *COLUMNS), rows, left=2), Items([*explanation(sweep)])]
        ),
        Section("curves", "Accuracy by epoch", [*_curves(sweep)]),
        Section("gains", "Gain over the source network", [*_gains(sweep)]),
        Section("runs", "Runs", [*([begun] if begun.rows else []), written]),
    ]
    title = f"{sweep.experiment.name}: {sweep.experiment.file.summary}"
    return Document(title, [Items([*_given(sweep)])], [section for section in sections if section.blocks])


def explanation(sweep: Sweep) -> Iterator[str]:
    """What stands under the table."""
    yield "runs: finished ones of those planned, one for each seed"
    yield "top-1 in percent: best over epochs, as the published codes report it, and that of the last epoch"
    yield "gain: points over the same network's source variant, paired by seed; ± is the sample standard deviation"
    if tables := ", ".join(_tables(sweep)):
        yield f"paper: {tables} of {paper.SOURCE}, trained for the full published schedules"
    yield from sweep.notes


def figures(row: Row) -> dict[str, str]:
    """A row of the table by column, after network and variant."""
    texts = (
        f"{len(row.finished)}/{row.seeds}", ", ".join(map(str, row.epochs)) or "–",
        _over_seeds(row.best), _over_seeds(row.last), _over_seeds(row.gain, sign="+"),
        _number(row.published), _number(row.published_gain, sign="+"),
    )  # fmt: skip
    return dict(zip(COLUMNS, texts, strict=True))


def _tables(sweep: Sweep) -> Iterator[str]:
    """The paper's tables; where there are several, each with its variants."""
    experiment = sweep.experiment
    for table in experiment.tables:
        variants = ", ".join(name for name in experiment.file.variants if experiment.table_of(name) == table)
        yield f"{table} ({variants})" if len(experiment.tables) > 1 else table


def _given(sweep: Sweep) -> Iterator[Line]:
    """What all runs share. A place on this machine is no part of it."""
    made = sweep.experiment.file
    yield f"data: {sweep.budget.data.partition(':')[0]}"
    yield f"seeds: {', '.join(map(str, made.seeds))}"
    if made.recipe:
        yield "recipe of every run: ", Code(made.recipe)
    if sweep.budget.sets:
        yield "set for every run: ", Code(" ".join(sweep.budget.sets))


# ---------------------------------------------------------------------------------------------------------------------
# Curves and bars

Means = Mapping[str, Mapping[float, float]]  # variant → epoch → top-1


def _curves(sweep: Sweep) -> Iterator[Block]:
    """A chart for each network that has an epoch; their curves have the same colours. Then the same as tables."""
    found = {network: _means(sweep, network) for network in sweep.experiment.networks}
    found = {network: means for network, means in found.items() if any(means.values())}
    if not found:
        return
    several = any(len(run.stages) > 1 for row in sweep.rows for run in row.runs)
    across = "epoch (stages one after the other)" if several else "epoch"
    yield Figures([_chart(number, *one, across) for number, one in enumerate(found.items(), 1)])
    yield Items(["means over the runs that have the epoch, unfinished ones too"])
    for network, means in found.items():
        yield Folded(f"{network}: top-1 of every epoch", [_epochs(means)])


def _means(sweep: Sweep, network: str) -> Means:
    means = {}
    for row in sweep.rows:
        if row.network == network:
            runs = [dict(points(run, lambda values: values["test_top1"])) for run in row.runs]
            epochs = sorted({epoch for run in runs for epoch in run})
            means[row.variant] = {epoch: fmean(run[epoch] for run in runs if epoch in run) for epoch in epochs}
    return means


def _chart(number: int, network: str, means: Means, across: str) -> Plot:
    """number: keeps the files of networks apart whose names differ in signs alone."""
    stem = re.sub("[^a-z0-9]+", "-", Path(network).name.split(".")[0].lower()).strip("-")[:60]
    curves = [charts.Line(variant, tuple(mean.items())) for variant, mean in means.items()]
    name = f"top1-{number}-{stem}".rstrip("-")
    return charts.lines(name, f"{network}: test top-1", curves, across=across, unit="%")


def _epochs(means: Means) -> Table:
    shown = {variant: mean for variant, mean in means.items() if mean}
    epochs = sorted({epoch for mean in shown.values() for epoch in mean})
    rows = [(f"{epoch:g}", *(_number(mean.get(epoch)) for mean in shown.values())) for epoch in epochs]
    return Table(("epoch", *shown), rows, sortable=True)


def _gains(sweep: Sweep) -> Iterator[Block]:
    """Nothing before the first gain: the paper's alone compare nothing."""
    if not any(row.gain for row in sweep.rows):
        return
    bars = [
        charts.Gain(row.network, row.variant, *_bar(row.gain), row.published_gain)
        for row in sweep.rows
        if row.gain or row.published_gain is not None
    ]
    budgets = "; the paper's after its full schedules" if any(bar.paper is not None for bar in bars) else ""
    title = f"Top-1 against the source network's{budgets}"
    yield Figures([charts.gains("gains", title, bars, "points")], wide=True)


def _bar(gain: OverSeeds | None) -> tuple[float | None, float | None]:
    return (None, None) if gain is None else (gain.mean, gain.deviation)


def _runs(sweep: Sweep) -> Table:
    rows = [
        (Code(run.path.name), run.state, str(run.seed), str(run.epochs), _number(run.best_top1),
         str(run.best_epoch or "–"))
        for row in sweep.rows for run in row.runs
    ]  # fmt: skip
    return Table(("run", "state", "seed", "epochs", "best top-1", "at epoch"), rows, left=2)


def _over_seeds(value: OverSeeds | None, sign: str = "") -> str:
    if value is None:
        return "–"
    spread = "" if value.deviation is None else f" ± {value.deviation:.2f}"
    return f"{value.mean:{sign}.2f}{spread}"


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.2f}"
