"""What a report says of training runs: what each is, how far it is from the paper, its curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from repbnn_cli import result
from repbnn_cli.report.charts import Line as Curve
from repbnn_cli.report.charts import lines
from repbnn_cli.report.document import Block, Code, Document, Figures, Folded, Items, Line, Listing, Section, Table
from repbnn_cli.report.svg import Plot
from repbnn_cli.runs import RunRecord

Value = Callable[[Mapping[str, Any]], float | None]


def document(records: Sequence[RunRecord], title: str) -> Document:
    """A report of runs alone."""
    blocks = [*runs(records)]
    return Document(f"RepBNN report: {title}", [], [Section("runs", "Training", blocks)])


def measured(training: Mapping[str, Any], top1: float) -> Line:
    """Accuracy of a network, and what led to it."""
    told = [f"{name} {training[name]}" for name in ("recipe", "data", "seed") if training.get(name) is not None]
    if training.get("epochs") is not None:
        reached = training.get("epoch", training["epochs"])
        told.append(f"epoch {reached} of {training['epochs']}")
    if result.has_float_kernels(training):
        told.append("with float kernels")
    if "measured" in training:
        told.append("measured on {data}, prepared as by {recipe}".format(**training["measured"]))
    return f"{top1:g} % top-1" + (f" ({', '.join(told)})" if told else "")


def runs(records: Sequence[RunRecord]) -> Iterator[Block]:
    """Nothing without runs."""
    if not records:
        return
    names = dict(zip((r.path for r in records), _names(records), strict=True))
    yield Table(
        ("run", "network", "data", "recipe", "seed", "epochs", "source", "before", "best", "last", "paper", "Δ paper"),
        [_row(names[r.path], r) for r in records], left=4, caption="Training runs; accuracies are top-1 in percent",
    )  # fmt: skip
    yield Items([_state(names[r.path], r) for r in records])
    yield Figures(_plots(names, records))
    for record in records:
        blocks: list[Block] = [_epochs(record)]
        if record.recipe_text:
            blocks.append(Listing(record.recipe_text, "yaml"))
        yield Folded(f"{names[record.path]}: every epoch, and its recipe", blocks)


def _names(records: Sequence[RunRecord]) -> list[str]:
    """The folders' names, with as many folders above as it takes to tell them apart."""
    paths = [r.path.absolute().parts for r in records]
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len({*names}) == len({*paths}):
            return names
    return []


def _row(name: str, record: RunRecord) -> tuple[Line, ...]:
    published = record.reached[-1].published if record.reached else None
    before = next((row.get("test_top1") for row in record.rows if row["epoch"] == 0), None)
    beta = f", β = {record.beta}" if record.beta else ""
    return (
        Code(name), record.network + beta, record.data, record.recipe, str(record.seed),
        f"{sum(1 for r in record.rows if r['epoch'])} of {record.epochs}",
        *(_percent(v) for v in (record.source_top1, before, record.best_top1, record.last_top1, published)),
        f"{record.distance:+.2f}" if record.distance is not None else "",
    )  # fmt: skip


def _state(name: str, record: RunRecord) -> Line:
    told = next((r for r in reversed(record.reached) if r.table and r.published is not None), None)
    table = f"; the paper's figure is of {told.table}" if told else ""
    best = f"; best after epoch {record.best_epoch}" if record.best_epoch is not None else ""
    return (Code(name), f": {record.state}{best}{table}", *(f"; {note}" for note in record.data_notes))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _epochs(record: RunRecord) -> Table:
    body: list[tuple[Line, ...]] = []
    for row in record.rows:
        figures = (row.get(k) for k in ("lr", "loss", "train_top1", "test_loss", "test_top1"))
        shares = (_mean("flips")(row), _mean("dead")(row))
        body.append(
            (row["stage"], str(row["epoch"]), *("" if v is None else f"{v:.4g}" for v in figures),
             *("" if v is None else f"{v:.2f}" for v in shares))
        )  # fmt: skip
    headings = ("stage", "epoch", "lr", "loss", "train top-1", "test loss", "test top-1", "flipped %", "dead %")
    return Table(headings, body, left=1, sortable=True)


def _mean(name: str) -> Value:
    """Mean over layers of a share per layer, in percent."""

    def value(row: Mapping[str, Any]) -> float | None:
        shares = row.get(name)
        return 100 * fmean(shares.values()) if shares else None

    return value


def _named(name: str) -> Value:
    return lambda row: row.get(name)


def _plots(names: Mapping[Any, str], records: Sequence[RunRecord]) -> list[Plot]:
    both = len(records) > 1
    # One line for all runs: where the paper's figure is not the same for them, the table tells whose it is.
    published = {r.reached[-1].published if r.reached else None for r in records}
    paper = next(iter(published)) if len(published) == 1 else None
    target = None if paper is None else (f"paper: {paper:g}", paper)

    def curves(*parts: tuple[str, Value]) -> list[Curve]:
        found = []
        for record in records:
            for part, value in parts:
                name = ", ".join(n for n in (names[record.path] if both else "", part) if n)
                found.append(Curve(name or names[record.path], points(record, value)))
        return [c for c in found if c.points]

    across = "epoch (stages one after the other)" if any(len(r.stages) > 1 for r in records) else "epoch"
    made = []
    accuracy = curves(("train", _named("train_top1")), ("test", _named("test_top1")))
    for name, title, unit, found, line in (
        ("run-top1", "Top-1 accuracy", "%", accuracy, target),
        ("run-loss", "Loss", "", curves(("train", _named("loss")), ("test", _named("test_loss"))), None),
        ("run-flips", "Signs that flipped in an epoch", "%, mean over layers", curves(("", _mean("flips"))), None),
        ("run-dead", "Dead latent weights", "%, mean over layers", curves(("", _mean("dead"))), None),
    ):  # fmt: skip
        if found:
            made.append(lines(name, title, found, across=across, unit=unit, target=line))
    return made


def points(record: RunRecord, value: Value) -> tuple[tuple[float, float], ...]:
    """(epoch, value), epochs counted over all stages; what is not finite has no place in a chart."""
    offsets, total = {}, 0
    for stage in record.stages:
        offsets[stage.name] = total
        total += stage.epochs
    made = []
    for row in record.rows:
        found = value(row)
        if isinstance(found, int | float) and abs(found) < float("inf"):
            made.append((float(offsets.get(row["stage"], 0) + row["epoch"]), float(found)))
    return tuple(made)
