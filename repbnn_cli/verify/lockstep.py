"""Runs the source network, with merged kernels, and the Rep network side by side, and compares them node by node.

The merged-kernel identity (right after a transform, every replica carries the same values): the Rep network computes
what the source network computes when each RepConv is replaced by one with the real-valued kernel

    M[c] = Σ over input replicas of K[c mod O/β, inputs of that replica]         shape (O, I, k...)

on the same binarised input, K being the kernel that the Rep module itself applies. A last layer of full precision that
still takes every source channel is not replaced: it has to give what it gave. After each comparison the Rep network
goes on from the reference's value, so that rounding cannot flip a sign further down and a deviation names the node that
made it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from repbnn_cli import seeds
from repbnn_cli.binary_conv import BinaryConv2d
from repbnn_cli.channels import Compact, Folded, State, Tiled, makes_container, operator_name
from repbnn_cli.graph.probe import ConvCall, ConvCalls
from repbnn_cli.graph.tracer import execute, fetch
from repbnn_cli.inherit import Columns, Kernel, Mean, runs
from repbnn_cli.plan import ModuleEdit, Plan
from repbnn_cli.positions import holds_tensor
from repbnn_cli.rep_layers import first_replica
from repbnn_cli.surgery.walk import subject_of
from repbnn_cli.verify.stand_ins import counting_replicas, filters, holding, per_source_channel, stand_ins

# Of the largest value of a tensor: what a different order of summation may cost.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# The terms of a convolution may cancel; rounding then is a part of them, not of the little that is left: this one.
_CANCELLED = 1e-2

_CONVOLVING = ("rep_conv", "select_inputs")

# What these give is whatever was in memory.
_UNINITIALISED = ("empty", "new", "new_empty", "empty_like")


class StuckError(Exception):
    """The Rep network does not run; `place` is the module or node that fails."""

    def __init__(self, place: str, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        self.place = place


class Lockstep:
    """Source network with merged kernels, and Rep network, node by node.

    foreign: the source has somebody else's code. It is then not run beside the two graphs, because a forward that
    writes to its own tensors would be seen by both; and values are handed on in place, because of views.
    drawing: nodes may draw random numbers, the same on both sides; what is drawn for each replica is the source's.
    """

    def __init__(self, plan: Plan, rep: fx.GraphModule, *, foreign: bool = False, drawing: bool = False) -> None:
        self.plan, self.rep = plan, rep
        self._drawing, self._drawn = drawing, set[fx.Node]()
        self.source_graph = plan.network.graph
        self.edits = {e.path: e for e in plan.edits}
        self._merging = {e.path for e in plan.edits if e.action in _CONVOLVING and not self._has_to_stay(e)}
        self.worst, self.worst_node = 0.0, ""
        self.failed: list[str] = []
        self.compared = 0
        self.unseen: list[str] = []
        self.positions: dict[str, tuple[int, int]] = {}
        self.weights: dict[str, int] = {}
        self.convolutions: dict[str, int] = {}  # of a layer's forward, where the source's has several
        self._kernels: dict[str, list[Tensor]] = {}
        self._terms: dict[str, float] = {}
        self._source: dict[fx.Node, Any] = {}
        self._rep: dict[fx.Node, Any] = {}
        self._mapped: dict[str, list[fx.Node]] = {}
        self._nodes = iter(list(rep.graph.nodes))
        self._unused_rep, self._unused_source = last_uses(rep.graph), last_uses(self.source_graph)
        self._latest: tuple[str, Any, Any] = "", (), None
        self.delta = float("inf")
        self.given: Any = None  # the source's outputs, once both have run
        self._samples = 1
        # Where a forward calls convolutions as functions, its own code cannot be given the merged kernels.
        # Nor where hooks are called around one: they would run for the stand-in, too.
        convolving = [fetch(plan.network.module, path) for path in self._merging]
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in convolving)
        self.partial = foreign or hooked or any(e.layout is not None for e in plan.edits)
        self._foreign = foreign
        self._biases: dict[str, Tensor] = {}

    def run(self, model: nn.Module, inputs: list[Tensor]) -> tuple[Any, Any]:
        """Both outputs: those expected from the source graph (with all replicas where expanded), and the Rep network's.

        The source's own code runs at the same time, with the same merged kernels: whenever it reaches a changed
        convolution, both graphs are run up to there. So no kernel has to be kept, or computed twice.
        """
        for node in self.source_graph.nodes:
            if node.name in self.plan.steps:
                self._mapped.setdefault(self.plan.steps[node.name].node, []).append(node)
        for placeholder, value in zip(_placeholders(self.rep.graph), inputs, strict=True):
            source = next(n for n in self._mapped[placeholder.name] if n.op == "placeholder")
            self._source[source], self._rep[placeholder] = value.clone(), value.clone()
        self._samples = len(inputs[0])
        eager: Any = None
        with contextlib.ExitStack() as stack:
            held = stand_ins(self.plan, self.rep)
            for network in (self.plan.network.module, model):
                stack.enter_context(holding(network, held))
            if not self.partial:
                with contextlib.ExitStack() as merging:
                    for edit in self.edits.values():
                        if edit.path in self._merging:
                            merging.enter_context(self._standing_in(edit, fetch(model, edit.path)))
                    eager = model(*(x.clone() for x in inputs))
            self._advance(None)
        source_out, rep_out = (next(iter(reversed(g.nodes))) for g in (self.source_graph, self.rep.graph))
        self.given = fx.map_arg(source_out.args[0], self._source_value)
        if not self.partial:
            self.delta = difference(eager, self.given)
        return fx.map_arg(source_out.args[0], self._returned), fx.map_arg(rep_out.args[0], lambda n: self._rep[n])

    def _returned(self, node: fx.Node) -> Any:
        if makes_container(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._returned)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        value, step = self._source_value(node), self.plan.steps.get(node.name)
        state = step.state if step is not None else None
        expanded = state is not None and not (isinstance(state, Folded) and state.reduced)
        return torch.cat([value] * self.plan.beta, 1) if expanded and isinstance(value, Tensor) else value

    def _advance(self, path: str | None) -> None:
        """Runs both graphs until a call of the module at `path` has been compared; None: to their ends."""
        for node in self._nodes:
            if node.op in ("placeholder", "output"):
                continue
            if self._drawing:
                seeds.seed(0)
            self._rep[node] = self._run_rep(node)
            for source in self._mapped.get(node.name, ()):
                self._compare(source, node)
                for used in self._unused_source.get(source, ()):
                    self._source.pop(used, None)
            for used in self._unused_rep.get(node, ()):
                self._rep.pop(used, None)
            if path is not None and node.op == "call_module" and node.target == path:
                return

    # -- Rep side ----------------------------------------------------------------------------------------------------
    def _run_rep(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._rep[n])
        path = str(node.target) if node.op == "call_module" else ""
        with ConvCalls() as seen:
            try:
                value = execute(self.rep, node, args, kwargs)
            except Exception as error:
                raise StuckError(path or node.name, error) from error
        if path in self._merging and len(args) > 2 and self.plan.layers[path].called:
            self._biases[path] = cast(Tensor, args[2])
        if path in self._merging:
            self._kernels.clear()  # one layer's at a time: they are as large as the network
            self.weights[path] = sum(c.kernel.numel() for c in seen.calls[:1])
            if self.plan.layers[path].convolutions > 1:
                self.convolutions[path] = len(seen.calls)
            self._kernels[path] = [self._summed(self.edits[path], c.kernel) for c in seen.calls]
            self._terms[path] = max((_sum_of_terms(c) for c in seen.calls), default=0.0)
        return value

    # -- source side -------------------------------------------------------------------------------------------------
    def _source_value(self, node: fx.Node) -> Any:
        """Sizes and other numbers are computed where they are first asked for."""
        if node not in self._source:
            if self._drawing:
                seeds.seed(0)
                before = torch.get_rng_state()
            self._source[node] = self._run_source(node)
            if self._drawing and not torch.equal(torch.get_rng_state(), before):
                self._drawn.add(node)
        return self._source[node]

    def _run_source(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._source_value)
        edit = self.edits.get(str(node.target)) if node.op == "call_module" else None
        if edit is None:
            return execute(self.plan.network.module, node, args, kwargs)
        if edit.path in self._merging and not self._kernels[edit.path]:
            return None
        module: nn.Module = fetch(self.plan.network.module, edit.path)
        layout = edit.layout
        if edit.path in self._biases and isinstance(layout, Kernel):
            shared = per_source_channel(self._biases[edit.path], Mean(0, layout.members), layout.shape[0])
            args = (*args[:2], shared)
        value = self._with_merged_kernels(edit, module, args, kwargs)
        if edit.path in self._merging:
            self._latest = edit.path, args, value
        return value

    @contextlib.contextmanager
    def _standing_in(self, edit: ModuleEdit, module: nn.Module) -> Iterator[None]:
        """While this lasts, the source's convolution computes what it does with the merged kernel."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._advance(edit.path)
            path, seen, value = self._latest
            if path == edit.path and not kwargs and _equal(args, seen):
                return value.clone()  # the same layer on the same numbers
            return self._with_merged_kernels(edit, module, args, kwargs)

        module.__dict__["forward"] = forward
        try:
            yield
        finally:
            del module.__dict__["forward"]

    def _with_merged_kernels(self, edit: ModuleEdit, module: nn.Module, args: Any, kwargs: Any) -> Any:
        # With its hooks, but where a stand-in takes the place of its forward: `model(...)` runs them around that.
        stands_in = edit.path in self._merging and not self.partial
        call = partial(type(module).forward, module) if stands_in else module
        if edit.path in self._merging and not isinstance(module, BinaryConv2d):
            # Its code may use its kernel beside the convolution, and then has to see the Rep network's. If it does not
            # run with kernels of that size, it sees its own, which is right unless it uses them so.
            with (
                contextlib.suppress(Exception),
                holding(self.plan.network.module, filters(edit, self.rep)),
                counting_replicas(module, self.plan.layers[edit.path], self.plan.beta),
                self._merged_kernels(edit, module),
            ):
                return call(*args, **kwargs)
        with self._merged_kernels(edit, module):
            return call(*args, **kwargs)

    @contextlib.contextmanager
    def _merged_kernels(self, edit: ModuleEdit, module: nn.Module) -> Iterator[None]:
        """While this lasts, the source's convolution applies M instead of its own kernel."""
        if not self._kernels.get(edit.path):
            yield
        else:
            summed, out = self._kernels[edit.path], self.plan.layers[edit.path].out_channels
            own = isinstance(module, BinaryConv2d)
            if own:  # without computing the kernel that would be thrown away
                module.__dict__["binary_weight"] = lambda: summed[0]
            try:
                with ConvCalls(lambda i, _: summed[0 if own else i], out):
                    yield
            finally:
                module.__dict__.pop("binary_weight", None)

    def _has_to_stay(self, edit: ModuleEdit) -> bool:
        """A last layer that takes every source channel (ways 1 and 2) and was inherited must act as it did. A binary
        one has no scale of its own to divide by β, and is merged like the convolutions."""
        recipe = edit.way
        if not isinstance(recipe, Columns) or edit.reset or self.plan.layers[edit.path].binary:
            return False
        taken = [column for group in recipe.groups for column in group]
        return len(taken) == len(recipe.groups) and len(set(taken)) == self.plan.layers[edit.path].in_channels

    def _summed(self, edit: ModuleEdit, kernel: Tensor) -> Tensor:
        """Σ over input replicas of a Rep kernel: (O/β, I/groups, k...), for a last layer (O, I, k...).

        M's filter c is filter c mod O/β of it; instead of repeating filters, `ConvCalls` repeats the output.
        """
        recipe: Any = edit.way
        width = torch.Size(self.plan.layers[edit.path].kernel_shape)[1]
        column = tuple(g[0] for g in recipe.groups) if isinstance(recipe, Columns) else recipe.column
        summed = torch.zeros((len(kernel), width, *kernel.shape[2:]), dtype=kernel.dtype, device=kernel.device)
        for start, stop in runs(column):
            summed[:, column[start] : column[start] + stop - start] += kernel[:, start:stop]
        return summed

    # -- comparison --------------------------------------------------------------------------------------------------
    def _compare(self, source: fx.Node, rep: fx.Node) -> None:
        state = self.plan.steps[source.name].state
        actual = self._rep[rep]
        reference = self._source_value(source)
        if source.op == "call_module" and isinstance(reference, Tensor) and isinstance(actual, Tensor):
            layer = self.plan.layers.get(str(source.target))
            sites = reference.shape[2:].numel(), actual.shape[2:].numel()
            called = fetch(self.plan.network.module, str(source.target))
            if layer is not None and (layer.inputs_first or getattr(called, "transposed", False) is True):
                sites = (source.all_input_nodes[0].meta["value"].shape[2:].numel(),) * 2
            elif layer is not None and layer.last_axis:
                rows = reference[..., 0].numel(), actual[..., 0].numel() // self.plan.beta
                sites = rows[0] // self._samples, rows[1] // self._samples
            before, after = self.positions.get(str(source.target), (0, 0))  # of its earlier calls
            self.positions[str(source.target)] = before + sites[0], after + sites[1]
        if source.op == "get_attr" or self.plan.steps[source.name].static or not holds_tensor(actual):
            return
        if reference is None:  # a convolution whose kernel could not be observed: go on from the Rep network's value
            self.unseen.append(str(source.target))
            self._source[source] = self._collapsed(actual, state, source.meta["value"].shape[1])
            return
        pairs = list(zip(tensors_of(actual), tensors_of(reference), strict=True))
        expected = [self._expand(r, state, a) for a, r in pairs]
        arbitrary = (source in self._drawn and state is not None) or operator_name(source) in _UNINITIALISED
        if not self.plan.steps[source.name].by_position and not arbitrary:
            for (tensor, _), wanted in zip(pairs, expected, strict=True):
                self._record(source, tensor, wanted)
            self.compared += 1
        if not (self._foreign and _handed_on(actual, expected)):
            self._rep[rep] = expected[0] if isinstance(actual, Tensor) else type(actual)(expected)

    def _record(self, node: fx.Node, actual: Tensor, wanted: Tensor) -> None:
        if actual.shape != wanted.shape:
            relative = float("inf")
        elif not wanted.is_floating_point() or not wanted.numel():
            relative = 0.0 if torch.equal(actual, wanted) else float("inf")
        else:
            terms = self._terms.get(str(node.target), 0.0) if node.op == "call_module" else 0.0
            least = max(torch.finfo(wanted.dtype).tiny, _CANCELLED * terms)
            largest = wanted.abs().nan_to_num(0, 0).max()  # of the finite ones: attention masks with −inf
            relative = float(_gap(actual, wanted).max() / largest.clamp_min(least))
        place = subject_of(node)
        if not relative <= TOLERANCE.get(wanted.dtype, 2e-4):  # also true for nan
            self.failed.append(place)
        if not relative <= self.worst:
            self.worst, self.worst_node = relative, place

    def _expand(self, tensor: Tensor, state: State, actual: Tensor) -> Tensor:
        """What the Rep network has to hold where the source holds `tensor`; always a tensor of its own."""
        if isinstance(state, Compact):
            return tensor[:, : state.channels].clone()
        if isinstance(state, Tiled):
            return tensor.index_select(1, torch.tensor(state.index, device=tensor.device))
        if isinstance(state, Folded):
            return self._folded(tensor, actual)
        return tensor.clone()

    def _folded(self, tensor: Tensor, actual: Tensor) -> Tensor:
        """Each sample's values β times, whatever else is in axis 0 by now (positions: N·H·W). Where axis 0 holds no
        samples, `actual` itself: it is compared further on, once it is unfolded."""
        samples = self._samples
        if tensor.ndim and not tensor.shape[0] % samples:
            wanted: Tensor = tensor.unflatten(0, (samples, -1)).repeat_interleave(self.plan.beta, 0).flatten(0, 1)
            if wanted.shape == actual.shape:
                return wanted
        return actual

    def _collapsed(self, actual: Tensor, state: State, channels: int) -> Tensor:
        if isinstance(state, Compact):
            return torch.cat([actual] * (channels // state.channels), 1)
        if isinstance(state, Tiled):
            return actual[:, list(state.first)]
        return (first_replica(actual, self.plan.beta) if isinstance(state, Folded) else actual).clone()


def _handed_on(actual: Any, expected: list[Tensor]) -> bool:
    """Writes the expected values into the tensors of `actual`, whose views then have them, too; False if it cannot."""
    own = tensors_of(actual)
    if any(a.shape != e.shape or a.dtype != e.dtype for a, e in zip(own, expected, strict=True)):
        return False
    try:
        for a, e in zip(own, expected, strict=True):
            a.copy_(e)
    except RuntimeError:  # several elements in one place, as after `expand`
        return False
    return True


def _sum_of_terms(call: ConvCall) -> float:
    """What an output of a convolution would come to if none of its terms cancelled another: max |x| · max Σ|K|."""
    return float(call.input.abs().max() * call.kernel.abs().flatten(1).sum(1).max())


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def _equal(a: Any, b: Any) -> bool:
    """Whether two argument lists hold equal tensors and numbers."""
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y) and x == y
        for x, y in zip(a, b, strict=True)
    )


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node → the nodes whose values are needed no more after it.

    Sizes of the source are computed when they are asked for, and what a network returns is put together again, so what
    they are made of has to live until then.
    """
    needs: dict[fx.Node, list[fx.Node]] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        needs[node] = list(node.all_input_nodes)
        for used in node.all_input_nodes:
            numbers = "value" in used.meta and not holds_tensor(used.meta["value"])
            if numbers or makes_container(used):
                needs[node] += needs[used]
        for used in needs[node]:
            last[used] = node
    done: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last.items():
        if node.op != "output":
            done.setdefault(node, []).append(used)
    return done


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, n) for n in value.__dataclass_fields__]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, tuple | list) else []


def difference(a: Any, b: Any) -> float:
    """max |a − b| over all tensors; infinite when shapes or counts differ."""
    left, right = tensors_of(a), tensors_of(b)
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    return largest(float(_gap(x, y).max()) for x, y in zip(left, right, strict=True) if x.numel())


def largest(differences: Iterable[float]) -> float:
    """0.0 of none; nan where one is, which `max` may lose."""
    found = list(differences)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|; 0 where both are the same infinity."""
    return torch.where(a == b, 0, a * 1 - b * 1).abs()
