"""What a report says, as values: what it is given, and what `build` makes of that. Measures nothing.

Same input, same bytes: nothing here reads a clock, a file or the machine; the caller passes what is to be said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repbnn_cli import paper, result
from repbnn_cli.anatomy import Block
from repbnn_cli.anatomy.tensor_stats import Activations, FeatureMaps, Weights
from repbnn_cli.number_text import exact
from repbnn_cli.profiler import METRICS, Comparison
from repbnn_cli.runs import RunRecord
from repbnn_cli.views.tables import LABELS

INHERIT: Mapping[str, str] = {
    "fold": "convolution channel o holds the original filters o, o + O/β, …, whose channels its repeats stand for",
    "reshape": "the literal kernel.reshape(O/β, I·β, kh, kw)",
    "none": "fresh initialisation, to be trained from scratch as the paper does",
}
LAST_LAYER: Mapping[str, str] = {
    "all": "way 1: the classifier takes all β·C inputs",
    "1_over_beta": "way 2: the classifier takes C of the β·C inputs",
    "1_over_beta2": "way 3: the classifier takes C/β of the β·C inputs",
}


@dataclass(frozen=True)
class Standing:
    """A network in the landscape. group: whose it is; ops: without BN; top1: in percent, None where nobody said."""

    name: str
    group: str
    ops: int | float
    top1: float | None


@dataclass(frozen=True)
class Evidence:
    """What was measured on the networks themselves; what is empty is left out of the report.

    blocks: the graph. weights, activations: (source, Rep network); the source side is empty where its weights are not
    in the file. images: what the activations come from, in words. maps: one value per image.
    others: further networks for the landscape, ours excepted.
    """

    blocks: Sequence[Block] = ()
    weights: tuple[Sequence[Weights], Sequence[Weights]] = ((), ())
    activations: tuple[Sequence[Activations], Sequence[Activations]] = ((), ())
    images: str = ""
    maps: Sequence[FeatureMaps] = ()
    others: Sequence[Standing] = ()


@dataclass(frozen=True)
class ReportInput:
    """Plain values, as a result file holds them; what is None or empty is left out of the report.

    options: beta, inherit, last_layer. plan: rows as `PlanRow.as_plain` gives them. certificate: checks as
    `Certificate.as_plain` gives them. accuracy: what the source checkpoint states, in percent, and under which key.
    environment: name → version. timestamp: written as given. data: the data set that the source network is for.
    training: what the result file says of the Rep network's training (`top1`, `recipe`, `data`, `seed`, ...).
    runs: training runs, of this network or beside it.
    """

    title: str
    rules_name: str
    rules_text: str
    options: Mapping[str, Any]
    plan: Sequence[Mapping[str, Any]]
    certificate: Sequence[Mapping[str, Any]]
    costs: Comparison
    arch: str | None = None
    network: str | None = None
    source_file: str | None = None
    source_sha256: str | None = None
    source_bytes: int | None = None
    result_file: str | None = None
    result_sha256: str | None = None
    accuracy: float | None = None
    accuracy_key: str | None = None
    published: tuple[paper.Accuracy, ...] = ()
    published_costs: tuple[paper.Cost, ...] = ()
    notes: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    timestamp: str | None = None
    data: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    runs: Sequence[RunRecord] = ()
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def rep_accuracy(self) -> float | None:
        """Of the Rep network, in percent, once it was measured with binary kernels."""
        return result.top1_of(self.training)


@dataclass(frozen=True)
class PlanGroup:
    """Modules that one rule changes in one way, with the shapes that occur, in order."""

    part: str
    rule: str
    action: str
    modules: tuple[str, ...]
    changes: tuple[str, ...]


@dataclass(frozen=True)
class PaperCost:
    """One cost exactly counted here beside the printed one; values of source and Rep network."""

    table: str
    metric: str
    ours: tuple[int | float, int | float]
    printed: tuple[paper.Rounded, paper.Rounded]


@dataclass(frozen=True)
class Report:
    """What `build` made of its input."""

    given: ReportInput
    plan: tuple[PlanGroup, ...]
    passed: bool
    paper_costs: tuple[PaperCost, ...]


def build(given: ReportInput) -> Report:
    """Groups the plan and lays our costs beside the paper's."""
    totals = given.costs.totals
    beside = tuple(
        PaperCost(c.table, c.metric, (totals[m].before, totals[m].after), (c.raw, c.rep))
        for c in given.published_costs
        for m in METRICS
        if m == c.metric
    )
    return Report(given, _groups(given.plan), all(c["passed"] for c in given.certificate), beside)


def _groups(plan: Sequence[Mapping[str, Any]]) -> tuple[PlanGroup, ...]:
    rows: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in plan:
        rows.setdefault((row["part"], row["rule"], row["action"]), []).append(row)
    return tuple(
        PlanGroup(
            *key,
            tuple(str(r["path"]) for r in members),
            tuple(dict.fromkeys(f"{r['before']} → {r['after']}" for r in members)),
        )
        for key, members in rows.items()
    )


def differences(report: Report) -> Iterator[str]:
    """A printed figure that the exact count does not round to."""
    for cost in report.paper_costs:
        for side, ours, theirs in zip(("source", "Rep"), cost.ours, cost.printed, strict=True):
            if not _rounds_to(ours, theirs):
                off = 100 * (theirs.as_number() / ours - 1)
                yield (
                    f"{cost.table}, {LABELS[cost.metric]}, {side}: the paper's {printed(theirs)} is {off:+.2f} % off "
                    "the exact count by its own definition."
                )


def _rounds_to(ours: int | float, theirs: paper.Rounded) -> bool:
    """Whether the exact count, rounded to the printed digits, is the printed figure."""
    decimals = len(repr(theirs.value).partition(".")[2]) if isinstance(theirs.value, float) else 0
    unit = 10.0 ** (theirs.exponent - decimals) if theirs.exponent else 0.0
    return abs(ours - theirs.as_number()) <= unit / 2 * (1 + 1e-9)


def printed(figure: paper.Rounded) -> str:
    """0.102 ×10⁷, or an exact integer."""
    if not figure.exponent:
        return exact(figure.value)
    return f"{figure.value} ×10{str(figure.exponent).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
