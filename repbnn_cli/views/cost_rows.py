"""The rows of a cost table: single layers, or sums over everything below a path of some depth; sorted as asked.

Values only; how they are written is the business of `tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from repbnn_cli.errors import UsageError
from repbnn_cli.profiler import Comparison, LayerCost, Profile, ops

SUMMED = ("macs", "flops", "bops", "other", "parameters", "packed_1bit", "packed_32bit", "latent")
SORT_KEYS = ("ops", "flops", "bops", "other", "macs", "parameters", "packed", "latent", "path")
_TOP = "(network)"  # functions that the network's own forward calls, once depth takes their names away


@dataclass(frozen=True)
class Row:
    """One layer, or `layers` of them summed; kind is empty where they are of several kinds."""

    path: str
    call: int
    type: str
    kind: str
    layers: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_bits: int | None
    activation_bits: int | None
    macs: int
    flops: int
    bops: int
    other: int
    parameters: int
    packed_1bit: int
    packed_32bit: int
    latent: int

    @property
    def ops(self) -> int | float:
        """FLOPs, those of BatchNorms included, + BOPs / 64."""
        return ops(self.flops, self.bops)

    @property
    def packed(self) -> int:
        return self.packed_1bit + self.packed_32bit

    @property
    def key(self) -> tuple[str, int]:
        return self.path, self.call


@dataclass(frozen=True)
class RowPair:
    """The same row before and after; None on the side that does not have it."""

    before: Row | None
    after: Row | None

    @property
    def row(self) -> Row:
        row = self.after or self.before
        assert row is not None
        return row


def rows(profile: Profile, *, sort: str | None = None, depth: int | None = None) -> list[Row]:
    """The rows of one profile, in the order of the network or by a column, largest first.

    Raises UsageError for an unknown sort key or a depth below 1.
    """
    return _sorted(_rows(profile.layers, depth), sort, lambda row: row)


def pairs(comparison: Comparison, *, sort: str | None = None, depth: int | None = None) -> list[RowPair]:
    """The rows of two profiles, matched by path; sorted by what they are afterwards."""
    if depth is None:
        matched = [
            RowPair(_row(p.before) if p.before else None, _row(p.after) if p.after else None)
            for p in comparison.layers
        ]  # fmt: skip
    else:
        sides = [{r.key: r for r in _rows(p.layers, depth)} for p in (comparison.before, comparison.after)]
        matched = [RowPair(sides[0].get(k), sides[1].get(k)) for k in dict.fromkeys((*sides[0], *sides[1]))]
    return _sorted(matched, sort, lambda pair: pair.row)


def _rows(layers: Iterable[LayerCost], depth: int | None) -> list[Row]:
    if depth is None:
        return [_row(layer) for layer in layers]
    if depth < 1:
        raise UsageError(f"--depth {depth}: expected 1 or more")
    groups: dict[str, list[LayerCost]] = {}
    for layer in layers:
        module = layer.path.partition(":")[0]
        path = ".".join(module.split(".")[:depth]) or _TOP
        groups.setdefault(path, []).append(layer)
    return [_summed(path, members) for path, members in groups.items()]


def _row(layer: LayerCost) -> Row:
    return Row(
        layer.path, layer.call, layer.type, layer.kind, 1, layer.input_shape, layer.output_shape, layer.weight_bits,
        layer.activation_bits, *(getattr(layer, name) for name in SUMMED),
    )  # fmt: skip


def _summed(path: str, members: Sequence[LayerCost]) -> Row:
    if len(members) == 1 and members[0].path == path:
        return _row(members[0])
    kinds = {m.kind for m in members if m.kind != "other"}
    kind = next(iter(kinds)) if len(kinds) == 1 else ("" if kinds else "other")
    sums = (sum(getattr(m, name) for m in members) for name in SUMMED)
    return Row(path, 1, "", kind, len(members), members[0].input_shape, members[-1].output_shape, None, None, *sums)


def _sorted(items: list[Any], key: str | None, row_of: Callable[[Any], Row]) -> list[Any]:
    if key is None:
        return items
    if key not in SORT_KEYS:
        raise UsageError(f"--sort {key}: unknown key; expected one of {', '.join(SORT_KEYS)}")
    if key == "path":
        return sorted(items, key=lambda item: row_of(item).key)
    return sorted(items, key=lambda item: -getattr(row_of(item), key))
