"""Shapes of a graph that exists already: what a Rep network costs is known without capturing it again.

Tracing the network that `surgery.apply` made would lose the names and module paths of its nodes, by which a comparison
matches them with the source network's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from repbnn_cli.graph import KeptGraphModule, Network
from repbnn_cli.graph.probe import ConvCalls, facts
from repbnn_cli.graph.tracer import execute, fetch, filled, hollow, known_shape, on_meta
from repbnn_cli.plan import Plan
from repbnn_cli.recognize import CONVOLUTIONS, Layer
from repbnn_cli.restoring import unchanged


def rep_network(plan: Plan, rep: KeptGraphModule) -> tuple[Network, dict[str, Layer]]:
    """The Rep network of a plan with a shape for every node, and its layers: what `profiler.profile` takes.

    rep: what `surgery.apply` gave for `plan`; only the `meta` of its nodes is written.
    """
    layers = dict(plan.layers)
    for edit in plan.edits:
        layer = layers.get(edit.path)
        if layer is not None and layer.role in CONVOLUTIONS and edit.channels is not None:
            layers[edit.path] = edit.resized(layer)
    for path in plan.added:
        layers[path] = Layer(path, "weightless", "added by the transform")
    nodes = {node.name: node for node in rep.graph.nodes}
    for source in plan.network.graph.nodes:  # how many bits values have follows from no shape
        if (seen := source.meta.keys() & {"bits", "binarises"}) and (step := plan.steps.get(source.name)) is not None:
            nodes[step.node].meta |= {key: source.meta[key] for key in seen}
    return propagate(rep, plan.network.example), layers


def propagate(module: KeptGraphModule, example: tuple[tuple[int, ...], ...]) -> Network:
    """Gives every node of an existing graph its `meta["value"]`, as `graph.capture(..., shapes_only=True)` would.

    example: input shapes, batch included. Convolutions of torch's and of this package do not run; other modules see
    zeros. The module is left as it was.
    """
    like = next(iter(module.parameters()), torch.zeros(()))
    inputs = iter(like.new_zeros(()).expand(shape) for shape in example)
    values: dict[fx.Node, Any] = {}
    with unchanged(module, parameters=False), torch.no_grad():
        for node in module.graph.nodes:
            value = next(inputs) if node.op == "placeholder" else _value(module, node, values)
            node.meta["value"] = on_meta(value)
            values[node] = hollow(value)
    return Network(module, example)


def _value(root: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    if node.op == "output":
        return args[0]
    try:
        return _execute(root, node, args, kwargs)
    except RuntimeError:  # in-place operators need a tensor with memory of its own
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: filled(values[n]))
        return _execute(root, node, args, kwargs)


def _execute(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op != "call_module":
        return execute(root, node, args, kwargs)
    module = fetch(root, str(node.target))
    known = known_shape(module, args)
    if known is not None:
        return known
    with ConvCalls() as seen:
        result = module(*args, **kwargs)
    node.meta["convs"] = [facts(c) for c in seen.calls if not c.kernel.is_meta]
    return result
