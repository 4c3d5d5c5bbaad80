"""Every binary operator in plain torch: the definition that the Triton kernels are tested against.

Shape letters: N samples; I, O input and output channels; H, W and H', W' pixels before and after; kh, kw of a kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from repbnn_cli.kernels.packing import output_size, pack_activations, popcount, tap_sums

Pair = tuple[int, int]


def binarize(x: Tensor) -> Tensor:
    """±1 in x's dtype, with sign(0) = +1."""
    return (x >= 0).to(x.dtype) * 2 - 1


def binary_conv2d(x: Tensor, weight: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0)) -> Tensor:
    """Convolution of sign(x), (N, I, H, W), with sign(weight), (O, I, kh, kw); zero padding contributes 0.

    The sums are integers: exact in float32, and rounded once to x's dtype.
    """
    signs, kernel = binarize(x.detach()).float(), binarize(weight.detach()).float()
    return sums_of_signs(signs, kernel, stride, padding).to(x.dtype)


def sums_of_signs(signs: Tensor, kernel: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0)) -> Tensor:
    """Convolution of float32 tensors that hold ±1 already; exact.

    `round` undoes what a Winograd algorithm of the vendor library, which does not add integers, leaves behind (an error
    far below 1/2).
    """
    return F.conv2d(signs, kernel, None, stride=stride, padding=padding).round()


def binary_conv2d_packed(
    words: Tensor, kernel_words: Tensor, in_channels: int, stride: Pair = (1, 1), padding: Pair = (0, 0)
) -> Tensor:
    """The same by the popcount identity of packing.py: (N, H, W, L), (O, kh, kw, L) → (N, O, H', W') int32."""
    (_, height, width, _), (filters, kh, kw, _) = words.shape, kernel_words.shape
    (sy, sx), (py, px) = stride, padding
    rows, cols = output_size((height, width), (kh, kw), stride, padding)
    padded = F.pad(words, (0, 0, px, px, py, py))
    inside = F.pad(torch.ones(height, width, dtype=torch.int32, device=words.device), (px, px, py, py))
    sums = tap_sums(kernel_words, in_channels)
    total = torch.zeros(words.shape[0], rows, cols, filters, dtype=torch.int32, device=words.device)
    for y in range(kh):
        for x in range(kw):
            window = (slice(y, y + sy * (rows - 1) + 1, sy), slice(x, x + sx * (cols - 1) + 1, sx))
            a = padded[:, *window]  # (N, H', W', L)
            both = popcount(a.unsqueeze(3) & kernel_words[:, y, x]).sum(-1, dtype=torch.int32)  # (N, H', W', O)
            ones = popcount(a).sum(-1, dtype=torch.int32).unsqueeze(3)
            total += 4 * both - 2 * ones - sums[:, y, x] * inside[window].unsqueeze(2)
    return total.permute(0, 3, 1, 2)


def finish_block(
    sums: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    *,
    activation: str,
    rprelu: Tensor | None,
    sign_shift: Tensor | None,
    values: bool,
    signs: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """What follows the sums (N, O, H', W') of a packed block, see blocks.py: (values, signs) for C = R·O channels.

    In float32, channels last; values are rounded to `dtype` once, at the end, and signs are those of what is stored.
    """
    nhwc = sums.float().permute(0, 2, 3, 1).unsqueeze(3)  # (N, H', W', 1, O)
    per_copy = (-1, sums.shape[1])  # (C,) → (R, O)
    out = torch.addcmul(shift.view(per_copy), nhwc, scale.view(per_copy)).flatten(3).contiguous()  # (N, H', W', C)
    if residual is not None:
        out = out + residual.permute(0, 2, 3, 1).float()
    if activation == "hardtanh":
        out = out.clamp(-1, 1)
    elif rprelu is not None:
        before, slope, after = rprelu
        out = out + before
        out = torch.where(out > 0, out, slope * out) + after
    stored = out.to(dtype)
    shifted = stored.float() if sign_shift is None else stored.float() + sign_shift
    return (
        stored.permute(0, 3, 1, 2) if values else None,
        pack_activations(shifted.permute(0, 3, 1, 2)) if signs else None,
    )


def rep_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, eps: float = 1e-5, clamp: bool = False
) -> Tensor:
    """Training-mode BatchNorm of x (N, C, H, W) repeated to len(weight) = R·C channels, + residual, then hardtanh."""
    repeated = x.repeat(1, len(weight) // x.shape[1], 1, 1)  # channel j is a copy of j mod C
    values = F.batch_norm(repeated, None, None, weight, bias, training=True, eps=eps)
    values = values if residual is None else values + residual
    return F.hardtanh(values) if clamp else values
