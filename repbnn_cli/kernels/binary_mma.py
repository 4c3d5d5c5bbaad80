"""The product of the binary tensor cores as a Triton function: mma.sync m16n8k256 on bits.

It sums popc(a & b), 32 768 bits an instruction: the AND form, which sm_80 to sm_90 execute natively and others emulate.
Triton has no name for it. It has inline assembly that is applied element by element, and a one-dimensional tensor of
32·warps elements has exactly one element per thread, thread i holding element i (sizePerThread 1, threadsPerWarp 32; a
test asserts it): on such tensors, one per register of a fragment, the assembly is a warp-level instruction.

Fragments (PTX ISA, "mma.m16n8k256"), thread 4·g + t of a warp, g < 8, t < 4; a word is 32 bits along K:

    A (16 × 256)   a0: row g, word t         a1: row g + 8, word t     a2: row g, word t + 4   a3: row g + 8, word t + 4
    B (256 × 8)    b0: column g, word t      b1: column g, word t + 4
    C (16 × 8)     c0, c1: row g, columns 2t, 2t + 1                   c2, c3: row g + 8, columns 2t, 2t + 1

A warp makes 16 rows (pixels) × 8·NT columns (filters), so a program of WARPS warps a tile of 16·WARPS × 8·NT. Which
pixel a row and which filter a column stands for is free. Here row 16·warp + 8·half + g of the tile is row 8·half + g of
that warp's fragment, and column 2·NT·t + 2·n + j of it is column 2t + j of fragment n: a thread then holds 2·NT
neighbouring channels. `in_fragments` lays the kernel out so that every load of it is one full cache line per warp.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

STEP = 8  # words along K that one instruction takes

_MMA: tl.constexpr = tl.constexpr(
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
_MMA_REGISTERS: tl.constexpr = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r")


@triton.jit
def _mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """C + A·B on the fragments' registers, each a tensor of one int32 per thread."""
    return tl.inline_asm_elementwise(
        _MMA,
        _MMA_REGISTERS,
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _ones(word):
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _joined(parts, LEVELS: tl.constexpr):
    """2^LEVELS tensors (T,) → (T, 2, …, 2), the axes after T being the bits of a tensor's number, highest first."""
    for level in tl.static_range(LEVELS):
        pairs = ()
        for i in tl.static_range(1 << (LEVELS - 1 - level)):
            pairs += (tl.join(parts[i], parts[i + (1 << (LEVELS - 1 - level))]),)
        parts = pairs
    return parts[0]


@triton.jit
def _gap(step, word, row_stride, ROW: tl.constexpr):
    """What lies between a window's runs before `word` of it; the same for all words of a step where runs are whole."""
    before = step * 8 // ROW if ROW % 8 == 0 else word // ROW
    return before * (row_stride - ROW)


@triton.jit
def rows_of_threads(WARPS: tl.constexpr):
    """Rows of the tile whose A registers a thread holds: (row of a0 and a2, row of a1 and a3), each (32·WARPS,)."""
    thread = tl.arange(0, 32 * WARPS)
    row = thread // 32 * 16 + thread % 32 // 4
    return row, row + 8


@triton.jit
def binary_product(
    words_ptr, upper, lower, kernel_ptr, row_stride,
    ROW: tl.constexpr, WORDS: tl.constexpr, NT: tl.constexpr, LOG2_NT: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Σ a·b' over K of bits a and signs b', (16·WARPS, 8·NT) int32.

    upper, lower: offsets of the windows of `rows_of_threads`. A window is WORDS words in runs of ROW, row_stride apart.
    kernel_ptr: this tile's part of `in_fragments`. Σ a·b' = 2·popc(a & b) − popc(a).
    """
    threads: tl.constexpr = 32 * WARPS
    lane = tl.arange(0, threads) % 32
    zero = tl.zeros((threads,), tl.int32)
    sums = ()
    for _ in tl.static_range(4 * NT):
        sums += (zero,)
    upper_ones, lower_ones = zero, zero
    for step in range((WORDS + 7) // 8):
        left = step * 8 + lane % 4
        right = left + 4
        # Words beyond K: the kernel's are 0, and these have to be for popc(a). At most the last step has any.
        left_at = left + _gap(step, left, row_stride, ROW)
        right_at = right + _gap(step, right, row_stride, ROW)
        a0 = tl.load(words_ptr + upper + left_at, mask=left < WORDS, other=0)
        a1 = tl.load(words_ptr + lower + left_at, mask=left < WORDS, other=0)
        a2 = tl.load(words_ptr + upper + right_at, mask=right < WORDS, other=0)
        a3 = tl.load(words_ptr + lower + right_at, mask=right < WORDS, other=0)
        upper_ones += _ones(a0) + _ones(a2)
        lower_ones += _ones(a1) + _ones(a3)
        added = ()
        for pair in tl.static_range(NT // 2):
            at = (step * (NT // 2) + pair) * 128 + lane[:, None] * 4 + tl.arange(0, 4)[None, :]
            b0s, b1s = tl.split(tl.load(kernel_ptr + at).reshape(threads, 2, 2))  # (threads, fragment) each
            b0, next_b0 = tl.split(b0s)
            b1, next_b1 = tl.split(b1s)
            c = sums[8 * pair : 8 * pair + 8]
            added += _mma(a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3])
            added += _mma(a0, a1, a2, a3, next_b0, next_b1, c[4], c[5], c[6], c[7])
        sums = added
    both = _joined(sums, LOG2_NT + 2).reshape(WARPS, 8, 4, NT, 2, 2)  # warp, g, t, n, half, j
    both = both.permute(0, 4, 1, 2, 3, 5).reshape(16 * WARPS, 8 * NT)
    ones = tl.sum(tl.join(upper_ones, lower_ones).reshape(WARPS, 8, 4, 2), axis=2)  # warp, g, half
    return 2 * both - ones.permute(0, 2, 1).reshape(16 * WARPS)[:, None]


def in_fragments(kernel_words: Tensor, tile: int) -> Tensor:
    """(C, kh, kw, L) int32 → (tiles, steps, NT / 2, 32, 2, 2) int32: the B registers of each tile of 8·NT filters.

    [.., s, p, 4g + t, q, r] is word 8s + 4r + t of filter 2·NT·(g div 2) + 2n + g mod 2 of the tile, n = 2p + q being
    the fragment: a thread takes the four registers of two fragments at once. 0 beyond the kernel.
    """
    filters, words = kernel_words.shape[0], kernel_words[0].numel()
    flat = F.pad(kernel_words.reshape(filters, words), (0, -words % STEP, 0, -filters % tile))
    steps = flat.shape[1] // STEP
    # tile, g div 2, p, q, g mod 2, step, r, t → tile, step, p, g div 2, g mod 2, t, q, r
    split = flat.view(-1, 4, tile // 16, 2, 2, steps, 2, 4).permute(0, 5, 2, 1, 4, 7, 3, 6)
    return split.reshape(-1, steps, tile // 16, 32, 2, 2).contiguous()
