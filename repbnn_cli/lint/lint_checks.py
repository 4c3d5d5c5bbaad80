"""What hurts a binary network in practice: one small function per check, each giving the places where it holds.

Decided by what was observed in a run (`observe`), by roles and by the graph, never by a class name. The table of all
checks, with severity, remedy and source, is in `lint`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from repbnn_cli.channels import operator_name
from repbnn_cli.graph import Network
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.lint.observe import Latent, Observation, Seen
from repbnn_cli.number_text import compact, exact, shape_text
from repbnn_cli.positions import holds_tensor
from repbnn_cli.profiler import Profile
from repbnn_cli.profiler.counting import MOST_BINARY_BITS
from repbnn_cli.profiler.liveness import from_input
from repbnn_cli.recognize import CONVOLUTIONS, Layer

WORD = 32  # channels that packed kernels hold in one word
LANES = 8  # output channels that they compute together
_FEW = 0.01  # share of a layer's latent weights from which on it is worth a word
_JOINS = ("add", "sub", "cat", "concat", "concatenate", "radd", "stack")


@dataclass(frozen=True)
class Place:
    """Where a check found something: a module's path, and what is there."""

    path: str
    detail: str


@dataclass(frozen=True)
class Evidence:
    """A network with everything that the checks look at. positions: first, trunk, bypass, last, for what convolves."""

    network: Network
    layers: Mapping[str, Layer]
    positions: Mapping[str, str]
    observation: Observation
    profile: Profile

    @property
    def binary(self) -> list[Seen]:
        """One record for each binary kernel, at its first call; a fixed filter (XNOR-Net's mean of |x|) is none."""
        first: dict[str, Seen] = {}
        for seen in self.observation.seen:
            fixed = seen.path in self.layers and self.layers[seen.path].role == "weightless"
            if seen.weight_bits == 1 and not fixed:
                first.setdefault(seen.path, seen)
        return list(first.values())

    @property
    def packed(self) -> list[Seen]:
        """Those that an XNOR-popcount kernel can run: both operands of few bits."""
        return [s for s in self.binary if s.activation_bits <= MOST_BINARY_BITS]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def empty_filters(found: Evidence) -> Iterator[Place]:
    for seen in found.binary:
        if seen.zero_filters:
            yield Place(seen.path, f"{seen.zero_filters} of {seen.out_channels} filters are all zero")


def zero_weights(found: Evidence) -> Iterator[Place]:
    for seen in found.binary:
        if seen.zeros:
            yield Place(seen.path, f"{exact(seen.zeros)} of {exact(_size(seen))} weights are 0, neither +1 nor −1")


def dead_latent(found: Evidence) -> Iterator[Place]:
    for seen, latent in _latents(found):
        if latent.no_gradient > _FEW * latent.count:
            yield Place(seen.path, f"{latent.no_gradient / latent.count:.1%} of its latent weights get no gradient")


def far_latent(found: Evidence) -> Iterator[Place]:
    for seen, latent in _latents(found):
        if not latent.normalised and latent.far > _FEW * latent.count:
            yield Place(seen.path, f"{latent.far / latent.count:.1%} of its latent weights are beyond ±1")


def small_variance(found: Evidence) -> Iterator[Place]:
    """Running variances that ε outweighs; of each BatchNorm, also one that takes a repeat over."""
    for path, layer in found.layers.items():
        module = fetch(found.network.module, path) if layer.role == "batch_norm" else None
        variance = getattr(module, "running_var", None)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(variance, Tensor):
            small = int((variance < module.eps).sum())
            if small:
                yield Place(path, f"{small} of {len(variance)} channels have a variance below ε = {module.eps:g}")


# ---------------------------------------------------------------------------------------------------------------------
# Operands


def float_weights(found: Evidence) -> Iterator[Place]:
    for seen in _first_calls(found):
        if seen.activation_bits == 1 and seen.weight_bits > MOST_BINARY_BITS:
            yield Place(seen.path, f"1-bit inputs, real weights {shape_text(seen.kernel)}")


def float_inputs(found: Evidence) -> Iterator[Place]:
    """The first layer's inputs are pixels; what comes later could be binarised."""
    for seen in found.binary:
        if seen.activation_bits > MOST_BINARY_BITS and found.positions.get(seen.path) != "first":
            yield Place(seen.path, f"1-bit weights {shape_text(seen.kernel)}, real inputs")


def nothing_binary(found: Evidence) -> Iterator[Place]:
    if not found.packed:
        count = len(_first_calls(found))
        yield Place("", f"none of its {count} convolutions and linear layers has 1-bit weights and 1-bit inputs")


def zero_padding(found: Evidence) -> Iterator[Place]:
    for seen in found.packed:
        if seen.activation_bits == 1 and seen.pads:
            how = "by the convolution" if seen.pads == "argument" else "before the convolution"
            yield Place(seen.path, f"±1 inputs padded with 0 {how}")


def input_words(found: Evidence) -> Iterator[Place]:
    for seen in found.packed:
        channels = seen.kernel[1]
        if channels % WORD and channels > 1:  # depthwise layers have no words to fill
            used = channels / (-(-channels // WORD) * WORD)
            group = " per group" if seen.groups > 1 else ""
            yield Place(seen.path, f"{channels} input channels{group}: {used:.0%} of its words' bits are used")


def output_lanes(found: Evidence) -> Iterator[Place]:
    for seen in found.packed:
        if seen.out_channels % LANES:
            yield Place(seen.path, f"{seen.out_channels} output channels")


# ---------------------------------------------------------------------------------------------------------------------
# Structure


def no_residual(found: Evidence) -> Iterator[Place]:
    """Binary convolutions of the main branch that no shortcut leads around, however many layers it spans."""
    binary = {s.path for s in found.packed if s.kind != "linear"}
    around = _with_shortcut(found.network, found.layers, binary)
    for path in (p for p in found.layers if p in binary):
        if found.positions.get(path) == "trunk" and path not in around:
            yield Place(path, "no shortcut leads around it")


def _with_shortcut(network: Network, layers: Mapping[str, Layer], binary: set[str]) -> set[str]:
    """The binary convolutions on the longer of two joined branches whose shorter one comes from the input as well."""
    bits = {path: 1 << i for i, path in enumerate(layers) if path in binary}
    live = from_input(network.graph)
    before: dict[fx.Node, int] = {}
    covered = 0
    for node in network.graph.nodes:
        sources = [n for n in node.all_input_nodes if n in live and holds_tensor(n.meta["value"])]
        masks = [before[n] for n in sources]
        if node.op in ("call_function", "call_method") and operator_name(node) in _JOINS:
            for mask in masks:
                for other in masks:
                    mine, theirs = mask & ~other, other & ~mask
                    if mine.bit_count() > theirs.bit_count():
                        covered |= mine
        above = 0
        for mask in masks:
            above |= mask
        before[node] = above | (bits.get(str(node.target), 0) if node.op == "call_module" else 0)
    return {path for path, bit in bits.items() if covered & bit}


def skipped_inputs(found: Evidence) -> Iterator[Place]:
    for shrink in found.observation.shrinks:
        if shrink.unread >= 0.25:
            sizes = f"{shape_text(shrink.before)} → {shape_text(shrink.after)}"
            yield Place(shrink.path, f"{sizes} leaves out {shrink.unread:.0%} of the positions")


def large_last_layer(found: Evidence) -> Iterator[Place]:
    """A last layer that takes more packed bytes than all others together."""
    total = found.profile.totals.packed
    for path, position in found.positions.items():
        own = sum(layer.packed for layer in found.profile.layers if layer.path == path)
        if position == "last" and own > total - own:
            yield Place(path, f"{compact(own)}B of {compact(total)}B when packed ({own / total:.0%})")


# ---------------------------------------------------------------------------------------------------------------------


def _size(seen: Seen) -> int:
    return torch.Size(seen.kernel).numel()


def _latents(found: Evidence) -> Iterator[tuple[Seen, Latent]]:
    yield from ((s, s.latent) for s in found.binary if s.latent is not None)


def _first_calls(found: Evidence) -> list[Seen]:
    """Convolutions and linear layers, each at its first call."""
    first: dict[str, Seen] = {}
    for seen in found.observation.seen:
        if seen.path not in found.layers or found.layers[seen.path].role in (*CONVOLUTIONS, "unknown"):
            first.setdefault(seen.path, seen)
    return list(first.values())
