"""State dicts given to a network by assignment, without untying what it shares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter


def assign(module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """`load_state_dict(assign=True)`, which gives every name a Parameter of its own: names that shared one share one
    again, where they were given the same values. Raises RuntimeError as that does."""
    names: dict[Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    module.load_state_dict(dict(tensors), strict=strict, assign=True)
    for first, *others in names.values():
        kept = module.get_parameter(first)
        for name in others:
            own = module.get_parameter(name)
            alike = (own.shape, own.dtype, own.device) == (kept.shape, kept.dtype, kept.device) and not own.is_meta
            if alike and torch.equal(own, kept):
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._parameters[leaf] = kept
