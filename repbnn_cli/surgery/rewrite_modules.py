"""What becomes of each module on the walk: convolutions, BatchNorm, per-channel layers, the last layer (RepTran)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx, nn

from repbnn_cli import rep_layers
from repbnn_cli.channels import Compact, Folded, Tiled, grouped, kind_of_module, plain
from repbnn_cli.errors import UsageError
from repbnn_cli.graph.static import roots
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.inherit import Columns, Kernel, Mean, Members, Recipe, Tile
from repbnn_cli.recognize import CONVOLUTIONS, Layer
from repbnn_cli.rules import Rule
from repbnn_cli.surgery.operands import CannotTellError, operand_recipes
from repbnn_cli.surgery.rewrite_operators import OperatorWalk
from repbnn_cli.surgery.walk import shape_text


class ModuleWalk(OperatorWalk):
    """Handlers of `call_module` nodes, one for each role and action."""

    def _module(self, node: fx.Node) -> None:
        path = str(node.target)
        layer, rule = self.layers[path], self.rules.get(path)
        expanded = self._expanded(node)
        if not expanded:
            self._unexpanded_module(node, layer, rule)
        elif rule is None:
            if layer.role == "unknown":
                self._refuse(
                    node, f"its input is expanded, and it has no known role: {layer.evidence}", "or end the expansion "
                    f"here (rule file: `rules: {{end: {{part: last_layer, match: {{path: {path}}}, apply: "
                    "select_inputs, share: 1_over_beta}}`)",
                )  # fmt: skip
            self._refuse(node, f"no rule says what becomes of this {layer.role}, whose input is expanded", "add one")
        elif rule.apply == "keep":
            self._refuse(node, f"{rule.where} keeps it as it is, but its input is expanded", "use another action")
        elif layer.role in CONVOLUTIONS:
            operands = [n for n in self._tensors(node) if n not in self._static]
            given = len(self._tensors(node)) if not layer.called else 1
            if len(operands) != 1 or given != 1 or node.args[:1] != (expanded[0],):
                self._refuse(node, "a convolution with several tensor arguments", "split it into two modules")
            if rule.apply == "select_inputs":
                self._select_inputs(node, layer, rule)
            elif rule.apply == "tile":
                self._depthwise(node, layer, rule)
            else:
                self._rep_conv(node, layer, rule)
        elif layer.role == "batch_norm" and layer.last_axis:
            self._per_channel_last(node, layer, rule)
        elif layer.role == "batch_norm":
            self._batch_norm(node, layer, rule)
        elif layer.role == "per_channel":
            self._per_channel(node, layer, rule)
        else:
            module = fetch(self.network.module, path)
            if not self._ends(node, rule, type(module).__name__):
                self._weightless(node, kind_of_module(module), module, rule)

    def _inputs(self, x: fx.Node, layer: Layer) -> tuple[fx.Node, Tiled]:
        """What a convolution takes, and the channel map of it.

        Where channels come last, (N, T, C), the replicas are samples everywhere but in the layers over that axis.
        """
        if not layer.last_axis:
            want = grouped(self._map(x), layer.groups) if layer.groups > 1 else self._map(x)
            return self._reordered(x, want), want
        self._need_samples_first(x, layer)
        return self._as_unfolded_last(x), plain(layer.in_channels, self.beta)

    def _need_samples_first(self, x: fx.Node, layer: Layer) -> None:
        if not self._rows_per_sample(x):
            self._refuse(
                x, f"{layer.path} is a linear layer over the last axis of this, whose first is not the batch",
                "keep the batch first, or apply it to each replica (a rule with `apply: tile`) at β times its cost",
            )  # fmt: skip

    def _unexpanded_module(self, node: fx.Node, layer: Layer, rule: Rule | None) -> None:
        new = self._copy_mapped(node, lambda n: self._made[n].node)
        if rule is None or rule.apply != "repeat_output":
            if rule is not None and rule.apply == "rep_conv":
                self._refuse(
                    node,
                    f"{rule.where} makes it a RepConv, but its input is not expanded",
                    "`apply: keep` leaves it as it is, `apply: repeat_output` starts an expansion here",
                )
            self._keep(node, new, None)
            return
        out = layer.out_channels
        if layer.last_axis:
            self._need_samples_first(node, layer)
            self._keep(node, self._by_rows(rep_layers.repeat_batch, new, node), Folded())
            self._edit(layer, rule, "repeat_output", f"({out})", f"({out * self.beta})", channels=None)
            return
        # Behind a first layer all source channels are there; only the repeat is shared, β times.
        self._keep(node, new, Compact(out, self.beta, out, rule.repeat or "before_batch_norm"))
        self._edit(layer, rule, "repeat_output", f"({out})", f"({out * self.beta})", channels=None)

    def _rep_conv(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        out, beta, groups = layer.out_channels, self.beta, layer.groups
        if out < beta and not layer.binary:  # the one channel of a spatial attention, the squeeze of a small gate
            self._per_replica(node, rule)
            self.notes.append(
                f"{self._place(node)}: has fewer outputs than β = {beta}, so it is applied to each replica, at {beta} "
                "times its cost"
            )
            return
        if (out // groups) % beta:
            per = out // groups
            possible = ", ".join(str(b) for b in range(1, per + 1) if per % b == 0)
            what = f"{out} output channels" if groups == 1 else f"{per} output channels of each of its {groups} groups"
            raise UsageError(
                f"{layer.path}: beta {beta} does not divide its {what}; possible here: {possible}; or a rule for "
                f"it (rule file: `match: {{path: {layer.path}}}`): `apply: tile` applies it to each copy, "
                "`apply: select_inputs` gives it one replica and ends the expansion there"
            )
        x = node.args[0]
        assert isinstance(x, fx.Node)
        source, want = self._inputs(x, layer)
        members = Members(out, beta, "reshape" if self.inherit == "reshape" else "fold", groups)
        width = len(want.index) // groups
        kernel = Kernel(
            layer.kernel_shape,
            members,
            want.index[:width],
            want.replica[:width],
            layer.inputs_first,
        )
        tensors: list[tuple[str, Recipe]] = [(n, kernel) for n in _kernels(layer)]
        tensors += [(n, Mean(axis, members)) for n, axis in layer.out_tensors.items()]
        tensors += [(n, Tile(axis, want.index)) for n, axis in layer.in_tensors.items()]
        self._convolution(node, layer, rule, "rep_conv", kernel.new_shape, tensors, kernel, want.index)
        new = self._copy_mapped(node, lambda n: source if n is x else self._made[n].node)
        if layer.last_axis:
            self._keep(node, self._by_rows(rep_layers.repeat_last, new, node), Folded())
            return
        compact = Compact(out // beta, beta * beta, out, rule.repeat or "before_batch_norm", members)
        if groups == 1:
            self._keep(node, new, compact)
            return
        repeat = self._add(f"{new.name}_repeat", rep_layers.Repeat(beta * beta, groups), new)
        self._keep(node, repeat, grouped(plain(out, beta), groups))

    def _convolution(
        self, node: fx.Node, layer: Layer, rule: Rule, action: str, after: tuple[int, ...],
        tensors: list[tuple[str, Recipe]], way: Kernel | Columns | Tile, index: tuple[int, ...],
    ) -> None:  # fmt: skip
        """The edit of a convolution; of the parameters behind its kernel where it is called as a function.

        after: its kernel's new shape; way: how that is made; index: the source channel of each of its inputs.
        """
        before, text, channels = shape_text(layer.kernel_shape), shape_text(after), (len(index), after[0])
        self._edit(layer, rule, action, before, text, tensors, channels=channels, layout=way if layer.called else None)
        if not layer.called:
            return
        kernel, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        assert isinstance(kernel, fx.Node)
        assert bias is None or isinstance(bias, fx.Node)
        try:
            recipes = operand_recipes(self.network.module, kernel, bias, layer, way, index, after)
        except CannotTellError as error:
            self._refuse(node, f"cannot tell {error}", error.remedy or self._kept_whole(layer, kernel))
        for path, recipe in recipes.items():
            self._parameter_edit(path, rule, recipe)

    def _kept_whole(self, layer: Layer, kernel: fx.Node) -> str:
        """The rule that keeps the module which calls a convolution in one piece, as far as it is known."""
        path = layer.path.rpartition(".")[0]
        size = torch.Size(layer.kernel_shape).numel()
        held = [str(n.target) for n in roots(kernel) if n.meta["value"].numel() == size]
        inside = [name.removeprefix(f"{path}.") for name in held if path and name.startswith(f"{path}.")]
        match = f"path: {path}" if inside else "type: ITS_CLASS"
        rule = f"modules: [{{match: {{{match}}}, role: {layer.role}, kernel: {inside[0] if inside else 'weight'}}}]"
        alike = "; `type:` and its class for all alike" if inside else ""
        return f"keep the module that calls it whole (rule file: `{rule}`{alike})"

    def _flat_kernel(self, layer: Layer) -> str:
        """The kernel that is stored in another layout than (O, I, k...), if one is."""
        module = fetch(self.network.module, layer.path)
        return next((n for n in _kernels(layer) if tuple(fetch(module, n).shape) != layer.stored_shape), "")

    def _depthwise(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        """A depthwise convolution acts per channel: every replica gets a copy of its filters; its cost grows ×β.

        One that mixes channels is applied to each replica as it is, at β times its cost: for the layers of a gate that
        are too narrow to be a RepConv.
        """
        if layer.role != "depthwise_conv" or layer.out_channels != layer.in_channels:
            self._per_replica(node, rule)
            return
        x = node.args[0]
        assert isinstance(x, fx.Node)
        state = self._map(x)
        if flat := self._flat_kernel(layer):
            self._refuse(node, f"keeps its depthwise kernel flat, in {flat}", "store it as (channels, 1, k, k)")
        axes = {**dict.fromkeys(_kernels(layer), 0), **layer.out_tensors, **layer.in_tensors}
        tensors: list[tuple[str, Recipe]] = [(n, Tile(axis, state.index)) for n, axis in axes.items()]
        after = (len(state.index), *layer.kernel_shape[1:])
        self._convolution(node, layer, rule, "depthwise", after, tensors, Tile(0, state.index), state.index)
        source = self._as_tiled(x)
        self._keep(node, self._copy_mapped(node, lambda n: source if n is x else self._made[n].node), state)

    def _batch_norm(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        state = self._made[x].state
        module = fetch(self.network.module, layer.path)
        names = [n for n, t in (*module.named_parameters(), *module.named_buffers())
                 if t.shape == (module.num_features,)]  # fmt: skip
        before = f"({module.num_features})"
        compact = state if isinstance(state, Compact) and type(module) in rep_layers.REP_BATCH_NORMS else None
        if compact is not None and compact.batch_norm == "after_batch_norm":
            if compact.members is not None:
                means: list[tuple[str, Recipe]] = [(n, Mean(0, compact.members)) for n in names]
                width = compact.channels
                self._edit(layer, rule, "batch_norm", before, f"({width})", means, channels=(width, width))
            self._keep(node, self._copy_mapped(node, lambda n: self._made[n].node), compact)
            self._as_tiled(node)
            return
        index = self._map(x)
        action, repeats = ("rep_batch_norm", compact.repeats) if compact is not None else ("batch_norm", 1)
        self._tile(layer, rule, dict.fromkeys(names, 0), index, action, repeats)
        form = (lambda n: self._made[n].node) if compact is not None else self._as_tiled
        self._keep(node, self._copy_mapped(node, form), index)

    def _tile(
        self, layer: Layer, rule: Rule, axes: Mapping[str, int], want: Tiled, action: str = "per_channel",
        repeats: int = 1,
    ) -> None:  # fmt: skip
        """The edit of a module whose tensors (name → axis) get an entry for each expanded channel."""
        tensors: list[tuple[str, Recipe]] = [(n, Tile(axis, want.index)) for n, axis in axes.items()]
        before, width = f"({want.source})", len(want.index)
        self._edit(layer, rule, action, before, f"({width})", tensors, channels=(width, width), repeats=repeats)

    def _per_channel(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        module = fetch(self.network.module, layer.path)
        if isinstance(module, nn.GroupNorm):
            self._group_norm(node, layer, rule)
            return
        if layer.per_replica:  # over the channels of one replica
            self._per_replica(node, rule)
            return
        if isinstance(module, nn.LayerNorm):
            self._layer_norm(node, layer, rule, module)
            return
        if layer.last_axis:
            self._per_channel_last(node, layer, rule)
            return
        maps = [self._map(n) for n in self._expanded(node)]
        if any(m != maps[0] for m in maps) or len(maps) != len(self._tensors(node)):
            self._refuse(
                node, "a per-channel module with inputs of different channel maps", "split it into two modules"
            )
        self._tile(layer, rule, layer.in_tensors, maps[0])
        self._keep(node, self._copy_mapped(node, self._as_tiled), maps[0])

    def _per_channel_last(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        """A module with numbers for channels that come last gets all replicas side by side, and numbers for each."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if not self._rows_per_sample(x) or len(self._tensors(node)) > 1:
            self._per_replica(node, rule)
            return
        self._tile(layer, rule, layer.in_tensors, plain(x.meta["value"].shape[-1], self.beta), layer.role)
        source = self._as_unfolded_last(x)
        new = self._copy_mapped(node, lambda _: source)
        self._keep(node, self._by_rows(rep_layers.fold_last, new, node), Folded())

    def _layer_norm(self, node: fx.Node, layer: Layer, rule: Rule, module: nn.LayerNorm) -> None:
        """Over the channels of one replica, wherever they stand; with parameters of its own where that can be said."""
        x = self._expanded(node)[0]
        plain_one = type(module) is nn.LayerNorm and module.elementwise_affine and len(module.normalized_shape) == 1
        if plain_one and self._rows_per_sample(x):
            axes = {name: 0 for name, _ in module.named_parameters()}
            self._tile(layer, rule, axes, plain(module.normalized_shape[0], self.beta))
            samples = self._samples(x)
            new = self._copy_mapped(node, self._as_folded, folded=True)
            new.args = (*new.args, *samples)
            self._keep(node, new, Folded())
        else:
            self._per_replica(node, rule)

    def _group_norm(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        """Each replica keeps groups of its own, so the replicas have to lie one after the other."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        want = plain(self._map(x).source, self.beta)
        self._tile(layer, rule, layer.in_tensors, want)
        ordered = self._reordered(x, want)
        self._keep(node, self._copy_mapped(node, lambda _: ordered), want)

    def _select_inputs(self, node: fx.Node, layer: Layer, rule: Rule) -> None:
        """The last layer (ways 1 to 3): takes all, 1/β or 1/β² of the expanded inputs; its output is not expanded."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        share = rule.share or self.last_layer
        if layer.groups > 1:
            self._refuse(node, "a grouped last layer", "use a layer without groups")
        source, state = self._inputs(x, layer)
        first_copies = [j for j, r in enumerate(state.replica) if r == 0]
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
            axis = x.meta["value"].ndim - 1 if layer.last_axis else 1
            source = self._add(f"{node.name}_inputs", rep_layers.ChannelSelect(torch.tensor(taken), axis), source)
        if flat := self._flat_kernel(layer):
            self._refuse(node, f"a last layer that keeps its kernel flat, in {flat}", "store it as (out, in)")
        recipe = replace(recipe, axis=0 if layer.inputs_first else 1)
        tensors: list[tuple[str, Recipe]] = [(n, recipe) for n in _kernels(layer)]
        index = tuple(state.index[j] for j in taken)
        tensors += [(n, Tile(a, index)) for n, a in layer.in_tensors.items()]
        after = (layer.out_channels, len(taken), *layer.kernel_shape[2:])
        self._convolution(node, layer, rule, "select_inputs", after, tensors, recipe, index)
        self._keep(node, self._copy_mapped(node, lambda n: source if n is x else self._made[n].node), None)


def _kernels(layer: Layer) -> tuple[str, ...]:
    return (layer.kernel, *layer.same_tensors) if layer.kernel else ()
