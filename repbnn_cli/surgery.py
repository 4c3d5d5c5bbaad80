"""Turns a captured network into its RepBNN: `plan` says what will happen, `apply` does it on a copy.

RepTran, RepBNN (arXiv 2207.09049), section 4; which rule says what is in rules/*.yaml, nowhere here.
"""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.binary_conv import BinaryConv2d, RBNNConv2d
from repbnn_cli.channels import operator_name
from repbnn_cli.cpu_only import running
from repbnn_cli.errors import SurgeryError
from repbnn_cli.functional import ConvolutionCall
from repbnn_cli.graph import KeptGraphModule, Network, bare
from repbnn_cli.hints import frozen, hints
from repbnn_cli.inherit import Columns, Kernel, Mean, Recipe, Tile
from repbnn_cli.plan import ModuleEdit, Plan, Step
from repbnn_cli.positions import ends, holds_tensor, other_layers, positions
from repbnn_cli.probe import ConvCalls
from repbnn_cli.recognize import Layer, recognize, type_names
from repbnn_cli.rep_layers import REP_BATCH_NORMS, RepLayerNorm, make_rep
from repbnn_cli.restoring import unchanged
from repbnn_cli.rewrite import Rewriter
from repbnn_cli.rules import RuleSet, Subject
from repbnn_cli.static import static_nodes
from repbnn_cli.tied import assign
from repbnn_cli.tracer import fetch
from repbnn_cli.walk import subject_of


def plan(network: Network, rules: RuleSet) -> Plan:
    """What `rules` make of `network`, as values; changes nothing.

    Raises RulesError (a rule matches nothing, or two claim one module), UsageError (β does not divide a layer),
    SurgeryError (an operator or module that cannot carry expanded channels), each naming the place.
    """
    with running(network.module):
        return _plan(network, rules)


def _plan(network: Network, rules: RuleSet) -> Plan:
    layers = recognize(network, rules.declare)
    trained = network.in_training
    if rules.options.beta == 1:  # the identity: nothing is repeated, so nothing is touched
        same = _identity(trained, layers, rules) if trained else None
        return replace(_identity(network, layers, rules), in_training=same)
    walk, *others = _walks(network, layers, rules)
    edits, added, notes, in_training = walk.edits, walk.added, walk.notes, None
    if trained is not None:
        (other,) = others
        edits, added = _merged(edits, other.edits), {**added, **other.added}
        notes += [f"in training mode, {note}" for note in other.notes if note not in notes]
        in_training = Plan(trained, layers, rules, other.graph, tuple(edits.values()), added, other.steps)
    if not edits:
        raise SurgeryError(
            "the rules change nothing: no first layer was found whose output is repeated; "
            f"check the rule with `apply: repeat_output` in {rules.source}"
        )
    notes += frozen(network, [edit.path for edit in edits.values() if edit.action == "rep_conv"])
    notes += hints(network, layers)
    return Plan(network, layers, rules, walk.graph, tuple(edits.values()), added, walk.steps, notes, in_training)


def _identity(network: Network, layers: dict[str, Layer], rules: RuleSet) -> Plan:
    steps = {n.name: Step(n.name, None) for n in network.graph.nodes if n.op != "output"}
    return Plan(network, layers, rules, copy.deepcopy(network.graph), (), {}, steps)


def _walks(network: Network, layers: dict[str, Layer], rules: RuleSet, apart: Collection[str] = ()) -> list[Rewriter]:
    """A walk over each of the network's graphs: of eval mode, of training mode where that is another one."""
    found = _agreed([subjects(n, layers) for n in network.modes])
    options, taken = rules.options, set[str]()
    walks: list[Rewriter] = []
    for one, own in zip(network.modes, found, strict=True):
        assigned = rules.assign(own, [subject for other in found if other is not own for subject in other])
        walk = Rewriter(
            one, layers, assigned, beta=options.beta, inherit=options.inherit, last_layer=options.last_layer,
            taken=taken, apart=apart,
        )  # fmt: skip
        walk.run()
        taken |= set(walk.added)
        walks.append(walk)
    repeats = [{path: edit.repeats for path, edit in walk.edits.items()} for walk in walks]
    unlike = {path for path, n in repeats[0].items() if repeats[-1].get(path, n) != n}
    return _walks(network, layers, rules, unlike) if unlike - set(apart) else walks


def _agreed(found: list[list[Subject]]) -> list[list[Subject]]:
    """What is last in one mode alone (features in the one, logits in the other) is not the last layer."""
    elsewhere = [{s.path: s.position for s in other} for other in reversed(found)]
    return [
        [replace(s, position=other[s.path]) if s.position == "last" and other.get(s.path) else s for s in own]
        for own, other in zip(found, elsewhere, strict=True)
    ]


def _merged(edits: dict[str, ModuleEdit], others: dict[str, ModuleEdit]) -> dict[str, ModuleEdit]:
    """The edits of both modes. Raises SurgeryError where one module would be made two things."""
    for path, other in others.items():
        edit = edits.get(path, other)
        same = replace(other, part=edit.part, rule=edit.rule, where=edit.where)
        if same != edit:
            raise SurgeryError(
                f"{path}: carries other channels in training mode ({other.action}, {other.after}) than in eval mode "
                f"({edit.action}, {edit.after}); give each mode a module of its own"
            )
    return {**others, **edits}


def subjects(network: Network, layers: dict[str, Layer]) -> list[Subject]:
    """Everything a rule can match: modules, operators without parameters, parameters that a forward uses directly."""
    others = other_layers(network, layers)
    last = ends(network, layers, others)
    position = positions(network, layers, others) | {str(n.target): "last" for n in last if n.op == "call_module"}
    found = []
    for path, layer in layers.items():
        names = type_names(fetch(network.module, path))
        found.append(Subject(path, names, layer.role, position.get(path, "")))
    held = {n for n, _ in (*network.module.named_parameters(), *network.module.named_buffers())}
    static = static_nodes(network.graph)
    for node in network.graph.nodes:
        if node.op in ("call_function", "call_method") and node not in static and holds_tensor(node.meta["value"]):
            role, at = ("unknown", "last") if node in last else ("weightless", "")
            found.append(Subject(subject_of(node), (operator_name(node),), role, at))
        elif node.op == "get_attr" and node.target in held:
            found.append(Subject(subject_of(node), ("Parameter",), "per_channel", ""))
    return found


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
        return _apply(plan, state, _Start(plan, fresh or {}, seed) if state is None else None)


def _apply(plan: Plan, state: Mapping[str, Tensor] | None, start: _Start | None) -> KeptGraphModule:
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
                        f"{path}: its {name} is computed by a hook before each forward (weight_norm, spectral_norm, "
                        "pruning), and such a module cannot be copied; make it permanent in the trained network "
                        "(torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove) and save that"
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
    start: _Start | None,
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
    _set_known_numbers(module, edit)
    if not type(module).__module__.startswith(("torch.nn.modules.", "repbnn_cli.")):
        _fit_numbers(module, edit, layer, plan.network)
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
    start: _Start | None,
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


def _set_known_numbers(module: nn.Module, edit: ModuleEdit) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that a foreign module keeps beside its tensors


def _fit_numbers(module: nn.Module, edit: ModuleEdit, layer: Layer, network: Network) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# `--inherit none`


class _Start:
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
