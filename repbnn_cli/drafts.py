"""A rule file for one network, with everything that was found out about it written down: `repbnn rules init`.

Every module gets its role with the evidence behind it as a comment. What a declaration would say otherwise than what
was found, and what a declaration cannot say (convolutions that a forward calls as functions), stays a comment, so the
file as it is written gives the plan that no file gives. What is left to a person is marked `DECIDE`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from repbnn_cli import rules as rulebook
from repbnn_cli import source, surgery
from repbnn_cli.errors import RepbnnError
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.recognize import CONVOLUTIONS, Layer, recognize
from repbnn_cli.recognize.hints import hints
from repbnn_cli.rules import RuleSet
from repbnn_cli.source import Source

MARK = "DECIDE"
_WIDTH = 118


@dataclass(frozen=True)
class Entry:
    """One module. declared: the keys of its entry besides `match`; None where it stays a comment, and `why`."""

    path: str
    type: str
    role: str
    evidence: str
    declared: Mapping[str, Any] | None
    why: str = ""

    @property
    def open(self) -> bool:
        return self.role == "unknown"


@dataclass(frozen=True)
class Draft:
    """decide: what is left to a person, one sentence each; base: the rule file that is extended."""

    base: str
    entries: tuple[Entry, ...]
    decide: tuple[str, ...]

    def text(self, title: str) -> str:
        """The rule file."""
        lines = [f"# {line}" for line in textwrap.wrap(title, _WIDTH)]
        lines += [
            "#",
            "# Each role below was found; its evidence stands beside it. Unchanged, this file gives the same plan",
        ]
        lines += [
            f"# as `{self.base}` alone. Correct what is wrong, decide what is marked {MARK}, leave the rest.",
            "#",
        ]
        for sentence in self.decide:
            lines += textwrap.wrap(sentence, _WIDTH, initial_indent=f"# {MARK}: ", subsequent_indent="#   ")
        if not self.decide:
            lines.append("# Nothing is left to decide.")
        lines += ["", f"extends: {_scalar(self.base)}", ""]
        stated = [e for e in self.entries if e.declared is not None]
        lines += ["modules:"] if stated else ["modules: []"]
        for group in _groups(stated):
            lines += _declaration(group)
        silent = [e for e in self.entries if e.declared is None]
        if silent:
            lines += ["", "# Found, and left to be found again by each run:"]
            lines += [line for entry in silent for line in _comment(entry)]
        return "\n".join(lines) + "\n"

    def as_plain(self) -> dict[str, Any]:
        rows = [
            {"path": e.path, "type": e.type, "role": e.role, "evidence": e.evidence,
             "declared": None if e.declared is None else dict(e.declared), "why": e.why}
            for e in self.entries
        ]  # fmt: skip
        return {"extends": self.base, "modules": rows, "decide": list(self.decide)}


def draft(src: Source, base: str, rules: RuleSet) -> Draft:
    """What was found out about a network, as declarations that say the same.

    base: what the file extends; rules: that file, read.
    """
    network = source.capture(src.model, src.origin, rules)
    layers = recognize(network, rules.declare)
    entries = [_entry(network.module, layer) for layer in layers.values()]
    kept = _said_alike(src, rules, layers, entries)
    decide = [f"{e.path}: {e.evidence}" for e in kept if e.open] + hints(network, layers)
    try:
        surgery.plan(network, rules)
    except RepbnnError as error:
        decide += [f"transform refuses: {line}" for line in str(error).splitlines()]
    return Draft(base, tuple(kept), tuple(decide))


def _entry(module: Any, layer: Layer) -> Entry:
    held = fetch(module, layer.path)
    name = type(held).__name__
    if layer.called:
        return Entry(layer.path, name, layer.role, layer.evidence, None, "a function's call, by what it does")
    if layer.role == "unknown":
        return Entry(layer.path, name, layer.role, layer.evidence, None, _open_question(held))
    said: dict[str, Any] = {"role": layer.role}
    if layer.role in CONVOLUTIONS:
        said["kernel"] = layer.kernel
        if layer.kernel and tuple(fetch(held, layer.kernel).shape) != layer.stored_shape:
            said["kernel_shape"] = list(layer.kernel_shape)
        said["weight_bits"], said["activation_bits"] = layer.weight_bits, layer.activation_bits
    axes = {n: ("out", a) for n, a in layer.out_tensors.items()} | {n: ("in", a) for n, a in layer.in_tensors.items()}
    if axes and layer.role != "batch_norm":
        said["per_channel"] = {n: {"channels": side, "axis": axis} for n, (side, axis) in axes.items()}
    return Entry(layer.path, name, layer.role, layer.evidence, said)


def _open_question(module: Any) -> str:
    tensors = [(n, t) for n, t in (*module.named_parameters(), *module.named_buffers()) if t.numel() > 1]
    held = ", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors)
    return f"it holds {held or 'no tensors'}"


def _said_alike(src: Source, rules: RuleSet, layers: Mapping[str, Layer], entries: list[Entry]) -> list[Entry]:
    """The entries; a declaration under which its module would be taken for something else becomes a comment."""
    entries = [
        replace(e, declared=None, why="declared there already") if rules.declare(e.path, ()) is not None else e
        for e in entries
    ]
    while True:
        stated = [e for e in entries if e.declared is not None]
        with_them = rulebook.loads(_probe_text(rules, stated))
        network = source.capture(src.model, src.origin, with_them)
        try:
            found = recognize(network, with_them.declare)
            wrong = {e.path for e in stated if not _alike(layers[e.path], found.get(e.path))}
        except RepbnnError as error:  # names the one module whose declaration does not fit
            wrong = {e.path for e in stated if e.path in str(error)} or {e.path for e in stated}
        if not wrong:
            return entries
        entries = [
            replace(e, declared=None, why="a declaration cannot say all of it") if e.path in wrong else e
            for e in entries
        ]


def _probe_text(rules: RuleSet, stated: Iterable[Entry]) -> str:
    """The rules with the declarations in front of theirs."""
    plain = yaml.safe_load(rules.text)
    plain["modules"] = [
        *plain.get("modules", []),
        *({"match": {"path": _glob(e.path)}, **(e.declared or {})} for e in stated),
    ]
    return yaml.safe_dump(plain, sort_keys=False)


def _alike(one: Layer, other: Layer | None) -> bool:
    """Equal in all but what the verdict rests on."""
    return other is not None and replace(one, evidence="", attributes={}) == replace(other, evidence="", attributes={})


def _groups(entries: list[Entry]) -> list[list[Entry]]:
    """Modules of one class that are declared alike, in order of the first of each."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(yaml.safe_dump([entry.type, dict(entry.declared or {})]), []).append(entry)
    return list(groups.values())


def _declaration(group: list[Entry]) -> list[str]:
    first = group[0]
    lines = ["", f"  # {first.type}: {len(group)} module{'s' if len(group) > 1 else ''}"]
    lines += ["  - match:", "      path:"]
    longest = max(len(_scalar(_glob(e.path))) for e in group)
    for entry in group:
        path = _scalar(_glob(entry.path))
        lines.append(f"        - {path}{' ' * (longest - len(path))}  # {_one_line(entry.evidence)}")
    for key, value in (first.declared or {}).items():
        lines.append(f"    {key}: {_scalar(value)}")
    return lines


def _comment(entry: Entry) -> list[str]:
    head = f"{MARK}: " if entry.open else ""
    text = f"{head}{entry.path} ({entry.type}): {entry.role}: {_one_line(entry.evidence)}" + (
        f" ({entry.why})" if entry.why else ""
    )
    lines = textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="#   ")
    if entry.open:
        lines += [
            f"#  - match: {{path: {_scalar(_glob(entry.path))}}}",
            "#    role: per_channel   # or weightless, binary_conv, float_conv, depthwise_conv, binary_linear, ...",
            "#    per_channel: {}     # tensor: {channels: in, axis: 0}, for each tensor with an entry per channel",
        ]
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _glob(path: str) -> str:
    """A pattern that matches this path only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _scalar(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()
