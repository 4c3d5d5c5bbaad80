"""Channel maps, recipes and edits in words: what an expanded channel stands for, what a tensor was made from.

A map is given by its shortest true description: `j mod C` where it is that, else its runs. Shape letters as in
`inherit`: O, I channels of the source convolution, b = β.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from repbnn_cli.channels import Compact, Folded, State, Tiled
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.inherit import Columns, Kernel, Mean, Members, Recipe, Tile, runs
from repbnn_cli.number_text import compact_shape
from repbnn_cli.plan import ModuleEdit

_MOST_RUNS = 6


@dataclass(frozen=True)
class ChannelMap:
    """The channels of one tensor. before, after: its shape without batch in source and Rep network.

    index: source channel of every channel that the tensor has in the Rep network (before its repeat, of `after`, where
    that is still to come); None where each is itself.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    text: str
    index: tuple[int, ...] | None = None


def channel_map(state: State, shape: tuple[int, ...], axis: int = 0) -> ChannelMap:
    """What a tensor's channels stand for; shape: the source tensor's, without batch; axis: of the channels in it."""
    if state is None:
        return ChannelMap(shape, shape, "not expanded: the source network's channels as they are")
    if isinstance(state, Folded):
        return ChannelMap(
            shape, shape, "expanded, each replica as a sample of its own (N·β of them), laid out as in the source",
        )  # fmt: skip
    if isinstance(state, Compact):
        total = state.channels * state.repeats
        text = f"{state.channels} convolution channels before their repeat"
        text += f"; repeated {state.repeats}×, channel j of {total}"
        if state.channels != state.source:
            text += f" is convolution channel j mod {state.channels} and"
        text += f" stands for source channel j mod {state.source}"
        return ChannelMap(shape, (state.channels, *shape[1:]), text, state.index)
    after = (*shape[:axis], len(state.index), *shape[axis + 1 :])
    return ChannelMap(shape, after, tiled_text(state), state.index)


def tiled_text(state: Tiled) -> str:
    """For an expanded tensor."""
    if state.plain:
        return f"expanded channel j of {len(state.index)} stands for source channel j mod {state.source}"
    return f"expanded channels stand for source channels: {runs_text(state.index)}"


def runs_text(index: tuple[int, ...]) -> str:
    """ "0–15 ← 0–15, 16–31 ← 0–15, ..." """
    stretches = runs(index)
    texts = [f"{span(a, b)} ← {span(index[a], index[a] + b - a)}" for a, b in stretches[:_MOST_RUNS]]
    more = f", … ({len(stretches)} runs in all)" if len(stretches) > _MOST_RUNS else ""
    return ", ".join(texts) + more


def span(start: int, stop: int) -> str:
    """Of [start, stop)."""
    return str(start) if stop == start + 1 else f"{start}–{stop - 1}"


def made_from(recipe: Recipe) -> str:
    """What a tensor of the Rep network holds, in terms of the source network's tensor of that name."""
    if isinstance(recipe, Kernel):
        return _kernel(recipe)
    if isinstance(recipe, Mean):
        return f"entry o is the mean of the source's entries {_shared(recipe.members)}"
    if isinstance(recipe, Tile):
        size = max(recipe.index) + 1
        if all(i == j % size for j, i in enumerate(recipe.index)):
            return f"entry j is the source's entry j mod {size}"
        return f"entries from the source's: {runs_text(recipe.index)}"
    return _columns(recipe) if recipe.axis == 1 else _columns(recipe).replace("column", "row")


def _shared(members: Members) -> str:
    """Which source filters a channel o holds."""
    per = members.out_channels // members.groups // members.beta
    if members.inherit == "reshape":
        first, rest = f"{members.beta}·o", [f"{members.beta}·o + {r}" for r in range(1, members.beta)]
    else:
        first, rest = "o", [f"o + {per * r}" for r in range(1, members.beta)]
    listed = [first, *rest] if len(rest) < 4 else [first, rest[0], "…", rest[-1]]
    within = f" within each of {members.groups} groups" if members.groups > 1 else ""
    return ", ".join(listed) + within


def _kernel(recipe: Kernel) -> str:
    members = recipe.members
    filters = f"filter o is made from the source's filters {_shared(members)}, one for each replica of its inputs"
    count = recipe.shape[1]
    if all(c == j % count for j, c in enumerate(recipe.column)):
        inputs = f"input j has that filter's column j mod {count}"
    else:
        inputs = f"inputs have that filter's columns {runs_text(recipe.column)}"
    how = {"fold": "fold: the filters that the repeat maps to channel o", "reshape": "reshape, in memory order"}
    stored = "; stored inputs first" if recipe.inputs_first else ""
    return f"{filters}; {inputs} ({how[members.inherit]}{stored})"


def _columns(recipe: Columns) -> str:
    width = len(recipe.groups[0])
    if width > 1:
        step = recipe.groups[0][1] - recipe.groups[0][0]
        if recipe.groups == tuple(tuple(j + step * s for s in range(width)) for j in range(len(recipe.groups))):
            columns = ", ".join(["j", *(f"j + {step * s}" for s in range(1, width))])
            return f"column j of {len(recipe.groups)} is the sum of the source's columns {columns}"
        first = " + ".join(map(str, recipe.groups[0]))
        return f"{len(recipe.groups)} columns, each the sum of {width} of the source's (the first of {first})"
    index = tuple(g[0] for g in recipe.groups)
    size = max(index) + 1
    scale = ""
    if recipe.scale != 1:
        scale = f", divided by {round(1 / recipe.scale)}: the replicas of a feature add up to it"
    if all(i == j % size for j, i in enumerate(index)):
        mod = f" mod {size}" if len(index) > size else ""
        return f"column j of {len(index)} is the source's column j{mod}{scale}"
    return f"columns from the source's: {runs_text(index)}{scale}"


# What an edit does: in a sentence, and as a remark beside a module's name.
_COPIES = ("{beta} times as many channels; {start}", "{sizes}")
_EDITS = {
    "repeat_output": (
        "its kernel stays; its output is repeated β = {beta} times along the channels, so that all behind it sees "
        "{beta} copies of each",
        "output repeated {beta}×",
    ),
    "rep_conv": (
        "becomes a RepConv{kernel}: input channels ×{beta}, output channels ÷{beta}, as many weights and "
        "multiply-accumulates as before; its output is repeated β² = {squared} times",
        "RepConv, {sizes}",
    ),
    "rep_batch_norm": (
        "takes the repeat over: normalises each distinct channel once and gives every copy a scale and a shift of its "
        "own",
        "takes the repeat over, {sizes}",
    ),
    "batch_norm": _COPIES,
    "per_channel": _COPIES,
    "parameter": ("a tensor that a forward uses directly gets the size that its use needs", "{sizes}"),
    "depthwise": (
        "mixes no channels: each of the {beta} copies of a channel gets a copy of its filter",
        "filters copied, {sizes}",
    ),
    "per_replica": ("keeps its tensors and is applied to each of the {beta} replicas alone", "applied to each replica"),
    "first_replica": ("ends the expansion: takes one of the {beta} replicas and stays as it is", "unchanged"),
    "select_inputs": ("ends the expansion: takes {features} features and gives as many outputs as before", "{sizes}"),
}
_BEFORE_THE_REPEAT = (
    "stands before the repeat: one entry for each convolution channel; {start}",
    "before the repeat, {sizes}",
)


def what_happens(edit: ModuleEdit, beta: int, *, general: bool = False, brief: bool = False) -> str:
    """An edit in a sentence; general: of all modules treated alike; brief: as a remark beside its name."""
    texts = _EDITS[edit.action]
    start = "each copy starts from the source channel's values"
    if texts is _COPIES and any(isinstance(recipe, Mean) for _, recipe in edit.tensors):
        texts, start = _BEFORE_THE_REPEAT, "the mean of those that share it"
    return texts[brief].format(
        beta=beta,
        squared=beta * beta,
        start="a fresh start (inherit: none)" if edit.reset else start,
        sizes=f"{compact_shape(edit.before)} → {compact_shape(edit.after)}",
        kernel="" if general else f" with the kernel {compact_shape(edit.after)}",
        features="the expanded" if general or edit.channels is None else edit.channels[0],
    )


def tensor_names(root: nn.Module, path: str) -> set[str]:
    """Names of the tensors that a module holds, so that a tensor's path leads to its module."""
    module = fetch(root, path)
    return {n for n, _ in (*module.named_parameters(), *module.named_buffers())}
