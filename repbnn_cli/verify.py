"""Checks of a transform, and the certificate that they make.

The merged-kernel identity (right after a transform, every replica carries the same values): the Rep network computes
what the source network computes when each RepConv is replaced by one with the real-valued kernel

    M[c] = Σ over input replicas of K[c mod O/β, inputs of that replica]         shape (O, I, k...)

on the same binarised input, K being the kernel that the Rep module itself applies. Both networks run side by side here,
node by node; after each comparison the Rep network goes on from the reference's value, so that rounding cannot flip a
sign further down and a deviation names the node that made it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.channels import Compact, Folded, State, Tiled
from repbnn_cli.graph import unchanged
from repbnn_cli.inherit import Mean
from repbnn_cli.plan import ModuleEdit, Plan
from repbnn_cli.positions import holds_tensor
from repbnn_cli.probe import ConvCalls
from repbnn_cli.tracer import fetch

# Of the largest value of a tensor: what a different order of summation may cost.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Check:
    """One check: what was compared, whether it holds, the figures behind it."""

    name: str
    passed: bool
    summary: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Certificate:
    """All checks of one transform, in the order they ran."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.checks)

    def as_plain(self) -> list[dict[str, Any]]:
        return [{"name": c.name, "passed": c.passed, "summary": c.summary, "values": c.values} for c in self.checks]


def verify(model: nn.Module, plan: Plan, rep: nn.Module, *, gradients: bool, batch: int | None = None) -> Certificate:
    """Runs all checks on random input; `model` is the source network, `rep` what `surgery.apply` gave for `plan`.

    gradients: also compare captured and source network in training mode, outputs and every parameter's gradient.
    batch: samples of the random input (default: as many as the capture used).
    """
    network = plan.network
    like = next(iter(model.parameters()), torch.zeros(()))
    generator = torch.Generator(device=like.device).manual_seed(1)
    inputs = [
        torch.randn((batch or s[0], *s[1:]), generator=generator, device=like.device, dtype=like.dtype)
        for s in network.example
    ]
    checks = []
    # Only foreign code can change tensors while it runs; copying all of a large network's weights to be safe costs.
    guard = unchanged(model) if gradients else contextlib.nullcontext()
    with guard, _evaluating(model, network.module, rep), torch.no_grad():
        checks.append(_captured(model, network.module, inputs))
        run = _Lockstep(plan, rep)
        outputs = run.run(inputs)
        checks += [_shapes(outputs), _costs(plan, rep, run), run.check()]
    if gradients:
        checks.insert(1, _training(model, network.module, inputs))
    return Certificate(tuple(checks))


@contextlib.contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, n) for n in value.__dataclass_fields__]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, tuple | list) else []


def _difference(a: Any, b: Any) -> float:
    """max |a − b| over all tensors; infinite when shapes or counts differ."""
    left, right = tensors_of(a), tensors_of(b)
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    return max((float((x - y).abs().max()) for x, y in zip(left, right, strict=True) if x.numel()), default=0.0)


def _captured(model: nn.Module, captured: nn.Module, inputs: list[Tensor]) -> Check:
    delta = _difference(model(*inputs), captured(*inputs))
    return Check("captured = source", delta == 0.0, f"max |Δ| = {delta:.3g} in eval mode", {"max_abs": delta})


def _training(model: nn.Module, captured: nn.Module, inputs: list[Tensor]) -> Check:
    """Outputs and gradients in training mode, each side from the same state and random numbers."""
    worst, where = 0.0, "outputs"
    results = []
    for network in (model, captured):
        with unchanged(model), torch.enable_grad():
            was = [(p, p.grad) for p in model.parameters()]
            for m in (model, captured):
                m.train()
            for p, _ in was:
                p.grad = None
            torch.manual_seed(0)
            outputs = tensors_of(network(*inputs))
            loss = sum(((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype, device=o.device).view_as(o)).sum())
                       for o in outputs if o.is_floating_point())  # fmt: skip
            loss.backward()  # type: ignore[union-attr]
            results.append((outputs, {n: p.grad for n, p in model.named_parameters()}))
            for p, grad in was:
                p.grad = grad
    (out_a, grads_a), (out_b, grads_b) = results
    worst = _difference([o.detach() for o in out_a], [o.detach() for o in out_b])
    for name, grad in grads_a.items():
        other = grads_b[name]
        delta = float("inf") if (grad is None) != (other is None) else 0.0
        if grad is not None and other is not None:
            delta = float((grad - other).abs().max() / grad.abs().max().clamp_min(1e-30))
        if delta > worst:
            worst, where = delta, name
    summary = f"max |Δ| = {worst:.3g} ({where}) in training mode, {len(grads_a)} gradients compared"
    return Check("captured learns as source", worst <= 1e-5, summary, {"max": worst, "where": where})


def _shapes(outputs: tuple[Any, Any]) -> Check:
    source, rep = ([tuple(t.shape) for t in tensors_of(o)] for o in outputs)
    return Check("output shapes", source == rep, f"{source} → {rep}", {"source": source, "rep": rep})


def _costs(plan: Plan, rep: nn.Module, run: _Lockstep) -> Check:
    """Weights and MACs of every RepConv against the convolution it came from."""
    weights = [0, 0]
    macs = [0, 0]
    grown = [e.path for e in plan.edits if e.action == "depthwise"]
    for edit in plan.edits:
        if edit.action != "rep_conv":
            continue
        layer = plan.layers[edit.path]
        before = torch.Size(layer.kernel_shape).numel()
        after = fetch(rep, f"{edit.path}.{layer.kernel}").numel()
        sites = run.positions.get(edit.path, (0, 0))
        weights[0] += before
        weights[1] += after
        macs[0] += before * sites[0]
        macs[1] += after * sites[1]
    passed = weights[0] == weights[1] and macs[0] == macs[1]
    text = f"weights {weights[0]:,} → {weights[1]:,}; MACs {macs[0]:,} → {macs[1]:,}"
    if grown:
        text += f"; depthwise layers grow ×{plan.beta}: {', '.join(grown)}"
    values = {"weights": weights, "macs": macs, "depthwise": grown}
    return Check("convolution cost unchanged", passed, text, values)


class _Lockstep:
    """Source network with merged kernels, and Rep network, node by node."""

    def __init__(self, plan: Plan, rep: nn.Module) -> None:
        self.plan, self.rep = plan, rep
        self.source_graph = plan.network.graph
        self.edits = {e.path: e for e in plan.edits}
        self.worst, self.worst_node = 0.0, ""
        self.failed: list[str] = []
        self.compared = 0
        self.unseen: list[str] = []
        self.positions: dict[str, tuple[int, int]] = {}
        self._kernels: dict[str, list[Tensor]] = {}
        self._source: dict[fx.Node, Any] = {}
        self._rep: dict[fx.Node, Any] = {}

    def run(self, inputs: list[Tensor]) -> tuple[Any, Any]:
        """Both outputs, the source's and the Rep network's."""
        mapped: dict[str, list[fx.Node]] = {}
        for node in self.source_graph.nodes:
            if node.name in self.plan.steps:
                mapped.setdefault(self.plan.steps[node.name].node, []).append(node)
        remaining = iter(inputs)
        last_use = _last_uses(self.rep.graph), _last_uses(self.source_graph)  # type: ignore[arg-type]
        for node in self.rep.graph.nodes:  # type: ignore[union-attr]
            if node.op == "placeholder":
                value = next(remaining)
                source = next(n for n in mapped[node.name] if n.op == "placeholder")
                self._source[source], self._rep[node] = value.clone(), value
                continue
            if node.op == "output":
                break
            self._rep[node] = self._run_rep(node)
            for source in mapped.get(node.name, ()):
                self._compare(source, node)
            for used in last_use[0].get(node, ()):
                self._rep.pop(used, None)
        outputs = (next(n for n in reversed(g.nodes) if n.op == "output") for g in (self.source_graph, self.rep.graph))  # type: ignore[union-attr]
        source_out, rep_out = outputs
        return fx.map_arg(source_out.args[0], self._source_value), fx.map_arg(rep_out.args[0], lambda n: self._rep[n])

    def check(self) -> Check:
        convolutions = sum(e.action in ("rep_conv", "select_inputs") for e in self.plan.edits)
        passed = not self.failed
        if self.failed:
            text = f"max relative |Δ| = {self.worst:.3g} at {self.worst_node}; fails at {', '.join(self.failed[:3])}"
        else:
            text = f"max relative |Δ| = {self.worst:.3g} over {self.compared} tensors, {convolutions} kernels"
        if self.unseen:
            text += f"; kernel not observable: {', '.join(self.unseen)}"
        values = {"max_relative": self.worst, "worst": self.worst_node, "tensors": self.compared, "failed": self.failed,
                  "unseen": self.unseen}  # fmt: skip
        return Check("merged-kernel identity", passed, text, values)

    # -- Rep side ----------------------------------------------------------------------------------------------------
    def _run_rep(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._rep[n])
        if node.op == "call_module" and str(node.target) in self.edits:
            with ConvCalls() as seen:
                value = fetch(self.rep, str(node.target))(*args, **kwargs)
            self._kernels[str(node.target)] = [c.kernel for c in seen.calls]
            return value
        return _execute(self.rep, node, args, kwargs)

    # -- source side -------------------------------------------------------------------------------------------------
    def _source_value(self, node: fx.Node) -> Any:
        """Sizes and other numbers are computed where they are first asked for."""
        if node not in self._source:
            self._source[node] = self._run_source(node)
        return self._source[node]

    def _run_source(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._source_value)
        edit = self.edits.get(str(node.target)) if node.op == "call_module" else None
        if edit is None:
            return _execute(self.plan.network.module, node, args, kwargs)
        module = self._reference(edit)
        if edit.action not in ("rep_conv", "select_inputs"):
            return module(*args, **kwargs)
        kernels = self._kernels[edit.path]
        if not kernels:
            return None
        with ConvCalls(lambda i, kernel: self._merged(edit, kernels[i], kernel)):
            return module(*args, **kwargs)

    def _reference(self, edit: ModuleEdit) -> nn.Module:
        """The source module, with tensors that several channels now share set to what they share."""
        module: nn.Module = fetch(self.plan.network.module, edit.path)
        shared = [(n, r) for n, r in edit.tensors if isinstance(r, Mean)]
        if not shared:
            return module
        memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
        reference: nn.Module = copy.deepcopy(module, memo)
        for name, recipe in shared:
            owner_path, _, leaf = name.rpartition(".")
            owner = fetch(reference, owner_path) if owner_path else reference
            value = fetch(self.rep, f"{edit.path}.{name}").detach()
            groups = recipe.members.groups
            size = fetch(module, name).shape[recipe.axis]
            blocks = value.unflatten(recipe.axis, (groups, -1))
            copies = size // value.shape[recipe.axis]
            value = torch.cat([blocks] * copies, recipe.axis + 1).flatten(recipe.axis, recipe.axis + 1)
            kind = owner._parameters if leaf in owner._parameters else owner._buffers
            kind[leaf] = nn.Parameter(value, False) if kind is owner._parameters else value  # type: ignore[assignment]
        return reference

    def _merged(self, edit: ModuleEdit, rep_kernel: Tensor, kernel: Tensor) -> Tensor:
        """M of the identity, shaped like the source's kernel as it is applied."""
        recipe: Any = edit.tensors[0][1]
        merged = torch.zeros((len(rep_kernel), *kernel.shape[1:]), dtype=rep_kernel.dtype, device=rep_kernel.device)
        if edit.action == "select_inputs":
            column = [g[0] for g in recipe.groups]
            return merged.index_add_(1, torch.tensor(column, device=kernel.device), rep_kernel)
        merged.index_add_(1, torch.tensor(recipe.column, device=kernel.device), rep_kernel)
        groups = recipe.members.groups
        blocks = merged.unflatten(0, (groups, -1))
        return blocks.repeat(1, len(kernel) // len(merged), *[1] * (blocks.ndim - 2)).flatten(0, 1)

    # -- comparison --------------------------------------------------------------------------------------------------
    def _compare(self, source: fx.Node, rep: fx.Node) -> None:
        state = self.plan.steps[source.name].state
        actual = self._rep[rep]
        reference = self._source_value(source)
        if source.op == "call_module" and isinstance(reference, Tensor) and isinstance(actual, Tensor):
            self.positions[str(source.target)] = reference.shape[2:].numel(), actual.shape[2:].numel()
        if source.op == "get_attr" or not holds_tensor(actual):
            return
        if reference is None:  # a convolution whose kernel could not be observed: go on from the Rep network's value
            self.unseen.append(str(source.target))
            self._source[source] = self._collapsed(actual, state, source.meta["value"].shape[1])
            return
        pairs = list(zip(tensors_of(actual), tensors_of(reference), strict=True))
        expected = [self._expand(r, state) for _, r in pairs]
        for (tensor, _), wanted in zip(pairs, expected, strict=True):
            self._record(source, tensor, wanted)
        self.compared += 1
        self._rep[rep] = expected[0] if isinstance(actual, Tensor) else type(actual)(expected)

    def _record(self, node: fx.Node, actual: Tensor, wanted: Tensor) -> None:
        if actual.shape != wanted.shape:
            relative = float("inf")
        elif not wanted.is_floating_point() or not wanted.numel():
            relative = 0.0 if torch.equal(actual, wanted) else float("inf")
        else:
            scale = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
            relative = float((actual - wanted).abs().max() / scale)
        place = str(node.target) if node.op == "call_module" else f"{node.meta.get('path', '')}:{node.name}"
        if not relative <= TOLERANCE.get(wanted.dtype, 2e-4):  # also true for nan
            self.failed.append(place)
        if not relative <= self.worst:
            self.worst, self.worst_node = relative, place

    def _expand(self, tensor: Tensor, state: State) -> Tensor:
        """What the Rep network has to hold where the source holds `tensor`; always a tensor of its own."""
        if isinstance(state, Compact):
            return tensor[:, : state.channels].clone()
        if isinstance(state, Tiled):
            return tensor.index_select(1, torch.tensor(state.index, device=tensor.device))
        if isinstance(state, Folded):
            return tensor.repeat_interleave(self.plan.beta, 0)
        return tensor.clone()

    @staticmethod
    def _collapsed(actual: Tensor, state: State, channels: int) -> Tensor:
        if isinstance(state, Compact):
            return torch.cat([actual] * (channels // state.channels), 1)
        if isinstance(state, Tiled):
            return actual[:, [state.index.index(c) for c in range(channels)]]
        return actual.clone()


def _execute(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "get_attr":
        return fetch(root, str(node.target))
    if node.op == "call_module":
        return fetch(root, str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node → the nodes whose values are needed no more after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    done: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last.items():
        done.setdefault(node, []).append(used)
    return done
