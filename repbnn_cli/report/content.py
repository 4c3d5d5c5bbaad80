"""What a report of a transform says, section by section, as a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from repbnn_cli import paper
from repbnn_cli.number_text import exact, percent, signed
from repbnn_cli.profiler import Metric
from repbnn_cli.report import evidence, trained
from repbnn_cli.report.charts import Bar, Pair, layer_bars, paired_bars
from repbnn_cli.report.document import (
    Block,
    Code,
    Document,
    Figures,
    Folded,
    Items,
    Line,
    Listing,
    Paragraph,
    Section,
    Strong,
    Table,
)  # fmt: skip
from repbnn_cli.report.inherited import inherited
from repbnn_cli.report.svg import Plot
from repbnn_cli.report.value import INHERIT, LAST_LAYER, PlanGroup, Report, differences, printed
from repbnn_cli.views.cost_rows import Row, RowPair, pairs
from repbnn_cli.views.tables import LABELS, PAIR_HEADINGS, costly, footnotes, label, left_out, pair_texts


def document(report: Report) -> Document:
    """All sections that have something to say."""
    sections = (
        Section("changes", "What was transformed", [*_what_changed(report)]),
        Section("certificate", "Certificate", [_certificate(report)]),
        Section("inherited", "What was inherited", [*inherited(report.given.training)]),
        Section("costs", "Costs", [*_costs(report)]),
        Section("accuracy", "Accuracy", [*evidence.landscape(report)]),
        Section("runs", "Training", [*trained.runs(report.given.runs)]),
        Section("network", "The network", [*evidence.graph(report.given.evidence.blocks)]),
        Section("tensors", "Weights and activations", [*evidence.tensors(report.given.evidence)]),
        Section("maps", "Feature maps", [*evidence.maps(report.given.evidence)]),
        Section("paper", f"In the paper ({paper.SOURCE})", [*_paper(report)]),
        Section("environment", "Environment", [*_environment(report)]),
    )
    facts = Table(("", ""), [*_facts(report)], left=2, caption="Summary")
    return Document(f"RepBNN report: {report.given.title}", [facts], [s for s in sections if s.blocks])


def _facts(report: Report) -> Iterator[tuple[Line, Line]]:
    given, options = report.given, report.given.options
    if given.arch:
        yield "network", (Code(given.arch), f" ({given.network})") if given.network else Code(given.arch)
    elif given.network:
        yield "network", Code(given.network)
    if given.source_file:
        size = f", {exact(given.source_bytes)} bytes" if given.source_bytes is not None else ""
        yield "source checkpoint", (Code(given.source_file), size)
    if given.source_sha256:
        yield "source SHA-256", Code(given.source_sha256)
    if given.result_file:
        yield "result", Code(given.result_file)
    if given.result_sha256:
        yield "result SHA-256", Code(given.result_sha256)
    yield "rules", Code(given.rules_name)
    yield "β", str(options["beta"])
    yield "inherit", _explained(options["inherit"], INHERIT)
    yield "last layer", _explained(options["last_layer"], LAST_LAYER)
    if given.accuracy is not None:
        top1 = f"{given.accuracy:g} % top-1"
        key = given.accuracy_key
        yield "source accuracy", (top1, " (stated in the checkpoint as ", Code(key), ")") if key else top1
    if given.rep_accuracy is not None:
        yield "Rep accuracy", trained.measured(given.training, given.rep_accuracy)
    yield "certificate", "passed" if report.passed else Strong("FAILED")
    if given.timestamp:
        yield "made", given.timestamp


def _explained(value: Any, texts: Mapping[str, str]) -> Line:
    return (Code(str(value)), f": {texts[value]}") if value in texts else Code(str(value))


def _what_changed(report: Report) -> Iterator[Block]:
    if not report.plan:
        yield Paragraph("Nothing: β = 1 is the identity.")
    else:
        lines = [
            (g.part.replace("_", " "), Code(g.rule), g.action.replace("_", " "), _some_changes(g), str(len(g.modules)))
            for g in report.plan
        ]
        yield Table(("part", "rule", "action", "from → to", "modules"), lines, left=4)
        rows = [
            (Code(r["path"]), Code(r["rule"]), r["before"], r["after"], "; ".join(r.get("tensors", ())))
            for r in report.given.plan
        ]
        table = Table(("module", "rule", "before", "after", "tensors"), rows, left=5)
        yield Folded(f"Every module ({len(rows)})", [table])
    listing = Listing(report.given.rules_text, "yaml")
    yield Folded(f"Rules in force ({report.given.rules_name})", [listing])
    if report.given.notes:
        yield Items([" ".join(n.split()) for n in report.given.notes])


def _some_changes(group: PlanGroup) -> str:
    first, last = group.changes[0], group.changes[-1]
    return first if len(group.changes) == 1 else f"{first} … {last}"


def _certificate(report: Report) -> Block:
    lines: list[tuple[Line, ...]] = [
        (c["name"], "ok" if c["passed"] else Strong("FAILED"), c["summary"]) for c in report.given.certificate
    ]
    return Table(("check", "", "outcome"), lines, left=3)


# ---------------------------------------------------------------------------------------------------------------------
# Costs


def _costs(report: Report) -> Iterator[Block]:
    costs = report.given.costs
    totals = [
        (LABELS[m], exact(c.before), exact(c.after), signed(c.delta), percent(c)) for m, c in costs.totals.items()
    ]
    yield Figures([_ops_chart(report), _size_chart(report)])
    yield Table(("per input", "before", "after", "Δ", "Δ %"), totals)
    yield Items(footnotes(costs))
    shown = pairs(costs)
    kept = [p for p in shown if _ops(p.before) or _ops(p.after)]
    yield Figures([layer_bars("layers", "OPs of every layer", [_bar(p) for p in kept])], wide=True)
    yield Folded("Per layer", [*_layers(shown)])


def _ops_chart(report: Report) -> Plot:
    totals = report.given.costs.totals
    kinds: dict[str, tuple[Metric, int]] = {
        "Bconv / 64": ("bconv", 64), "Conv": ("conv", 1), "BN": ("bn", 1), "FC": ("fc", 1),
    }  # fmt: skip
    bars = [Pair(name, totals[m].before / by, totals[m].after / by) for name, (m, by) in kinds.items()]
    total = totals["ops_with_bn"]
    return paired_bars("ops", "OPs by kind", [*bars, Pair("all, with BN", total.before, total.after)], "OPs")


def _size_chart(report: Report) -> Plot:
    totals = report.given.costs.totals
    sizes: dict[str, Metric] = {"packed": "packed", "latent": "latent", "peak activations": "peak"}
    bars = [Pair(name, totals[m].before, totals[m].after) for name, m in sizes.items()]
    return paired_bars("sizes", "Sizes", bars, "bytes")


def _ops(row: Row | None) -> int | float:
    return row.ops if row else 0


def _bar(pair: RowPair) -> Bar:
    return Bar(label(pair.row), pair.row.kind, _ops(pair.before), _ops(pair.after))


def _layers(shown: list[RowPair]) -> Iterator[Block]:
    kept = costly(shown)
    body: list[tuple[Line, ...]] = [(Code(label(pair.row)), *pair_texts(pair)) for pair in kept]
    yield Table(PAIR_HEADINGS, body, left=2, sortable=True)
    for line in left_out(shown, kept):
        yield Paragraph(line)


# ---------------------------------------------------------------------------------------------------------------------
# The paper, the environment


def _paper(report: Report) -> Iterator[Block]:
    if report.given.published:
        yield Paragraph("Published top-1 accuracy in percent; the networks were trained from scratch.")
        accuracies = [
            (a.table, a.setting or "main result", paper.as_printed(a, a.raw), paper.as_printed(a, a.rep))
            for a in report.given.published
        ]
        yield Table(("where", "setting", "source", "Rep"), accuracies, left=2)
    if report.paper_costs:
        yield Paragraph("Costs counted here, exactly, beside those printed in the paper.")
        costs = [
            (c.table, LABELS[c.metric], *(t for i in (0, 1) for t in (exact(c.ours[i]), printed(c.printed[i]))))
            for c in report.paper_costs
        ]
        headings = ("where", "per input", "source, here", "source, paper", "Rep, here", "Rep, paper")
        yield Table(headings, costs, left=2)
        if off := [*differences(report)]:
            yield Items(off)


def _environment(report: Report) -> Iterator[Block]:
    if report.given.environment:
        yield Table(("", "version"), [(n, Code(v)) for n, v in report.given.environment.items()], left=2)
