"""What is known of one module: its role, its kernel, its tensors sized by channel. Values alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from repbnn_cli.inherit import turned
from repbnn_cli.rules import ModuleRule

CONVOLUTIONS = ("binary_conv", "float_conv", "depthwise_conv", "binary_linear", "float_linear")
Declare = Callable[[str, tuple[str, ...]], ModuleRule | None]


@dataclass(frozen=True)
class Layer:
    """One module of the graph.

    kernel: name of the kernel tensor within the module, kernel_shape: it viewed as (O, I/groups, k...).
    inputs_first: whether the module holds it as (I, O, k...): a transposed convolution.
    out_tensors, in_tensors: tensor name → the axis that is sized by output or input channel.
    same_tensors: further tensors shaped like the kernel (a binarised copy, say), treated like it.
    attributes: cached Python numbers, name → what they hold, as declared.
    called: a convolution that a forward calls as a function; its kernel is computed from parameters held elsewhere.
    per_replica: looks at all channels of a sample at once (a norm over channels): each replica is given to it alone.
    last_axis: its channels come last, (N, T, C): a linear layer over tokens, or what has numbers for their channels.
    """

    path: str
    role: str
    evidence: str
    kernel: str = ""
    kernel_shape: tuple[int, ...] = ()
    groups: int = 1
    weight_bits: int = 32
    activation_bits: int = 32
    out_tensors: Mapping[str, int] = field(default_factory=dict)
    in_tensors: Mapping[str, int] = field(default_factory=dict)
    same_tensors: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    convolutions: int = 1
    called: bool = False
    per_replica: bool = False
    inputs_first: bool = False
    last_axis: bool = False

    @property
    def out_channels(self) -> int:
        return self.kernel_shape[0]

    @property
    def in_channels(self) -> int:
        return self.kernel_shape[1] * self.groups

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the kernel tensor, where it is not flat."""
        return turned(self.kernel_shape) if self.inputs_first else self.kernel_shape

    @property
    def binary(self) -> bool:
        return self.role in ("binary_conv", "binary_linear") or (
            self.role == "depthwise_conv" and self.weight_bits <= 2
        )


def type_names(module: nn.Module) -> tuple[str, ...]:
    """Class name and dotted path of every class from the module's own up to nn.Module."""
    classes = [c for c in type(module).__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    return tuple(n for c in classes for n in (c.__name__, f"{c.__module__}.{c.__qualname__}"))
