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
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.cpu_only import foreign_code
from repbnn_cli.errors import CaptureError
from repbnn_cli.functional import as_modules
from repbnn_cli.modes import join
from repbnn_cli.tracer import LeafPolicy, Tracer, explain, interceptable, place_of

LeafOpinion = Callable[[str, nn.Module], bool | None]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class Network:
    """A captured network.

    module: runs the graph; shares parameters and leaf modules with the network it was captured from.
        Every node carries `meta["value"]` (the example's value, tensors on the meta device),
        `meta["where"]` ("file.py:12") and `meta["path"]` (dotted path of the module whose forward made it).
    example: the input shapes of the capture, batch included.
    notes: decisions that the example froze, in the user's terms.
    attempts: how the capture was tried, in this order, each with what came of it.
    """

    module: fx.GraphModule
    example: tuple[tuple[int, ...], ...]
    notes: list[str] = field(default_factory=list)
    attempts: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def batch(self) -> int:
        return self.example[0][0]


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is kept whole: it owns what its forward needs, so tracing inside gains nothing.

    A block that owns one scale beside its children is *not* a leaf: its convolutions would disappear. Nor is a layer
    that owns a kernel beside a BatchNorm or the layers of a gate: each of these is handled as what it is.
    """
    if isinstance(module, (fx.GraphModule, *_CONTAINERS)):
        return False
    if type(module).__module__.startswith("torch.nn."):
        return True
    children = list(module.children())
    if not children:
        return True
    own = list(module.parameters(recurse=False)) + list(module.buffers(recurse=False))
    # A BatchNorm without affine parameters is a layer, too.
    below = any(isinstance(m, nn.modules.batchnorm._BatchNorm) or m._parameters for c in children for m in c.modules())
    if not below:  # owns all parameters itself, or is a parameter-free helper
        return True
    kernels = {t.numel() for t in own if kernel_like(t)}
    return bool(kernels) and not any(_is_layer(m, kernels) for m in module.modules() if m is not module)


def _is_layer(module: nn.Module, kernels: set[int]) -> bool:
    """Whether a child is a layer of its own: a BatchNorm, or a kernel that is no copy of its owner's."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return any(kernel_like(t) and t.numel() not in kernels for t in module.parameters(recurse=False))


def kernel_like(tensor: Tensor) -> bool:
    """A kernel has at least two dimensions larger than one, or is stored flat as (N, 1)."""
    return sum(n > 1 for n in tensor.shape) >= 2 or (tensor.ndim == 2 and tensor.shape[1] == 1 and len(tensor) > 1)


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
    shapes = _as_shapes(input_shape)
    examples = tuple(random_inputs(model, [(batch, *s) for s in shapes], seed=0))

    whole: list[str] = []
    opened: list[str] = []
    attempts: list[str] = []

    def opinion(path: str, module: nn.Module) -> bool | None:
        return leaf(path, module) if leaf else None

    def policy(path: str, module: nn.Module) -> bool:
        told = opinion(path, module)
        return path in whole or (path not in opened and is_leaf(module)) if told is None else told

    def looked_into(traced: _Traced) -> _Traced:
        """The same with modules traced into that are more than one whole layer, as far as they let themselves."""
        nonlocal opened
        opened = [p for p, m in _worth_opening(model, traced.graph).items() if opinion(p, m) is None]
        if not opened:
            return traced
        how = f"recorded, with {', '.join(opened)} traced into, which may be several layers, or one by a product"
        try:
            inside = _in_both_modes(model, examples, policy, shapes_only)
            attempts.append(f"{how}: {len(inside.graph.nodes)} operators")
            calls = [n.meta["path"] for n in inside.graph.nodes if n.meta.get("convs") and n.op == "call_function"]
            layered = [p for p in opened if any(f"{at}.".startswith(f"{p}.") for at in calls)]
            if layered == opened:
                return inside
            opened = layered  # in the others no layer shows, so they had better stay whole
            return _in_both_modes(model, examples, policy, shapes_only) if opened else traced
        except CaptureError as error:
            attempts.append(f"{how}: {error}")
            return traced

    with contextlib.nullcontext() if shapes_only else foreign_code():
        while True:
            how = f"recorded, with {', '.join(whole)} kept whole" if whole else "recorded, every block traced into"
            try:
                traced = _in_both_modes(model, examples, policy, shapes_only)
                break
            except TracingError as error:
                attempts.append(f"{how}: {error}")
                if error.module in whole or not _may_stay_whole(model, error.module):
                    final = _not_its_fault(model, examples, error)
                    for attempt in attempts[:-1] if final is error else ():
                        final.add_note(f"tried before: {attempt}")
                    raise final from error
                whole.append(error.module)
        attempts.append(f"{how}: {len(traced.graph.nodes)} operators")
        traced = looked_into(traced)
    calls = as_modules(traced.graph)
    module = assemble(model, traced, calls)
    notes = [*traced.tracer.notes, *(f"{path} cannot be traced into and is kept whole" for path in whole)]
    return Network(module, tuple(tuple(e.shape) for e in examples), notes, tuple(attempts))


def random_inputs(model: nn.Module, shapes: Iterable[Sequence[int]], *, seed: int) -> list[Tensor]:
    """Normal numbers of these shapes, in the dtype and on the device of the network's first parameter."""
    like = next(iter(model.parameters()), torch.zeros(()))
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return [torch.randn(tuple(s), generator=generator, dtype=like.dtype, device=like.device) for s in shapes]


def _worth_opening(model: nn.Module, graph: fx.Graph) -> dict[str, nn.Module]:
    """Modules kept whole that may be more than one whole layer: blocks that hold the kernels of several layers, which
    were seen to apply kernels of different shapes; and what holds a kernel and was not seen to convolve."""
    found = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module, seen = model.get_submodule(str(node.target)), node.meta.get("convs")
            several = len({(c.kernel_shape, c.groups) for c in seen or []}) > 1
            hidden = seen == [] and any(kernel_like(t) for t in module.parameters())
            if several or hidden:
                found[str(node.target)] = module
    return {p: m for p, m in found.items() if not type(m).__module__.startswith(("torch.nn.", "repbnn_cli."))}


class TracingError(CaptureError):
    """`module`: dotted path of the module in whose forward it happened; "" for the network's own."""

    def __init__(self, text: str, module: str) -> None:
        super().__init__(text)
        self.module = module


def _may_stay_whole(model: nn.Module, path: str) -> bool:
    """Whether a module may be kept whole without being asked for: it hides no convolution."""
    return bool(path) and not any(kernel_like(p) for p in model.get_submodule(path).parameters())


def _not_its_fault(model: nn.Module, examples: tuple[Tensor, ...], error: TracingError) -> CaptureError:
    """The error; where the network does not even run by itself on such inputs, that is the error."""
    if any(p.is_meta for p in model.parameters()):
        return error
    with unchanged(model), torch.no_grad():
        try:
            model(*examples)
        except Exception as own:
            shapes = " and ".join(str(tuple(e.shape)) for e in examples)
            return CaptureError(
                f"{place_of(own)}: the network itself does not run here (torch {torch.__version__}) on an input "
                f"{shapes}: {type(own).__name__}: {' '.join(str(own).split())[:300]}; check --input-size and "
                "--model-args"
            )
    return error


@dataclass(frozen=True)
class _Traced:
    tracer: Tracer
    graph: fx.Graph
    constants: dict[str, Tensor]


def _trace(model: nn.Module, examples: tuple[Tensor, ...], leaf: LeafPolicy, shapes_only: bool = False) -> _Traced:
    tracer = Tracer(examples, leaf, shapes_only=shapes_only)
    with (
        unchanged(model, parameters=not shapes_only),
        torch.no_grad(),
        interceptable(),
        tracer.hidden_training_flags(model),
    ):
        try:
            graph = tracer.trace(model)
        except CaptureError:
            raise
        except Exception as error:
            raise TracingError(explain(error, tracer), tracer.failed_in) from error
        tracer.refuse_assignments(model)
        # fx parks tensors made in forward on the root; `unchanged` takes them off the user's module again.
        constants = {n: v for n, v in vars(model).items() if n.startswith("_tensor_constant")}
        constants |= {n: v for n, v in model._buffers.items() if n.startswith("_tensor_constant") and v is not None}
    return _Traced(tracer, graph, constants)


def _in_both_modes(model: nn.Module, examples: tuple[Tensor, ...], policy: LeafPolicy, shapes_only: bool) -> _Traced:
    traced = _trace(model, examples, policy, shapes_only)
    if shapes_only and (traced.tracer.notes or traced.tracer.convolution_calls):
        # it decides on values, or what it applies has to be looked at; zeros are not the network's
        traced = _trace(model, examples, policy)
    return _for_both_modes(model, examples, policy, traced) if traced.tracer.mode_branches else traced


def _for_both_modes(model: nn.Module, examples: tuple[Tensor, ...], leaf: LeafPolicy, traced: _Traced) -> _Traced:
    """A graph holds one branch of `if self.training`; right when the other one gives the same graph, or only writes."""
    training = model.training
    with unchanged(model):
        model.train(not training)
        other = _trace(model, examples, leaf)
    if str(other.graph) == str(traced.graph) or join(traced.graph, other.graph, training=training):
        return traced
    if join(other.graph, traced.graph, training=not training):
        return other
    raise CaptureError(
        f"{traced.tracer.mode_branches[0]}: the branch on `self.training` does different things in train and eval "
        "mode, and a graph holds only one; move it into a module of its own, or keep the enclosing module whole "
        "(rule file: `modules: [{match: {type: ITS_CLASS}, leaf: true}]`)"
    )


def assemble(model: nn.Module, traced: _Traced, added: Mapping[str, nn.Module]) -> fx.GraphModule:
    """A GraphModule over the model's whole module tree: same names in the same order, called or not.

    added: path → module without tensors that the graph calls besides.
    """
    tree = _skeleton(model, "", traced.tracer)
    for path, module in added.items():
        owner, _, name = path.rpartition(".")
        tree.get_submodule(owner).add_module(name, module)
    for name, value in traced.constants.items():
        tree.register_buffer(name, value, persistent=False)
    return KeptGraphModule(tree, traced.graph, class_name=type(model).__name__)


class KeptGraphModule(fx.GraphModule):
    """GraphModule that keeps modules and tensors which its graph does not mention."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        super().__init__(root, graph, class_name=class_name)
        for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[kind] = root.__dict__[kind]
        self.training = root.training

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptGraphModule:
        tree = nn.Module()
        for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
            tree.__dict__[kind] = copy.deepcopy(self.__dict__[kind], memo)
        name = str(self._get_name())  # type: ignore[no-untyped-call]
        copied = KeptGraphModule(tree, copy.deepcopy(self.graph, memo), class_name=name)
        for old, new in zip(self.graph.nodes, copied.graph.nodes, strict=True):
            new.meta = dict(old.meta)
        memo[id(self)] = copied
        return copied


def _skeleton(module: nn.Module, path: str, tracer: Tracer) -> nn.Module:
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
        never_called = below not in tracer.leaf_paths and below not in tracer.entered_paths
        if child is None or below in tracer.leaf_paths or (never_called and is_leaf(child)):
            bare._modules[name] = child
        else:
            bare._modules[name] = _skeleton(child, below, tracer)
    return bare


# ---------------------------------------------------------------------------------------------------------------------
# Leaving the model as it was


@contextlib.contextmanager
def unchanged(model: nn.Module, *, parameters: bool = True) -> Iterator[None]:
    """Restores attributes, tensors, modes and the random state on leaving, whatever a forward did to them.

    parameters: False leaves parameters out, for networks known not to write theirs (a copy of each is kept otherwise).
    """
    attributes = [(m, _attributes(m)) for m in model.modules()]
    tensors = [
        (t, t.data, t.detach().clone())
        for t in (*(model.parameters() if parameters else ()), *model.buffers())
        if not t.is_meta
    ]
    with torch.random.fork_rng(devices=sorted({t.device.index or 0 for t, _, _ in tensors if t.is_cuda})):
        try:
            yield
        finally:
            for module, saved in attributes:
                _restore(module, saved)
            with torch.no_grad():
                for tensor, data, value in tensors:
                    # What was not written to need not be writable: `register_buffer("blur", kernel.expand(...))`.
                    tensor.data = data if torch.equal(data, value) else data.copy_(value)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Name → value, and what it holds where a forward could write into it (`self.history.append(x)`)."""
    return {n: (v, copy.copy(v) if type(v) in (dict, list, set) else None) for n, v in module.__dict__.items()}


def _restore(module: nn.Module, saved: dict[str, tuple[Any, Any]]) -> None:
    for name in set(module.__dict__) - set(saved):
        del module.__dict__[name]
    for name, (value, content) in saved.items():
        module.__dict__[name] = value
        if content is not None:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)


def _as_shapes(shape: Sequence[int] | Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    shapes = [s if isinstance(s, Sequence) else None for s in shape]
    return tuple(tuple(s) for s in shape) if any(shapes) else (tuple(int(n) for n in shape),)  # type: ignore
