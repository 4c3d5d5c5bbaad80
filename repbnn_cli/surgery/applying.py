"""`apply`: carries a plan out on a copy of the network; the captured one keeps its tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repbnn_cli.binary_conv import BinaryConv2d, RBNNConv2d
from repbnn_cli.checkpoint.tied import assign
from repbnn_cli.errors import SurgeryError
from repbnn_cli.graph import KeptGraphModule, bare
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.plan import ModuleEdit, Plan
from repbnn_cli.rep_layers import REP_BATCH_NORMS, RepLayerNorm, make_rep
from repbnn_cli.surgery.fresh import Start
from repbnn_cli.surgery.module_numbers import fit_numbers, set_known_numbers
from repbnn_cli.user_code.cpu_only import running


def apply(
    plan: Plan, state: Mapping[str, Tensor] | None = None, *, fresh: Mapping[str, Tensor] | None = None, seed: int = 0
) -> KeptGraphModule:
    """The Rep network, as a new module; the captured one keeps its tensors.

    dtype, device, mode and requires_grad of everything are those of the source. Tied parameters stay tied where they
    become the same tensor. state: take all tensors from this state dict of a Rep network instead of inheriting them.
    fresh: for `inherit: none`, the tensors of a newly built source network by name; where not given, the plan's own
    network is taken to be new. seed: of what is drawn from them.
    """
    with running(plan.network.module):
        return _apply(plan, state, Start(plan, fresh or {}, seed) if state is None else None)


def _apply(plan: Plan, state: Mapping[str, Tensor] | None, start: Start | None) -> KeptGraphModule:
    source = plan.network.module
    edited = {id(fetch(source, e.tensor_path(name))) for e in plan.edits for name, _ in e.tensors}
    # Kernels are most of the memory: those that are replaced are not copied first.
    memo = {id(t): t for t in (*source.parameters(), *source.buffers()) if id(t) in edited}
    tree = bare(source, lambda held: _copied(source, held, memo))
    made: dict[tuple[int, Any], Tensor] = {}
    for edit in plan.edits:
        _carry_out(tree, edit, plan, made, state, start)
    _part_from_source(tree, edited)
    if start is not None:
        start.renew(tree)
    for path, module in plan.added.items():
        parent, _, name = path.rpartition(".")
        helper = copy.deepcopy(module).to(next(iter(tree.parameters()), torch.zeros(())).device)
        fetch(tree, parent).add_module(name, helper)
        helper.train(source.training)
    in_training = copy.deepcopy(plan.in_training.graph) if plan.in_training else None
    result = KeptGraphModule(tree, copy.deepcopy(plan.graph), f"Rep{type(source).__name__}", in_training, source.frozen)
    result.graph.lint()
    if state is not None:
        assign(result, state)
    return result


def _copied(source: nn.Module, held: Any, memo: dict[int, Any]) -> Any:
    """A copy of what the source holds."""
    try:
        return copy.deepcopy(held, memo)
    except Exception as error:
        for path, module in source.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    raise SurgeryError(
                        f"{path}: its {name} is computed before each forward (weight_norm, spectral_norm, pruning, a "
                        "hook), and this module cannot be copied; make it permanent in the trained network "
                        "(torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove), save that, and build "
                        "the network without it"
                    ) from error
        kinds = (
            {type(m).__name__ for m in held.values() if isinstance(m, nn.Module)} if isinstance(held, dict) else set()
        )
        raise SurgeryError(
            f"the network cannot be copied: copy.deepcopy raises {type(error).__name__}: {error} in one of "
            f"{', '.join(sorted(kinds)) or 'its modules'}; give the class that fails a `__deepcopy__`, or a "
            "`__getattr__` that raises AttributeError for what it does not have"
        ) from error


def _part_from_source(tree: nn.Module, edited: set[int]) -> None:
    """Copies tensors that were replaced in one module and are tied to another one that keeps them."""
    copies: dict[int, Tensor] = {}
    for module in tree.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) in edited:
                    held[name] = copies.setdefault(id(tensor), copy.deepcopy(tensor))  # type: ignore[assignment]


def _carry_out(
    tree: nn.Module,
    edit: ModuleEdit,
    plan: Plan,
    made: dict[tuple[int, Any], Tensor],
    state: Mapping[str, Tensor] | None,
    start: Start | None,
) -> None:
    if edit.action in ("per_replica", "repeat_output", "first_replica"):
        return
    if edit.action == "parameter":
        _set_tensors(fetch(tree, edit.path.rpartition(".")[0]), edit, made, state, start)
        return
    module = fetch(tree, edit.path)
    layer = plan.layers[edit.path]
    assert edit.channels is not None
    if isinstance(module, BinaryConv2d):
        module.resize(*edit.channels)
    _set_tensors(module, edit, made, state, start)
    set_known_numbers(module, edit)
    if not type(module).__module__.startswith(("torch.nn.modules.", "repbnn_cli.")):
        fit_numbers(module, edit, layer, plan.network)
    if isinstance(module, RBNNConv2d) and state is None:
        module.rotate_()  # R1 and R2 have other sizes now
    if edit.action == "rep_conv":
        make_rep(module, plan.beta, edit.repeats, binary=layer.binary, groups=layer.groups)
    elif edit.action == "rep_batch_norm":
        module.__class__ = REP_BATCH_NORMS[type(module)]
        module.beta, module.repeats = plan.beta, edit.repeats
    elif type(module) is nn.LayerNorm:
        module.__class__ = RepLayerNorm
        module.rep_beta = plan.beta  # type: ignore[assignment]


def _set_tensors(
    module: nn.Module, edit: ModuleEdit, made: dict[tuple[int, Any], Tensor], state: Mapping[str, Tensor] | None,
    start: Start | None,
) -> None:  # fmt: skip
    for name, recipe in edit.tensors:
        owner_path, _, leaf = name.rpartition(".")
        owner = fetch(module, owner_path)
        old: Tensor = getattr(owner, leaf)
        key = (id(old), recipe)
        if key not in made:
            stored = state.get(edit.tensor_path(name)) if state is not None else None
            expected = recipe.result_shape(old.shape)
            if stored is not None and tuple(stored.shape) != expected:
                raise RuntimeError(f"{edit.tensor_path(name)} is {tuple(stored.shape)}, expected {expected}")
            with torch.no_grad():
                if stored is not None:
                    value = stored
                elif edit.reset and start is not None:
                    value = start.value(edit, name, recipe, old.detach(), module)
                else:
                    value = recipe(old.detach()).contiguous()
            made[key] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        kind = owner._parameters if leaf in owner._parameters else owner._buffers
        kind[leaf] = made[key]
