"""Packing and unpacking of bits in Triton, as torch operators: the layout of packing.py, one pass over memory each.

| operator | does |
| --- | --- |
| repbnn::pack_signs | x → sign bits and, in the same pass, bits of the straight-through mask 1[abs(x) ≤ window] |
| repbnn::unpack_signs | sign bits → ±1, channels_last |
| repbnn::apply_mask | gradient where a bit is 1, else 0 |

None has a gradient of its own: they are the parts of operators that have one (binary_conv2d.py).
Shape letters: N, C, H, W of the unpacked tensor; L = ceil(C/32) words; a pixel is one of the N·H·W positions.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from repbnn_cli.kernels import launching
from repbnn_cli.kernels.packing import word_count

BLOCK = 64  # pixels of a program; 64 pixels × 32 channels are 16 values per thread


@triton.jit
def _pack(
    x_ptr, signs_ptr, mask_ptr, pixels, channels, image, stride_n, stride_c, stride_p, window,
    SIGNS: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one word of BLOCK pixels. image = H·W; stride_p is that of neighbouring pixels of one image."""
    word, words = tl.program_id(1), tl.num_programs(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 32)
    channel = word * 32 + lane
    row = (pixel // image).to(tl.int64) * stride_n + (pixel % image).to(tl.int64) * stride_p
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + row[:, None] + channel.to(tl.int64)[None, :] * stride_c, mask=inside, other=-1.0)
    if x_ptr.dtype.element_ty.primitive_bitwidth < 32:
        x = x.to(tl.float32)  # the interpreter cannot compare bfloat16; float64 stays, or tiny negatives would become 0
    place = pixel.to(tl.int64) * words + word
    if SIGNS:
        bits = ((x >= 0) & inside).to(tl.int32) << lane[None, :]
        tl.store(signs_ptr + place, tl.sum(bits, 1), mask=pixel < pixels)
    if MASK:
        bits = ((tl.abs(x).to(tl.float32) <= window) & inside).to(tl.int32) << lane[None, :]
        tl.store(mask_ptr + place, tl.sum(bits, 1), mask=pixel < pixels)


@triton.jit
def _unpack(words_ptr, out_ptr, pixels, channels, words, BLOCK: tl.constexpr):
    """One program: 32 channels of BLOCK pixels, bit 1 → +1, bit 0 → −1; out is channels_last."""
    word = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 32)
    channel = word * 32 + lane
    packed = tl.load(words_ptr + pixel.to(tl.int64) * words + word, mask=pixel < pixels, other=0)
    sign = ((packed[:, None] >> lane[None, :]) & 1) * 2 - 1
    place = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    tl.store(out_ptr + place, sign.to(tl.float32).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mask(
    gradient_ptr, words_ptr, out_ptr, pixels, channels, image, words,
    stride_n, stride_c, stride_p, out_n, out_c, out_p, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: 32 channels of BLOCK pixels."""
    word = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 32)
    channel = (word * 32 + lane).to(tl.int64)
    packed = tl.load(words_ptr + pixel.to(tl.int64) * words + word, mask=pixel < pixels, other=0)
    passes = ((packed[:, None] >> lane[None, :]) & 1) != 0
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    sample, spot = (pixel // image).to(tl.int64), (pixel % image).to(tl.int64)
    source = (sample * stride_n + spot * stride_p)[:, None] + channel[None, :] * stride_c
    gradient = tl.load(gradient_ptr + source, mask=inside & passes, other=0.0)
    place = (sample * out_n + spot * out_p)[:, None] + channel[None, :] * out_c
    tl.store(out_ptr + place, gradient, mask=inside)


def flat_pixels(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x and its strides over samples, channels and the pixels of an image (H and W as one axis).

    NCHW and channels_last are taken as they are; any other layout is copied first.
    """
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    x = x if dense else x.contiguous()
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    channels, image = x.shape[1], x.shape[2] * x.shape[3]
    return x, (channels * image, 1, channels) if channels_last else (channels * image, image, 1)


def empty_like_layout(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor (N, C, H, W): channels_last where x is (a single channel is both), else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory)


def _grid(pixels: int, words: int) -> tuple[int, int]:
    return triton.cdiv(pixels, BLOCK), words


def pack(x: Tensor, window: float = math.inf, signs: bool = True) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) → sign bits and mask bits, (N, H, W, L) int32 each.

    The mask is 1[|x| ≤ window], compared in float32; with window = inf, which passes everything, it has no words
    (N, H, W, 0). signs=False leaves out the signs in the same way.
    """
    sign_words, mask_words = packed_like(x, window, signs)
    x, strides = flat_pixels(x)
    n, c, h, w = x.shape
    with launching(x):
        _pack[_grid(n * h * w, word_count(c))](
            x, sign_words, mask_words, n * h * w, c, h * w, *strides, window,
            SIGNS=signs, MASK=window < math.inf, BLOCK=BLOCK,
        )  # fmt: skip
    return sign_words, mask_words


def packed_like(x: Tensor, window: float = math.inf, signs: bool = True) -> tuple[Tensor, Tensor]:
    """What `pack` returns, uninitialised."""
    n, c, h, w = x.shape
    words = word_count(c)
    return (
        x.new_empty((n, h, w, words if signs else 0), dtype=torch.int32),
        x.new_empty((n, h, w, words if window < math.inf else 0), dtype=torch.int32),
    )


pack_signs = torch.library.custom_op(
    "repbnn::pack_signs", pack, mutates_args=(), schema="(Tensor x, float window, bool signs) -> (Tensor, Tensor)"
)
pack_signs.register_fake(packed_like)


def _unpacked_like(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    n, h, w, _ = words.shape
    return torch.empty((n, channels, h, w), dtype=dtype, device=words.device, memory_format=torch.channels_last)


def _masked_like(gradient: Tensor, words: Tensor) -> Tensor:
    return empty_like_layout(gradient, tuple(gradient.shape), gradient.dtype)


@torch.library.custom_op(
    "repbnn::unpack_signs", mutates_args=(), schema="(Tensor words, SymInt channels, ScalarType dtype) -> Tensor"
)
def unpack_signs(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """(N, H, W, L) int32 → ±1 (N, C, H, W), channels_last. A packed kernel (O, kh, kw, L) gives (O, C, kh, kw)."""
    out = _unpacked_like(words, channels, dtype)
    n, h, w, length = words.shape
    with launching(words):
        _unpack[_grid(n * h * w, length)](words.contiguous(), out, n * h * w, channels, length, BLOCK=BLOCK)
    return out


@torch.library.custom_op("repbnn::apply_mask", mutates_args=(), schema="(Tensor gradient, Tensor words) -> Tensor")
def apply_mask(gradient: Tensor, words: Tensor) -> Tensor:
    """gradient (N, C, H, W) where its bit in words (N, H, W, L) is 1, else 0."""
    out = _masked_like(gradient, words)
    gradient, strides = flat_pixels(gradient)
    n, c, h, w = gradient.shape
    with launching(gradient):
        _mask[_grid(n * h * w, words.shape[3])](
            gradient, words.contiguous(), out, n * h * w, c, h * w, words.shape[3],
            *strides, *flat_pixels(out)[1], BLOCK=BLOCK,
        )  # fmt: skip
    return out


unpack_signs.register_fake(_unpacked_like)
apply_mask.register_fake(_masked_like)
