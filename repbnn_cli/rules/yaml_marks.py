"""YAML with marks: plain values from a text, the line of each, and every complaint about them as one line.

Only text, numbers, booleans, lists and mappings come out: the text is composed, tags are never executed.
`validate` puts such a document through a pydantic model and turns what pydantic finds into

    mine.yaml:14 rules.backbone.match.role: unknown value 'conv'; expected one of ...; nearest: float_conv
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from repbnn_cli.errors import RulesError

MAX_CHARACTERS = 256 * 1024
MAX_VALUES = 20_000  # after aliases are expanded: a few nested ones can stand for billions

Location = tuple[str | int, ...]
_Model = TypeVar("_Model", bound=BaseModel)

_TAG = "tag:yaml.org,2002:"
_AS_TEXT = tuple(_TAG + kind for kind in ("str", "value", "timestamp"))
_AS_VALUE = tuple(_TAG + kind for kind in ("int", "float", "bool", "null"))
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "tuple_type": "a list",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "string_too_short": "text that is not empty",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text of the form {pattern}",
}


@dataclass(frozen=True, order=True)
class Problem:
    """One complaint; `key` is the dotted key, empty for the file as a whole."""

    file: str
    line: int
    key: str
    text: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}"
        return f"{place} {self.key}: {self.text}" if self.key else f"{place}: {self.text}"


@dataclass(frozen=True)
class Document:
    """Plain values of one text. `lines`: where each key or list entry stands; `problems`: found while reading."""

    file: str
    value: Mapping[str, object]
    lines: Mapping[Location, int]
    problems: tuple[Problem, ...]

    def line(self, at: Location) -> int:
        """Line of a key or list entry, or of the nearest one around it."""
        return self.lines[self.known(at)]

    def known(self, at: Location) -> Location:
        while at not in self.lines:
            at = at[:-1]
        return at

    def problem(self, at: Location, text: str) -> Problem:
        at = self.known(at)
        return Problem(self.file, self.lines[at], dotted(at), text)


def complain(problems: Iterable[Problem]) -> NoReturn:
    """Raises RulesError with one line per problem, sorted by file and line."""
    raise RulesError("\n".join(str(p) for p in sorted(set(problems))))


def nearest(name: object, known: Iterable[str], count: int = 3) -> str:
    """`; nearest: a, b`, or nothing when no known name resembles this one."""
    found = difflib.get_close_matches(
        name if isinstance(name, str) else "", list(dict.fromkeys(known)), n=count, cutoff=0.5
    )
    return f"; nearest: {', '.join(found)}" if found else ""


def dotted(at: Location) -> str:
    """`rules.backbone.match.role[1]`"""
    parts = (f"[{p}]" if isinstance(p, int) else f".{printable(p)}" for p in at)
    return "".join(parts).removeprefix(".")


def printable(text: str) -> str:
    """The text itself, or its Python form where it would break the line."""
    return text if text.isprintable() and text else repr(text)


def describe(value: object) -> str:
    """What was found, in YAML's words and short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) > 10**18:  # repr() of a number with thousands of digits is an error
        return "a huge number"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return "a mapping" if isinstance(value, Mapping) else "a list" if isinstance(value, tuple | list) else repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def text_of(path: str, shown: str, kind: str, known: str) -> str:
    """The text of a YAML file that somebody named. shown: how messages call it; known: what he could have named."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CHARACTERS + 1)
        if len(data) > MAX_CHARACTERS:
            raise RulesError(f"{shown}: longer than {MAX_CHARACTERS // 1024} KiB; expected a {kind}")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise RulesError(f"{shown}: no such {kind}; {known}") from None
    except UnicodeDecodeError as error:
        raise RulesError(f"{shown}: is not UTF-8 text (byte {error.start}); expected a YAML {kind}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise RulesError(f"{shown}: cannot be read ({getattr(error, 'strerror', None) or error}); {known}") from None


def read(text: str, file: str) -> Document:
    """Composes one YAML document whose root is a mapping. Raises RulesError with file and line.

    file: how messages call the text. Duplicate keys and tags are left in `problems` for `validate` to report.
    """
    file = printable(file)
    if len(text) > MAX_CHARACTERS:
        raise RulesError(f"{file}: longer than {MAX_CHARACTERS // 1024} KiB; expected a YAML file")
    try:
        root = yaml.SafeLoader(text).get_single_node()
        if root is None:
            raise RulesError(f"{file}:1: is empty; expected a mapping, for example `extends: reptran`")
        walk = _Walk(file)
        value = walk.value(root, ())
    except RecursionError:
        raise RulesError(f"{file}: nested too deeply; expected a YAML file") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RulesError(
            f"{file}:{line}: holds the character {error.character:#04x}; expected a YAML text file"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise RulesError(_syntax(error, file)) from None
    except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
        # PyYAML lets a few through, for example for the escape "\UFFFFFFFF" or %YAML with a huge number.
        raise RulesError(f"{file}: not valid YAML: {printable(str(error))}") from None
    if not isinstance(value, dict):
        complain([*walk.problems, Problem(file, walk.lines[()], "", f"found {describe(value)}; expected a mapping")])
    return Document(file, value, walk.lines, tuple(walk.problems))


def _syntax(error: yaml.MarkedYAMLError, file: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{file}:{mark.line + 1}" if mark else file
    what = ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
    hint = "; indent with spaces, not with tabs" if "\\t" in what else ""
    return f"{place}: not valid YAML: {printable(what)}{hint}"


@dataclass
class _Walk:
    """Nodes → values. `lines` and `problems` fill up on the way."""

    file: str
    lines: dict[Location, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    count: int = 0
    around: list[yaml.Node] = field(default_factory=list)  # the nodes that enclose the present one

    def value(self, node: yaml.Node, at: Location) -> object:
        line = node.start_mark.line + 1
        self.lines.setdefault(at, line)
        self.count += 1
        if self.count > MAX_VALUES:
            raise RulesError(f"{self.file}:{line}: its aliases expand to more than {MAX_VALUES} values; write fewer")
        if any(node is outer for outer in self.around):
            self.complain(line, at, f"the alias refers to what it stands in (line {line}); write it out")
            return None
        self.around.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                found: dict[str, object] = {}
                self.fill(found, node, at)
                return found
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return tuple(self.value(child, (*at, i)) for i, child in enumerate(node.value))
            return self.scalar(node, at)
        finally:
            self.around.pop()

    def fill(self, found: dict[str, object], node: yaml.MappingNode, at: Location, *, merged: bool = False) -> None:
        """Puts the entries of a mapping into `found`; entries merged with `<<` stay behind those already there."""
        merges: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merges += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _AS_TEXT:
                what = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self.complain(line, at, f"found the key {what}; expected text (put quotes around it)")
                continue
            here = (*at, key_node.value)
            if key_node.value in found:
                if not merged:
                    self.complain(line, here, f"written twice, first at line {self.lines[here]}; keep one")
                continue
            self.lines[here] = line
            found[key_node.value] = self.value(value_node, here)
        for source in merges:
            if not isinstance(source, yaml.MappingNode) or any(source is outer for outer in self.around):
                self.complain(source.start_mark.line + 1, (*at, "<<"), "expected the alias of another mapping")
                continue
            self.around.append(source)
            self.fill(found, source, at, merged=True)
            self.around.pop()

    def scalar(self, node: yaml.Node, at: Location) -> object:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode) and node.tag in _AS_TEXT:
            return str(node.value)
        if isinstance(node, yaml.ScalarNode) and node.tag in _AS_VALUE:
            try:
                return yaml.constructor.SafeConstructor().construct_object(node)
            except (ValueError, LookupError, OverflowError):
                self.complain(line, at, f"{describe(node.value)} is not a valid {node.tag.removeprefix(_TAG)}")
                return None
        self.complain(line, at, f"the tag {describe(node.tag)} is not allowed; expected a plain value")
        return None

    def complain(self, line: int, at: Location, text: str) -> None:
        self.problems.append(Problem(self.file, line, dotted(at), printable(text)))


# ---------------------------------------------------------------------------------------------------------------------
# Validating


def validate(document: Document, model: type[_Model]) -> _Model:
    """The document as an instance of the model. Raises RulesError with every problem, one per line."""
    problems = list(document.problems)
    try:
        result = model.model_validate(document.value)
    except ValidationError as error:
        said = {p.key for p in problems}  # a key whose value could not be read is not complained about twice
        found = (_translate(document, model, detail) for detail in error.errors(include_url=False))
        problems += [p for p in found if p.key not in said or not p.key]
    else:
        if not problems:
            return result
    complain(problems)


def _translate(document: Document, model: type[BaseModel], error: ErrorDetails) -> Problem:
    at, kind, found = error["loc"], error["type"], error["input"]
    context: dict[str, Any] = error.get("ctx", {})
    if kind == "string_pattern_mismatch":
        context = {"pattern": context["pattern"].strip("^$")}
    if at[-1:] == ("[key]",):
        at = at[:-1]
    if kind == "extra_forbidden":
        keys = keys_of(model, at[:-1])
        return document.problem(
            at, f"unknown key {describe(at[-1])}; expected one of {', '.join(keys)}{nearest(at[-1], keys)}"
        )
    if kind == "missing" and isinstance(at[-1], int):  # of a list with as many entries as its type has
        at, kind, context = at[:-1], "too_short", {"max_length": _entries(model, at[:-1])}
    if kind in ("too_short", "too_long") and isinstance(found, tuple) and "max_length" in context:
        return document.problem(at, f"found a list of {len(found)}; expected {context['max_length']} values")
    if kind == "too_short" and context.get("min_length") == 1:
        return document.problem(at, "found an empty list; expected at least one value")
    if kind == "missing":
        return document.problem(at[:-1], f"has no {describe(at[-1])}; expected {', '.join(keys_of(model, at[:-1]))}")
    if kind == "literal_error":
        choices = re.findall(r"[\w-]+", context["expected"].replace(" or ", " "))
        what = f"unknown value {describe(found)}" if isinstance(found, str) else f"found {describe(found)}"
        expected = f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
        return document.problem(at, f"{what}; expected {expected}{nearest(found, choices)}")
    if kind == "value_error":
        return document.problem(at, f"found {describe(found)}; {context['error']}")
    if kind in _EXPECTED:
        return document.problem(
            at, f"found {describe(found)}; expected {_EXPECTED[kind].format_map(context).strip('^$')}"
        )
    return document.problem(at, f"found {describe(found)}; {error['msg']}")


def _entries(model: type[BaseModel], at: Location) -> int:
    """How many entries the list at a location has by its type."""
    count = 0
    for part in at:
        info = model.model_fields.get(str(part))
        if info is not None:  # else a name in a mapping
            parts = get_args(info.annotation)
            count = len(parts)
            model = next(
                (a for a in (info.annotation, *parts) if isinstance(a, type) and issubclass(a, BaseModel)), model
            )
    return count


def keys_of(model: type[BaseModel], at: Location) -> list[str]:
    """The keys that the model has at a location of the document."""
    named = False  # whether this part is a name in a mapping, or a place in a list, of such entries
    for part in at:
        info = None if named else model.model_fields.get(str(part))
        if info is None:
            named = False
            continue
        inner = [a for a in (info.annotation, *get_args(info.annotation)) if isinstance(a, type)]
        named = get_origin(info.annotation) in (dict, tuple)
        model = next((a for a in inner if issubclass(a, BaseModel)), model)
    return [info.alias or name for name, info in model.model_fields.items()]
