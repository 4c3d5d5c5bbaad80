"""How trained tensors fill the tensors of a RepBNN: one small value per way, applied when a plan is applied.

Shape letters: O, I channels of the source convolution, b = β, C channels of a source tensor.
Source: RepBNN, arXiv 2207.09049, section 3; carrying weights over is this tool's own (the paper trains from scratch).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A per-channel tensor for expanded channels: entry j is the source's entry index[j] along `axis`."""

    axis: int
    index: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(self.axis, _long(self.index, tensor))

    def result_shape(self, source: torch.Size) -> tuple[int, ...]:
        """Of what this makes of a tensor of the shape `source`."""
        return _resized(source, self.axis, len(self.index))

    def describe(self) -> str:
        return "tiled"


@dataclass(frozen=True)
class Members:
    """Which b original filters share each of the O/b convolution channels: (O/b) groups of b.

    fold: channel o holds o, o + O/b, ...: the originals that the repeat maps to it.
    reshape: channel o holds o·b … o·b + b − 1: the literal kernel.reshape(O/b, I·b, ...).
    With `groups` the same holds within each block of O/groups filters.
    """

    out_channels: int
    beta: int
    inherit: str
    groups: int = 1

    def table(self) -> Tensor:
        per = self.out_channels // self.groups // self.beta
        filters = torch.arange(self.out_channels).view(self.groups, -1)
        if self.inherit == "reshape":
            return filters.view(self.groups * per, self.beta)
        return filters.view(self.groups, self.beta, per).transpose(1, 2).reshape(self.groups * per, self.beta)


@dataclass(frozen=True)
class Mean:
    """A tensor on a convolution's own output: O values → O/b, each the mean of those whose filters it now serves."""

    axis: int
    members: Members

    def __call__(self, tensor: Tensor) -> Tensor:
        table = self.members.table().to(tensor.device)
        picked = tensor.index_select(self.axis, table.flatten()).unflatten(self.axis, table.shape)
        return picked.mean(self.axis + 1) if tensor.is_floating_point() else self.first(tensor)

    def first(self, tensor: Tensor) -> Tensor:
        """Of each group the first value, instead of the mean."""
        return tensor.index_select(self.axis, self.members.table()[:, 0].to(tensor.device))

    def result_shape(self, source: torch.Size) -> tuple[int, ...]:
        """Of what this makes of a tensor of the shape `source`."""
        return _resized(source, self.axis, self.members.out_channels // self.members.beta)

    def describe(self) -> str:
        return f"mean of {self.members.beta}"


def turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(O, I, k...) ↔ (I, O, k...)."""
    return (shape[1], shape[0], *shape[2:])


def layout(stored: tuple[int, ...], shape: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape in which a kernel `new` is stored where one of `shape` is stored as `stored`, whose axes are products
    of neighbouring axes of `shape`: (O, 1, I·k·k), (O·I·k·k, 1). None where they are not."""
    if stored == shape:
        return new
    result: list[int] = []
    at = 0
    for size in stored:
        old, grown = 1, 1
        while at < len(shape) and old < size:
            old, grown, at = old * shape[at], grown * new[at], at + 1
        if old != size:
            return None
        result.append(grown)
    rest = [n for n in (*shape[at:], *new[at:]) if n != 1]
    return tuple(result) if not rest else None


@dataclass(frozen=True)
class Kernel:
    """The kernel (O, I, k...) as (O/b, I·b, k...): K[o, j] = W[members[o][replica[j]], column[j]].

    column[j]: the source input channel (within its group) of expanded input j; replica[j]: how many copies of it
    come before j.
    shape: (O, I, k...), in which it is stored, or in another `layout`, which it then keeps.
    inputs_first: whether it is stored as (I, O, k...), as `x @ w` takes it.
    """

    shape: tuple[int, ...]
    members: Members
    column: tuple[int, ...]
    replica: tuple[int, ...]
    inputs_first: bool = False

    def __call__(self, tensor: Tensor) -> Tensor:
        kernel = tensor.new_empty(self.new_shape)
        for start, stop, block in self._blocks(tensor):
            kernel[:, start:stop] = block
        return self.outputs_first(kernel).reshape(self.result_shape(tensor.shape)).contiguous()

    def outputs_first(self, kernel: Tensor) -> Tensor:
        """A kernel as it is stored → as (O, I, k...), and back."""
        return kernel.transpose(0, 1) if self.inputs_first else kernel

    @property
    def new_shape(self) -> tuple[int, ...]:
        """(O/b, I·b, k...)."""
        return (self.shape[0] // self.members.beta, len(self.column), *self.shape[2:])

    def result_shape(self, source: torch.Size) -> tuple[int, ...]:
        """Of what this makes of a tensor of the shape `source`."""
        if self.inputs_first:
            return turned(self.new_shape)
        found = layout(tuple(source), self.shape, self.new_shape)
        assert found is not None, f"{tuple(source)} is no layout of {self.shape}"
        return found

    @property
    def result_fan_in(self) -> int:
        return torch.Size(self.new_shape[1:]).numel()

    @property
    def filter_of_channel(self) -> tuple[int, ...]:
        """For each output channel of the source, the filter that serves it behind the repeat."""
        before, after = (n // self.members.groups for n in (self.shape[0], self.new_shape[0]))
        return tuple(c // before * after + c % before % after for c in range(self.shape[0]))

    def made(self, tensor: Tensor, own: Tensor) -> bool:
        """Whether `own` is what this makes of `tensor`, without making it again."""
        if tuple(own.shape) != self.result_shape(tensor.shape):
            return False
        kernel = self.outputs_first(own).reshape(self.new_shape)
        return all(torch.equal(kernel[:, start:stop], block) for start, stop, block in self._blocks(tensor))

    def _blocks(self, tensor: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, values of the inputs start … stop − 1), in whole runs of neighbouring channels.

        Kernels are most of a network, and gathering them one by one takes ten times as long.
        """
        source = self.outputs_first(tensor).reshape(self.shape)
        table = self.members.table().to(tensor.device)
        for start, stop in runs(self.column, self.replica):
            first = self.column[start]
            filters = table[:, self.replica[start]]
            step = int(filters[1] - filters[0]) if len(filters) > 1 else 1
            # Filters that share a channel's turn lie evenly spaced, so this is a view.
            block = source[int(filters[0]) :: step][: len(filters)] if self.members.groups == 1 else source[filters]
            yield start, stop, block[:, first : first + stop - start]

    def describe(self) -> str:
        return self.members.inherit


@dataclass(frozen=True)
class Columns:
    """The inputs of a last layer (or of one that ends the expansion), along `axis`, times `scale`.

    groups: the source columns that each kept input stands for; their weights are summed (one each in ways 1 and 2).
    """

    groups: tuple[tuple[int, ...], ...]
    scale: float = 1.0
    axis: int = 1

    def __call__(self, tensor: Tensor) -> Tensor:
        table = torch.tensor(self.groups, device=tensor.device)
        picked = tensor.index_select(self.axis, table[:, 0])
        for column in table.t()[1:]:
            picked = picked + tensor.index_select(self.axis, column)
        return picked * self.scale if self.scale != 1.0 else picked

    def result_shape(self, source: torch.Size) -> tuple[int, ...]:
        """Of what this makes of a tensor of the shape `source`."""
        return _resized(source, self.axis, len(self.groups))

    def describe(self) -> str:
        return "tiled / β" if self.scale != 1.0 else ("summed" if len(self.groups[0]) > 1 else "selected")


Recipe = Tile | Mean | Kernel | Columns


def runs(column: tuple[int, ...], replica: tuple[int, ...] = ()) -> list[tuple[int, int]]:
    """[start, stop) of the longest stretches in which `column` counts up (and `replica` stays, if given)."""
    cuts = [
        j for j in range(1, len(column)) if column[j] != column[j - 1] + 1 or (replica and replica[j] != replica[j - 1])
    ]
    return list(zip([0, *cuts], [*cuts, len(column)], strict=True))


def _resized(shape: torch.Size, axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _long(values: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=like.device)
