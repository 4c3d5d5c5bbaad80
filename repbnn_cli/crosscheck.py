"""fvcore, thop and torch's FlopCounterMode beside our own count, with a reason for every difference.

Each tool runs on a copy of the captured network, on random input. What it reports is brought to multiply-accumulates
per input and compared module by module: what a tool does not see, what it counts in addition, what it counts more than
once. The reasons of a tool add up to its gap; a difference without a reason is listed as such. None of the tools knows
bit widths, so what is compared are MACs, binary and float alike.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from repbnn_cli.graph import Network
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.profiler import Profile
from repbnn_cli.recognize import CONVOLUTIONS, Layer
from repbnn_cli.user_code.cpu_only import running

# Gaps and reasons from this share of our count on are worth a line.
THRESHOLD = 0.005
_CONVOLUTION = frozenset(["conv", "convolution"])
_PRODUCT = frozenset(["linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum"])

Counts = Mapping[tuple[str, str], float]
"""(module path, operator or class) → what the tool reports for it, all samples together."""


@dataclass(frozen=True)
class Reason:
    """Why a tool differs. macs: signed share of its gap, per input.

    kind: unseen (it has no count where ours has one), addition (it counts what is no convolution or linear layer),
    repeated (it counts a layer several times), unexplained.
    """

    kind: Literal["unseen", "addition", "repeated", "unexplained"]
    what: str
    macs: float
    places: tuple[str, ...]


@dataclass(frozen=True)
class Tool:
    """One tool's answer. reported: its own figure for the whole input; per_mac: how many of its units one MAC is;
    macs: its figure as MACs per input; gap: macs − ours; skipped: operators that it says it leaves out.

    failed: why it gave no answer, else "".
    """

    name: str
    version: str
    per_mac: int = 1
    reported: float = 0
    macs: float = 0
    gap: float = 0
    reasons: tuple[Reason, ...] = ()
    skipped: Mapping[str, int] | None = None
    failed: str = ""


@dataclass(frozen=True)
class CrossCheck:
    """All tools on one network. macs: our count; binary: those of them whose operands are both of few bits."""

    macs: int
    binary: int
    ops: int | float
    tools: tuple[Tool, ...]

    def as_plain(self) -> dict[str, Any]:
        return {**asdict(self), "unit": "multiply-accumulates per input", "threshold": THRESHOLD}

    def worth_a_line(self, macs: float) -> bool:
        return abs(macs) >= THRESHOLD * self.macs


def cross_check(network: Network, layers: Mapping[str, Layer], profile: Profile) -> CrossCheck:
    """Runs every tool that is installed; one that fails on this network says why."""
    ours: Counter[str] = Counter()
    for cost in profile.layers:
        ours[cost.path if ":" not in cost.path else ""] += cost.macs
    tools = []
    for name, per_mac, run in (
        ("fvcore", 1, _fvcore),
        ("thop", 1, _thop),
        ("thop with handlers", 1, _thop_with_handlers),
        ("torch FlopCounterMode", 2, _torch),
    ):
        tool = Tool(name, _version(name.partition(" ")[0]), per_mac)
        try:
            counts, skipped, batch = _quietly(run, network, layers)
        except Exception as error:  # somebody else's tool on somebody else's network
            tools.append(replace(tool, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
            continue
        reported = _whole(sum(counts.values()) / batch)
        reasons = tuple(_reasons(network, layers, ours, {k: v / batch / per_mac for k, v in counts.items()}))
        macs = _whole(reported / per_mac)
        gap = _whole(macs - sum(ours.values()))
        tools.append(replace(tool, reported=reported, macs=macs, gap=gap, reasons=reasons, skipped=skipped))
    totals = profile.totals
    binary = sum(c.macs for c in profile.layers if c.kind == "bconv")
    return CrossCheck(totals.macs, binary, totals.ops_without_bn, tuple(tools))


# ---------------------------------------------------------------------------------------------------------------------
# The tools


def _quietly(run: Callable[..., Any], network: Network, layers: Mapping[str, Layer]) -> tuple[Counts, Any, int]:
    """Counts, skipped operators, and the number of samples they are of. What a tool prints, warns or logs goes nowhere.

    One sample, so that work on parameters counts once per input; the captured number where a forward insists on it.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            try:
                return *_on_copy(run, network, layers, 1), 1
            except Exception:
                if network.batch == 1:
                    raise
                return *_on_copy(run, network, layers, network.batch), network.batch
    finally:
        logging.disable(before)


def _on_copy(run: Callable[..., Any], network: Network, layers: Mapping[str, Layer], batch: int) -> Any:
    module = copy.deepcopy(network.module).eval()
    generator = torch.Generator().manual_seed(0)
    like = next(iter(module.parameters()), torch.zeros(()))
    inputs = tuple(torch.randn((batch, *shape[1:]), generator=generator).to(like) for shape in network.example)
    with running(module):
        return run(module, inputs, layers)


def _fvcore(module: fx.GraphModule, inputs: tuple[Tensor, ...], _: Any) -> tuple[Counts, dict[str, int]]:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False)
    analysis = analysis.uncalled_modules_warnings(False).tracer_warnings("none")
    nested = analysis.by_module_and_operator()
    return _own(module, {p: dict(ops) for p, ops in nested.items()}), dict(analysis.unsupported_ops())


def _torch(module: fx.GraphModule, inputs: tuple[Tensor, ...], _: Any) -> tuple[Counts, None]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    nested: dict[str, dict[str, float]] = {}
    for path, operators in counter.get_flop_counts().items():
        if path != "Global":
            inner = path.partition(".")[2]  # the first part is the class of the network
            nested[inner] = {str(op).rpartition(".")[2]: float(n) for op, n in operators.items()}
    return _own(module, nested), None


def _thop(module: fx.GraphModule, inputs: tuple[Tensor, ...], layers: Mapping[str, Layer]) -> tuple[Counts, None]:
    return _thop_counts(module, inputs, {}), None


def _thop_with_handlers(
    module: fx.GraphModule, inputs: tuple[Tensor, ...], layers: Mapping[str, Layer]
) -> tuple[Counts, None]:
    """thop counts by class; ours, the user's, and what became a RepConv get a rule each."""
    kernels = {id(fetch(module, p)): layer for p, layer in layers.items() if layer.role in CONVOLUTIONS}

    def convolution(m: nn.Module, _: Any, y: Tensor) -> None:
        """Output elements before the repeat × what each is a sum of."""
        if id(m) not in kernels:  # of the same class: a fixed filter
            return
        layer = kernels[id(m)]
        channels = y.shape[-1 if layer.role.endswith("linear") else 1]
        positions = y.numel() // channels
        counted: Any = m.total_ops
        counted += positions * torch.Size(layer.kernel_shape).numel() * layer.convolutions

    known = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    foreign = {type(m) for p in layers for m in [fetch(module, p)] if id(m) in kernels and type(m) not in known}
    return _thop_counts(module, inputs, dict.fromkeys(foreign, convolution)), None


def _thop_counts(module: fx.GraphModule, inputs: tuple[Tensor, ...], handlers: Mapping[type, Any]) -> Counts:
    from thop import profile

    total, _, tree = profile(module, inputs, custom_ops=dict(handlers), verbose=False, ret_layer_info=True)
    counts: dict[tuple[str, str], float] = {}

    def walk(nodes: Mapping[str, Any], above: str) -> None:
        for name, (operations, _, inner) in nodes.items():
            path = f"{above}{name}"
            if inner:
                walk(inner, f"{path}.")
            elif operations:
                counts[path, _named(fetch(module, path), handlers)] = operations

    walk(tree, "")
    assert total == sum(counts.values())
    return counts


def _named(module: nn.Module, handlers: Mapping[type, Any]) -> str:
    """thop counts by class; what convolves or multiplies is called as the other tools call it."""
    if isinstance(module, nn.Linear):
        return "linear"
    convolves = isinstance(module, nn.modules.conv._ConvNd) or type(module) in handlers
    return "convolution" if convolves else type(module).__name__


def _own(module: nn.Module, nested: Mapping[str, Mapping[str, float]]) -> Counts:
    """Of counts that include those of the modules inside, each module's own."""
    counts: defaultdict[tuple[str, str], float] = defaultdict(float)
    modules = dict(module.named_modules())
    for path, operators in nested.items():
        for operator, count in operators.items():
            counts[path, operator] += count
            above = path.rpartition(".")[0]
            while path and above not in nested and above:
                above = above.rpartition(".")[0]
            if path and path in modules:
                counts[above, operator] -= count
    return {key: count for key, count in counts.items() if count}


# ---------------------------------------------------------------------------------------------------------------------
# The reasons


def _reasons(
    network: Network, layers: Mapping[str, Layer], ours: Mapping[str, int], counts: Counts
) -> Iterator[Reason]:
    """Largest first; they add up to the gap."""
    found: dict[tuple[Any, str], list[tuple[str, float]]] = {}
    theirs = _by_layer(layers, counts)
    for path in dict.fromkeys((*ours, *theirs)):
        layer = layers.get(path)
        operators = theirs.get(path, {})
        direct = {op for op in operators if _is_layer_itself(layer, op, ours.get(path, 0))}
        seen = _whole(sum(operators[op] for op in direct))
        kind = type(fetch(network.module, path)).__name__ if layer else "operators of a forward"
        if seen != ours.get(path, 0):
            key = _difference(seen, ours.get(path, 0), kind, layer)
            found.setdefault(key, []).append((path, seen - ours.get(path, 0)))
        for operator in operators:
            if operator not in direct:
                key = ("addition", _addition(operator, layer))
                found.setdefault(key, []).append((path, operators[operator]))
    reasons = [
        Reason(kind, what, _whole(sum(n for _, n in places)), tuple(p or "(network)" for p, _ in places))
        for (kind, what), places in found.items()
    ]
    yield from sorted(reasons, key=lambda r: -abs(r.macs))


def _by_layer(layers: Mapping[str, Layer], counts: Counts) -> dict[str, dict[str, float]]:
    """What is counted inside of a layer belongs to it; what is in none, to the network."""
    grouped: dict[str, dict[str, float]] = {}
    for (path, operator), count in counts.items():
        owner = path
        while owner and owner not in layers:
            owner = owner.rpartition(".")[0]
        into = grouped.setdefault(owner, {})
        into[operator] = into.get(operator, 0) + count
    return grouped


def _is_layer_itself(layer: Layer | None, operator: str, ours: int) -> bool:
    """Whether an operator is the convolution or product that the layer is."""
    if layer is None:
        return ours > 0 and operator in _CONVOLUTION | _PRODUCT
    if operator in _CONVOLUTION:
        return layer.role in CONVOLUTIONS or ours > 0
    return operator in _PRODUCT and layer.role.endswith("linear")


def _difference(seen: float, ours: int, kind: str, layer: Layer | None) -> tuple[Any, str]:
    if not seen:
        return "unseen", f"does not see {kind}: it has no rule for that class"
    if ours and seen % ours == 0:
        bits = f", with {layer.activation_bits}-bit inputs" if layer and layer.activation_bits < 32 else ""
        return (
            "repeated",
            f"counts {kind} {seen // ours:g} times, for as many convolutions in its forward; here once{bits}",
        )
    return "unexplained", f"counts {kind} differently"


def _addition(operator: str, layer: Layer | None) -> str:
    lowered = operator.lower()
    if "norm" in lowered:
        return f"counts {operator} in addition: here it is no MAC, and stands under BN (2 per element)"
    if operator in _PRODUCT | _CONVOLUTION and layer is not None:
        return f"counts {operator} of parameters alone in addition: nothing that a trained network computes"
    return f"counts {operator} in addition: here it is elementwise work, no MAC"


def _whole(value: float) -> float:
    """An int where it is one."""
    return int(value) if float(value).is_integer() else value


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
