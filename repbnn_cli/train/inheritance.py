"""What a Rep network goes through before anything is trained.

Inherited weights: a fit to the source network, new BatchNorm statistics; one preparation for `repbnn calibrate`, which
writes its outcome, and for `repbnn finetune`, which trains on from it. On request replicas get thresholds of their own:
fresh ones by the shifts of their BatchNorms, inherited ones by the targets of the fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repbnn_cli.errors import UsageError
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.plan import Plan
from repbnn_cli.rep_layers import RepBatchNorm1d, RepBatchNorm2d, RepMixin
from repbnn_cli.train import measure, reconstruct
from repbnn_cli.train.feeds import Feed
from repbnn_cli.train.reconstruct import Fitted
from repbnn_cli.wording import some

APART = 0.5
"""Standard deviations by which replicas aim beside the source's values in a fit, if not said; docs/inheritance.md."""
LATENTS = 0.5
"""Factor on fitted latent kernels whose signs alone count, if not said; docs/inheritance.md."""


@dataclass(frozen=True)
class Preparation:
    """plan: what made the network, None to leave its kernels as they are; fit: steps of Adam per convolution.

    images: training images to fit on, without labels, or as many as memory holds; batches: of training images over
    which BatchNorm statistics are then estimated, 0 for none. spread: how far replicas start apart, 0 for not at all;
    with a fit see reconstruct, without one spread_shifts. latents: factor on fitted latent kernels, see reconstruct.
    on_note, on_unit: hear what happens.
    """

    batches: int
    plan: Plan | None = None
    fit: int = 200
    images: int = 2048
    spread: float = 0.0
    latents: float = LATENTS
    on_note: Callable[[str], None] | None = None
    on_unit: Callable[[Fitted], None] | None = None

    @property
    def fresh(self) -> bool:
        """Whether it starts weights that know nothing yet."""
        return self.spread > 0 and self.plan is None

    def key(self) -> dict[str, float]:
        """What the prepared weights depend on, beside network, data and seed."""
        fitted = self.plan is not None
        key: dict[str, float] = {"batches": self.batches}
        key |= {"fit": self.fit if fitted else 0, "images": self.images if fitted else 0}
        key |= {"latents": self.latents} if fitted and self.fit and self.latents != 1 else {}
        return key | ({"spread": self.spread} if self.spread else {})

    def __call__(
        self, network: nn.Module, feed: Feed, after_unit: Callable[[], None] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Prepares the network in place; facts for its file. after_unit: is called now and then, and may raise."""
        facts: dict[str, Any] = {}
        if self.plan is not None and self.fit:
            assert isinstance(network, fx.GraphModule), f"{type(network).__name__} was not made by a plan"
            batches = reconstruct.batches_for(self.plan, feed.train.epoch(0), self.images)
            count = sum(map(len, batches))
            if self.on_note is not None:
                steps = f"{self.fit} steps per convolution, {count:,} training images"
                steps += f", replicas ±{self.spread:g} standard deviations apart" if self.spread else ""
                self.on_note(f"fitting to the source network: {steps}")

            def heard(unit: Fitted) -> None:
                if self.on_unit is not None:
                    self.on_unit(unit)
                if after_unit is not None:
                    after_unit()

            self.plan.network.module.to(measure.device_of(network))
            left: dict[str, list[str]] = {}
            units = reconstruct.reconstruct(
                self.plan, network, batches, steps=self.fit, spread=self.spread, latents=self.latents, on_unit=heard,
                on_left=lambda path, why: left.setdefault(why, []).append(path),
            )  # fmt: skip
            if left and self.on_note is not None:
                reasons = "; ".join(f"{some(paths)}: {why}" for why, paths in left.items())
                every = {unit.path for unit in units}.union(*left.values())
                kept = sum(map(len, left.values()))
                self.on_note(f"{kept} of {len(every)} layers keep what they inherited ({reasons})")
            facts = {"fit_steps": self.fit, "fit_images": count, "fit": {u.path: [u.before, u.after] for u in units}}
            scaled = sum(unit.scaled for unit in units)
            if scaled:
                facts["latents"] = self.latents
            if self.latents != 1 and self.on_note is not None:
                some_scaled = (
                    f"latent kernels × {self.latents:g} in {scaled} of {len(units)} layers: their signs alone count"
                )
                none_scaled = "no latent kernel was scaled (--latents): what is computed depends on their size"
                self.on_note(some_scaled if scaled else none_scaled)
        if self.fresh:
            assert isinstance(network, fx.GraphModule), f"{type(network).__name__} was not made by a plan"
            spread_shifts(network, self.spread)
        if self.spread:
            facts["spread"] = self.spread
        if self.batches:
            facts["calibrated_batches"] = measure.calibrate(network, feed.train.epoch(0), self.batches)
        return facts


@dataclass(frozen=True)
class Copies:
    """A BatchNorm behind a RepConv: channel (g·β² + r)·n + c of it is copy r of channel c, of n, in group g of G."""

    norm: _BatchNorm
    beta: int
    groups: int


def spreadable(network: fx.GraphModule) -> list[Copies]:
    """The BatchNorms behind a RepConv that have a shift for each of its copies. Raises UsageError if there are none."""
    found: dict[int, Copies] = {}
    for node in network.graph.nodes:
        norm = _called(network, node)
        if not isinstance(norm, _BatchNorm) or norm.bias is None:
            continue
        if isinstance(norm, RepBatchNorm1d | RepBatchNorm2d):
            if norm.repeats == norm.beta**2 > 1:
                found[id(norm)] = Copies(norm, norm.beta, 1)
        elif isinstance(conv := _called(network, node.args[0]), RepMixin) and conv.rep_repeats == conv.rep_beta**2 > 1:
            found[id(norm)] = Copies(norm, conv.rep_beta, getattr(conv, "groups", 1))
    if not found:
        raise UsageError("--spread: no BatchNorm of this network is behind a RepConv's repeat; leave it out")
    return list(found.values())


def _called(network: fx.GraphModule, node: Any) -> nn.Module | None:
    return fetch(network, str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


@torch.no_grad()
def spread_shifts(network: fx.GraphModule, width: float) -> None:
    """Sets the shifts of the β² copies that each BatchNorm behind a RepConv makes apart, from -width to width.

    All replicas of a fresh RepBNN carry the same values, and it takes training long to part them; until then it has β
    times fewer features than its source. With shifts apart the sign behind each copy has a threshold of its own, and
    the copies of a convolution channel together are an activation of several levels. Replicas of a source channel get
    levels on either side of 0. Unit: standard deviations of the normalised output. This tool's own, not the paper's.

    Raises UsageError for a network without such a BatchNorm.
    """
    for copies in spreadable(network):
        beta, shift = copies.beta, copies.norm.bias
        groups = torch.arange(beta)
        order = torch.cat([q * beta + (groups.flip(0) if q % 2 else groups) for q in range(beta)])
        shifts = torch.linspace(-width, width, beta**2)[order].to(shift)
        shift.add_(shifts.repeat_interleave(len(shift) // (beta**2 * copies.groups)).repeat(copies.groups))
