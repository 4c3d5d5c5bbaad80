"""What a forward computes from parameters alone, before any input comes in: kernels, scales, clamps.

Such tensors are sized by channels without having a batch; in a RepBNN they are computed anew from the tiled or folded
parameters that they come from (their roots).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli import seeds
from repbnn_cli.graph.tracer import execute, fetch, reached


def static_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on no input of the network, but for its dtype and device."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = value_inputs(node)
        computed = node.op not in ("placeholder", "output") and inputs and found.issuperset(inputs)
        if node.op == "get_attr" or computed or _is_kind(node):
            found.add(node)
    return found


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node depends on: not x of `x.dtype`, y of `x.to(y)`."""
    if _is_kind(node):
        return []
    casts = node.op == "call_method" and node.target in ("to", "type_as")
    return node.all_input_nodes[:1] if casts else node.all_input_nodes


def _is_kind(node: fx.Node) -> bool:
    """x.dtype, x.device: `torch.ones(1, 1, 3, 3, device=x.device)` is a constant."""
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("dtype", "device")


def _kind_of(node: fx.Node) -> Tensor:
    """A tensor of a node's dtype, and of its device, where that is a real one."""
    value = node.meta["value"]
    return torch.empty((), dtype=value.dtype, device="cpu" if value.is_meta else value.device)


def roots(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that a static node is computed from, each once, in order of the graph."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    found = [n for n in reached(node, value_inputs) if n.op == "get_attr" and isinstance(n.meta["value"], Tensor)]
    unique = {str(n.target): n for n in sorted(found, key=lambda n: order[n], reverse=True)}
    return sorted(unique.values(), key=lambda n: order[n])


def evaluate(module: nn.Module, node: fx.Node, replaced: Mapping[str, Tensor]) -> Any:
    """The value of a static node with some parameters replaced by others; nothing outside is written to."""
    values: dict[fx.Node, Any] = {}
    # Writes (`weight.data.clamp_()`) act on copies, one for each name however often it is read.
    copies: dict[str, Any] = {}

    def held(target: str) -> Any:
        if target not in copies:
            value = replaced.get(target, fetch(module, target))
            copies[target] = value.detach().clone() if isinstance(value, Tensor) else value
        return copies[target]

    def value_of(at: fx.Node) -> Any:
        if _is_kind(at):
            return at.meta["value"]
        if at not in values:
            of = value_inputs(at)
            args, kwargs = fx.map_arg((at.args, at.kwargs), lambda n: value_of(n) if n in of else _kind_of(n))
            values[at] = held(str(at.target)) if at.op == "get_attr" else execute(module, at, args, kwargs)
        return values[at]

    with torch.no_grad(), seeds.seeded(0):
        return value_of(node)
