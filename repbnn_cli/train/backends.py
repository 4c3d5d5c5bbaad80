"""Which kernels a network trains on: hands those of a backend to the layers that can take them.

Triton takes over the forward of every binary convolution of repbnn's own kinds (whose gradients stay with the vendor
library), and forward and backward of the BatchNorms that stand over a repeat. The user's own binary convolutions, the
plain BatchNorms and the 2-bit part of a gated convolution stay with torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli.binary_conv import BinaryConv2d, Pair, signs_convolved_by
from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import Backend
from repbnn_cli.rep_layers import RepBatchNorm2d
from repbnn_cli.train.ranks import Ranks


@contextmanager
def running_on(network: nn.Module, backend: str, ranks: Ranks) -> Iterator[None]:
    """Meanwhile the layers of `network` that can run on the kernels of `backend` do."""
    if backend == "torch":
        yield
        return
    from repbnn_cli.kernels.binary_conv2d import sign_conv2d  # imports Triton

    norms = repeating_norms(network, ranks)
    for norm in norms:
        norm.by_batch = _by_batch
    try:
        with signs_convolved_by(network, sign_conv2d):
            yield
    finally:
        for norm in norms:
            norm.by_batch = None


def repeating_norms(network: nn.Module, ranks: Ranks) -> list[RepBatchNorm2d]:
    """The BatchNorms over a repeat whose batch lies whole on one device; several processes share their statistics."""
    norms = [m for m in network.modules() if isinstance(m, RepBatchNorm2d) and m.weight is not None]
    return norms if ranks.size == 1 else []


def lines(network: nn.Module, backend: Backend, ranks: Ranks) -> list[str]:
    """What the user is told: which backend trains and why, and what of the network. A UsageError if that is nothing."""
    if backend.name == "torch":
        return [f"backend {backend}"]
    convs, norms = sum(isinstance(m, BinaryConv2d) for m in network.modules()), len(repeating_norms(network, ranks))
    if not convs:
        raise UsageError(
            f"--backend {backend.name}: the network has no binary convolution of repbnn's own kinds (those of the "
            "networks in `repbnn zoo`), which alone train on these kernels; use --backend torch"
        )
    return [f"backend {backend}: forward of {convs} binary convolutions, {norms} BatchNorms over a repeat"]


def notes(network: nn.Module, images: Tensor, backend: str) -> list[str]:
    """What exact zeros, seen on a few images, mean for training on packed bits; nothing where there are none."""
    if backend == "torch":
        return []
    found: list[Tensor] = []

    def count(signs: Tensor, kernel: Tensor, stride: Pair, padding: Pair) -> Tensor:
        found.append(torch.stack([(signs == 0).sum(), (kernel == 0).sum()]))
        return F.conv2d(signs, kernel, None, stride, padding)

    with torch.no_grad(), signs_convolved_by(network, count):
        network(images)
    activations, weights = torch.stack(found).sum(0).tolist()
    if not activations and not weights:
        return []
    return [f"in the last network {activations:,} activations of {len(images)} images and {weights:,} weights are "
            "exactly 0: +1 in packed bits, 0 in torch.sign"]  # fmt: skip


def _by_batch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from repbnn_cli.kernels.rep_batch_norm import rep_batch_norm

    made = rep_batch_norm(x, weight, bias, eps=eps)
    return made.values, made.mean, made.var
