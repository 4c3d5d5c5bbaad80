"""What a network's tensors look like: latent weights, the values that arrive at its layers, feature maps. Numbers only.

Notation: w a latent weight, m the mean of abs(w) over its layer, x a value that arrives at a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.channels import Folded, State, Tiled
from repbnn_cli.errors import UsageError
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.plan import Plan
from repbnn_cli.recognize import CONVOLUTIONS, Layer
from repbnn_cli.rules.yaml_marks import nearest

BINS, REACH = 48, 3.0  # histograms of w/m over [-REACH, REACH]; what lies beyond is in the outermost bins


@dataclass(frozen=True)
class Weights:
    """The kernel of one layer. positive: share of w > 0; zeros: number of w = 0, whose sign is neither; beyond_one:
    share of abs(w) > 1, which a straight-through window does not reach; near_zero: share of abs(w) < m/10, one step
    from flipping; histogram: of w/m."""

    path: str
    role: str
    count: int
    mean_abs: float
    positive: float
    zeros: int
    beyond_one: float
    near_zero: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Activations:
    """What arrives at one layer, over all images and positions. positive: share of x > 0; zeros: share of x = 0;
    within_one: share of abs(x) ≤ 1, through which a straight-through estimator lets the gradient;
    constant: channels whose sign never changes, of `channels`."""

    path: str
    mean: float
    std: float
    positive: float
    zeros: float
    within_one: float
    constant: int
    channels: int


@dataclass(frozen=True)
class FeatureMaps:
    """Some channels of one tensor, for one image. image: (3, H, W) or (1, H, W), to be shown beside them.

    source: source channel → its map (H, W); copies: source channel → its replicas' maps in the Rep network.
    """

    path: str
    image: Tensor
    source: Mapping[int, Tensor]
    copies: Mapping[int, tuple[Tensor, ...]]


@torch.no_grad()
def weights(module: nn.Module, layers: Mapping[str, Layer]) -> tuple[Weights, ...]:
    """Of every convolution and linear layer that holds its kernel itself, in order of the network."""
    found = []
    for path, layer in layers.items():
        if layer.role in CONVOLUTIONS and layer.kernel:
            kernel = getattr(fetch(module, path), layer.kernel, None)
            if isinstance(kernel, Tensor) and kernel.numel() and not kernel.is_meta:
                found.append(_weights(path, layer.role, kernel.detach().float().flatten()))
    return tuple(found)


def _weights(path: str, role: str, w: Tensor) -> Weights:
    size = w.abs()
    m = size.mean().item()
    units = (w / m if m else w).clamp(-REACH, REACH)
    return Weights(
        path,
        role,
        w.numel(),
        m,
        (w > 0).float().mean().item(),
        int((w == 0).sum()),
        (size > 1).float().mean().item(),
        (size < m / 10).float().mean().item(),
        tuple(int(n) for n in torch.histc(units, BINS, -REACH, REACH)),
    )


@torch.no_grad()
def activations(module: nn.Module, layers: Mapping[str, Layer], *inputs: Tensor) -> tuple[Activations, ...]:
    """Of the input of every binary convolution and linear layer, at its first call; inputs: of the network."""
    seen: dict[str, Activations] = {}

    def look(path: str, x: Any) -> None:
        if path not in seen and isinstance(x, Tensor) and x.ndim >= 2 and x.numel():
            seen[path] = _activations(path, x.detach().float(), -1 if layers[path].last_axis else 1)

    with _watching(module, [p for p, layer in layers.items() if layer.binary], look):
        module(*inputs)
    return tuple(seen.values())


def _activations(path: str, x: Tensor, axis: int) -> Activations:
    channels = x.movedim(axis, 0).flatten(1)  # (C, N·positions)
    positive = channels > 0
    same = positive.all(1) | ~positive.any(1)
    return Activations(
        path,
        x.mean().item(),
        x.std(correction=0).item(),
        positive.float().mean().item(),
        (x == 0).float().mean().item(),
        (x.abs() <= 1).float().mean().item(),
        int(same.sum()),
        len(channels),
    )


@contextmanager
def _watching(module: nn.Module, paths: list[str], look: Any) -> Iterator[None]:
    """Calls look(path, first input) whenever one of the modules is called."""
    hooks = []
    try:
        for path in paths:
            watched = fetch(module, path)
            hooks.append(watched.register_forward_pre_hook(lambda _, args, path=path: look(path, args[0])))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def feature_maps(
    plan: Plan, rep: fx.GraphModule, images: Tensor, path: str | None = None, *, channels: int = 6
) -> tuple[FeatureMaps, ...]:
    """Maps of one layer before and after, one value per image; the layer's BatchNorm included, where one follows.

    path: a module of the source network; without it the first expanded layer of the backbone.
    Raises UsageError for a path that is no layer with feature maps of its own.
    """
    node, step = _tensor_at(plan, path)
    before = _output(plan.network.module, node, images)
    after = _output(rep, next(n for n in rep.graph.nodes if n.name == step.node), images)
    if isinstance(step.state, Folded):  # each replica as a sample of its own
        after = after.reshape(len(images), -1, *after.shape[2:])
    index = _sources(step.state, before.shape[1], after.shape[1])
    chosen = range(min(channels, before.shape[1]))
    where = {c: [j for j, source in enumerate(index) if source == c] for c in chosen}
    return tuple(
        FeatureMaps(
            str(node.target),
            image,
            {c: before[n, c] for c in chosen},
            {c: tuple(after[n, j] for j in where[c]) for c in chosen},
        )
        for n, image in enumerate(images)
    )


def _tensor_at(plan: Plan, path: str | None) -> tuple[fx.Node, Any]:
    """The node whose output is shown: of a convolution the BatchNorm behind it, so that both sides are comparable."""
    called = {str(n.target): n for n in reversed(plan.network.graph.nodes) if n.op == "call_module"}
    if path is None:
        parts = [e.path for e in plan.edits if e.part == "backbone" and e.action == "rep_conv" and e.path in called]
        path = parts[0] if parts else next((e.path for e in plan.edits if e.path in called), None)
        if path is None:
            raise UsageError("--images: nothing was transformed (β = 1), so there are no feature maps to compare")
    if path not in called:
        raise UsageError(f"--layer {path}: is no module that the network calls{nearest(path, list(called))}")
    node = called[path]
    users = list(node.users)
    if len(users) == 1 and users[0].op == "call_module" and plan.layers[str(users[0].target)].role == "batch_norm":
        node = users[0]
    step = plan.steps.get(node.name)
    value = node.meta["value"]
    if step is None or not isinstance(value, Tensor) or value.ndim != 4:
        raise UsageError(f"--layer {path}: has no feature maps (N, C, H, W) on both sides; name a convolution")
    return node, step


def _sources(state: State, before: int, after: int) -> tuple[int, ...]:
    """The source channel that each channel of a tensor of the Rep network stands for."""
    if isinstance(state, Tiled):
        return state.index
    return tuple(j % before for j in range(after))


class _FoundError(Exception):
    """Ends a forward as soon as the tensor that was asked for is there."""


def _output(module: fx.GraphModule, node: fx.Node, images: Tensor) -> Tensor:
    """The output of the first call of a module; what comes after it does not run."""
    if node.op != "call_module":
        raise UsageError(f"--layer {node.meta.get('path', node.name)}: is a function in the Rep network; name a module")
    values: list[Tensor] = []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        values.append(output)
        raise _FoundError

    hook = fetch(module, str(node.target)).register_forward_hook(keep)
    try:
        module(images)
    except _FoundError:
        pass
    finally:
        hook.remove()
    return values[0].detach().float()
