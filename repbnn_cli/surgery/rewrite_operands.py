"""What an expanded tensor meets element by element: other tensors, parameters of channels, numbers of kernels."""

from __future__ import annotations

import contextlib
from functools import cached_property

import torch
from torch import Tensor, fx

from repbnn_cli import rep_layers
from repbnn_cli.channels import Compact, Tiled, permutation
from repbnn_cli.graph import kernel_like
from repbnn_cli.graph.static import evaluate, roots
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.inherit import Kernel, Recipe, Tile
from repbnn_cli.recognize import CONVOLUTIONS, Layer
from repbnn_cli.rules import Rule
from repbnn_cli.surgery.walk import Walk, shape_text, subject_of


class OperandWalk(Walk):
    """The forms of operands, and the edits of parameters that a forward uses directly."""

    def _by_filter(self, tensors: list[fx.Node], value: Tensor) -> bool:
        """Whether a RepConv's output meets numbers of its filters (XNOR-Net's mean |W|): they follow from the resized
        kernel, one for each channel before the repeat."""
        states = [self._made[n].state for n in tensors]
        compact = next((s for s in states if isinstance(s, Compact)), None)
        beside = [n for n, s in zip(tensors, states, strict=True) if s is None]
        if compact is None or compact.members is None or not 0 < len(beside) == len(tensors) - 1:
            return False
        axes = {n: 1 - (value.ndim - n.meta["value"].ndim) for n in beside}
        return all(self._is_per_channel(n, value) and self._of_filters(n, axes[n], compact.channels) for n in beside)

    def _of_filters(self, operand: fx.Node, axis: int, channels: int) -> bool:
        """Whether an operand comes to a number for each of so many filters when it is computed from resized kernels."""
        kernels = self._kernels_behind(operand)
        shape = list(operand.meta["value"].shape)
        shape[axis] = channels
        with torch.no_grad(), contextlib.suppress(Exception):  # the user's code on a kernel of another size
            resized = {path: r(fetch(self.network.module, path).detach()) for path, (r, _) in kernels.items()}
            return bool(kernels) and list(evaluate(self.network.module, operand, resized).shape) == shape
        return False

    def _kernels_behind(self, operand: fx.Node) -> dict[str, tuple[Kernel, str]]:
        """Path → recipe and new shape of the RepConv kernels that an operand is computed from."""
        paths = {str(root.target) for root in roots(operand)}
        edits = [(e.tensor_path(name), r, e.after) for e in self.edits.values() for name, r in e.tensors]
        return {path: (r, after) for path, r, after in edits if path in paths and isinstance(r, Kernel)}

    def _beside(self, node: fx.Node, operand: fx.Node, value: Tensor, want: Tiled) -> fx.Node:
        """An operand in the form that fits the map `want` of the result."""
        made, shape = self._made[operand], operand.meta["value"].shape
        if made.state is not None and len(shape) == value.ndim and shape[1] < want.source:  # of each replica, for all
            order = rep_layers.ChannelSelect(torch.tensor(want.replica))
            return self._add(f"{made.node.name}_expand", order, self._as_tiled(operand))
        if made.state is not None:
            return self._reordered(operand, want)
        axis = 1 - (value.ndim - len(shape))
        if axis < 0 or shape[axis] == 1:
            return made.node
        if operand in self._static:
            return self._beside_static(node, operand, axis, want)
        select = rep_layers.ChannelSelect(torch.tensor(want.index), axis)
        return self._add(f"{made.node.name}_expand", select, made.node)

    def _beside_static(self, node: fx.Node, operand: fx.Node, axis: int, want: Tiled) -> fx.Node:
        """Per-channel parameters, or what is computed from them: tiled at their roots, so that the copies can drift
        apart; where that is not the same (`self.scale.view(1, 64, 1, 1)`), the operand itself is repeated."""
        new, paths = self._made[operand].node, [str(root.target) for root in roots(operand)]
        for path, (recipe, after) in self._kernels_behind(operand).items():
            filters = recipe.filter_of_channel
            if want.source == len(filters) and self._of_filters(operand, axis, recipe.new_shape[0]):
                chosen = torch.tensor([filters[channel] for channel in want.index])
                return self._add(f"{new.name}_expand", rep_layers.ChannelSelect(chosen, axis), new)
            self._refuse(
                node, f"takes a number per channel from {path}, which becomes a RepConv's kernel {after}; none per "
                "channel follows from that here", "multiply the convolution's own output by it, and write no size "
                "down (`view(1, -1, 1, 1)`)",
            )  # fmt: skip
        have = next((self._tiled_as[p] for p in paths if p in self._tiled_as), want)
        if self._tile_roots(operand, axis, have):
            order = permutation(have, want)
            if have == want or order is None:
                return new
            return self._add(f"{new.name}_reorder", rep_layers.ChannelSelect(torch.tensor(order), axis), new)
        for path in paths:
            self._read_whole[path] = node
        return self._add(f"{new.name}_expand", rep_layers.ChannelSelect(torch.tensor(want.index), axis), new)

    @cached_property
    def _kernels(self) -> set[str]:
        """The paths of what convolutions that mix channels hold their kernels in."""
        found: set[str] = set()
        for node in self.network.graph.nodes:
            layer = self.layers.get(str(node.target)) if node.op == "call_module" else None
            if layer is not None and layer.role in CONVOLUTIONS and layer.role != "depthwise_conv":
                held = roots(node.all_input_nodes[1]) if layer.called and len(node.all_input_nodes) > 1 else []
                found |= {str(n.target) for n in held if kernel_like(n.meta["value"])}
                found |= {f"{layer.path}.{layer.kernel}"} if layer.kernel else set()
        return found

    def _tile_roots(self, operand: fx.Node, axis: int, want: Tiled) -> bool:
        """Whether tiling the parameters behind an operand tiles the operand; tried, and then planned."""
        module, size = self.network.module, operand.meta["value"].shape[axis]
        tiles: dict[str, Recipe] = {}
        for root in roots(operand):
            if str(root.target) in self._kernels:  # a RepConv's, whose numbers of filters follow from it alone
                return False
            axes = [a for a, n in enumerate(root.meta["value"].shape) if n == size]
            rule = self.rules.get(subject_of(root))
            if axes and rule is not None and rule.apply == "tile":
                tiles[str(root.target)] = Tile(axes[0], want.index)
        try:
            with torch.no_grad():
                tiled = {path: tile(fetch(module, path).detach()) for path, tile in tiles.items()}
                got = evaluate(module, operand, tiled)
                wanted = Tile(axis, want.index)(evaluate(module, operand, {}))
        except Exception:  # the user's code on tensors of other sizes
            return False
        if not tiles or got.shape != wanted.shape or not torch.equal(got, wanted):
            return False
        for path, tile in tiles.items():
            self._tiled_as[path] = want
            self._parameter_edit(path, self.rules[path], tile)
        return True

    def _is_per_channel(self, operand: fx.Node, value: Tensor) -> bool:
        shape = operand.meta["value"].shape
        axis = 1 - (value.ndim - len(shape))
        return operand in self._static and axis >= 0 and shape[axis] > 1

    def _parameter_edit(self, path: str, rule: Rule, recipe: Recipe) -> None:
        """A parameter that a forward uses directly."""
        tensor: Tensor = fetch(self.network.module, path)
        layer = Layer(path, "per_channel", "a parameter that a forward uses directly")
        with torch.no_grad():
            after = recipe(tensor.detach()).shape
        before = tuple(tensor.shape)
        name = path.rpartition(".")[2]
        self._edit(layer, rule, "parameter", shape_text(before), shape_text(after), [(name, recipe)], channels=None)
