"""The report of one transform: a value, and the same value as Markdown or JSON. Measures nothing.

Same input, same bytes: nothing here reads a clock, a file or the machine; the caller passes what is to be said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from repbnn_cli import paper
from repbnn_cli.number_text import cell, code, exact, fenced, markdown_table, safe
from repbnn_cli.profiler import METRICS, Comparison
from repbnn_cli.tables import CONVENTION, LABELS, cost_as_dict, footnotes, markdown_layers, markdown_totals

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
class ReportInput:
    """Plain values, as a result file holds them; what is None or empty is left out of the report.

    options: beta, inherit, last_layer. plan: rows as `PlanRow.as_plain` gives them. certificate: checks as
    `Certificate.as_plain` gives them. accuracy: what the source checkpoint states, in percent, and under which key.
    environment: name → version. timestamp: written as given.
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
    """What `build` made of its input; `markdown` and `as_dict` say the same."""

    given: ReportInput
    plan: tuple[PlanGroup, ...]
    passed: bool
    paper_costs: tuple[PaperCost, ...]

    def markdown(self) -> str:
        return "\n".join(_markdown(self)).rstrip() + "\n"

    def as_dict(self) -> dict[str, Any]:
        """JSON values only: numbers that JSON does not have (inf, nan) are text."""
        plain: dict[str, Any] = _finite(_as_dict(self))
        return plain


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


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def _markdown(report: Report) -> Iterator[str]:
    given = report.given
    yield f"# RepBNN report: {cell(safe(given.title))}\n"
    yield markdown_table(("", ""), ((name, value) for name, value in _facts(report)), left=2)
    yield from _what_changed(report)
    yield from _certificate(report)
    yield from _costs(report)
    yield from _paper(report)
    yield from _environment(report)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    given, options = report.given, report.given.options
    if given.arch:
        yield "network", f"{code(given.arch)}" + (f" ({safe(given.network)})" if given.network else "")
    elif given.network:
        yield "network", code(given.network)
    if given.source_file:
        size = f", {exact(given.source_bytes)} bytes" if given.source_bytes is not None else ""
        yield "source checkpoint", code(given.source_file) + size
    if given.source_sha256:
        yield "source SHA-256", code(given.source_sha256)
    if given.result_file:
        yield "result", code(given.result_file)
    if given.result_sha256:
        yield "result SHA-256", code(given.result_sha256)
    yield "rules", code(given.rules_name)
    yield "β", str(options["beta"])
    yield "inherit", _explained(options["inherit"], INHERIT)
    yield "last layer", _explained(options["last_layer"], LAST_LAYER)
    if given.accuracy is not None:
        key = f" (stated in the checkpoint as {code(given.accuracy_key)})" if given.accuracy_key else ""
        yield "source accuracy", f"{given.accuracy:g} % top-1{key}"
    yield "certificate", "passed" if report.passed else "**FAILED**"
    if given.timestamp:
        yield "made", given.timestamp


def _explained(value: Any, texts: Mapping[str, str]) -> str:
    return f"{code(str(value))}: {texts[value]}" if value in texts else code(str(value))


def _what_changed(report: Report) -> Iterator[str]:
    yield "## What was transformed\n"
    if not report.plan:
        yield "Nothing: β = 1 is the identity.\n"
    else:
        lines = [
            (g.part.replace("_", " "), code(g.rule), g.action.replace("_", " "), _some_changes(g), str(len(g.modules)))
            for g in report.plan
        ]
        yield markdown_table(("part", "rule", "action", "from → to", "modules"), lines, left=4)
        rows = [
            (
                code(r["path"]),
                code(r["rule"]),
                safe(r["before"]),
                safe(r["after"]),
                safe("; ".join(r.get("tensors", ()))),
            )
            for r in report.given.plan
        ]
        table = markdown_table(("module", "rule", "before", "after", "tensors"), rows, left=5)
        yield _folded(f"Every module ({len(rows)})", table)
    yield _folded(f"Rules in force ({report.given.rules_name})", fenced(report.given.rules_text, "yaml"))
    if report.given.notes:
        yield "\n".join(f"- {safe(' '.join(n.split()))}" for n in report.given.notes) + "\n"


def _some_changes(group: PlanGroup) -> str:
    first, last = group.changes[0], group.changes[-1]
    return safe(first if len(group.changes) == 1 else f"{first} … {last}")


def _certificate(report: Report) -> Iterator[str]:
    yield "## Certificate\n"
    lines = [
        (safe(c["name"]), "ok" if c["passed"] else "**FAILED**", safe(c["summary"])) for c in report.given.certificate
    ]
    yield markdown_table(("check", "", "outcome"), lines, left=3)


def _costs(report: Report) -> Iterator[str]:
    costs = report.given.costs
    yield "## Costs\n"
    yield markdown_totals(costs)
    yield "\n".join(f"- {safe(line)}" for line in footnotes(costs)) + "\n"
    yield _folded("Per layer", markdown_layers(costs))


def _paper(report: Report) -> Iterator[str]:
    given = report.given
    if not given.published and not report.paper_costs:
        return
    yield f"## In the paper ({paper.SOURCE})\n"
    if given.published:
        yield "Published top-1 accuracy in percent; the networks were trained from scratch.\n"
        accuracies = [
            (a.table, a.setting or "main result", paper.as_printed(a, a.raw), paper.as_printed(a, a.rep))
            for a in given.published
        ]
        yield markdown_table(("where", "setting", "source", "Rep"), accuracies, left=2)
    if report.paper_costs:
        yield "Costs counted here, exactly, beside those printed in the paper.\n"
        costs = [
            (c.table, LABELS[c.metric], *(t for i in (0, 1) for t in (exact(c.ours[i]), printed(c.printed[i]))))
            for c in report.paper_costs
        ]
        headings = ("where", "per input", "source, here", "source, paper", "Rep, here", "Rep, paper")
        yield markdown_table(headings, costs, left=2)
        if off := [f"- {line}" for line in _differences(report)]:
            yield "\n".join(off) + "\n"


def _differences(report: Report) -> Iterator[str]:
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


def _environment(report: Report) -> Iterator[str]:
    if report.given.environment:
        yield "## Environment\n"
        yield markdown_table(("", "version"), [(n, code(v)) for n, v in report.given.environment.items()], left=2)


def _folded(summary: str, body: str) -> str:
    return f"<details>\n<summary>{safe(summary)}</summary>\n\n{body}\n</details>\n"


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def _as_dict(report: Report) -> dict[str, Any]:
    given = report.given
    return {
        "title": given.title,
        "arch": given.arch,
        "network": given.network,
        "source": {"file": given.source_file, "sha256": given.source_sha256, "bytes": given.source_bytes},
        "result": {"file": given.result_file, "sha256": given.result_sha256},
        "rules": {"name": given.rules_name, "text": given.rules_text},
        "options": dict(given.options),
        "inherit": INHERIT.get(given.options["inherit"]),
        "plan": [dict(row) for row in given.plan],
        "notes": list(given.notes),
        "certificate": {"passed": report.passed, "checks": [dict(c) for c in given.certificate]},
        "convention": list(CONVENTION),
        "costs": cost_as_dict(given.costs),
        "accuracy": None if given.accuracy is None else {"top1": given.accuracy, "key": given.accuracy_key},
        "paper": {
            "source": paper.SOURCE,
            "accuracy": [asdict(a) for a in given.published],
            "costs": [_plain_paper_cost(c) for c in report.paper_costs],
        },
        "environment": dict(given.environment),
        "timestamp": given.timestamp,
    }


def _plain_paper_cost(cost: PaperCost) -> dict[str, Any]:
    sides = zip(("source", "rep"), cost.ours, cost.printed, strict=True)
    return {
        "table": cost.table,
        "metric": cost.metric,
        **{side: {"here": ours, "paper": p.as_number(), "printed": printed(p)} for side, ours, p in sides},
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
