"""Layers as a rule file declares them (`modules:`), checked against the module that they are about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.errors import RulesError
from repbnn_cli.graph.probe import ConvFacts
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.inherit import turned
from repbnn_cli.recognize.layer import CONVOLUTIONS, Layer
from repbnn_cli.recognize.trials import (
    comes_last,
)
from repbnn_cli.recognize.tried import per_channel, tensor_axes
from repbnn_cli.rules import ModuleRule


def as_declared(node: fx.Node, module: nn.Module, rule: ModuleRule) -> Layer:
    path = str(node.target)
    if rule.role not in CONVOLUTIONS:
        tensors = {n: t for n, t in (*module.named_parameters(), *module.named_buffers()) if t.numel() > 1}
        if rule.role == "per_channel" and not rule.per_channel:
            layer = per_channel(node, module, tensors)
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
    for name, (side, axis) in tensor_axes(node, module, (kernel,), convs[0], tensors).items():
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
