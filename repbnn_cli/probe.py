"""Watching a module's own convolutions: the kernel and the input that each one really applies.

A binary convolution hides its binarisation inside its forward. `ConvCalls` sees every `F.conv*d`/`F.linear` that runs
under it with the operands it was given, i.e. after binarisation and scaling, whatever code produced them; and it
can replace the kernel of a call, which is how the merged-kernel identity is checked on anybody's layers.
"""

from __future__ import annotations

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


# Share of a kernel's weights that exact zeros may be: an identity or a Sobel filter is no kernel of signs.
_MOST_ZEROS = 0.6

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_LINEAR = ("input", "weight", "bias")


@dataclass(frozen=True)
class ConvCall:
    """One call: kernel and input as applied, (O, I/groups, ...) and (N, I, ...), and its output.

    arguments: what else it was given, by name: stride, padding, dilation.
    """

    kind: str
    input: Tensor
    kernel: Tensor
    groups: int
    output: Tensor
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConvFacts:
    """What a call says about a layer: kernel shape (O, I/groups, k...), groups, and how many bits it really uses.

    positions: output positions of all samples together.
    """

    kind: str
    kernel_shape: tuple[int, ...]
    groups: int
    weight_bits: int
    activation_bits: int
    positions: int = 0


class ConvCalls(TorchFunctionMode):
    """Records the convolutions and linear maps that run in its scope.

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
        kind = CALLED_CONVOLUTIONS.get(func)
        if kind is None:
            return func(*args, **kwargs)
        given = dict(zip(_LINEAR if kind == "linear" else _CONV, args, strict=False)) | kwargs
        groups = int(given.get("groups", 1))
        if self._replace is not None:
            given["weight"] = self._replace(len(self.calls), given["weight"])
            output = _repeated(func, given, groups, self._channels)
        else:
            output = func(*args, **kwargs)
        further: dict[str, Any] = {n: given[n] for n in ("stride", "padding", "dilation") if n in given}
        self.calls.append(ConvCall(kind, given["input"], given["weight"], groups, output, further))
        return output


def _repeated(func: Any, given: dict[str, Any], groups: int, channels: int) -> Tensor:
    filters = len(given["weight"])
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
    return ConvFacts(
        call.kind,
        tuple(call.kernel.shape),
        call.groups,
        _kernel_bits(call.kernel),
        _value_bits(call.input[:1]),
        call.output.numel() // max(1, len(call.kernel)),
    )


def _kernel_bits(kernel: Tensor) -> int:
    """1 when each filter has one magnitude (zeros aside, which sign gives for exact zeros) or two values, else 32."""
    if kernel.is_meta or not kernel.numel():
        return 32
    filters = kernel.detach().reshape(len(kernel), -1)
    magnitude = filters.abs()
    largest = magnitude.amax(1, keepdim=True)
    tolerance = 1e-5 * largest
    zero = magnitude == 0
    if bool(zero.float().mean() > _MOST_ZEROS):
        return 32
    single = ((magnitude - largest).abs() <= tolerance) | zero
    if filters.shape[1] > 2:  # two values that are not ± one another: centre and distance per filter, or {0, 1}
        low, high = filters.amin(1, keepdim=True), filters.amax(1, keepdim=True)
        single = single.all(1) | (((filters - low) <= tolerance) | ((high - filters) <= tolerance)).all(1)
    return 1 if filters.shape[1] > 1 and bool(single.all()) and bool((largest > 0).any()) else 32


def _value_bits(values: Tensor) -> int:
    """The smallest of 1, 2, 4, 8 bits that can hold the distinct values of one sample, else 32."""
    if values.is_meta:
        return 32
    # Zeros are what sign gives for exact zeros and zero padding; they do not need a bit of their own.
    distinct = torch.unique(values.detach())
    if not bool(distinct.any()):  # all zero, as in a capture for shapes only
        return 32
    nonzero = int((distinct != 0).sum())
    count = nonzero if nonzero == 2 and bool(torch.isclose(distinct[0], -distinct[-1])) else len(distinct)
    if values.numel() < max(64, 4 * count):  # too few values to tell
        return 32
    return next((bits for bits in (1, 2, 4, 8) if count <= 2**bits), 32)
