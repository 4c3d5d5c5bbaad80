"""The state of one walk over a captured graph, and the forms in which it can hand on a tensor.

`rewrite.Rewriter` is the walk; what becomes of modules is in `rewrite_modules`, of operators in `rewrite_operators`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from repbnn_cli import rep_layers
from repbnn_cli.channels import NEW_TENSORS, Compact, Folded, State, Tiled, operator_name, permutation, plain
from repbnn_cli.errors import SurgeryError
from repbnn_cli.graph import Network
from repbnn_cli.graph.proxies import is_write, set_data
from repbnn_cli.graph.static import static_nodes, value_inputs
from repbnn_cli.inherit import Recipe
from repbnn_cli.plan import ModuleEdit, Step
from repbnn_cli.positions import holds_tensor
from repbnn_cli.recognize import Layer
from repbnn_cli.rules import Rule
from repbnn_cli.rules.rule_models import ACTIONS_OF
from repbnn_cli.surgery.samples import rows_per_sample

# Writes that give back nothing to go on with; `x.add_(y)` and `x += y` are carried like x + y.
GIVE_NOTHING = (operator.setitem, set_data)


@dataclass
class Made:
    """A source node's counterpart: its node in the new graph, its state, and other forms of it made so far."""

    node: fx.Node
    state: State
    tiled: fx.Node | None = None
    folded: fx.Node | None = None


class Walk:
    """After a walk `graph`, `edits`, `added`, `steps` and `notes` are what `plan.Plan` holds."""

    def __init__(
        self,
        network: Network,
        layers: Mapping[str, Layer],
        rules: Mapping[str, Rule],
        *,
        beta: int,
        inherit: str,
        last_layer: str,
        taken: Collection[str] = (),
        apart: Collection[str] = (),
    ) -> None:
        """taken: paths of helper layers that another graph of the network calls; apart: of convolutions that do not
        repeat by themselves, because they do not in that graph."""
        self._taken, self._apart = taken, apart
        self.network, self.layers, self.rules = network, layers, rules
        self.beta, self.inherit, self.last_layer = beta, inherit, last_layer
        self.graph = fx.Graph()
        self.edits: dict[str, ModuleEdit] = {}
        self.added: dict[str, nn.Module] = {}
        self.steps: dict[str, Step] = {}
        self.notes: list[str] = []
        self.by_position: list[str] = []
        self.products: list[fx.Node] = []  # of activations, computed for each replica
        self._made: dict[fx.Node, Made] = {}
        self._static = static_nodes(network.graph)
        # Parameters that expanded tensors read as they are, through a selection: they must not be resized elsewhere.
        self._read_whole: dict[str, fx.Node] = {}
        self._tiled_as: dict[str, Tiled] = {}
        self._numbers: dict[tuple[fx.Node, bool], fx.Node] = {}

    def _copy(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta = {k: node.meta[k] for k in ("where", "path") if k in node.meta}
        return new

    def _keep(self, node: fx.Node, new: fx.Node, state: State, *, by_position: bool = False) -> None:
        self._made[node] = made = Made(new, state)
        written = node.args[0] if is_write(node) and node not in self._static else None
        if isinstance(written, fx.Node) and node.target not in GIVE_NOTHING:
            self._made[written] = made  # other forms of it, made before, do not have what was written
        self.steps[node.name] = Step(new.name, state, static=node in self._static, by_position=by_position)

    def _copy_mapped(self, node: fx.Node, tensor: Callable[[fx.Node], fx.Node], *, folded: bool = False) -> fx.Node:
        def mapped(n: fx.Node) -> fx.Node:
            return tensor(n) if holds_tensor(n.meta["value"]) else self._number(n, folded=folded)

        args, kwargs = fx.map_arg((node.args, node.kwargs), mapped)
        return self._copy(node, args, kwargs)

    def _expanded(self, node: fx.Node) -> list[fx.Node]:
        """The operands that carry replicas into what a node gives."""
        if operator_name(node) in NEW_TENSORS:
            return []
        operands = [n for n in value_inputs(node) if holds_tensor(n.meta["value"])]
        return [n for n in operands if self._made[n].state is not None]

    def _size_taken(self, node: fx.Node) -> fx.Node | None:
        """The expanded tensor whose whole size a node takes to make another: `torch.randn(x.size())`."""
        for size in node.all_input_nodes:
            of = size.args[0] if isinstance(size.meta["value"], torch.Size) and size.args else None
            if isinstance(of, fx.Node) and of in self._made and self._made[of].state is not None:
                return of if isinstance(node.meta["value"], Tensor) else None
        return None

    @staticmethod
    def _tensors(node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if holds_tensor(n.meta["value"])]

    # -- forms of a tensor -------------------------------------------------------------------------------------------
    def _as_tiled(self, node: fx.Node) -> fx.Node:
        """The tensor with all its channels: repeated if compact, unfolded if folded."""
        made = self._made[node]
        if made.tiled is None:
            if isinstance(made.state, Compact):
                made.tiled = self._add(f"{made.node.name}_repeat", rep_layers.Repeat(made.state.repeats), made.node)
            elif isinstance(made.state, Folded):
                if not self._rows_per_sample(node) or node.meta["value"].ndim < 2:
                    self._refuse(
                        node, f"{operator_name(node)} leaves batch and channels elsewhere than in the first two axes, "
                        "but channels are needed here", "keep the batch first, or give it one replica (rule file: "
                        f'`match: {{path: "{subject_of(node)}"}}, apply: select_inputs, share: 1_over_beta`)',
                    )  # fmt: skip
                made.tiled = self._by_rows(rep_layers.unfold, made.node, node)
            else:
                made.tiled = made.node
        return made.tiled

    def _map(self, node: fx.Node) -> Tiled:
        """The channel map of the tensor once it is tiled."""
        state = self._made[node].state
        if isinstance(state, Compact):
            return Tiled(state.index, state.source)
        if isinstance(state, Folded):
            return plain(node.meta["value"].shape[1], self.beta)
        assert isinstance(state, Tiled)
        return state

    def _as_folded(self, node: fx.Node) -> fx.Node:
        """The tensor with its replicas as samples; what was not expanded gets its samples repeated beside them."""
        made = self._made[node]
        if made.folded is None:
            if isinstance(made.state, Folded):
                made.folded = made.node
            elif made.state is None:
                alone = node in self._static or not self._rows_per_sample(node)
                made.folded = made.node if alone else self._by_rows(rep_layers.repeat_batch, made.node, node)
            else:
                state = self._map(node)
                tiled = self._reordered(node, plain(state.source, self.beta))
                made.folded = self._by_rows(rep_layers.fold, tiled, node)
        return made.folded

    def _as_unfolded_last(self, node: fx.Node) -> fx.Node:
        """(N·W, ..., β·C), replica after replica along the last axis."""
        return self._by_rows(rep_layers.unfold_last, self._as_folded(node), node)

    def _by_rows(self, function: Callable[..., Tensor], x: fx.Node, node: fx.Node) -> fx.Node:
        """function(x, β, samples), for a tensor with as many rows for each sample as `node` has."""
        return self.graph.call_function(function, (x, self.beta, *self._samples(node)))

    def _samples(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The number of samples, where a tensor has several rows for each; () where it has one."""
        return () if self._rows_per_sample(node) == 1 else (self._sample_count,)

    @cached_property
    def _sample_count(self) -> fx.Node:
        first = next(n for n in self.graph.nodes if n.op == "placeholder")
        return self.graph.call_method("size", (first, 0))

    def _rows_per_sample(self, node: fx.Node) -> int:
        """How many rows of axis 0 belong to each sample; 0 where they do not lie together."""
        value = node.meta["value"]
        if not isinstance(value, Tensor) or value.ndim < 1 or value.shape[0] % self.network.batch:
            return 0
        return 1 if value.shape[0] == self.network.batch else self._several_rows.get(node, 0)

    @cached_property
    def _several_rows(self) -> dict[fx.Node, int]:
        return rows_per_sample(self.network)

    def _output(self, node: fx.Node) -> Any:
        """A tensor as the network returns it."""
        if not holds_tensor(node.meta["value"]):
            return self._number(node, folded=False)
        made = self._made[node]
        if isinstance(made.state, Folded) and made.state.reduced:  # an attention map: as in the source, of all replicas
            return self.graph.call_function(rep_layers.mean_of_replicas, (made.node, self.beta))
        if made.state is not None:
            layer = self.layers.get(str(node.target)) if node.op == "call_module" else None
            channels = node.meta["value"].shape[1]
            if layer is None or "select_inputs" in ACTIONS_OF[layer.role]:
                one = (f'a rule with `match: {{path: "{subject_of(node)}"}}, apply: select_inputs, share: 1_over_beta` '
                       "gives one replica, ")  # fmt: skip
            elif self._map(node).first == tuple(range(channels)):
                one = f"`[:, :{channels}]` of it is one replica, "
            else:
                one = ""
            self.notes.append(
                f"{self._place(node)}: the network returns this expanded: {self.beta}× as many channels; {one}"
                "`apply: keep` leaves a part of the network out of the expansion"
            )
        return self._as_tiled(node)

    def _reordered(self, node: fx.Node, want: Tiled) -> fx.Node:
        """The tiled tensor with its replicas in the order of `want`."""
        tiled, have = self._as_tiled(node), self._map(node)
        if have == want:
            return tiled
        order = permutation(have, want)
        if order is None:
            self._refuse(
                node,
                f"its {len(have.index)} channels stand for other source channels than the {len(want.index)} beside it",
                "make both branches carry the same channels",
            )
        return self._add(f"{tiled.name}_reorder", rep_layers.ChannelSelect(torch.tensor(order)), tiled)

    def _add(self, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
        path = name
        while path in self.added or path in self._taken or hasattr(self.network.module, path):
            path += "_"
        self.added[path] = module
        return self.graph.call_module(path, (x,))

    def _number(self, node: fx.Node, *, folded: bool) -> Any:
        """A size or number, computed in the new network; of folded tensors where it is used on one.

        The number of channels is the source's: arithmetic with it (a mean over channels, say) stays what it was.
        """
        if node in self._made:
            return self._made[node].node
        if (size := self._size_of(node)) is not None:
            x, dim = size
            if dim == 1:
                return node.meta["value"]
            if dim != 0:  # the same in every form of the tensor
                return self._once(node, False, lambda: self._copy_mapped(node, lambda n: self._made[n].node))
            if folded and self._made[x].state is None:
                return self._once(node, True, lambda: self.graph.call_function(
                    _times, (self._number(node, folded=False), self.beta)))  # fmt: skip
        tensor = self._as_folded if folded else self._as_tiled
        return self._once(node, folded, lambda: self._copy_mapped(node, tensor, folded=folded))

    def _once(self, node: fx.Node, folded: bool, make: Callable[[], fx.Node]) -> fx.Node:
        key = (node, folded)
        if key not in self._numbers:
            self._numbers[key] = make()
        return self._numbers[key]

    def _size_of(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """The tensor and axis whose size a node reads: x.size(1), x.shape[1]."""
        of, dim = (*node.args, *node.kwargs.values(), None, None)[:2]  # x.size(dim=1)
        if not isinstance(of, fx.Node) or not isinstance(dim, int):
            return None
        if operator_name(node) == "getitem" and isinstance(of.meta["value"], torch.Size):
            sizes = [n for n in of.all_input_nodes if isinstance(n.meta["value"], Tensor)]
            of = sizes[0] if len(sizes) == 1 and operator_name(of) in ("size", "getattr") else node
        elif operator_name(node) != "size":
            return None
        value = of.meta["value"]
        return (of, dim % value.ndim) if isinstance(value, Tensor) and of in self._made else None

    # -- edits and refusals ------------------------------------------------------------------------------------------
    def _edit(
        self, layer: Layer, rule: Rule, action: str, before: str, after: str,
        tensors: list[tuple[str, Recipe]] | None = None, *, channels: tuple[int, int] | None, repeats: int = 1,
        layout: Recipe | None = None,
    ) -> None:  # fmt: skip
        edit = ModuleEdit(
            layer.path, rule.part, rule.name, rule.where, layer.role, action, before, after, tuple(tensors or ()),
            channels, repeats, reset=self.inherit == "none", layout=layout,
        )  # fmt: skip
        earlier = self.edits.setdefault(layer.path, edit)
        if action == "parameter":  # of two calls that one rule would claim here and another there it is the same
            edit = replace(edit, part=earlier.part, rule=earlier.rule, where=earlier.where)
        if earlier != edit:
            raise SurgeryError(
                f"{layer.path}: is called twice with inputs that stand for different channels "
                f"({earlier.after} and {edit.after}); give each call a module of its own"
            )

    def _place(self, node: fx.Node) -> str:
        path = str(node.target) if node.op == "call_module" else node.meta.get("path", "")
        return " ".join(filter(None, (node.meta.get("where", ""), f"({path})" if path else "", f"node {node.name}")))

    def _refuse(self, node: fx.Node, why: str, remedy: str) -> NoReturn:
        raise SurgeryError(f"{self._place(node)}: {why}; {remedy}")


def subject_of(node: fx.Node) -> str:
    """What rules call a node: a module's or parameter's own path, for an operator `module.path:node`."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    return f"{node.meta.get('path', '')}:{node.name}"


def _times(value: int, factor: int) -> int:
    return value * factor


def shape_text(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
