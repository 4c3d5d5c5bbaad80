"""Convolution of signs by a CPU's 8-bit arithmetic: exact, and two to three times as fast as in float32.

oneDNN multiplies uint8 activations with int8 weights and adds up in int32. Signs {−1, 0, 1} go in as {0, 1, 2} with
zero point 1, so that zero padding stays 0; two products fit the 16 bits in which processors without VNNI add pairs.
Gradients are real numbers: their two convolutions are PyTorch's, in float32, or in bfloat16 where the caller asks.

Shape letters: N samples, I and O channels, (H, W) and (H', W') images, (kh, kw) kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from repbnn_cli.kernels.packing import output_size

Pair = tuple[int, int]


class _Kernel:
    """A kernel (O, I, kh, kw), 0 or ± one scale a filter, in the layout in which oneDNN wants it."""

    def __init__(self, kernel: Tensor, stride: Sequence[int], padding: Sequence[int]) -> None:
        scale = kernel.abs().amax((1, 2, 3))
        self.scale = torch.where(scale == 0, 1, scale)  # a filter of zeros; NaN stays, so that the result has it
        # Of a single input channel oneDNN adds up something else at some strides: a second one of zeros is beside it.
        self.alone = kernel.shape[1] == 1
        signs = F.pad(kernel, (0, 0, 0, 0, 0, 1)) if self.alone else kernel
        self.signs: Tensor | None = signs.sign().to(torch.int8)
        self.points = torch.zeros(len(scale), dtype=torch.int32)
        self.geometry = (list(stride), list(padding), [1, 1])

    def __call__(self, levels: Tensor) -> Tensor:
        """levels (N, I, H, W), uint8, sign + 1 → (N, O, H', W') float32."""
        onednn = torch.ops.onednn
        if self.alone:
            levels = F.pad(levels, (0, 0, 0, 0, 0, 1), value=1)  # sign 0
        if self.signs is not None:  # the layout depends on the size of the images, which the first ones tell
            shape = list(levels.shape)
            self.packed = onednn.qconv_prepack(self.signs, self.scale, 1.0, 1, *self.geometry, 1, shape)
            self.signs = None
        result = onednn.qconv2d_pointwise(
            levels.contiguous(memory_format=torch.channels_last), 1.0, 1, self.packed, self.scale, self.points, None,
            *self.geometry, 1, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return cast(Tensor, result)


def _result(levels: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """What a convolution gives, without its values; kernel: its (O, kh, kw)."""
    shape = (len(levels), kernel[0], *output_size(levels.shape[2:], kernel[1:], stride, padding))
    return torch.empty(shape, device=levels.device).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("repbnn::int8_conv2d", mutates_args=())
def _int8_conv2d(levels: Tensor, kernel: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """levels (N, I, H, W), uint8, sign + 1; kernel (O, I, kh, kw), 0 or ± a filter's scale → (N, O, H', W') float32."""
    return _Kernel(kernel, stride, padding)(levels)


@_int8_conv2d.register_fake
def _(levels: Tensor, kernel: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    return _result(levels, (len(kernel), *kernel.shape[2:]), stride, padding)


# Kernels that stay as they are, by number: an operator that torch.compile keeps whole takes no such object.
_held: dict[int, _Kernel] = {}
_numbers = itertools.count()


@torch.library.custom_op("repbnn::int8_conv2d_held", mutates_args=())
def _int8_conv2d_held(
    levels: Tensor, number: int, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:  # fmt: skip
    """levels (N, I, H, W), uint8, sign + 1; number: of a kernel that is held, (O, kh, kw) → (N, O, H', W') float32."""
    return _held[number](levels)


@_int8_conv2d_held.register_fake
def _(levels: Tensor, number: int, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    return _result(levels, kernel, stride, padding)


@contextmanager
def held(kernel: Tensor, stride: Pair, padding: Pair) -> Iterator[Callable[..., Tensor]]:
    """For inference: meanwhile `sign_conv2d` with this kernel, laid out once; a kernel that it is given is ignored."""
    number = next(_numbers)
    _held[number] = _Kernel(kernel.detach(), stride, padding)
    sizes = [len(kernel), *kernel.shape[2:]]

    def convolve(signs: Tensor, kernel: Tensor, stride: Pair, padding: Pair) -> Tensor:
        levels = (signs + 1).to(torch.uint8)
        return cast(Tensor, _int8_conv2d_held(levels, number, sizes, list(stride), list(padding)))

    try:
        yield convolve
    finally:
        del _held[number]


_FEW = 8
"""Below so many filters oneDNN's gradient of a kernel computes mostly padding: one product takes half as long."""


def _to_kernel(gradient: Tensor, signs: Tensor, size: Sequence[int], padding: Pair) -> Tensor:
    """∂L/∂kernel, (O, I, kh, kw), at stride 1: what the gradient has around each pixel, times the pixel's signs.

    gradient: (N, O, H', W'); signs: (N, I, H, W); size: (kh, kw). The windows lie on the gradient, since O is small.
    """
    (kh, kw), (filters, channels) = size, (gradient.shape[1], signs.shape[1])
    top, left = kh - 1 - padding[0], kw - 1 - padding[1]
    padded = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    windows = padded.unfold(1, kh, 1).unfold(2, kw, 1).permute(0, 1, 2, 4, 5, 3)  # (N, H, W, kh, kw, O)
    product = windows.reshape(-1, kh * kw * filters).t() @ signs.permute(0, 2, 3, 1).reshape(-1, channels)
    return product.view(kh, kw, filters, channels).flip(0, 1).permute(2, 3, 0, 1)


class _SignConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, signs: Tensor, kernel: Tensor, stride: Pair, padding: Pair, gradients: torch.dtype) -> Tensor:
        ctx.save_for_backward(signs, kernel)
        ctx.geometry, ctx.gradients = (stride, padding), gradients
        return cast(Tensor, _int8_conv2d((signs + 1).to(torch.uint8), kernel, list(stride), list(padding)))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        signs, kernel = ctx.saved_tensors
        operands = [t.to(ctx.gradients) for t in (grads[0], signs, kernel)]
        wanted = ctx.needs_input_grad[:2]
        apart = wanted[1] and len(kernel) < _FEW and ctx.geometry[0] == (1, 1)
        to_signs, to_kernel, _ = torch.ops.aten.convolution_backward(
            *operands, None, *ctx.geometry, (1, 1), False, (0, 0), 1, (wanted[0], wanted[1] and not apart, False)
        )
        if apart:
            to_kernel = _to_kernel(operands[0], operands[1], kernel.shape[2:], ctx.geometry[1])
        found = [None if t is None else t.to(grads[0].dtype) for t in (to_signs, to_kernel)]
        return found[0], found[1], None, None, None


def sign_conv2d(
    signs: Tensor, kernel: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0), *,
    gradients: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """F.conv2d(signs, kernel, None, stride, padding), float32, on a CPU: (N, I, H, W), (O, I, kh, kw) → (N, O, H', W').

    signs: −1, 0 or 1. kernel: in each filter ± one scale, or 0; the largest magnitude stands for all. The sums are
    exact and rounded once, when they are scaled. gradients: the dtype in which their two convolutions multiply;
    bfloat16 rounds the gradient that arrives (8 bits), signs are exact in it. A NaN in the kernel reaches the result,
    one among the signs does not. Needs `available()`.
    """
    return cast(Tensor, _SignConv2d.apply(signs, kernel, stride, padding, gradients))  # type: ignore[no-untyped-call]


@cache
def available() -> bool:
    """Whether this PyTorch has the operator and it computes here what F.conv2d does; tried once, on a small image."""
    draw = torch.Generator().manual_seed(0)
    signs, kernel = (torch.randn(shape, generator=draw).sign() for shape in ((2, 24, 6, 7), (5, 24, 3, 3)))
    try:
        found = sign_conv2d(signs, kernel, (2, 1), (1, 1))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(found, F.conv2d(signs, kernel, None, (2, 1), (1, 1)))
