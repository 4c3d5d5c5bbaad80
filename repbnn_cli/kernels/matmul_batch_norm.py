"""BatchNorm of a repeated tensor in training by matrix products: on a CPU, where few channels are repeated often.

    z = X̂·E + bias,   E (C, R·C): weight_j in row j mod C of column j, 0 elsewhere

Letters as in rep_batch_norm.py, which does the same on a GPU, and has the formulas of the backward; here Σ dz·x̂ and
Σ dz are read off [X̂ 1]ᵀ·dZ, and Σ_copies weight_j·dz_j is dZ·Eᵀ. A product is R·C² multiply-accumulates a pixel, few
beside those of a convolution with C = O/β filters. The code that torch.compile writes fetches the value of channel
j mod C one by one where C is no multiple of a vector's width; then this is several times as fast (docs/performance.md).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

_WIDTHS = {"AVX512": 16, "AVX2": 8}
"""float32 values of a vector, by what `torch.backends.cpu.get_cpu_capability` says; 4 elsewhere."""


def pays(channels: int) -> bool:
    """Whether so many distinct channels are ones that compiled code would not take as whole vectors."""
    return channels % _WIDTHS.get(torch.backends.cpu.get_cpu_capability(), 4) != 0


def rep_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C, H, W), (R·C,), (R·C,) → values (N, R·C, H, W), channels_last; mean and biased variance of the batch, (C,).

    All in one dtype, float32 or float64, on a CPU. What is not finite in a pixel reaches all its channels.
    """
    return cast(tuple[Tensor, Tensor, Tensor], _RepBatchNorm.apply(x, weight, bias, eps))  # type: ignore[no-untyped-call]


def _copying(weight: Tensor, channels: int) -> Tensor:
    """E, (C, R·C)."""
    once = torch.eye(channels, dtype=weight.dtype, device=weight.device)
    return once.repeat(1, len(weight) // channels) * weight


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) → (M, C): nothing is copied of a tensor that is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    """(M, C) → (N, C, H, W)."""
    samples, _, height, width = like.shape
    return pixels.view(samples, height, width, -1).permute(0, 3, 1, 2)


class _RepBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        pixels = _pixels(x)
        var, mean = torch.var_mean(pixels, 0, correction=0)
        inverse = (var + eps).rsqrt()
        normalised = (pixels - mean) * inverse
        # Not a view: a forward may write into it (`out += x`), which autograd refuses for views of a function's own.
        samples, channels, *size = x.shape
        shape = (samples, len(weight), *size)
        values = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        torch.addmm(bias, normalised, _copying(weight, channels), out=_pixels(values))
        ctx.save_for_backward(normalised, inverse, weight)
        ctx.mark_non_differentiable(mean, var)
        return values, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        normalised, inverse, weight = ctx.saved_tensors
        count, channels = normalised.shape
        gradient = _pixels(grads[0])
        # The tall matrix on the right: the other way round this product takes ten times as long.
        sums = torch.cat([normalised, normalised.new_ones(count, 1)], 1).t() @ gradient  # (C + 1, R·C)
        to_weight = sums[:channels].view(channels, -1, channels).diagonal(dim1=0, dim2=2).flatten()
        to_bias = sums[channels]
        means = [(weight * total).view(-1, channels).sum(0) / count for total in (to_bias, to_weight)]
        to_normalised = gradient @ _copying(weight, channels).t()
        to_x = (to_normalised - means[0] - normalised * means[1]) * inverse
        return _image(to_x, grads[0]), to_weight, to_bias, None
