"""Whether a tensor beside a kernel counts output channels, input channels or neither: found by permuting channels.

If a tensor has one entry per output channel, then permuting it together with the kernel's filters permutes the result
and changes nothing else; with one entry per input channel the same holds for the kernel's columns and the input. Sizes
alone do not tell where a layer has as many channels in as out, or where a lookup table happens to be as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Of all values of a result: rounding may carry a few across the threshold of a sign.
_FLIPPED = 1e-3


@dataclass(frozen=True)
class Probe:
    """What is permuted and how to look at the result.

    run: (replacements of tensors, permutation of the input's channels or None) → result, the same one every time.
    kernels: names of the kernel and of what is shaped like it; shape: (O, I/groups, k...).
    inputs_first: whether the kernels are held as (I, O).
    out_axis, in_axis: axes of the result that follow output and input channels; in_axis None: summed over.
    """

    run: Callable[[Mapping[str, Tensor], Tensor | None], Tensor]
    tensors: Mapping[str, Tensor]
    kernels: tuple[str, ...]
    shape: tuple[int, ...]
    groups: int = 1
    out_axis: int = 1
    in_axis: int | None = None
    inputs_first: bool = False

    def side(self, name: str, axis: int) -> str | None:
        """ "out", "in" or "none" (a table that belongs to no channel); "silent" where its values have no effect at all,
        None where no permutation explains what it does."""
        size = self.tensors[name].shape[axis]
        base = self._prepared(name)
        try:
            before = self.run(base, None)
            silent = torch.equal(before, self.run({**base, name: base[name].flip(axis) * 1.5 - 0.2}, None))
            if silent:
                return "silent"
            if size == self.shape[0] and self._follows_out(base, before, name, axis):
                return "out"
            if size == self.shape[1] * self.groups and self._follows_in(base, before, name, axis):
                return "in"
            kept = self._follows_out(base, before) and self._follows_in(base, before)
        except Exception:  # somebody else's code, on tensors it may not expect
            return None
        return "none" if kept else None

    def place(self, name: str, *, linear: bool = False) -> tuple[str | None, int]:
        """The side of a tensor and its axis: "out", "in", "none", or None where it cannot be told.

        linear: the result has its channels last.
        """
        tensor = self.tensors[name]
        long = [a for a, n in enumerate(tensor.shape) if n > 1]
        counts = (self.shape[0], self.shape[1] * self.groups)
        # Broadcast against a kernel or a feature map, further axes than the second are spatial.
        axes = [a for a in long if tensor.shape[a] in counts and (a < 2 or (linear and a == tensor.ndim - 1))]
        if not axes:
            return "none", 0
        silent: list[tuple[str, int]] = []
        sides = [(self.side(name, a), a) for a in axes]
        for side, axis in sides:
            if side == "silent":
                silent += self._by_shape(tensor, axis)
        decided = [(side, axis) for side, axis in sides if side not in ("silent", None)] or silent
        channels = [(side, axis) for side, axis in decided if side != "none"]
        if len(channels) == 1:
            return channels[0]
        return decided[0] if decided and not channels else (None, axes[0])

    def _by_shape(self, tensor: Tensor, axis: int) -> list[tuple[str, int]]:
        """For a tensor without effect in this mode (used in training only, or all zero): what its shape says."""
        out, into = self.shape[0], self.shape[1] * self.groups
        if out != into:
            return [("out" if tensor.shape[axis] == out else "in", axis)]
        # (O, 1, 1, 1) goes with the kernel's filters.
        return [("out", axis)] if axis == 0 and tensor.ndim == len(self.shape) else []

    def _prepared(self, name: str) -> dict[str, Tensor]:
        """The tensor in question with values that differ, all others beside the kernel with one value throughout."""
        generator = torch.Generator().manual_seed(0)
        prepared: dict[str, Tensor] = {}
        for other, tensor in self.tensors.items():
            if other in self.kernels or not tensor.is_floating_point():
                continue
            if other == name:
                noise = torch.rand(tensor.shape, generator=generator).to(tensor)
                prepared[other] = tensor + (noise + 0.1) * tensor.abs().mean().clamp_min(0.3)
            else:
                prepared[other] = tensor.mean().expand_as(tensor).clone()
        return prepared

    def _order(self, size: int) -> tuple[Tensor, Tensor]:
        """A rotation of `size` channels within each group: of one group's, and of all."""
        per = size // self.groups
        local = torch.arange(per).roll(1)
        return local, torch.cat([local + g * per for g in range(self.groups)])

    def _kernel(self, axis: int, order: Tensor) -> dict[str, Tensor]:
        moved = {}
        for name in self.kernels:
            stored = self.tensors[name]
            if self.inputs_first:
                moved[name] = stored.index_select(1 - axis, order.to(stored.device))
                continue
            view = stored.reshape(self.shape) if stored.shape != self.shape else stored
            moved[name] = view.index_select(axis, order.to(stored.device)).reshape(stored.shape)
        return moved

    def _follows_out(self, base: Mapping[str, Tensor], before: Tensor, name: str = "", axis: int = 0) -> bool:
        _, order = self._order(self.shape[0])
        changed = {**base, **self._kernel(0, order)}
        if name:
            changed[name] = base[name].index_select(axis, order.to(before.device))
        return _same(self.run(changed, None), before.index_select(self.out_axis, order.to(before.device)))

    def _follows_in(self, base: Mapping[str, Tensor], before: Tensor, name: str = "", axis: int = 0) -> bool:
        local, order = self._order(self.shape[1] * self.groups)
        changed = {**base, **self._kernel(1, local)}
        if name:
            changed[name] = base[name].index_select(axis, order.to(before.device))
        after = self.run(changed, order)
        if self.in_axis is not None:
            before = before.index_select(self.in_axis, local.to(before.device))
        return _same(after, before)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not bool(torch.isfinite(one).all()):
        return False
    scale = other.abs().max().clamp_min(1e-12)
    return float(((one - other).abs() > 1e-3 * scale).double().mean()) <= _FLIPPED
