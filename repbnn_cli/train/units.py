"""What of a Rep network is fitted together: a convolution, what follows it, and what computes its kernel.

`reconstruct` fits such units to the source network's values, one after the other in the order of the forward.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repbnn_cli import rep_layers
from repbnn_cli.channels import SPATIAL, Compact, Folded, State, Tiled, kind_of_module, operator_name, plain
from repbnn_cli.graph import kernel_like
from repbnn_cli.graph.static import static_nodes
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.plan import Plan
from repbnn_cli.surgery.rewrite_operators import unfoldable
from repbnn_cli.train.writes import Edges, WriteError, as_edges

# What may follow a convolution within its unit: per-channel or elementwise, so that it decides on no other channel.
# Modules that the plan calls per channel do, too.
_MODULES = (_BatchNorm, nn.Hardtanh, nn.ReLU, nn.ReLU6, nn.PReLU, nn.LeakyReLU, nn.Identity, rep_layers.Repeat)
_FUNCTIONS = {operator.add, operator.iadd, torch.add, operator.sub, torch.sub, operator.mul, torch.mul, F.hardtanh,
              F.relu, F.prelu, torch.relu, torch.clamp, F.leaky_relu, rep_layers.repeat_last, rep_layers.fold_last,
              rep_layers.unfold_last, rep_layers.fold, rep_layers.unfold}  # fmt: skip
_METHODS = {"add", "add_", "clamp", "clamp_", "relu", "sub"}


@dataclass(frozen=True)
class Unit:
    """nodes: the convolution and what follows it; computing: what computes kernels and scales of it from parameters, in
    the graph's order; twin: the source's node whose value is the target of the last one; state: how that carries
    channels, with replicas among the samples (unfolds) made channels again."""

    nodes: list[fx.Node]
    computing: list[fx.Node]
    twin: fx.Node
    state: State
    unfolds: bool

    @property
    def path(self) -> str:
        """Of its convolution."""
        return str(self.nodes[0].target)

    @property
    def paths(self) -> list[str]:
        """Of its modules."""
        return [str(n.target) for n in self.nodes if n.op == "call_module"]


class Units:
    """The units of a Rep network. edges, source_edges: its graph and the source's, in which nothing is overwritten;
    waiting: convolutions that are still to be fitted.

    images: (N, C, H, W), a few. on_left hears of convolutions that are left: called more than once, or not by this
    graph; where a write of the network cannot be followed, all.
    """

    def __init__(self, plan: Plan, rep: fx.GraphModule, images: Tensor, on_left: Callable[[str, str], None]) -> None:
        self.plan, self.rep, self.source = plan, rep, plan.network
        why = ""
        try:
            self.edges = as_edges(rep, rep.graph, images)
            self.source_edges = as_edges(self.source.module, self.source.graph, images)
        except WriteError as error:
            self.edges, self.source_edges = Edges(rep.graph), Edges(self.source.graph)
            why = str(error)
        graph = self.edges.graph
        by_name = {node.name: node for node in self.source_edges.graph.nodes}
        self._twins = {step.node: by_name[name] for name, step in plan.steps.items() if name in by_name}
        self._uses = Counter(str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr"))
        self._names = Counter(id(p) for _, p in rep.named_parameters(remove_duplicate=False))
        self._static = static_nodes(graph)
        self._behind = _ancestors(graph)
        made = {e.path for e in plan.edits if e.action in ("rep_conv", "select_inputs")}
        self.waiting = {
            n for n in graph.nodes if n.op == "call_module" and n.target in made and self._uses[n.target] == 1
        }
        for path in made - {str(n.target) for n in self.waiting}:
            on_left(path, "called several times" if self._uses[path] else "called in training alone")
        if why:
            for conv in self.waiting:
                on_left(str(conv.target), why)
            self.waiting = set()

    def of(self, conv: fx.Node) -> Unit | None:
        """The convolution and what follows it up to the last value whose target is known; None where there is none.

        Where that is none that is repeated, the last one that still has to be: each of its channels is to be like all
        those of the source that share it.
        """
        chain, end = [conv], conv if self.known(conv) else None
        while len(chain[-1].users) == 1:
            following = next(iter(chain[-1].users))
            # A pooled value says less than the one before it, and is taken where that has no target: conv, pool, norm.
            if not self._continues(following, chain) or (end is not None and self.pools(following)):
                break
            chain.append(following)
            end = following if self.known(following) else end
        if end is None:
            unpooled = list(itertools.takewhile(lambda node: not self.pools(node), chain))
            end = next((node for node in reversed(unpooled) if self._to_be_repeated(node)), None)
        return None if end is None else self.ending(chain[: chain.index(end) + 1])

    def ending(self, nodes: list[fx.Node]) -> Unit:
        """The unit of these nodes, of which the last is known."""
        twin = self._twins[nodes[-1].name]
        state = self.plan.steps[twin.name].state
        # Replicas among the samples, where they can become channels again.
        unfolds = isinstance(state, Folded) and not self.plan.layers[str(nodes[0].target)].last_axis
        if unfolds:
            state = plain(twin.meta["value"].shape[1], self.plan.beta)
        return Unit(nodes, self._computing(nodes), twin, state, unfolds)

    def parameters(self, unit: Unit) -> list[nn.Parameter]:
        """What is to be fitted: parameters that nothing outside of the unit takes, and that are not frozen."""
        named = [p for path in unit.paths for p in fetch(self.rep, path).parameters()]
        named += [
            fetch(self.rep, str(n.target)) for member in (*unit.nodes, *unit.computing) for n in member.all_input_nodes
            if n.op == "get_attr" and self._owns(unit, n)
        ]  # fmt: skip
        wanted = (p for p in named if isinstance(p, nn.Parameter) and p.requires_grad and p.is_floating_point())
        return list({id(p): p for p in wanted if self._names[id(p)] == 1}.values())

    def kernels(self, unit: Unit) -> list[Tensor]:
        """What the unit's convolution, or its call, holds its kernel in."""
        held = list(fetch(self.rep, unit.path).parameters())
        for node in unit.nodes[0].all_input_nodes[1:2]:  # of a call
            held += [fetch(self.rep, str(n.target)) for n in self._behind[node] | {node} if n.op == "get_attr"]
        return [tensor for tensor in held if isinstance(tensor, Tensor) and kernel_like(tensor)]

    def known(self, node: fx.Node) -> bool:
        """Whether the source has a value for what a node gives."""
        twin = self._twins.get(node.name)
        if twin is None:
            return False
        step = self.plan.steps[twin.name]
        if step.static or step.by_position:
            return False
        if isinstance(step.state, Folded):
            return unfoldable(twin, self.source)
        return step.state is None or isinstance(step.state, Tiled)

    def _to_be_repeated(self, node: fx.Node) -> bool:
        """Whether a value has one channel for several of the source's, which are known."""
        twin = self._twins.get(node.name)
        step = self.plan.steps[twin.name] if twin is not None else None
        return step is not None and isinstance(step.state, Compact) and not (step.static or step.by_position)

    def pools(self, node: fx.Node) -> bool:
        """Whether a node of the Rep network acts over positions, on each channel alone."""
        if node.op == "call_module":
            return kind_of_module(fetch(self.rep, str(node.target))) == "spatial"
        return node.op == "call_function" and operator_name(node) in SPATIAL

    def _continues(self, node: fx.Node, chain: list[fx.Node]) -> bool:
        if node.op == "call_module":
            layer = self.plan.layers.get(str(node.target))
            own = layer is not None and layer.role == "per_channel" and not (layer.per_replica or layer.last_axis)
            module = fetch(self.rep, str(node.target))
            # What is called elsewhere, too, and has tensors is shared with a part that was fitted before.
            alone = self._uses[str(node.target)] == 1 or not module.state_dict()
            fits = alone and (own or isinstance(module, _MODULES) or self.pools(node))
        elif node.op == "call_function":
            fits = node.target in _FUNCTIONS or self.pools(node)
        else:
            fits = node.op == "call_method" and node.target in _METHODS
        others = [n for n in node.all_input_nodes if n is not chain[-1]]
        # Another operand may not wait for a convolution that is still to be fitted.
        return fits and not any((self._behind[n] | {n}) & self.waiting - {chain[0]} for n in others)

    def _computing(self, nodes: list[fx.Node]) -> list[fx.Node]:
        found: set[fx.Node] = set()
        todo = list(nodes)
        while todo:
            inputs = {n for n in todo.pop().all_input_nodes if n in self._static and n.op != "get_attr"} - found
            inputs = {n for n in inputs if self._static.issuperset(n.all_input_nodes)}  # not x.dtype
            found |= inputs
            todo += inputs
        return [n for n in self.edges.graph.nodes if n in found]

    def _owns(self, unit: Unit, node: fx.Node) -> bool:
        """Whether nothing outside of the unit takes a parameter, or what is computed from it."""
        once = node.op != "get_attr" or self._uses[str(node.target)] == 1
        return once and all(
            user in unit.nodes or (user in self._static and self._owns(unit, user)) for user in node.users
        )


def _ancestors(graph: fx.Graph) -> Mapping[fx.Node, set[fx.Node]]:
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        found[node] = set().union(*({n} | found[n] for n in node.all_input_nodes))
    return found
