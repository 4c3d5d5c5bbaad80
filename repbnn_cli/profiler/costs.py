"""What a captured network costs: operations by kind, sizes and peak memory, as numbers; formats no text.

Everything is shape arithmetic over the graph: no forward runs, and the network is only read. All figures are per one
input. The convention (RepBNN, arXiv 2207.09049, section 4.4): a multiply-accumulate is ONE operation, binary or
float; biases are not counted; OPs = FLOPs + BOPs / 64; elementwise work is counted beside them, not in them.
What is counted how stands in the tables of `counting`, what is deployed in `sizes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor, fx, nn

from repbnn_cli.binary_conv import BinaryConv2d, GatedConv2d, RBNNConv2d
from repbnn_cli.graph import Network
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.positions import holds_tensor
from repbnn_cli.profiler.counting import Call, Count, Kind, count, is_free_function, name_of
from repbnn_cli.profiler.liveness import Peak, from_input, peak_memory
from repbnn_cli.profiler.sizes import NOTHING, Sizes, called_kernels, parameter_sizes, sizes_of, state_tensors
from repbnn_cli.recognize import Layer
from repbnn_cli.wording import some

KINDS: tuple[Kind, ...] = get_args(Kind)
Metric = Literal[
    "fc", "conv", "bn", "bconv", "other", "flops", "bops", "ops_without_bn", "ops_with_bn",
    "parameters", "packed_1bit", "packed_32bit", "packed", "latent", "peak",
]  # fmt: skip
METRICS: tuple[Metric, ...] = get_args(Metric)
_SUMMED = ("macs", "parameters", "packed_1bit", "packed_32bit", "latent")


@dataclass(frozen=True)
class LayerCost:
    """One call of a module or function, or tensors that no call uses.

    path: dotted module path; "path:node" for a function. call: 1 for the first call of a module, 2 for the next one
    (its tensors count once); 0 for tensors of modules that are never called. Shapes are without batch.
    flops: float operations of fc, conv and bn; bops: 1-bit operations (MACs × weight bits × activation bits);
    other: elementwise operations, which are no part of OPs. Sizes are in bytes.
    """

    path: str
    call: int
    type: str
    kind: Kind
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int = 0
    flops: int = 0
    bops: int = 0
    other: int = 0
    weight_bits: int | None = None
    activation_bits: int | None = None
    parameters: int = 0
    packed_1bit: int = 0
    packed_32bit: int = 0
    latent: int = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.path, self.call

    @property
    def packed(self) -> int:
        return self.packed_1bit + self.packed_32bit

    @property
    def ops(self) -> int | float:
        return ops(self.flops, self.bops)


@dataclass(frozen=True)
class Omission:
    """Something that computes and that no table of `counting` knows: its operations are in no figure."""

    node: str
    path: str
    type: str
    where: str
    reason: str


@dataclass(frozen=True)
class Totals:
    """Sums over layers; fc, conv and bn in FLOPs, bconv in BOPs, other in elementwise operations, sizes in bytes."""

    fc: int = 0
    conv: int = 0
    bn: int = 0
    bconv: int = 0
    other: int = 0
    macs: int = 0
    parameters: int = 0
    packed_1bit: int = 0
    packed_32bit: int = 0
    latent: int = 0
    peak: int = 0

    @property
    def flops(self) -> int:
        """Without BatchNorm, as in the paper's "OPs without BN"."""
        return self.fc + self.conv

    @property
    def bops(self) -> int:
        return self.bconv

    @property
    def ops_without_bn(self) -> int | float:
        return ops(self.flops, self.bops)

    @property
    def ops_with_bn(self) -> int | float:
        return ops(self.flops + self.bn, self.bops)

    @property
    def packed(self) -> int:
        return self.packed_1bit + self.packed_32bit


@dataclass(frozen=True)
class Profile:
    """layers: in order of the graph, then what no call uses; their columns add up to `totals`."""

    layers: tuple[LayerCost, ...]
    peak: Peak
    omissions: tuple[Omission, ...]
    notes: tuple[str, ...]

    @property
    def totals(self) -> Totals:
        return replace(total(self.layers), peak=self.peak.bytes)


@dataclass(frozen=True)
class LayerPair:
    """The same layer before and after; None on the side that does not have it."""

    before: LayerCost | None
    after: LayerCost | None

    @property
    def layer(self) -> LayerCost:
        layer = self.after or self.before
        assert layer is not None
        return layer


@dataclass(frozen=True)
class Change:
    """One figure before and after; ratio is None where it was zero."""

    before: int | float
    after: int | float

    @property
    def delta(self) -> int | float:
        return self.after - self.before

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if self.before else None


@dataclass(frozen=True)
class Comparison:
    """Two profiles side by side: per layer (matched by path and call), and in total."""

    before: Profile
    after: Profile
    layers: tuple[LayerPair, ...]
    totals: Mapping[Metric, Change]


def ops(flops: int, bops: int) -> int | float:
    """FLOPs + BOPs / 64, an int where it is whole."""
    return flops + bops // 64 if bops % 64 == 0 else flops + bops / 64


def total(layers: Iterable[LayerCost]) -> Totals:
    """Sums of the layers' columns; the peak is no sum and stays 0."""
    sums = dict.fromkeys((*KINDS, *_SUMMED), 0)
    for layer in layers:
        sums["other"] += layer.other
        if layer.kind != "other":
            sums[layer.kind] += layer.flops + layer.bops
        for name in _SUMMED:
            sums[name] += getattr(layer, name)
    return Totals(**sums)


def profile(network: Network, layers: Mapping[str, Layer]) -> Profile:
    """Costs of a captured network; `layers` is what `recognize` (or `shapes.rep_network`) says of its modules."""
    walk = _Walk(network, layers)
    for node in network.graph.nodes:
        walk.visit(node)
    walk.uncalled()
    peak = peak_memory(network, walk.live)
    return Profile(tuple(walk.records), peak, tuple(walk.omissions), tuple(walk.notes()))


def compare(before: Profile, after: Profile) -> Comparison:
    """Side by side; layers that only one side has stand where the other layers of that side put them."""
    return Comparison(
        before,
        after,
        tuple(_pairs(before.layers, after.layers)),
        {m: Change(getattr(before.totals, m), getattr(after.totals, m)) for m in METRICS},
    )


def _pairs(before: tuple[LayerCost, ...], after: tuple[LayerCost, ...]) -> Iterator[LayerPair]:
    old = {layer.key: layer for layer in before}
    new = {layer.key for layer in after}
    waiting = list(before)
    for layer in after:
        match = old.get(layer.key)
        if match is not None:
            while waiting and waiting[0].key != layer.key:
                gone = waiting.pop(0)
                if gone.key not in new:
                    yield LayerPair(gone, None)
            if waiting:
                waiting.pop(0)
        yield LayerPair(match, layer)
    yield from (LayerPair(gone, None) for gone in waiting if gone.key not in new)


class _Walk:
    """One pass over the graph: a record for every call with a cost, an omission for every call that nobody knows."""

    def __init__(self, network: Network, layers: Mapping[str, Layer]) -> None:
        self.network, self.layers = network, layers
        self.live = from_input(network.graph)
        self.records: list[LayerCost] = []
        self.omissions: list[Omission] = []
        self._modules = [
            (str(n.target), fetch(network.module, str(n.target))) for n in network.graph.nodes if n.op == "call_module"
        ]
        self._owned = {id(t) for _, module in self._modules for _, t in state_tensors(module)}
        self._kernels = called_kernels(network, layers)
        self._calls: dict[str, int] = {}
        self._counted: set[int] = set()
        self._parameter_work = 0
        self._assumed_float = 0
        self._never_used: list[str] = []

    def visit(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._module(node)
        elif node.op == "get_attr":
            self._parameter(node)
        elif node.op in ("call_function", "call_method") and holds_tensor(node.meta["value"]):
            self._function(node)

    def _module(self, node: fx.Node) -> None:
        path = str(node.target)
        module: nn.Module = fetch(self.network.module, path)
        call = Call(node, self.network.batch, module, self.layers.get(path))
        self._calls[path] = self._calls.get(path, 0) + 1
        cost = self._cost(node, call, path, type(module).__name__)
        sizes = sizes_of(module, call.layer, self._counted)
        if cost.costs or sizes.latent or sizes.packed_32bit:
            self._record(node, path, self._calls[path], type(module).__name__, cost, sizes)

    def _function(self, node: fx.Node) -> None:
        name = name_of(node)
        if is_free_function(name):
            return
        path = f"{node.meta.get('path', '')}:{node.name}"
        cost = self._cost(node, Call(node, self.network.batch), path, name)
        if cost.costs:
            self._assumed_float += cost.kind in ("conv", "fc") and "bits" not in node.meta
            self._record(node, path, 1, name, cost, NOTHING)

    def _cost(self, node: fx.Node, call: Call, path: str, what: str) -> Count:
        """The count, or nothing: for work on parameters alone, and for what is then listed as an omission."""
        counted = count(call)
        if node not in self.live:
            self._parameter_work += counted is None or counted.costs
            return Count()
        if counted is not None:
            return counted
        reason = f"{what} is in no table of this profiler: its operations are not counted"
        self.omissions.append(Omission(node.name, path, what, node.meta.get("where", ""), reason))
        return Count()

    def _parameter(self, node: fx.Node) -> None:
        """A parameter or buffer that a forward uses directly; those of modules that are called count there."""
        value = fetch(self.network.module, str(node.target))
        if isinstance(value, Tensor) and id(value) not in self._owned:
            sizes = parameter_sizes(self.network.module, str(node.target), value, self._counted, self._kernels)
            if sizes.latent:
                self._record(node, str(node.target), 1, type(value).__name__, Count(), sizes)

    def uncalled(self) -> None:
        """Tensors that no call uses: in the file, but not deployed."""
        for path, module in self.network.module.named_modules():
            tensors = dict(state_tensors(module, recurse=False))
            unused = [name for name, t in tensors.items() if id(t) not in self._counted]
            own = sizes_of(module, None, self._counted, recurse=False)
            if own.latent:
                all_of_it = path and len(unused) == len(tensors)
                self._never_used += [path] if all_of_it else [f"{path}.{n}".lstrip(".") for n in unused]
                own = replace(own, packed_1bit=0, packed_32bit=0)
                self._record(None, path, 0, type(module).__name__, Count(), own)

    def _record(self, node: fx.Node | None, path: str, call: int, kind: str, cost: Count, sizes: Sizes) -> None:
        given = [_first_tensor(n.meta["value"]) for n in node.all_input_nodes] if node else []
        first = next((t for t in given if t is not None), None)
        result = _first_tensor(node.meta["value"]) if node and first is not None else None
        self.records.append(
            LayerCost(
                path,
                call,
                kind,
                cost.kind,
                () if first is None else tuple(first.shape[1:]),
                () if result is None else tuple(result.shape[1:]),
                cost.macs,
                cost.flops,
                cost.bops,
                cost.other,
                cost.weight_bits,
                cost.activation_bits,
                sizes.parameters,
                sizes.packed_1bit,
                sizes.packed_32bit,
                sizes.latent,
            )
        )

    # -- what the reader has to know ---------------------------------------------------------------------------------
    def notes(self) -> Iterator[str]:
        """Facts about this network's figures, in the order of `counting`'s tables."""
        sizes = ", ".join("x".join(map(str, shape[1:])) for shape in self.network.example)
        yield f"The input is {sizes}."
        modules = list(dict(self._modules).items())  # one that is called several times, once
        rotated = [p for p, m in modules if isinstance(m, RBNNConv2d)]
        own = [p for p, m in modules if isinstance(m, BinaryConv2d)]
        if own:
            what = "binarisation, standardisation and scales of kernels"
            what += ", and RBNN's rotation" if rotated else ""
            yield f"Work that depends on parameters alone is not counted ({what}; {some(own)})."
        if self._parameter_work:
            yield f"Operations in the forward that depend on parameters alone, not counted: {self._parameter_work}."
        if gated := [p for p, m in modules if isinstance(m, GatedConv2d)]:
            yield (
                "A gated 2-bit convolution is counted as if every gate were open: 2 BOPs per MAC, its upper bound "
                f"({some(gated)})."
            )
        if self._assumed_float:
            yield (
                f"Convolutions or products called as functions: {self._assumed_float}; their bit widths are not known, "
                "and they count as float."
            )
        foreign = [p for p, m in modules if self._is_foreign_conv(p, m)]
        if foreign:
            yield (
                "Of modules that are not this package's, the convolutions are counted, one sign per input element, and "
                "one operation per output element and learned scale; other work in their forward cannot be seen, and "
                f"binary ones without a learned scale are packed with one per filter ({some(foreign)})."
            )
        if self._never_used:
            yield f"Not used in eval mode, so neither counted nor deployed: {some(self._never_used)}."

    def _is_foreign_conv(self, path: str, module: Any) -> bool:
        layer = self.layers.get(path)
        known = isinstance(module, BinaryConv2d) or type(module).__module__.startswith(("torch.nn.", "repbnn_cli."))
        return layer is not None and bool(layer.kernel_shape) and not known


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    return next((t for v in value for t in [_first_tensor(v)] if t is not None), None) if holds_tensor(value) else None
