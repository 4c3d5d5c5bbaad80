"""Capture of a network as a torch.fx graph that computes, and learns, exactly what the network does.

`torch.fx.symbolic_trace` loses what binary networks depend on: a custom `autograd.Function` is inlined and its
straight-through gradient is gone, in-place arithmetic becomes out-of-place, `x.data = v` vanishes, a branch on
a shape raises. The tracer here keeps all of these:

* every proxy carries the value that the example input gives it, so shape arithmetic and control flow just run;
  a decision taken on a *tensor's* value is frozen and listed in `Network.notes`;
* `autograd.Function.apply`, item assignment, in-place operators and `x.data = v` are recorded as nodes;
* modules with parameters of their own stay whole (`is_leaf`), so their code runs untouched, in train and eval;
* the module tree is kept as it is, called or not: names, buffers and tied parameters survive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from repbnn_cli.errors import CaptureError
from repbnn_cli.graph.functional import ConvolutionCall, as_modules
from repbnn_cli.graph.kept import TAKEN, KeptGraphModule
from repbnn_cli.graph.recording import LeafOpinion, Recording, is_leaf
from repbnn_cli.graph.tracing import Traced
from repbnn_cli.restoring import kept_in_eval
from repbnn_cli.user_code.cpu_only import foreign_code


@dataclass
class Network:
    """A captured network.

    module: runs the graph; shares parameters and leaf modules with the network it was captured from.
        Every node carries `meta["value"]` (the example's value, tensors on the meta device),
        `meta["where"]` ("file.py:12") and `meta["path"]` (dotted path of the module whose forward made it).
    example: the input shapes of the capture, batch included.
    notes: decisions that the example froze, in the user's terms.
    attempts: how the capture was tried, in this order, each with what came of it.
    in_training: the same modules and tensors with the graph of training mode, where a branch on `self.training` makes
        it another one; `module` runs the graph of the mode that it is in.
    """

    module: KeptGraphModule
    example: tuple[tuple[int, ...], ...]
    notes: list[str] = field(default_factory=list)
    attempts: tuple[str, ...] = ()
    in_training: Network | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def modes(self) -> tuple[Network, ...]:
        """The network with each of its graphs: this one, and that of training mode where there is one."""
        return (self,) if self.in_training is None else (self, self.in_training)

    @property
    def batch(self) -> int:
        return self.example[0][0]


def capture(
    model: nn.Module,
    input_shape: Sequence[int] | Sequence[Sequence[int]],
    *,
    leaf: LeafOpinion | None = None,
    batch: int = 2,
    shapes_only: bool = False,
) -> Network:
    """Capture `model` as a graph; the model itself is left exactly as it was.

    input_shape: one input without its batch dimension, e.g. (3, 32, 32), or a sequence of such shapes.
    leaf: overrides `is_leaf` for a path and module (True, False, or None for no opinion).
    shapes_only: convolutions of torch's and of this package give zeros of the right shape instead of running; their
        weights are never read (and may be unallocated memory).
    Raises CaptureError naming file, line and construct.
    """
    if taken := sorted(_own_names(model) & TAKEN):
        raise CaptureError(
            f"self.{taken[0]} of {type(model).__name__}: torch.fx's GraphModule has an attribute of that name itself; "
            f"give this one another, in the code and in the checkpoint's names ({taken[0]}. at their beginning)"
        )
    shapes = _as_shapes(input_shape)
    examples = tuple(random_inputs(model, [(batch, *s) for s in shapes], seed=0))

    recording = Recording(model, examples, leaf, shapes_only)
    with contextlib.nullcontext() if shapes_only else foreign_code():
        traced = recording.looked_into(recording.recorded())
    module = assemble(model, traced)
    notes = [*traced.tracer.notes, *(f"{path} cannot be traced into and is kept whole" for path in recording.whole)]
    shapes = tuple(tuple(e.shape) for e in examples)
    in_training = None
    if traced.in_training is not None and module.in_training is not None:
        notes += [note for note in traced.in_training.tracer.notes if note not in notes]
        in_training = Network(module.in_training, shapes)
    return Network(module, shapes, notes, tuple(recording.attempts), in_training)


def random_inputs(model: nn.Module, shapes: Iterable[Sequence[int]], *, seed: int) -> list[Tensor]:
    """Normal numbers of these shapes, in the dtype and on the device of the first parameter that holds real numbers."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return [torch.randn(tuple(s), generator=generator, dtype=like.dtype, device=like.device) for s in shapes]


def assemble(model: nn.Module, traced: Traced) -> KeptGraphModule:
    """A GraphModule over the model's whole module tree: same names in the same order, called or not."""
    both = [traced, *filter(None, [traced.in_training])]
    called = {path for t in both for path in t.tracer.leaf_paths}
    entered = {path for t in both for path in t.tracer.entered_paths}
    tree = _skeleton(model, "", called, entered)
    calls: dict[str, ConvolutionCall] = {}
    for one in both:
        as_modules(one.graph, calls)
        constants = _own_constants(one) if one is traced.in_training else one.constants
        for name, value in constants.items():
            tree.register_buffer(name, value, persistent=False)
    for path, module in calls.items():  # without tensors
        owner, _, name = path.rpartition(".")
        tree.get_submodule(owner).add_module(name, module)
    in_training = traced.in_training.graph if traced.in_training else None
    off = (traced.in_training or traced).tracer.put_to_eval
    frozen = (*kept_in_eval(model), *(path for path, module in model.named_modules() if path and module in off))
    return KeptGraphModule(tree, traced.graph, type(model).__name__, in_training, frozen)


def _own_constants(traced: Traced) -> dict[str, Tensor]:
    """The constants of the second of two graphs, under names that the first one's do not have."""
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node.target in traced.constants:
            node.target = f"{node.target}_in_training"
    return {f"{name}_in_training": value for name, value in traced.constants.items()}


def _own_names(module: nn.Module) -> set[str]:
    """What a module's own parts and tensors are called."""
    return {*module._modules, *module._parameters, *module._buffers}


def _skeleton(module: nn.Module, path: str, called: Set[str], entered: Set[str]) -> nn.Module:
    """The module tree without the code of the modules that were traced into; those that are called stay as they are."""
    bare = nn.Module()
    bare.training = module.training
    bare.__dict__["_parameters"] = dict(module._parameters)
    bare.__dict__["_buffers"] = {n: b for n, b in module._buffers.items() if not n.startswith("_tensor_constant")}
    bare.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    for name, value in vars(module).items():  # tensors that the forward reads without having registered them
        if isinstance(value, Tensor) and not name.startswith("_tensor_constant"):
            bare.register_buffer(name, value, persistent=False)
    for name, child in module._modules.items():
        below = f"{path}.{name}" if path else name
        never_called = below not in called and below not in entered
        if child is None or below in called or (never_called and is_leaf(child)):
            bare._modules[name] = child
        else:
            bare._modules[name] = _skeleton(child, below, called, entered)
    return bare


def _as_shapes(shape: Sequence[int] | Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    shapes = [s if isinstance(s, Sequence) else None for s in shape]
    return tuple(tuple(s) for s in shape) if any(shapes) else (tuple(int(n) for n in shape),)  # type: ignore
