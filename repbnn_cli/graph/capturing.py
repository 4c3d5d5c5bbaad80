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
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

from repbnn_cli.errors import CaptureError
from repbnn_cli.graph.functional import ConvolutionCall, as_modules
from repbnn_cli.graph.static import static_nodes
from repbnn_cli.graph.tracer import place_of
from repbnn_cli.graph.tracing import Traced, TracingError, in_both_modes
from repbnn_cli.restoring import kept_in_eval, unchanged
from repbnn_cli.user_code.cpu_only import foreign_code

LeafOpinion = Callable[[str, nn.Module], bool | None]

_OF_A_BLOCK = 3  # parameters beside its kernel: a layer has a scale, perhaps a threshold
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

    def looked_into(traced: Traced) -> Traced:
        """The same with modules traced into that are more than one whole layer, as far as they let themselves."""
        nonlocal opened
        quantisers = _kernel_quantisers(model, traced.graph)
        found = _foreign({**_worth_opening(model, traced.graph), **quantisers})
        opened = [p for p, m in found.items() if opinion(p, m) is None]
        if not opened:
            return traced
        how = f"recorded, with {', '.join(opened)} traced into, which may be more than one whole layer"
        try:
            inside = in_both_modes(model, examples, policy, shapes_only)
            attempts.append(f"{how}: {len(inside.graph.nodes)} operators")
            calls = [n.meta["path"] for n in inside.graph.nodes if n.meta.get("convs") and n.op == "call_function"]
            layered = [p for p in opened if p in quantisers or any(f"{at}.".startswith(f"{p}.") for at in calls)]
            if layered == opened:
                return inside
            opened = layered  # in the others no layer shows, so they had better stay whole
            return in_both_modes(model, examples, policy, shapes_only) if opened else traced
        except CaptureError as error:
            attempts.append(f"{how}: {error}")
            return traced

    with contextlib.nullcontext() if shapes_only else foreign_code():
        while True:
            how = f"recorded, with {', '.join(whole)} kept whole" if whole else "recorded, every block traced into"
            try:
                traced = in_both_modes(model, examples, policy, shapes_only)
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
    module = assemble(model, traced)
    notes = [*traced.tracer.notes, *(f"{path} cannot be traced into and is kept whole" for path in whole)]
    shapes = tuple(tuple(e.shape) for e in examples)
    in_training = None
    if traced.in_training is not None and module.in_training is not None:
        notes += [note for note in traced.in_training.tracer.notes if note not in notes]
        in_training = Network(module.in_training, shapes)
    return Network(module, shapes, notes, tuple(attempts), in_training)


def random_inputs(model: nn.Module, shapes: Iterable[Sequence[int]], *, seed: int) -> list[Tensor]:
    """Normal numbers of these shapes, in the dtype and on the device of the network's first parameter."""
    like = next(iter(model.parameters()), torch.zeros(()))
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return [torch.randn(tuple(s), generator=generator, dtype=like.dtype, device=like.device) for s in shapes]


def _worth_opening(model: nn.Module, graph: fx.Graph) -> dict[str, nn.Module]:
    """Modules kept whole that may be more than one whole layer: blocks that hold the kernels of several layers, which
    were seen to apply kernels of different shapes; blocks of a kernel and of layers with parameters (an RPReLU);
    and what holds a kernel and was not seen to convolve."""
    found = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module, seen = model.get_submodule(str(node.target)), node.meta.get("convs")
            several = len({(c.kernel_shape, c.groups) for c in seen or []}) > 1
            hidden = seen == [] and any(kernel_like(t) for t in module.parameters())
            block = bool(seen) and _is_block(module)
            if several or hidden or block:
                found[str(node.target)] = module
    return found


def _foreign(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of somebody else's code: torch's and this package's own are one layer each."""
    return {p: m for p, m in modules.items() if not type(m).__module__.startswith(("torch.nn.", "repbnn_cli."))}


def _is_block(module: nn.Module) -> bool:
    """Whether what holds a kernel holds more than a layer does: modules with parameters, or many parameters of its own
    (a threshold, a scale, slopes and shifts of an activation)."""
    if any(c._parameters for child in module.children() for c in child.modules()):
        return True
    beside = [t for n, t in module._parameters.items() if t is not None and n != "bias" and t.numel() > 1]
    return sum(not kernel_like(t) for t in beside) >= _OF_A_BLOCK


def _kernel_quantisers(model: nn.Module, graph: fx.Graph) -> dict[str, nn.Module]:
    """Modules that make a kernel of parameters alone, with parameters of their own, perhaps sized by its channels."""
    static = static_nodes(graph)
    called = [str(node.target) for node in graph.nodes if node.op == "call_module" and node in static]
    modules = {path: model.get_submodule(path) for path in called}
    return {p: m for p, m in modules.items() if any(t.numel() > 1 for t in m.parameters())}


def _may_stay_whole(model: nn.Module, path: str) -> bool:
    """Whether a module may be kept whole without being asked for: it hides no convolution."""
    return bool(path) and not any(kernel_like(p) for p in model.get_submodule(path).parameters())


def _not_its_fault(model: nn.Module, examples: tuple[Tensor, ...], error: TracingError) -> CaptureError:
    """The error; where the network does not even run by itself on such inputs, that is the error."""
    if any(p.is_meta for p in model.parameters()):
        return error
    hint = " (of images 3x32x32)" if any(e.ndim < 3 for e in examples) else ""
    for training in (False, True):
        with unchanged(model), torch.no_grad():
            try:
                model.train(training)(*examples)
            except Exception as own:
                shapes = " and ".join(str(tuple(e.shape)) for e in examples)
                return CaptureError(
                    f"{place_of(own)}: the network itself does not run here (torch {torch.__version__}"
                    f"{', in training mode' if training else ''}) on an input {shapes}: {type(own).__name__}: "
                    f"{' '.join(str(own).split())[:300]}; check --input-size{hint} and "
                    "--model-args"
                )
    return error


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


class KeptGraphModule(fx.GraphModule):
    """GraphModule that keeps modules and tensors which its graph does not mention.

    in_training: another graph over the same modules, which the forward follows in training mode; the attribute is a
    module of that graph alone, None without one.
    frozen: paths of modules that stay in eval mode when this one is trained.
    """

    in_training: KeptGraphModule | None
    frozen: tuple[str, ...]

    def __init__(
        self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule", in_training: fx.Graph | None = None,
        frozen: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__(root, graph, class_name=class_name)
        for kind in _TREE:
            self.__dict__[kind] = root.__dict__[kind]
        self.frozen = frozen
        # Beside the module tree: its parts are those of this module.
        self.__dict__["in_training"] = KeptGraphModule(self, in_training, class_name) if in_training else None
        self.recompile()

    def recompile(self) -> PythonCode:
        code = super().recompile()
        other = self.__dict__.get("in_training")
        if other is not None:
            own, in_training = type(self).forward, type(other).forward

            def forward(self: KeptGraphModule, *args: Any) -> Any:
                return (in_training if self.training else own)(self, *args)

            type(self).forward = forward
        return code

    def train(self, mode: bool = True) -> KeptGraphModule:
        super().train(mode)
        for path in self.frozen:
            self.get_submodule(path).training = False
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptGraphModule:
        tree = bare(self, lambda held: copy.deepcopy(held, memo))
        in_training = copied_graph(self.in_training.graph, memo) if self.in_training else None
        copied = KeptGraphModule(tree, copied_graph(self.graph, memo), type(self).__name__, in_training, self.frozen)
        memo[id(self)] = copied
        return copied


_TREE = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


def bare(module: nn.Module, copied: Callable[[Any], Any] = lambda held: held) -> nn.Module:
    """A module with the parts, tensors and mode of another one, or with copies of what holds them, and without code."""
    tree = nn.Module()
    for kind in (*_TREE, "training"):
        tree.__dict__[kind] = copied(module.__dict__[kind])
    return tree


def copied_graph(graph: fx.Graph, memo: dict[int, Any] | None = None) -> fx.Graph:
    """A copy whose nodes carry what is known of them."""
    copied: fx.Graph = copy.deepcopy(graph, memo)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        new.meta = dict(old.meta)
    return copied


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
