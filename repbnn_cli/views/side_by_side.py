"""Networks beside one another (`compare`), and other tools' counts beside ours (`--cross-check`), as text."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from repbnn_cli.crosscheck import THRESHOLD, CrossCheck, Reason, Tool
from repbnn_cli.number_text import code, compact, exact, markdown_table, safe, shortened, signed
from repbnn_cli.profiler import METRICS, Omission, Totals
from repbnn_cli.views.tables import CONVENTION, LABELS

# ---------------------------------------------------------------------------------------------------------------------
# Any number of networks


@dataclass(frozen=True)
class Entry:
    """One network of a comparison. accuracy: top-1 in percent as stated by `accuracy_from`, None where nobody does."""

    target: str
    network: str
    totals: Totals
    accuracy: float | None
    accuracy_from: str
    not_counted: tuple[Omission, ...] = ()


_SHOWN = (
    ("params", "parameters"), ("packed B", "packed"), ("FLOPs", "flops"), ("BOPs", "bops"), ("OPs", "ops_without_bn"),
    ("peak B", "peak"),
)  # fmt: skip


def rich_entries(entries: Sequence[Entry], *, width: int = 80) -> Group:
    """One row per network, three digits; what the columns are stands underneath."""
    first = entries[0].totals.ops_without_bn
    columns = [*(label for label, _ in _SHOWN[:5]), "Δ OPs", _SHOWN[5][0], "top-1"]
    body = []
    for entry in entries:
        cells = [compact(getattr(entry.totals, metric)) for _, metric in _SHOWN]
        body.append([*cells[:5], _relative(entry.totals.ops_without_bn, first), cells[5], _accuracy(entry)])
    taken = sum(max(len(c), *(len(line[i]) for line in body)) + 2 for i, c in enumerate(columns))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("network", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for entry, line in zip(entries, body, strict=True):
        table.add_row(shortened(entry.target, max(12, width - taken)), *line)
    return Group(table, "", *(Text(line) for line in _entry_notes(entries)))


def _relative(value: int | float, first: int | float) -> str:
    if value == first or not first:
        return "0" if value == first else "new"
    ratio = value / first
    return f"{100 * (ratio - 1):+.1f}%" if ratio < 2 else f"×{ratio:.3g}"


def _accuracy(entry: Entry) -> str:
    return "" if entry.accuracy is None else f"{entry.accuracy:.2f}"


def _entry_notes(entries: Sequence[Entry]) -> Iterator[str]:
    yield "OPs: FLOPs + BOPs / 64 without BN; Δ OPs: against the first row; of a result: its Rep network."
    sources: dict[str, list[str]] = {}
    for entry in entries:
        if entry.accuracy is not None:
            sources.setdefault(entry.accuracy_from, []).append(entry.target)
    if sources:
        yield "top-1 %: " + "; ".join(f"{', '.join(who)}: {source}" for source, who in sources.items()) + "."
    yield from CONVENTION
    for entry in entries:
        if entry.not_counted:
            kinds = ", ".join(dict.fromkeys(o.type for o in entry.not_counted))
            yield f"NOT COUNTED in {entry.target}: {kinds} ×{len(entry.not_counted)}; `repbnn profile` names them"


def markdown_entries(entries: Sequence[Entry]) -> str:
    """Figures down, networks across, exact."""
    headings = ["per input", *(code(e.target) for e in entries)]
    lines = [[LABELS[m], *(exact(getattr(e.totals, m)) for e in entries)] for m in METRICS]
    lines.append(["top-1 %", *(_accuracy(e) for e in entries)])
    table = markdown_table(headings, lines)
    return table + "\n" + "\n".join(f"- {safe(line)}" for line in _entry_notes(entries)) + "\n"


def csv_entries(entries: Sequence[Entry]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("target", "network", *METRICS, "top1", "top1_from", "not_counted"))
    for e in entries:
        numbers = (getattr(e.totals, m) for m in METRICS)
        accuracy = "" if e.accuracy is None else e.accuracy
        writer.writerow((e.target, e.network, *numbers, accuracy, e.accuracy_from, len(e.not_counted)))
    return out.getvalue()


def entries_as_dict(entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "convention": list(CONVENTION),
        "per": "input",
        "networks": [
            {
                "target": e.target,
                "network": e.network,
                "totals": {m: getattr(e.totals, m) for m in METRICS},
                "top1": e.accuracy,
                "top1_from": e.accuracy_from or None,
                "not_counted": [{"path": o.path, "type": o.type} for o in e.not_counted],
            }
            for e in entries
        ],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Other tools


def rich_crosscheck(title: str, check: CrossCheck) -> Group:
    """One row per tool; under it, the reasons for its gap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading, right in ((title, False), ("reports", True), ("per MAC", True), ("MACs", True), ("gap", True)):
        table.add_column(heading, justify="right" if right else "left")
    table.add_row("repbnn", "", "", exact(check.macs), "")
    for tool in check.tools:
        if not tool.failed:
            numbers = (exact(tool.reported), str(tool.per_mac), exact(tool.macs), _share(check, tool.gap))
            table.add_row(f"{tool.name} {_short(tool.version)}", *numbers)
    lines: list[RenderableType] = [table]
    for tool in check.tools:
        lines += [Padding(line.strip(), (0, 0, 0, 2 * line.startswith(" "))) for line in _explained(check, tool)]
    return Group(*lines, "", *(Text(line) for line in crosscheck_notes(check)))


def markdown_crosscheck(title: str, check: CrossCheck) -> str:
    lines = [["repbnn", "", "", exact(check.macs), ""]]
    lines += [
        [f"{t.name} {t.version}", exact(t.reported), str(t.per_mac), exact(t.macs), _share(check, t.gap)]
        for t in check.tools
        if not t.failed
    ]
    table = markdown_table((title, "reports", "units per MAC", "MACs", "gap"), lines)
    told = [line.strip() for tool in check.tools for line in _explained(check, tool)]
    return table + "\n" + "\n".join(f"- {safe(line)}" for line in (*told, *crosscheck_notes(check))) + "\n"


def _short(version: str) -> str:
    """0.1.5 for 0.1.5.post20221221."""
    found = re.match(r"\d+(\.\d+){0,2}", version)
    return found[0] if found else version


def _share(check: CrossCheck, macs: float) -> str:
    return f"{100 * macs / check.macs:+.2f} %" if macs and check.macs else "0"


def _explained(check: CrossCheck, tool: Tool) -> Iterator[str]:
    if tool.failed:
        yield f"{tool.name} {tool.version}: could not run on this network: {tool.failed}"
        return
    large = [r for r in tool.reasons if check.worth_a_line(r.macs)]
    small = [r for r in tool.reasons if not check.worth_a_line(r.macs)]
    if not large and not small:
        yield f"{tool.name}: the same as ours, module by module"
        return
    yield f"{tool.name}:"
    for reason in large:
        yield f"  {_reason(check, reason)}"
    if small:
        rest = sum(r.macs for r in small)
        yield f"  {signed(rest)} ({_share(check, rest)}): {len(small)} below {THRESHOLD:.1%} (--json lists them)"


def _reason(check: CrossCheck, reason: Reason) -> str:
    places = f"{reason.places[0]}" if len(reason.places) == 1 else f"{len(reason.places)}×, {reason.places[0]} first"
    flag = "NOT EXPLAINED: " if reason.kind == "unexplained" else ""
    return f"{signed(reason.macs)} ({_share(check, reason.macs)}): {flag}{reason.what} ({places})"


def crosscheck_notes(check: CrossCheck) -> Iterator[str]:
    yield (
        f"MACs per input, binary and float alike: no tool but this one knows bit widths. {exact(check.binary)} of "
        f"{exact(check.macs)} are binary, so OPs without BN are {exact(check.ops)}."
    )
