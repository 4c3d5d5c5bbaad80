"""What explain, lint and doctor print on a terminal, from values alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from repbnn_cli.doctor import GROUPS, Item
from repbnn_cli.explain import Group, Neighbour, Story, Whole
from repbnn_cli.explain.explain_words import ChannelMap
from repbnn_cli.lint import CHECKS, SEVERITIES, Outcome
from repbnn_cli.lint.lint_checks import Place
from repbnn_cli.number_text import code, compact_shape, markdown_table, shape_text
from repbnn_cli.views.networks import PARTS, facts

_WITH = {
    "input": "deliver its input",
    "behind": "take its output, up to the next convolutions",
    "sum": "meet its output in a sum or concatenation, so their channels must agree",
}
_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold"}
_PLACES = 4
_LABEL = 14  # columns; longer lists of tensors stand beside the label


def story(told: Story) -> RenderableType:
    """One module."""
    part = PARTS.get(told.part, "")
    return Lines(
        Text(told.path, style="bold"),
        facts(
            [
                (told.kind, ", ".join(filter(None, (told.role.replace("_", " "), told.evidence)))),
                ("position", told.position),
                ("rule", f"{told.rule} ({part}), {told.where}" if told.rule else ""),
                ("change" if told.changed else "unchanged", told.what),
                ("shape", _change(told.before, told.after) if told.changed else ""),
                *(("input" if len(told.inputs) == 1 else f"input {i + 1}", _map(m)) for i, m in enumerate(told.inputs)),
                ("output", _map(told.output) if told.output else ""),
                *_tensors(told),
            ]
        ),
        *_with_it(told.with_it),
    )


def _change(before: str, after: str) -> str:
    return f"{compact_shape(before)} → {compact_shape(after)}"


def _map(channels: ChannelMap) -> str:
    before, after = shape_text(channels.before), shape_text(channels.after)
    return f"{before} → {after}: {channels.text}" if before != after else f"{before}: {channels.text}"


def _tensors(told: Story) -> Iterator[tuple[str, str]]:
    """Tensors that were made in the same way share a line."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for t in told.tensors:
        key = (shape_text(t.before), shape_text(t.after), t.made_from, t.values)
        ways.setdefault(key, []).append(t.name)
    for (before, after, made, values), names in ways.items():
        text = f"{before} → {after}: {made}" + (f"; {values}" if values else "")
        listed = ", ".join(names)
        yield (listed, text) if len(listed) <= _LABEL else ("tensors", f"{listed}: {text}")


def _with_it(neighbours: Sequence[Neighbour]) -> Iterator[RenderableType]:
    for why, text in _WITH.items():
        members = [n for n in neighbours if n.why == why]
        if members:
            yield Text(f"\nchanged with it, because they {text}:")
            yield facts((f"  {n.path}", n.what) for n in members[:_PLACES])
            if len(members) > _PLACES:
                yield Text(f"  and {len(members) - _PLACES} more (--json lists them)")


def whole(told: Whole) -> RenderableType:
    """Part by part."""
    lines: list[RenderableType] = [Text(told.path, style="bold")] if told.path else []
    if not told.groups:
        lines.append(Text("nothing was changed"))
    shown = ""
    for group in told.groups:
        if group.part != shown:
            lines.append(Text(("\n" if lines else "") + PARTS.get(group.part, group.part), style="bold"))
            shown = group.part
        head = f"{group.rule}, {group.where}" if group.rule else ""
        lines.append(facts([(f"  {len(group.paths)}×", f"{head}\n{group.what}\n{_examples(group)}".strip())]))
    lines += [Text(f"\nnote: {note}") for note in told.notes]
    return Lines(*lines)


def _examples(group: Group) -> str:
    """The first few modules, each kind of change once before any is shown again."""
    shapes = list(zip(group.before, group.after, strict=True)) or [("", "")] * len(group.paths)
    first = dict(reversed([(s, p) for p, s in zip(group.paths, shapes, strict=True)]))
    chosen = sorted(first.items(), key=lambda item: group.paths.index(item[1]))[:_PLACES]
    if group.before:
        texts = [f"{path} {_change(before, after)}" for (before, after), path in chosen]
    else:
        texts = list(group.paths[:_PLACES])
    left = len(group.paths) - len(texts)
    return ", ".join(texts) + (f" and {left} more" if left else "")


def findings(network: str, outcomes: Sequence[Outcome], *, every: bool = False) -> RenderableType:
    """What was found, gravest first, each with remedy and source; then what passed and what was not asked."""
    found = sorted((o for o in outcomes if o.places), key=lambda o: SEVERITIES.index(o.check.severity))
    lines: list[RenderableType] = [Text(f"{network}: {len(outcomes)} checks, {len(found)} with findings")]
    for outcome in found:
        check = outcome.check
        lines += [
            Text(f"\n{check.severity}: {check.title} ({check.name})", style=_STYLES[check.severity]),
            facts(
                [
                    (f"  {len(outcome.places)}×", _places(outcome.places, every=every)),
                    ("  do", check.remedy),
                    ("  see", check.source),
                ]
            ),
        ]
    passed = [o.check.name for o in outcomes if not o.places and not o.skipped]
    lines.append(facts([("\npassed", "\n" + ", ".join(passed))] if passed else []))
    for reason in dict.fromkeys(o.skipped for o in outcomes if o.skipped):
        names = ", ".join(o.check.name for o in outcomes if o.skipped == reason)
        lines.append(facts([("not checked", f"{names}: {reason}")]))
    return Lines(*lines)


def checks_markdown() -> str:
    """All checks as a table, for docs/lint.md."""
    rows = [(code(c.name), c.severity, c.title, c.remedy, c.source) for c in CHECKS]
    return markdown_table(("check", "severity", "finds", "what to do", "says who"), rows, left=5)


def _places(places: Sequence[Place], *, every: bool) -> str:
    """Places with the same detail share a line."""
    alike: dict[str, list[str]] = {}
    for place in places:
        alike.setdefault(place.detail, []).append(place.path)
    details = list(alike.items())
    shown = details if every else details[:_PLACES]
    lines = []
    for detail, paths in shown:
        listed = paths if every else paths[:_PLACES]
        more = f" and {len(paths) - len(listed)} more" if len(paths) > len(listed) else ""
        where = ", ".join(p for p in listed if p)
        lines.append(f"{where}{more}: {detail}" if where else detail)
    left = sum(len(paths) for _, paths in details[len(shown) :])
    return "\n".join(lines) + (f"\nand {left} more; --all lists them" if left else "")


_MARKS = {"ok": "ok", "absent": "–", "problem": "PROBLEM"}


def health(items: Sequence[Item]) -> RenderableType:
    """Group by group; the last line says how many things are wrong."""
    lines: list[RenderableType] = []
    for group in GROUPS:
        members = [i for i in items if i.group == group]
        made = Table(box=None, pad_edge=False, show_header=False)
        made.add_column(width=14, overflow="fold")
        made.add_column(width=7, no_wrap=True)
        made.add_column(overflow="fold")
        for item in members:
            text = "; ".join(filter(None, (item.value, item.note)))
            made.add_row(item.name, Text(_MARKS[item.state], style="bold red" * (item.state == "problem")), text)
        lines += [Text(group, style="bold"), made, ""]
    problems = sum(i.state == "problem" for i in items)
    lines.append(Text(f"{problems} problems" if problems != 1 else "1 problem") if problems else Text("no problems"))
    return Lines(*lines)
