"""BatchNorm of a repeated tensor in training, with what follows it, in Triton: the repeat exists as its result only.

    z_j = weight_j·x̂_{j mod C} + bias_j + residual_j,   y = z or clamp(z, −1, 1),   signs = bits of [y ≥ 0]

Shape letters: N samples, H, W pixels, M = N·H·W; C channels of x, the distinct ones; R repeats (β² after a RepBconv, 1
in a raw network); R·C channels of the result, of which j is a copy of j mod C (RepBNN, arXiv 2207.09049, section 4.4).
x̂ = (x − mean)/√(var + ε), by the statistics of the batch, once per distinct channel.

Forward is one pass for the statistics and one for everything else. Backward, with dz = dy where −1 < z < 1 (clamped) or
everywhere, with x̂ computed anew and sums over M:

    dbias_j = Σ dz_j,   dweight_j = Σ dz_j·x̂,   dresidual = dz
    dx = (Σ_copies weight_j·dz_j − A − x̂·B)/√(var + ε)
    A = Σ_copies weight_j·dbias_j/M,   B = Σ_copies weight_j·dweight_j/M

is one pass for the sums and one for the rest. Kept for it: x, one bit per value of the result (none without clamp) and
two numbers per channel. Sums are in float32 (float64 for float64), in an order that depends on the shape alone, so that
results are reproducible. Statistics are merged pairwise by Chan's formula: a large mean costs no digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import launching
from repbnn_cli.kernels.packing import word_count
from repbnn_cli.kernels.sign_packing import empty_like_layout

BLOCK = (
    32  # pixels of a tile of 32 channels: one word of bits per pixel, 8 values and fewer than 80 registers per thread
)
SLABS = 512  # programs that a reduction is spread over, at most


@triton.jit
def _place(pixel, channel, channels, image, LAST: tl.constexpr):
    """Offsets (BLOCK, 32) of pixels and channels in a tensor (N, channels, H, W), channels_last or contiguous."""
    if LAST:
        return pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    sample, spot = (pixel // image).to(tl.int64), pixel % image
    return (sample[:, None] * channels + channel[None, :]) * image + spot[:, None]


@triton.jit
def _statistics(
    x_ptr, means_ptr, squares_ptr, pixels, channels, image, per_slab, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Mean and Σ(x − mean)² of 32 channels over one slab of per_slab pixels → means, squares (slabs, C)."""
    slab = tl.program_id(0)
    channel = tl.program_id(1) * 32 + tl.arange(0, 32)
    total = means_ptr.dtype.element_ty
    mean, square = tl.zeros((32,), dtype=total), tl.zeros((32,), dtype=total)
    start, end = slab * per_slab, tl.minimum((slab + 1) * per_slab, pixels)
    for first in range(start, end, BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        inside = (pixel < end)[:, None] & (channel < channels)[None, :]
        x = tl.load(x_ptr + _place(pixel, channel, channels, image, LAST), mask=inside, other=0.0).to(total)
        count = tl.minimum(BLOCK, end - first).to(total)
        tile_mean = tl.sum(x, 0) / count
        off = tl.where(inside, x - tile_mean[None, :], 0.0)
        before = (first - start).to(total)
        delta = tile_mean - mean
        mean += delta * (count / (before + count))
        square += tl.sum(off * off, 0) + delta * delta * (before * count / (before + count))
    tl.store(means_ptr + slab * channels + channel, mean, mask=channel < channels)
    tl.store(squares_ptr + slab * channels + channel, square, mask=channel < channels)


@triton.jit
def _merge_statistics(means_ptr, squares_ptr, mean_ptr, var_ptr, pixels, channels, per_slab, slabs):
    """The slabs' statistics → mean and (biased) variance of 32 channels."""
    channel = tl.program_id(0) * 32 + tl.arange(0, 32)
    total = mean_ptr.dtype.element_ty
    mean, square = tl.zeros((32,), dtype=total), tl.zeros((32,), dtype=total)
    for slab in range(slabs):
        before = (slab * per_slab).to(total)
        count = tl.minimum(per_slab, pixels - slab * per_slab).to(total)
        delta = tl.load(means_ptr + slab * channels + channel, mask=channel < channels, other=0.0) - mean
        mean += delta * (count / (before + count))
        square += tl.load(squares_ptr + slab * channels + channel, mask=channel < channels, other=0.0)
        square += delta * delta * (before * count / (before + count))
    tl.store(mean_ptr + channel, mean, mask=channel < channels)
    tl.store(var_ptr + channel, square / pixels, mask=channel < channels)


@triton.jit
def _normalise(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, mean_ptr, var_ptr, y_ptr, signs_ptr, mask_ptr,
    pixels, channels, outputs, words, image, eps,
    RESIDUAL: tl.constexpr, CLAMP: tl.constexpr, SIGNS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels × the 32 result channels of one word. Neighbours share pixels, so that x comes from the cache."""
    word, pixel = tl.program_id(0) % words, tl.program_id(0) // words * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 32)
    output = word * 32 + lane
    channel, exists = output % channels, output < outputs
    inside = (pixel < pixels)[:, None] & exists[None, :]
    total = mean_ptr.dtype.element_ty
    mean, inverse = tl.load(mean_ptr + channel), 1.0 / tl.sqrt(tl.load(var_ptr + channel) + eps)
    scale = inverse * tl.load(weight_ptr + output, mask=exists, other=0.0).to(total)
    shift = tl.load(bias_ptr + output, mask=exists, other=0.0).to(total)
    x = tl.load(x_ptr + _place(pixel, channel, channels, image, LAST), mask=inside, other=0.0).to(total)
    z = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    place = _place(pixel, output, outputs, image, LAST)
    if RESIDUAL:
        z += tl.load(residual_ptr + place, mask=inside, other=0.0).to(total)
    z = z.to(y_ptr.dtype.element_ty).to(total)  # bits are those of the value that is stored
    spot = pixel.to(tl.int64) * words + word
    if CLAMP:
        bits = ((tl.abs(z) < 1) & inside).to(tl.int32) << lane[None, :]
        tl.store(mask_ptr + spot, tl.sum(bits, 1), mask=pixel < pixels)
        z = tl.where(z > 1, 1.0, tl.where(z < -1, -1.0, z))  # NaN stays NaN
    tl.store(y_ptr + place, z.to(y_ptr.dtype.element_ty), mask=inside)
    if SIGNS:
        bits = ((z >= 0) & inside).to(tl.int32) << lane[None, :]
        tl.store(signs_ptr + spot, tl.sum(bits, 1), mask=pixel < pixels)


@triton.jit
def _sum_gradients(
    gradient_ptr, x_ptr, mean_ptr, var_ptr, mask_ptr, bias_sums_ptr, weight_sums_ptr,
    pixels, channels, outputs, words, image, eps, per_slab,
    CLAMP: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz·x̂ of the 32 result channels of one word over one slab → (slabs, R·C) each."""
    slab, word = tl.program_id(0) // words, tl.program_id(0) % words
    lane = tl.arange(0, 32)
    output = word * 32 + lane
    channel, exists = output % channels, output < outputs
    total = mean_ptr.dtype.element_ty
    mean, inverse = tl.load(mean_ptr + channel), 1.0 / tl.sqrt(tl.load(var_ptr + channel) + eps)
    bias_sum, weight_sum = tl.zeros((32,), dtype=total), tl.zeros((32,), dtype=total)
    end = tl.minimum((slab + 1) * per_slab, pixels)
    for first in range(slab * per_slab, end, BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        inside = (pixel < end)[:, None] & exists[None, :]
        passes = inside
        if CLAMP:
            bits = tl.load(mask_ptr + pixel.to(tl.int64) * words + word, mask=pixel < end, other=0)
            passes = inside & (((bits[:, None] >> lane[None, :]) & 1) != 0)
        place = _place(pixel, output, outputs, image, LAST)
        dz = tl.load(gradient_ptr + place, mask=passes, other=0.0).to(total)
        x = tl.load(x_ptr + _place(pixel, channel, channels, image, LAST), mask=inside, other=0.0).to(total)
        bias_sum += tl.sum(dz, 0)
        weight_sum += tl.sum(dz * (x - mean[None, :]) * inverse[None, :], 0)
    tl.store(bias_sums_ptr + slab * outputs + output, bias_sum, mask=exists)
    tl.store(weight_sums_ptr + slab * outputs + output, weight_sum, mask=exists)


@triton.jit
def _input_gradient(
    gradient_ptr, x_ptr, weight_ptr, mean_ptr, var_ptr, mask_ptr, a_ptr, b_ptr, dx_ptr, dresidual_ptr,
    pixels, channels, outputs, words, image, eps,
    REPEATS: tl.constexpr, CLAMP: tl.constexpr, RESIDUAL: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK pixels × 32 distinct channels, from all their copies; dresidual on the way."""
    blocks = tl.cdiv(channels, 32)
    pixel = tl.program_id(0) // blocks * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(0) % blocks * 32 + tl.arange(0, 32)
    exists = channel < channels
    inside = (pixel < pixels)[:, None] & exists[None, :]
    total = mean_ptr.dtype.element_ty
    summed = tl.zeros((BLOCK, 32), dtype=total)
    for copy in range(REPEATS):
        output = copy * channels + channel
        passes = inside
        if CLAMP:  # a copy may start in the middle of a word
            spot = pixel.to(tl.int64)[:, None] * words + (output // 32)[None, :]
            passes = inside & (((tl.load(mask_ptr + spot, mask=inside, other=0) >> (output % 32)[None, :]) & 1) != 0)
        place = _place(pixel, output, outputs, image, LAST)
        dz = tl.load(gradient_ptr + place, mask=passes, other=0.0)
        if RESIDUAL:
            tl.store(dresidual_ptr + place, dz, mask=inside)
        summed += dz.to(total) * tl.load(weight_ptr + output, mask=exists, other=0.0).to(total)[None, :]
    mean = tl.load(mean_ptr + channel, mask=exists, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.load(var_ptr + channel, mask=exists, other=1.0) + eps)
    a, b = tl.load(a_ptr + channel, mask=exists, other=0.0), tl.load(b_ptr + channel, mask=exists, other=0.0)
    place = _place(pixel, channel, channels, image, LAST)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(total)
    dx = (summed - a[None, :] - (x - mean[None, :]) * inverse[None, :] * b[None, :]) * inverse[None, :]
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


class _Shape(NamedTuple):
    """What every launch needs to know of x (N, C, H, W) and the result; per_slab: pixels of a reduction's program."""

    pixels: int
    channels: int
    outputs: int
    image: int
    last: bool
    per_slab: int

    @property
    def words(self) -> int:
        return word_count(self.outputs)

    @property
    def slabs(self) -> int:
        return triton.cdiv(self.pixels, self.per_slab)  # type: ignore[no-any-return]

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.pixels, BLOCK)  # type: ignore[no-any-return]


def _shape(x: Tensor, outputs: int) -> _Shape:
    n, c, h, w = x.shape
    pixels = n * h * w
    slabs = max(1, min(triton.cdiv(pixels, BLOCK), SLABS // word_count(c)))
    per_slab = triton.cdiv(triton.cdiv(pixels, slabs), BLOCK) * BLOCK
    return _Shape(pixels, c, outputs, h * w, x.is_contiguous(memory_format=torch.channels_last), per_slab)


def _as(x: Tensor, last: bool) -> Tensor:
    """x in the memory format of the others; copied only where it has another one."""
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _batch_statistics(x: Tensor, shape: _Shape, mean: Tensor, var: Tensor) -> None:
    """Fills mean and var (C,) of x, which is dense."""
    means, squares = mean.new_empty(2, shape.slabs, shape.channels)
    blocks = word_count(shape.channels)
    _statistics[(shape.slabs, blocks)](
        x, means, squares, shape.pixels, shape.channels, shape.image, shape.per_slab, LAST=shape.last, BLOCK=BLOCK
    )
    _merge_statistics[(blocks,)](
        means, squares, mean, var, shape.pixels, shape.channels, shape.per_slab, shape.slabs
    )  # fmt: skip


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "repbnn::rep_batch_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool clamp, bool signs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _rep_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, clamp: bool, signs: bool
) -> _Outputs:
    """(y, sign bits, mask bits, mean, biased variance)."""
    x, weight, bias = _dense(x), weight.contiguous(), bias.contiguous()
    y, sign_words, mask, mean, var = made = _outputs_like(x, weight, bias, residual, eps, clamp, signs)
    shape = _shape(x, weight.numel())
    with launching(x):
        _batch_statistics(x, shape, mean, var)
        _normalise[(shape.tiles * shape.words,)](
            x, weight, bias, x if residual is None else _as(residual, shape.last), mean, var, y, sign_words, mask,
            shape.pixels, shape.channels, shape.outputs, shape.words, shape.image, eps,
            RESIDUAL=residual is not None, CLAMP=clamp, SIGNS=signs, LAST=shape.last, BLOCK=BLOCK,
        )  # fmt: skip
    return made


def _outputs_like(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, clamp: bool, signs: bool
) -> _Outputs:
    """What the operator returns, uninitialised; bits that are not asked for have no words."""
    n, c, h, w = x.shape
    outputs = weight.shape[0]
    words, total = word_count(outputs), _sum_dtype(x)
    return (
        empty_like_layout(x, (n, outputs, h, w), x.dtype),
        x.new_empty((n, h, w, words if signs else 0), dtype=torch.int32),
        x.new_empty((n, h, w, words if clamp else 0), dtype=torch.int32),
        x.new_empty(c, dtype=total),
        x.new_empty(c, dtype=total),
    )


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


@torch.library.custom_op(
    "repbnn::rep_batch_norm_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor mask, float eps, bool residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _rep_batch_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, mask: Tensor, eps: float, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dresidual); dweight and dbias in the dtype of sums, dresidual empty where there is none."""
    x, weight = _dense(x), weight.contiguous()
    shape = _shape(x, weight.numel())
    gradient = _as(gradient, shape.last)
    dx, _, _, dresidual = _gradients_like(gradient, x, weight, mean, var, mask, eps, residual)
    clamp = mask.shape[-1] > 0
    with launching(x):
        bias_sums, weight_sums = mean.new_empty(2, shape.slabs, shape.outputs)
        _sum_gradients[(shape.slabs * shape.words,)](
            gradient, x, mean, var, mask, bias_sums, weight_sums,
            shape.pixels, shape.channels, shape.outputs, shape.words, shape.image, eps, shape.per_slab,
            CLAMP=clamp, LAST=shape.last, BLOCK=BLOCK,
        )  # fmt: skip
        dbias, dweight = bias_sums.sum(0), weight_sums.sum(0)
        a, b = (torch.stack((dbias, dweight)) * weight).view(2, -1, shape.channels).sum(1).div_(shape.pixels)
        _input_gradient[(shape.tiles * word_count(shape.channels),)](
            gradient, x, weight, mean, var, mask, a, b, dx, dresidual,
            shape.pixels, shape.channels, shape.outputs, shape.words, shape.image, eps,
            REPEATS=shape.outputs // shape.channels, CLAMP=clamp, RESIDUAL=residual, LAST=shape.last, BLOCK=BLOCK,
        )  # fmt: skip
    return dx, dweight, dbias, dresidual


def _gradients_like(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, mask: Tensor, eps: float, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, _, h, w = x.shape
    outputs = weight.shape[0]
    return (
        empty_like_layout(x, tuple(x.shape), x.dtype),
        mean.new_empty(outputs),
        mean.new_empty(outputs),
        empty_like_layout(x, (n, outputs, h, w), gradient.dtype) if residual else x.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    x, weight, bias, residual, ctx.eps, _, _ = inputs
    _, _, mask, mean, var = output
    ctx.save_for_backward(x, weight, mean, var, mask)
    ctx.bias_dtype, ctx.residual_dtype = bias.dtype, None if residual is None else residual.dtype
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 7
    x, weight, mean, var, mask = ctx.saved_tensors
    to_residual = ctx.residual_dtype is not None and ctx.needs_input_grad[3]
    dx, dweight, dbias, dresidual = _rep_batch_norm_backward(gradient, x, weight, mean, var, mask, ctx.eps, to_residual)
    return (
        dx, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype),
        dresidual.to(ctx.residual_dtype) if to_residual else None, None, None, None,
    )  # fmt: skip


_rep_batch_norm.register_fake(_outputs_like)
_rep_batch_norm_backward.register_fake(_gradients_like)
_rep_batch_norm.register_autograd(_backward, setup_context=_save)


class Normalised(NamedTuple):
    """values (N, R·C, H, W); signs: their bits, (N, H, W, words), if asked for; mean and biased var of x, (C,)."""

    values: Tensor
    signs: Tensor | None
    mean: Tensor
    var: Tensor


def rep_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *,
    eps: float = 1e-5, clamp: bool = False, signs: bool = False,
) -> Normalised:  # fmt: skip
    """Training-mode BatchNorm of x (N, C, H, W) repeated R times, R·C = len(weight), and what follows it.

    residual (N, R·C, H, W) is added, then clamp=True limits to [−1, 1] (hardtanh: no gradient at and beyond ±1).
    signs=True also gives the sign bits of the values, for binary_conv2d(values, ..., x_signs=signs). The values have
    x's dtype and memory format. Gradients reach x, weight, bias and residual.
    """
    outputs, channels = weight.numel(), x.shape[1]
    if outputs % channels:
        raise UsageError(f"rep_batch_norm: {outputs} scales for {channels} channels; expected a multiple")
    expected = (x.shape[0], outputs, *x.shape[2:])
    if residual is not None and tuple(residual.shape) != expected:
        raise UsageError(f"rep_batch_norm: residual of shape {tuple(residual.shape)}; expected {expected}")
    values, bits, _, mean, var = _rep_batch_norm(x, weight, bias, residual, eps, clamp, signs)
    return Normalised(values, bits if signs else None, mean, var)
