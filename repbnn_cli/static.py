"""What a forward computes from parameters alone, before any input comes in: kernels, scales, clamps.

Such tensors are sized by channels without having a batch; in a RepBNN they are computed anew from the tiled or folded
parameters that they come from (their roots).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.tracer import fetch


def static_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on no input of the network."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op not in ("placeholder", "output") and inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def roots(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that a static node is computed from, each once, in order of the graph."""
    seen: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        at = todo.pop()
        if at not in seen:
            seen[at] = None
            todo += at.all_input_nodes
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    found = [n for n in seen if n.op == "get_attr" and isinstance(n.meta["value"], Tensor)]
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
        if at not in values:
            args, kwargs = fx.map_arg((at.args, at.kwargs), value_of)
            if at.op == "get_attr":
                values[at] = held(str(at.target))
            elif at.op == "call_module":
                values[at] = fetch(module, str(at.target))(*args, **kwargs)
            elif at.op == "call_method":
                values[at] = getattr(args[0], str(at.target))(*args[1:], **kwargs)
            else:
                values[at] = at.target(*args, **kwargs)  # type: ignore[operator]
        return values[at]

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return value_of(node)
