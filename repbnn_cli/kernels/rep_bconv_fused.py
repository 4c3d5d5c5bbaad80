"""A whole packed block in one Triton kernel: binary convolution, affine of all copies, residual, activation, signs.

What it computes is defined in blocks.py, whose shape letters are used here: O filters, R copies of them, C = R·O result
channels; M = N·H'·W' output pixels; L words per input pixel.

A program makes BLOCK_M pixels × BLOCK_N channels. The sums never reach global memory: once, they go through
shared memory, from the product's layout in registers to that of the residual. Each of the R copies then reads its part
of the residual and writes its part of the result, so the repeated tensor exists only as the result itself and the sums
are made once. Bytes that move, per pixel: C residual values in, C values and C bits out, and I bits in.

Where a word of signs would hold channels of two copies (R > 1 and O no multiple of 32), a program takes BLOCK_N result
channels instead, as if they were R·O filters: the sums of such narrow layers are repeated rather than shared, which
costs nothing next to the bytes, and no two programs write the same word.

The sums come from one of two functions of the same signature: `binary_product` (binary_mma.py) on the binary tensor
cores of Ampere to Hopper, and `_int8_product` here, on bits unpacked to int8, everywhere else and in the interpreter.
Either gives Σ a·b' of bits a and kernel signs b', and with a' = 2a − 1 the sum of a'·b' is 2·Σ a·b' − border_sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from repbnn_cli.kernels import interpreted, launching
from repbnn_cli.kernels.binary_mma import STEP, binary_product, in_fragments, rows_of_threads
from repbnn_cli.kernels.blocks import PackedBlock, Pair
from repbnn_cli.kernels.packing import word_count

Product = Literal["binary", "int8"]
_fragments: WeakKeyDictionary[PackedBlock, Tensor] = WeakKeyDictionary()
_STORED = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _place(pixel, rows, cols):
    """(sample, y, x) of flat output pixels."""
    return pixel // (rows * cols), pixel // cols % rows, pixel % cols


@triton.jit
def _window(pixel, pixels, rows, cols, image_words, row_words, L: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr):
    """Where the windows of output pixels start in the padded words; those beyond the last pixel read its window."""
    sample, y, x = _place(tl.minimum(pixel, pixels - 1), rows, cols)
    return sample.to(tl.int64) * image_words + y * SY * row_words + x * SX * L


@triton.jit
def _int8_product(
    words_ptr, window, kernel_ptr, filter_number, exists, row_stride,
    ROW: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Σ a·b' over K of bits a and signs b', (BLOCK_M, BLOCK_N) int32: one word of K, 32 products deep, a step.

    Bits a beyond the last channel are 0, so that what b' is there does not matter.
    """
    bit = tl.arange(0, 32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for word in range(WORDS):
        a = tl.load(words_ptr + window + (word + word // ROW * (row_stride - ROW)))
        b = tl.load(kernel_ptr + filter_number * WORDS + word, mask=exists, other=0)
        a_bits = ((a[:, None] >> bit[None, :]) & 1).to(tl.int8)
        b_signs = (((b[None, :] >> bit[:, None]) & 1) * 2 - 1).to(tl.int8)
        sums = tl.dot(a_bits, b_signs, sums, out_dtype=tl.int32)
    return sums


@triton.jit
def _border_class(at, size, S: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """before·(P + 1) + after, the kernel's taps that lie outside on either side; see PackedBlock.border_sums."""
    return tl.maximum(P - at * S, 0) * (P + 1) + tl.maximum(at * S - P + K - size, 0)


@triton.jit
def _activated(value, rprelu_ptr, channel, exists, channels, HARDTANH: tl.constexpr):
    if HARDTANH:
        value = tl.minimum(tl.maximum(value, -1.0), 1.0)
    if rprelu_ptr is not None:
        value += tl.load(rprelu_ptr + channel, mask=exists, other=0.0)[None, :]
        slope = tl.load(rprelu_ptr + channels + channel, mask=exists, other=0.0)[None, :]
        value = tl.where(value > 0, value, value * slope)
        value += tl.load(rprelu_ptr + 2 * channels + channel, mask=exists, other=0.0)[None, :]
    return value


@triton.jit
def _packed(bits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bool → (BLOCK_M, BLOCK_N / 32) int32."""
    grouped = bits.to(tl.int32).reshape(BLOCK_M, BLOCK_N // 32, 32)
    return tl.sum(grouped << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def _block(
    words_ptr, kernel_ptr, border_ptr, scale_ptr, shift_ptr, residual_ptr, rprelu_ptr, sign_shift_ptr,
    values_ptr, signs_ptr,
    pixels, height, width, rows, cols, image_words, row_words, filters, channels, sign_words, ring_y, ring_x,
    COPIES: tl.constexpr, WRAPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, L: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    HARDTANH: tl.constexpr, STORED: tl.constexpr, BINARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NT: tl.constexpr, LOG2_NT: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One tile of a block; see the module. `channels` are those of one copy, COPIES·channels those of the result.

    words: (N, height + 2·PY, width + 2·PX, L); signs: (N, rows + 2·ring_y, cols + 2·ring_x, sign_words).
    """
    tiles = tl.cdiv(channels, BLOCK_N)  # neighbouring programs read the same pixels
    tile, pixel_tile = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    first = pixel_tile * BLOCK_M
    pixel = first + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, exists = pixel < pixels, column < channels
    filter_number = column % filters if WRAPS else column
    words_of_kernel: tl.constexpr = KH * KW * L
    if BINARY:
        upper, lower = rows_of_threads(WARPS)
        upper = _window(first + upper, pixels, rows, cols, image_words, row_words, L, SY, SX)
        lower = _window(first + lower, pixels, rows, cols, image_words, row_words, L, SY, SX)
        fragments_ptr = kernel_ptr + tile.to(tl.int64) * ((words_of_kernel + 7) // 8 * NT * 64)
        sums = binary_product(
            words_ptr, upper, lower, fragments_ptr, row_words, KW * L, words_of_kernel, NT, LOG2_NT, WARPS
        )
    else:
        window = _window(pixel, pixels, rows, cols, image_words, row_words, L, SY, SX)
        sums = _int8_product(
            words_ptr, window, kernel_ptr, filter_number, exists, row_words, KW * L, words_of_kernel, BLOCK_M, BLOCK_N
        )
    sample, y, x = _place(pixel, rows, cols)
    border = _border_class(y, height, SY, PY, KH) * ((PX + 1) * (PX + 1)) + _border_class(x, width, SX, PX, KW)
    border = tl.where(inside, border, 0)
    outside = tl.load(border_ptr + border[:, None] * filters + filter_number[None, :], mask=exists[None, :], other=0)
    exact = (2 * sums - outside).to(tl.float32)
    value_row = pixel.to(tl.int64) * (COPIES * channels)
    sign_pixel = (sample * (rows + 2 * ring_y) + y + ring_y) * (cols + 2 * ring_x) + x + ring_x
    sign_row = sign_pixel.to(tl.int64) * sign_words
    word = tl.arange(0, BLOCK_N // 32)
    used = inside[:, None] & exists[None, :]
    for copy in range(COPIES):
        channel = copy * channels + column
        scale = tl.load(scale_ptr + channel, mask=exists, other=0.0)
        shift = tl.load(shift_ptr + channel, mask=exists, other=0.0)
        value = exact * scale[None, :] + shift[None, :]
        place = value_row[:, None] + channel[None, :]
        if residual_ptr is not None:
            value += tl.load(residual_ptr + place, mask=used, other=0.0).to(tl.float32)
        value = _activated(value, rprelu_ptr, channel, exists, COPIES * channels, HARDTANH)
        stored = value.to(STORED)
        if values_ptr is not None:
            tl.store(values_ptr + place, stored, mask=used)
        if signs_ptr is not None:
            signed = stored.to(tl.float32)
            if sign_shift_ptr is not None:
                signed += tl.load(sign_shift_ptr + channel, mask=exists, other=0.0)[None, :]
            bits = _packed((signed >= 0) & exists[None, :], BLOCK_M, BLOCK_N)
            place = sign_row[:, None] + ((copy * channels + tile * BLOCK_N) // 32 + word)[None, :]
            tl.store(signs_ptr + place, bits, mask=inside[:, None] & (tile * BLOCK_N + word * 32 < channels)[None, :])


@dataclass(frozen=True)
class Tile:
    """The shape of a program: BLOCK_M pixels × BLOCK_N channels by `warps` warps."""

    block_m: int
    block_n: int
    warps: int


def tile_of(channels: int, words: int) -> Tile:
    """64 pixels × 32 or 64 channels by four warps, chosen by registers and instructions; nobody has timed it on a GPU.

    channels: of one copy; words: of a filter. Compiled for sm_90, the layers of benchmarks/fused_rows.py take 54 to 78
    registers a thread with 64 × 32: six programs or more share a multiprocessor and hide each other's loads, which is
    what a layer bound by bytes needs. From 2048 products a sum, loading and counting the activations once for 64
    channels weighs more, at 107 to 168 registers and three programs or more; 128 channels would take over 200.
    """
    return Tile(64, 64 if words > 8 * STEP and channels > 32 else 32, 4)


def shared_copies(block: PackedBlock) -> int:
    """Copies that a program makes from its sums: all, or 1 where a word of signs would hold channels of two copies."""
    return block.repeats if block.out_channels % 32 == 0 else 1


def tile_for(block: PackedBlock) -> Tile:
    return tile_of(block.channels // shared_copies(block), block.packed_weight[0].numel())


def product_on(device: torch.device) -> Product:
    """binary where the instruction is native, compute capability 8.0 to 9.x; int8 elsewhere and in the interpreter."""
    if interpreted() or device.type != "cuda":
        return "int8"
    return "binary" if torch.cuda.get_device_capability(device)[0] in (8, 9) else "int8"


def launch(
    block: PackedBlock,
    x: Tensor,
    residual: Tensor | None,
    *,
    values: bool,
    signs: bool,
    dtype: torch.dtype,
    ringed: bool = False,
    signs_ring: Pair = (0, 0),
    product: Product | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`blocks.run` on the Triton backend; product forces one of the two, for tests."""
    (py, px), (ry, rx) = block.padding, signs_ring
    words = x.contiguous() if ringed or not (py or px) else F.pad(x, (0, 0, px, px, py, py))
    n, full_height, full_width, length = words.shape
    height, width = full_height - 2 * py, full_width - 2 * px
    rows, cols = block.output_size(height, width)
    stored = x.new_empty((n, rows, cols, block.channels), dtype=dtype) if values else None
    sign_words = word_count(block.channels)
    laid = x.new_zeros if ry or rx else x.new_empty
    packed = laid((n, rows + 2 * ry, cols + 2 * rx, sign_words)) if signs else None
    channels, tile, product = block.channels // shared_copies(block), tile_for(block), product or product_on(x.device)
    tiles = triton.cdiv(channels, tile.block_n)
    pixels = n * rows * cols
    grid = (triton.cdiv(pixels, tile.block_m) * tiles,)
    with launching(x):
        if pixels:  # else nothing to launch
            _block[grid](
                words, _kernel_of(block, channels, tile, product), block.border_sums, block.scale, block.shift,
                None if residual is None else residual.permute(0, 2, 3, 1).contiguous(), block.rprelu, block.sign_shift,
                stored, packed, pixels, height, width, rows, cols, full_height * full_width * length,
                full_width * length, block.out_channels, channels, sign_words, ry, rx,
                **constants(block, tile, product, dtype), num_warps=tile.warps,
            )  # fmt: skip
    return None if stored is None else stored.permute(0, 3, 1, 2), packed


def constants(block: PackedBlock, tile: Tile, product: Product, dtype: torch.dtype) -> dict[str, object]:
    """The kernel's compile-time arguments: another block with the same ones runs the same code."""
    copies = shared_copies(block)
    (kh, kw), (sy, sx), (py, px) = block.kernel_size, block.stride, block.padding
    return {
        "COPIES": copies, "WRAPS": copies != block.repeats, "KH": kh, "KW": kw, "L": block.packed_weight.shape[3],
        "SY": sy, "SX": sx, "PY": py, "PX": px,
        "HARDTANH": block.activation == "hardtanh", "STORED": _STORED[dtype], "BINARY": product == "binary",
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "NT": tile.block_n // 8,
        "LOG2_NT": (tile.block_n // 8).bit_length() - 1, "WARPS": tile.warps,
    }  # fmt: skip


def _kernel_of(block: PackedBlock, channels: int, tile: Tile, product: Product) -> Tensor:
    """The kernel as the product wants it; fragments are laid out once, and kept for as long as the block lives."""
    if product == "int8":
        return block.packed_weight
    if block not in _fragments:
        every = block.packed_weight.repeat(channels // block.out_channels, 1, 1, 1)
        _fragments[block] = in_fragments(every, tile.block_n)
    return _fragments[block]
