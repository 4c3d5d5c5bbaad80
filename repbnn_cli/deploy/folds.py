"""A Rep network's graph with folds moved behind the elementwise work, so that blocks stay in one piece.

A transform runs operators that do something to channels on (N·β, C, ...) (see CONTRIBUTING, "Folding"), and the sum and
the activation behind such a bypass along with it:

    unfold(hardtanh(fold(BatchNorm(...)) + bypass))  =  hardtanh(BatchNorm(...) + unfold(bypass))

exactly, because elementwise operators do not care how channels are counted. The right side is a block that fuses.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from repbnn_cli.graph import KeptGraphModule, Network, bare
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.rep_layers import fold, unfold

_ELEMENTWISE = (operator.add, torch.add, F.hardtanh)


def behind_elementwise(network: Network) -> Network:
    """The same network with another graph: equal outputs, to the last bit. Modules and tensors are shared."""
    if not any(n.op == "call_function" and n.target is fold for n in network.graph.nodes):
        return network
    graph = _Pass(network).graph_of()
    module = KeptGraphModule(bare(network.module), graph, class_name=type(network.module).__name__)
    graph.lint()
    return Network(module, network.example, network.notes)


class _Pass:
    """plain: node of the new graph that holds a folded tensor → (the node that holds it unfolded, β)."""

    def __init__(self, network: Network) -> None:
        self.network, self.graph = network, fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.plain: dict[fx.Node, tuple[fx.Node, int]] = {}

    def graph_of(self) -> fx.Graph:
        for node in self.network.graph.nodes:
            self.new[node] = self._copy(node)
        for node in reversed(list(self.graph.nodes)):  # folds that nobody needs any more
            if not node.users and node.op == "call_function" and node.target in (fold, unfold):
                self.graph.erase_node(node)
        return self.graph

    def _copy(self, node: fx.Node) -> fx.Node:
        given = [self.new[n] for n in node.all_input_nodes]
        folded = [self.plain[n] for n in given if n in self.plain]
        if node.op == "call_function" and node.target is unfold and given[0] in self.plain:
            return self.plain[given[0]][0]
        if folded and self._is_elementwise(node) and len({beta for _, beta in folded}) == 1:
            return self._elementwise(node, folded[0][1])
        copied = self.graph.node_copy(node, lambda n: self.new[n])
        if node.op == "call_function" and node.target is fold and not node.kwargs:
            self.plain[copied] = (given[0], int(node.args[1]))  # type: ignore[arg-type]
        return copied

    def _is_elementwise(self, node: fx.Node) -> bool:
        """Sums of two tensors of one shape, hardtanh and identity, none of them in place."""
        if node.op == "call_module":
            module = fetch(self.network.module, str(node.target))
            return isinstance(module, nn.Identity) or (isinstance(module, nn.Hardtanh) and not module.inplace)
        shapes = {tuple(n.meta["value"].shape) for n in node.all_input_nodes if hasattr(n.meta["value"], "shape")}
        plain = node.op == "call_function" and node.target in _ELEMENTWISE and not node.kwargs.get("inplace")
        return plain and len(shapes) == 1

    def _elementwise(self, node: fx.Node, beta: int) -> fx.Node:
        """The operator on unfolded operands, and a fold of its result for those who still want that."""

        def operand(old: fx.Node) -> fx.Node:
            at = self.new[old]
            return self.plain[at][0] if at in self.plain else self._call(unfold, (at, beta), unfold(value(at), beta))

        def value(at: fx.Node) -> Any:
            return at.meta["value"]

        inner = self.graph.node_copy(node, operand)
        inner.meta["value"] = unfold(value(node), beta)
        folded = self._call(fold, (inner, beta), value(node))
        self.plain[folded] = (inner, beta)
        return folded

    def _call(self, function: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        node = self.graph.call_function(function, args)
        node.meta["value"] = value
        return node
