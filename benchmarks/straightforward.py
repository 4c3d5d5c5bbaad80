"""The methods' binary convolutions as one writes them down from the papers: what a training step is compared with.

Plain eager PyTorch, float32 and NCHW, one operation per line of a formula; numbers that the formulas need on the host
are asked for there. Each class takes over the tensors of the layer of repbnn_cli.binary_conv whose method it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from repbnn_cli.binary_conv import BinaryConv2d, IRConv2d, RBNNConv2d, ReCUConv2d, SignConv2d


class _Convolution(nn.Module):
    def __init__(self, source: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(source.latent_kernel().detach().clone())
        self.stride, self.padding = source.stride, source.padding

    def convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(x, kernel, None, self.stride, self.padding)


def _per_filter(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each entry of axis 0, (N, 1, 1, 1)."""
    flat = x.reshape(len(x), -1)
    return flat.mean(-1).reshape(-1, 1, 1, 1), flat.std(-1).reshape(-1, 1, 1, 1)


class _TanhSign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(x, t, k)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, t, k = ctx.saved_tensors
        return k * t * (1 - torch.pow(torch.tanh(t * x), 2)) * g, None, None


class StraightIR(_Convolution):
    """IR-Net, arXiv 1909.10788, section 3."""

    def __init__(self, source: IRConv2d) -> None:
        super().__init__(source)
        self.t, self.k = source.t.clone(), source.k.clone()

    def forward(self, x: Tensor) -> Tensor:
        mean, _ = _per_filter(self.weight)
        centred = self.weight - mean
        _, std = _per_filter(centred)
        standard = centred / std
        magnitude = standard.abs().reshape(len(standard), -1).mean(-1)
        shift = torch.pow(2.0, torch.round(torch.log(magnitude) / math.log(2))).reshape(-1, 1, 1, 1).detach()
        kernel = _TanhSign.apply(standard, self.t, self.k) * shift
        return self.convolve(_TanhSign.apply(x, self.t, self.k), kernel)


class _PolynomialSign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        rising = torch.where((x > -1) & (x < 0), 2 + 2 * x, torch.zeros_like(x))
        falling = torch.where((x >= 0) & (x < 1), 2 - 2 * x, torch.zeros_like(x))
        return g * (rising + falling)


class _IdentitySign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


class StraightReCU(_Convolution):
    """ReCU, arXiv 2103.12369, section 3."""

    def __init__(self, source: ReCUConv2d) -> None:
        super().__init__(source)
        self.alpha = nn.Parameter(source.alpha.detach().clone())
        self.tau = source.tau.clone()

    def forward(self, x: Tensor) -> Tensor:
        mean, std = _per_filter(self.weight)
        standard = (self.weight - mean) / (std / (2 * math.sqrt(2)))
        if self.training:
            _, x_std = _per_filter(x)
            x = x / torch.sqrt(x_std**2 + 1e-5)
        scale = standard.abs().mean().item()
        quantile = -scale * math.log(2 - 2 * self.tau.item())
        kernel = _IdentitySign.apply(torch.clamp(standard, -quantile, quantile))
        return self.convolve(_PolynomialSign.apply(x), kernel) * self.alpha


class _TriangleSign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(x, t, k)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, t, k = ctx.saved_tensors
        slope = k * (2 * torch.sqrt(t**2 / 2) - torch.abs(t**2 * x))
        slope[slope < 0] = 0
        return g * slope, None, None


class StraightRBNN(_Convolution):
    """RBNN, arXiv 2009.13055, section 3."""

    def __init__(self, source: RBNNConv2d) -> None:
        super().__init__(source)
        self.alpha = nn.Parameter(source.alpha.detach().clone())
        self.rotate = nn.Parameter(source.rotate.detach().clone())
        self.r1, self.r2 = source.R1.clone(), source.R2.clone()
        self.t, self.k = source.t.clone(), source.k.clone()

    def forward(self, x: Tensor) -> Tensor:
        x_mean, x_std = _per_filter(x)
        x = (x - x_mean) / torch.sqrt(x_std**2 + 1e-5)
        mean, _ = _per_filter(self.weight)
        centred = self.weight - mean
        _, std = _per_filter(centred)
        standard = centred / std
        grid = standard.reshape(len(standard), len(self.r1), len(self.r2))
        rotated = torch.matmul(torch.matmul(self.r1.t(), grid), self.r2).reshape(standard.shape)
        turned = standard + torch.abs(torch.sin(self.rotate)) * (rotated - standard)
        kernel = _TriangleSign.apply(turned, self.t, self.k)
        # For activations t is at least 1 and k is 1: a decision on the host.
        t = self.t if self.t.item() > 1 else torch.ones_like(self.t)
        return self.convolve(_TriangleSign.apply(x, t, torch.ones_like(t)), kernel) * self.alpha


class StraightSign(_Convolution):
    """Bi-Real Net and ReActNet, arXiv 1808.00278 section 3.3, arXiv 2003.03488: sign minus and plus its estimator."""

    def forward(self, x: Tensor) -> Tensor:
        below, negative, low = (x < -1).type(x.dtype), (x < 0).type(x.dtype), (x < 1).type(x.dtype)
        first = -1 * below + (x * x + 2 * x) * (1 - below)
        second = first * negative + (-x * x + 2 * x) * (1 - negative)
        estimator = second * low + 1 * (1 - low)
        signs = torch.sign(x).detach() - estimator.detach() + estimator
        scale = self.weight.abs().mean(3, keepdim=True).mean(2, keepdim=True).mean(1, keepdim=True).detach()
        clipped = torch.clamp(self.weight, -1.0, 1.0)
        kernel = (scale * torch.sign(self.weight)).detach() - clipped.detach() + clipped
        return self.convolve(signs, kernel)


KINDS = {IRConv2d: StraightIR, ReCUConv2d: StraightReCU, RBNNConv2d: StraightRBNN, SignConv2d: StraightSign}


def straightforward(network: nn.Module) -> nn.Module:
    """Puts a straightforward layer in the place of each binary convolution, in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BinaryConv2d):
                setattr(module, name, KINDS[type(child)](child))
    return network
