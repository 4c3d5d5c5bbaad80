"""Watching a module's own convolutions: the kernel and the input that each one really applies.

A binary convolution hides its binarisation inside its forward. `ConvCalls` sees every `F.conv*d`/`F.linear` that runs
under it with the operands it was given, i.e. after binarisation and scaling, whatever code produced them; and it
can replace the kernel of a call, which is how the merged-kernel identity is checked on anybody's layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CALLED_CONVOLUTIONS: dict[Any, str] = {
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
    F.linear: "linear",
}
# Their kernels hold the inputs first, (I, O, k...).
TRANSPOSED_CONVOLUTIONS: dict[Any, str] = {
    torch.conv_transpose1d: "conv_transpose1d",
    torch.conv_transpose2d: "conv_transpose2d",
    torch.conv_transpose3d: "conv_transpose3d",
}

# Share of a kernel's weights that exact zeros may be: an identity or a Sobel filter is no kernel of signs.
_MOST_ZEROS = 0.6
_MOST_CHANCE_ZEROS = 0.05  # with more of them a kernel of −1, 0 and 1 is meant so

_MANY = 64  # values, from which on it can be told how many bits they have

ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_FURTHER = ("stride", "padding", "output_padding", "dilation")
_LINEAR = ("input", "weight", "bias")


@dataclass(frozen=True)
class _OfKind:
    """kind: "conv2d", "conv_transpose2d", "linear" or their kin."""

    kind: str

    @property
    def transposed(self) -> bool:
        return self.kind in TRANSPOSED_CONVOLUTIONS.values()


@dataclass(frozen=True)
class ConvCall(_OfKind):
    """One call: kernel and input as applied, (O, I/groups, ...) and (N, I, ...), and its output.

    The kernel of a transposed convolution is turned to (O, I, ...), too. arguments: what else it was given, by name.
    """

    input: Tensor
    kernel: Tensor
    groups: int
    output: Tensor
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConvFacts(_OfKind):
    """What a call says about a layer: kernel shape (O, I/groups, k...), groups, and how many bits it really uses.

    positions: how often the whole kernel is applied, in all samples together: once for each output position, in a
    transposed convolution for each input position. outputs: values of all samples.
    """

    kernel_shape: tuple[int, ...]
    groups: int
    weight_bits: int
    activation_bits: int
    positions: int = 0
    outputs: int = 0


class ConvCalls(TorchFunctionMode):
    """Records the convolutions and linear maps that run in its scope; transposed ones unless they are grouped.

    replace: called as replace(i, kernel) for the i-th call; returns the kernel to apply instead. One with fewer filters
        has its output repeated along the channels (of each group) until there are `channels`.
    """

    def __init__(self, replace: Callable[[int, Tensor], Tensor] | None = None, channels: int = 0) -> None:
        super().__init__()
        self.calls: list[ConvCall] = []
        self._replace, self._channels = replace, channels

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        transposed = func in TRANSPOSED_CONVOLUTIONS
        kind = TRANSPOSED_CONVOLUTIONS[func] if transposed else CALLED_CONVOLUTIONS.get(func)
        if kind is None:
            return func(*args, **kwargs)
        names = TRANSPOSED_ARGUMENTS if transposed else _LINEAR if kind == "linear" else ARGUMENTS
        given = dict(zip(names, args, strict=False)) | kwargs
        groups = int(given.get("groups", 1))
        if transposed and groups > 1:
            return func(*args, **kwargs)
        kernel = given["weight"].transpose(0, 1) if transposed else given["weight"]
        if self._replace is not None:
            kernel = self._replace(len(self.calls), kernel)
            given["weight"] = kernel.transpose(0, 1) if transposed else kernel
            output = _repeated(func, given, groups, len(kernel), self._channels)
        else:
            output = func(*args, **kwargs)
        further: dict[str, Any] = {n: v for n, v in given.items() if n in _FURTHER}
        self.calls.append(ConvCall(kind, given["input"], kernel, groups, output, further))
        return output


def applying(kernel: Tensor) -> ConvCalls:
    """Every convolution in its scope applies `kernel`."""
    return ConvCalls(lambda _, own: kernel.to(own), len(kernel))


def _repeated(func: Any, given: dict[str, Any], groups: int, filters: int, channels: int) -> Tensor:
    if filters == channels:
        output: Tensor = func(**given)
        return output
    bias = given.pop("bias", None)
    output = func(**given)
    axis = output.ndim - 1 if func is F.linear else 1
    blocks = output.unflatten(axis, (groups, filters // groups))
    output = torch.cat([blocks] * (channels // filters), axis + 1).flatten(axis, axis + 1)
    return output if bias is None else output + bias.view(-1, *[1] * (output.ndim - 1 - axis))


def facts(call: ConvCall) -> ConvFacts:
    """Bits are read off the values: one magnitude per filter is a 1-bit kernel, 2ⁿ distinct inputs are n bits."""
    # Of an image one sample tells; of the few inputs of a linear layer all samples are looked at.
    one = call.input[:1]
    return ConvFacts(
        call.kind,
        tuple(call.kernel.shape),
        call.groups,
        _kernel_bits(call.kernel),
        value_bits(one if one.numel() >= _MANY else call.input),
        (call.input if call.transposed else call.output).numel()
        // max(1, call.kernel.shape[1 if call.transposed else 0]),
        call.output.numel(),
    )


def _kernel_bits(kernel: Tensor) -> int:
    """1 for two values in each filter, a few zeros aside, which sign gives for exact zeros; 2 for −1, 0, 1; else 32."""
    if kernel.is_meta or not kernel.numel():
        return 32
    filters = kernel.detach().reshape(len(kernel), -1)
    magnitude = filters.abs()
    largest = magnitude.amax(1, keepdim=True)
    tolerance = spread_of_scaled(kernel.dtype) * largest
    zero = magnitude == 0
    if bool(zero.float().mean() > _MOST_ZEROS):
        return 32
    single = (((magnitude - largest).abs() <= tolerance) | zero).all(1)
    two = torch.zeros_like(single)
    if filters.shape[1] > 2:  # two values that are not ± one another: centre and distance per filter, or {0, 1}
        low, high = filters.amin(1, keepdim=True), filters.amax(1, keepdim=True)
        two = (((filters - low) <= tolerance) | ((high - filters) <= tolerance)).all(1)
    if filters.shape[1] == 1 or not bool((single | two).all()) or not bool((largest > 0).any()):
        return 32
    return 2 if bool(zero[single & ~two].sum() > _MOST_CHANCE_ZEROS * zero.numel()) else 1


def rounding(dtype: torch.dtype) -> float:
    """What equal numbers may differ by, relative to the largest, since `s.detach() - x.detach() + x` rounds."""
    return 8 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def spread_of_scaled(dtype: torch.dtype) -> float:
    """What the magnitudes of a kernel of scaled signs may differ by, relative to the largest."""
    return max(1e-5, rounding(dtype))


def _levels(distinct: Tensor, tolerance: float) -> Tensor:
    """One value, the one nearest to 0, for each group that lies within the tolerance; all of them where real numbers
    lie so close that there are no groups. distinct: sorted."""
    if len(distinct) < 2 or not distinct.is_floating_point():
        return distinct
    apart = tolerance * float(distinct.abs().max())
    starts = torch.cat([distinct.new_ones(1, dtype=torch.bool), distinct.diff() > apart])
    first, last = distinct[starts], distinct[torch.cat([starts[1:], starts.new_ones(1)])]
    if not bool(((last - first) <= 4 * apart).all()):  # NaN and infinity among them, too
        return distinct
    nearest = torch.where(last <= 0, last, first)
    return torch.where((first <= apart) & (last >= -apart), 0, nearest)


def binarises(function: Callable[[Tensor], Any], given: object, result: object) -> bool:
    """Whether a function was seen to give each element its sign, or one of two values: of real numbers, and wherever
    the element stands, which it does not where it mixes them."""
    if not isinstance(given, Tensor) or not isinstance(result, Tensor) or given.shape != result.shape:
        return False
    if value_bits(result) != 1 or value_bits(given) == 1:
        return False
    order = torch.randperm(given.numel(), generator=torch.Generator().manual_seed(0)).to(given.device)
    with torch.no_grad(), contextlib.suppress(Exception):  # the user's code, on what it may not expect
        elsewhere = function(given.detach().flatten()[order].view(given.shape))
        return torch.allclose(elsewhere.flatten(), result.detach().flatten()[order], rtol=1e-4)
    return False


def value_bits(values: Tensor) -> int:
    """The smallest of 1, 2, 4, 8 bits that can hold the distinct values, else 32."""
    if values.is_meta:
        return 32
    # Zeros are what sign gives for exact zeros and zero padding; they do not need a bit of their own.
    distinct = _levels(torch.unique(values.detach()), rounding(values.dtype))
    if not bool(distinct.any()):  # all zero, as in a capture for shapes only
        return 32
    nonzero = int((distinct != 0).sum())
    signs = nonzero == 2 and bool(torch.isclose(distinct[0], -distinct[-1], rtol=rounding(values.dtype)))
    count = nonzero if signs else len(distinct)
    # Too few values tell nothing, but that real numbers are all ±a is hardly chance.
    if values.numel() < (_MANY // 4 if signs else max(_MANY, 4 * count)):
        return 32
    return next((bits for bits in (1, 2, 4, 8) if count <= 2**bits), 32)
