"""The tracer behind `graph.capture`: fx proxies that carry the example's values, and what fx alone does not see.

Control flow on shapes, loops over sizes, item assignment, in-place operators, `x.data = v` and custom
autograd.Functions are recorded or simply run; a decision on a tensor's value is frozen and noted.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import operator
import random
import traceback
from collections.abc import Callable, Iterator, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.nn import functional as F

from repbnn_cli.binary_conv import BinaryConv2d
from repbnn_cli.errors import CaptureError
from repbnn_cli.graph import products
from repbnn_cli.graph.interception import FunctionCall, recording
from repbnn_cli.graph.probe import CALLED_CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, ConvCalls, binarises, facts, value_bits
from repbnn_cli.graph.proxies import (
    INPLACE,
    Method,
    ValueProxy,
    is_ours,
    is_write,
    recorded_isinstance,
    recorded_len,
    set_data,
    user_line,
)
from repbnn_cli.layers import LearnableBias
from repbnn_cli.rep_layers import RepConv2d

LeafPolicy = Callable[[str, nn.Module], bool]

# Layers that give the shape they take → how many channels they want; 1 fits all.
_CHANNELS_KEPT: dict[type, Callable[[Any], int]] = {
    nn.BatchNorm1d: lambda m: int(m.num_features),
    nn.BatchNorm2d: lambda m: int(m.num_features),
    nn.PReLU: lambda m: int(m.num_parameters),
    LearnableBias: lambda m: int(m.bias.shape[1]),
}


class Tracer(fx.Tracer):
    def __init__(
        self, examples: tuple[Tensor, ...], leaf: LeafPolicy, *, shapes_only: bool, frozen: Set[nn.Module], live: bool
    ) -> None:
        """frozen: the modules that are in eval mode even while the network is trained. live: `self.training` is a value
        of the graph; otherwise what it is at present."""
        super().__init__()
        self.frozen, self.live = frozen, live
        self.proxy_buffer_attributes = True
        self.examples, self.leaf, self.shapes_only = examples, leaf, shapes_only
        self.values: dict[fx.Node, Any] = {}
        self.leaf_paths: set[str] = set()
        self.entered_paths: set[str] = set()
        self.notes: list[str] = []
        self.mode_branches: list[str] = []
        self.asked: set[str] = set()  # paths of the modules that were asked for `training`
        self.put_to_eval: set[nn.Module] = set()  # by the forward: `self.stem.eval()`
        self.decisions: list[fx.Node] = []  # tensors whose values a branch was decided on
        self.grad = True
        self._without_grad: set[fx.Node] = set()
        self.drawn: list[str] = []  # in training mode, where a forward drew random numbers that no node draws
        self._random: tuple[Any, ...] | None = None
        self.convolution_calls = False
        self._fixed: set[fx.Node] = set()  # what depends on parameters and buffers alone
        self._evaluating = False
        self._training: dict[nn.Module, bool] = {}

    # -- what fx asks ------------------------------------------------------------------------------------------------
    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        recording.append(self)
        outer = builtins.len, builtins.isinstance
        builtins.len, builtins.isinstance = recorded_len, recorded_isinstance
        try:
            return super().trace(root, concrete_args)
        finally:
            builtins.len, builtins.isinstance = outer
            recording.pop()

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        leaf = self.leaf(path, module)
        (self.leaf_paths if leaf else self.entered_paths).add(path)
        return leaf

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One placeholder per example; arguments with defaults keep them, as in an ordinary call."""
        names = [
            p.name for p in inspect.signature(self.root.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL
        ]
        names += [f"input_{i}" for i in range(len(names), len(self.examples))]
        proxies = [self.create_proxy("placeholder", n, (), {}) for n in names[: len(self.examples)]]
        # Not root_fn, the class's forward: `model.forward = ...` may have replaced it.
        return (lambda root, *inputs: root.forward(*inputs)), [self.root, *proxies]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        if kind == "call_function" and not args and (first := kwargs.keys() & {"input", "tensors"}):
            name_of_first = first.pop()  # torch.mean(input=x, dim=1), torch.cat(tensors=[x, y])
            args, kwargs = (kwargs[name_of_first],), {k: v for k, v in kwargs.items() if k != name_of_first}
        if kind in ("call_function", "call_method"):
            product = products.find(target, args, kwargs, self.values, self._fixed)
            if product is not None:
                return self._layer(product)
        if not self.grad and kind != "get_attr":
            args, kwargs = fx.map_arg((args, kwargs), self._detached)
        if self._random is not None and self._random != _random_states():
            self.drawn.append(user_line())
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        inputs = node.all_input_nodes
        if not self.grad and kind != "get_attr":
            self._without_grad.add(node)
        held = kind == "get_attr" and not str(node.target).startswith("_tensor_constant")
        if held or (inputs and self._fixed.issuperset(inputs)):
            self._fixed.add(node)
        node.meta["where"], node.meta["path"] = user_line(), self._module_path()
        value = self._evaluate(node)
        self._random = _random_states() if self._training[self.root] else None
        node.meta["value"] = on_meta(value)
        multiplied = [self.values[n] for n in products.factors(node)]
        if len(multiplied) == 2 and all(isinstance(v, Tensor) for v in multiplied) and not self.shapes_only:
            # A layer's outputs may have few values by chance, so that more bits than signs take count as real ones.
            node.meta["bits"] = tuple(bits if (bits := value_bits(v)) <= 2 else 32 for v in multiplied)
        self.values[node] = hollow(value) if self.shapes_only else value
        return node

    def _detached(self, node: fx.Node) -> fx.Node:
        """What code under `torch.no_grad` sees of a tensor from outside: a graph knows no such block."""
        value = self.values[node]
        if node in self._without_grad or not isinstance(value, Tensor) or not value.is_floating_point():
            return node
        self.grad = True
        try:
            detached = self.create_node("call_method", "detach", (node,), {})
        finally:
            self.grad = False
        self._without_grad.add(detached)
        return detached

    def _layer(self, product: products.Product) -> fx.Node:
        """A product with a parameter, recorded as the layer that it is."""
        weight = product.weight
        if product.inputs_first:
            weight = self.create_node("call_method", "t", (weight,), {})
        if product.kind == "linear":
            operands = (product.x, weight) if product.bias is None else (product.x, weight, product.bias)
            return self.create_node("call_function", F.linear, operands, {})
        weight = self.create_node("call_method", "unsqueeze", (weight, -1), {})
        return self.create_node("call_function", torch.conv1d, (product.x, weight), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is ValueProxy:
            return a.node
        if type(a) is Method:
            return self.create_proxy("call_function", getattr, (a._owner, a._name), {}).node
        if isinstance(a, np.generic):
            return a.item()
        if isinstance(a, torch.Size):
            return tuple(self.create_arg(v) for v in a)
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        if m is not self.root and m not in (self.submodule_paths or {}):  # made in a forward: `nn.Sigmoid()(x)`
            return forward(*args, **kwargs)
        if kwargs:  # `bn(input=x)` as `bn(x)`: what a module is given is looked for among the positional arguments
            bound = inspect.signature(m.forward).bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
        result = super().call_module(m, forward, args, kwargs)
        if self.grad or not isinstance(result, fx.Proxy) or not isinstance(self.values[result.node], Tensor):
            return result
        return result.detach()  # from the parameters of a layer

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    # -- values ------------------------------------------------------------------------------------------------------
    def _evaluate(self, node: fx.Node) -> Any:
        outer, self._evaluating = self._evaluating, True
        try:
            return self._value_of(node)
        finally:
            self._evaluating = outer

    def _value_of(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.examples[sum(n.op == "placeholder" for n in self.values)]
        if node.op == "get_attr":
            return fetch(self.root, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        try:
            return self._execute(node, args, kwargs)
        except RuntimeError:
            if not self.shapes_only:
                raise
            # in-place operators need a tensor with memory of its own
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: filled(self.values[n]))
            return self._execute(node, args, kwargs)

    def _execute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            return self._run_leaf(node, args, kwargs)
        if node.op == "call_function" and node.target in (*CALLED_CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
            return self._run_convolution(node, args, kwargs)
        result = execute(self.root, node, args, kwargs)
        if isinstance(node.target, FunctionCall):
            self._see_signs(node, result)
        return result

    def _see_signs(self, node: fx.Node, result: object) -> None:
        """Notes whether the user's own function or module of one tensor binarises it."""

        def again(x: Tensor) -> Any:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: x)
            if node.op == "call_module":
                return _symbolic_trace._orig_module_call(self.root.get_submodule(str(node.target)), *args, **kwargs)
            return execute(self.root, node, args, kwargs)

        if not self.shapes_only and len(node.all_input_nodes) == 1:
            node.meta["binarises"] = binarises(again, self.values[node.all_input_nodes[0]], result)

    def _run_convolution(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        self.convolution_calls = True
        with ConvCalls() as seen:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        node.meta["convs"] = [facts(c) for c in seen.calls]
        return result

    def _run_leaf(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        module = self.root.get_submodule(str(node.target))
        hidden = [m for m in module.modules() if "training" not in m.__dict__]
        for m in hidden:  # a leaf reads its own flag while it runs
            m.__dict__["training"] = self._training[m]
        try:
            if self.shapes_only and (result := known_shape(module, args)) is not None:
                return result
            with ConvCalls() as seen:
                # the call without any tracer in between
                result = _symbolic_trace._orig_module_call(module, *args, **kwargs)
            node.meta["convs"] = [facts(c) for c in seen.calls if not c.kernel.is_meta]
            if not seen.calls and not module.state_dict():
                self._see_signs(node, result)
            return result
        finally:
            for m in hidden:
                m.__dict__.pop("training", None)

    # -- `self.training` ---------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def hidden_training_flags(self, model: nn.Module) -> Iterator[None]:
        """Takes the flags away while tracing, so that reading one is noticed and stays a live value."""
        self._training = {m: m.training for m in model.modules()}
        original = nn.Module.__getattr__

        def lookup(module: nn.Module, name: str) -> Any:
            if name == "training" and module in self._training:
                return self._read_training(module)
            return original(module, name)

        # While fx traces it goes through its own reference to the original __getattr__.
        nn.Module.__getattr__ = _symbolic_trace._orig_module_getattr = lookup  # type: ignore[method-assign]
        for module in self._training:
            module.__dict__.pop("training", None)
        try:
            yield
        finally:
            nn.Module.__getattr__ = _symbolic_trace._orig_module_getattr = original  # type: ignore[method-assign]
            self.put_to_eval = {m for m in self._training if m.__dict__.get("training") is False}
            for module, training in self._training.items():
                module.training = training

    def _read_training(self, module: nn.Module) -> Any:
        if self._evaluating or not recording or recording[-1] is not self:
            return self._training[module]
        if module in self.frozen:
            return False
        path = self.path_of_module(module)
        self.asked.add(path)
        if not self.live:
            return self._training[module]
        return self.create_proxy("get_attr", f"{path}.training" if path else "training", (), {})

    def refuse_what_is_lost(self, model: nn.Module) -> None:
        """`self.buffer = f(x)` in a traced forward: the graph has no place for it. A write into a tensor that each call
        makes anew. And a decision that the forward itself will change, which a graph takes once."""
        kept = {operator.setitem, set_data, *(getattr(operator, n) for n in INPLACE)}
        for path, module in model.named_modules():
            for name, value in (*module._buffers.items(), *module._parameters.items()):
                if isinstance(value, fx.Proxy) and value.node.target not in kept:
                    raise CaptureError(
                        f"{value.node.meta['where']}: assigns `{name}` of {path or 'the network'} in its forward; "
                        f"write it in place (self.{name}.copy_(...)) or keep the module whole (rule file: `leaf: true`)"
                    )

        for write in (n for n in self.values if is_write(n) or n.target == "__setitem__"):
            if any(name.startswith("_tensor_constant") for name in self._held(write, along=0)):
                raise CaptureError(
                    f"{write.meta['where']}: writes into a tensor that the forward makes of numbers alone, which a "
                    "graph has once for all calls; make it from an input (`x.new_zeros(8)` for `torch.zeros(8)`), or "
                    "compute a new one (`z = z + y` for `z += y`)"
                )

        for node in self.decisions:
            decided = self._held(node) if node in self._fixed else {}
            for write in (n for n in self._fixed if decided and is_write(n)):
                if both := decided.keys() & self._held(write, along=0):
                    raise CaptureError(
                        f"{node.meta['where']}: decides on {both.pop()}, which the forward itself writes to "
                        f"({write.meta['where']}), so that a graph would do for ever what it did first; keep the "
                        "module whole (rule file: `modules: [{match: {type: ITS_CLASS}, leaf: true}]`)"
                    )

    def _held(self, node: fx.Node, along: int | None = None) -> dict[str, fx.Node]:
        """The parameters and buffers that a node is computed from; along 0: that it is, or is a part of."""
        most = 1 if along == 0 else None
        return {str(n.target): n for n in reached(node, lambda at: at.all_input_nodes[:most]) if n.op == "get_attr"}

    # -- reporting ---------------------------------------------------------------------------------------------------
    def note(self, text: str) -> None:
        line = f"{user_line()}: {text}"
        if line not in self.notes:
            self.notes.append(line)

    @property
    def failed_in(self) -> str:
        """After an error: the path of the module in whose forward it happened, "" for the network's own."""
        return self._module_path()

    def _module_path(self) -> str:
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers


def reached(node: fx.Node, inputs: Callable[[fx.Node], list[fx.Node]]) -> list[fx.Node]:
    """A node and all that it is computed from, each once. inputs: of a node, those that count."""
    seen: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        at = todo.pop()
        if at not in seen:
            seen[at] = None
            todo += inputs(at)
    return list(seen)


def _random_states() -> tuple[Any, ...]:
    """Of the generators that a forward may draw from."""
    numpy = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy["key"].tobytes(), numpy["pos"]


def known_shape(module: nn.Module, args: Any) -> Tensor | None:
    """Zeros, without memory behind them, of the shape that a layer of torch's or of ours gives; None for other layers.

    Convolutions are nearly all of a forward's time, and layers that keep the shape most of the rest.
    """
    if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim < 2:
        return None
    x: Tensor = args[0]
    channels = _CHANNELS_KEPT.get(type(module))
    if channels is not None:
        kept = channels(module) in (1, x.shape[1])
        return x.new_zeros(()).expand(x.shape) if kept else None  # let it run, or fail, as it would
    if x.ndim != 4 or not (isinstance(module, BinaryConv2d) or type(module) in (nn.Conv2d, RepConv2d)):
        return None
    conv: Any = module
    if isinstance(conv.padding, str) or x.shape[1] != conv.in_channels:
        return None
    dilation = getattr(conv, "dilation", (1, 1))
    spatial = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], conv.padding, dilation, conv.kernel_size, conv.stride, strict=True)
    ]
    return x.new_zeros(()).expand(len(x), conv.out_channels * getattr(conv, "rep_repeats", 1), *spatial)


def hollow(value: Any) -> Any:
    """A tensor of the same shape without memory behind it: only shapes are wanted, and a network has many tensors."""
    return value.new_zeros(()).expand(value.shape) if isinstance(value, Tensor) and value.numel() > 1 else value


def filled(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def fetch(root: nn.Module, path: str) -> Any:
    """The module, parameter, buffer or attribute at a dotted path; the root itself at ""."""
    value: Any = root
    for name in path.split(".") if path else ():
        value = getattr(value, name)
    return value


def execute(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What a node of a graph over `root` computes from the values of its arguments; not for placeholder and output."""
    if node.op == "get_attr":
        return fetch(root, str(node.target))
    if node.op == "call_module":
        return fetch(root, str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def on_meta(value: Any) -> Any:
    """The value with every tensor replaced by its shape and dtype, a tensor on the meta device."""
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, tuple | list):
        items = [on_meta(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {k: on_meta(v) for k, v in value.items()}
    return value


def place_of(error: BaseException) -> str:
    """file.py:12: `the line`, the innermost one that belongs neither to torch nor to this package's capture."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_ours(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else "while capturing"


def explain(error: Exception, tracer: Tracer) -> str:
    """One line: where in the user's code, what failed, what to write instead."""
    owner = f" in module {tracer.failed_in}" if tracer.failed_in else ""
    what = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{place_of(error)}{owner} cannot be captured: {type(error).__name__}: {what}; keep the enclosing module whole "
        "(rule file: `modules: [{match: {type: ITS_CLASS}, leaf: true}]`) or move this code into a module of its own"
    )
