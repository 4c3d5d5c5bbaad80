"""A Rep network's graph with folds moved behind the elementwise work, so that blocks stay in one piece.

A transform runs operators that do something to channels on (N·β, C, ...) (see CONTRIBUTING, "Folding"), and the sum and
the activation behind such a bypass along with it:

    unfold(hardtanh(fold(BatchNorm(...)) + bypass))  =  hardtanh(BatchNorm(...) + unfold(bypass))

exactly, because elementwise operators do not care how channels are counted. The right side is a block that fuses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repbnn_cli.deploy.match import is_hardtanh, is_hooked
from repbnn_cli.deploy.writes import Writes
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
    """plain: node of the new graph that holds a folded tensor → (the node that holds it unfolded, how it is folded: β,
    and the number of samples where each has several rows)."""

    def __init__(self, network: Network) -> None:
        self.network, self.graph = network, fx.Graph()
        self.writes = Writes(network)
        self.new: dict[fx.Node, fx.Node] = {}
        self.plain: dict[fx.Node, tuple[fx.Node, tuple[Any, ...]]] = {}

    def graph_of(self) -> fx.Graph:
        for node in self.network.graph.nodes:
            self.new[node] = self._copy(node)
        for node in reversed(list(self.graph.nodes)):  # folds that nobody needs any more
            if not node.users and node.op == "call_function" and node.target in (fold, unfold):
                self.graph.erase_node(node)
        return self.graph

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.op == "call_function" and node.target in (fold, unfold) and not node.kwargs:
            given: tuple[Any, ...] = fx.map_arg(node.args, lambda n: self.new[n])
            x, how = given[0], given[1:]
            if node.target is unfold and x in self.plain and self.plain[x][1] == how:
                return self.plain[x][0]
            copied = self.graph.node_copy(node, lambda n: self.new[n])
            if node.target is fold and not self.writes.ever(node):
                self.plain[copied] = (x, how)
            return copied
        ways = {self.plain[at][1] for n in node.all_input_nodes if (at := self.new[n]) in self.plain}
        if len(ways) == 1 and self._is_elementwise(node) and not self.writes.ever(node):
            return self._elementwise(node, *ways)
        return self.graph.node_copy(node, lambda n: self.new[n])

    def _is_elementwise(self, node: fx.Node) -> bool:
        """Sums of two tensors of one shape, hardtanh and identity."""
        if node.op == "call_module":
            module = fetch(self.network.module, str(node.target))
            return not is_hooked(module) and (type(module) is nn.Identity or is_hardtanh(module))
        shapes = {tuple(n.meta["value"].shape) for n in node.all_input_nodes if hasattr(n.meta["value"], "shape")}
        return node.op == "call_function" and node.target in _ELEMENTWISE and len(shapes) == 1

    def _elementwise(self, node: fx.Node, how: tuple[Any, ...]) -> fx.Node:
        """The operator on unfolded operands, and a fold of its result for those who still want that."""

        def operand(old: fx.Node) -> fx.Node:
            at = self.new[old]
            return self.plain[at][0] if at in self.plain else self._call(unfold, at, how)

        inner = self.graph.node_copy(node, operand)
        inner.meta["value"] = unfold(node.meta["value"], *_values(how))
        folded = self._call(fold, inner, how)
        self.plain[folded] = (inner, how)
        return folded

    def _call(self, function: Callable[..., Tensor], x: fx.Node, how: tuple[Any, ...]) -> fx.Node:
        node = self.graph.call_function(function, (x, *how))
        node.meta["value"] = function(x.meta["value"], *_values(how))
        return node


def _values(how: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.meta["value"] if isinstance(part, fx.Node) else part for part in how)
