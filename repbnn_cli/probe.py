"""Watching a module's own convolutions: the kernel and the input that each one really applies.

A binary convolution hides its binarisation inside its forward. `ConvCalls` sees every `F.conv*d`/`F.linear` that runs
under it with the operands it was given, i.e. after binarisation and scaling, whatever code produced them; and it
can replace the kernel of a call, which is how the merged-kernel identity is checked on anybody's layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS: dict[Any, str] = {
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
    F.linear: "linear",
}


@dataclass(frozen=True)
class ConvCall:
    """One call: kernel and input as applied, (O, I/groups, ...) and (N, I, ...), and its output."""

    kind: str
    input: Tensor
    kernel: Tensor
    groups: int
    output: Tensor


@dataclass(frozen=True)
class ConvFacts:
    """What a call says about a layer: kernel shape (O, I/groups, k...), groups, and how many bits it really uses."""

    kind: str
    kernel_shape: tuple[int, ...]
    groups: int
    weight_bits: int
    activation_bits: int


class ConvCalls(TorchFunctionMode):
    """Records the convolutions and linear maps that run in its scope.

    replace: called as replace(i, kernel) for the i-th call; returns the kernel to apply instead.
    """

    def __init__(self, replace: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.calls: list[ConvCall] = []
        self._replace = replace

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _CONVOLUTIONS.get(func)
        if kind is None:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        kernel = args[1] if len(args) > 1 else kwargs["weight"]
        if self._replace is not None:
            kernel = self._replace(len(self.calls), kernel)
            args, kwargs = ((x, kernel, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"weight": kernel})
        output = func(*args, **kwargs)
        groups = 1 if kind == "linear" else (args[6] if len(args) > 6 else kwargs.get("groups", 1))
        self.calls.append(ConvCall(kind, x, kernel, int(groups), output))
        return output


def facts(call: ConvCall) -> ConvFacts:
    """Bits are read off the values: one magnitude per filter is a 1-bit kernel, 2ⁿ distinct inputs are n bits."""
    return ConvFacts(
        call.kind, tuple(call.kernel.shape), call.groups, _kernel_bits(call.kernel), _value_bits(call.input[:1])
    )


def _kernel_bits(kernel: Tensor) -> int:
    """1 when each filter has a single magnitude (zeros aside, which sign gives for exact zeros), else 32."""
    if kernel.is_meta:
        return 32
    magnitude = kernel.detach().reshape(len(kernel), -1).abs()
    largest = magnitude.amax(1, keepdim=True)
    single = ((magnitude - largest).abs() <= 1e-5 * largest) | (magnitude == 0)
    return 1 if magnitude.shape[1] > 1 and bool(single.all()) and bool((largest > 0).any()) else 32


def _value_bits(values: Tensor) -> int:
    """The smallest of 1, 2, 4, 8 bits that can hold the distinct values of one sample, else 32."""
    if values.is_meta or values.numel() < 1024:  # too few values to tell
        return 32
    # Zeros are what sign gives for exact zeros and zero padding; they do not need a bit of their own.
    distinct = torch.unique(values.detach())
    nonzero = int((distinct != 0).sum())
    count = nonzero if nonzero == 2 and bool(torch.isclose(distinct[0], -distinct[-1])) else len(distinct)
    return next((bits for bits in (1, 2, 4, 8) if count <= 2**bits), 32)
