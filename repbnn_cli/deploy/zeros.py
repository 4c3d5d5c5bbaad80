"""Exact zeros in binary kernels: weights whose sign is 0, which no bit can hold.

torch.sign(0) is 0, so such a weight contributes nothing; packed bits make it +1 (kernels/packing.py). A filter of zeros
has scale 0 and is no question of sign. What counts is the kernel as it is applied: IR-Net, RBNN and ReCU centre theirs
first, so that a stored weight equal to its filter's mean has sign 0, and a stored 0 has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repbnn_cli.deploy.forms import kernel_zeros
from repbnn_cli.errors import UsageError
from repbnn_cli.graph import Network
from repbnn_cli.graph.functional import ConvolutionCall
from repbnn_cli.graph.probe import ConvCalls
from repbnn_cli.graph.static import evaluate
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.recognize import Layer
from repbnn_cli.restoring import unchanged


@dataclass(frozen=True)
class Zeros:
    """layers: path → weights with sign 0, where there are any; weights: of all kernels looked at; applied: whether
    these are kernels as applied, else tensors as stored."""

    layers: Mapping[str, int]
    weights: int
    applied: bool

    @property
    def total(self) -> int:
        return sum(self.layers.values())

    def worst(self, most: int = 3) -> list[tuple[str, int]]:
        return sorted(self.layers.items(), key=lambda item: -item[1])[:most]


def in_kernels(network: Network, layers: Mapping[str, Layer]) -> Zeros:
    """Of a network in eval mode: every module with a 1-bit kernel is run once and its kernel watched."""
    found, weights = {}, 0
    for path, layer in layers.items():
        if layer.binary and (layer.kernel or layer.called):
            kernel = applied_kernel(network, path)
            weights += kernel.numel()
            found[path] = kernel_zeros(kernel)
    return Zeros({path: n for path, n in found.items() if n}, weights, applied=True)


def in_tensors(tensors: Mapping[str, Tensor]) -> Zeros:
    """Of stored tensors shaped like kernels of convolutions, where no code says how they are applied."""
    kernels = {name: t for name, t in tensors.items() if t.ndim == 4 and t.is_floating_point() and len(t) > 1}
    found = {name: int((t == 0).sum()) for name, t in kernels.items()}
    return Zeros({name: n for name, n in found.items() if n}, sum(t.numel() for t in kernels.values()), applied=False)


def applied_kernel(network: Network, path: str) -> Tensor:
    """The kernel that a module really applies, whatever it computes it from: its first convolution is watched."""
    module: nn.Module = fetch(network.module, path)
    if isinstance(module, ConvolutionCall):
        call = next(n for n in network.graph.nodes if n.op == "call_module" and n.target == path)
        computed: Tensor = evaluate(network.module, call.all_input_nodes[1], {})
        return computed.detach()
    with unchanged(module), torch.no_grad(), ConvCalls() as seen:
        module(*inputs_like(network, path))
    if not seen.calls:
        raise UsageError(f"{path}: applies its kernel by none of torch's convolutions or linear layers, so that it "
                         "cannot be seen; write it as F.conv2d")  # fmt: skip
    kernel: Tensor = seen.calls[0].kernel.detach()
    return kernel


def inputs_like(network: Network, path: str, fill: Callable[[Tensor], Tensor] = Tensor.zero_) -> list[Tensor]:
    """One sample for each input of a module, as large as the network gives it."""
    node = next(n for n in network.graph.nodes if n.op == "call_module" and n.target == path)
    like = next(iter(fetch(network.module, path).parameters()), torch.zeros(()))
    values = [n.meta["value"] for n in node.all_input_nodes]
    return [fill(torch.empty((1, *v.shape[1:]), dtype=v.dtype, device=like.device)) for v in values]
