"""Sign (torch.sign, so sign(0) = 0), its scaled form, a uniform quantiser and a step, each with a gradient estimator.

Notation: x is the tensor to binarise, of any shape, g the gradient that arrives. Every backward is elementwise (but
that of standardised_sign), so one pass over x and g; the tensors t and k of a schedule are 0-dim and get no gradient.

| function | backward | used by |
| --- | --- | --- |
| ste_sign | g · 1[abs(x) ≤ window] | FracBNN (window 1.3), ReCU's weights (window inf) |
| approx_sign | g · max(0, 2 − 2·abs(x)) | Bi-Real Net, ReActNet, AdamBNN, ReCU |
| ede_sign | g · k·t·(1 − tanh²(t·x)) | IR-Net |
| rbnn_sign | g · k·max(0, √2·t − t²·abs(x)) | RBNN's weights |
| standardised_sign | rbnn_sign's of the standardised x, through mean and deviation | RBNN's activations |
| scaled_sign | g · 1[abs(x) ≤ 1] | weights of Bi-Real Net, ReActNet, AdamBNN |
| uniform_quantize | g · 1[abs(x) ≤ 1] | FracBNN's 2-bit activations and 4-bit shortcuts |
| gate_step | g · 1[x > 0] | FracBNN's precision gate |
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

FILTER = (1, 2, 3)  # all dims of a kernel (O, I, kh, kw) but the filter, and of activations (N, C, H, W) but the sample


class _STESign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: float) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= ctx.window), None


class _ApproxSign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return cast(Tensor, grads[0] * (2 - 2 * x.abs()).clamp_min(0))


class _EDESign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(x, t, k)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        x, t, k = ctx.saved_tensors
        return grads[0] * ((1 - torch.tanh(t * x) ** 2) * t * k), None, None


class _RBNNSign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(x, t, k)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        x, t, k = ctx.saved_tensors
        return grads[0] * (_rbnn_slope(x, t) * k), None, None


def _rbnn_slope(x: Tensor, t: Tensor) -> Tensor:
    return (math.sqrt(2) - t * x.abs()).clamp_min(0) * t


class _StandardisedSign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor) -> Tensor:
        mean = x.mean(FILTER, keepdim=True)
        ctx.save_for_backward(x, mean, sample_deviation(x), t)
        return (x - mean).sign()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        # Written out: left to autograd, the sums over a sample wait for each other, three passes in the place of two.
        x, mean, deviation, t = ctx.saved_tensors
        standard = (x - mean) / deviation
        g = grads[0] * _rbnn_slope(standard, t)
        count = x[0].numel()
        along = (g * standard).sum(FILTER, keepdim=True) / (count - 1)
        return (g - g.sum(FILTER, keepdim=True) / count - standard * along) / deviation, None


class _ScaledSign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        signed = x.sign().mul_(scale)
        for part, kernel in zip(signed.split(64), x.split(64), strict=True):  # no second copy of a large kernel
            clipped = kernel.clamp(-1, 1)
            part.sub_(clipped).add_(clipped)
        return signed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1), None


class _UniformQuantize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        steps = (1 << bits) - 1
        return ((x.clamp(-1, 1) + 1) * (steps / 2)).round() * (2 / steps) - 1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1), None


class _GateStep(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        step = (x > 0).to(x.dtype)
        ctx.save_for_backward(step)
        return step

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (step,) = ctx.saved_tensors
        return cast(Tensor, grads[0] * step)


def sample_deviation(x: Tensor) -> Tensor:
    """√(var + 1e-5) of each sample of x (N, C, H, W), (N, 1, 1, 1); 1e-5 keeps a constant sample's gradient finite."""
    return (x.var(FILTER, keepdim=True) + 1e-5).sqrt()


def ste_sign(x: Tensor, window: float = 1.0) -> Tensor:
    """Sign with the straight-through gradient inside a clip window.

    Forward: sign(x). Backward: g · 1[|x| ≤ window]; a window of math.inf passes every gradient.
    Source: BNN, Courbariaux et al., arXiv 1602.02830, section 1.3 (window 1); FracBNN, arXiv 2012.12206 (window 1.3).
    """
    return cast(Tensor, _STESign.apply(x, window))  # type: ignore[no-untyped-call]


def approx_sign(x: Tensor) -> Tensor:
    """Sign with the derivative of the piecewise polynomial ApproxSign.

    Forward: sign(x). Backward: g · max(0, 2 − 2·|x|).
    Source: Bi-Real Net, Liu et al., arXiv 1808.00278, section 3.3.
    """
    return cast(Tensor, _ApproxSign.apply(x))  # type: ignore[no-untyped-call]


def ede_sign(x: Tensor, t: Tensor, k: Tensor) -> Tensor:
    """Sign with the gradient of IR-Net's error decay estimator, k·tanh(t·x).

    Forward: sign(x). Backward: g · k·t·(1 − tanh²(t·x)). t and k are 0-dim; t rises from 1e-3 to 1e1 over
    training and k = max(1/t, 1).
    Source: IR-Net, Qin et al., arXiv 1909.10788, section 3.3.
    """
    return cast(Tensor, _EDESign.apply(x, t, k))  # type: ignore[no-untyped-call]


def rbnn_sign(x: Tensor, t: Tensor, k: Tensor) -> Tensor:
    """Sign with RBNN's training-aware approximation.

    Forward: sign(x). Backward: g · max(0, k·(√2·t − t²·|x|)). t and k are 0-dim; t rises from 1e-2 to 1e1 over
    training, k = max(1/t, 1); activations use k = 1 and max(t, 1).
    Source: RBNN, Lin et al., arXiv 2009.13055, section 3.
    """
    return cast(Tensor, _RBNNSign.apply(x, t, k))  # type: ignore[no-untyped-call]


def standardised_sign(x: Tensor, t: Tensor) -> Tensor:
    """RBNN's sign of activations x (N, C, H, W), each sample standardised: z = (x − mean)/√(var + 1e-5).

    Forward: sign(x − mean), which is sign(z). Backward: h = g · max(0, √2·t − t²·|z|), then
    (h − mean(h) − z·Σ(h·z)/(n − 1))/√(var + 1e-5), n the size of a sample; var has Bessel's correction. t is 0-dim.
    Source: RBNN, Lin et al., arXiv 2009.13055, section 3.
    """
    return cast(Tensor, _StandardisedSign.apply(x, t))  # type: ignore[no-untyped-call]


def scaled_sign(x: Tensor, scale: Tensor) -> Tensor:
    """Scaled sign of a kernel whose scale takes no part in the gradient.

    Forward: scale · sign(x), scale broadcastable to x; computed as scale·sign(x) − clip(x, −1, 1) + clip(x, −1, 1),
    as the authors write it, because the rounding of the last bit decides signs of near-zero activations further down
    and published logits depend on it. Backward: g · 1[|x| ≤ 1] for x, without the scale; nothing for scale.
    Source: Bi-Real Net, Liu et al., arXiv 1808.00278, section 3.3, as released with ReActNet, arXiv 2003.03488.
    """
    return cast(Tensor, _ScaledSign.apply(x, scale))  # type: ignore[no-untyped-call]


def uniform_quantize(x: Tensor, bits: int) -> Tensor:
    """Uniform quantiser on [−1, 1] with 2^bits levels, both ends included.

    Forward: with n = 2^bits − 1, round((clip(x, −1, 1) + 1)·n/2)·2/n − 1. Backward: g · 1[|x| ≤ 1].
    Source: FracBNN, Zhang et al., arXiv 2012.12206, section 3.
    """
    return cast(Tensor, _UniformQuantize.apply(x, bits))  # type: ignore[no-untyped-call]


def gate_step(x: Tensor) -> Tensor:
    """Heaviside step with the sparse straight-through gradient: only open gates learn.

    Forward: 1 where x > 0, else 0, in x's dtype. Backward: g · 1[x > 0].
    Source: Precision Gating, Zhang et al., arXiv 2002.07136, section 3; used by FracBNN, arXiv 2012.12206.
    """
    return cast(Tensor, _GateStep.apply(x))  # type: ignore[no-untyped-call]
