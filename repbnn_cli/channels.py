"""Which source channel every expanded channel stands for, and how each operator carries that map.

A tensor E of the Rep network that was expanded satisfies, right after the transform, E = S[:, index] for the tensor S
of the source network in its place. Four forms of a tensor occur:

* not expanded (state None): E = S;
* `Compact`: a convolution's output before its repeat, E.repeat = S[:, index] with index j ↦ j mod C;
* `Tiled`: the expanded tensor itself, with its index; [A A B B] after a concatenation of [A A] and [B B];
* `Folded`: (N, β·C, ...) viewed as (N·β, C, ...). An operation without parameters then sees the source's shapes and
  acts on each replica alone, whatever it does to channels: padding, slicing, shuffling, views with constant sizes.

Operators that are in none of the tables below are tested (`trials`); what fails is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from repbnn_cli.graph.interception import FunctionCall
from repbnn_cli.graph.proxies import INPLACE, is_write
from repbnn_cli.inherit import Members


@dataclass(frozen=True)
class Compact:
    """(N, channels, ...) that still has to be repeated `repeats` times; stands for `source` = C source channels.

    batch_norm: "before_batch_norm" when the repeat comes before the BatchNorm, "after_batch_norm" otherwise.
    members: for a RepConv, which originals share a channel (None behind a first layer, whose channels are all there).
    """

    channels: int
    repeats: int
    source: int
    batch_norm: str
    members: Members | None = None

    @property
    def index(self) -> tuple[int, ...]:
        return tuple(j % self.source for j in range(self.channels * self.repeats))


@dataclass(frozen=True)
class Tiled:
    """(N, len(index), ...): channel j stands for source channel index[j] of `source`."""

    index: tuple[int, ...]
    source: int

    @property
    def plain(self) -> bool:
        return all(i == j % self.source for j, i in enumerate(self.index))

    @property
    def first(self) -> tuple[int, ...]:
        """For each source channel, the first channel that stands for it."""
        return tuple(self.index.index(c) for c in range(self.source))

    @property
    def replica(self) -> tuple[int, ...]:
        """For each channel, how many channels before it stand for the same source channel."""
        seen: dict[int, int] = {}
        return tuple(seen.update({i: seen.get(i, -1) + 1}) or seen[i] for i in self.index)


@dataclass(frozen=True)
class Folded:
    """(N·β, C, ...): the replicas as samples. reduced: the channels were reduced to one value, or to none."""

    reduced: bool = False


State = Compact | Tiled | Folded | None


# Take dtype and device from a tensor, and nothing else.
NEW_TENSORS = ("new", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


def plain(source: int, beta: int) -> Tiled:
    """[A A ... A]: β replicas of `source` channels."""
    return Tiled(tuple(range(source)) * beta, source)


def concatenated(states: list[Tiled]) -> Tiled:
    """[A A B B]: the maps one after the other, the sources side by side."""
    index: list[int] = []
    offset = 0
    for state in states:
        index += [offset + i for i in state.index]
        offset += state.source
    return Tiled(tuple(index), offset)


def flattened(state: Tiled, size: int) -> Tiled:
    """(N, C, *rest) → (N, C·size), size = number of positions: each channel becomes `size` features."""
    return Tiled(tuple(i * size + s for i in state.index for s in range(size)), state.source * size)


def permutation(have: Tiled, want: Tiled) -> tuple[int, ...] | None:
    """p such that x[:, p] has the map `want`, or None when the two hold different channels."""
    if sorted(have.index) != sorted(want.index):
        return None
    position = {(i, r): j for j, (i, r) in enumerate(zip(have.index, have.replica, strict=True))}
    return tuple(position[key] for key in zip(want.index, want.replica, strict=True))


def grouped(state: Tiled, groups: int) -> Tiled:
    """The map in which each group of a grouped convolution has all replicas of its own channels side by side."""
    per = state.source // groups
    copies = len(state.index) // state.source
    return Tiled(tuple(g * per + c for g in range(groups) for _ in range(copies) for c in range(per)), state.source)


# ---------------------------------------------------------------------------------------------------------------------
# Operators by what they do to channels (axis 1)

# Element by element: every tensor operand has the same map, or no channel axis.
POINTWISE = frozenset((
    "add", "sub", "mul", "div", "truediv", "floordiv", "pow", "neg", "abs", "relu", "relu6", "hardtanh", "clamp",
    "clip", "clamp_min", "clamp_max", "sigmoid", "tanh", "sign", "sgn", "leaky_relu", "elu", "selu", "celu", "gelu",
    "silu", "mish", "hardswish", "hardsigmoid", "softplus", "softsign", "threshold", "exp", "log", "sqrt", "rsqrt",
    "square", "reciprocal", "sin", "cos", "erf", "round", "floor", "ceil", "where", "maximum", "minimum", "eq", "ne",
    "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "lerp", "addcmul", "addcdiv", "float",
    "double", "half", "to", "type", "type_as", "clone", "contiguous", "detach", "identity", "rsub",
    "masked_fill", "nan_to_num", "heaviside", "isnan", "and", "or", "xor", "invert", "bool", "int", "long",
    "zeros_like", "ones_like", "full_like", "empty_like", "requires_grad", "mod", "remainder", "fmod",
))  # fmt: skip
# Over the spatial axes, each channel alone.
SPATIAL = frozenset((
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "lp_pool2d", "interpolate", "upsample", "boolean_dispatch",
))  # fmt: skip
# Random per element: copies must be drawn apart, so the repeat comes first.
RANDOM = frozenset((
    "dropout", "alpha_dropout", "dropout2d", "feature_dropout", "bernoulli", "rrelu", "rand_like", "randn_like",
    "uniform", "normal",
))  # fmt: skip
REDUCE = frozenset((
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm", "logsumexp", "prod", "any", "all",
))  # fmt: skip
# Element by element between two tensors, and the mean of that.
LOSSES = frozenset(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"))
# Without parameters, whatever it does to channels: applied to each replica (`Folded`).
FOLDABLE = frozenset((
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "t", "chunk", "split",
    "tensor_split", "narrow", "select", "getitem", "pad", "stack", "roll", "flip", "channel_shuffle", "pixel_shuffle",
    "pixel_unshuffle", "unsqueeze", "squeeze", "softmax", "log_softmax", "index_select", "expand",
    "expand_as", "repeat", "unbind", "unfold", "normalize", "view_as", "reshape_as", "cumsum", "sort",
    "topk", "argmax", "gather", "matmul", "bmm",
))  # fmt: skip
# What gives a part of its tensor, in the same memory, and what may give the tensor itself.
PARTS = frozenset((
    "getitem", "narrow", "select", "chunk", "split", "tensor_split", "unbind", "view", "reshape", "flatten",
    "unflatten", "permute", "transpose", "swapaxes", "movedim", "t", "unsqueeze", "squeeze", "diagonal",
))  # fmt: skip
_ITSELF = frozenset(
    ("contiguous", "detach", "to", "type", "type_as", "float", "identity", "requires_grad", "expand_as")
)
_SPATIAL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.LPPool2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d,
)  # fmt: skip
_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Threshold, nn.Identity,
)  # fmt: skip
_RANDOM_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.RReLU)


def operator_name(node: fx.Node) -> str:
    """The bare name of what a call_function or call_method node does: add for operator.iadd, relu for relu_."""
    target: Any = node.target
    if node.op == "call_method":
        name = str(target)
    elif isinstance(target, FunctionCall):
        return f"{target.__name__}.apply"
    else:
        known = getattr(target, "__module__", None) or ""
        name = getattr(target, "__name__", str(target))
        if not known.startswith(("torch", "_operator", "operator", "math", "builtins")) and known:
            return f"{known}.{name}"
    stripped = name.rstrip("_") if not name.startswith("_") else name
    return stripped[1:] if name in INPLACE else stripped


def kind_of_module(module: nn.Module) -> str:
    """ "pointwise", "spatial", "random", "flatten" for torch's own layers without parameters, else "opaque"."""
    if isinstance(module, nn.PReLU):
        return "pointwise"
    for kind, types in (("spatial", _SPATIAL_MODULES), ("random", _RANDOM_MODULES), ("pointwise", _POINTWISE_MODULES)):
        if type(module) in types:
            return kind
    return "flatten" if type(module) is nn.Flatten else "opaque"


def kind_of_call(node: fx.Node) -> str:
    """The table that a function or method is in, looking at its arguments where that decides; else "opaque".

    "total": the mean over everything, which all replicas together have, too. "samples": a choice of samples, by their
    numbers. "rows": parts of axis 0, whatever lies along it.
    """
    name = operator_name(node)
    args = node.args
    x = args[0].meta["value"] if args and isinstance(args[0], fx.Node) else None
    ndim = x.ndim if isinstance(x, Tensor) else 0
    if name in RANDOM:
        return "random"
    if name in REDUCE:
        dims = _dims(node, ndim)
        if dims is None and name == "mean":
            return "total"
        return "spatial" if dims is not None and not {0, 1} & dims else ("fold" if dims and 0 not in dims else "opaque")
    if name in LOSSES and node.kwargs.get("reduction", "mean") == "mean":
        return "total"
    if name == "pad" and len(args) > 1 and len(args[1]) <= 2 * (ndim - 2):  # type: ignore[arg-type]
        return "spatial"
    if name in ("getitem", "index_select") and _picks_samples(node):
        return "samples"
    if ndim > 1 and _parts_of_rows(node, name, ndim):
        return "rows"
    if name == "getitem" and isinstance(args[1], tuple) and all(s == slice(None) for s in args[1][:2]):
        return "spatial" if len(args[1]) > 2 and all(isinstance(s, slice) for s in args[1]) else "fold"
    if name in ("cat", "concat", "concatenate"):
        return "concatenate"
    if name in POINTWISE:
        return "pointwise"
    if name in SPATIAL:
        return "spatial"
    return "fold" if name in FOLDABLE else "opaque"


def _picks_samples(node: fx.Node) -> bool:
    """`x[order]`, `x.index_select(0, order)`: samples by their numbers, whatever they hold."""
    *between, index = node.args[1:]
    numbers = index.meta["value"] if isinstance(index, fx.Node) else None
    return isinstance(numbers, Tensor) and numbers.ndim == 1 and between in ([], [0])


def _parts_of_rows(node: fx.Node, name: str, ndim: int) -> bool:
    """`x[:n]`, `x.chunk(2)`, `x.narrow(0, 0, n)`: of a batch that holds several images for each sample, say."""
    if name == "getitem":
        given: Any = node.args[1]
        first, *others = given if isinstance(given, tuple) else (given,)
        return isinstance(first, slice) and first != slice(None) and all(s == slice(None) for s in others)
    at, default = {"chunk": (2, 0), "split": (2, 0), "tensor_split": (2, 0), "narrow": (1, None)}.get(name, (0, None))
    dim: Any = node.kwargs.get("dim", node.args[at] if 0 < at < len(node.args) else default)
    return isinstance(dim, int) and dim % ndim == 0


def _dims(node: fx.Node, ndim: int) -> set[int] | None:
    """The axes that a reduction reduces, non-negative; None when it reduces all of them."""
    dims: Any = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else None))
    if operator_name(node) == "norm":
        dims = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
    if isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, tuple | list) or not all(isinstance(d, int) for d in dims):
        return None
    return {d % ndim for d in dims} if ndim else None


def shares_memory(node: fx.Node, names: frozenset[str] = PARTS | _ITSELF) -> bool:
    """Whether a node gives its first operand, or a part of it: by an operator of these, or by writing to it."""
    return node.op in ("call_function", "call_method") and (operator_name(node) in names or is_write(node))


def memory_of(value: Any) -> Iterator[fx.Node]:
    """A node, then what it is a part of: of `x[:, 4:]` itself and x."""
    while isinstance(value, fx.Node):
        yield value
        value = value.args[0] if shares_memory(value) else None


def takes_rows(node: fx.Node) -> bool:
    """Whether a part, or an item that is set, is one of axis 0: `x[0]`, `x[:n]`, `x[numbers]`, `x.select(0, 0)`."""
    of: Any = node.args[0]
    if not isinstance(of.meta["value"], Tensor):  # one of several parts
        return False
    ndim = of.meta["value"].ndim
    if operator_name(node) in ("getitem", "setitem"):
        given: Any = node.args[1]
        first = given[0] if isinstance(given, tuple) and given else given
        mask = isinstance(first, fx.Node) and isinstance(v := first.meta["value"], Tensor) and v.dtype == torch.bool
        return not (mask or first is Ellipsis or (isinstance(first, slice) and first == slice(None)))
    if operator_name(node) in ("select", "unbind"):
        dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return isinstance(dim, int) and dim % ndim == 0
    return _parts_of_rows(node, operator_name(node), ndim)


def reduces_channels(node: fx.Node) -> bool:
    """Whether a node that is carried by `Folded` reduces axis 1."""
    x = node.args[0].meta["value"] if node.args and isinstance(node.args[0], fx.Node) else None
    dims = _dims(node, x.ndim) if isinstance(x, Tensor) and node.op != "call_module" else None
    return operator_name(node) in REDUCE and dims is not None and 1 in dims


def makes_container(node: fx.Node) -> bool:
    """Whether a node makes a namedtuple or dataclass of its arguments."""
    kind = node.target
    fields = hasattr(kind, "_fields") or hasattr(kind, "__dataclass_fields__")
    return node.op == "call_function" and isinstance(kind, type) and fields


def is_flatten(before: Tensor, after: Tensor) -> bool:
    """(N, C, *rest) → (N, C·rest): what classifiers do, in any spelling, `view(-1, 1024)` included."""
    return (
        before.ndim > 2
        and after.ndim == 2
        and after.shape[0] == before.shape[0]
        and after.shape[1] == math.prod(before.shape[1:])
    )


def is_patches(node: fx.Node, before: Tensor, after: Tensor, module: nn.Module | None) -> bool:
    """F.unfold of images, (N, C, H, W) → (N, C·k·k, L): each channel becomes k·k of them, as in a flatten."""
    unfolds = node.target is F.unfold or isinstance(module, nn.Unfold)
    return unfolds and before.ndim == 4 and after.ndim == 3


def adds_trailing_ones(before: Tensor, after: Tensor) -> bool:
    """(N, C) → (N, C, 1, 1) and (N, C, 1, 1) → (N, C): the reshapes around a gate."""
    long, short = (after, before) if after.ndim > before.ndim else (before, after)
    return (
        short.ndim >= 2
        and tuple(long.shape[: short.ndim]) == tuple(short.shape)
        and all(n == 1 for n in long.shape[short.ndim :])
        and long.ndim > short.ndim
    )
