"""One run of a captured network, watched: what every convolution really got, and what its latent weights can learn.

Roles say what a layer is; a linter also wants to know what happens in it. The network runs once in eval mode on random
input of the captured size; it is left as it was. Decided by values and gradients, so it holds for anybody's code:
which zeros are in a kernel as applied, whether its input was padded with zeros, which latent weights get no gradient.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.graph import Network, random_inputs
from repbnn_cli.graph.probe import ConvCall, ConvCalls, facts
from repbnn_cli.graph.static import roots, static_nodes
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.recognize import Layer
from repbnn_cli.restoring import unchanged
from repbnn_cli.surgery.walk import subject_of
from repbnn_cli.user_code.cpu_only import running

_ORTHOGONAL = 1e-3  # a sum that cancels to less than this share of its terms' magnitudes


@dataclass(frozen=True)
class Latent:
    """The latent weights of one binary kernel. Counts are of weights.

    no_gradient: those that get none, whatever the loss; far: those with |w| > 1 that do get one. normalised: the
    kernel does not change with their mean or scale per filter, so that |w| says nothing.
    """

    count: int
    no_gradient: int
    far: int
    normalised: bool


@dataclass(frozen=True)
class Seen:
    """One convolution or linear map as it ran.

    path: of its module; kernel: (O, I/groups, k...); zeros: exact zeros of the applied kernel outside of zero_filters,
    filters that are all zero. pads: "argument" or "border" where zeros surround its input, else "".
    """

    path: str
    kind: str
    kernel: tuple[int, ...]
    groups: int
    weight_bits: int
    activation_bits: int
    zeros: int
    zero_filters: int
    pads: str
    latent: Latent | None = None

    @property
    def in_channels(self) -> int:
        return self.kernel[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.kernel[0]


@dataclass(frozen=True)
class Shrink:
    """A call that makes a feature map smaller. unread: the share of its input's positions that reach no output."""

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    unread: float


@dataclass(frozen=True)
class Observation:
    """Everything seen in one run, in order."""

    seen: tuple[Seen, ...]
    shrinks: tuple[Shrink, ...]


def observe(network: Network, layers: Mapping[str, Layer], *, latent: bool = True) -> Observation:
    """Runs the network once and says what was seen. latent: also look at latent weights, half of the time it takes."""
    module = network.module
    inputs = random_inputs(module, network.example, seed=0)
    with running(module), unchanged(module):
        module.eval()
        try:
            with _all_learn(module), torch.enable_grad():
                watch = _Watch(module, layers, latent)
                watch.run(*inputs)
        except RuntimeError:  # writes into its own parameters, which autograd refuses: gradients cannot be told
            with torch.no_grad():
                watch = _Watch(module, layers, latent)
                watch.run(*inputs)
    return Observation(tuple(watch.seen), tuple(watch.shrinks))


@contextlib.contextmanager
def _all_learn(module: nn.Module) -> Iterator[None]:
    """Frozen parameters take part: whether a latent weight can learn is a matter of its estimator."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for parameter, _ in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _Watch(fx.Interpreter):
    """Runs node by node; what depends on the input is cut from the gradient's graph after every node."""

    def __init__(self, module: fx.GraphModule, layers: Mapping[str, Layer], latent: bool) -> None:
        super().__init__(module)
        self.root, self.layers, self.latent = module, layers, latent
        self.seen: list[Seen] = []
        self.shrinks: list[Shrink] = []
        self._static = static_nodes(module.graph)

    def run_node(self, n: fx.Node) -> Any:
        if n in self._static or n.op in ("placeholder", "output", "get_attr"):
            return super().run_node(n)
        with ConvCalls() as calls:
            result = super().run_node(n)
        path = subject_of(n)
        self.seen += [self._of(path, n, call) for call in calls.calls]
        result = _cut(result)
        self._shrinking(path, n, result, calls.calls)
        return result

    def _of(self, path: str, node: fx.Node, call: ConvCall) -> Seen:
        kernel = call.kernel.detach()
        filters = kernel.reshape(len(kernel), -1)
        empty = (filters == 0).all(1)
        bits = facts(call)
        latent = None
        if self.latent and bits.weight_bits == 1 and path in self.layers:
            latent = _latent(call.kernel, self._latent_tensors(node, self.layers[path], bits.kernel_shape))
        return Seen(
            path, call.kind, bits.kernel_shape, call.groups, bits.weight_bits, bits.activation_bits,
            int((filters[~empty] == 0).sum()), int(empty.sum()), _pads(call), latent,
        )  # fmt: skip

    def _latent_tensors(self, node: fx.Node, layer: Layer, shape: tuple[int, ...]) -> list[Tensor]:
        if not layer.called:
            return [fetch(self.root, f"{layer.path}.{layer.kernel}")] if layer.kernel else []
        kernel = node.all_input_nodes[1] if len(node.all_input_nodes) > 1 else None
        held = [fetch(self.root, str(n.target)) for n in roots(kernel)] if kernel is not None else []
        return [t for t in held if t.numel() == math.prod(shape)]

    def _shrinking(self, path: str, node: fx.Node, result: Any, calls: list[ConvCall]) -> None:
        x = node.args[0] if node.args else None
        value = self.env.get(x) if isinstance(x, fx.Node) else None
        if not isinstance(value, Tensor) or not isinstance(result, Tensor) or not 4 == value.ndim == result.ndim:
            return
        before, after = tuple(value.shape[2:]), tuple(result.shape[2:])
        if not value.is_floating_point() or math.prod(after) * 2 > math.prod(before):
            return

        def call(changed: Tensor) -> Any:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: changed if n is x else self.env[n])
            return getattr(self, node.op)(node.target, args, kwargs)

        unread = _between_windows(calls[0]) if calls else _unread(call, value)
        if unread is not None:
            self.shrinks.append(Shrink(path, before, after, unread))


def _cut(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {k: _cut(v) for k, v in value.items()}
    return type(value)(_cut(v) for v in value) if type(value) in (tuple, list) else value


def _pads(call: ConvCall) -> str:
    """Whether zeros surround the input: by the convolution's own argument, or put there before it."""
    padding = call.arguments.get("padding", 0)
    if padding == "same":
        padding = [n - 1 for n in call.kernel.shape[2:]]
    sizes = padding if isinstance(padding, tuple | list) else [padding]
    if any(isinstance(n, int) and n > 0 for n in sizes):
        return "argument"
    x = call.input.detach()
    if x.ndim != 4 or min(x.shape[2:]) < 3:
        return ""
    inner = x[:, :, 1:-1, 1:-1]
    edges = (x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1])
    ringed = any(not bool(edge.any()) for edge in edges)
    return "border" if ringed and bool(inner.any()) else ""


def _latent(kernel: Tensor, tensors: list[Tensor]) -> Latent | None:
    """None where no gradient reaches a tensor of the kernel's size: then nothing can be said."""
    tensors = [t for t in tensors if t.requires_grad]
    if not kernel.requires_grad or not tensors:
        return None
    generator = torch.Generator(device=kernel.device).manual_seed(0)
    towards = torch.randn(kernel.shape, generator=generator, dtype=kernel.dtype, device=kernel.device)
    gradients = torch.autograd.grad(kernel, tensors, towards, retain_graph=True, allow_unused=True)
    reached = [(t.detach(), g) for t, g in zip(tensors, gradients, strict=True) if g is not None]
    if not reached:
        return None
    latent, gradient = (t.reshape(kernel.shape) for t in reached[0])
    return Latent(
        latent.numel(),
        int((gradient == 0).sum()),
        int(((latent.abs() > 1) & (gradient != 0)).sum()),
        _cancels(gradient) or _cancels(gradient * latent),
    )


def _cancels(terms: Tensor) -> bool:
    """Whether the terms of every filter add up to nothing: the kernel does not depend on that direction."""
    flat = terms.reshape(len(terms), -1)
    total, size = (t.sum(1, dtype=torch.float64) for t in (flat, flat.abs()))
    return bool((total.abs() <= _ORTHOGONAL * size.clamp_min(1e-30)).all())


def _between_windows(call: ConvCall) -> float:
    """The share of its input's positions that a convolution's windows step over: 3/4 for a 1×1 kernel with stride 2."""
    stride = call.arguments.get("stride", 1)
    strides = stride if isinstance(stride, tuple | list) else [stride] * (call.kernel.ndim - 2)
    return 1 - math.prod(min(1.0, k / s) for k, s in zip(call.kernel.shape[2:], strides, strict=False))


def _unread(call: Callable[[Tensor], Any], like: Tensor) -> float | None:
    """The share of positions (H, W) of the input whose value no output depends on, for any channel of any sample."""
    generator = torch.Generator(device=like.device).manual_seed(0)
    x = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device) * 0.5
    x.requires_grad_(True)
    try:
        with torch.enable_grad():
            result = call(x)
            weights = torch.randn(result.shape, generator=generator, dtype=result.dtype, device=result.device)
            (gradient,) = torch.autograd.grad(result, x, weights, allow_unused=True)
    except (RuntimeError, NotImplementedError):  # no gradient, or somebody else's code that wants other values
        return None
    if gradient is None or not bool(gradient.any()):
        return None
    return float((gradient == 0).all(1).all(0).double().mean())
