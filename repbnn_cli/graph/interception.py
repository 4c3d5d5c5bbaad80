"""What fx does not see of a forward, made visible while a network is built and while its forward is recorded.

Calls of custom autograd.Functions, tensors that are made for a size of the input, and `torch.no_grad`. It has to be in
place before the model is built, because some networks bind `SomeFunction.apply` in `__init__`.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Variable
from torch.utils.checkpoint import CheckpointFunction

_CONSTRUCTORS = (
    "zeros", "ones", "full", "empty", "rand", "randn", "randint", "randperm", "arange", "linspace", "tensor", "eye",
    "as_tensor",
)  # fmt: skip

# The tracer that is recording now, if any. Its `grad` says whether the code that it records computes gradients.
recording: list[Any] = []


class FunctionCall:
    """A custom autograd.Function as a graph node: called by its `apply`, so its backward stays."""

    def __init__(self, function: type[torch.autograd.Function], apply: Callable[..., Any]) -> None:
        self.function, self._apply = function, apply
        self.__name__ = self.__qualname__ = function.__name__
        self.__module__ = function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if recording and _has_proxy((args, kwargs)):  # a captured network is captured again
            return recording[-1].create_proxy("call_function", self, args, kwargs)
        return self._apply(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionCall:
        return self


# The function behind every bound `SomeFunction.apply`, and a copy of it. While a network is captured, the function
# itself is lent code that asks for the tracer: that reaches what was bound long before (`self.sign = Sign.apply`).
_apply: types.FunctionType = torch.autograd.Function.__dict__["apply"].__func__
_apply_code = _apply.__code__
_original_apply = types.FunctionType(_apply_code, _apply.__globals__, "apply", _apply.__defaults__, _apply.__closure__)


def _recording_code() -> types.CodeType:
    __class__ = None  # code can only be lent to a function that closes over the same names

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if __class__ is None:
            raise TypeError("the code of Function.apply runs outside of it")
        from repbnn_cli.graph.interception import recorded_apply

        return recorded_apply(cls, *args, **kwargs)

    return apply.__code__


def recorded_apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    if recording and _has_proxy((args, kwargs)):
        if cls is CheckpointFunction:  # computes what its first argument does, in less memory
            function, _, *operands = args
            return function(*operands)
        call = FunctionCall(cls, types.MethodType(_original_apply, cls))
        return recording[-1].create_proxy("call_function", call, args, kwargs)
    return _original_apply(cls, *args, **kwargs)


@contextlib.contextmanager
def interceptable() -> Iterator[None]:
    """Makes these calls visible to the tracer; active while a user's model is imported and built."""
    if _apply.__code__ is not _apply_code:
        yield
        return
    originals = {name: getattr(torch, name) for name in _CONSTRUCTORS}
    _apply.__code__ = _recording_code()
    for name, original in originals.items():
        setattr(torch, name, _recorded_constructor(original))
    try:
        with _gradients_noticed(), _variables_are_tensors():
            yield
    finally:
        _apply.__code__ = _apply_code
        for name, original in originals.items():
            setattr(torch, name, original)


def _recorded_constructor(original: Callable[..., Tensor]) -> Callable[..., Any]:
    def construct(*args: Any, **kwargs: Any) -> Any:
        if recording and _has_proxy((args, kwargs)):
            return recording[-1].create_proxy("call_function", original, args, kwargs)
        return original(*args, **kwargs)

    return construct


@contextlib.contextmanager
def _variables_are_tensors() -> Iterator[None]:
    """`Variable(x)` as x.detach(), which it is today: its C++ code would take a proxy for a tensor."""

    def new(cls: type, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        return data.detach() if isinstance(data, fx.Proxy) else original(cls, data, *args, **kwargs)

    original = Variable.__new__
    Variable.__new__ = new  # type: ignore[method-assign]
    try:
        yield
    finally:
        del Variable.__new__


# Kind of block → whether what is computed in it has gradients.
_BLOCKS: dict[Any, Callable[[Any], bool]] = {
    torch.no_grad: lambda block: False,
    torch.enable_grad: lambda block: True,
    torch.set_grad_enabled: lambda block: bool(block.mode),
    torch.inference_mode: lambda block: not block.mode,
}


@contextlib.contextmanager
def _gradients_noticed() -> Iterator[None]:
    """Tells the tracer what `with torch.no_grad()` and its kin say."""

    def notice(kind: Any, enter: Callable[..., Any], leave: Callable[..., Any]) -> None:
        def entered(block: Any) -> Any:
            if recording:
                block.__dict__["_before"], recording[-1].grad = recording[-1].grad, _BLOCKS[kind](block)
            return enter(block)

        def left(block: Any, *error: Any) -> Any:
            if recording:
                recording[-1].grad = block.__dict__.pop("_before", True)
            return leave(block, *error)

        kind.__enter__, kind.__exit__ = entered, left

    originals = {kind: (kind.__enter__, kind.__exit__) for kind in _BLOCKS}
    for kind, (enter, leave) in originals.items():
        notice(kind, enter, leave)
    try:
        yield
    finally:
        for kind, (enter, leave) in originals.items():
            kind.__enter__, kind.__exit__ = enter, leave


def _has_proxy(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_has_proxy(v) for v in value)
    if type(value) is dict:
        return any(_has_proxy(v) for v in value.values())
    return isinstance(value, fx.Proxy)
