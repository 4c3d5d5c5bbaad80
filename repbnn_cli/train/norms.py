"""BatchNorm over a batch that is cut among processes: statistics of the whole, as one process would take them.

Each rank sends mean, sum of squared deviations and count of its part; they are combined by Chan's formula
(https://doi.org/10.1080/00031305.1983.10483115), in the same order on every rank. torch's SyncBatchNorm does this on
GPUs only, and knows nothing of a BatchNorm that repeats its channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repbnn_cli.errors import UsageError
from repbnn_cli.rep_layers import RepBatchNorm1d, RepBatchNorm2d, is_batch_norm
from repbnn_cli.restoring import kept_in_eval
from repbnn_cli.train.measure import norms_of
from repbnn_cli.train.ranks import Ranks


@contextmanager
def synchronised(network: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Meanwhile every BatchNorm in training mode normalises by the statistics of the batch of all ranks.

    Raises UsageError for normalisations in code of the user's own, which would take those of a part of the batch.
    """
    norms = _norms(network) if ranks.size > 1 else []
    for norm in norms:
        # On the instance, where it goes before the class's method and is no part of the state dict.
        if isinstance(norm, RepBatchNorm1d | RepBatchNorm2d):
            norm.__dict__["_normalise"] = partial(_normalised, norm, ranks)
        else:
            norm.__dict__["forward"] = partial(_forward, norm, ranks)
    try:
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("_normalise", None)
            norm.__dict__.pop("forward", None)


def _norms(network: nn.Module) -> list[_BatchNorm]:
    kept, running, found = set(kept_in_eval(network).values()), set(norms_of(network)), []
    for path, module in network.named_modules():
        if module in kept or not (isinstance(module, _BatchNorm) or module in running):
            continue
        if not is_batch_norm(module):
            raise UsageError(
                f"{path}: {type(module).__name__} takes statistics of its batch by code of its own, and each process "
                "sees a part of the batch only; train in one process"
            )
        found.append(module)
    return found


def _forward(norm: _BatchNorm, ranks: Ranks, x: Tensor) -> Tensor:
    if not norm.training:
        result: Tensor = type(norm).forward(norm, x)
        return result
    shape = (1, -1, *[1] * (x.dim() - 2))
    normalised = _normalised(norm, ranks, x)
    if norm.weight is None:
        return normalised
    return torch.addcmul(norm.bias.view(shape), normalised, norm.weight.view(shape))


def _normalised(norm: _BatchNorm, ranks: Ranks, x: Tensor) -> Tensor:
    """x̂ over the batch of all ranks, (N, C, ...), from this rank's part; updates the running statistics.

    These may hold `repeats` copies of the C channels, in blocks of C.
    """
    normalised, mean, var = _GlobalNorm.apply(x, norm.eps, ranks)  # type: ignore[no-untyped-call]
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            for running, found in ((norm.running_mean, mean), (norm.running_var, var)):
                running.view(-1, x.shape[1]).lerp_(found.to(running.dtype), momentum)
    result: Tensor = normalised
    return result


class _GlobalNorm(torch.autograd.Function):
    """(x, eps) → x̂ = (x − μ)/√(σ² + eps), μ, σ² unbiased; statistics over all ranks' x, per channel.

    With n values per channel in all and g = ∂L/∂x̂:  ∂L/∂x = (g − Σg/n − x̂·Σ(g·x̂)/n)/√(σ² + eps), sums over all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        channels, shape = x.shape[1], (1, -1, *[1] * (x.dim() - 2))
        dims = [d for d in range(x.dim()) if d != 1]
        count = x.numel() // channels
        own_mean = x.mean(dims) if count else x.new_zeros(channels)
        own_squares = (x - own_mean.view(shape)).square().sum(dims)
        parts = ranks.gather(torch.cat([own_mean, own_squares, own_mean.new_tensor([count])]))  # (ranks, 2·C + 1)
        means, squares, counts = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
        n = counts.sum()
        mean = (means * counts).sum(0) / n
        var = (squares + counts * (means - mean).square()).sum(0) / n
        inverse = (var + eps).rsqrt()
        normalised = (x - mean.view(shape)) * inverse.view(shape)
        ctx.save_for_backward(normalised, inverse, n)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean, unbiased := var * (n / (n - 1).clamp_min(1)))
        return normalised, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        normalised, inverse, n = ctx.saved_tensors
        g, shape = gradients[0], (1, -1, *[1] * (normalised.dim() - 2))
        dims = [d for d in range(g.dim()) if d != 1]
        sums = ctx.ranks.sum(torch.cat([g.sum(dims), (g * normalised).sum(dims)])) / n
        mean_g, mean_gx = sums.chunk(2)
        return (g - mean_g.view(shape) - normalised * mean_gx.view(shape)) * inverse.view(shape), None, None
