"""What becomes of functions, methods and modules without parameters on the walk, by what they do to channels."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from repbnn_cli import rep_layers
from repbnn_cli.channels import (
    Compact,
    Folded,
    Tiled,
    adds_trailing_ones,
    concatenated,
    flattened,
    is_flatten,
    is_patches,
    kind_of_call,
    makes_container,
    operator_name,
    plain,
    reduces_channels,
)
from repbnn_cli.graph import Network
from repbnn_cli.graph.probe import CALLED_CONVOLUTIONS
from repbnn_cli.graph.proxies import is_write
from repbnn_cli.graph.static import evaluate, roots
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.positions import PRODUCTS, is_other_layer
from repbnn_cli.recognize import Layer
from repbnn_cli.recognize.trials import acts_per_sample, commutes, random_like
from repbnn_cli.rules import Rule
from repbnn_cli.surgery.rewrite_operands import OperandWalk
from repbnn_cli.surgery.walk import Made, shape_text, subject_of


class OperatorWalk(OperandWalk):
    """Handlers of functions and methods, and of modules that hold no tensors."""

    def _call(self, node: fx.Node) -> None:
        if not self._expanded(node):
            like = self._size_taken(node)
            state = self._map(like) if like is not None else None
            self._keep(node, self._copy_mapped(node, lambda n: self._made[n].node), state)
            return
        if makes_container(node):  # what a forward returns, `Out(logits=..., features=...)`
            self._made[node] = Made(self._copy_mapped(node, self._output), None)
            return
        kind = kind_of_call(node)
        rule = self.rules.get(subject_of(node))
        if self._ends(node, rule, operator_name(node)):
            return
        if kind == "total" and rule is not None and rule.apply == "tile":
            operands = self._tensors(node)
            folded = any(self._made[n].state is None or isinstance(self._made[n].state, Folded) for n in operands)
            form = self._as_folded if folded else (lambda n: self._reordered(n, self._map(operands[0])))
            self._keep(node, self._copy_mapped(node, form, folded=folded), None)
        elif kind == "samples" and isinstance(node.args[0], fx.Node):
            self._need_rule(node, rule)
            self._keep(node, self._copy_mapped(node, self._as_tiled), self._map(node.args[0]))
        elif kind == "rows" and self._as_channels(node):
            self._need_rule(node, rule)
            self._keep(node, self._copy_mapped(node, self._as_tiled), self._map(self._expanded(node)[0]))
        elif kind == "concatenate":
            self._need_rule(node, rule)
            self._concatenate(node)
        elif kind == "opaque":
            self._weightless(node, kind, _callable(node), rule)
        else:
            self._weightless(node, kind, None, rule)

    def _ends(self, node: fx.Node, rule: Rule | None, what: str) -> bool:
        """Whether a rule ends the expansion at what is no convolution: it then takes one replica and stays as it is."""
        if rule is None or rule.apply != "select_inputs":
            return False
        if (rule.share or self.last_layer) != "1_over_beta":
            self._refuse(
                node, f"{what} ends the expansion ({rule.where} {rule.name}), and is no convolution or linear layer "
                "that could take β times as many inputs", "`--last-layer 1_over_beta`, or `share: 1_over_beta` in the "
                "rule, gives it one replica of each channel",
            )  # fmt: skip
        ended: dict[fx.Node, fx.Node] = {}
        for operand in self._expanded(node):
            state, value = self._made[operand].state, operand.meta["value"]
            if isinstance(state, Folded) and not unfoldable(operand, self.network):
                self._refuse(node, f"{what} ends the expansion where the batch is not the first axis", "end it before")
            if isinstance(state, Folded):
                one = self.graph.call_function(rep_layers.first_replica, (self._made[operand].node, self.beta))
            elif not isinstance(value, Tensor):
                self._refuse(node, f"{what} ends the expansion and takes a tuple of tensors", "end it behind")
            else:
                first = torch.tensor(self._map(operand).first)
                one = self._add(f"{node.name}_inputs", rep_layers.ChannelSelect(first), self._as_tiled(operand))
            # A selection leaves gaps in memory, where the source's own code may `.view` a tensor without any.
            ended[operand] = self.graph.call_method("contiguous", (one,))
        new = self._copy_mapped(node, lambda n: ended.get(n, self._made[n].node))
        self._keep(node, new, None)
        self._plain_edit(node, rule, "first_replica")
        return True

    def _as_channels(self, node: fx.Node) -> bool:
        """Whether the replicas are channels in all expanded tensors that a node takes, and no rows of axis 0."""
        return all(isinstance(self._made[n].state, Tiled | Compact) for n in self._expanded(node))

    def _need_rule(self, node: fx.Node, rule: Rule | None) -> None:
        if rule is None or rule.apply != "tile":
            self._refuse(
                node, f"no rule lets {operator_name(node)} carry expanded channels", "add one for the role `weightless`"
            )

    def _weightless(self, node: fx.Node, kind: str, call: Callable[..., Any] | None, rule: Rule | None) -> None:
        self._need_rule(node, rule)
        first = self._expanded(node)[0]
        if self._is_part(node, first):
            self._keep(node, self._copy_mapped(node, lambda n: self._made[n].node), self._made[first].state)
            return
        if self._reshaped(node, first, kind, call):
            return
        if kind == "opaque":
            kind = self._test(node, call)
        if kind == "per_channel":
            self._with_parameters(node)
        elif kind == "pointwise":
            self._pointwise(node)
        elif kind in ("spatial", "random"):
            self._carry_one(node, random=kind == "random")
        elif rule is not None and (
            node.meta.get("convs") or is_other_layer(self.network, self.layers, self._static, node)
        ):  # a fixed filter, an attention: at β times its cost
            self._per_replica(node, rule)
        else:
            self._fold(node)

    def _reshaped(self, node: fx.Node, x: fx.Node, kind: str, call: Callable[..., Any] | None) -> bool:
        """Carries what writes the channels of x in another shape, without folding; False for all other operators."""
        before, after, state = x.meta["value"], node.meta["value"], self._made[x].state
        alone = len(self._tensors(node)) == 1 and not (isinstance(state, Folded) and state.reduced)
        unfolds = isinstance(call, nn.Unfold) or node.target is F.unfold
        if not alone or not (isinstance(before, Tensor) and isinstance(after, Tensor)):
            return False
        if kind not in ("fold", "flatten") and not unfolds:
            return False
        if is_flatten(before, after):
            new = self.graph.call_function(torch.flatten, (self._as_tiled(x), 1))
            new.meta = {k: node.meta[k] for k in ("where", "path")}
            self._keep(node, new, flattened(self._map(x), after.shape[1] // before.shape[1]))
        elif is_patches(node, before, after, call if isinstance(call, nn.Module) else None):
            size = after.shape[1] // before.shape[1]
            self._keep(node, self._copy_mapped(node, self._as_tiled), flattened(self._map(x), size))
        elif adds_trailing_ones(before, after):
            new = self.graph.call_function(_with_ndim, (self._as_tiled(x), after.ndim))
            self._keep(node, new, self._map(x))
        else:
            return False
        return True

    def _per_replica(self, node: fx.Node, rule: Rule) -> None:
        """Applied to each replica as it is, at β times its cost, which the plan has to say."""
        self._plain_edit(node, rule, "per_replica")
        self._fold(node)

    def _plain_edit(self, node: fx.Node, rule: Rule, action: str) -> None:
        """The row of a module or operator that keeps what it is and has."""
        path = subject_of(node)
        layer = self.layers.get(path) or Layer(path, "weightless", operator_name(node))
        held = fetch(self.network.module, path).parameters() if node.op == "call_module" else (
            n.meta["value"] for n in node.all_input_nodes if n in self._static)  # fmt: skip
        shapes = [tuple(t.shape) for t in held if isinstance(t, Tensor)]
        size = shape_text(max(shapes, key=lambda shape: torch.Size(shape).numel(), default=()))
        self._edit(layer, rule, action, size, size, channels=None)

    def _test(self, node: fx.Node, call: Callable[..., Any] | None) -> str:
        """An operator in no table: found out by running it on random numbers."""
        operands = self._tensors(node)
        varied = [n for n in operands if n not in self._static]
        held = {n: evaluate(self.network.module, n, {}) for n in operands if n in self._static}

        def run(*inputs: Any, beside: dict[fx.Node, Any] | None = None) -> Any:
            given = dict(zip(varied, inputs, strict=True)) | (beside or held)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: given.get(n, n.meta["value"]))
            return call(*args, **kwargs) if call is not None else None

        inputs = random_like(varied)
        try:
            if call is not None and held and self._takes_tiled(node, run, varied, held):
                return "per_channel"
            with contextlib.suppress(Exception):  # it may know how many channels it takes, and still act per sample
                if call is not None and commutes(run, inputs):
                    return "pointwise"
            if call is not None and acts_per_sample(run, inputs):
                return "fold"
            # `torch.stack(branches, 0).sum(0)`: the samples are along axis 1 meanwhile.
            if call is not None and all(map(_is_stack, varied)) and acts_per_sample(run, inputs, axis=1):
                return "fold"
        except Exception as error:  # the user's code on inputs it may not expect
            self._refuse(node, f"failed on a random input ({type(error).__name__}: {error})", "declare what it is")
        what = node.target if node.op == "call_module" else operator_name(node)
        if node.target in CALLED_CONVOLUTIONS:
            ends = ", ".join(f'"{path}"' for path in self._ending(node))
            name = f"end-{node.name.lower().replace('_', '-')}"
            self._refuse(
                node, f"{what} applies a kernel that is computed from the input; a RepConv is made from one kernel "
                "for all inputs", "give this layer a kernel of its own; or, where it stands at the end, as in a "
                f"tracker, give it one replica of what it takes (rule file: `rules: {{{name}: "
                f"{{part: last_layer, match: {{path: [{ends}]}}, apply: select_inputs, share: 1_over_beta}}}}`)",
            )  # fmt: skip
        return self._refuse(
            node, f"{what} mixes channels in a way that is not known", "write it with torch functions, or as a module "
            "whose role a rule file declares",
        )  # fmt: skip

    def _ending(self, node: fx.Node) -> list[str]:
        """Paths of what would end the expansion before a node takes anything expanded."""
        found = []
        for operand in self._expanded(node):
            folded = isinstance(self._made[operand].state, Folded)
            found += self._ending(operand) if folded and not unfoldable(operand, self.network) else [subject_of(node)]
        return list(dict.fromkeys(found))

    def _takes_tiled(
        self, node: fx.Node, run: Callable[..., Any], varied: list[fx.Node], held: dict[fx.Node, Any]
    ) -> bool:
        """Whether a function with per-channel parameters (F.batch_norm) gives tiled channels when these are tiled."""
        x, value = random_like(varied)[0], node.meta["value"]
        if len(varied) != 1 or not isinstance(value, Tensor) or x.ndim < 2 or value.shape != x.shape:
            return False
        order = torch.arange(x.shape[1]).flip(0).repeat(2)
        axes = {n: _channel_axis(t, x) for n, t in held.items() if isinstance(t, Tensor)}
        tiled = held | {n: held[n].index_select(axis, order) for n, axis in axes.items() if axis is not None}
        if all(tiled[n] is held[n] for n in held):
            return False
        with torch.no_grad(), contextlib.suppress(Exception):
            return torch.allclose(run(x[:, order], beside=tiled), run(x)[:, order], rtol=1e-5, atol=1e-6)
        return False

    def _with_parameters(self, node: fx.Node) -> None:
        """A function with per-channel parameters: everything tiled."""
        x = self._expanded(node)[0]
        want, value = self._map(x), x.meta["value"]

        def operand(n: fx.Node) -> fx.Node:
            if n is x:
                return self._as_tiled(x)
            axis = _channel_axis(n.meta["value"], value)
            return self._made[n].node if axis is None else self._beside_static(node, n, axis, want)

        self._keep(node, self._copy_mapped(node, operand), want)

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
        if len(tensors) == 1 or self._by_filter(tensors, value):
            return self._carry_one(node, random=False)
        folds = any(
            isinstance(self._made[n].state, Folded)
            or (self._made[n].state is not None and n.meta["value"].shape[1:2] != value.shape[1:2])
            or (self._made[n].state is not None and n.meta["value"].ndim != value.ndim)
            for n in tensors
        )
        unfolds = all(
            isinstance(self._made[n].state, Folded)
            and n.meta["value"].shape[:2] == value.shape[:2]
            and unfoldable(n, self.network)
            for n in tensors
        )
        if folds and not unfolds and not any(self._is_per_channel(n, value) for n in tensors):
            return None if self._pointwise_last(node) else self._fold(node)
        expanded = self._expanded(node)
        rule = self.rules.get(subject_of(node))
        positional = rule is not None and rule.align == "position"
        # One value for all channels, XNOR-Net's K, has no map of its own.
        maps = [self._map(n) for n in expanded if n.meta["value"].shape[1:2] == value.shape[1:2]]
        maps = maps or [plain(value.shape[1], self.beta)]
        # Back to the plain map where there is a choice: RepConvs give it, and each sum with one would reorder again.
        want = next((m for m in maps if m.plain != positional), maps[0])
        as_they_come = positional and any(m != want for m in maps)
        if as_they_come:
            self.by_position.append(node.name)
            new = self._copy_mapped(node, lambda n: self._as_tiled(n) if n in expanded else self._made[n].node)
        else:
            new = self._copy_mapped(node, lambda n: self._beside(node, n, value, want))
        return self._keep(node, new, want, by_position=as_they_come)

    def _pointwise_last(self, node: fx.Node) -> bool:
        """Beside parameters of the channels, where these come last, (N, T, C): each replica gets parameters of its own.

        False, with nothing done, where there are none such or they cannot be tiled.
        """
        value, expanded = node.meta["value"], self._expanded(node)
        beside = [n for n in self._tensors(node) if n not in expanded]
        per_channel = [n for n in beside if _is_along_last(n.meta["value"], value)]
        alone = all(self._rows_per_sample(n) and n.meta["value"].shape == value.shape for n in expanded)
        if not per_channel or not alone or len(per_channel) < len(beside) or not self._static.issuperset(per_channel):
            return False
        want = plain(value.shape[-1], self.beta)
        for n in per_channel:
            if not self._tile_roots(n, n.meta["value"].ndim - 1, want):
                self._read_whole.update({str(root.target): node for root in roots(n)})
                return False
        new = self._copy_mapped(node, lambda n: self._as_unfolded_last(n) if n in expanded else self._made[n].node)
        self._keep(node, self._by_rows(rep_layers.fold_last, new, node), Folded())
        return True

    def _concatenate(self, node: fx.Node) -> None:
        tensors = self._tensors(node)
        value = node.meta["value"]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        axis = int(dim) % value.ndim  # type: ignore[arg-type]
        if axis == 0 and self._as_channels(node):
            want = self._map(self._expanded(node)[0])
            return self._keep(node, self._copy_mapped(node, lambda n: self._beside(node, n, value, want)), want)
        if axis == 0 or any(
            isinstance(self._made[n].state, Folded) and not unfoldable(n, self.network) for n in tensors
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
        state = concatenated([states[n] for n in sequence])  # type: ignore[union-attr, index]
        return self._keep(node, self._copy_mapped(node, operand), state)

    def _fold(self, node: fx.Node) -> None:
        for n in self._expanded(node):
            if isinstance(self._made[n].state, Tiled | Compact) and not isinstance(n.meta["value"], Tensor):
                self._refuse(node, "takes a tuple of expanded tensors", "unpack it first")
        states = [self._made[n].state for n in self._expanded(node)]
        if operator_name(node) in PRODUCTS and self._static.isdisjoint(self._tensors(node)):
            self.products.append(node)
        value = node.meta["value"]
        reduced = reduces_channels(node) or all(isinstance(s, Folded) and s.reduced for s in states)
        reduced = reduced or (isinstance(value, Tensor) and value.ndim < 2)
        self._keep(node, self._copy_mapped(node, self._as_folded, folded=True), Folded(reduced))

    def _is_part(self, node: fx.Node, of: fx.Node) -> bool:
        """Whether a node takes one tensor out of a tuple (values or indices of max(dim)) that has the same channels."""
        value = node.meta["value"]
        reads = node.op == "call_function" and node.target in (operator.getitem, getattr)
        return (
            reads
            and not isinstance(of.meta["value"], Tensor)
            and isinstance(value, Tensor)
            and isinstance(state := self._made[of].state, Tiled)
            and value.ndim > 1
            and value.shape[1] * self.beta == len(state.index)
        )


def _callable(node: fx.Node) -> Any:
    """What an operator calls, to be tried on other tensors; None for methods that write to theirs."""
    if node.op == "call_function":
        return node.target
    return None if is_write(node) else getattr(Tensor, str(node.target), None)


def _is_stack(node: fx.Node) -> bool:
    """Whether tensors were stacked along a new first axis, in front of the samples."""
    return node.target is torch.stack and bool((*node.args[1:], *node.kwargs.values(), 0)[0] == 0)


def unfoldable(node: fx.Node, network: Network) -> bool:
    """Whether the samples of a tensor come first, so that replicas among them can become channels again."""
    value = node.meta["value"]
    return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == network.batch


def _is_along_last(tensor: Tensor, x: Tensor) -> bool:
    """Whether a tensor that x meets, element by element, has one value for each entry of its last axis."""
    return x.ndim > 2 and tensor.ndim > 0 and tensor.numel() == tensor.shape[-1] == x.shape[-1] > 1


def _channel_axis(tensor: Tensor, x: Tensor) -> int | None:
    """The axis of a parameter that runs over the channels of x, if any."""
    if tensor.ndim == x.ndim and tensor.shape[1] == x.shape[1]:
        return 1
    return 0 if 0 < tensor.ndim < x.ndim and tensor.shape[0] == x.shape[1] and tensor.numel() > 1 else None


def _with_ndim(x: Tensor, ndim: int) -> Tensor:
    """(N, C) ↔ (N, C, 1, 1), whichever `ndim` asks for."""
    return x.reshape(*x.shape[:ndim], *[1] * (ndim - x.ndim))
