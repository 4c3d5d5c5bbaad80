"""YAML → validated rule set: finds rule files, resolves what they extend, and says which rule claims which module.

Pure Python: never sees a tensor. The language is described in rules/README.md, its keys and values in `rule_models`,
reading with lines and the wording of errors in `yaml_marks`. Every error is a RulesError; its message has one line
per problem, each with file, line and dotted key.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import yaml

from repbnn_cli.errors import RulesError
from repbnn_cli.rules.rule_files import Source, find, resolve, shipped
from repbnn_cli.rules.rule_models import (
    ACTIONS_OF,
    REPEATING,
    Action,
    Align,
    Cached,
    ChannelAxis,
    Match,
    ModuleMatch,
    Options,
    Part,
    Repeat,
    Role,
    Share,
)
from repbnn_cli.rules.yaml_marks import Document, nearest, validate


@dataclass(frozen=True)
class Subject:
    """What a rule can claim: a module, an operator without parameters, or a parameter that a forward uses directly.

    type_names: class name and dotted class path of each class up to nn.Module. position: "" where it has none.
    """

    path: str
    type_names: tuple[str, ...]
    role: str
    position: str = ""


@dataclass(frozen=True)
class Rule:
    """One rule, resolved. `where`: file and line of its name, in the last file that wrote its `match` or `apply`.

    repeat: None where the action repeats nothing. share: None means what options.last_layer says. align: None means
    replicas.
    """

    name: str
    part: Part
    match: Match
    apply: Action
    repeat: Repeat | None = None
    share: Share | None = None
    align: Align | None = None
    optional: bool = False
    where: str = field(default="", compare=False)

    def covers(self, subject: Subject) -> bool:
        """Whether the selector accepts it; another rule may still be the one that claims it."""
        match = self.match
        return (
            (not match.role or subject.role in match.role)
            and (not match.position or subject.position in match.position)
            and match.names(subject.path, subject.type_names)
        )


@dataclass(frozen=True)
class ModuleRule:
    """What the user's own modules are. None: to be found out. `where`: file and line of the entry."""

    match: ModuleMatch
    role: Role | None = None
    kernel: str | None = None
    kernel_shape: tuple[int | str, ...] | None = None
    per_channel: Mapping[str, ChannelAxis] = field(default_factory=dict, hash=False)
    attributes: Mapping[str, Cached] = field(default_factory=dict, hash=False)
    weight_bits: int | None = None
    activation_bits: int | None = None
    leaf: bool | None = None
    optional: bool = False
    where: str = field(default="", compare=False)


_Claimant = TypeVar("_Claimant", Rule, ModuleRule)


@dataclass(frozen=True)
class RuleSet:
    """Resolved rules. Equal when they say the same, wherever it was written; `source` is the name or path given."""

    name: str
    summary: str
    options: Options
    rules: tuple[Rule, ...]
    modules: tuple[ModuleRule, ...] = ()
    source: str = field(default="", compare=False)

    @cached_property
    def text(self) -> str:
        """The whole rule set as YAML: nothing inherited, defaults written out. `loads(text)` gives it back."""
        return _dump(self)

    def with_options(
        self, beta: int | None = None, inherit: str | None = None, last_layer: str | None = None
    ) -> RuleSet:
        """The same rules under other options; None keeps the present one. Raises RulesError for a wrong value."""
        given = {"beta": beta, "inherit": inherit, "last_layer": last_layer}
        values = self.options.model_dump() | {key: value for key, value in given.items() if value is not None}
        document = Document("options", values, {(): 1, **{(key,): 1 for key in values}}, ())
        try:
            return replace(self, options=validate(document, Options))
        except RulesError as error:  # a flag has no file and line
            raise RulesError(str(error).replace("options:1 ", "")) from None

    def assign(self, subjects: Sequence[Subject], elsewhere: Sequence[Subject] = ()) -> dict[str, Rule]:
        """Path → the rule that claims it; a subject that no rule covers is absent.

        elsewhere: what a rule that covers none of these may have been written for.

        The most specific selector wins: path, then type, then role and position; between equals, the one that is not
        optional. Raises RulesError when two rules are equal, when a rule that is not optional covers nothing, and
        when an action does not fit what it would be applied to.
        """
        claims: dict[str, Rule] = {}
        errors: dict[tuple[str, str], list[str]] = {}  # text before and after the paths → the paths
        covering = {rule.name for rule in self.rules if any(rule.covers(s) for s in elsewhere)}
        for subject in subjects:
            candidates = [rule for rule in self.rules if rule.covers(subject)]
            if not candidates:
                continue
            covering.update(rule.name for rule in candidates)
            best = _strongest(candidates)
            if len(best) > 1:
                errors.setdefault(_conflict(*(f"{r.where} rules.{r.name}" for r in best[:2])), []).append(subject.path)
            elif best[0].apply not in ACTIONS_OF.get(subject.role, (best[0].apply,)):
                errors.setdefault(_misfit(best[0], subject.role), []).append(subject.path)
            claims[subject.path] = best[0]
        messages = [before + _several(paths) + after for (before, after), paths in errors.items()]
        messages += [_idle(r, subjects) for r in self.rules if r.name not in covering and not r.optional]
        if messages:
            raise RulesError("\n".join(messages))
        return claims

    def declare(self, path: str, type_names: tuple[str, ...]) -> ModuleRule | None:
        """What the user says about a module; precedence and conflicts as in `assign`."""
        best = _strongest([m for m in self.modules if m.match.names(path, type_names)])
        if len(best) > 1:
            raise RulesError(path.join(_conflict(*(f"{m.where} modules" for m in best[:2]))))
        return best[0] if best else None

    def check_declared(self, used: Iterable[ModuleRule], known: Iterable[tuple[str, tuple[str, ...]]] = ()) -> None:
        """Raises RulesError for each entry that is not optional, not in `used`, and matches none of `known`.

        known: path and type names of the modules there are; an entry may match some and claim none of them.
        """
        claiming = set(used)
        subjects = [Subject(path, type_names, "") for path, type_names in known]
        messages = [
            f"{m.where} modules.match: matches no module; {_why_idle(m.match, subjects)}; change it, or mark the entry "
            "`optional: true`"
            for m in self.modules
            if not m.optional and m not in claiming and not any(m.match.names(s.path, s.type_names) for s in subjects)
        ]
        if messages:
            raise RulesError("\n".join(messages))


# ---------------------------------------------------------------------------------------------------------------------
# Loading and writing


def load(name_or_path: str | os.PathLike[str]) -> RuleSet:
    """The rule set of a file: a shipped one by its bare name ("reptran"), anything else is a path.

    Raises RulesError: no such file, not YAML, not valid, or the files it extends do not fit; one line per problem.
    """
    reference = os.fsdecode(name_or_path)
    return _rule_set(find(reference, folder=""), reference)


def loads(text: str, name: str = "<stored rules>") -> RuleSet:
    """The rule set of a text, such as `RuleSet.text`; `name` stands for the file in messages."""
    return _rule_set(Source(name, text, identity=f"text {name}"), name)


def names() -> dict[str, str]:
    """Name → summary of each rule file that comes with repbnn."""
    return {name: load(name).summary for name in shipped()}


def _rule_set(source: Source, reference: str) -> RuleSet:
    whole = resolve(source)
    rules = []
    for name, entry in whole.rules.items():
        values = entry.values()
        if values["apply"] in REPEATING:
            values.setdefault("repeat", "before_batch_norm")
        rules.append(Rule(name, **values, where=entry.where("match", "apply")))
    modules = tuple(ModuleRule(**entry.values(), where=entry.where(*entry.keys)) for entry in whole.modules)
    return RuleSet(whole.name, whole.summary, whole.options, tuple(rules), modules, reference)


def _dump(rules: RuleSet) -> str:
    """Keys in the order of the language reference; whatever is None stays out. Lines are never folded."""
    whole: dict[str, Any] = {"schema": 1, "name": rules.name}
    if rules.summary:
        whole["summary"] = rules.summary
    whole["options"] = rules.options.model_dump()
    whole["rules"] = {rule.name: _plain(rule, skip=("name", "where")) for rule in rules.rules}
    if rules.modules:
        whole["modules"] = [_plain(module, skip=("where",)) for module in rules.modules]
    return yaml.safe_dump(whole, sort_keys=False, default_flow_style=None, allow_unicode=True, width=10**9)


def _plain(item: Rule | ModuleRule, skip: Sequence[str]) -> dict[str, Any]:
    values = {key: value for key, value in vars(item).items() if key not in skip and value not in (None, {})}
    selector = item.match.model_dump(exclude_unset=True)
    values["match"] = {key: given[0] if len(given) == 1 else list(given) for key, given in selector.items()}
    for key in ("per_channel", "attributes"):
        if key in values:
            values[key] = {k: v if isinstance(v, str) else v.model_dump() for k, v in values[key].items()}
    if "kernel_shape" in values:
        values["kernel_shape"] = list(values["kernel_shape"])
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Selection


def _strongest(candidates: Sequence[_Claimant]) -> list[_Claimant]:
    """Those of the highest rank; optional ones yield to those that are not."""
    top = max((c.match.rank for c in candidates), default=0)
    best = [c for c in candidates if c.match.rank == top]
    return [c for c in best if not c.optional] or best


def _conflict(first: str, second: str) -> tuple[str, str]:
    """The text before and after the paths of the modules."""
    return (
        f"{first} and {second}: both claim ",
        " and neither is more specific (path over type over role and position); mark one of them `optional: true`, "
        "or narrow it",
    )


def _misfit(rule: Rule, role: str) -> tuple[str, str]:
    return (
        f"{rule.where} rules.{rule.name}.apply: {rule.apply} does not fit ",
        f", role {role}; expected one of {', '.join(ACTIONS_OF[role])}",
    )


def _several(paths: Sequence[str]) -> str:
    return paths[0] + (f" (and {len(paths) - 1} more)" if len(paths) > 1 else "")


def _idle(rule: Rule, subjects: Sequence[Subject]) -> str:
    return (
        f"{rule.where} rules.{rule.name}.match: matches no module; {_why_idle(rule.match, subjects)}; "
        "change it, or mark the rule `optional: true`"
    )


def _why_idle(match: ModuleMatch, subjects: Sequence[Subject]) -> str:
    """Which key of a selector finds nothing, and what it would have found."""
    reasons = []
    if isinstance(match, Match):
        for key, wanted in (("role", match.role), ("position", match.position)):
            count = Counter(value for s in subjects if (value := str(getattr(s, key))))
            if wanted and not count.keys() & set(wanted):
                there = ", ".join(f"{value} ({n})" for value, n in count.most_common()) or "none"
                reasons.append(f"no module has the {key} {' or '.join(wanted)}; {key}s here: {there}")
    for key, globs in (("type", match.type), ("path", match.path)):
        alone = ModuleMatch(**{key: globs}) if globs else None
        if alone and not any(alone.names(s.path, s.type_names) for s in subjects):
            present = [name for s in subjects for name in (s.type_names if key == "type" else (s.path,)) if name]
            shown = nearest(globs[0], present) or f"; {key}s here: {_some(present)}"
            reasons.append(f"no module has the {key} {' or '.join(map(repr, globs))}{shown}")
    return " and ".join(reasons) or "each of its keys matches some module, no module matches all of them"


def _some(names: Sequence[str], most: int = 8) -> str:
    different = list(dict.fromkeys(names))
    return (", ".join(different[:most]) + (", ..." if len(different) > most else "")) or "none"
