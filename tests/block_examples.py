"""Random packed blocks of any shape, and what such a block computes, written a second time in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repbnn_cli.kernels import packing
from repbnn_cli.kernels.blocks import Activation, PackedBlock


@dataclass(frozen=True)
class Case:
    """A block with the input it runs on; `filters` are those of the convolution, each repeated beta² times."""

    in_channels: int
    filters: int
    beta: int = 1
    kernel: int = 3
    stride: int = 1
    image: tuple[int, int] = (5, 7)
    batch: int = 2
    activation: Activation = "none"
    residual: bool = True
    sign_shift: bool = False
    padding: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.in_channels}to{self.filters}", f"b{self.beta}k{self.kernel}s{self.stride}", self.activation]
        return "-".join(parts)


@dataclass(frozen=True)
class Example:
    """x (N, I, H, W) and weight (O, I, kh, kw) with exact zeros among them; the block of it; residual or None."""

    x: Tensor
    weight: Tensor
    block: PackedBlock
    residual: Tensor | None

    def to(self, device: torch.device) -> Example:
        residual = None if self.residual is None else self.residual.to(device)
        return Example(self.x.to(device), self.weight.to(device), self.block.to(device), residual)


def example(case: Case, residual_dtype: torch.dtype = torch.float32) -> Example:
    """The same tensors every time for the same case."""
    generator = torch.Generator().manual_seed(case.in_channels * 1009 + case.filters * 31 + case.beta)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(case.batch, case.in_channels, *case.image).mul(4).round()  # a tenth of it exact zeros
    weight = normal(case.filters, case.in_channels, case.kernel, case.kernel)
    channels, repeats = case.filters * case.beta**2, case.beta**2
    block = PackedBlock(
        packed_weight=packing.pack_kernel(weight),
        in_channels=case.in_channels,
        scale=normal(channels) / weight[0].numel() ** 0.5,
        shift=normal(channels),
        repeats=repeats,
        stride=(case.stride, case.stride),
        padding=(case.kernel // 2,) * 2 if case.padding is None else (case.padding,) * 2,
        residual=case.residual,
        activation=case.activation,
        rprelu=normal(3, channels) if case.activation == "rprelu" else None,
        sign_shift=normal(channels) if case.sign_shift else None,
    )
    size = block.output_size(*case.image)
    residual = normal(case.batch, channels, *size).to(residual_dtype) if case.residual else None
    return Example(x, weight, block, residual)


def plain_sums(made: Example) -> Tensor:
    """The convolution before the affine, (N, O, H', W') float64, exact."""
    signs, kernel = (torch.where(t >= 0, 1.0, -1.0).double() for t in (made.x, made.weight))
    return F.conv2d(signs, kernel, stride=made.block.stride, padding=made.block.padding)


def plain_values(made: Example) -> Tensor:
    """The values of the block, (N, C, H', W') float64, from the definition: repeat, then one operation per line."""
    block = made.block
    out = plain_sums(made).repeat(1, block.repeats, 1, 1)
    out = out * _channels(block.scale) + _channels(block.shift)
    if made.residual is not None:
        out = out + made.residual.double()
    if block.activation == "hardtanh":
        return F.hardtanh(out)
    if block.rprelu is not None:
        before, slope, after = block.rprelu.double()
        return F.prelu(out + _channels(before), slope) + _channels(after)
    return out


def _channels(values: Tensor) -> Tensor:
    return values.double().view(1, -1, 1, 1)


def check(made: Example, values: Tensor, signs: Tensor, tolerance: float = 1e-5) -> None:
    """values against plain_values; signs those of the stored values, and of the exact ones wherever these are clear."""
    exact = plain_values(made)
    assert values.shape == exact.shape
    error = (values.double() - exact).abs()
    assert (error <= tolerance * (1 + exact.abs())).all(), f"largest error {error.max().item():.3g}"
    shift = exact.new_zeros(1) if made.block.sign_shift is None else _channels(made.block.sign_shift)
    assert torch.equal(signs, packing.pack_activations(values.float() + shift.float()))
    bits = packing.unpack_activations(signs, made.block.channels) > 0
    clear = (exact + shift).abs() > tolerance * (1 + exact.abs())
    assert clear.any()
    assert torch.equal(bits[clear], (exact + shift >= 0)[clear])
