"""Runs a module of a captured graph on random numbers, to see what it does with them; leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli import seeds
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.restoring import unchanged


def random_like(arguments: Iterable[Any], device: torch.device | str = "cpu") -> list[Any]:
    """Arguments of a call with random numbers, all different, for the tensors among them."""
    generator = torch.Generator(device=device).manual_seed(0)
    values = [a.meta["value"] if isinstance(a, fx.Node) else a for a in arguments]
    return [
        torch.randn(v.shape, generator=generator, device=device).to(v.dtype) if isinstance(v, Tensor) else v
        for v in values
    ]


def first_tensor(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def is_read(module: nn.Module, path: str, inputs: list[Any]) -> bool:
    """Whether a forward, in training or in eval mode, asks its module for a tensor."""
    owner_path, _, name = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    original, read = nn.Module.__getattr__, False

    def lookup(asked: nn.Module, attribute: str) -> Any:
        nonlocal read
        read = read or (asked is owner and attribute == name)
        return original(asked, attribute)

    nn.Module.__getattr__ = lookup  # type: ignore[method-assign]
    try:
        for training in (True, False):
            with unchanged(module), torch.no_grad():
                module.train(training)(*inputs)
    except Exception:  # somebody else's code on random numbers
        return True
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
    return read


def mixes_channels(node: fx.Node, module: nn.Module, like: Tensor, axis: int = 1) -> bool:
    """Whether a result's channels, along `axis`, change when others of the input do."""
    x, *others = random_like(node.args, like.device)
    half = x.shape[axis] // 2
    changed = x.clone()
    changed.narrow(axis, 0, half).mul_(0.5).sub_(0.1)
    results = []
    for given in (x.clone(), changed):
        with unchanged(module), torch.no_grad():
            seeds.seed(0)
            result = first_tensor(module(given, *others))
            results.append(result.narrow(axis, half, result.shape[axis] - half))
    return not _alike(*results)


def comes_last(node: fx.Node, module: nn.Module, axes: Mapping[str, int]) -> bool:
    """Whether a module with numbers for channels (tensor → axis) has them along the last axis of more than two."""
    x = node.all_input_nodes[0].meta["value"]
    sizes = {fetch(module, name).shape[axis] for name, axis in axes.items()}
    if not isinstance(x, Tensor) or x.ndim < 3 or sizes != {x.shape[-1]}:
        return False
    # As many channels as positions: the numbers belong to the axis whose order they follow.
    return x.shape[1] != x.shape[-1] or (
        not _follows(node, module, axes, 1) and _follows(node, module, axes, x.ndim - 1)
    )


def _follows(node: fx.Node, module: nn.Module, axes: Mapping[str, int], axis: int) -> bool:
    """Whether a result follows when its input and the module's tensors (name → axis) are put into another order.

    axis: of input and result, along which the order changes.
    """
    x, *others = random_like(node.args, next(iter(module.parameters()), torch.zeros(())).device)

    def run(given: Tensor, *, rolled: bool) -> Tensor:
        with unchanged(module), torch.no_grad():
            for name, at in axes.items() if rolled else ():
                tensor = fetch(module, name)
                tensor.data = tensor.data.roll(1, at)
            seeds.seed(0)
            return first_tensor(module(given, *others))

    return torch.allclose(run(x.roll(1, axis), rolled=True), run(x, rolled=False).roll(1, axis), rtol=1e-5, atol=1e-6)


def module_acts_per_sample(node: fx.Node, module: nn.Module, like: Tensor) -> bool:
    """In training as in eval mode."""

    def call(training: bool) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            with unchanged(module):
                return module.train(training)(*inputs)

        return run

    inputs = random_like(node.args, like.device)
    return all(acts_per_sample(call(training), inputs) for training in (True, False))


def commutes(call: Callable[..., Any], inputs: list[Any]) -> bool:
    """Whether call(x[:, i]) == call(x)[:, i]: for every selection i of channels: each alone, and all alike."""
    tensors = [v for v in inputs if isinstance(v, Tensor)]
    if not tensors or any(t.ndim < 2 or t.shape[1] != tensors[0].shape[1] for t in tensors):
        return False
    channels = tensors[0].shape[1]
    index = torch.cat([torch.arange(channels), torch.arange(channels).flip(0)])
    with torch.no_grad():
        full = call(*inputs)
        if not isinstance(full, Tensor) or full.ndim < 2 or full.shape[1] != channels:
            return False
        picked = call(*[v[:, index] if isinstance(v, Tensor) else v for v in inputs])
    return _alike(picked, full[:, index])


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equal, and not undefined throughout: log1p of random numbers is NaN here and there."""
    if one.shape != other.shape or not one.isfinite().any():
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def acts_per_sample(call: Callable[..., Any], inputs: list[Any], axis: int = 0) -> bool:
    """Whether call treats every sample alone: then replicas can be given to it as samples.

    axis: along which the samples lie in the inputs; in the outputs along the first.
    """
    others = [v * 0.5 if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs]
    with torch.no_grad():
        one, other = call(*inputs), call(*others)
        pairs = zip(inputs, others, strict=True)
        both = call(*[torch.cat([v, w], axis) if isinstance(v, Tensor) else v for v, w in pairs])
    if isinstance(both, tuple | list):
        return bool(both) and len(one) == len(both) and all(map(_is_one_after_other, both, one, other))
    return _is_one_after_other(both, one, other)


def _is_one_after_other(both: Any, one: Any, other: Any) -> bool:
    if not all(isinstance(v, Tensor) and v.ndim > 0 for v in (both, one, other)):
        return False
    wanted = torch.cat([one, other])
    same = both.shape == wanted.shape and torch.allclose(both, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
    return same and bool(wanted.isfinite().any())
