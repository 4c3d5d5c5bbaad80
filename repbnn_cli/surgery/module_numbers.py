"""The numbers of channels that a module keeps beside its tensors: set where they are known, else fitted by trial."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.errors import SurgeryError
from repbnn_cli.graph import Network
from repbnn_cli.graph.functional import ConvolutionCall
from repbnn_cli.graph.probe import ConvCalls
from repbnn_cli.plan import ModuleEdit
from repbnn_cli.recognize import Layer
from repbnn_cli.restoring import unchanged


def set_known_numbers(module: nn.Module, edit: ModuleEdit) -> None:
    """in_channels and the like of torch's own classes and their subclasses."""
    assert edit.channels is not None
    into, out = edit.channels
    if isinstance(module, nn.modules.conv._ConvNd):
        module.in_channels, module.out_channels = into, out
        if edit.action == "depthwise":
            module.groups = into
    elif isinstance(module, ConvolutionCall):
        if edit.action == "depthwise":
            module.groups = module.options["groups"] = into
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = into, out
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = out
    elif isinstance(module, nn.PReLU):
        module.num_parameters = out
    elif isinstance(module, nn.GroupNorm):
        module.num_groups *= out // module.num_channels
        module.num_channels = out


def fit_numbers(module: nn.Module, edit: ModuleEdit, layer: Layer, network: Network) -> None:
    """Updates cached channel numbers of somebody else's module: those declared, then as few as make it run."""
    assert edit.channels is not None
    into, out = edit.channels
    after = edit.resized(layer)
    new_shape, fan_in = after.stored_shape, torch.Size(after.kernel_shape[1:]).numel()
    values: dict[str, Any] = {"in_channels": into, "out_channels": out, "kernel_shape": new_shape, "fan_in": fan_in}
    for name, meaning in layer.attributes.items():
        if not hasattr(module, name):
            raise SurgeryError(f"{edit.path}: has no attribute {name!r}, which a rule file declares; remove it there")
        if meaning in values:
            old = getattr(module, name)
            setattr(module, name, type(old)(values[meaning]) if isinstance(old, list | tuple) else values[meaning])
    if layer.kernel_shape:
        for owner in module.modules():
            for name, value in vars(owner).items():
                if isinstance(value, tuple | list | torch.Size) and tuple(value) == layer.stored_shape:
                    setattr(owner, name, type(value)(new_shape))
    run = _trial(module, edit, network, axis=-1 if layer.last_axis else 1)
    failure = run()
    if failure is None:
        return
    for choice in _number_choices(module, layer, edit, network):
        for owner, name, value in choice:
            setattr(owner, name, value)
        if run() is None:
            return
    resized = {name for name, _ in edit.tensors}
    held = [(n, tuple(t.shape)) for n, t in (*module.named_parameters(), *module.named_buffers()) if t.numel() > 1]
    kept = ", ".join(f"{n} {shape}" for n, shape in held if n not in resized)
    raise SurgeryError(
        f"{edit.path}: {type(module).__name__} does not run with its resized tensors ({failure}); "
        + (f"no channel number gives the sizes of {kept}: leave --model out if `repbnn inspect` knows the network, or "
           if kept else "")
        + "declare the numbers that it keeps (rule file: `modules: [{match: {path: ...}, attributes: {name: "
        "in_channels}}]`)"
    )  # fmt: skip


def _trial(module: nn.Module, edit: ModuleEdit, network: Network, *, axis: int) -> Callable[[], str | None]:
    """Runs the resized module on a random input; None when it gives the planned channels, along `axis`."""
    node = _call_of(edit.path, network)
    assert edit.channels is not None
    into, out = edit.channels
    like = next(iter(module.parameters()), torch.zeros(()))

    def argument(arg: Any) -> Any:
        value = arg.meta["value"] if isinstance(arg, fx.Node) else arg
        if not isinstance(value, Tensor):
            return value
        shape = list(value.shape)
        if value.ndim > 1:
            shape[axis] = into
        return torch.randn(shape, dtype=like.dtype, device=like.device)

    def run() -> str | None:
        with unchanged(module), torch.no_grad(), ConvCalls():
            try:
                result = module(*[argument(a) for a in node.args])
            except Exception as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if not isinstance(result, Tensor) or result.shape[axis] != out:
            return f"gives {tuple(getattr(result, 'shape', ()))}, expected {out} channels"
        return None

    return run


def _call_of(path: str, network: Network) -> fx.Node:
    nodes: Iterable[fx.Node] = itertools.chain(*(mode.graph.nodes for mode in network.modes))
    return next(n for n in nodes if n.op == "call_module" and n.target == path)


def _number_choices(
    module: nn.Module, layer: Layer, edit: ModuleEdit, network: Network
) -> Iterator[list[tuple[nn.Module, str, int]]]:
    """Ways to give plain ints of the old channel numbers their new values, fewest changes first."""
    assert edit.channels is not None
    into, out = edit.channels
    node = _call_of(edit.path, network)
    old_in = layer.in_channels if layer.kernel_shape else node.all_input_nodes[0].meta["value"].shape[1]
    old_out = layer.out_channels if layer.kernel_shape else old_in
    options: list[list[tuple[nn.Module, str, int]]] = []
    for owner in module.modules():
        for name, value in vars(owner).items():
            if type(value) is int and value in (old_in, old_out) and not name.startswith("_"):
                new = {value, into if value == old_in else value, out if value == old_out else value}
                options.append([(owner, name, v) for v in (value, *sorted(new - {value}))])
    if len(options) <= 6:
        choices = itertools.product(*options)
        yield from (
            list(c)
            for c in sorted(choices, key=lambda c: sum(v != o[0][2] for (_, _, v), o in zip(c, options, strict=True)))
        )
