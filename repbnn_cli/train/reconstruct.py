"""Fits a Rep network to the source it came from, layer by layer, on a few training images and without their labels.

Right after a transform source channels share a convolution output, and the network has lost most of what it knew. What
the repeat leaves free (the binary kernel, scale and shift of every copy, slopes and shifts of what follows) is chosen
here, one convolution after the other in the order of the forward, so that the stream behind it comes near the source's:

    minimise  mean (e(x; θ) − expand(e_source))²   over the parameters θ of the convolution and of what follows it

e is the last value that the convolution alone decides on: behind its BatchNorm, its sum with the bypass, its
activation. x is what the layers before, fitted already, really give, so each layer also makes up for the errors of
those. Kernels learn through their own estimators. Every BatchNorm's statistics are estimated anew on the way. Where a
layer depends on the signs of its kernel alone, the latent kernel may be made smaller afterwards: it learns faster.
The targets of a channel's replicas may be set apart, so that each replica has a threshold of its own.
docs/inheritance.md has what it is worth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repbnn_cli import rep_layers
from repbnn_cli.binary_conv import BinaryConv2d
from repbnn_cli.channels import Compact, Folded, Tiled
from repbnn_cli.errors import DivergedError, UsageError
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.plan import Plan
from repbnn_cli.rep_layers import is_batch_norm
from repbnn_cli.restoring import kept_in_eval, modes_kept
from repbnn_cli.train.measure import estimating, norms_of
from repbnn_cli.train.units import Unit, Units
from repbnn_cli.verify.lockstep import last_uses

_KERNEL_RATE, _OTHER_RATE, _LEAST = 0.1, 0.01, 0.1
_SAME = 1e-4  # of the largest value: rounding; one flipped sign changes more

MEMORY = 4 * 2**30
"""Bytes that the values of all images together may take."""
_FEW = 4  # batches that are looked at where an estimate does
_ALIVE = 6  # tensors of the largest size at a time: a unit's input, bypass and output, the source's, and targets

Chunks = list[Any]  # the values of a node, one per batch of images


@dataclass(frozen=True)
class Fitted:
    """One convolution: the share of the target's variance that its unit missed, on the images used.

    before: with the kernel as it was, its BatchNorm by least squares; after: fitted. scaled: whether its latent kernel
    was scaled.
    """

    path: str
    before: float
    after: float
    scaled: bool = False


def reconstruct(
    plan: Plan,
    rep: fx.GraphModule,
    batches: list[Tensor],
    *,
    steps: int = 200,
    spread: float = 0.0,
    latents: float = 1.0,
    on_unit: Callable[[Fitted], None] | None = None,
    on_left: Callable[[str, str], None] | None = None,
) -> list[Fitted]:
    """Fits `rep`, which plan made, in place; batches: images (N, C, H, W) each, as training prepares them.

    steps: of Adam per convolution, each on one batch. Convolutions that are called several times keep what they
    inherited, as do frozen parameters (requires_grad = False), parameters that are used elsewhere, too, and the
    statistics of BatchNorms that the network keeps in eval mode; on_left hears of each convolution that is left as it
    is, and why. spread: replicas of a channel aim from so many of its standard deviations below the
    source's values to so many above, where a BatchNorm behind the convolution has a shift for each of them.
    latents: factor on each fitted latent kernel whose size no value depends on, neither in eval mode nor in training.
    Afterwards rep is in eval mode.
    """
    rep.eval()
    plan.network.module.eval()
    fitting = _Fitting(plan, rep, batches, steps, torch.Generator().manual_seed(0), spread, latents, on_unit, on_left)
    with _mid_schedule(rep):
        fitting.run()
    return fitting.done


def batches_for(plan: Plan, batches: Iterable[tuple[Tensor, Tensor]], images: int) -> list[Tensor]:
    """The first batches of a training epoch, at most `images` of them, and as many as MEMORY holds with all values.

    Raises UsageError for less than two at a time.
    """
    sizes = [n.meta["value"] for n in plan.network.graph.nodes if isinstance(n.meta.get("value"), Tensor)]
    largest = max(value.numel() // len(value) for value in sizes if value.dim() > 1) * plan.beta
    wanted = min(images, MEMORY // (4 * largest * _ALIVE))
    found: list[Tensor] = []
    for batch, _ in batches:
        if wanted <= 0:
            break
        found.append(batch[:wanted])
        wanted -= len(batch)
    if len(found) > 1 and len(found[-1]) < len(found[0]):
        found.pop()
    if not found or len(found[0]) < 2:
        raise UsageError(
            "--fit: takes two images at a time at least, for statistics of BatchNorm: as a batch, and in memory "
            f"({MEMORY / 2**30:g} GiB for the values of a network); --fit 0 leaves it out"
        )
    return found


class _Fitting:
    def __init__(
        self, plan: Plan, rep: fx.GraphModule, batches: list[Tensor], steps: int, random: torch.Generator,
        spread: float, latents: float, on_unit: Callable[[Fitted], None] | None,
        on_left: Callable[[str, str], None] | None,
    ) -> None:  # fmt: skip
        self.plan, self.rep, self.source = plan, rep, plan.network
        self.steps, self.random, self.spread, self.latents = steps, random, spread, latents
        self.on_unit = on_unit
        self.on_left = on_left or (lambda path, why: None)
        self.units = Units(plan, rep, batches[0][:2], self.on_left)
        self.kept = set(kept_in_eval(rep).values())
        self.chunks = len(batches)
        self.done: list[Fitted] = []
        self.values: dict[fx.Node, Chunks] = {}
        self.targets: dict[fx.Node, Chunks] = {}
        self.unused = last_uses(self.units.edges.graph)
        self.computed: set[fx.Node] = set()
        self.settled: set[str] = set()
        for own, theirs in zip(*(_inputs(e.graph) for e in (self.units.edges, self.units.source_edges)), strict=True):
            self.values[own] = self.targets[theirs] = list(batches)

    def run(self) -> None:
        if not self.units.waiting:
            return
        for node in self.units.edges.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node in self.units.waiting:
                self._fit(node)
                self.units.waiting.discard(node)
            self._available(node)
            for used in self.unused.get(node, ()):
                self.values.pop(used, None)

    # -- one convolution ----------------------------------------------------------------------------------------------

    def _fit(self, conv: fx.Node) -> None:
        unit = self.units.of(conv)
        if unit is None:
            return self.on_left(str(conv.target), "nothing behind it that the source has a value for")
        parameters = self.units.parameters(unit)
        if not parameters:
            return self.on_left(unit.path, "frozen, or used elsewhere, too")
        if not any(p is kernel for p in parameters for kernel in self.units.kernels(unit)):
            self.on_left(unit.path, "fitted but for the kernel, which is frozen, or used elsewhere, too")
        members = {*unit.nodes, *unit.computing}
        outer = {n for member in members for n in member.all_input_nodes if n not in members and n.op != "get_attr"}
        for node in outer:
            self._available(node)
        wanted = self._wanted(unit)
        apart = self._parts(unit)
        if apart:
            wanted = self._apart(unit, wanted)
        modules = [fetch(self.rep, path) for path in unit.paths]
        with self._training(modules):
            self._start_norms(unit)
            if apart:
                self._centre(unit, wanted)
            before = self._missed(unit, wanted)
            start = [p.detach().clone() for p in parameters]
            optimizer = torch.optim.Adam([{"params": [p], "lr": _rate(p)} for p in parameters])
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.steps, 1))
            for step in range(self.steps):
                if step % len(wanted) == 0:
                    order = torch.randperm(len(wanted), generator=self.random).tolist()
                chunk = order[step % len(wanted)]
                optimizer.zero_grad()
                F.mse_loss(self._end(unit, chunk), wanted[chunk]).backward()
                optimizer.step()
                schedule.step()
            optimizer.zero_grad()
            after = self._missed(unit, wanted)
            if not math.isfinite(after):
                raise DivergedError(
                    f"{unit.path}: fitting it to the source network gives {after}; --fit 0 does without"
                )
        if after > before:  # of few steps, from a good start
            after = before
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
        kernels = [k for k in self.units.kernels(unit) if any(k is p for p in parameters)]
        scaled = self.latents != 1 and bool(kernels) and self._scale(unit, kernels, modules)
        with estimating(self._estimated(modules)):
            for chunk in range(len(wanted)):
                with torch.no_grad():
                    self._end(unit, chunk)
        self.settled |= set(unit.paths)
        for node in unit.computing:  # from parameters that are others now
            self.values.pop(node, None)
        for node in [n for n in self.targets if n.users and self.computed.issuperset(n.users)]:
            del self.targets[node]
        self.done.append(Fitted(unit.path, before, after, scaled))
        if self.on_unit is not None:
            self.on_unit(self.done[-1])
        return None

    def _wanted(self, unit: Unit, first: int | None = None) -> list[Tensor]:
        """The source's values at the unit's end, with the channels that the Rep network has there.

        first: so many batches only.
        """
        found: list[Tensor] = self._target(unit.twin)[:first]
        if isinstance(unit.state, Folded):
            return [rep_layers.repeat_batch(value, self.plan.beta) for value in found]
        if not isinstance(unit.state, Tiled | Compact):
            return found
        index = torch.tensor(unit.state.index, device=found[0].device)
        return [value.index_select(1, index) for value in found]

    def _parts(self, unit: Unit) -> bool:
        """Whether the targets of replicas are to be apart: with a `spread`, where a BatchNorm has a shift for each."""
        state, norm = unit.state, self._norm(unit)
        if not self.spread or norm is None or not isinstance(state, Tiled):
            return False
        return len(set(state.replica)) == self.plan.beta and len(norm.bias) == len(state.index)

    def _apart(self, unit: Unit, wanted: list[Tensor]) -> list[Tensor]:
        """The targets with those of a source channel's replicas apart, within the range of the source's values."""
        state = unit.state
        assert isinstance(state, Tiled), state
        few = torch.cat(wanted[:_FEW])
        deviation = few.std(_all_but_channels(few), correction=0)
        steps = torch.linspace(-self.spread, self.spread, self.plan.beta, device=few.device)
        shift = (deviation * steps[list(state.replica)]).view(-1, *[1] * (few.dim() - 2))
        low, high = few.min(), few.max()
        return [(value + shift).clamp(low, high) for value in wanted]

    def _centre(self, unit: Unit, wanted: list[Tensor]) -> None:
        """Moves the BatchNorm's shifts by what the unit's values miss in the mean."""
        module = self._norm(unit)
        if module is None:
            return
        normalised: list[Tensor] = []
        missing: list[Tensor] = []
        slopes: list[Tensor | None] = []
        with module.register_forward_hook(lambda _, __, given: normalised.append(given)):
            for i in range(min(_FEW, self.chunks)):
                end = self._end(unit, i)
                missing.append((wanted[i] - end).detach())
                slopes.append(torch.autograd.grad(end.sum(), normalised.pop(), allow_unused=True)[0])
        with torch.no_grad():
            missed = torch.cat(missing)
            module.bias.add_(missed.mean(_all_but_channels(missed)) * _shift_per_miss(slopes))

    @torch.no_grad()
    def _scale(self, unit: Unit, kernels: list[Tensor], modules: list[nn.Module]) -> bool:
        """Scales latent kernels if the unit's values stay what they are; whether it did."""

        def training() -> Tensor:
            with self._training(modules):
                return self._end(unit, 0)

        def same(one: Tensor, other: Tensor) -> bool:
            return bool((one - other).abs().max() <= _SAME * one.abs().max())

        kept = [kernel.clone() for kernel in kernels]
        in_training, in_eval = training(), self._end(unit, 0)  # in this order: training moves the statistics
        for kernel in kernels:
            kernel.mul_(self.latents)
        if same(in_eval, self._end(unit, 0)) and same(in_training, training()):
            return True
        for kernel, value in zip(kernels, kept, strict=True):
            kernel.copy_(value)
        return False

    def _estimated(self, modules: list[nn.Module]) -> list[nn.Module]:
        """The normalisations in them whose statistics are estimated anew."""
        return [norm for module in modules for norm in norms_of(module) if norm not in self.kept]

    @contextmanager
    def _training(self, modules: list[nn.Module]) -> Iterator[None]:
        """Meanwhile the modules are in training mode, but for those that the network keeps in eval mode."""
        with modes_kept(*modules):
            for m in (m for module in modules for m in module.modules()):
                m.training = m not in self.kept
            yield

    def _end(self, unit: Unit, chunk: int) -> Tensor:
        """The unit's last value on one batch, with gradients for its parameters."""
        local: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            if node in local:
                return local[node]
            return fetch(self.rep, str(node.target)) if node.op == "get_attr" else self.values[node][chunk]

        for node in (*unit.computing, *unit.nodes):
            local[node] = self.units.edges.run(self.rep, node, value)
        result: Tensor = local[unit.nodes[-1]]
        if isinstance(unit.state, Compact):
            return rep_layers.repeat_channels(result, unit.state.repeats)
        return rep_layers.unfold(result, self.plan.beta) if unit.unfolds else result

    def _norm(self, unit: Unit) -> _BatchNorm | None:
        """The BatchNorm behind the convolution, or its pooling, where it has scale and shift to be fitted."""
        behind = self._unpooled(unit)[:1]
        module = fetch(self.rep, str(behind[0].target)) if behind and behind[0].op == "call_module" else None
        if not is_batch_norm(module) or not module.affine or module in self.kept:
            return None
        return module if module.weight.requires_grad and module.bias.requires_grad else None

    def _unpooled(self, unit: Unit) -> list[fx.Node]:
        """What follows the convolution and a pooling right behind it."""
        return list(itertools.dropwhile(self.units.pools, unit.nodes[1:]))

    @torch.no_grad()
    def _start_norms(self, unit: Unit) -> None:
        """Scale and shift of the BatchNorm behind the convolution by least squares, each copy for its own channel."""
        module = self._norm(unit)
        if module is None or not self.units.known(norm := self._unpooled(unit)[0]):
            return
        part = self.units.ending(unit.nodes[: unit.nodes.index(norm) + 1])
        wanted = torch.cat(self._wanted(part, _FEW))
        module.weight.fill_(1.0)
        module.bias.zero_()
        given = torch.cat([self._end(part, chunk) for chunk in range(min(_FEW, self.chunks))])
        dims = _all_but_channels(given)
        module.weight.copy_((given * wanted).mean(dims))  # given: mean 0 and variance 1 in each channel
        module.bias.copy_(wanted.mean(dims))

    @torch.no_grad()
    def _missed(self, unit: Unit, wanted: list[Tensor]) -> float:
        few = range(min(_FEW, len(wanted)))
        error = sum(F.mse_loss(self._end(unit, i), wanted[i]).item() for i in few) / len(few)
        variance = torch.cat([wanted[i] for i in few]).var(correction=0).item()
        return error / variance if variance else 0.0

    # -- values -------------------------------------------------------------------------------------------------------

    def _available(self, node: fx.Node) -> None:
        """Computes a node's values once: in its turn, or before it, where a unit needs them."""
        if node not in self.values:
            for used in node.all_input_nodes:
                self._available(used)
            self._settle(node)
            self.values[node] = [self._run(node, i) for i in range(self.chunks)]

    @torch.no_grad()
    def _run(self, node: fx.Node, chunk: int) -> Any:
        return self.units.edges.run(self.rep, node, self._of_batch(self.values, chunk))

    def _settle(self, node: fx.Node) -> None:
        """Estimates the statistics of a BatchNorm outside of any unit when its input is there."""
        if node.op != "call_module" or str(node.target) in self.settled:
            return
        norms = self._estimated([fetch(self.rep, str(node.target))])
        if norms:
            with estimating(norms):
                for chunk in range(self.chunks):
                    self._run(node, chunk)
        self.settled.add(str(node.target))

    @torch.no_grad()
    def _target(self, node: fx.Node) -> Chunks:
        """The source's values, computed where they are first asked for; dropped behind a unit that they are not needed
        after."""
        if node not in self.targets:
            for used in (*self.units.source_edges.lasting_before(node), *node.all_input_nodes):
                self._target(used)
            arguments = (self._of_batch(self.targets, chunk) for chunk in range(self.chunks))
            self.targets[node] = [self.units.source_edges.run(self.source.module, node, given) for given in arguments]
            self.computed.add(node)
        return self.targets[node]

    @staticmethod
    def _of_batch(values: Mapping[fx.Node, Chunks], chunk: int) -> Callable[[fx.Node], Any]:
        return lambda node: values[node][chunk]


def _rate(parameter: Tensor) -> float:
    """Adam's step, which is absolute, in units of the tensor: kernels of any scale flip as many signs."""
    size = float(parameter.detach().abs().mean())
    return _KERNEL_RATE * size if parameter.dim() > 1 and size else _OTHER_RATE * max(size, _LEAST)


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _shift_per_miss(slopes: list[Tensor | None]) -> Tensor | float:
    """How far a shift has to move for each channel's values, whose slopes these are, to move by 1; (N, C, ...) → (C,).

    By the steepest slope, which is that of what is not clipped. 0 where values go either way, or no way is known.
    """
    known = [slope for slope in slopes if slope is not None]
    if len(known) < len(slopes):
        return 0.0
    by_channel = torch.cat(known).transpose(0, 1).flatten(1)
    low, high = by_channel.amin(1), by_channel.amax(1)
    steepest = torch.where(high > -low, high, low)
    return torch.where((low * high < 0) | (steepest == 0), 0, 1 / steepest)


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


@contextmanager
def _mid_schedule(network: nn.Module) -> Iterator[None]:
    """Meanwhile t and k of the sign estimators are 1: at the end of their schedule hardly a gradient is left."""
    kept = [(tensor, tensor.clone()) for m in network.modules() if isinstance(m, BinaryConv2d)
            for tensor in (getattr(m, "t", None), getattr(m, "k", None)) if isinstance(tensor, Tensor)]  # fmt: skip
    for tensor, _ in kept:
        tensor.fill_(1.0)
    try:
        yield
    finally:
        for tensor, before in kept:
            tensor.copy_(before)
