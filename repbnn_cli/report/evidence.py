"""What a report shows of the networks themselves: where they stand, their graph, their tensors, feature maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import TypeVar

from repbnn_cli import paper
from repbnn_cli.anatomy import Block as Part
from repbnn_cli.anatomy.tensor_stats import BINS, REACH, Activations, Weights
from repbnn_cli.number_text import exact, shortened
from repbnn_cli.report import charts, diagram
from repbnn_cli.report.document import Block, Code, Figures, Folded, Line, Paragraph, Table
from repbnn_cli.report.montage import montage
from repbnn_cli.report.svg import Plot
from repbnn_cli.report.value import Evidence, Report, Standing

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# OPs and accuracy


def landscape(report: Report) -> Iterator[Block]:
    """Ours, the paper's where they are of the same data set, and the caller's others."""
    standings = [*_ours(report), *_published(report), *report.given.evidence.others]
    known = [s for s in standings if s.top1 is not None]
    if not known:
        yield Paragraph(
            "Not known: the source checkpoint states none, the Rep network was not trained yet, and the paper has no "
            "figure for this network."
        )
        return
    points = [charts.Point(s.name, s.group, s.ops, s.top1) for s in standings]
    yield Figures([charts.landscape("landscape", "OPs and top-1 accuracy", points)], wide=True)
    rows = [(s.name, s.group, exact(s.ops), "" if s.top1 is None else f"{s.top1:g}") for s in standings]
    yield Folded(
        "The networks of the chart", [Table(("network", "from", "OPs", "top-1 %"), rows, left=2, sortable=True)]
    )
    if report.given.data == paper.CIFAR:
        yield Paragraph(
            "The paper's points are its accuracies for this network, at the OPs counted here; its Figure 1 is of "
            "ImageNet and not comparable."
        )
    elif report.given.data == paper.IMAGENET:
        yield Paragraph("The paper's points are those of its Figure 1.")


def _ours(report: Report) -> list[Standing]:
    given, ops = report.given, report.given.costs.totals["ops_without_bn"]
    data = given.training.get("measured", given.training).get("data")
    comparable = given.data is None or data is None or paper.same_data(given.data, data)
    return [
        Standing("source network", "this report", ops.before, given.accuracy),
        Standing("Rep network", "this report", ops.after, given.rep_accuracy if comparable else None),
    ]


def _published(report: Report) -> list[Standing]:
    given, ops = report.given, report.given.costs.totals["ops_without_bn"]
    if given.data == paper.IMAGENET:
        return [Standing(p.name, "paper, Figure 1", p.ops.as_number(), p.top1) for p in paper.FIGURE_1]
    if not given.published:
        return []
    main = given.published[0]
    here = paper.setting(given.options["beta"], given.options["last_layer"], given.rules_name)
    rep = next((a for a in given.published if a.setting == here), main if here == "β = 2" else None)
    found = [Standing(f"{main.method}, source", f"paper, {main.table}", ops.before, main.raw)]
    if rep is not None:
        found.append(Standing(f"Rep-{main.method}", f"paper, {rep.table}", ops.after, rep.rep))
    return [s for s in found if s.top1 is not None]


# ---------------------------------------------------------------------------------------------------------------------
# The graph


def graph(parts: Sequence[Part]) -> Iterator[Block]:
    """The overview; on a screen also every sort of block, operation by operation."""
    if not parts:
        return
    yield Figures([diagram.overview("network", "Blocks of the network, by resolution", parts)], wide=True)
    names = {o.name: part.name for part in parts for o in part.operations}
    alike: dict[tuple[object, ...], list[Part]] = {}
    for part in parts:
        alike.setdefault(part.likeness(), []).append(part)
    for i, members in enumerate(alike.values()):
        first = members[0]
        others = f" and {', '.join(p.name for p in members[1:])}, which are like it" if len(members) > 1 else ""
        changed = sum(1 for o in first.operations if o.change)
        what = f"{len(first.operations)} operation{'s' if len(first.operations) > 1 else ''}"
        what += f", {changed} changed" if changed else ""
        plot = Figures([diagram.detail(f"block-{i}", first, names)], wide=True)
        rows: list[tuple[Line, ...]] = [
            (Code(o.label), o.kind.replace("_", " "), diagram.shapes(o.before, o.after),
             diagram.change_of(o)[0] if o.change else "")
            for o in first.operations
        ]  # fmt: skip
        table = Table(("operation", "role", "output", "became"), rows, left=4)
        yield Folded(f"{shortened(first.name, 60)}{others}: {what}", [plot, Folded("As a table", [table])], screen=True)


# ---------------------------------------------------------------------------------------------------------------------
# Weights and activations


def tensors(evidence: Evidence) -> Iterator[Block]:
    weights, activations = (_sides(evidence.weights), _sides(evidence.activations))
    if weights:
        yield Figures([*_weight_plots(weights)])
        if len(weights) == 1:
            yield Paragraph(
                "The source network's weights are not in the file (--slim), so only the Rep network is shown."
            )
        yield Folded("The distribution as a table", [_histogram_table(weights)], screen=True)
        for side, found in weights:
            yield Folded(f"Latent weights, {side}", [_weight_table(found)])
    if activations:
        yield Paragraph(f"Values that arrive at the binary convolutions: {evidence.images}.")
        yield Figures([*_activation_plots(activations)])
        for side, seen in activations:
            yield Folded(f"Activations, {side}", [_activation_table(seen)])


def _sides(sides: tuple[Sequence[T], Sequence[T]]) -> list[tuple[str, Sequence[T]]]:
    return [(name, found) for name, found in zip(("source", "Rep"), sides, strict=True) if found]


def _binary(sides: Sequence[tuple[str, Sequence[Weights]]]) -> list[tuple[str, Sequence[Weights]]]:
    """The binary layers, where a side has any."""
    return [(side, [w for w in found if w.role.startswith("binary")] or found) for side, found in sides]


def _histograms(sides: Sequence[tuple[str, Sequence[Weights]]]) -> list[tuple[str, list[int]]]:
    """Of the binary layers together."""
    return [(side, [sum(w.histogram[b] for w in found) for b in range(BINS)]) for side, found in _binary(sides)]


def _histogram_table(sides: Sequence[tuple[str, Sequence[Weights]]]) -> Table:
    shares = [(side, [100 * n / (sum(counts) or 1) for n in counts]) for side, counts in _histograms(sides)]
    edge = 2 * REACH / BINS
    rows = [
        (f"{b * edge - REACH:g} … {(b + 1) * edge - REACH:g}", *(f"{values[b]:.2f}" for _, values in shares))
        for b in range(BINS)
    ]
    return Table(("w / mean |w|", *(f"{side} %" for side, _ in shares)), rows)


def _weight_plots(sides: Sequence[tuple[str, Sequence[Weights]]]) -> Iterator[Plot]:
    which = (
        "Latent weights of the binary layers"
        if any(w.role.startswith("binary") for _, f in sides for w in f)
        else "Weights"
    )
    yield charts.histogram("weights", which, _histograms(sides), REACH, "w / mean |w| of its layer")
    curves = [_side_line(side, [100 * w.near_zero for w in found]) for side, found in _binary(sides)]
    yield charts.lines(
        "near-zero", "Weights about to flip: |w| below a tenth of the mean", curves, across="binary layer",
        unit="% of the layer", low=0,
    )  # fmt: skip


def _activation_plots(sides: Sequence[tuple[str, Sequence[Activations]]]) -> Iterator[Plot]:
    for name, title, value in (
        ("positive", "Share of positive inputs", attrgetter("positive")),
        ("window", "Share of inputs within ±1, where a straight-through gradient passes", attrgetter("within_one")),
    ):
        curves = [_side_line(side, [100 * value(a) for a in found]) for side, found in sides]
        yield charts.lines(name, title, curves, across="binary layer", unit="%", low=0, high=100)


def _side_line(side: str, values: Sequence[float]) -> charts.Line:
    points = tuple((float(i), v) for i, v in enumerate(values, 1))
    return charts.Line(side, points, charts.BEFORE if side == "source" else charts.AFTER)


def _weight_table(found: Sequence[Weights]) -> Table:
    rows = [
        (Code(w.path), w.role.replace("_", " "), exact(w.count), f"{w.mean_abs:.4g}", f"{100 * w.positive:.2f}",
         exact(w.zeros), f"{100 * w.near_zero:.2f}", f"{100 * w.beyond_one:.2f}")
        for w in found
    ]  # fmt: skip
    headings = ("layer", "role", "weights", "mean |w|", "positive %", "zero", "near zero %", "beyond ±1 %")
    return Table(headings, rows, left=2, sortable=True)


def _activation_table(found: Sequence[Activations]) -> Table:
    rows = [
        (Code(a.path), f"{a.mean:.4g}", f"{a.std:.4g}", f"{100 * a.positive:.2f}", f"{100 * a.zeros:.2f}",
         f"{100 * a.within_one:.2f}", f"{exact(a.constant)} of {exact(a.channels)}")
        for a in found
    ]  # fmt: skip
    headings = ("layer", "mean", "std", "positive %", "zero %", "within ±1 %", "channels of one sign")
    return Table(headings, rows, left=1, sortable=True)


# ---------------------------------------------------------------------------------------------------------------------
# Feature maps


def maps(evidence: Evidence) -> Iterator[Block]:
    if evidence.maps:
        yield Paragraph(
            "Each column is a channel of the source network; below it stand its copies in the Rep network, which are "
            "equal right after the transform and drift apart in training. Dark is the smallest value of a map."
        )
        yield Figures([montage(m, i, len(evidence.maps)) for i, m in enumerate(evidence.maps)])
