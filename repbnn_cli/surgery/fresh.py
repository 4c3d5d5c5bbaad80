"""`--inherit none`: what the tensors of a Rep network start with when it is to be trained from scratch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from repbnn_cli.inherit import Columns, Kernel, Mean, Recipe, Tile
from repbnn_cli.plan import ModuleEdit, Plan


class Start:
    """The values of a network that is to be trained from scratch, as the source's own code starts its layers.

    A kernel gets the values of the newly built source's kernel, shuffled, divided by √(its fan-in / the source's): what
    the usual initialisations (Kaiming, LeCun, torch's own) give a kernel of its size, whichever the network uses.
    Everything else (scales, shifts, slopes, thresholds) is what the new source has.
    """

    def __init__(self, plan: Plan, fresh: Mapping[str, Tensor], seed: int) -> None:
        self._plan, self._fresh, self._seed = plan, fresh, seed
        self._edited = {e.tensor_path(name) for e in plan.edits for name, _ in e.tensors}

    def value(self, edit: ModuleEdit, name: str, recipe: Recipe, own: Tensor, module: nn.Module) -> Tensor:
        """What one tensor of an edited module, `own` in the source, starts with."""
        new = self._fresh.get(edit.tensor_path(name), own).to(own)
        layer = self._plan.layers.get(edit.path)
        if isinstance(recipe, Kernel):
            growth = recipe.result_fan_in / torch.Size(recipe.shape[1:]).numel()
        elif isinstance(recipe, Columns):
            growth = len(recipe.groups) / new.shape[recipe.axis]
        elif layer is not None and name in (layer.kernel, *layer.same_tensors):
            growth = 1.0
        else:
            return (recipe.first(new) if isinstance(recipe, Mean) else recipe(new)).contiguous()
        # A depthwise filter is shuffled as the source has it, so that its copies start alike, as all replicas do.
        shape = new.shape if isinstance(recipe, Tile) else torch.Size(recipe.result_shape(new.shape))
        random = torch.Generator().manual_seed(zlib.crc32(edit.path.encode(), self._seed))  # equal layers start unlike
        rounds = -(-shape.numel() // new.numel())
        order = torch.cat([torch.randperm(new.numel(), generator=random) for _ in range(rounds)])[: shape.numel()]
        drawn = new.flatten()[order.to(new.device)].reshape(shape)
        if isinstance(recipe, Tile):
            return recipe(drawn).contiguous()
        return drawn / growth**0.5 if getattr(module, "starts_by_fan_in", True) else drawn

    @torch.no_grad()
    def renew(self, tree: nn.Module) -> None:
        """Gives the layers that no rule resizes the new network's values."""
        if self._plan.rules.options.inherit != "none" or self._plan.rules.options.beta == 1:
            return
        for name, tensor in (*tree.named_parameters(), *tree.named_buffers()):
            if name in self._fresh and name not in self._edited and tensor.shape == self._fresh[name].shape:
                tensor.copy_(self._fresh[name])
