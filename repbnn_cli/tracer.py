"""The tracer behind `graph.capture`: fx proxies that carry the example's values, and what fx alone does not see.

Control flow on shapes, loops over sizes, item assignment, in-place operators, `x.data = v` and custom
autograd.Functions are recorded or simply run; a decision on a tensor's value is frozen and noted.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

from repbnn_cli.binary_conv import BinaryConv2d
from repbnn_cli.errors import CaptureError
from repbnn_cli.probe import ConvCalls, facts
from repbnn_cli.rep_layers import RepConv2d

LeafPolicy = Callable[[str, nn.Module], bool]

_PACKAGE = str(Path(__file__).parent / "tracer.py"), str(Path(__file__).parent / "graph.py")
_TORCH_FILES = str(Path(torch.__file__).parent)
_CONSTRUCTORS = ("zeros", "ones", "full", "empty", "rand", "randn", "arange", "linspace", "tensor", "eye", "as_tensor")
_INPLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "iand", "ior", "ixor", "ipow", "imod")

# The tracer that is recording now, if any. Function.apply and the tensor constructors ask for it.
_recording: list[Tracer] = []


# ---------------------------------------------------------------------------------------------------------------------
# Interception: in place before the model is built, because some networks bind `SomeFunction.apply` in __init__


class FunctionCall:
    """A custom autograd.Function as a graph node: called by its `apply`, so its backward stays."""

    def __init__(self, function: type[torch.autograd.Function], apply: Callable[..., Any]) -> None:
        self.function, self._apply = function, apply
        self.__name__ = self.__qualname__ = function.__name__
        self.__module__ = function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._apply(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionCall:
        return self


_original_apply = torch.autograd.Function.__dict__["apply"].__func__


def _recorded_apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    if _recording and _has_proxy((args, kwargs)):
        call = FunctionCall(cls, types.MethodType(_original_apply, cls))
        return _recording[-1].create_proxy("call_function", call, args, kwargs)
    return _original_apply(cls, *args, **kwargs)


@contextlib.contextmanager
def interceptable() -> Iterator[None]:
    """Makes calls visible to the tracer that fx cannot see; active while a user's model is imported and built."""
    if torch.autograd.Function.__dict__["apply"].__func__ is _recorded_apply:
        yield
        return
    originals = {name: getattr(torch, name) for name in _CONSTRUCTORS}
    torch.autograd.Function.apply = classmethod(_recorded_apply)  # type: ignore[assignment, arg-type]
    for name, original in originals.items():
        setattr(torch, name, _recorded_constructor(original))
    try:
        yield
    finally:
        torch.autograd.Function.apply = classmethod(_original_apply)  # type: ignore[assignment, arg-type]
        for name, original in originals.items():
            setattr(torch, name, original)


def _recorded_constructor(original: Callable[..., Tensor]) -> Callable[..., Any]:
    def construct(*args: Any, **kwargs: Any) -> Any:
        if _recording and _has_proxy((args, kwargs)):
            return _recording[-1].create_proxy("call_function", original, args, kwargs)
        return original(*args, **kwargs)

    return construct


def _has_proxy(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_has_proxy(v) for v in value)
    if type(value) is dict:
        return any(_has_proxy(v) for v in value.values())
    return isinstance(value, fx.Proxy)


def set_data(tensor: Tensor, value: Tensor) -> Tensor:
    """`tensor.data = value` as a function, so that a graph can hold it."""
    tensor.data = value
    return tensor


# ---------------------------------------------------------------------------------------------------------------------
# Proxies with values


class _ValueProxy(fx.Proxy):
    """A proxy that knows what the example input makes of it."""

    @property
    def _value(self) -> Any:
        return self.tracer.values[self.node]  # type: ignore[attr-defined]

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Tensor if isinstance(self._value, Tensor) else type(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._value, name)
        if callable(value):
            return _Method(self, name)
        if name in (
            "requires_grad",
            "is_cuda",
            "grad_fn",
            "is_leaf",
            "is_sparse",
            "is_quantized",
            "names",
            "layout",
        ):
            return value
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            self.tracer.create_proxy("call_function", set_data, (self, value), {})
        else:
            object.__setattr__(self, name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __bool__(self) -> bool:
        return bool(self._freeze("a branch"))

    def __int__(self) -> int:
        return int(self._freeze("an int()"))

    def __index__(self) -> int:
        return operator.index(self._freeze("an index or range"))

    def __float__(self) -> float:
        return float(self._freeze("a float()"))

    def __hash__(self) -> int:
        return id(self)

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self._value))])  # type: ignore[index]

    def __contains__(self, item: Any) -> bool:
        return item in self._value

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})

    def _freeze(self, what: str) -> Any:
        value = self._value
        if self.node.op == "get_attr" and self.node.target == "training":
            self.tracer.mode_branches.append(_user_line())  # type: ignore[attr-defined]
        if isinstance(value, Tensor):
            self.tracer.note(f"{what} on a tensor's value is frozen to what the example input did")  # type: ignore[attr-defined]
            if value.is_meta:
                where = self.node.meta["where"]
                raise CaptureError(
                    f"{where}: {what} depends on a tensor's value, which the shape-only capture does not have; "
                    "capture the network with its weights"
                )
        return value


class _Method(_ValueProxy):
    """`x.name` before it is called."""

    def __init__(self, owner: _ValueProxy, name: str) -> None:
        object.__setattr__(self, "tracer", owner.tracer)
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_name", name)

    @property
    def _value(self) -> Any:
        return getattr(object.__getattribute__(self, "_owner")._value, object.__getattribute__(self, "_name"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner, name = object.__getattribute__(self, "_owner"), object.__getattribute__(self, "_name")
        return self.tracer.create_proxy("call_method", name, (owner, *args), kwargs)


def _inplace_method(operation: Callable[..., Any]) -> Callable[[_ValueProxy, Any], Any]:
    def method(self: _ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _name in _INPLACE:
    setattr(_ValueProxy, f"__{_name}__", _inplace_method(getattr(operator, _name)))


class Tracer(fx.Tracer):
    def __init__(self, examples: tuple[Tensor, ...], leaf: LeafPolicy, *, shapes_only: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.examples, self.leaf, self.shapes_only = examples, leaf, shapes_only
        self.values: dict[fx.Node, Any] = {}
        self.leaf_paths: set[str] = set()
        self.notes: list[str] = []
        self.mode_branches: list[str] = []
        self._evaluating = False
        self._training: dict[nn.Module, bool] = {}

    # -- what fx asks ------------------------------------------------------------------------------------------------
    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        _recording.append(self)
        try:
            return super().trace(root, concrete_args)
        finally:
            _recording.pop()

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        leaf = self.leaf(path, module)
        if leaf:
            self.leaf_paths.add(path)
        return leaf

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One placeholder per example; arguments with defaults keep them, as in an ordinary call."""
        names = [
            p.name for p in list(inspect.signature(root_fn).parameters.values())[1:] if p.kind is not p.VAR_POSITIONAL
        ]
        names += [f"input_{i}" for i in range(len(names), len(self.examples))]
        proxies = [self.create_proxy("placeholder", n, (), {}) for n in names[: len(self.examples)]]
        return root_fn, [self.root, *proxies]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["where"], node.meta["path"] = _user_line(), self._module_path()
        value = self._evaluate(node)
        node.meta["value"] = on_meta(value)
        self.values[node] = _hollow(value) if self.shapes_only else value
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ValueProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _ValueProxy:
            return a.node
        if type(a) is _Method:
            return self.create_proxy("call_function", getattr, (a._owner, a._name), {}).node
        if isinstance(a, np.generic):
            return a.item()
        if isinstance(a, torch.Size):
            return tuple(self.create_arg(v) for v in a)
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

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
            return self._training[self.root] if node.target == "training" else fetch(self.root, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        try:
            return self._execute(node, args, kwargs)
        except RuntimeError:
            if not self.shapes_only:
                raise
            # in-place operators need a tensor with memory of its own
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _filled(self.values[n]))
            return self._execute(node, args, kwargs)

    def _execute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "output":
            return args[0]
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
        return self._run_leaf(node, args, kwargs)

    def _run_leaf(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        module = self.root.get_submodule(str(node.target))
        for m in module.modules():  # a leaf reads its own flag while it runs
            m.__dict__["training"] = self._training[m]
        try:
            if self.shapes_only and (result := conv_shape(module, args)) is not None:
                return result
            with ConvCalls() as seen:
                # the call without any tracer in between
                result = _symbolic_trace._orig_module_call(module, *args, **kwargs)
            node.meta["convs"] = [facts(c) for c in seen.calls if not c.kernel.is_meta]
            return result
        finally:
            for m in module.modules():
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
            for module, training in self._training.items():
                module.training = training

    def _read_training(self, module: nn.Module) -> Any:
        if self._evaluating or not _recording or _recording[-1] is not self:
            return self._training[module]
        return self.create_proxy("get_attr", "training", (), {})

    def refuse_assignments(self, model: nn.Module) -> None:
        """`self.buffer = f(x)` in a traced forward would be lost: the graph has no place for it."""
        kept = {operator.setitem, set_data, *(getattr(operator, n) for n in _INPLACE)}
        for path, module in model.named_modules():
            for name, value in (*module._buffers.items(), *module._parameters.items()):
                if isinstance(value, fx.Proxy) and value.node.target not in kept:
                    raise CaptureError(
                        f"{value.node.meta['where']}: assigns `{name}` of {path or 'the network'} in its forward; write it "
                        f"in place (self.{name}.copy_(...)) or keep the module whole (rule file: `leaf: true`)"
                    )

    # -- reporting ---------------------------------------------------------------------------------------------------
    def note(self, text: str) -> None:
        line = f"{_user_line()}: {text}"
        if line not in self.notes:
            self.notes.append(line)

    def _module_path(self) -> str:
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers


def conv_shape(module: nn.Module, args: Any) -> Tensor | None:
    """Zeros of the shape that a convolution of torch's or of ours gives: nearly all of a forward's time, saved."""
    known = isinstance(module, BinaryConv2d) or type(module) in (nn.Conv2d, RepConv2d)
    if not known or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != 4:
        return None
    conv: Any = module
    if isinstance(conv.padding, str) or args[0].shape[1] != conv.in_channels:
        return None  # let it run, or fail, as it would
    dilation = getattr(conv, "dilation", (1, 1))
    spatial = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(args[0].shape[2:], conv.padding, dilation, conv.kernel_size, conv.stride, strict=True)
    ]
    return args[0].new_zeros(len(args[0]), conv.out_channels * getattr(conv, "repeats", 1), *spatial)


def _hollow(value: Any) -> Any:
    """A tensor of the same shape without memory behind it: only shapes are wanted, and a network has many tensors."""
    return value.new_zeros(()).expand(value.shape) if isinstance(value, Tensor) and value.numel() > 1 else value


def _filled(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def fetch(root: nn.Module, path: str) -> Any:
    """The module, parameter, buffer or attribute at a dotted path."""
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


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


def _is_ours(filename: str) -> bool:
    return filename.startswith((_TORCH_FILES, "<")) or filename in _PACKAGE


def _user_line() -> str:
    """ "file.py:12" of the innermost frame that belongs neither to torch nor to this module."""
    frame = sys._getframe(1)
    while frame is not None and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def explain(error: Exception, tracer: Tracer) -> str:
    """One line: where in the user's code, what failed, what to write instead."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_ours(f.filename)]
    last = frames[-1] if frames else None
    place = f"{last.filename}:{last.lineno}: `{last.line}`" if last else "while capturing"
    module = tracer._module_path()
    owner = f" in module {module}" if module else ""
    what = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{place}{owner} cannot be captured: {type(error).__name__}: {what}; keep the enclosing module whole "
        "(rule file: `modules: [{match: {type: ITS_CLASS}, leaf: true}]`) or move this code into a module of its own"
    )
