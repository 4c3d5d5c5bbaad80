"""Checks of a transform, and the certificate that they make.

What is compared in the merged-kernel identity, and how, is in `lockstep`.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from repbnn_cli import seeds
from repbnn_cli.errors import CaptureError
from repbnn_cli.graph import KeptGraphModule, random_inputs
from repbnn_cli.graph.tracer import fetch, place_of
from repbnn_cli.inherit import Columns, Kernel
from repbnn_cli.plan import ModuleEdit, Plan
from repbnn_cli.restoring import modes_kept, unchanged
from repbnn_cli.user_code.cpu_only import running
from repbnn_cli.verify.lockstep import Lockstep, StuckError, difference, tensors_of
from repbnn_cli.wording import counted, some


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


def verify(
    model: nn.Module, plan: Plan, rep: KeptGraphModule, *, gradients: bool, batch: int | None = None
) -> Certificate:
    """Runs all checks on random input; `model` is the source network, `rep` what `surgery.apply` gave for `plan`.

    gradients: also compare captured and source network in training mode, outputs and every parameter's gradient.
    batch: samples of the random input (default: as many as the capture used).
    """
    with running(model):
        return _verify(model, plan, rep, gradients=gradients, batch=batch)


def _verify(model: nn.Module, plan: Plan, rep: KeptGraphModule, *, gradients: bool, batch: int | None) -> Certificate:
    network = plan.network

    def random(samples: int) -> list[Tensor]:
        return random_inputs(model, [(samples, *s[1:]) for s in network.example], seed=1)

    inputs = random(batch or network.batch)
    if gradients and batch is None and _runs(model, more := random(network.batch + 1)):
        inputs = more  # what a forward knows of its batch would go unnoticed with the one of the capture
    run = Lockstep(plan, rep, foreign=gradients)
    views = [plan.in_training.network.module, rep.in_training] if plan.in_training and rep.in_training else []
    # Only foreign code can change tensors while it runs; copying all of a large network's weights to be safe costs.
    guard = contextlib.ExitStack()
    if gradients:
        guard.enter_context(unchanged(model))
        guard.enter_context(unchanged(rep))
    carried = _carried(plan, rep)
    with guard, _evaluating(model, network.module, rep, *views), torch.no_grad():
        captured = _captured(model, network.module, inputs, network.batch) if gradients else None
        if captured is not None and captured.values["max_abs"] is None:  # its graph does not run on these
            return Certificate((captured, carried))
        try:
            outputs = run.run(model, inputs)
        except StuckError as error:
            text = f"does not run at {error.place} ({error})"
            stuck = Check("merged-kernel identity", False, text, {"failed": [error.place]})
            return Certificate((carried, stuck))
        if captured is None:
            same = _same(run.delta)
            captured = _captured(model, network.module, inputs, network.batch) if run.partial or run.unseen else same
        checks = [captured, carried, _shapes(outputs, run.given), _identity(plan, run)]
        if run.failed and _draws(network.module, inputs):
            text = f"{checks[-1].summary}; the network draws random numbers in eval mode: make it deterministic there"
            checks[-1] = replace(checks[-1], summary=text)
        runs = [run]
        if plan.in_training is not None and rep.in_training is not None:
            runs.append(Lockstep(plan.in_training, rep.in_training, foreign=True, drawing=True))
            checks.append(_in_training(runs[-1], model, inputs))
        checks.insert(3, _costs(plan, rep, runs))
    if gradients:
        with _evaluating(model, network.module):
            checks.insert(1, _training(model, network.module, inputs))
    return Certificate(tuple(checks))


def _runs(model: nn.Module, inputs: list[Tensor]) -> bool:
    try:
        with unchanged(model), _evaluating(model), torch.no_grad():
            model(*_copies(inputs))
    except Exception:  # somebody else's code, which may keep tensors as long as its batch
        return False
    return True


@contextlib.contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    with modes_kept(*modules):
        for module in modules:
            module.eval()
        yield


def _captured(model: nn.Module, captured: nn.Module, inputs: list[Tensor], batch: int) -> Check:
    """batch: of the capture. Another one shows whether the graph holds for all, which a loop over samples does not."""

    def run(network: nn.Module, given: list[Tensor]) -> Any:
        with unchanged(model):  # a forward may write to its own tensors
            return network(*_copies(given))

    expected = run(model, inputs)
    try:
        delta = difference(expected, run(captured, inputs))
    except Exception:
        delta = float("inf")
    if delta == float("inf") and len(inputs[0]) != batch:
        text = f"holds for batches of {batch} only: let its forward take sizes from tensors, and not loop over samples"
        return Check("captured = source", False, text, {"max_abs": None})
    return _same(delta)


def _copies(inputs: list[Tensor]) -> list[Tensor]:
    """For one run: a forward may write to what it is given."""
    return [x.clone() for x in inputs]


def _same(delta: float) -> Check:
    """The source's own code against its graph."""
    text = f"max |Δ| = {delta:.3g} in eval mode"
    return Check("captured = source", delta == 0.0, text, {"max_abs": _finite(delta)})


def _training(model: nn.Module, captured: nn.Module, inputs: list[Tensor]) -> Check:
    """Outputs and gradients in training mode, each side from the same state and random numbers."""
    results = []
    for network in (model, captured):
        with unchanged(model), torch.enable_grad():
            was = [(p, p.grad) for p in model.parameters()]
            for m in (model, captured):
                m.train()
            for p, _ in was:
                p.grad = None
            seeds.seed(0)
            loss: Any = None
            try:
                outputs = tensors_of(network(*_copies(inputs)))
                loss = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype, device=o.device).view_as(o)).sum()
                           for o in outputs if o.requires_grad)  # fmt: skip
                if isinstance(loss, Tensor):  # not where all parameters are frozen
                    loss.backward()
            except RuntimeError as error:  # somebody else's code: autograd takes less than a plain run
                if network is captured:
                    raise
                # In the backward no line of theirs runs.
                where = "" if isinstance(loss, Tensor) else f"{place_of(error)}: "
                raise CaptureError(
                    f"{where}the network itself cannot be trained here (torch {torch.__version__}): "
                    f"{textwrap.shorten(str(error), 300, placeholder=' ...')}; mend its forward, or leave training out "
                    "(--verify quick)"
                ) from error
            results.append((outputs, {n: p.grad for n, p in model.named_parameters()}))
            for p, grad in was:
                p.grad = grad
    (out_a, grads_a), (out_b, grads_b) = results
    worst, where = difference([o.detach() for o in out_a], [o.detach() for o in out_b]), "outputs"
    for name, grad in grads_a.items():
        other = grads_b[name]
        delta = float("inf") if (grad is None) != (other is None) else 0.0
        if grad is not None and other is not None and not torch.equal(grad, other):
            delta = float((grad - other).abs().max() / grad.abs().max())  # without end where one side's are all 0
        if not delta <= worst and not math.isnan(worst):
            worst, where = delta, name if delta < float("inf") else f"{name}: a gradient on one side only"
    count = sum(grad is not None for grad in grads_a.values())
    summary, passed = f"max |Δ| = {worst:.3g} ({where}) in training mode, {count} gradients compared", worst <= 1e-5
    if not passed:
        summary += "; keep the module whole whose code does in training what a graph does not (rule file: `leaf: true`)"
    return Check("captured learns as source", passed, summary, {"max": _finite(worst), "where": where})


def _shapes(outputs: tuple[Any, Any], given: Any) -> Check:
    """outputs: what is expected and the Rep network's; given: the source's own, without replicas."""
    expected, rep, source = ([tuple(t.shape) for t in tensors_of(o)] for o in (*outputs, given))
    text = f"{source} → {rep}"
    if rep == expected != source:
        text += "; some carry all replicas of their channels"
    return Check("output shapes", rep == expected, text, {"source": source, "rep": rep})


def _costs(plan: Plan, rep: nn.Module, runs: list[Lockstep]) -> Check:
    """Weights and MACs of every RepConv against the convolution it came from; runs: of eval mode, and of training mode
    where that has layers of its own."""
    weights = [0, 0]
    macs = [0, 0]
    grown = [e.path for e in plan.edits if e.action in ("depthwise", "per_replica")]
    for edit in plan.edits:
        if edit.action != "rep_conv":
            continue
        layer = plan.layers[edit.path]
        before = torch.Size(layer.kernel_shape).numel()
        run = next((run for run in runs if edit.path in run.positions), runs[0])
        after = run.weights.get(edit.path, 0) if layer.called else fetch(rep, f"{edit.path}.{layer.kernel}").numel()
        sites = run.positions.get(edit.path, (0, 0))
        weights[0] += before
        weights[1] += after
        macs[0] += before * sites[0] * layer.convolutions
        macs[1] += after * sites[1] * run.convolutions.get(edit.path, 1)
    passed = weights[0] == weights[1] and macs[0] == macs[1]
    text = f"weights {weights[0]:,} → {weights[1]:,}; MACs {macs[0]:,} → {macs[1]:,}"
    if grown:
        text += f"; layers that grow ×{plan.beta}: {some(grown)}"
    # RepTran's last layer is a classifier in floats. A head of convolutions costs more, as a binary one does, which
    # has taken its place where there was no other.
    last = [
        e.path for e in plan.edits
        if e.action == "select_inputs" and _inputs_grow(plan, e)
        and (plan.layers[e.path].binary or len(plan.layers[e.path].kernel_shape) > 2)
    ]  # fmt: skip
    if last:
        text += f"; last layers that take more inputs: {some(last)}"
    values = {"weights": weights, "macs": macs, "depthwise": grown, "last": last}
    return Check("convolution cost unchanged", passed, text, values)


def _inputs_grow(plan: Plan, edit: ModuleEdit) -> bool:
    layer = plan.layers[edit.path]
    return edit.channels is not None and edit.channels[0] > layer.in_channels


def _carried(plan: Plan, rep: nn.Module) -> Check:
    """Every tensor that the Rep network took over from the source is what the plan makes of it."""
    wrong, compared = [], 0
    for edit in plan.edits:
        for name, recipe in () if edit.reset else edit.tensors:
            path = edit.tensor_path(name)
            source, own = fetch(plan.network.module, path).detach(), fetch(rep, path)
            made = own.dtype == source.dtype and (
                recipe.made(source, own) if isinstance(recipe, Kernel) else torch.equal(recipe(source), own)
            )
            compared += 1
            if not made:
                wrong.append(path)
    text = f"{counted(compared, 'tensor')} as planned" if not wrong else f"not as planned: {', '.join(wrong[:3])}"
    return Check("weights carried over", not wrong, text, {"tensors": compared, "failed": wrong})


def _identity(plan: Plan, run: Lockstep) -> Check:
    convolutions = sum(e.action in ("rep_conv", "select_inputs") for e in plan.edits)
    if run.failed:
        text = f"max relative |Δ| = {run.worst:.3g} at {run.worst_node}; fails at {', '.join(run.failed[:3])}"
        edit = run.edits.get(run.failed[0])
        recipe = edit.way if edit is not None and edit.action == "select_inputs" else None
        if isinstance(recipe, Columns) and recipe.scale != 1.0:
            text += "; where it normalises its kernel, the 1/β of its inputs is lost: `--last-layer 1_over_beta`"
    else:
        over = f"{counted(run.compared, 'tensor')}, {counted(convolutions, 'kernel')}"
        text = f"max relative |Δ| = {run.worst:.3g} over {over}"
    if run.unseen:
        text += f"; kernel not observable: {', '.join(run.unseen)}"
    left_out = sum(step.by_position for step in plan.steps.values())
    if left_out:
        text += f"; left out: {left_out} sums by position"
    values = {"max_relative": _finite(run.worst), "worst": run.worst_node, "tensors": run.compared,
              "by_position": left_out, "failed": run.failed, "unseen": run.unseen}  # fmt: skip
    return Check("merged-kernel identity", not run.failed, text, values)


def _in_training(run: Lockstep, model: nn.Module, inputs: list[Tensor]) -> Check:
    """The same of the graph of training mode, with its layers in eval mode: what they draw would not be comparable."""
    name = "identity in training mode"
    with seeds.kept():
        try:
            outputs = run.run(model, inputs)
        except StuckError as error:
            return Check(name, False, f"does not run at {error.place} ({error})", {"failed": [error.place]})
    identity, shapes = _identity(run.plan, run), _shapes(outputs, run.given)
    passed = identity.passed and shapes.passed
    return Check(name, passed, f"{identity.summary}; outputs {shapes.summary}", {**identity.values, **shapes.values})


def _draws(network: nn.Module, inputs: list[Tensor]) -> bool:
    """Whether two runs on one input differ with the seed."""
    outputs = []
    for seed in (0, 1):
        with unchanged(network):
            seeds.seed(seed)
            outputs.append(network(*_copies(inputs)))
    return difference(*outputs) != 0.0


def _finite(value: float) -> float | None:
    """JSON has no infinity: None where shapes differ or nothing could be compared."""
    return value if math.isfinite(value) else None
