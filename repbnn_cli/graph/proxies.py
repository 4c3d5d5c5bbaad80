"""Proxies that carry the example's values, so that a forward's own Python runs on them while it is recorded."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from repbnn_cli.errors import CaptureError

_CAPTURE = ("graph/tracer", "graph/proxies", "graph/interception", "graph/tracing", "graph/capturing", "graph/probe",
            "user_code/cpu_only", "user_code/legacy")  # fmt: skip
_PACKAGE = tuple(str(Path(__file__).parents[1] / f"{name}.py") for name in _CAPTURE)
_TORCH_FILES = str(Path(torch.__file__).parent)
INPLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "iand", "ior", "ixor", "ipow", "imod")


def set_data(tensor: Tensor, value: Tensor) -> Tensor:
    """`tensor.data = value` as a function, so that a graph can hold it."""
    tensor.data = value
    return tensor


def is_write(node: fx.Node) -> bool:
    """Whether a node changes one of its operands: `x.clamp_()`, `x[i] = v`, `x.data = v`, `x += v`, F.relu_(x)."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        if node.target in (set_data, operator.setitem):
            return True
        name = getattr(node.target, "__name__", "")
        if name in INPLACE:
            return True
    else:
        return False
    return name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "is_", "not_")


class ValueProxy(fx.Proxy):
    """A proxy that knows what the example input makes of it."""

    @property
    def _value(self) -> Any:
        return self.tracer.values[self.node]  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._value, name)
        if callable(value):
            return Method(self, name)
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

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, list | tuple):  # `n * [x]`: a list is no value of a graph
            return operator.index(self) * other
        return super().__mul__(other)  # type: ignore[misc]

    def __rmul__(self, other: Any) -> Any:
        return self * other if isinstance(other, list | tuple) else super().__rmul__(other)  # type: ignore[misc]

    def __float__(self) -> float:
        return float(self._freeze("a float()"))

    def __hash__(self) -> int:
        return id(self)

    def __len__(self) -> int:
        return original_len(self._value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(original_len(self._value))])  # type: ignore[index]

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
        if _is_of_mode(self.node):
            self.tracer.mode_branches.append(user_line())  # type: ignore[attr-defined]
        if isinstance(value, Tensor):
            self.tracer.decisions.append(self.node)  # type: ignore[attr-defined]
            self.tracer.note(f"{what} on a tensor's value is frozen to what the example input did")  # type: ignore[attr-defined]
            if value.is_meta:
                where = self.node.meta["where"]
                raise CaptureError(
                    f"{where}: {what} depends on a tensor's value, which the shape-only capture does not have; "
                    "capture the network with its weights"
                )
        return value


def is_flag(node: fx.Node) -> bool:
    """`self.training` of some module."""
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training"


def _is_of_mode(node: fx.Node) -> bool:
    """`self.training`, or what follows from it alone: `self.training == True`."""
    if node.op == "get_attr":
        return is_flag(node)
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(_is_of_mode, node.all_input_nodes))


class Method(ValueProxy):
    """`x.name` before it is called."""

    def __init__(self, owner: ValueProxy, name: str) -> None:
        object.__setattr__(self, "tracer", owner.tracer)
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_name", name)

    @property
    def _value(self) -> Any:
        return getattr(object.__getattribute__(self, "_owner")._value, object.__getattribute__(self, "_name"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner, name = object.__getattribute__(self, "_owner"), object.__getattribute__(self, "_name")
        return self.tracer.create_proxy("call_method", name, (owner, *args), kwargs)


original_len = len


def recorded_len(value: Any) -> Any:
    """`len` while a forward is recorded: of a tensor its size, as a value of the graph.

    Python turns what `__len__` gives into a number, and `x.view(len(x), -1)` would know one batch size only.
    """
    theirs = type(value) is ValueProxy and not is_ours(sys._getframe(1).f_code.co_filename)
    if theirs and isinstance(value._value, Tensor):
        return value.tracer.create_proxy("call_method", "size", (value, 0), {})
    return original_len(value)


original_isinstance = isinstance


def recorded_isinstance(value: Any, kinds: Any) -> bool:
    """`isinstance` while a forward is recorded: a tensor's proxy is a tensor.

    Not by its `__class__`, which torch's C++ code would believe: it reads the memory of whatever passes for a tensor
    where it expects a number, as in `torch.where(x > 0, x, 0.0)`.
    """
    if original_isinstance(value, kinds):
        return True
    return type(value) is ValueProxy and original_isinstance(value._value, Tensor) and issubclass(Tensor, kinds)


def _inplace_method(operation: Callable[..., Any]) -> Callable[[ValueProxy, Any], Any]:
    def method(self: ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _name in INPLACE:
    setattr(ValueProxy, f"__{_name}__", _inplace_method(getattr(operator, _name)))


def is_ours(filename: str) -> bool:
    return filename.startswith((_TORCH_FILES, "<")) or filename in _PACKAGE


def user_line() -> str:
    """ "file.py:12" of the innermost frame that belongs neither to torch nor to this module."""
    frame = sys._getframe(1)
    while frame is not None and is_ours(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
