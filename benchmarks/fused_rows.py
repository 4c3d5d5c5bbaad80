"""Rows of benchmarks/kernels.py for rep_bconv_fused: the layers of four networks, raw (β = 1) and Rep (β = 2).

Sides: the fused kernel, packed signs to values and packed signs; the same block eagerly and by torch.compile, in bf16
channels_last with kernel and signs binarised beforehand; and the bare vendor convolution on ±1 in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from kernel_timing import COMPILED, Call, Row, compiled
from torch import Tensor

from repbnn_cli.kernels import Backend
from repbnn_cli.kernels.blocks import PackedBlock, run
from repbnn_cli.kernels.packing import pack_activations, pack_kernel, unpack_activations

HALF = torch.bfloat16


@dataclass(frozen=True)
class Layer:
    """A binary convolution of the raw network, with its input's height and width."""

    network: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    size: int

    def __str__(self) -> str:
        shape = f"{self.in_channels}→{self.out_channels} {self.kernel}×{self.kernel}"
        return f"{self.network} {shape}{' /2' if self.stride == 2 else ''} {self.size}²"


def _resnet(network: str, widths: tuple[int, ...], size: int) -> list[Layer]:
    """The distinct layers of a ResNet of basic blocks whose first stage sees size × size pixels."""
    layers = [Layer(network, widths[0], widths[0], 3, 1, size)]
    for before, width in pairwise(widths):
        layers += [Layer(network, before, width, 3, 2, size), Layer(network, width, width, 3, 1, size // 2)]
        size //= 2
    return layers


def _reactnet() -> list[Layer]:
    """Those of ReActNet-A; a 1×1 convolution that doubles channels is two that keep them, listed as one of them."""
    threes = [(32, 1, 112), (64, 2, 112), (128, 1, 56), (128, 2, 56), (256, 1, 28), (256, 2, 28), (512, 1, 14),
              (512, 2, 14), (1024, 1, 7)]  # fmt: skip
    ones = [(32, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7), (1024, 7)]
    layers = [Layer("ReActNet-A", width, width, 3, stride, size) for width, stride, size in threes]
    return layers + [Layer("ReActNet-A", width, width, 1, 1, size) for width, size in ones]


LAYERS = (
    *_resnet("CIFAR ResNet-20", (16, 32, 64), 32),
    *_resnet("CIFAR ResNet-18", (64, 128, 256, 512), 32),
    *_resnet("ImageNet ResNet-18", (64, 128, 256, 512), 56),
    *_reactnet(),
)


@dataclass(frozen=True)
class Example:
    """A layer's block with the tensors of one call, in bf16 channels_last; weight is ±1, for what is not packed."""

    block: PackedBlock
    x: Tensor
    weight: Tensor
    residual: Tensor


def example(layer: Layer, beta: int, batch: int, device: torch.device) -> Example:
    """Fresh random tensors, (β·I → O/β) repeated β² times; RPReLU and RSign for ReActNet, else Hardtanh."""
    inputs, filters = layer.in_channels * beta, layer.out_channels // beta
    channels, rprelu = layer.out_channels * beta, layer.network == "ReActNet-A"

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    latent = normal(filters, inputs, layer.kernel, layer.kernel)
    block = PackedBlock(
        packed_weight=pack_kernel(latent),
        in_channels=inputs,
        scale=normal(channels) / latent[0].numel() ** 0.5,
        shift=normal(channels),
        repeats=beta * beta,
        stride=(layer.stride, layer.stride),
        padding=(layer.kernel // 2, layer.kernel // 2),
        residual=True,
        activation="rprelu" if rprelu else "hardtanh",
        rprelu=normal(3, channels) if rprelu else None,
        sign_shift=normal(channels) if rprelu else None,
    )
    x = normal(batch, inputs, layer.size, layer.size, dtype=HALF).contiguous(memory_format=torch.channels_last)
    out = block.output_size(layer.size, layer.size)
    residual = normal(batch, channels, *out, dtype=HALF).contiguous(memory_format=torch.channels_last)
    weight = torch.where(latent >= 0, 1.0, -1.0).to(HALF).contiguous(memory_format=torch.channels_last)
    return Example(block, x, weight, residual)


Pair = tuple[int, int]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int, Pair, Pair]


def operands(made: Example, dtype: torch.dtype) -> Operands:
    """What `unit` takes, all of it in `dtype` and shaped for NCHW beforehand."""
    block = made.block

    def shaped(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(dtype).view(*values.shape[:-1], -1, 1, 1)

    signs = torch.where(made.x >= 0, 1.0, -1.0).to(dtype)
    scale, shift = block.scale.to(dtype).view(-1, 1, 1), block.shift.to(dtype).view(-1, 1, 1)
    return (signs, made.weight.to(dtype), made.residual.to(dtype), scale, shift, shaped(block.rprelu),
            shaped(block.sign_shift), block.repeats, block.stride, block.padding)  # fmt: skip


def unit(
    signs: Tensor, weight: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, rprelu: Tensor | None,
    sign_shift: Tensor | None, repeats: int, stride: Pair, padding: Pair,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The block as a network writes it, on ±1: its values, and ±1 for the next layer."""
    sums = F.conv2d(signs, weight, None, stride, padding)
    repeated = (
        sums if repeats == 1 else torch.cat([sums] * repeats, 1)
    )  # keeps channels_last, as Tensor.repeat does not
    out = repeated * scale + shift + residual
    if rprelu is None:
        out = F.hardtanh(out)
    else:
        before, slope, after = rprelu
        out = out + before
        out = torch.where(out > 0, out, out * slope) + after
    shifted = out if sign_shift is None else out + sign_shift
    return out, torch.where(shifted >= 0, 1.0, -1.0).to(signs.dtype)


def rows(batch: int, device: torch.device, check_on: int | None = None) -> Iterator[Row]:
    """All layers at β = 1 and 2; check_on: images at most this large for the check (an interpreter is slow)."""
    fast = compiled(unit)
    for beta in (1, 2):
        for layer in LAYERS:
            yield _row(layer, beta, batch, device, fast, check_on)


def _row(
    layer: Layer, beta: int, batch: int, device: torch.device, fast: Callable[..., object], check_on: int | None
) -> Row:
    def fused() -> Call:
        made = example(layer, beta, batch, device)
        ring = made.block.padding
        words = F.pad(pack_activations(made.x), (0, 0, ring[1], ring[1], ring[0], ring[0]))
        return lambda: run(
            made.block,
            words,
            made.residual,
            backend=Backend("triton", "timed"),
            dtype=HALF,
            ringed=True,
            signs_ring=ring,
        )

    def plain(function: Callable[..., object]) -> Callable[[], Call]:
        def make() -> Call:
            given = operands(example(layer, beta, batch, device), HALF)
            return lambda: function(*given)

        return make

    def vendor() -> Call:
        signs, weight, *_, stride, padding = operands(example(layer, beta, batch, device), HALF)
        return lambda: F.conv2d(signs, weight, None, stride, padding)

    size = layer.size if check_on is None else min(layer.size, check_on)
    small = Layer(layer.network, layer.in_channels, layer.out_channels, layer.kernel, layer.stride, size)
    return Row(
        f"{layer} β={beta}",
        moved(layer, beta, batch),
        {"fused": fused, "eager bf16": plain(unit), COMPILED: plain(fast), "convolution": vendor},
        lambda: check(small, beta, device),
        faster=target(layer, beta),
    )


def target(layer: Layer, beta: int) -> float | None:
    """How much faster than torch.compile of the block the kernel is to be."""
    if layer.network == "CIFAR ResNet-20":
        return {1: 2.0, 2: 1.5}[beta]
    return {1: 3.0, 2: 2.0}[beta] if min(layer.in_channels, layer.out_channels) >= 64 else None


def moved(layer: Layer, beta: int, batch: int) -> int:
    """Bytes of the fused kernel: signs in and out, residual in, values out, kernel and parameters left out."""
    pixels_in, pixels_out = layer.size**2, (layer.size // layer.stride) ** 2
    words_in, words_out = (-(-channels * beta // 32) for channels in (layer.in_channels, layer.out_channels))
    values = layer.out_channels * beta * pixels_out
    return batch * (4 * words_in * pixels_in + 4 * words_out * pixels_out + 2 * HALF.itemsize * values)


def check(layer: Layer, beta: int, device: torch.device, batch: int = 1) -> None:
    """The fused kernel against `unit` in float64, bf16 rounding apart; signs wherever the value is clear of it."""
    made = example(layer, beta, batch, device)
    values, signs = run(made.block, made.x, made.residual, backend=Backend("triton", "checked"), dtype=HALF)
    assert values is not None
    assert signs is not None
    exact, _ = unit(*operands(made, torch.float64))
    tolerance = torch.finfo(HALF).eps * (1 + exact.abs())
    assert ((values - exact).abs() <= tolerance).all(), "values differ from float64 by more than bf16 rounding"
    shifted = exact if made.block.sign_shift is None else exact + made.block.sign_shift.double().view(1, -1, 1, 1)
    clear = shifted.abs() > tolerance
    bits = unpack_activations(signs, made.block.channels) > 0
    assert torch.equal(bits[clear], (shifted >= 0)[clear]), "signs differ where the value is clear of zero"
