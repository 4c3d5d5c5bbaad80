"""Rule files: which file a name means, what it extends, and the whole that a chain of files makes.

Values of a file go before those of the file it extends, per rule name and per key; each value remembers where it was
written, so that what only the whole can show (a rule without `match`, a key that does not go with the action) is
still reported with file and line.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from repbnn_cli.errors import RulesError
from repbnn_cli.rules.rule_models import ACTIONS_OF, CONVOLUTIONS, REPEATING, ModuleMatch, Options, RuleFile
from repbnn_cli.rules.yaml_marks import Document, Problem, complain, dotted, nearest, printable, read, text_of, validate


@dataclass(frozen=True)
class Source:
    """A rule text. shown: what messages call it; folder: where its relative paths start, None for nowhere."""

    shown: str
    text: str
    identity: str
    folder: str | None = None


class Written(NamedTuple):
    """A value and where it stands; depth counts the files of the chain from the innermost base, 0."""

    value: Any
    file: str
    line: int
    depth: int


class Head(NamedTuple):
    """Where a file begins to speak of an entry, and what the entry is called there: rules.NAME, modules[0]."""

    file: str
    line: int
    key: str


@dataclass
class Entry:
    """A rule or a module entry put together from the files of a chain. heads: by depth in the chain."""

    keys: dict[str, Written] = field(default_factory=dict)
    heads: dict[int, Head] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        return {key: written.value for key, written in self.keys.items()}

    def where(self, *deciding: str) -> str:
        """`file:line` of its name in the last file that wrote one of the deciding keys."""
        head = self.heads[max(self.keys[key].depth for key in deciding)]
        return f"{head.file}:{head.line}"

    def problem(self, text: str, key: str | None = None) -> Problem:
        """With one of its keys, or with the entry as the last file has it."""
        if key is None:
            return Problem(*self.heads[max(self.heads)], text)
        written = self.keys[key]
        return Problem(written.file, written.line, f"{self.heads[written.depth].key}.{key}", text)


@dataclass
class Whole:
    """Everything a chain of files says."""

    name: str
    summary: str
    options: Options
    rules: dict[str, Entry]
    modules: tuple[Entry, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def shipped(below: str = "") -> dict[str, Traversable]:
    """Name → file of each rule file that comes with repbnn; below: of the YAML files in a folder under them."""
    folder: Traversable
    try:
        folder = resources.files("repbnn_cli.rules_data")
    except ModuleNotFoundError:
        # That package is made when repbnn is installed (pyproject.toml maps it to the folder rules/); in a checkout
        # that is only on the path it does not exist, and rules/ lies beside this package.
        folder = Path(__file__).resolve().parent.parent / "rules"
    folder = folder / below if below else folder
    if not folder.is_dir():
        raise RulesError("the rule files of repbnn are missing from this installation; install it again")
    found = {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def find(reference: str, folder: str | None) -> Source:
    """The rule file that `reference` means: a shipped one by its bare name, else a path, relative to `folder`."""
    files = shipped()
    if reference in files:
        shown = f"rules/{reference}.yaml"
        return Source(shown, files[reference].read_text("utf-8"), identity=f"shipped {reference}")
    known = f"one of {', '.join(files)}{nearest(Path(reference).stem, files)}"
    if folder is None:
        raise RulesError(f"{printable(reference)}: no such rule file comes with repbnn; expected {known}")
    known = f"expected a path or {known}"
    path = os.path.join(folder, reference)
    shown = printable(os.path.normpath(path) if folder else reference)
    return Source(shown, text_of(path, shown, "rule file", known), os.path.realpath(path), os.path.dirname(path))


# ---------------------------------------------------------------------------------------------------------------------
# Putting a chain together


def resolve(source: Source) -> Whole:
    """The whole that a file and all that it extends make. Raises RulesError, one line per problem."""
    links = _chain(source)
    options: dict[str, Any] = {}
    rules: dict[str, Entry] = {}
    modules: dict[ModuleMatch, Entry] = {}
    problems: list[Problem] = []
    for depth, (document, file) in enumerate(links):
        problems += _remove(rules, document, file)
        if "options" in file.model_fields_set:
            options |= {key: getattr(file.options, key) for key in file.options.model_fields_set}
        for name, rule in (file.rules or {}).items():
            _add(rules.setdefault(name, Entry()), document, ("rules", name), rule, depth)
        for i, module in enumerate(file.modules):
            entry = modules.setdefault(module.match, Entry())
            if depth in entry.heads:
                first = entry.heads[depth].line
                problems.append(document.problem(("modules", i), f"has the match of line {first} again; join the two"))
            _add(entry, document, ("modules", i), module, depth)
    for name, entry in rules.items():
        problems += _check_rule(name, entry, [other for other in rules if other != name])
    for entry in modules.values():
        problems += _check_module(entry)
    document, file = links[-1]
    if not rules:
        problems.append(document.problem((), "has no rules; expected `rules:` with some, or `extends: reptran`"))
    if problems:
        complain(problems)
    name = file.name or re.sub(r"[^A-Za-z0-9 ._-]|^[^A-Za-z0-9]+", "-", Path(document.file).stem).strip("- ")[:100]
    return Whole(name or "rules", file.summary, Options(**options), rules, tuple(modules.values()))


def _chain(source: Source) -> list[tuple[Document, RuleFile]]:
    """The file and those it extends, each validated by itself; the innermost base comes first."""
    links: list[tuple[Document, RuleFile]] = []
    seen: dict[str, str] = {}
    while True:
        document = read(source.text, source.shown)
        file = validate(document, RuleFile)
        links.insert(0, (document, file))
        seen[source.identity] = document.file
        if "extends" not in file.model_fields_set:
            return links
        try:
            source = find(file.extends, source.folder)
        except RulesError as error:
            complain([document.problem(("extends",), str(error))])
        if source.identity in seen:
            circle = " → ".join([*seen.values(), seen[source.identity]])
            complain([document.problem(("extends",), f"goes in a circle ({circle}); one of them must not extend")])


def _add(entry: Entry, document: Document, at: tuple[str | int, ...], model: Any, depth: int) -> None:
    entry.heads[depth] = Head(document.file, document.line(at), dotted(at))
    for key in model.model_fields_set:
        entry.keys[key] = Written(getattr(model, key), document.file, document.line((*at, key)), depth)


def _remove(rules: dict[str, Entry], document: Document, file: RuleFile) -> list[Problem]:
    """Before the file's own rules come in, so that a removed name may be written anew."""
    inherited = list(rules)
    problems = []
    for i, name in enumerate(file.remove):
        if name not in inherited:
            there = f"expected one of {', '.join(inherited)}" if inherited else "nothing is inherited here"
            text = f"no inherited rule is called {name!r}; {there}{nearest(name, inherited)}"
            problems.append(document.problem(("remove", i), text))
        rules.pop(name, None)
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# What only the whole can show


def _check_rule(name: str, entry: Entry, others: list[str]) -> list[Problem]:
    missing = [key for key in ("part", "match", "apply") if key not in entry.keys]
    if missing:
        text = f"has no {', '.join(missing)}; expected part, match and apply, or the name of an inherited rule"
        return [entry.problem(text + nearest(name, others))]
    problems: list[Problem] = []
    apply, match = entry.keys["apply"], entry.keys["match"]
    for key, actions in (("repeat", REPEATING), ("share", ("select_inputs",)), ("align", ("tile",))):
        if key in entry.keys and apply.value not in actions:
            why = f"has no effect with apply: {apply.value}; expected with {' or '.join(actions)}"
            problems += _settle(entry, key, "apply", why)
    for role in match.value.role:
        if apply.value not in ACTIONS_OF[role]:
            later = max(match, apply, key=lambda written: written.depth)
            label = f"{entry.heads[later.depth].key}.apply"
            fitting = ", ".join(ACTIONS_OF[role])
            text = f"{apply.value} does not fit role {role}; expected one of {fitting}"
            problems.append(Problem(later.file, later.line, label, text))
    return problems


def _check_module(entry: Entry) -> list[Problem]:
    role = entry.keys["role"].value if "role" in entry.keys else None
    problems: list[Problem] = []
    if role is None and "leaf" not in entry.keys:
        problems.append(entry.problem("says nothing about its modules; expected a role or a leaf"))
    for key in ("kernel", "kernel_shape", "weight_bits", "activation_bits", "per_channel", "attributes"):
        if key not in entry.keys:
            continue
        if role is None:
            problems += _settle(entry, key, "role", "has no effect without a role; expected `role:` beside it")
        elif key in ("per_channel", "attributes"):
            if role == "weightless":
                problems += _settle(entry, key, "role", "does not go with role weightless; expected role per_channel")
        elif role not in CONVOLUTIONS:
            expected = ", ".join(CONVOLUTIONS)
            problems += _settle(entry, key, "role", f"has no effect for role {role}; expected one of {expected}")
    if role is not None and "leaf" in entry.keys and not entry.keys["leaf"].value:
        problems += _settle(entry, "leaf", "role", "false traces into the module, which then needs no role; drop one")
    return problems


def _settle(entry: Entry, key: str, decider: str, text: str) -> list[Problem]:
    """A key that does not go with another: left out where it was only inherited, a problem where it was meant."""
    written, deciding = entry.keys[key], entry.keys.get(decider)
    if deciding and written.depth < deciding.depth:
        del entry.keys[key]
        return []
    return [entry.problem(text, key)]
