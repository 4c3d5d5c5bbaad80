"""What the commands print on a terminal besides profiles and reports: plans, certificates, files, networks, rules."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from repbnn_cli import runs, streams
from repbnn_cli.number_text import compact_shape
from repbnn_cli.plan import PlanRow

PARTS = {"first_layer": "first layer", "backbone": "backbone", "bypass": "bypass", "last_layer": "last layer"}
_ACTIONS = {
    "repeat_output": "output × β",
    "rep_conv": "RepConv",
    "rep_batch_norm": "BatchNorm (shared)",
    "batch_norm": "BatchNorm",
    "per_channel": "per-channel",
    "parameter": "parameter",
    "depthwise": "depthwise, tiled",
    "per_replica": "applied to each copy",
    "select_inputs": "classifier inputs",
    "first_replica": "takes one copy",
}


def console(*, error: bool = False) -> Console:
    """Standard output for results, standard error for messages; plain and 80 columns wide when not a terminal."""
    stream = sys.stderr if error else streams.results()
    width = None if stream.isatty() else 80
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


def say(*lines: str) -> None:
    """Messages for the person at the terminal, on stderr. Of several processes the first alone speaks."""
    if runs.other_rank():
        return
    for line in lines:
        print(line, file=sys.stderr)


def own_code(model: str | None) -> str:
    """How a command line goes on where the network is the user's own: `--model file.py:callable`."""
    return "" if model is None else f" --model {shlex.quote(model)}"


def left_out_lines(place: str | Path, payload: Mapping[str, Any]) -> list[str]:
    """What a result's file has no room for, for whoever reads on."""
    if Path(place).suffix != ".safetensors" or not payload.get("source_tensors"):
        return []
    return [f"note: {place} holds no source network, as with --slim: nothing can be fitted to it or learn from it"]


def json_text(value: Any) -> str:
    """JSON for people and programs; a number that is not finite, which JSON has no form for, is null."""
    return json.dumps(_without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(value: Any) -> None:
    """JSON on stdout, and nothing else there."""
    print(json_text(value), file=streams.results())


def print_text(text: str) -> None:
    """A text on stdout, as it is, with a line's end."""
    print(text, end="" if text.endswith("\n") else "\n", file=streams.results())


def rendered(renderable: RenderableType, width: int) -> str:
    """A table as text of a given width, with colours only on a terminal."""
    colours = streams.results().isatty()
    target = Console(
        file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False, force_terminal=colours
    )
    with target.capture() as capture:
        target.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    """A table in the house's style."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in tuple(right) else "left", overflow="fold")
    return made


def plan_table(rows: Sequence[PlanRow]) -> Table:
    """Per part: what, how many, from what to what."""
    made = table("part", "what", "n", "from", "to", right=("n",))
    groups: dict[tuple[str, str, str], list[PlanRow]] = {}
    for part in PARTS:
        for row in rows:
            if row.part == part:
                groups.setdefault((part, row.action, row.role), []).append(row)
    shown = ""
    for (part, action, role), members in groups.items():
        what = _ACTIONS[action]
        if action == "rep_conv":
            kind = "binary" if role == "binary_conv" else role.replace("_", " ")
            what = f"{kind} → {'RepBconv' if role.startswith('binary') else 'RepConv'}"
        name = "" if part == shown else PARTS[part]
        shown = part
        made.add_row(
            name, what, str(len(members)), _range([m.before for m in members]), _range([m.after for m in members])
        )
    return made


def _range(shapes: Sequence[str]) -> str:
    """The shapes, of several the smallest and the largest."""
    ordered = sorted(dict.fromkeys(shapes), key=lambda shape: math.prod(map(int, re.findall(r"\d+", shape))))
    return " … ".join(compact_shape(shape) for shape in (ordered if len(ordered) == 1 else (ordered[0], ordered[-1])))


def plan_details(rows: Sequence[PlanRow]) -> Table:
    """Every changed module, what its tensors are made from, and the rule that claims it (`--dry-run`)."""
    made = table("module", "from → to", "tensors", "rule")
    for row in rows:
        made.add_row(
            row.path, f"{compact_shape(row.before)} → {compact_shape(row.after)}", _grouped(row.tensors), row.rule
        )
    return made


def rule_places(rows: Sequence[PlanRow]) -> list[str]:
    """Where the rules that were used are written, one line each."""
    return sorted({f"{row.where}  {row.rule}" for row in rows}, key=lambda line: int(line.split(":")[-1].split()[0]))


def _grouped(tensors: Sequence[str]) -> str:
    """ "weight, bias: tiled" for tensors that are made the same way."""
    ways: dict[str, list[str]] = {}
    for entry in tensors:
        name, _, way = entry.partition(": ")
        ways.setdefault(way, []).append(name)
    return "; ".join(
        f"all {way}" if len(ways) == 1 and len(n) > 2 else f"{', '.join(n)}: {way}" for way, n in ways.items()
    )


def certificate_table(checks: Sequence[dict[str, Any]]) -> Table:
    """One line per check."""
    made = table("check", "", "outcome")
    for check in checks:
        made.add_row(check["name"], "ok" if check["passed"] else "FAILED", check["summary"])
    return made


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Label and value, one pair a line; pairs without a value are left out."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for label, value in pairs:
        if value not in (None, "", ()):
            made.add_row(label, str(value))
    return made
