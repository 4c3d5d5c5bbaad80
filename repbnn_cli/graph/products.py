"""Products with a parameter, as the layer that they are: `x @ w` is a linear layer, `w @ x` a convolution of size 1.

Research code writes its layers as `torch.mm(sign(x), sign(self.weight).t())`, or as a product with `F.unfold(x, 3)`.
The tracer records such calls as F.linear and F.conv1d, which rules, plans and profiles know.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_FUNCTIONS: dict[Any, str] = {
    torch.mm: "product", torch.matmul: "product", operator.matmul: "product", torch.addmm: "sum",
    "mm": "product", "matmul": "product", "addmm": "sum",
}  # fmt: skip

_MULTIPLIES = ("matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__")


@dataclass(frozen=True)
class Product:
    """kind: "linear" for (N, ..., I) → (N, ..., O), "conv1d" for (N, I, L) → (N, O, L).

    weight: what the kernel is made from: a node with (O, I), or, where `inputs_first`, with (I, O).
    """

    kind: str
    x: fx.Node
    weight: fx.Node
    inputs_first: bool = False
    bias: fx.Node | None = None


def factors(node: fx.Node) -> list[fx.Node]:
    """The two tensors that a node multiplies as matrices; [] for other nodes. `torch.baddbmm` adds a first one."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    multiplies = node.op in ("call_function", "call_method") and name in _MULTIPLIES
    return [a for a in node.args if isinstance(a, fx.Node)][-2:] if multiplies else []


def find(target: Any, args: Any, kwargs: Any, values: Mapping[fx.Node, Any], fixed: Set[fx.Node]) -> Product | None:
    """The layer that a call is, if it multiplies by what is computed from parameters alone.

    values: what each node comes to on the example; fixed: the nodes that depend on parameters and buffers alone.
    """
    try:
        form = _FUNCTIONS.get(target)
    except TypeError:  # a target that cannot be hashed
        return None
    nodes = [a for a in args if isinstance(a, fx.Node)]
    if form is None or kwargs or len(nodes) != len(args) or len(args) != (3 if form == "sum" else 2):
        return None
    *bias, left, right = nodes
    shapes = [values[n].ndim if isinstance(values[n], Tensor) else 0 for n in nodes]
    if bias and (shapes[0] != 1 or bias[0] not in fixed):
        return None
    if left not in fixed and right in fixed and shapes[-2] >= 2 == shapes[-1]:
        stored = _transposed(right)
        return Product("linear", left, stored or right, stored is None, bias[0] if bias else None)
    if left in fixed and right not in fixed and not bias and shapes == [2, 3] and _holds_patches(right, values):
        return Product("conv1d", right, left)
    return None


def _holds_patches(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether axis 1 of a tensor (N, C·k·k, L) holds channels: it comes, value by value, from `F.unfold` of images.

    Elsewhere it may hold the tokens of a transformer, which no rule about channels is meant for.
    """
    while node.op in ("call_function", "call_method", "call_module"):
        sources = [n for n in node.all_input_nodes if isinstance(values[n], Tensor)]
        if len(sources) != 1:
            return False
        before, after = values[sources[0]], values[node]
        if (node.op == "call_module" or node.target is F.unfold) and before.ndim == 4 and after.ndim == 3:
            return bool(after.shape[1] % before.shape[1] == 0)
        if before.shape != after.shape:
            return False
        node = sources[0]
    return False


def _transposed(node: fx.Node) -> fx.Node | None:
    """What a matrix is the transpose of: `w` of `w.t()`, `w.T`, `w.transpose(0, 1)`."""
    if node.op not in ("call_method", "call_function") or not node.args or node.kwargs:
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    stored, *given = node.args
    if name == "getattr":
        swaps = given in (["T"], ["mT"])
    elif name in ("transpose", "swapaxes"):
        swaps = [_axis(a) for a in given] in ([0, 1], [1, 0])
    elif name == "permute":
        axes = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
        swaps = [_axis(a) for a in axes] == [1, 0]
    else:
        swaps = name == "t"
    return stored if swaps and isinstance(stored, fx.Node) else None


def _axis(given: Any) -> Any:
    """Of a matrix, from 0."""
    return given % 2 if isinstance(given, int) else given
