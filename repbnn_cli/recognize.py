"""What each module of a captured network is: its role, its kernel, its tensors sized by channel.

Order of authority: a declaration in a rule file, then our own and torch's types, then what the module does on its
input (`probe`). Every verdict carries its evidence. What cannot be told is `unknown` with the reason; it is refused
only where it would have to handle an expanded tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli import seeds
from repbnn_cli.binary_conv import BinaryConv2d
from repbnn_cli.errors import RulesError
from repbnn_cli.functional import ConvolutionCall
from repbnn_cli.graph import Network
from repbnn_cli.inherit import layout, turned
from repbnn_cli.probe import ConvFacts
from repbnn_cli.restoring import unchanged
from repbnn_cli.rules import ModuleRule
from repbnn_cli.sides import Probe
from repbnn_cli.static import roots, static_nodes
from repbnn_cli.tracer import fetch
from repbnn_cli.trials import comes_last, first_tensor, is_read, mixes_channels, module_acts_per_sample, random_like

CONVOLUTIONS = ("binary_conv", "float_conv", "depthwise_conv", "binary_linear", "float_linear")
Declare = Callable[[str, tuple[str, ...]], ModuleRule | None]


@dataclass(frozen=True)
class Layer:
    """One module of the graph.

    kernel: name of the kernel tensor within the module, kernel_shape: it viewed as (O, I/groups, k...).
    inputs_first: whether the module holds it as (I, O, k...): a transposed convolution.
    out_tensors, in_tensors: tensor name → the axis that is sized by output or input channel.
    same_tensors: further tensors shaped like the kernel (a binarised copy, say), treated like it.
    attributes: cached Python numbers, name → what they hold, as declared.
    called: a convolution that a forward calls as a function; its kernel is computed from parameters held elsewhere.
    per_replica: looks at all channels of a sample at once (a norm over channels): each replica is given to it alone.
    last_axis: its channels come last, (N, T, C): a linear layer over tokens, or what has numbers for their channels.
    """

    path: str
    role: str
    evidence: str
    kernel: str = ""
    kernel_shape: tuple[int, ...] = ()
    groups: int = 1
    weight_bits: int = 32
    activation_bits: int = 32
    out_tensors: Mapping[str, int] = field(default_factory=dict)
    in_tensors: Mapping[str, int] = field(default_factory=dict)
    same_tensors: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    convolutions: int = 1
    called: bool = False
    per_replica: bool = False
    inputs_first: bool = False
    last_axis: bool = False

    @property
    def out_channels(self) -> int:
        return self.kernel_shape[0]

    @property
    def in_channels(self) -> int:
        return self.kernel_shape[1] * self.groups

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the kernel tensor, where it is not flat."""
        return turned(self.kernel_shape) if self.inputs_first else self.kernel_shape

    @property
    def binary(self) -> bool:
        return self.role in ("binary_conv", "binary_linear") or (
            self.role == "depthwise_conv" and self.weight_bits <= 2
        )


def type_names(module: nn.Module) -> tuple[str, ...]:
    """Class name and dotted path of every class from the module's own up to nn.Module."""
    classes = [c for c in type(module).__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    return tuple(n for c in classes for n in (c.__name__, f"{c.__module__}.{c.__qualname__}"))


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
        return _declared(node, module, declared)
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
        return _probed(node, module, convs, tensors)
    if not tensors:
        return Layer(path, "weightless", "has no tensors with more than one value")
    return _per_channel(node, module, tensors)


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
        _role(conv, conv.weight_bits),
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


def _probed(node: fx.Node, module: nn.Module, convs: list[ConvFacts], tensors: dict[str, Tensor]) -> Layer:
    """A foreign module that convolves: role and kernel from the convolutions it was seen to run."""
    path, first = str(node.target), convs[0]
    name = type(module).__name__

    def unknown(why: str, remedy: str) -> Layer:
        return Layer(path, "unknown", f"{name} {why}; {remedy}")

    if any(c.kernel_shape != first.kernel_shape or c.groups != first.groups for c in convs):
        return unknown("runs convolutions of different shapes", _remedy(module))
    shape = first.kernel_shape
    stored = turned(shape) if first.transposed else shape
    size = torch.Size(shape).numel()
    candidates = [n for n, t in tensors.items() if t.numel() == size]
    exact = [n for n in candidates if tuple(tensors[n].shape) == stored]
    others = [n for n in candidates if n not in exact and layout(tuple(tensors[n].shape), shape, shape) is not None]
    # Copies (a latent kernel and the one that it is written to) are all handled alike; parameters come first.
    kernels = tuple(exact if exact and first.transposed else [*exact, *others])
    learns = any(True for _ in module.parameters())
    if not learns and (not kernels or first.kernel_shape[:2] == (1, 1)):
        return Layer(path, "weightless", f"{name} applies a fixed filter, made in its forward or for one channel")
    if not kernels:
        return unknown(
            f"holds no tensor of the kernel {stored} that it applies",
            "name it (`kernel:`, `kernel_shape:`) in a rule file",
        )
    if not exact and len({tuple(tensors[n].shape) for n in kernels}) > 1:
        return unknown(f"may keep its kernel in {', '.join(kernels)}", "say which (`kernel:`) in a rule file")
    axes = _axes(node, module, kernels, first, tensors)
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and "bias" in axes:
        axes["bias"] = ("out", 0)  # by its type, even where its forward leaves it out
    undecided = [n for n, (side, _) in axes.items() if side is None]
    if undecided:
        bad = undecided[0]
        return unknown(
            f"has the tensor {bad} {tuple(tensors[bad].shape)}, whose channel axis cannot be told",
            _remedy(module, "declare it (`per_channel:`)"),
        )
    weight_bits = min(c.weight_bits for c in convs)
    activation_bits = max(c.activation_bits for c in convs)
    return Layer(
        path,
        _role(first, weight_bits),
        f"{name} was seen to apply a kernel {shape} with {weight_bits}-bit weights and {activation_bits}-bit inputs",
        kernel=kernels[0],
        kernel_shape=shape,
        groups=first.groups,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        out_tensors={n: axis for n, (side, axis) in axes.items() if side == "out"},
        in_tensors={n: axis for n, (side, axis) in axes.items() if side == "in"},
        same_tensors=kernels[1:],
        convolutions=len(convs),
        inputs_first=first.transposed,
    )


def _role(conv: ConvFacts, weight_bits: int) -> str:
    if conv.groups > 1 and conv.kernel_shape[1] == 1:
        return "depthwise_conv"
    return ("binary" if weight_bits <= 2 else "float") + ("_linear" if conv.kind == "linear" else "_conv")


def _axes(
    node: fx.Node, module: nn.Module, kernels: tuple[str, ...], conv: ConvFacts, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[str | None, int]]:
    """For each tensor beside the kernel: "out", "in", "none" or None (cannot be told), and the axis it is about."""
    # Only the first argument has channels; others may be thresholds or modes.
    given = random_like(node.args, next(iter(tensors.values())).device)
    linear = conv.kind == "linear"
    over_last = linear and given[0].shape[-1] == conv.kernel_shape[1]
    in_axis = given[0].ndim - 1 if over_last else 1
    out_axis = first_tensor(node.meta["value"]).ndim - 1 if over_last else 1

    def probe(training: bool | None) -> Probe:
        def run(replaced: Mapping[str, Tensor], order: Tensor | None) -> Tensor:
            x = given[0] if order is None else given[0].index_select(in_axis, order.to(given[0].device))
            with unchanged(module), torch.no_grad():
                seeds.seed(0)
                if training is not None:
                    module.train(training)
                for name, value in replaced.items():
                    fetch(module, name).data = value
                return first_tensor(module(x, *given[1:]))

        return Probe(
            run, tensors, kernels, conv.kernel_shape, conv.groups, out_axis=out_axis, inputs_first=conv.transposed
        )

    found = {n: probe(None).place(n, linear=linear) for n in tensors if n not in kernels}
    for name, (side, axis) in found.items():
        if side is None:  # without effect in this mode, it may have one in the other
            found[name] = probe(not module.training).place(name, linear=linear)
            if found[name][0] is None and not is_read(module, name, given):
                found[name] = "out", axis  # any answer is right; it changes with the filters
    return found


def _per_channel(node: fx.Node, module: nn.Module, tensors: dict[str, Tensor]) -> Layer:
    path, name = str(node.target), type(module).__name__
    shapes = [a.meta["value"] for a in node.all_input_nodes]
    x = shapes[0] if shapes and isinstance(shapes[0], Tensor) and shapes[0].ndim >= 2 else None
    axes = {n: [a for a, size in enumerate(t.shape) if size > 1] for n, t in tensors.items()}
    result = node.meta["value"]

    def of_other_size(axis: int) -> list[str]:
        return [n for n, a in axes.items() if len(a) != 1 or x is None or tensors[n].shape[a[0]] != x.shape[axis]]

    def fits(axis: int) -> bool:
        keeps = isinstance(result, Tensor) and x is not None and result.shape[axis:][:1] == x.shape[axis:][:1]
        return keeps and not of_other_size(axis)

    found = [axis for axis in ((1, x.ndim - 1) if x is not None and x.ndim > 2 else (1,)) if fits(axis)]
    if not found or x is None:
        wrong = of_other_size(1)
        why = f"tensor {wrong[0]} {tuple(tensors[wrong[0]].shape)}" if wrong else "an output with other channels"
        return Layer(path, "unknown", f"{name} has {why}; {_remedy(module)}")
    like, along = next(iter(tensors.values())), {n: a[0] for n, a in axes.items()}
    axis = found[-1] if len(found) == 1 or comes_last(node, module, along) else 1
    channels = x.shape[axis]
    if not isinstance(module, nn.GroupNorm) and mixes_channels(node, module, like, axis):
        if not module_acts_per_sample(node, module, like):
            why = "mixes channels, and samples, in a way that is not known"
            return Layer(path, "unknown", f"{name} {why}; {_remedy(module)}")
        return Layer(
            path, "per_channel", f"{name} mixes {channels} channels of each sample by itself", per_replica=True
        )
    return Layer(
        path,
        "per_channel",
        f"{name} has {channels} channels in and out and only tensors of that size",
        in_tensors=along,
        last_axis=axis != 1,
    )


def _remedy(module: nn.Module, declare: str = "declare what it is (`modules:`)") -> str:
    if type(module).__module__.startswith("torch."):
        return f"{declare} in a rule file"
    kind = type(module).__name__
    return f"trace into it (rule file: `modules: [{{match: {{type: {kind}}}, leaf: false}}]`), or {declare}"


def _declared(node: fx.Node, module: nn.Module, rule: ModuleRule) -> Layer:
    path = str(node.target)
    if rule.role not in CONVOLUTIONS:
        tensors = {n: t for n, t in (*module.named_parameters(), *module.named_buffers()) if t.numel() > 1}
        if rule.role == "per_channel" and not rule.per_channel:
            layer = _per_channel(node, module, tensors)
            if layer.role == "unknown":
                raise RulesError(f"{rule.where} per_channel: {path}: {layer.evidence}")
            return layer
        axes = {n: p.axis for n, p in rule.per_channel.items()}
        _check_tensors(rule, path, module, axes)
        last = rule.role == "per_channel" and comes_last(node, module, axes)
        layer = Layer(path, str(rule.role), f"declared at {rule.where}", in_tensors=axes, attributes=rule.attributes)
        return replace(layer, last_axis=last)
    kernel = rule.kernel or "weight"
    _check_tensors(rule, path, module, [kernel, *rule.per_channel])
    tensor: Tensor = fetch(module, kernel)
    shape = tuple(tensor.shape)
    if rule.kernel_shape:
        shape = tuple(_number(rule, path, module, n, i) for i, n in enumerate(rule.kernel_shape))
    if torch.Size(shape).numel() != tensor.numel():
        raise RulesError(
            f"{rule.where} kernel_shape: {path}.{kernel} holds {tensor.numel()} values, {list(shape)} needs "
            f"{torch.Size(shape).numel()}"
        )
    convs: list[ConvFacts] = node.meta.get("convs", [])
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd) or any(c.transposed for c in convs)
    if transposed and getattr(module, "groups", 1) > 1:
        raise RulesError(
            f"{rule.where} role: {path} is a grouped {type(module).__name__}, of which no RepConv is made; `role: "
            "weightless` applies it to each replica"
        )
    shape = turned(shape) if transposed and not rule.kernel_shape else shape
    declared: dict[str, tuple[str, int]] = {n: (str(p.channels), p.axis) for n, p in rule.per_channel.items()}
    sides = declared | _undeclared(node, module, rule, kernel, shape, declared)
    activation = rule.activation_bits or max((c.activation_bits for c in convs), default=32)
    return Layer(
        path,
        str(rule.role),
        f"declared at {rule.where}",
        kernel=kernel,
        kernel_shape=shape,
        groups=convs[0].groups if convs else int(getattr(module, "groups", 1)),
        weight_bits=rule.weight_bits or (1 if str(rule.role).startswith("binary") else 32),
        activation_bits=activation if activation != 32 or not str(rule.role).startswith("binary") else 1,
        out_tensors={n: axis for n, (side, axis) in sides.items() if side == "out"},
        in_tensors={n: axis for n, (side, axis) in sides.items() if side == "in"},
        attributes=rule.attributes,
        convolutions=max(1, len(convs)),
        inputs_first=transposed,
    )


def _undeclared(
    node: fx.Node, module: nn.Module, rule: ModuleRule, kernel: str, shape: tuple[int, ...], declared: Mapping[str, Any]
) -> dict[str, tuple[str, int]]:
    """The tensors of a declared convolution that its declaration leaves out: told by type or by what they do."""
    convs: list[ConvFacts] = [c for c in node.meta.get("convs", []) if c.kernel_shape == shape]
    tensors = {n: t for n, t in (*module.named_parameters(), *module.named_buffers()) if t.numel() > 1}
    open_ones = [n for n in tensors if n != kernel and n not in declared]
    found: dict[str, tuple[str, int]] = {}
    if "bias" in open_ones and isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        found["bias"] = ("out", 0)
    if not convs or set(open_ones) <= set(found):
        return found
    for name, (side, axis) in _axes(node, module, (kernel,), convs[0], tensors).items():
        if name in open_ones and name not in found:
            if side is None:
                raise RulesError(
                    f"{rule.where}: {node.target}.{name} {tuple(tensors[name].shape)} may be sized by channel; say so "
                    f"(`per_channel: {{{name}: {{channels: out, axis: {axis}}}}}`, or `in`)"
                )
            found[name] = (side, axis)
    return found


def _check_tensors(rule: ModuleRule, path: str, module: nn.Module, names: Any) -> None:
    present = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
    for name in names:
        if name not in present:
            raise RulesError(f"{rule.where}: {path} has no tensor {name!r}; it has {', '.join(present) or 'none'}")


def _number(rule: ModuleRule, path: str, module: nn.Module, value: int | str, position: int) -> int:
    """A kernel_shape entry: an int, or an attribute of the module (one of a tuple, for kernel_size)."""
    if isinstance(value, int):
        return value
    held = getattr(module, value, None)
    if isinstance(held, tuple | list) and held:
        held = held[max(0, position - 2) % len(held)]
    if not isinstance(held, int):
        raise RulesError(f"{rule.where} kernel_shape: {path} has no whole number {value!r}")
    return held


def _axis(tensor: Tensor, size: int) -> int:
    return next((a for a, n in enumerate(tensor.shape) if n == size), 0)
