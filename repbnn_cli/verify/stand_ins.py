"""The tensors that the source network gets while its Rep network is compared with it, from the Rep network's own.

What several channels share, or what starts afresh, cannot stay the source's: in its place stands what the Rep network
holds there, one entry per source channel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repbnn_cli.graph.static import evaluate, roots, static_nodes
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.inherit import Columns, Kernel, Mean, Tile
from repbnn_cli.plan import ModuleEdit, Plan
from repbnn_cli.recognize import Layer


def stand_ins(plan: Plan, rep: nn.Module) -> dict[str, Tensor]:
    """Path → tensor, for all that is not the source's own; of kernels those that a forward uses directly."""
    recipes = {e.tensor_path(name): (recipe, e.reset) for e in plan.edits for name, recipe in e.tensors}
    module = plan.network.module
    found: dict[str, Tensor] = {}
    for path, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        recipe, reset = recipes.get(path, (None, plan.rules.options.inherit == "none"))
        if isinstance(recipe, Mean) or (reset and isinstance(recipe, Tile)):
            found[path] = per_source_channel(fetch(rep, path).detach(), recipe, tensor.shape[recipe.axis])
        elif reset and recipe is None and fetch(rep, path).shape == tensor.shape:
            found[path] = fetch(rep, path).detach().clone()  # a forward may write to it
    read = {str(node.target) for node in plan.network.graph.nodes if node.op == "get_attr"}
    for edit in plan.edits:
        names = [edit.tensor_path(name) for name, recipe in edit.tensors if isinstance(recipe, Kernel)]
        if read.intersection(names) and _follows(plan, own := filters(edit, rep)):
            found |= own
    return found


def _follows(plan: Plan, kernel: Mapping[str, Tensor]) -> bool:
    """Whether all that a forward computes from a kernel can be computed from this one, of another size."""
    static = static_nodes(plan.network.graph)
    for node in static:
        if not static.issuperset(node.users) and any(str(root.target) in kernel for root in roots(node)):
            try:
                evaluate(plan.network.module, node, kernel)
            except Exception:  # the user's code
                return False
    return True


def filters(edit: ModuleEdit, rep: nn.Module) -> dict[str, Tensor]:
    """Path → the Rep network's kernels with one filter for each source channel, (O, I·β, k...).

    What a layer computes from its kernel beside the convolution, such as XNOR-Net's mean |W| by which it multiplies
    afterwards, is then what the Rep layer computes for the convolution channel that a source channel shares.
    """
    found: dict[str, Tensor] = {}
    for name, recipe in edit.tensors:
        path = edit.tensor_path(name)
        own = fetch(rep, path).detach()
        if isinstance(recipe, Columns):
            found[path] = own.clone()
        elif isinstance(recipe, Kernel):
            kernel = recipe.outputs_first(own).reshape(recipe.new_shape)
            kernel = per_source_channel(kernel, Mean(0, recipe.members), recipe.shape[0])
            found[path] = recipe.outputs_first(kernel).contiguous()
    return found


def per_source_channel(value: Tensor, recipe: Mean | Tile, size: int) -> Tensor:
    """A Rep network's tensor as the source would hold it: `size` entries along the recipe's axis."""
    axis = recipe.axis
    if isinstance(recipe, Tile):
        first = [recipe.index.index(c) for c in range(size)]
        return value.index_select(axis, torch.tensor(first, device=value.device))
    blocks = value.unflatten(axis, (recipe.members.groups, -1))
    return torch.cat([blocks] * (size // value.shape[axis]), axis + 1).flatten(axis, axis + 1)


@contextlib.contextmanager
def counting_replicas(module: nn.Module, layer: Layer, beta: int) -> Iterator[None]:
    """While this lasts, the numbers of inputs that a layer keeps count all replicas, as they must in the Rep layer."""
    names = {"in_channels", "in_features"} | {n for n, m in layer.attributes.items() if m in ("in_channels", "fan_in")}
    kept = {name: value for name, value in vars(module).items() if name in names and isinstance(value, int)}
    vars(module).update({name: value * beta for name, value in kept.items()})
    try:
        yield
    finally:
        vars(module).update(kept)


@contextlib.contextmanager
def holding(root: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While this lasts, `root` has these tensors, by path, in place of its own."""
    replaced: list[tuple[dict[str, Any], str, Tensor | None]] = []
    try:
        for path, tensor in tensors.items():
            owner_path, _, leaf = path.rpartition(".")
            owner: nn.Module = fetch(root, owner_path)
            kinds: tuple[dict[str, Any], ...] = owner._parameters, owner._buffers
            for kind in kinds:
                if leaf in kind:
                    replaced.append((kind, leaf, kind[leaf]))
                    kind[leaf] = nn.Parameter(tensor, False) if kind is owner._parameters else tensor
        yield
    finally:
        for kind, leaf, own in reversed(replaced):
            kind[leaf] = own
