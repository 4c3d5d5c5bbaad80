"""The reference of the rule language as Markdown, made from the models that validate rule files; pure text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repbnn_cli.rules.rule_models import schema

HEAD = """# Keys of a rule file

Generated from the models that validate rule files (`repbnn_cli/rules/rule_models.py`); a test compares the two.
To write it again:

    python -c "from repbnn_cli.rules import rule_reference as r; print(r.reference(), end='')" > docs/rule-reference.md

[The rule language](../rules/README.md) explains selectors, precedence and actions, with examples.
"""
# Where each model's keys stand in a file.
PLACES = {
    "RuleFile": "the file",
    "Options": "options",
    "RuleEntry": "rules.NAME",
    "Match": "rules.NAME.match",
    "ModuleEntry": "modules[]",
    "ModuleMatch": "modules[].match",
    "ChannelAxis": "modules[].per_channel.TENSOR",
}


def reference() -> str:
    """What docs/rule-reference.md holds."""
    body = schema()
    models = {"RuleFile": body, **body["$defs"]}
    missing = set(models) ^ set(PLACES)
    assert not missing, f"PLACES and the models differ by {sorted(missing)}"
    return HEAD + "".join(f"\n## {place}\n\n{_model(models[name])}" for name, place in PLACES.items())


def _model(model: Mapping[str, Any]) -> str:
    required = set(model.get("required", ()))
    lines = [model["description"], "", "| key | value | |", "| --- | --- | --- |"]
    for key, value in model["properties"].items():
        default = f" Default: `{_plain(value['default'])}`." if value.get("default") not in (None, "", []) else ""
        must = " Required." if key in required else ""
        lines.append(f"| `{key}` | {_kind(value)} | {value.get('description', '')}{must}{default} |")
    return "\n".join(lines) + "\n"


def _kind(value: Mapping[str, Any]) -> str:
    """What may stand there, in words."""
    if "$ref" in value:
        return f"see `{PLACES[value['$ref'].rpartition('/')[2]]}`"
    if "anyOf" in value:
        one, many = value["anyOf"]
        assert many["items"] == one, "the only alternatives of this language are a value and a list of such"
        return f"{_kind(one)}; or a list of such"
    if "enum" in value:
        return ", ".join(f"`{_plain(v)}`" for v in value["enum"])
    if "const" in value:
        return f"`{_plain(value['const'])}`"
    if value.get("type") == "array":
        return "a list of: " + _kind(value["items"])
    if value.get("type") == "object":
        named: Mapping[str, Any] = value.get("patternProperties", {})
        return "a mapping to: " + _kind(value.get("additionalProperties") or next(iter(named.values())))
    return _scalar(value)


def _scalar(value: Mapping[str, Any]) -> str:
    kinds = value.get("type", "text")
    words = {"string": "text", "integer": "whole number", "boolean": "`true` or `false`"}
    text = " or ".join(words.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds))
    if "minimum" in value and "maximum" in value:
        return f"{text}, {value['minimum']} to {value['maximum']}"
    return text


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
