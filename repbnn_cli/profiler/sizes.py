"""Bytes of a network's tensors: latent, as the state dict holds them, and packed, as inference needs them.

Packed: 1 bit per weight of a binary kernel (each layer rounded up to bytes) and one float32 per filter where its kind
scales; a BatchNorm as one scale and one shift per channel; every other float tensor at 4 bytes a value. What only
training needs (rotations, clamping thresholds, counters) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from repbnn_cli.binary_conv import BinaryConv2d, IRConv2d, RBNNConv2d, ReCUConv2d, SignConv2d
from repbnn_cli.graph import Network
from repbnn_cli.graph.functional import ConvolutionCall
from repbnn_cli.graph.static import roots
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.profiler.counting import MOST_BINARY_BITS
from repbnn_cli.recognize import Layer
from repbnn_cli.rep_layers import is_batch_norm

_FLOAT_BYTES = 4
# Kinds that compute a scale per filter from the kernel; the others learn theirs (a tensor of the layer) or have none.
SCALED_BY_KERNEL = (IRConv2d, SignConv2d)
TRAINING_ONLY: Mapping[type[BinaryConv2d], frozenset[str]] = {
    RBNNConv2d: frozenset(["R1", "R2", "rotate"]),
    ReCUConv2d: frozenset(["tau"]),
}


@dataclass(frozen=True)
class Sizes:
    """parameters in values, all else in bytes."""

    parameters: int = 0
    packed_1bit: int = 0
    packed_32bit: int = 0
    latent: int = 0


NOTHING = Sizes()

Encoding = Literal["bits", "kernel_scale", "norm_scale", "norm_shift", "plain"]


@dataclass(frozen=True)
class Stored:
    """One tensor of a deployed module. name: within the module; of a kernel_scale or norm_…, the name it is given.

    bits: 1-bit weights, kernel_scale: one float32 per filter; norm_scale, norm_shift: a BatchNorm's affine map; plain:
    the tensor itself, floats as float32.
    """

    name: str
    encoding: Encoding
    bytes: int


def sizes_of(module: nn.Module, layer: Layer | None, counted: set[int], *, recurse: bool = True) -> Sizes:
    """Sizes of a module's tensors, without those in `counted`, to which its own are added (tied tensors count once)."""
    own = {name: t for name, t in state_tensors(module, recurse=recurse) if id(t) not in counted}
    counted.update(id(t) for t in own.values())
    if not own:
        return NOTHING
    parameters = sum(t.numel() for t in own.values() if isinstance(t, nn.Parameter))
    latent = sum(t.numel() * t.element_size() for t in own.values())
    stored = deployed(module, layer, own)
    bits = sum(s.bytes for s in stored if s.encoding == "bits")
    return Sizes(parameters, bits, sum(s.bytes for s in stored) - bits, latent)


def called_kernels(network: Network, layers: Mapping[str, Layer]) -> dict[int, list[Layer]]:
    """Parameters that are binary kernels of convolutions called as functions: id → its calls; none of a latent copy."""
    found: dict[int, list[Layer]] = {}
    for node in network.graph.nodes:
        layer = layers.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or layer.weight_bits > MOST_BINARY_BITS or len(node.all_input_nodes) < 2:
            continue
        if isinstance(fetch(network.module, layer.path), ConvolutionCall):
            held = [fetch(network.module, str(n.target)) for n in roots(node.all_input_nodes[1])]
            kernels = [t for t in held if t.numel() == math.prod(layer.kernel_shape)]
            for i, tensor in enumerate(kernels):
                found.setdefault(id(tensor), []).extend([layer] if i == 0 else [])
    return found


def parameter_sizes(
    root: nn.Module, path: str, value: Tensor, counted: set[int], kernels: Mapping[int, Sequence[Layer]]
) -> Sizes:
    """A parameter or buffer used by a forward directly; nothing when it is no part of the state dict."""
    owner_path, _, name = path.rpartition(".")
    owner = root.get_submodule(owner_path)
    stored = name in owner._parameters or (name in owner._buffers and name not in owner._non_persistent_buffers_set)
    if not stored or id(value) in counted:
        return NOTHING
    counted.add(id(value))
    parameters = value.numel() if isinstance(value, nn.Parameter) else 0
    latent = value.numel() * value.element_size()
    if id(value) not in kernels:
        return Sizes(parameters, 0, _plain_bytes(value), latent)
    if not kernels[id(value)]:
        return Sizes(parameters, 0, 0, latent)
    layer = kernels[id(value)][0]
    return Sizes(parameters, (value.numel() * layer.weight_bits + 7) // 8, layer.out_channels * _FLOAT_BYTES, latent)


def state_tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the state dict: parameters and persistent buffers, as the objects that the module holds."""
    for path, child in module.named_modules() if recurse else [("", module)]:
        buffers = {n: b for n, b in child._buffers.items() if n not in child._non_persistent_buffers_set}
        for name, tensor in (*child._parameters.items(), *buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def deployed(module: nn.Module, layer: Layer | None, own: Mapping[str, Tensor]) -> list[Stored]:
    """What inference needs of a module whose tensors (those not counted elsewhere) are `own`."""
    if is_batch_norm(module):
        channels = module.num_features * _FLOAT_BYTES
        return [Stored("scale", "norm_scale", channels), Stored("shift", "norm_shift", channels)]
    kept = {n: t for n, t in own.items() if n.rpartition(".")[2] != "num_batches_tracked"}
    if layer is None or not layer.kernel_shape or layer.weight_bits > MOST_BINARY_BITS or layer.kernel not in own:
        return [Stored(n, "plain", _plain_bytes(t)) for n, t in kept.items()]
    stored = [Stored(layer.kernel, "bits", (own[layer.kernel].numel() * layer.weight_bits + 7) // 8)]
    wanted = {*layer.out_tensors, *layer.in_tensors}
    if isinstance(module, BinaryConv2d):
        wanted -= next((names for kind, names in TRAINING_ONLY.items() if isinstance(module, kind)), frozenset())
        scaled = isinstance(module, SCALED_BY_KERNEL)
    else:  # a foreign kind: it learns its scales, or is taken to compute one per filter
        # Its forward may read whatever it has (XNOR-Net++'s scales of rows and columns), but for latent copies of the
        # kernel, whose place the bits take.
        size = own[layer.kernel].numel()
        wanted |= {n for n, t in kept.items() if t.numel() != size}
        scaled = all(n.rpartition(".")[2] == "bias" for n in layer.out_tensors)
    stored += [Stored(n, "plain", _plain_bytes(t)) for n, t in kept.items() if n in wanted and n != layer.kernel]
    if scaled:
        stored.append(Stored("kernel_scale", "kernel_scale", layer.out_channels * _FLOAT_BYTES))
    return stored


def _plain_bytes(tensor: Tensor) -> int:
    return tensor.numel() * (_FLOAT_BYTES if tensor.is_floating_point() else tensor.element_size())
