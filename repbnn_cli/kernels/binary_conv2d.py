"""The binary convolution of training in Triton: an implicit matrix product over packed bits, with its gradient.

    out = conv(sign(x), sign(weight)), zero padding contributes 0, sign(0) = +1 (packing.py)

Shape letters: N samples; I, O input and output channels; H, W and H', W' pixels before and after; kh, kw of the kernel;
L = ceil(I/32) words; M = N·H'·W' output pixels.

Forward: x and weight are packed (one pass each), then every program makes BLOCK_M output pixels × BLOCK_N filters. A
step takes one word of one tap: BLOCK_M and BLOCK_N words, unpacked in registers to int8 operands of a 32-deep
tensor-core product with int32 sums, which are exact. An operand is 2·bit − 1 where the value exists and 0 where it does
not: pixels outside the image on the one side, channels beyond I on the other; one of them makes a product vanish.

Backward: straight-through, as clipped sign functions x and weight each let the gradient pass where |value| ≤ window.
The two convolutions are real-valued and stay with the vendor library, with ±1 operands unpacked from the bits that
forward packed: what is saved is one bit per value for the signs and one for the mask (none with window = inf).

`sign_conv2d` is the same for a caller with estimators of its own, who has signs and a scaled kernel already: the scale
of each filter is applied where the sums are stored, and the gradients are those of a plain convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import launching
from repbnn_cli.kernels.packing import output_size, word_count
from repbnn_cli.kernels.sign_packing import apply_mask, empty_like_layout, flat_pixels, pack, packed_like, unpack_signs

Pair = tuple[int, int]


@triton.jit
def _convolve(
    words_ptr, kernel_ptr, scale_ptr, out_ptr, pixels, channels, filters, height, width, out_image, out_width,
    out_n, out_c, out_p,
    WORDS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    PY: tl.constexpr, PX: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output pixels × BLOCK_N filters of words (N, H, W, WORDS), kernel (O, KH, KW, WORDS) and scale (O,)."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    out_filter = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 32)
    sample, spot = pixel // out_image, pixel % out_image
    top, left = spot // out_width * SY - PY, spot % out_width * SX - PX
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for step in range(KH * KW * WORDS):
        tap, word = step // WORDS, step % WORDS
        y, x = top + tap // KW, left + tap % KW
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (pixel < pixels)
        place = ((sample * height + y).to(tl.int64) * width + x) * WORDS + word
        a = tl.load(words_ptr + place, mask=inside, other=0)
        b = tl.load(kernel_ptr + (out_filter * KH * KW + tap) * WORDS + word, mask=out_filter < filters, other=0)
        exists = (word * 32 + lane < channels).to(tl.int32)
        a_signs = ((a[:, None] >> lane[None, :]) & 1) * 2 - inside.to(tl.int32)[:, None]  # (BLOCK_M, 32)
        b_signs = ((b[None, :] >> lane[:, None]) & 1) * 2 - exists[:, None]  # (32, BLOCK_N)
        total = tl.dot(a_signs.to(tl.int8), b_signs.to(tl.int8), total, out_dtype=tl.int32)
    row = sample.to(tl.int64) * out_n + spot.to(tl.int64) * out_p
    place = row[:, None] + out_filter.to(tl.int64)[None, :] * out_c
    inside = (pixel < pixels)[:, None] & (out_filter < filters)[None, :]
    if SCALED:
        scale = tl.load(scale_ptr + out_filter, mask=out_filter < filters, other=0.0)
        out = total.to(scale_ptr.dtype.element_ty) * scale[None, :]
    else:
        out = total.to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


def tile(filters: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_N and warps: one program for all filters up to 128, within 170 registers and without spills."""
    block_n = min(128, max(16, triton.next_power_of_2(filters)))
    return {"BLOCK_M": 64, "BLOCK_N": block_n, "num_warps": 8 if block_n > 64 else 4}


def convolve_packed(
    words: Tensor, kernel_words: Tensor, in_channels: int, stride: Sequence[int], padding: Sequence[int], out: Tensor,
    scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills out (N, O, H', W'), NCHW or channels_last, from words (N, H, W, L) and kernel_words (O, kh, kw, L).

    scale: (O,) float32 or float64, times which the sums are stored.
    """
    (_, height, width, length), (filters, kh, kw, _) = words.shape, kernel_words.shape
    n, _, rows, cols = out.shape
    blocks = tile(filters)
    grid = (triton.cdiv(n * rows * cols, blocks["BLOCK_M"]), triton.cdiv(filters, blocks["BLOCK_N"]))
    _convolve[grid](
        words, kernel_words, out if scale is None else scale, out, n * rows * cols, in_channels, filters,
        height, width, rows * cols, cols, *flat_pixels(out)[1],
        WORDS=length, KH=kh, KW=kw, SY=stride[0], SX=stride[1], PY=padding[0], PX=padding[1],
        SCALED=scale is not None, **blocks,
    )  # fmt: skip


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "repbnn::binary_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, SymInt[2] stride, SymInt[2] padding, float x_window, float weight_window, "
    "Tensor? x_signs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _binary_conv2d(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    x_window: float, weight_window: float, x_signs: Tensor | None,
) -> _Outputs:  # fmt: skip
    """(out, x's sign bits, weight's sign bits, x's mask, weight's mask); x's sign bits are empty if they were given."""
    out = _out_like(x, weight, stride, padding)
    signs, mask = pack(x, x_window, x_signs is None)
    kernel_signs, kernel_mask = pack(weight, weight_window, True)
    with launching(x):
        convolve_packed(
            signs if x_signs is None else x_signs.contiguous(), kernel_signs, x.shape[1], stride, padding, out
        )
    return out, signs, kernel_signs, mask, kernel_mask


def _outputs_like(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    x_window: float, weight_window: float, x_signs: Tensor | None,
) -> _Outputs:  # fmt: skip
    signs, mask = packed_like(x, x_window, x_signs is None)
    kernel_signs, kernel_mask = packed_like(weight, weight_window, True)
    return _out_like(x, weight, stride, padding), signs, kernel_signs, mask, kernel_mask


def _out_like(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The result, uninitialised: (N, O, H', W'), in x's dtype and memory format."""
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding)
    return empty_like_layout(x, (x.shape[0], weight.shape[0], *size), x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    x, weight, stride, padding, _, _, x_signs = inputs
    _, signs, *rest = output
    ctx.save_for_backward(signs if x_signs is None else x_signs, *rest)
    ctx.x_channels, ctx.x_dtype, ctx.weight_dtype = x.shape[1], x.dtype, weight.dtype
    ctx.stride, ctx.padding = list(stride), list(padding)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 7
    signs, kernel_signs, mask, kernel_mask = ctx.saved_tensors
    to_x, to_weight, *_ = torch.ops.aten.convolution_backward(
        gradient, unpack_signs(signs, ctx.x_channels, gradient.dtype),
        unpack_signs(kernel_signs, ctx.x_channels, gradient.dtype), None,
        ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, (ctx.needs_input_grad[0], ctx.needs_input_grad[1], False),
    )  # fmt: skip
    if to_x is not None:
        to_x = (apply_mask(to_x, mask) if mask.shape[-1] else to_x).to(ctx.x_dtype)
    if to_weight is not None:
        to_weight = (apply_mask(to_weight, kernel_mask) if kernel_mask.shape[-1] else to_weight).to(ctx.weight_dtype)
    return to_x, to_weight, None, None, None, None, None


_binary_conv2d.register_fake(_outputs_like)
_binary_conv2d.register_autograd(_backward, setup_context=_save)


def _check(name: str, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> None:
    """The kernels read memory by these shapes."""
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        found = f"{tuple(x.shape)} and a kernel of {tuple(weight.shape)}"
        raise UsageError(f"{name}: found {found}; expected (N, I, H, W) and (O, I, kh, kw)")
    if min(output_size(x.shape[2:], weight.shape[2:], stride, padding)) < 1:
        found = f"a kernel of {tuple(weight.shape[2:])} for images of {tuple(x.shape[2:])}, padded by {tuple(padding)}"
        raise UsageError(f"{name}: found {found}; expected one that fits into them")


def binary_conv2d(
    x: Tensor, weight: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0), *,
    x_window: float = 1.0, weight_window: float = 1.0, x_signs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """conv(sign(x), sign(weight)): (N, I, H, W), (O, I, kh, kw) → (N, O, H', W') in x's dtype and memory format.

    The sums are exact integers, rounded once to x's dtype. Gradients pass where |x| ≤ x_window and
    |weight| ≤ weight_window (compared in float32; math.inf passes everything and saves no mask).
    x_signs: the sign bits of x, (N, H, W, L) int32, where an operator before has packed them already.
    Raises UsageError for shapes that do not fit each other.
    """
    _check("binary_conv2d", x, weight, stride, padding)
    expected = (x.shape[0], *x.shape[2:], word_count(x.shape[1]))
    if x_signs is not None and tuple(x_signs.shape) != expected:
        raise UsageError(f"binary_conv2d: x_signs of shape {tuple(x_signs.shape)}; expected {expected}")
    return cast(Tensor, _binary_conv2d(x, weight, stride, padding, x_window, weight_window, x_signs)[0])


@torch.library.custom_op(
    "repbnn::sign_conv2d",
    mutates_args=(),
    schema="(Tensor signs, Tensor kernel, SymInt[2] stride, SymInt[2] padding) -> (Tensor, Tensor)",
)
def _sign_conv2d(signs: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(out, bits of signs)."""
    out = _out_like(signs, kernel, stride, padding)
    words, kernel_words = pack(signs)[0], pack(kernel)[0]
    scale = kernel.abs().amax((1, 2, 3)).to(torch.promote_types(kernel.dtype, torch.float32))
    with launching(signs):
        convolve_packed(words, kernel_words, signs.shape[1], stride, padding, out, scale)
    return out, words


def _scaled_like(signs: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    return _out_like(signs, kernel, stride, padding), packed_like(signs)[0]


def _save_scaled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    signs, kernel, stride, padding = inputs
    ctx.save_for_backward(output[1], kernel)
    ctx.signs_dtype, ctx.stride, ctx.padding = signs.dtype, list(stride), list(padding)
    ctx.set_materialize_grads(False)


def _scaled_backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 4
    words, kernel = ctx.saved_tensors
    to_signs, to_kernel, *_ = torch.ops.aten.convolution_backward(
        gradient, unpack_signs(words, kernel.shape[1], gradient.dtype), kernel.to(gradient.dtype), None,
        ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, (ctx.needs_input_grad[0], ctx.needs_input_grad[1], False),
    )  # fmt: skip
    return (
        None if to_signs is None else to_signs.to(ctx.signs_dtype),
        None if to_kernel is None else to_kernel.to(kernel.dtype),
        None, None,
    )  # fmt: skip


_sign_conv2d.register_fake(_scaled_like)
_sign_conv2d.register_autograd(_scaled_backward, setup_context=_save_scaled)


def sign_conv2d(signs: Tensor, kernel: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """F.conv2d(signs, kernel, None, stride, padding) of signs (N, I, H, W) and a kernel (O, I, kh, kw) of scaled signs.

    The magnitude of a filter is its largest one, and a 0 on either side counts as +1: other kernels are not for here.
    The integer sums are exact; they are multiplied by the scale and rounded once to the dtype of signs. Gradients are
    those of F.conv2d, by the vendor library; of signs one bit per value is kept for them. A NaN in the kernel reaches
    the result, one among the signs does not.
    Raises UsageError for shapes that do not fit each other.
    """
    _check("sign_conv2d", signs, kernel, stride, padding)
    return cast(Tensor, _sign_conv2d(signs, kernel, stride, padding)[0])


def count_macs(weight: Sequence[int], out: Sequence[int]) -> int:
    """Multiply-accumulates of the forward convolution from the shapes of its tensors; padded positions count."""
    return math.prod(out) * math.prod(weight[1:])


@register_flop_formula([torch.ops.repbnn.binary_conv2d, torch.ops.repbnn.sign_conv2d])
def _torch_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """For torch.utils.flop_counter, whose convolutions count a multiply-accumulate as two."""
    return 2 * count_macs(weight, out_shape[0])


def _fvcore_macs(inputs: list[Any], outputs: list[Any]) -> int:
    return count_macs(inputs[1].type().sizes(), outputs[0].type().sizes())


FVCORE_HANDLES = {"repbnn::binary_conv2d": _fvcore_macs, "repbnn::sign_conv2d": _fvcore_macs}
"""For fvcore.nn.FlopCountAnalysis(...).set_op_handle(**FVCORE_HANDLES), which counts a multiply-accumulate as one."""
