"""Owns the packed block: a binary convolution and all that follows it up to the next sign, ready for inference.

Shape letters: N samples; I, O input and output channels of the convolution; R repeats of its output; C = R·O channels
of the result, of which channel c is convolution channel c mod O; H, W and H', W' pixels before and after; L words.

    sums   = conv(sign(x), sign(weight))            (N, O, H', W'), integers; zero padding contributes 0
    values = activation(scale·sums[c mod O] + shift + residual)
    signs  = bits of [values + sign_shift ≥ 0]

R is β² after a RepBconv (RepBNN, arXiv 2207.09049, section 3), β after a first layer, 1 in a raw network. The copies
differ in scale, shift and whatever follows, so these have one entry per result channel: a Rep network that was
trained, or whose BatchNorm was tiled from a source, has β² different ones. BatchNorm in evaluation is
scale = weight/√(var + ε), shift = bias − mean·scale; a scale per filter of the kernel, a learned α and a negation ride
in the same two tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import Backend, reference
from repbnn_cli.kernels.packing import (
    output_size,
    pack_activations,
    tap_sums,
    unpack_activations,
    unpack_kernel,
    word_count,
)

Pair = tuple[int, int]
Activation = Literal["none", "hardtanh", "rprelu"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of values


@dataclass(frozen=True, eq=False)
class PackedBlock:
    """What `run` needs of one block; every tensor on the block's device, one entry per result channel but the kernel.

    Equal to itself only; its tensors are not to be changed in place, since what is derived from them is kept.

    packed_weight: (O, kh, kw, ceil(I/32)) int32, see packing.py. scale, shift: (C,) float32.
    residual: whether `run` takes one, (N, C, H', W'), added before the activation.
    activation: "none"; "hardtanh", clamp to ±1; "rprelu", prelu(v + rprelu[0], slope rprelu[1]) + rprelu[2] with rprelu
    (3, C) float32 (a PReLU where the shifts are 0). sign_shift: (C,) float32 added before the sign is taken (RSign),
    not to the values; None for none.
    """

    packed_weight: Tensor
    in_channels: int
    scale: Tensor
    shift: Tensor
    repeats: int = 1
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    residual: bool = False
    activation: Activation = "none"
    rprelu: Tensor | None = None
    sign_shift: Tensor | None = None

    def __post_init__(self) -> None:
        if self.packed_weight.dim() != 4 or self.packed_weight.dtype != torch.int32:
            raise UsageError(f"packed_weight: {_text(self.packed_weight)}; expected (O, kh, kw, words) int32")
        if self.packed_weight.shape[3] != word_count(self.in_channels):
            held = self.packed_weight.shape[3]
            raise UsageError(f"packed_weight: {held} words per tap; {self.in_channels} input channels need "
                             f"{word_count(self.in_channels)}")  # fmt: skip
        if self.activation not in get_args(Activation):
            raise UsageError(
                f"activation: unknown value '{self.activation}'; expected {', '.join(get_args(Activation))}"
            )
        if (self.rprelu is None) == (self.activation == "rprelu"):
            raise UsageError(f"rprelu: goes with activation 'rprelu' and no other, here '{self.activation}'")
        channels = (self.channels,)
        wanted = {"scale": channels, "shift": channels, "rprelu": (3, *channels), "sign_shift": channels}
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
                raise UsageError(
                    f"{name}: {_text(tensor)}; expected {shape} float32, for {self.out_channels} filters "
                    f"repeated {self.repeats} times"
                )
            if tensor is not None:
                object.__setattr__(self, name, tensor.contiguous())
        object.__setattr__(self, "packed_weight", self.packed_weight.contiguous())

    @property
    def out_channels(self) -> int:
        """O, the filters."""
        return self.packed_weight.shape[0]

    @property
    def channels(self) -> int:
        """C = R·O, the channels of the result."""
        return self.repeats * self.out_channels

    @property
    def kernel_size(self) -> Pair:
        return self.packed_weight.shape[1], self.packed_weight.shape[2]

    def output_size(self, height: int, width: int) -> Pair:
        """H', W' of an input of H × W pixels; a UsageError where the kernel is larger than the padded input."""
        rows, cols = output_size((height, width), self.kernel_size, self.stride, self.padding)
        if rows < 1 or cols < 1:
            raise UsageError(
                f"an input of {height}×{width} pixels with padding {self.padding} is smaller than the "
                f"{self.kernel_size[0]}×{self.kernel_size[1]} kernel"
            )
        return rows, cols

    def to(self, device: torch.device) -> PackedBlock:
        """The same block with its tensors on `device`."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: t.to(device) for name, t in held.items() if isinstance(t, Tensor)}
        return replace(self, **moved)

    @cached_property
    def border_sums(self) -> Tensor:
        """Σ of the kernel's signs over the taps inside the image, (classes, O) int32: packing.py's last bracket.

        An output row misses `top` taps above the image and `bottom` below, each 0 … padding; columns likewise. The
        class of a pixel is ((top·(py + 1) + bottom)·(px + 1) + left)·(px + 1) + right: 16 of them for a padded 3×3
        kernel, of which an image of two pixels or more meets nine.
        """
        (kh, kw), (py, px) = self.kernel_size, self.padding
        sums = tap_sums(self.packed_weight, self.in_channels)
        rows = [(top, kh - bottom) for top in range(py + 1) for bottom in range(py + 1)]
        cols = [(left, kw - right) for left in range(px + 1) for right in range(px + 1)]
        inside = [sums[:, top : max(top, low), left : max(left, far)] for top, low in rows for left, far in cols]
        return torch.stack([taps.sum((1, 2), dtype=torch.int32) for taps in inside])

    @cached_property
    def signs_of_kernel(self) -> Tensor:
        """±1 as (O, I, kh, kw) float32, unpacked once for the torch backend."""
        return unpack_kernel(self.packed_weight, self.in_channels)


def run(
    block: PackedBlock,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    backend: Backend,
    values: bool = True,
    signs: bool = True,
    dtype: torch.dtype = torch.float32,
    ringed: bool = False,
    signs_ring: Pair = (0, 0),
) -> tuple[Tensor | None, Tensor | None]:
    """(values, signs) of a block, each None where it is not asked for.

    x: packed words (N, H, W, L) int32, or activations (N, I, H, W) of a float dtype, whose signs are used.
    values: (N, C, H', W') of `dtype` (float32, float16, bfloat16), channels_last in memory. signs: (N, H', W',
    ceil(C/32)) int32, of the values as they are stored, so that a next layer sees the same ones in either form.
    signs_ring: rows and columns of zero words to lay around the signs, the padding of the block that reads them; that
    block is then told that its x is `ringed`, and need not copy x to pad it.
    """
    if ringed and x.dtype != torch.int32:
        raise UsageError("ringed: only packed input can have its padding around it already")
    _check_call(block, x, residual, ringed)
    if dtype not in DTYPES:
        raise UsageError(f"values of {_name(dtype)}: expected one of {', '.join(map(_name, DTYPES))}")
    if backend.name == "triton":
        from repbnn_cli.kernels import rep_bconv_fused  # imports Triton

        return rep_bconv_fused.launch(
            block,
            x if x.dtype == torch.int32 else pack_activations(x),
            residual,
            values=values,
            signs=signs,
            dtype=dtype,
            ringed=ringed,
            signs_ring=signs_ring,
        )
    if ringed:
        x = x[:, block.padding[0] : x.shape[1] - block.padding[0], block.padding[1] : x.shape[2] - block.padding[1]]
    float_signs = unpack_activations(x, block.in_channels) if x.dtype == torch.int32 else reference.binarize(x).float()
    sums = reference.sums_of_signs(float_signs, block.signs_of_kernel, block.stride, block.padding)
    stored, packed = reference.finish_block(
        sums,
        block.scale,
        block.shift,
        residual,
        activation=block.activation,
        rprelu=block.rprelu,
        sign_shift=block.sign_shift,
        values=values,
        signs=signs,
        dtype=dtype,
    )
    if packed is not None:
        packed = F.pad(packed, (0, 0, signs_ring[1], signs_ring[1], signs_ring[0], signs_ring[0]))
    return stored, packed


def _check_call(block: PackedBlock, x: Tensor, residual: Tensor | None, ringed: bool) -> None:
    packed = x.dtype == torch.int32
    held, wanted = (x.shape[-1], word_count(block.in_channels)) if packed else (x.shape[1], block.in_channels)
    if x.dim() != 4 or held != wanted or not (packed or x.dtype.is_floating_point):
        raise UsageError(
            f"input: {_text(x)}; expected packed (N, H, W, {word_count(block.in_channels)}) int32, or "
            f"(N, {block.in_channels}, H, W) of a float dtype"
        )
    for name, given in (("input", x), ("residual", residual)):
        if given is not None and given.device != block.scale.device:
            raise UsageError(f"{name}: on {given.device}; expected {block.scale.device}, where the block is")
    if (residual is not None) != block.residual:
        raise UsageError(f"residual: {'none' if block.residual else 'one'} given to a block that wants "
                         f"{'one' if block.residual else 'none'}")  # fmt: skip
    height, width = x.shape[1:3] if packed else x.shape[2:4]
    ring = block.padding if ringed else (0, 0)
    size = block.output_size(height - 2 * ring[0], width - 2 * ring[1])
    if residual is not None and residual.shape != (x.shape[0], block.channels, *size):
        raise UsageError(f"residual: {_text(residual)}; expected {(x.shape[0], block.channels, *size)}")


def _text(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {_name(tensor.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
