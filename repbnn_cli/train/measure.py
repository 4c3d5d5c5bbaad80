"""Accuracy of a network on batches of images, and the re-estimation of its BatchNorm statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repbnn_cli.errors import UsageError
from repbnn_cli.logits import checked_logits, logits_of
from repbnn_cli.restoring import kept_in_eval, modes_kept
from repbnn_cli.train.ranks import Ranks

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W), labels (N,)
RUNNING = ("running_mean", "running_var")  # buffers of statistics, in torch's BatchNorms and in research code's


@dataclass(frozen=True)
class Evaluation:
    """Top-1 and top-5 in percent, mean cross-entropy, and the number of images they are over."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Callable[[Tensor], object] | None = None,
    ranks: Ranks | None = None,
    classes: int | None = None,
) -> Evaluation:
    """Accuracy in eval mode; the network's mode is as before afterwards. One transfer from the device in all.

    forward: computes the network's output in its place; ranks: whose batches are counted together; classes: how many
    logits the first batch is checked to give.
    """
    totals: Tensor | None = None
    forward = forward or network
    with modes_kept(network):
        network.eval()
        for images, labels in batches:
            if classes is not None and totals is None:
                logits = checked_logits(forward, images, classes)
            else:
                logits = logits_of(forward(images))
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums = torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, loss.new_full((), len(labels))])
            if totals is None:  # Apple's GPUs have no double; float holds each image of 16 million
                totals = sums.new_zeros(4, dtype=torch.float32 if sums.device.type == "mps" else torch.float64)
            totals = totals + sums
    if ranks is not None and ranks.size > 1:
        totals = ranks.sum(torch.zeros(4, dtype=torch.float64, device=device_of(network)) if totals is None else totals)
    if totals is None:
        raise UsageError("evaluate: there are no images; check the data set's test part")
    top1, top5, loss_sum, count = totals.tolist()
    return Evaluation(100 * top1 / count, 100 * top5 / count, loss_sum / count, int(count))


@torch.no_grad()
def calibrate(network: nn.Module, batches: Iterable[Batch], n: int) -> int:
    """Estimates all running statistics of normalisations anew, over the first n batches; how many it saw.

    0 for a network without any. Only normalisations are in training mode meanwhile, so that nothing random runs; modes
    and momenta are as before afterwards. Every layer sees the batch statistics of those before it, as in training.
    Those that the network keeps in eval mode when it is trained keep their statistics.
    """
    kept, seen = set(kept_in_eval(network).values()), 0
    norms = [norm for norm in norms_of(network) if norm not in kept]
    if not norms:
        return 0
    with modes_kept(network):
        network.eval()
        with estimating(norms):
            for images, _ in islice(batches, n):
                network(images)
                seen += 1
    if seen == 0:
        raise UsageError(f"calibrate: saw no batch of the {n} asked for; check the data set and the batch size")
    return seen


def norms_of(module: nn.Module) -> list[nn.Module]:
    """The normalisations in it that keep running statistics: torch's, and classes of the user's own."""
    return [m for m in module.modules() if any(isinstance(getattr(m, n, None), Tensor) for n in RUNNING)]


@contextmanager
def estimating(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile running statistics follow the batches that come by; modes return after.

    torch's BatchNorms start over, as plain averages; the user's own go on from where they are, in their own way.
    """
    norms = list(norms)
    momenta = [(norm, norm.momentum) for norm in norms if isinstance(norm, _BatchNorm)]
    for averaged, _ in momenta:
        averaged.reset_running_stats()
        averaged.momentum = None
    with modes_kept(*norms):
        for norm in norms:
            norm.training = True
        try:
            yield
        finally:
            for averaged, momentum in momenta:
                averaged.momentum = momentum


def device_of(network: nn.Module) -> torch.device:
    """Where a network's tensors are; the CPU for one without any."""
    first = next(itertools.chain(network.parameters(), network.buffers()), None)
    return torch.device("cpu") if first is None else first.device
