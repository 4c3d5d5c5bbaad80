"""What a rule file may say: its keys, their values and defaults, as pydantic models; the JSON Schema comes from them.

The models hold one file as it was written, so nothing but `match` is required: a file may extend another one.
`rules` puts the files of a chain together and checks what only the whole can show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

Part = Literal["first_layer", "backbone", "bypass", "last_layer"]
Role = Literal[
    "binary_conv",
    "float_conv",
    "depthwise_conv",
    "binary_linear",
    "float_linear",
    "batch_norm",
    "per_channel",
    "weightless",
]
Position = Literal["first", "trunk", "bypass", "last"]
Action = Literal["repeat_output", "rep_conv", "tile", "select_inputs", "keep"]
Repeat = Literal["before_batch_norm", "after_batch_norm"]
Share = Literal["all", "1_over_beta", "1_over_beta2"]
Align = Literal["replicas", "position"]
Inherit = Literal["fold", "reshape", "none"]
Cached = Literal["in_channels", "out_channels", "kernel_shape", "fan_in", "numel"]

CONVOLUTIONS = ("binary_conv", "float_conv", "depthwise_conv", "binary_linear", "float_linear")
_MIXING = ("repeat_output", "rep_conv", "select_inputs", "keep")
# What does not mix channels cannot become a RepConv. `tile` gives a depthwise convolution more filters and applies any
# other one to each replica as it is. Whatever is no convolution can end the expansion by taking one replica.
ACTIONS_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(CONVOLUTIONS, (*_MIXING, "tile")),
    **dict.fromkeys(("batch_norm", "per_channel"), ("tile", "keep")),
    "weightless": ("tile", "select_inputs", "keep"),
}
REPEATING = ("repeat_output", "rep_conv")

_ABSENT: Any = None  # default of a key that a file leaves to the file it extends; null itself is not a value


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected one line of printable text")
    return text


def _as_tuple(value: object) -> object:
    if value == ():
        raise ValueError("expected one value or a list of some")
    return value if isinstance(value, tuple) else (value,)


def _version(value: object) -> object:
    if type(value) is not int or value != 1:  # pydantic takes true and 1.0 for the literal 1
        raise ValueError("expected 1, the only version of this language")
    return value


def _with_channels(value: tuple[int | str, ...]) -> tuple[int | str, ...]:
    if len(value) < 2:
        raise ValueError("expected at least two entries, output and input channels")
    return value


def _dimension(value: object) -> int | str:
    """An entry of kernel_shape: a size, or the attribute that holds it."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31:
        return value
    if isinstance(value, str) and value.isprintable() and value:
        return value
    raise ValueError("expected a whole number, at least 1, or the name of an attribute that holds one")


def _one_or_more(item: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]})


def _tidy(schema: dict[str, Any]) -> None:
    """Takes `"default": null` and `[]` out of the JSON Schema: both stand for "not written" and are not accepted."""
    for entry in schema["properties"].values():
        if entry.get("default", 0) in (None, []):
            del entry["default"]


def _tidy_selector(schema: dict[str, Any]) -> None:
    _tidy(schema)
    schema["minProperties"] = 1


Text = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_one_line)]
Roles = Annotated[tuple[Role, ...], BeforeValidator(_as_tuple), _one_or_more({"enum": [*get_args(Role)]})]
Positions = Annotated[tuple[Position, ...], BeforeValidator(_as_tuple), _one_or_more({"enum": [*get_args(Position)]})]
Globs = Annotated[
    tuple[Text, ...],
    BeforeValidator(_as_tuple),
    _one_or_more({"type": "string", "minLength": 1, "maxLength": 300}),
]
Dimension = Annotated[
    int | str, PlainValidator(_dimension), WithJsonSchema({"type": ["integer", "string"], "minimum": 1})
]
RuleName = Annotated[str, Field(pattern=r"^[a-z0-9-]+$", max_length=100)]
Bits = Annotated[int, Field(ge=1, le=32)]
Factor = Annotated[int, Field(ge=1, le=65536)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, json_schema_extra=_tidy)


class ModuleMatch(_Model):
    """Which modules an entry means. Both keys have to hold; of several values one has to. `*` crosses dots."""

    model_config = ConfigDict(json_schema_extra=_tidy_selector)

    type: Globs = Field((), description="Globs over the class name or dotted class path, base classes included.")
    path: Globs = Field((), description="Globs over the dotted module path.")

    @model_validator(mode="after")
    def _not_empty(self) -> ModuleMatch:
        if not self.model_fields_set:
            raise ValueError(f"expected at least one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def rank(self) -> int:
        """How specific it is: 2 with a path, 1 with a type, 0 with role and position alone."""
        return 2 if self.path else 1 if self.type else 0

    def names(self, path: str, type_names: tuple[str, ...]) -> bool:
        """Whether the globs accept a module."""
        return (not self.path or any(fnmatchcase(path, glob) for glob in self.path)) and (
            not self.type or any(fnmatchcase(name, glob) for glob in self.type for name in type_names)
        )


class Match(ModuleMatch):
    """Which modules a rule claims. All keys have to hold; of several values of a key one has to. `*` crosses dots."""

    role: Roles = Field((), description="What the module is.")
    position: Positions = Field((), description="Where it stands; convolutions and linear layers have positions.")


class RuleEntry(_Model):
    """One rule. A rule needs `part`, `match` and `apply`, its own or inherited ones."""

    part: Part = Field(_ABSENT, description="The part of RepTran under which the plan lists it.")
    match: Match = Field(_ABSENT, description="Which modules it claims.")
    apply: Action = Field(_ABSENT, description="What becomes of them.")
    repeat: Repeat = Field(
        _ABSENT, description="For repeat_output and rep_conv: where the repeat comes; default before_batch_norm."
    )
    share: Share = Field(
        _ABSENT, description="For select_inputs: the share of the inputs it takes; default options.last_layer."
    )
    align: Align = Field(
        _ABSENT,
        description="For tile: what an operator with several inputs does when their replicas are ordered differently; "
        "replicas (default) reorders them, position takes channel by channel as they come.",
    )
    optional: bool = Field(False, description="May match nothing, and yields to a rule that is not optional.")


class ChannelAxis(_Model):
    """How a tensor is sized by channel."""

    channels: Literal["out", "in"] = Field(description="Whether it has one entry per output or per input channel.")
    axis: int = Field(ge=0, le=7, description="The axis along which they lie.")


class ModuleEntry(_Model):
    """What a module of the user's is; it overrides what repbnn would recognise."""

    match: ModuleMatch = Field(description="Which modules it describes.")
    role: Role = Field(_ABSENT, description="What they are.")
    kernel: Text = Field(_ABSENT, description="Dotted attribute of the kernel tensor; default weight.")
    kernel_shape: Annotated[tuple[Dimension, ...], AfterValidator(_with_channels)] = Field(
        _ABSENT,
        json_schema_extra={"minItems": 2},
        description="Out, in, and kernel sizes, as numbers or attributes; for kernels that are stored flat.",
    )
    per_channel: dict[Text, ChannelAxis] = Field(_ABSENT, description="Further tensors that are sized by channel.")
    attributes: dict[Text, Cached] = Field(_ABSENT, description="Numbers that the module keeps and that change.")
    weight_bits: Bits = Field(_ABSENT, description="Default: 1 for binary roles, else 32.")
    activation_bits: Bits = Field(_ABSENT, description="Default: what the module was seen to use; 1 for binary roles.")
    leaf: bool = Field(_ABSENT, description="true: keep whole, false: trace into; default: decided by its content.")
    optional: bool = Field(False, description="May match nothing, and yields to an entry that is not optional.")


class Options(_Model):
    """What holds for the whole transform; flags of the command line override it."""

    beta: Factor = Field(2, description="β: channels × β, repeat × β².")
    inherit: Inherit = Field("fold", description="How a trained kernel fills the RepConv's; none: like a new source.")
    last_layer: Share = Field("all", description="Ways 1, 2 and 3: the share of its inputs that the last layer takes.")


class RuleFile(_Model):
    """One rule file as it is written."""

    schema_: Annotated[Literal[1], BeforeValidator(_version)] = Field(
        1, alias="schema", description="Version of this language."
    )
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", max_length=100)] = Field(
        _ABSENT, description="Default: the file's name without its ending."
    )
    summary: Annotated[str, Field(max_length=300), AfterValidator(_one_line)] = Field("", description="One line.")
    extends: Text = Field(_ABSENT, description="A shipped rule file's name, or a path relative to this file.")
    remove: tuple[RuleName, ...] = Field((), description="Inherited rules to drop.")
    options: Options = Field(_ABSENT)
    rules: dict[RuleName, RuleEntry] = Field(_ABSENT, description="Name → rule.")
    modules: tuple[ModuleEntry, ...] = Field((), description="What the user's own modules are.")


def schema() -> dict[str, Any]:
    """The JSON Schema of a rule file, as published in rules/schema.json."""
    body = RuleFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body, "title": "repbnn rule file"}


def schema_text() -> str:
    """What rules/schema.json holds."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
