"""Owns the layout of packed bits, and packing and unpacking in plain torch.

Shape letters: N, H, W samples and pixels; C channels of the packed tensor; O, I, kh, kw of a kernel; L = ceil(C/32).

Activations (N, C, H, W) are packed as (N, H, W, L) int32, kernels (O, I, kh, kw) as (O, kh, kw, L) int32: the
channels of a pixel (of a tap) lie in consecutive words. Bit i of word l is 1 where channel 32·l + i is ≥ 0. So
sign(0) = +1 (and sign(−0) too), unlike torch.sign, whose 0 no bit can hold; NaN becomes −1. `count_zeros` says how many
values that touches. Bits beyond the last channel are 0.

The arithmetic on it. With bits a, b ∈ {0, 1} of signs a' = 2a − 1 and b' = 2b − 1, a'·b' = 4ab − 2a − 2b + 1. Summed
over the K_valid products of a window that lie inside the image (zero padding contributes nothing):

    dot = 4·popc(a & b) − 2·popc(a in window) − (2·popc(b valid) − K_valid)

The bracket is the sum of b' over the valid taps, Σ `tap_sums`: it depends on the filter and on which taps lie inside,
never on the activations; a 3×3 kernel with padding 1 has nine such border classes. Tail bits are 0 on both sides and
count in none of the terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 32


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:  # fmt: skip
    """(H', W') of a convolution of (H, W) pixels with a kernel of (kh, kw)."""
    rows, cols = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True))
    return rows, cols


def word_count(channels: int) -> int:
    """Words that hold one bit per channel."""
    return -(-channels // WORD)


def pack_activations(x: Tensor) -> Tensor:
    """(N, C, H, W), any real dtype and memory format → (N, H, W, ceil(C/32)) int32."""
    return _pack_last(x.permute(0, 2, 3, 1) >= 0)


def unpack_activations(words: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, H, W, ceil(C/32)) int32 → ±1 as (N, C, H, W), channels_last in memory."""
    return _signs(words, channels, dtype).permute(0, 3, 1, 2)


def pack_kernel(weight: Tensor) -> Tensor:
    """(O, I, kh, kw), any real dtype → (O, kh, kw, ceil(I/32)) int32."""
    return _pack_last(weight.permute(0, 2, 3, 1) >= 0)


def unpack_kernel(words: Tensor, in_channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(O, kh, kw, ceil(I/32)) int32 → ±1 as (O, I, kh, kw), channels_last in memory."""
    return _signs(words, in_channels, dtype).permute(0, 3, 1, 2)


def count_zeros(x: Tensor) -> Tensor:
    """How many values are exactly 0, so that packing makes them +1 where torch.sign has 0; a 0-dim int64 tensor."""
    return (x == 0).sum()


def popcount(words: Tensor) -> Tensor:
    """Ones in each int32 word, as int32 of the same shape."""
    table = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.int32, device=words.device)
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8)  # (..., 4)
    ones: Tensor = table[octets.long()].sum(-1, dtype=torch.int32)
    return ones


def tap_sums(kernel_words: Tensor, in_channels: int) -> Tensor:
    """Σ over input channels of a kernel's signs, per tap: (O, kh, kw, L) → (O, kh, kw) int32."""
    return 2 * popcount(kernel_words).sum(-1, dtype=torch.int32) - in_channels


def _pack_last(bits: Tensor) -> Tensor:
    """(..., C) bool → (..., L) int32."""
    channels = bits.shape[-1]
    padded = torch.nn.functional.pad(bits, (0, word_count(channels) * WORD - channels))
    in_words = padded.unflatten(-1, (word_count(channels), WORD)).to(torch.int32)
    words: Tensor = (in_words * _powers(bits.device)).sum(-1, dtype=torch.int32)
    return words


def _unpack_last(words: Tensor, channels: int) -> Tensor:
    """(..., L) int32 → (..., C) bool."""
    bits = (words.unsqueeze(-1) & _powers(words.device)).bool()  # (..., L, 32)
    return bits.flatten(-2)[..., :channels]


def _signs(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """(..., L) int32 → (..., C) of ±1."""
    return _unpack_last(words, channels).to(dtype) * 2 - 1


def _powers(device: torch.device) -> Tensor:
    """2⁰ … 2³¹ as int32, the last one negative: a word is the sum of its bits times these, which never overflows."""
    return torch.tensor([1 << i for i in range(WORD - 1)] + [-(1 << (WORD - 1))], dtype=torch.int32, device=device)
