"""What a module of somebody else's code is, found by running it: its convolutions, and the axes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from repbnn_cli import seeds
from repbnn_cli.graph.probe import ConvFacts
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.inherit import layout, turned
from repbnn_cli.recognize.layer import Layer
from repbnn_cli.recognize.sides import Probe
from repbnn_cli.recognize.trials import (
    comes_last,
    first_tensor,
    is_read,
    mixes_channels,
    module_acts_per_sample,
    random_like,
)
from repbnn_cli.restoring import unchanged


def probed(node: fx.Node, module: nn.Module, convs: list[ConvFacts], tensors: dict[str, Tensor]) -> Layer:
    """A foreign module that convolves: role and kernel from the convolutions it was seen to run."""
    path, first = str(node.target), convs[0]
    name = type(module).__name__

    def unknown(why: str, remedy: str) -> Layer:
        return Layer(path, "unknown", f"{name} {why}; {remedy}")

    if any(c.kernel_shape != first.kernel_shape or c.groups != first.groups for c in convs):
        return unknown("runs convolutions of different shapes", remedy(module))
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
    axes = tensor_axes(node, module, kernels, first, tensors)
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and "bias" in axes:
        axes["bias"] = ("out", 0)  # by its type, even where its forward leaves it out
    undecided = [n for n, (side, _) in axes.items() if side is None]
    if undecided:
        bad = undecided[0]
        return unknown(
            f"has the tensor {bad} {tuple(tensors[bad].shape)}, whose channel axis cannot be told",
            remedy(module, "declare it (`per_channel:`)"),
        )
    weight_bits = min(c.weight_bits for c in convs)
    activation_bits = max(c.activation_bits for c in convs)
    return Layer(
        path,
        role_of(first, weight_bits),
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


def role_of(conv: ConvFacts, weight_bits: int) -> str:
    if conv.groups > 1 and conv.kernel_shape[1] == 1:
        return "depthwise_conv"
    return ("binary" if weight_bits <= 2 else "float") + ("_linear" if conv.kind == "linear" else "_conv")


def tensor_axes(
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


def per_channel(node: fx.Node, module: nn.Module, tensors: dict[str, Tensor]) -> Layer:
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
        return Layer(path, "unknown", f"{name} has {why}; {remedy(module)}")
    like, along = next(iter(tensors.values())), {n: a[0] for n, a in axes.items()}
    axis = found[-1] if len(found) == 1 or comes_last(node, module, along) else 1
    channels = x.shape[axis]
    if not isinstance(module, nn.GroupNorm) and mixes_channels(node, module, like, axis):
        if not module_acts_per_sample(node, module, like):
            why = "mixes channels, and samples, in a way that is not known"
            return Layer(path, "unknown", f"{name} {why}; {remedy(module)}")
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


def remedy(module: nn.Module, declare: str = "declare what it is (`modules:`)") -> str:
    if type(module).__module__.startswith("torch."):
        return f"{declare} in a rule file"
    kind = type(module).__name__
    return f"trace into it (rule file: `modules: [{{match: {{type: {kind}}}, leaf: false}}]`), or {declare}"
