"""What a person should know about the roles of a network's layers: they hold for the tensors at hand, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repbnn_cli.graph import Network
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.recognize.layer import CONVOLUTIONS, Layer
from repbnn_cli.wording import some


def never_called(network: Network) -> list[str]:
    """Modules with a kernel of their own that the captured forward does not reach."""
    reached = {str(n.target) for m in network.modes for n in m.graph.nodes if n.op in ("call_module", "get_attr")}

    def within(path: str) -> bool:
        return any(f"{path}.".startswith(f"{r}.") or r.startswith(f"{path}.") for r in reached)

    kernels = [p for p, m in network.module.named_modules() if any(t.dim() > 1 for t in m.parameters(recurse=False))]
    return [path for path in kernels if path and not within(path)]


def frozen(network: Network, changed: Sequence[str]) -> list[str]:
    """A note on those of the modules that become RepConvs (changed) which training leaves alone, while it changes
    others: on a teacher inside the network."""
    held = {path: list(fetch(network.module, path).parameters()) for path in changed}
    still = [path for path, own in held.items() if own and not any(p.requires_grad for p in own)]
    if not still or len(still) == len(held):
        return []
    return [
        f"become RepConvs though they are frozen (requires_grad = False), so that what they lose is not learned again: "
        f"{some(still)}; `apply: keep` for their modules leaves a part that starts at the input as it is"
    ]


_NOTHING_BINARY = (
    "no layer is binary with these weights; if they are binarised from outside before each forward, or by a "
    "temperature that falls in training, declare it (rule file: `modules: [{match: {path: ...}, role: binary_conv}]`)"
)


def hints(network: Network, layers: Mapping[str, Layer]) -> list[str]:
    """What a person should know about roles that hold for the tensors at hand, and may not be meant."""
    asleep = never_called(network)
    if asleep:
        what = "never called on the example input, so kept as it is and counted nowhere"
        return [f"{some(asleep)}: {what}; a branch that other inputs take into it would meet layers of another size"]
    real = [p for p, layer in layers.items() if layer.weight_bits == 32 and layer.activation_bits == 1]
    if not real:
        convolves = any(layer.role in CONVOLUTIONS for layer in layers.values())
        return [_NOTHING_BINARY] if convolves and not any(layer.binary for layer in layers.values()) else []
    return [
        f"1-bit inputs meet real weights in {some(real)}; if these are binarised from outside before each forward, "
        "declare it (rule file: `modules: [{match: {path: ...}, role: binary_conv}]`)"
    ]
