"""Costs as text: tables for a terminal of 80 columns, Markdown, CSV and JSON values; all of their numbers.

Works on a `Profile` or a `Comparison` alike. Exact numbers have thousands separators; tables of layers on a terminal
round to three digits (k, M, G are powers of 1000). What was not counted stands under every table.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from repbnn_cli.number_text import code, compact, exact, markdown_table, percent, safe, shape_text, shortened, signed
from repbnn_cli.paper import Accuracy, as_printed
from repbnn_cli.profiler import METRICS, Change, Comparison, Omission, Profile
from repbnn_cli.views.cost_rows import SUMMED, Row, RowPair, pairs, rows

Cost = Profile | Comparison

CONVENTION = (
    "1 multiply-accumulate = 1 operation, binary or float; biases are not counted.",
    "BOPs = MACs × weight bits × activation bits; OPs = FLOPs + BOPs / 64; OPs without BN: FC + Conv + Bconv / 64.",
    "BN: 2 per output element (normalise, scale); BatchNorm1d and 2d share the normalisation behind a repeat without "
    "groups, the first layer's included: 1/(2β) + β/2 times the source's.",
    "Other elementwise work (activations, sums, pooling, scales) is counted, but is no part of OPs.",
    "All figures are for one input, sizes in bytes. Packed: 1 bit per binary weight, BN as scale and shift, the rest "
    "float32; latent: the state dict; peak: float32 activations alive at once.",
)  # fmt: skip
LABELS: Mapping[str, str] = {
    "fc": "FC (FLOPs)",
    "conv": "Conv (FLOPs)",
    "bn": "BN (FLOPs)",
    "bconv": "Bconv (BOPs)",
    "other": "Other elementwise",
    "flops": "FLOPs (FC + Conv)",
    "bops": "BOPs",
    "ops_without_bn": "OPs without BN",
    "ops_with_bn": "OPs with BN",
    "parameters": "Parameters",
    "packed_1bit": "Packed, 1-bit (B)",
    "packed_32bit": "Packed, 32-bit (B)",
    "packed": "Packed (B)",
    "latent": "Latent (B)",
    "peak": "Peak activations (B)",
}
_WIDE = 110  # columns from which a terminal also gets shapes and bit widths


# ---------------------------------------------------------------------------------------------------------------------
# On a terminal


def bits_text(row: Row) -> str:
    """W/A, as papers write it."""
    return f"{row.weight_bits}/{row.activation_bits}" if row.weight_bits else ""


def label(row: Row) -> str:
    """Path, with the number of a repeated call."""
    extra = {0: " (never called)", 1: ""}.get(row.call, f" (call {row.call})")
    return row.path + extra


def rich_cost(
    cost: Cost, *, layers: bool = False, sort: str | None = None, depth: int | None = None, width: int = 80
) -> Group:
    """Totals, and the layers where asked for, with convention, omissions and notes underneath."""
    parts: list[RenderableType] = []
    if layers or sort is not None or depth is not None:
        parts += [_rich_layers(cost, sort, depth, width), ""]
    parts += [_rich_totals(cost), "", *(Text(line) for line in footnotes(cost))]
    return Group(*parts)


def _rich_totals(cost: Cost) -> Table:
    if isinstance(cost, Profile):
        table = _table(("", False), ("per input", True))
        for metric in METRICS:
            table.add_row(LABELS[metric], exact(getattr(cost.totals, metric)))
        return table
    table = _table(("", False), ("before", True), ("after", True), ("Δ", True), ("Δ %", True))
    for metric, change in cost.totals.items():
        table.add_row(
            LABELS[metric], exact(change.before), exact(change.after), signed(change.delta), percent(change)
        )  # fmt: skip
    return table


def _rich_layers(cost: Cost, sort: str | None, depth: int | None, width: int) -> RenderableType:
    if isinstance(cost, Profile):
        return _rich_rows(rows(cost, sort=sort, depth=depth), width)
    return _rich_pairs(pairs(cost, sort=sort, depth=depth), width)


def _rich_rows(shown: list[Row], width: int) -> Table:
    numbers = ("flops", "bops", "other", "ops", "parameters", "packed")
    headings = ("FLOPs", "BOPs", "other", "OPs", "params", "packed")
    body = [[row.kind, *(compact(getattr(row, n)) for n in numbers)] for row in shown]
    columns = [("kind", False), *((h, True) for h in headings)]
    if width >= _WIDE:
        columns = [("kind", False), ("W/A", False), ("output", False), *columns[1:]]
        body = [
            [line[0], bits_text(row), shape_text(row.output_shape), *line[1:]]
            for row, line in zip(shown, body, strict=True)
        ]  # fmt: skip
    return _with_paths(columns, [label(row) for row in shown], body, width)


def _rich_pairs(shown: list[RowPair], width: int) -> RenderableType:
    kept = costly(shown)
    side = (("after", True), ("Δ %", True))
    columns = [("kind", False), ("OPs", True), *side, ("packed", True), *side]
    body = []
    for pair in kept:
        changes = [_change(pair, name) for name in ("ops", "packed")]
        numbers = ((compact(c.before), compact(c.after), percent(c, short=True)) for c in changes)
        body.append([pair.row.kind, *itertools.chain.from_iterable(numbers)])
    table = _with_paths(columns, [label(pair.row) for pair in kept], body, width)
    return Group(table, *(Text(line) for line in left_out(shown, kept)))


def costly(shown: list[RowPair]) -> list[RowPair]:
    """Without the rows that have neither OPs nor packed bytes on either side."""
    return [p for p in shown if any(row and (row.ops or row.packed) for row in (p.before, p.after))]


def left_out(shown: list[RowPair], kept: list[RowPair]) -> list[str]:
    hidden = len(shown) - len(kept)
    return [f"Rows of elementwise work alone, left out here: {hidden}; --json and --csv have them."] if hidden else []


_PAIRED = {"ops": "OPs", "parameters": "parameters", "packed": "packed (B)"}
PAIR_HEADINGS = ("layer", "kind", *(f"{n} {side}" for n in _PAIRED.values() for side in ("before", "after", "Δ")))


def pair_texts(pair: RowPair) -> Iterator[str]:
    """What stands under PAIR_HEADINGS behind the layer."""
    yield pair.row.kind
    for change in (_change(pair, name) for name in _PAIRED):
        yield from (exact(change.before), exact(change.after), signed(change.delta))


def _change(pair: RowPair, name: str) -> Change:
    return Change(*(0 if row is None else getattr(row, name) for row in (pair.before, pair.after)))


def _with_paths(
    columns: Sequence[tuple[str, bool]], paths: Sequence[str], body: Sequence[Sequence[str]], width: int
) -> Table:
    """A table whose first column, the paths, gets what the others leave of `width`."""
    widths = [max(len(c[0]), *(len(line[i]) for line in body), 1) for i, c in enumerate(columns)]
    room = max(12, width - sum(w + _GAP for w in widths))
    table = _table(("layer", False), *columns)
    for path, line in zip(paths, body, strict=True):
        table.add_row(shortened(path, room), *line)
    return table


_GAP = 2


def _table(*columns: tuple[str, bool]) -> Table:
    """Columns as (heading, whether it holds numbers)."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold"
    )
    for heading, number in columns:
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# What stands under every table


def footnotes(cost: Cost) -> list[str]:
    """Convention, peak, what was not counted, notes; one text each."""
    return [*CONVENTION, *_peaks(cost), *not_counted(cost), *notes(cost)]


def notes(cost: Cost) -> list[str]:
    if isinstance(cost, Profile):
        return list(cost.notes)
    return list(dict.fromkeys((*cost.before.notes, *cost.after.notes)))


def not_counted(cost: Cost) -> list[str]:
    """One line per sort of omission, or the statement that there is none."""
    sides = [("", cost)] if isinstance(cost, Profile) else [("before: ", cost.before), ("after: ", cost.after)]
    lines = []
    for side, profile in sides:
        found: dict[str, list[Omission]] = {}
        for omission in profile.omissions:
            found.setdefault(omission.type, []).append(omission)
        for what, members in found.items():
            places = ", ".join(o.path for o in members[:3]) + (" …" if len(members) > 3 else "")
            lines.append(f"NOT COUNTED, {side}{what} ×{len(members)} ({places}): in no table of this profiler")
    return lines or ["Not counted: nothing (every operation is in a table of this profiler)."]


def _peaks(cost: Cost) -> Iterator[str]:
    sides = [("", cost)] if isinstance(cost, Profile) else [(" before", cost.before), (" after", cost.after)]
    for side, profile in sides:
        if profile.peak.bytes:
            yield f"Peak activations{side}: at {profile.peak.path or profile.peak.node}."


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown_cost(cost: Cost, *, layers: bool = False, sort: str | None = None, depth: int | None = None) -> str:
    """Totals, layers where asked for, and everything that stands under a table."""
    parts = [markdown_totals(cost)]
    if layers or sort is not None or depth is not None:
        parts.append(markdown_layers(cost, sort=sort, depth=depth))
    parts.append("\n".join(f"- {safe(line)}" for line in footnotes(cost)) + "\n")
    return "\n".join(parts)


def markdown_totals(cost: Cost) -> str:
    if isinstance(cost, Profile):
        body = [(LABELS[m], exact(getattr(cost.totals, m))) for m in METRICS]
        return markdown_table(("per input", ""), body)
    lines = [
        (LABELS[m], exact(c.before), exact(c.after), signed(c.delta), percent(c)) for m, c in cost.totals.items()
    ]  # fmt: skip
    return markdown_table(("per input", "before", "after", "Δ", "Δ %"), lines)


def markdown_layers(cost: Cost, *, sort: str | None = None, depth: int | None = None) -> str:
    if isinstance(cost, Profile):
        names = ("flops", "bops", "other", "ops", "parameters", "packed", "latent")
        body = [
            (code(label(r)), r.kind, bits_text(r), shape_text(r.output_shape), *(exact(getattr(r, n)) for n in names))
            for r in rows(cost, sort=sort, depth=depth)
        ]
        headings = ("FLOPs", "BOPs", "other", "OPs", "parameters", "packed (B)", "latent (B)")
        return markdown_table(("layer", "kind", "W/A", "output", *headings), body, left=4)
    return _markdown_pairs(pairs(cost, sort=sort, depth=depth))


def _markdown_pairs(shown: list[RowPair]) -> str:
    kept = costly(shown)
    body = [(code(label(pair.row)), *pair_texts(pair)) for pair in kept]
    table = markdown_table(PAIR_HEADINGS, body, left=2)
    return "\n".join((table, *(f"{line}\n" for line in left_out(shown, kept))))


# ---------------------------------------------------------------------------------------------------------------------
# CSV and JSON


def csv_cost(cost: Cost, *, sort: str | None = None, depth: int | None = None) -> str:
    """One line per row, exact numbers; what was not counted has a line of its own, without numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    numbers = (*SUMMED, "ops", "packed")
    if isinstance(cost, Profile):
        text = (
            "path",
            "call",
            "type",
            "kind",
            "layers",
            "input_shape",
            "output_shape",
            "weight_bits",
            "activation_bits",
        )
        writer.writerow((*text, *numbers))
        for row in rows(cost, sort=sort, depth=depth):
            plain = _plain_row(row)
            writer.writerow([*(_csv_text(plain[n]) for n in text), *(plain[n] for n in numbers)])
        for o in cost.omissions:
            writer.writerow((o.path, 1, o.type, "not counted", *[""] * (len(text) - 4 + len(numbers))))
        return out.getvalue()
    writer.writerow(
        ("path", "call", "kind", *(f"{n}_{side}" for n in numbers for side in ("before", "after", "delta")))
    )
    for pair in pairs(cost, sort=sort, depth=depth):
        changes = [_change(pair, n) for n in numbers]
        writer.writerow((*pair.row.key, pair.row.kind, *(v for c in changes for v in (c.before, c.after, c.delta))))
    for side, profile in (("before", cost.before), ("after", cost.after)):
        for o in profile.omissions:
            writer.writerow((o.path, 1, f"not counted {side} ({o.type})", *[""] * (3 * len(numbers))))
    return out.getvalue()


def _csv_text(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, list) else value


def cost_as_dict(cost: Cost, *, sort: str | None = None, depth: int | None = None) -> dict[str, Any]:
    """Everything as plain values for JSON, the convention included."""
    head: dict[str, Any] = {"convention": list(CONVENTION), "per": "input", "notes": notes(cost)}
    if isinstance(cost, Profile):
        return {
            **head,
            "totals": {m: getattr(cost.totals, m) for m in METRICS},
            "peak": asdict(cost.peak),
            "not_counted": [asdict(o) for o in cost.omissions],
            "layers": [_plain_row(r) for r in rows(cost, sort=sort, depth=depth)],
        }
    return {
        **head,
        "totals": {m: plain_change(c) for m, c in cost.totals.items()},
        "peak": {"before": asdict(cost.before.peak), "after": asdict(cost.after.peak)},
        "not_counted": {
            "before": [asdict(o) for o in cost.before.omissions],
            "after": [asdict(o) for o in cost.after.omissions],
        },
        "layers": [_plain_pair(p) for p in pairs(cost, sort=sort, depth=depth)],
    }


def plain_change(change: Change) -> dict[str, Any]:
    return {"before": change.before, "after": change.after, "delta": change.delta, "ratio": change.ratio}


def _plain_row(row: Row) -> dict[str, Any]:
    shapes = {"input_shape": list(row.input_shape), "output_shape": list(row.output_shape)}
    return asdict(row) | shapes | {"ops": row.ops, "packed": row.packed}


def _plain_pair(pair: RowPair) -> dict[str, Any]:
    row = pair.row
    sides = [None if r is None else _plain_row(r) for r in (pair.before, pair.after)]
    delta = {n: _change(pair, n).delta for n in (*SUMMED, "ops", "packed")}
    return {"path": row.path, "call": row.call, "kind": row.kind, "before": sides[0], "after": sides[1], "delta": delta}


# ---------------------------------------------------------------------------------------------------------------------
# The zoo


@dataclass(frozen=True)
class ZooRow:
    """One network of the zoo: its costs, and the paper's accuracy where there is one."""

    name: str
    network: str
    method: str
    data: str
    parameters: int
    ops_without_bn: int | float
    ops_with_bn: int | float
    accuracy: Accuracy | None


def rich_zoo(entries: Sequence[ZooRow], *, width: int = 80) -> Group:
    """All networks; two lines under it say what the figures are."""
    wide = width >= _WIDE
    numbers = (("params", True), ("OPs", True), ("raw", True), ("Rep", True), ("in", False))
    table = _table(
        ("name", False), ("method", False), *((("network", False), ("data", False)) if wide else ()), *numbers
    )
    for e in entries:
        more = (e.network, e.data) if wide else ()
        table.add_row(
            e.name, e.method, *more, compact(e.parameters), compact(e.ops_without_bn), *_published(e.accuracy)
        )  # fmt: skip
    return Group(table, "", *(Text(line) for line in _ZOO_NOTES))


_ZOO_NOTES = (
    "OPs: FLOPs + BOPs / 64 without BN, one input; 1 multiply-accumulate = 1 operation, biases are not counted.",
    "raw, Rep: top-1 % that RepBNN (arXiv 2207.09049) publishes for β = 2, in the table named (T7 = Table 7).",
)


def zoo_as_dict(entries: Sequence[ZooRow]) -> dict[str, Any]:
    return {"convention": list(CONVENTION), "networks": [asdict(e) for e in entries]}


def _published(accuracy: Accuracy | None) -> tuple[str, str, str]:
    if accuracy is None:
        return "", "", ""
    raw, rep = (as_printed(accuracy, v) for v in (accuracy.raw, accuracy.rep))
    return raw, rep, accuracy.table.replace("Table ", "T")
