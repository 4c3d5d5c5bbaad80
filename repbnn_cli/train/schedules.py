"""Owns the schedules of training: closed formulas of the position, and what writes them into a network in place.

Positions: an epoch e of E counts from 0 to E − 1, an iteration likewise. Values live in 0-dim tensors that are filled,
never replaced, so that a compiled or captured step sees every change.

| schedule | formula | source |
| --- | --- | --- |
| cosine | lr·(1 + cos(π·p))/2 with p = (e − W)/(E − W) | SGDR, arXiv 1608.03983, equation 5 without restarts |
| linear | lr·(1 − p) | Bi-Real Net, arXiv 1808.00278 |
| step | lr·factor^(number of milestones ≤ e) | |
| warm-up | lr·(e + 1)/W while e < W | arXiv 1706.02677, section 2.2 |
| ede | t = 10^(−3 + 4·e/E), k = max(1/t, 1) | IR-Net, arXiv 1909.10788, section 3.3 |
| rbnn | t = 10^(−2 + 3·e/E), k = max(1/t, 1); R1, R2 at the start of each epoch | RBNN, arXiv 2009.13055, section 3 |
| recu | τ = A·exp(e/E) + B, from 0.85 towards 0.99 | ReCU, arXiv 2103.12369, section 4 |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from repbnn_cli.binary_conv import BinaryConv2d, IRConv2d, RBNNConv2d, ReCUConv2d, rotate

LearningRateName = Literal["cosine", "linear", "step"]
BinarizationName = Literal["none", "ede", "rbnn", "recu"]

T_RANGE = {"ede": (1e-3, 1e1), "rbnn": (1e-2, 1e1)}
TAU_RANGE = (0.85, 0.99)
_KINDS: dict[str, type[BinaryConv2d]] = {"ede": IRConv2d, "rbnn": RBNNConv2d, "recu": ReCUConv2d}


def learning_rate(
    name: LearningRateName,
    position: float,
    total: float,
    *,
    lr: float,
    warmup: float = 0,
    milestones: Sequence[float] = (),
    factor: float = 0.1,
) -> float:
    """The learning rate at a position of `total`, both in epochs or both in iterations; see the table above."""
    if position < warmup:
        return lr * min(1.0, (position + 1) / warmup)
    progress = (position - warmup) / max(total - warmup, 1)
    if name == "cosine":
        return lr * (1 + math.cos(math.pi * progress)) / 2
    if name == "linear":
        return lr * (1 - progress)
    return lr * factor ** sum(m <= position for m in milestones)


def estimator(name: Literal["ede", "rbnn"], epoch: float, epochs: float) -> tuple[float, float]:
    """t and k of IR-Net's or RBNN's sign gradient at an epoch."""
    low, high = (math.log10(t) for t in T_RANGE[name])
    t = 10 ** (low + (high - low) * epoch / epochs)
    return t, max(1 / t, 1.0)


def recu_tau(epoch: float, epochs: float) -> float:
    """τ of ReCU at an epoch: A·exp(e/E) + B with A, B such that e = 0 gives 0.85 and e = E gives 0.99."""
    low, high = TAU_RANGE
    a = (high - low) / (math.e - 1)
    return a * math.exp(epoch / epochs) + low - a


class LearningRate:
    """The learning rate as a 0-dim tensor that the optimiser holds. float32, as a GPU's fused optimisers want it."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.zeros((), device=device)
        self.current = 0.0

    def set(self, lr: float) -> None:
        self.current = lr
        self.value.fill_(lr)


class Binarization:
    """A method's own schedule over the binary convolutions of a network, RepBconv2d included.

    convs: those that it drives; unscheduled: t, k or τ of these stay as they are, because the recipe has another
    method's schedule or none.
    """

    def __init__(self, name: BinarizationName, network: nn.Module, device: torch.device | str = "cpu") -> None:
        self.name = name
        scheduled = [m for m in network.modules() if isinstance(m, tuple(_KINDS.values()))]
        self.convs = [m for m in scheduled if isinstance(m, _KINDS.get(name, ()))]
        self.unscheduled = [m for m in scheduled if m not in self.convs]
        for conv in scheduled:
            if not isinstance(conv, ReCUConv2d):  # whose τ is a buffer
                # A step that is recorded on a GPU keeps the value of a tensor on the CPU for good.
                conv.t, conv.k = conv.t.to(device), conv.k.to(device)

    def set(self, epoch: int, epochs: int) -> dict[str, float]:
        """Writes the values of an epoch into the network and returns them by name; nothing where there are no convs."""
        if not self.convs:
            return {}
        if self.name == "recu":
            values = {"tau": recu_tau(epoch, epochs)}
        else:
            t, k = estimator("ede" if self.name == "ede" else "rbnn", epoch, epochs)
            values = {"t": t, "k": k}
        for conv in self.convs:
            for key, value in values.items():
                getattr(conv, key).fill_(value)
        return values

    def rotate(self) -> None:
        """RBNN at the start of an epoch: every R1 and R2 anew from the present kernels; nothing for other methods."""
        rotate([conv for conv in self.convs if isinstance(conv, RBNNConv2d)])

    def notes(self) -> list[str]:
        """What a user should know: a schedule without convolutions, or convolutions without a schedule."""
        found = []
        if self.name != "none" and not self.convs:
            kind = _KINDS[self.name].__name__
            found.append(f"the recipe's schedule {self.name} has nothing to drive: the network has no {kind}")
        if self.unscheduled:
            kinds = ", ".join(sorted({type(m).__name__.removeprefix("Rep") for m in self.unscheduled}))
            found.append(f"{len(self.unscheduled)} convolutions ({kinds}) keep t, k or τ: binarization is {self.name}")
        return found
