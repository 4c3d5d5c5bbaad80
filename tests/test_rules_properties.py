"""Properties of rule files: any valid one survives its own text, and no text raises anything but RulesError."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from repbnn_cli import rules
from repbnn_cli.errors import RulesError
from repbnn_cli.rules import rule_models

names = st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True)
printable = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
lines = st.text(printable, min_size=1, max_size=12)


def one_or_more(values: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return values | st.lists(values, min_size=1, max_size=3)


def literal(kind: str) -> st.SearchStrategy[str]:
    return st.sampled_from(getattr(rule_models, kind).__args__)


@st.composite
def rule_entries(draw: st.DrawFn) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "role": one_or_more(literal("Role")),
        "position": one_or_more(literal("Position")),
        "type": one_or_more(lines),
        "path": one_or_more(lines),
    }
    match = draw(st.fixed_dictionaries({}, optional=keys).filter(len))
    roles = match.get("role", [])
    roles = [roles] if isinstance(roles, str) else roles
    fitting = [a for a in rule_models.Action.__args__ if all(a in rule_models.ACTIONS_OF[r] for r in roles)]
    entry = {"part": draw(literal("Part")), "match": match, "apply": draw(st.sampled_from(fitting))}
    if entry["apply"] in rule_models.REPEATING and draw(st.booleans()):
        entry["repeat"] = draw(literal("Repeat"))
    if entry["apply"] == "select_inputs" and draw(st.booleans()):
        entry["share"] = draw(literal("Share"))
    if entry["apply"] == "tile" and draw(st.booleans()):
        entry["align"] = draw(literal("Align"))
    return entry | draw(st.fixed_dictionaries({}, optional={"optional": st.booleans()}))


module_entries = st.fixed_dictionaries(
    {
        "match": st.fixed_dictionaries({}, optional={"type": one_or_more(lines), "path": lines}).filter(len),
        "role": st.sampled_from(rule_models.CONVOLUTIONS),
    },
    optional={
        "kernel": lines,
        "kernel_shape": st.lists(st.integers(1, 2**31 - 1) | lines, min_size=2, max_size=5),
        "per_channel": st.dictionaries(
            lines,
            st.fixed_dictionaries({"channels": st.sampled_from(["out", "in"]), "axis": st.integers(0, 7)}),
            max_size=2,
        ),
        "attributes": st.dictionaries(lines, literal("Cached"), max_size=2),
        "weight_bits": st.integers(1, 32),
        "activation_bits": st.integers(1, 32),
        "leaf": st.just(True),
        "optional": st.booleans(),
    },
)
whole_files = st.fixed_dictionaries(
    {"rules": st.dictionaries(names, rule_entries(), min_size=1, max_size=4)},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,20}", fullmatch=True),
        "summary": st.text(printable, max_size=40),
        "options": st.fixed_dictionaries(
            {},
            optional={"beta": st.integers(1, 65536), "inherit": literal("Inherit"), "last_layer": literal("Share")},
        ),
        "modules": st.lists(
            module_entries,
            max_size=3,
            unique_by=lambda m: str({k: [v] if isinstance(v, str) else v for k, v in sorted(m["match"].items())}),
        ),
    },
)


@settings(max_examples=60, deadline=None)
@given(whole_files)
def test_any_valid_file_survives_the_round_trip(written: Mapping[str, Any]) -> None:
    loaded = rules.loads(yaml.safe_dump(dict(written), allow_unicode=True, sort_keys=False))
    assert [r.name for r in loaded.rules] == list(written["rules"])
    again = rules.loads(loaded.text)
    assert again == loaded
    assert again.text == loaded.text
    assert rules.loads(yaml.safe_dump(dict(written), sort_keys=True)).options == loaded.options


def attempt(text: str) -> None:
    """Loads, or raises RulesError with one line per problem, each naming the file."""
    said = ""
    try:
        rules.loads(text, "mine.yaml")
    except RulesError as error:
        said = str(error)
    assert all(line.isprintable() and line.startswith("mine.yaml") for line in filter(None, said.split("\n")))


YAML_PIECES = (
    *("rules", "modules", "options", "match", "beta", ":", ": ", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "<<"),
    *("!!python/object:x ", "!!int ", "!a ", "'", '"', "|", ">", "#", "?", "%YAML 9", "---", "...", "1", "~", "true"),
    *("\\U", "é", "2020-99-99", "0x", "1:99", "=", "role: conv", "extends: reptran\n", "\n", "\n  ", "\t", "\ufeff"),
)
yaml_like = st.lists(st.sampled_from(YAML_PIECES), max_size=25).map("".join)


@settings(max_examples=300, deadline=None)
@given(yaml_like | st.text(max_size=40))
def test_no_text_raises_anything_but_a_rules_error(text: str) -> None:
    attempt(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(whole_files, st.data())
def test_no_value_in_any_place_raises_anything_but_a_rules_error(written: dict[str, Any], data: st.DataObject) -> None:
    place: Any = written
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(plain)
    attempt(yaml.safe_dump(written, allow_unicode=True))


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_but_a_rules_error(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.mktemp("rules") / "mine.yaml"
    path.write_bytes(content)
    with contextlib.suppress(RulesError):
        rules.load(path)
