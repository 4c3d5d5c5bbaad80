"""Which role each module of a captured network has: as declared, else by type, else by what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx, nn

from repbnn_cli.binary_conv import BinaryConv2d
from repbnn_cli.graph import Network
from repbnn_cli.graph.functional import ConvolutionCall
from repbnn_cli.graph.probe import ConvFacts
from repbnn_cli.graph.static import roots, static_nodes
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.inherit import turned
from repbnn_cli.recognize.declared import as_declared
from repbnn_cli.recognize.layer import CONVOLUTIONS, Declare, Layer, type_names
from repbnn_cli.recognize.trials import (
    comes_last,
)
from repbnn_cli.recognize.tried import per_channel, probed, role_of
from repbnn_cli.rules import ModuleRule


def recognize(network: Network, declare: Declare | None = None) -> dict[str, Layer]:
    """Module path → Layer, for every module that the graph calls, in order of the first call; then for those that it
    calls in training mode alone."""
    layers = _recognized(network, declare, {})
    return _recognized(network.in_training, declare, layers) if network.in_training else layers


def _recognized(network: Network, declare: Declare | None, known: Mapping[str, Layer]) -> dict[str, Layer]:
    layers = dict(known)
    static = static_nodes(network.graph)  # what computes a kernel is no layer
    for node in network.graph.nodes:
        if node.op != "call_module" or node.target in known or node in static:
            continue
        module = fetch(network.module, node.target)
        declared = declare(node.target, type_names(module)) if declare else None
        layer = layers.get(node.target)
        if layer is None:
            layer = _recognize(network, node, module, declared)
            layers[node.target] = replace(layer, last_axis=layer.last_axis or _is_over_last_axis(node, layer))
        elif layer.role in CONVOLUTIONS and (declared is None or declared.role is None):
            # Called again, perhaps on other values: its costs are those of the widest.
            seen = [] if isinstance(module, BinaryConv2d) else node.meta.get("convs", [])
            bits = [layer.activation_bits, *(c.activation_bits for c in seen)]
            layers[node.target] = replace(layer, activation_bits=max(bits))
    return layers


def _is_over_last_axis(node: fx.Node, layer: Layer) -> bool:
    x = node.args[0].meta["value"] if node.args and isinstance(node.args[0], fx.Node) else None
    if layer.role not in ("binary_linear", "float_linear") or not isinstance(x, Tensor) or x.ndim < 3:
        return False
    result = node.meta["value"]
    kept = isinstance(result, Tensor) and result.shape[:-1] == x.shape[:-1]
    return kept and (x.shape[-1], result.shape[-1]) == (layer.in_channels, layer.out_channels)


def _recognize(network: Network, node: fx.Node, module: nn.Module, declared: ModuleRule | None) -> Layer:
    path = str(node.target)
    if declared is not None and declared.role is not None:
        return as_declared(node, module, declared)
    if isinstance(module, BinaryConv2d):
        return _own(path, module)
    convs: list[ConvFacts] = node.meta.get("convs", [])
    if isinstance(module, ConvolutionCall):
        held = [fetch(network.module, str(n.target)) for n in roots(node.all_input_nodes[1])]
        if convs[0].kernel_shape[:2] == (1, 1) and not any(isinstance(t, nn.Parameter) for t in held):
            return Layer(path, "weightless", f"is a call of {module.kind} with a fixed filter for one channel")
        return _called(path, module, convs[0])
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1:
        return Layer(path, "unknown", f"is a grouped {type(module).__name__}, of which no RepConv is made; `role: "
                     "weightless` (rule file: `modules:`) applies it to each replica")  # fmt: skip
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and (
        type(module).__module__.startswith("torch.nn.modules.")
        or (isinstance(module, nn.Linear | nn.Conv2d) and not convs)
    ):
        return _torch_conv(path, module, convs)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _batch_norm(node, module)
    if isinstance(module, nn.LayerNorm):
        return Layer(path, "per_channel", f"is a {type(module).__name__}: each sample by itself")
    tensors = {n: t for n, t in (*module.named_parameters(), *module.named_buffers()) if t.numel() > 1}
    if convs:
        return probed(node, module, convs, tensors)
    if not tensors:
        return Layer(path, "weightless", "has no tensors with more than one value")
    return per_channel(node, module, tensors)


def _own(path: str, module: BinaryConv2d) -> Layer:
    o, i = module.kernel_shape[:2]
    return Layer(
        path,
        "binary_conv",
        f"is a {type(module).__name__} of this package",
        kernel=module.kernel_name,
        kernel_shape=tuple(module.kernel_shape),
        weight_bits=module.weight_bits,
        activation_bits=module.activation_bits,
        out_tensors={n: _axis(getattr(module, n), o) for n in module.out_channel_tensors},
        in_tensors={n: _axis(getattr(module, n), i) for n in module.in_channel_tensors},
    )


def _called(path: str, module: ConvolutionCall, conv: ConvFacts) -> Layer:
    return Layer(
        path,
        role_of(conv, conv.weight_bits),
        f"is a call of {module.kind}",
        kernel_shape=conv.kernel_shape,
        groups=conv.groups,
        weight_bits=conv.weight_bits,
        activation_bits=conv.activation_bits,
        called=True,
    )


def _torch_conv(path: str, module: nn.Module, convs: list[ConvFacts]) -> Layer:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return Layer(path, "unknown", f"{type(module).__name__} has no `weight` before it runs (a hook sets it); give "
                     "it a parameter in __init__, or use torch.nn.utils.parametrize")  # fmt: skip
    groups = int(getattr(module, "groups", 1))
    linear = isinstance(module, nn.Linear)
    weight_bits = min((c.weight_bits for c in convs), default=32)
    role = ("binary" if weight_bits <= 2 else "float") + ("_linear" if linear else "_conv")
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    if groups > 1 and weight.shape[1] == 1:
        role = "depthwise_conv"
    kernel = "weight"
    if not isinstance(dict(module.named_parameters()).get("weight"), Tensor):  # parametrised: the latent tensor
        kernel = next((n for n, p in module.named_parameters() if p.shape == weight.shape), "")
    return Layer(
        path,
        role,
        f"is a {type(module).__name__}",
        kernel=kernel,
        kernel_shape=turned(tuple(weight.shape)) if transposed else tuple(weight.shape),
        inputs_first=transposed,
        groups=groups,
        weight_bits=weight_bits,
        activation_bits=max((c.activation_bits for c in convs), default=32),
        out_tensors={"bias": 0} if getattr(module, "bias", None) is not None else {},
    )


def _batch_norm(node: fx.Node, module: nn.modules.batchnorm._BatchNorm) -> Layer:
    layer = Layer(str(node.target), "batch_norm", f"is a {type(module).__name__}")
    held = (*module.named_parameters(), *module.named_buffers())
    axes = {n: 0 for n, t in held if t.shape == (module.num_features,)}
    own = type(module).__module__.startswith("torch.nn.")
    return layer if own or not comes_last(node, module, axes) else replace(layer, in_tensors=axes, last_axis=True)


def _axis(tensor: Tensor, size: int) -> int:
    return next((a for a, n in enumerate(tensor.shape) if n == size), 0)
