"""Walks a captured graph once and writes the graph of its RepBNN beside it, with the channel map of every tensor.

Each node is carried by what it does to channels (tables in `channels`); each module by its role and the rule that
claims it. Nothing is changed here: module edits are collected as values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from repbnn_cli import rep_layers
from repbnn_cli.channels import (
    Compact,
    Folded,
    State,
    Tiled,
    acts_per_sample,
    adds_trailing_ones,
    commutes,
    concatenated,
    flattened,
    grouped,
    is_flatten,
    kind_of_call,
    kind_of_module,
    operator_name,
    permutation,
    plain,
)
from repbnn_cli.errors import SurgeryError, UsageError
from repbnn_cli.graph import Network
from repbnn_cli.inherit import Columns, Kernel, Mean, Members, Recipe, Tile
from repbnn_cli.plan import ModuleEdit, Step
from repbnn_cli.positions import holds_tensor
from repbnn_cli.recognize import CONVOLUTIONS, Layer
from repbnn_cli.rules import Rule
from repbnn_cli.tracer import fetch, set_data

_SHAREABLE_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class _Made:
    """A source node's counterpart: its node in the new graph, its state, and other forms of it made so far."""

    node: fx.Node
    state: State
    tiled: fx.Node | None = None
    folded: fx.Node | None = None


class Rewriter:
    """One walk. After `run`, `graph`, `edits`, `added`, `steps` and `notes` are what `plan.Plan` holds."""

    def __init__(
        self,
        network: Network,
        layers: Mapping[str, Layer],
        rules: Mapping[str, Rule],
        *,
        beta: int,
        inherit: str,
        last_layer: str,
    ) -> None:
        self.network, self.layers, self.rules = network, layers, rules
        self.beta, self.inherit, self.last_layer = beta, inherit, last_layer
        self.graph = fx.Graph()
        self.edits: dict[str, ModuleEdit] = {}
        self.added: dict[str, nn.Module] = {}
        self.steps: dict[str, Step] = {}
        self.notes: list[str] = []
        self._made: dict[fx.Node, _Made] = {}
        self._scalars: dict[tuple[fx.Node, bool], fx.Node] = {}

    def run(self) -> None:
        for node in self.network.graph.nodes:
            self._visit(node)
        self._repeat_in_convolutions()
        self.graph.lint()

    # -- the walk ----------------------------------------------------------------------------------------------------
    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self.graph.output(fx.map_arg(node.args[0], self._output))
        elif node.op in ("placeholder", "get_attr"):
            self._keep(node, self._copy(node, node.args, node.kwargs), None)
        elif self._has_effect(node):
            self._effect(node)
        elif not holds_tensor(node.meta["value"]):
            return  # a size or another number: written where it is used
        elif node.op == "call_module":
            self._module(node)
        else:
            self._call(node)

    def _copy(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta = {k: node.meta[k] for k in ("where", "path") if k in node.meta}
        return new

    def _keep(self, node: fx.Node, new: fx.Node, state: State) -> None:
        self._made[node] = _Made(new, state)
        self.steps[node.name] = Step(new.name, state)

    def _output(self, node: fx.Node) -> fx.Node:
        if not holds_tensor(node.meta["value"]):
            return self._scalar(node, folded=False)
        if self._made[node].state is not None:
            self.notes.append(f"{self._place(node)}: the network returns this expanded: {self.beta}× as many channels")
        return self._as_tiled(node)

    @staticmethod
    def _has_effect(node: fx.Node) -> bool:
        return node.op == "call_function" and operator_name(node).endswith(("setitem", set_data.__name__))

    def _effect(self, node: fx.Node) -> None:
        if self._expanded(node):
            self._refuse(node, f"{operator_name(node)} writes into an expanded tensor", "compute a new tensor instead")
        self._keep(node, self._copy_mapped(node, lambda n: self._made[n].node), None)

    def _expanded(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in self._tensors(node) if self._made[n].state is not None]

    @staticmethod
    def _tensors(node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if holds_tensor(n.meta["value"])]

    def _copy_mapped(self, node: fx.Node, tensor: Callable[[fx.Node], fx.Node], *, folded: bool = False) -> fx.Node:
        def mapped(n: fx.Node) -> fx.Node:
            return tensor(n) if holds_tensor(n.meta["value"]) else self._scalar(n, folded=folded)

        args, kwargs = fx.map_arg((node.args, node.kwargs), mapped)
        return self._copy(node, args, kwargs)

    # -- forms of a tensor -------------------------------------------------------------------------------------------
    def _as_tiled(self, node: fx.Node) -> fx.Node:
        """The tensor with all its channels: repeated if compact, unfolded if folded."""
        made = self._made[node]
        if made.tiled is None:
            if isinstance(made.state, Compact):
                made.tiled = self._add(f"{made.node.name}_repeat", rep_layers.Repeat(made.state.repeats), made.node)
            elif isinstance(made.state, Folded):
                value = node.meta["value"]
                if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] != self.network.batch:
                    self._refuse(
                        node,
                        f"{operator_name(node)} moves channels into the batch axis, and here they are needed as channels",
                        "keep the batch first",
                    )
                made.tiled = self.graph.call_function(rep_layers.unfold, (made.node, self.beta))
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
            value = node.meta["value"]
            if isinstance(made.state, Folded):
                made.folded = made.node
            elif made.state is None:
                batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.network.batch
                if node.op == "get_attr" or not batched:
                    made.folded = made.node
                else:
                    made.folded = self.graph.call_function(rep_layers.repeat_batch, (made.node, self.beta))
            else:
                state = self._map(node)
                tiled = self._reordered(node, plain(state.source, self.beta))
                made.folded = self.graph.call_function(rep_layers.fold, (tiled, self.beta))
        return made.folded

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
        while path in self.added:
            path += "_"
        self.added[path] = module
        return self.graph.call_module(path, (x,))

    def _scalar(self, node: fx.Node, *, folded: bool) -> fx.Node:
        """A size or number, computed in the new network; of folded tensors where it is used on one."""
        key = (node, folded)
        if key not in self._scalars:
            tensor = self._as_folded if folded else self._as_tiled
            if folded and self._reads_batch(node):
                plain_size = self._scalar(node, folded=False)
                self._scalars[key] = self.graph.call_function(_times, (plain_size, self.beta))
            else:
                self._scalars[key] = self._copy_mapped(node, tensor, folded=folded)
        return self._scalars[key]

    def _reads_batch(self, node: fx.Node) -> bool:
        """Whether the number is the batch size of a tensor that is not expanded (and so is not folded either)."""
        name = operator_name(node)
        if name == "size" and len(node.args) > 1:
            return node.args[1] == 0 and self._made[node.args[0]].state is None  # type: ignore[index]
        if name == "getitem" and node.args[1] == 0:
            sizes = node.args[0]
            return isinstance(sizes, fx.Node) and all(self._made[n].state is None for n in self._tensors(sizes))
        return False

    # -- modules -----------------------------------------------------------------------------------------------------
    def _module(self, node: fx.Node) -> None:
        path = str(node.target)
        layer, rule = self.layers[path], self.rules.get(path)
        expanded = self._expanded(node)
        if not expanded:
            self._unexpanded_module(node, layer, rule)
        elif rule is None:
            what = f"{layer.role} ({layer.evidence})" if layer.role == "unknown" else f"this {layer.role}"
            self._refuse(node, f"no rule says what becomes of {what}, whose input is expanded", "add a rule for it")
        elif rule.apply == "keep":
            self._refuse(node, f"{rule.where} keeps it as it is, but its input is expanded", "use another action")
        elif layer.role in CONVOLUTIONS:
            if len(self._tensors(node)) != 1 or node.args[:1] != (expanded[0],):
                self._refuse(node, "a convolution with several tensor arguments", "split it into two modules")
            if rule.apply == "select_inputs":
                self._select_inputs(node, layer, rule)
            elif rule.apply == "tile":
                self._depthwise(node, layer, rule)
            else:
                self._rep_conv(node, layer, rule)
        elif layer.role == "batch_norm":
            self._batch_norm(node, layer, rule)
        elif layer.role == "per_channel":
            self._per_channel(node, layer, rule)
        else:
            module = fetch(self.network.module, path)
            self._weightless(node, kind_of_module(module), module, rule)

    def _unexpanded_module(self, node: fx.Node, layer: Layer, rule: Rule | None) -> None:
        new = self._copy_mapped(node, lambda n: self._made[n].node)
        if rule is None or rule.apply != "repeat_output":
            if rule is not None and rule.apply == "rep_conv":
                self._refuse(
                    node, f"{rule.where} makes it a RepConv, but its input is not expanded", "expand what feeds it"
                )
            self._keep(node, new, None)
            return
        out = layer.out_channels
        # Behind a first layer all source channels are there; only the repeat is shared, β times.
        self._keep(node, new, Compact(out, self.beta, out, rule.repeat or "before_batch_norm"))
        shape = _text(layer.kernel_shape)
        self._edit(layer, rule, "repeat_output", shape, f"{shape} × {self.beta} copies", channels=None)

    def _rep_conv(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        out, beta, groups = layer.out_channels, self.beta, layer.groups
        if (out // groups) % beta:
            per = out // groups
            possible = ", ".join(str(b) for b in range(1, per + 1) if per % b == 0)
            what = f"{out} output channels" if groups == 1 else f"{per} output channels of each of its {groups} groups"
            raise UsageError(f"{layer.path}: beta {beta} does not divide its {what}; possible here: {possible}")
        x = node.args[0]
        assert isinstance(x, fx.Node)
        state = self._map(x)
        want = grouped(state, groups) if groups > 1 else state
        source = self._reordered(x, want)
        members = Members(out, beta, "reshape" if self.inherit == "reshape" else "fold", groups)
        width = len(want.index) // groups
        kernel = Kernel(
            layer.kernel_shape, members, want.index[:width], want.replica[:width], flat=self._is_flat(layer)
        )
        tensors: list[tuple[str, Recipe]] = [(n, kernel) for n in (layer.kernel, *layer.same_tensors)]
        tensors += [(n, Mean(axis, members)) for n, axis in layer.out_tensors.items()]
        tensors += [(n, Tile(axis, want.index)) for n, axis in layer.in_tensors.items()]
        after = (out // beta, layer.kernel_shape[1] * beta, *layer.kernel_shape[2:])
        channels = (len(want.index), out // beta)
        self._edit(layer, rule, "rep_conv", _text(layer.kernel_shape), _text(after), tensors, channels=channels)
        new = self._copy_mapped(node, lambda _: source)
        compact = Compact(out // beta, beta * beta, out, rule.repeat or "before_batch_norm", members)
        if groups == 1:
            self._keep(node, new, compact)
            return
        repeat = self._add(f"{new.name}_repeat", rep_layers.Repeat(beta * beta, groups), new)
        self._keep(node, repeat, grouped(plain(out, beta), groups))

    def _is_flat(self, layer: Layer) -> bool:
        return tuple(fetch(self.network.module, f"{layer.path}.{layer.kernel}").shape) != layer.kernel_shape

    def _depthwise(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        """A depthwise convolution acts per channel: every replica gets a copy of its filters; its cost grows ×β."""
        if layer.role != "depthwise_conv" or layer.out_channels != layer.in_channels:
            self._refuse(node, f"{rule.where} tiles a convolution that mixes channels", "use rep_conv")
        x = node.args[0]
        assert isinstance(x, fx.Node)
        state = self._map(x)
        names = (layer.kernel, *layer.same_tensors)
        axes = {**dict.fromkeys(names, 0), **layer.out_tensors, **layer.in_tensors}
        tensors: list[tuple[str, Recipe]] = [(n, Tile(axis, state.index)) for n, axis in axes.items()]
        width = len(state.index)
        after = (width, *layer.kernel_shape[1:])
        self._edit(layer, rule, "depthwise", _text(layer.kernel_shape), _text(after), tensors, channels=(width, width))
        self._keep(node, self._copy_mapped(node, self._as_tiled), state)

    def _batch_norm(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        state = self._made[x].state
        module = fetch(self.network.module, layer.path)
        names = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.ndim == 1]
        before = f"({module.num_features})"
        shares = isinstance(state, Compact) and type(module) in _SHAREABLE_BATCH_NORMS
        if shares and isinstance(state, Compact) and state.batch_norm == "after_batch_norm":
            if state.members is not None:
                means: list[tuple[str, Recipe]] = [(n, Mean(0, state.members)) for n in names]
                width = state.channels
                self._edit(layer, rule, "batch_norm", before, f"({width})", means, channels=(width, width))
            self._keep(node, self._copy_mapped(node, lambda n: self._made[n].node), state)
            self._as_tiled(node)
            return
        index = self._map(x)
        tensors: list[tuple[str, Recipe]] = [(n, Tile(0, index.index)) for n in names]
        action = "rep_batch_norm" if shares else "batch_norm"
        width = len(index.index)
        repeats = state.repeats if shares and isinstance(state, Compact) else 1
        self._edit(layer, rule, action, before, f"({width})", tensors, channels=(width, width), repeats=repeats)
        form = (lambda n: self._made[n].node) if shares else self._as_tiled
        self._keep(node, self._copy_mapped(node, form), index)

    def _per_channel(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        maps = [self._map(n) for n in self._expanded(node)]
        if any(m != maps[0] for m in maps) or len(maps) != len(self._tensors(node)):
            self._refuse(
                node, "a per-channel module with inputs of different channel maps", "split it into two modules"
            )
        index = maps[0].index
        tensors: list[tuple[str, Recipe]] = [(n, Tile(axis, index)) for n, axis in layer.in_tensors.items()]
        before = f"({maps[0].source})"
        self._edit(layer, rule, "per_channel", before, f"({len(index)})", tensors, channels=(len(index), len(index)))
        self._keep(node, self._copy_mapped(node, self._as_tiled), maps[0])

    def _select_inputs(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        """The last layer (ways 1 to 3): takes all, 1/β or 1/β² of the expanded inputs; its output is not expanded."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        state, share = self._map(x), rule.share or self.last_layer
        if layer.groups > 1:
            self._refuse(node, "a grouped last layer", "use a layer without groups")
        first_copies = [j for j, r in enumerate(state.replica) if r == 0]
        source = self._as_tiled(x)
        if share == "all":
            recipe = Columns(tuple((i,) for i in state.index), 1 / self.beta)
            taken = list(range(len(state.index)))
        elif share == "1_over_beta":
            taken = first_copies
            recipe = Columns(tuple((state.index[j],) for j in taken))
        else:
            kept = state.source // self.beta
            if state.source % self.beta:
                possible = [b for b in range(1, state.source + 1) if state.source % b == 0]
                raise UsageError(
                    f"{layer.path}: beta {self.beta} does not divide its {state.source} inputs (last_layer: {share}); "
                    f"possible here: {', '.join(map(str, possible))}"
                )
            taken = [j for j in first_copies if state.index[j] < kept]
            shared = range(self.beta if self.inherit == "fold" else 1)
            recipe = Columns(tuple(tuple(state.index[j] + s * kept for s in shared) for j in taken))
        if share != "all":
            source = self._add(f"{node.name}_inputs", rep_layers.ChannelSelect(torch.tensor(taken)), source)
        tensors: list[tuple[str, Recipe]] = [(layer.kernel, recipe)]
        tensors += [(n, Tile(a, tuple(state.index[j] for j in taken))) for n, a in layer.in_tensors.items()]
        after = (layer.out_channels, len(taken), *layer.kernel_shape[2:])
        channels = (len(taken), layer.out_channels)
        self._edit(layer, rule, "select_inputs", _text(layer.kernel_shape), _text(after), tensors, channels=channels)
        self._keep(node, self._copy_mapped(node, lambda _: source), None)

    def _edit(
        self, layer: Layer, rule: Rule, action: str, before: str, after: str, tensors: list[tuple[str, Recipe]] | None = None,
        *, channels: tuple[int, int] | None, repeats: int = 1,
    ) -> None:  # fmt: skip
        edit = ModuleEdit(
            layer.path, rule.part, rule.name, rule.where, layer.role, action, before, after, tuple(tensors or ()), channels,
            repeats, reset=self.inherit == "none" and action != "repeat_output",
        )  # fmt: skip
        earlier = self.edits.setdefault(layer.path, edit)
        if earlier != edit:
            raise SurgeryError(
                f"{layer.path}: is called twice with inputs that stand for different channels "
                f"({earlier.after} and {edit.after}); give each call a module of its own"
            )

    # -- functions, methods and modules without parameters -------------------------------------------------------------
    def _call(self, node: fx.Node) -> None:
        if not self._expanded(node):
            self._keep(node, self._copy_mapped(node, lambda n: self._made[n].node), None)
            return
        kind = kind_of_call(node)
        rule = self.rules.get(subject_of(node))
        if kind == "concatenate":
            self._need_rule(node, rule)
            self._concatenate(node)
        elif kind == "opaque":
            call: Any = node.target if node.op == "call_function" else None
            self._weightless(node, kind, call, rule)
        else:
            self._weightless(node, kind, None, rule)

    def _need_rule(self, node: fx.Node, rule: Rule | None) -> None:
        if rule is None or rule.apply != "tile":
            self._refuse(
                node, f"no rule lets {operator_name(node)} carry expanded channels", "add one for the role `weightless`"
            )

    def _weightless(self, node: fx.Node, kind: str, call: Callable[..., Any] | None, rule: Rule | None) -> None:
        self._need_rule(node, rule)
        expanded = self._expanded(node)
        before, after = expanded[0].meta["value"], node.meta["value"]
        single = len(self._tensors(node)) == 1
        if (
            single
            and isinstance(before, Tensor)
            and isinstance(after, Tensor)
            and kind in ("fold", "flatten", "opaque")
        ):
            if is_flatten(before, after):
                state = self._map(expanded[0])
                positions = after.shape[1] // before.shape[1]
                new = self.graph.call_function(torch.flatten, (self._as_tiled(expanded[0]), 1))
                new.meta = {k: node.meta[k] for k in ("where", "path")}
                self._keep(node, new, flattened(state, positions))
                return
            if adds_trailing_ones(before, after):
                new = self.graph.call_function(_with_ndim, (self._as_tiled(expanded[0]), after.ndim))
                self._keep(node, new, self._map(expanded[0]))
                return
        if kind == "opaque":
            kind = self._test(node, call)
        if kind == "pointwise":
            self._pointwise(node)
        elif kind in ("spatial", "random"):
            self._carry_one(node, random=kind == "random")
        else:
            self._fold(node)

    def _test(self, node: fx.Node, call: Callable[..., Any] | None) -> str:
        """An operator in no table: found out by running it on random numbers."""
        inputs = [_random_like(a) for a in node.args] if call is not None and not node.kwargs else []
        try:
            if call is not None and inputs and commutes(call, inputs):
                return "pointwise"
            if call is not None and inputs and acts_per_sample(call, inputs):
                return "fold"
        except Exception as error:  # the user's code on inputs it may not expect
            self._refuse(node, f"failed on a random input ({type(error).__name__}: {error})", "declare what it is")
        what = node.target if node.op == "call_module" else operator_name(node)
        return self._refuse(
            node, f"{what} mixes channels in a way that is not known", "write it with torch functions, or as a module "
            "whose role a rule file declares",
        )  # fmt: skip

    def _carry_one(self, node: fx.Node, *, random: bool) -> None:
        x = self._expanded(node)[0]
        state = self._made[x].state
        if random or not isinstance(node.meta["value"], Tensor):
            self._keep(node, self._copy_mapped(node, self._as_tiled), self._map(x))
        else:
            self._keep(node, self._copy_mapped(node, lambda n: self._made[n].node), state)

    def _pointwise(self, node: fx.Node) -> None:
        value = node.meta["value"]
        tensors = self._tensors(node)
        if len(tensors) == 1:
            return self._carry_one(node, random=False)
        folds = any(
            isinstance(self._made[n].state, Folded)
            or (self._made[n].state is not None and n.meta["value"].shape[1:2] != value.shape[1:2])
            or (self._made[n].state is not None and n.meta["value"].ndim != value.ndim)
            for n in tensors
        )
        if folds and not all(isinstance(self._made[n].state, Folded) and _unfoldable(n, self.network) for n in tensors):
            per_channel = [n for n in tensors if self._is_parameter(n, value)]
            if not per_channel:
                return self._fold(node)
        want = self._map(next(n for n in self._expanded(node)))
        new = self._copy_mapped(node, lambda n: self._beside(node, n, value, want))
        return self._keep(node, new, want)

    def _beside(self, node: fx.Node, operand: fx.Node, value: Tensor, want: Tiled) -> fx.Node:
        """An operand in the form that fits the map `want` of the result."""
        made, shape = self._made[operand], operand.meta["value"].shape
        if made.state is not None:
            return self._reordered(operand, want)
        axis = 1 - (value.ndim - len(shape))
        if axis < 0 or shape[axis] == 1:
            return made.node
        if operand.op == "get_attr":
            self._parameter(node, operand, axis, want)
            return made.node
        index = torch.tensor(want.index)
        if axis != 1:
            self._refuse(node, "an operand without batch axis that is no parameter", "give it a batch axis")
        return self._add(f"{made.node.name}_expand", rep_layers.ChannelSelect(index), made.node)

    def _is_parameter(self, operand: fx.Node, value: Tensor) -> bool:
        shape = operand.meta["value"].shape
        axis = 1 - (value.ndim - len(shape))
        return operand.op == "get_attr" and axis >= 0 and shape[axis] > 1

    def _parameter(self, node: fx.Node, operand: fx.Node, axis: int, want: Tiled) -> None:
        """A per-channel parameter that a forward uses directly: tiled, so that the copies can drift apart."""
        name = str(operand.target)
        rule = self.rules.get(subject_of(operand))
        if rule is None or rule.apply != "tile":
            self._refuse(node, f"no rule covers the per-channel parameter {name}", "add one for the role `per_channel`")
        size = operand.meta["value"].shape[axis]
        layer = Layer(name, "per_channel", "a parameter of the channels it is combined with")
        path, _, leaf = name.rpartition(".")
        recipe: Recipe = Tile(axis, want.index)
        self._edit(layer, rule, "parameter", f"({size})", f"({len(want.index)})", [(leaf, recipe)], channels=None)

    def _concatenate(self, node: fx.Node) -> None:
        tensors = self._tensors(node)
        value = node.meta["value"]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        axis = int(dim) % value.ndim  # type: ignore[arg-type]
        if axis == 0 or any(
            isinstance(self._made[n].state, Folded) and not _unfoldable(n, self.network) for n in tensors
        ):
            return self._fold(node)
        if axis != 1:
            return self._pointwise(node)
        states = {
            n: self._map(n) if self._made[n].state else plain(n.meta["value"].shape[1], self.beta) for n in tensors
        }

        def operand(n: fx.Node) -> fx.Node:
            if self._made[n].state is not None:
                return self._as_tiled(n)
            return self.graph.call_function(rep_layers.add_channels, (self._made[n].node, self.beta))

        sequence = node.args[0] if node.args else node.kwargs["tensors"]
        state = concatenated([states[n] for n in sequence])  # type: ignore[union-attr, index, misc]
        return self._keep(node, self._copy_mapped(node, operand), state)

    def _fold(self, node: fx.Node) -> None:
        for n in self._expanded(node):
            if isinstance(self._made[n].state, Tiled | Compact) and not isinstance(n.meta["value"], Tensor):
                self._refuse(node, "takes a tuple of expanded tensors", "unpack it first")
        self._keep(node, self._copy_mapped(node, self._as_folded, folded=True), Folded())

    # -- afterwards --------------------------------------------------------------------------------------------------
    def _repeat_in_convolutions(self) -> None:
        """Where nothing but its repeat uses a RepConv's output, the RepConv repeats by itself."""
        for node in list(self.graph.nodes):
            helper = self.added.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(helper, rep_layers.Repeat):
                continue
            x = node.args[0]
            edit = self.edits.get(str(x.target)) if isinstance(x, fx.Node) and x.op == "call_module" else None
            calls = [n for n in self.graph.nodes if n.op == "call_module" and edit and n.target == edit.path]
            if edit is None or edit.action != "rep_conv" or len(x.users) != 1 or len(calls) != 1:  # type: ignore[union-attr]
                continue
            assert isinstance(x, fx.Node)
            self.edits[edit.path] = replace(edit, repeats=helper.repeats)
            for name, step in self.steps.items():
                if step.node == x.name and isinstance(step.state, Compact):
                    self.steps[name] = Step(x.name, Tiled(step.state.index, step.state.source))
                elif step.node == node.name:
                    self.steps[name] = Step(x.name, step.state)
            node.replace_all_uses_with(x)
            self.graph.erase_node(node)
            del self.added[str(node.target)]

    # -- refusals ----------------------------------------------------------------------------------------------------
    def _place(self, node: fx.Node) -> str:
        path = str(node.target) if node.op == "call_module" else node.meta.get("path", "")
        return " ".join(filter(None, (node.meta.get("where", ""), f"({path})" if path else "", f"node {node.name}")))

    def _refuse(self, node: fx.Node, why: str, remedy: str) -> NoReturn:
        raise SurgeryError(f"{self._place(node)}: {why}; {remedy}")


def subject_of(node: fx.Node) -> str:
    """What rules call a node that is no module: `module.path:node`, or the parameter's own path."""
    if node.op == "get_attr":
        return str(node.target)
    return f"{node.meta.get('path', '')}:{node.name}"


def _unfoldable(node: fx.Node, network: Network) -> bool:
    value = node.meta["value"]
    return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == network.batch


def _random_like(arg: Any) -> Any:
    value = arg.meta["value"] if isinstance(arg, fx.Node) else arg
    if not isinstance(value, Tensor):
        return value
    generator = torch.Generator().manual_seed(0)
    return torch.randn(value.shape, generator=generator).to(value.dtype)


def _text(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _times(value: int, factor: int) -> int:
    return value * factor


def _with_ndim(x: Tensor, ndim: int) -> Tensor:
    """(N, C) ↔ (N, C, 1, 1), whichever `ndim` asks for."""
    return x.reshape(*x.shape[:ndim], *[1] * (ndim - x.ndim))
