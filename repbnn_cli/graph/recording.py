"""How a network is recorded: which modules stay whole, since they are one layer, and which are traced into."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from repbnn_cli.errors import CaptureError
from repbnn_cli.graph.static import static_nodes
from repbnn_cli.graph.tracer import place_of
from repbnn_cli.graph.tracing import Traced, TracingError, in_both_modes
from repbnn_cli.restoring import unchanged

LeafOpinion = Callable[[str, nn.Module], bool | None]

_OF_A_BLOCK = 3  # parameters beside its kernel: a layer has a scale, perhaps a threshold
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Recording:
    """A model's recording. whole: paths of modules that cannot be traced into; opened: of those that are, although by
    themselves they would stay whole; attempts: what was tried, and what came of it."""

    def __init__(
        self, model: nn.Module, examples: tuple[Tensor, ...], leaf: LeafOpinion | None, shapes_only: bool
    ) -> None:
        self.model, self.examples, self.leaf, self.shapes_only = model, examples, leaf, shapes_only
        self.whole: list[str] = []
        self.opened: list[str] = []
        self.attempts: list[str] = []

    def recorded(self) -> Traced:
        """The model with every block traced into, but for those in which that fails."""
        while True:
            what = f"with {', '.join(self.whole)} kept whole" if self.whole else "every block traced into"
            try:
                traced = self._try()
            except TracingError as error:
                self.attempts.append(f"recorded, {what}: {error}")
                if error.module in self.whole or not _may_stay_whole(self.model, error.module):
                    final = _not_its_fault(self.model, self.examples, error)
                    for attempt in self.attempts[:-1] if final is error else ():
                        final.add_note(f"tried before: {attempt}")
                    raise final from error
                self.whole.append(error.module)
            else:
                self.attempts.append(f"recorded, {what}: {len(traced.graph.nodes)} operators")
                return traced

    def looked_into(self, traced: Traced) -> Traced:
        """The same with modules traced into that are more than one whole layer, as far as they let themselves."""
        quantisers = _kernel_quantisers(self.model, traced.graph)
        found = _foreign({**_worth_opening(self.model, traced.graph), **quantisers})
        self.opened = [p for p, m in found.items() if self._opinion(p, m) is None]
        if not self.opened:
            return traced
        how = f"recorded, with {', '.join(self.opened)} traced into, which may be more than one whole layer"
        try:
            inside = self._try()
            self.attempts.append(f"{how}: {len(inside.graph.nodes)} operators")
            calls = [n.meta["path"] for n in inside.graph.nodes if n.meta.get("convs") and n.op == "call_function"]
            layered = [
                p for p in self.opened if p in quantisers or any(f"{at}.".startswith(f"{p}.") for at in calls)
            ]  # fmt: skip
            if layered == self.opened:
                return inside
            self.opened = layered  # in the others no layer shows, so they had better stay whole
            return self._try() if layered else traced
        except CaptureError as error:
            self.attempts.append(f"{how}: {error}")
            return traced

    def _try(self) -> Traced:
        return in_both_modes(self.model, self.examples, self._stays_whole, self.shapes_only)

    def _stays_whole(self, path: str, module: nn.Module) -> bool:
        told = self._opinion(path, module)
        if told is not None:
            return told
        return path in self.whole or (path not in self.opened and is_leaf(module))

    def _opinion(self, path: str, module: nn.Module) -> bool | None:
        """What the caller has said of a module."""
        return self.leaf(path, module) if self.leaf else None


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
