"""Modules whose kernel is given as it is applied, ±1 times a scale per filter, instead of computed from a latent one.

The class changes, not the structure: a module keeps its binarisation of the input, its learned scales, its gate and its
repeat, and everything that asks what it is gets the same answer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from repbnn_cli.binary_conv import BinaryConv2d
from repbnn_cli.probe import ConvCalls


class GivenKernel:
    """Mixed into one of our binary convolutions: `binary_weight` is the given kernel."""

    given_kernel: Tensor

    def binary_weight(self) -> Tensor:
        return self.given_kernel


class SubstitutedKernel:
    """Mixed into anybody's module: every convolution in its forward applies the given kernel."""

    given_kernel: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with ConvCalls(lambda _, kernel: self.given_kernel, len(self.given_kernel)):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


_made: dict[tuple[type, type], type] = {}


def give_kernel(module: nn.Module, kernel: Tensor) -> None:
    """Makes a module apply `kernel`, (O, I/groups, ...), from now on; its latent kernel is no longer read."""
    mixin: type = GivenKernel if isinstance(module, BinaryConv2d) else SubstitutedKernel
    key = (type(module), mixin)
    if key not in _made:
        _made[key] = type(f"Packed{key[0].__name__}", (mixin, key[0]), {"__module__": key[0].__module__})
    module.register_buffer("given_kernel", kernel, persistent=False)
    module.__class__ = _made[key]
