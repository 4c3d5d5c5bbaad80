"""Runs code of earlier years: autograd functions written for torch before 1.3, and names that have been dropped since.

`BinActive()(x)` with a forward that is no static method is refused by torch since version 1.5, and with it many early
binary networks. Here each call becomes one of a function of the new kind with the same forward and backward; `self` in
them is the context, with the attributes of the instance.
"""

from __future__ import annotations

import collections.abc
import contextlib
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.autograd import Function

_ATTRIBUTE = "_repbnn_static_function"
# Dropped by Python 3.10, by NumPy 1.24 and by torch 2.0.
_COLLECTIONS = {name: getattr(collections.abc, name) for name in collections.abc.__all__}
_NUMPY = {"bool": bool, "int": int, "float": float, "complex": complex, "object": object, "str": str}
_TORCH_SIX = {
    "container_abcs": collections.abc, "string_classes": (str, bytes), "int_classes": int, "inf": math.inf,
    "nan": math.nan, "PY3": True, "PY37": True,
}  # fmt: skip


@contextlib.contextmanager
def old_names() -> Iterator[None]:
    """While active, `collections.Iterable`, `np.float`, `torch._six` and their kin are there again."""
    given = [(collections, name, value) for name, value in _COLLECTIONS.items()]
    given += [(np, name, value) for name, value in _NUMPY.items()]
    missing = [(holder, name, value) for holder, name, value in given if name not in vars(holder)]
    six = types.ModuleType("torch._six")
    vars(six).update(_TORCH_SIX)
    lacks_six = "torch._six" not in sys.modules
    try:
        for holder, name, value in missing:
            setattr(holder, name, value)
        if lacks_six:
            sys.modules["torch._six"] = six
        yield
    finally:
        for holder, name, _ in missing:
            delattr(holder, name)
        if lacks_six:
            sys.modules.pop("torch._six", None)


@contextlib.contextmanager
def legacy_functions() -> Iterator[None]:
    """While active, functions of the old kind can be called; nothing changes for those of the new kind."""
    original = Function.__call__
    if original is _call:
        yield
        return
    Function.__call__ = _call  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():  # one warning for every instance made, in every forward
            warnings.filterwarnings("ignore", message=".*should not be instantiated", category=DeprecationWarning)
            yield
    finally:
        Function.__call__ = original  # type: ignore[method-assign]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    forward = _plain_method(type(self), "forward")
    if forward is None:
        raise RuntimeError(f"{type(self).__name__} has a static forward; call {type(self).__name__}.apply instead")
    if kwargs:
        raise TypeError(f"{type(self).__name__}: a function of the old kind takes no keyword arguments")
    return _modern(type(self), forward, dict(vars(self))).apply(*args)


def _modern(cls: type, forward: Callable[..., Any], attributes: dict[str, Any]) -> Any:
    """A function of the new kind: one for each class, and one for each instance that holds attributes."""
    known = cls.__dict__.get(_ATTRIBUTE)
    if known is not None and not attributes:
        return known
    backward = _plain_method(cls, "backward")

    def new_forward(ctx: Any, *args: Any) -> Any:
        _lend(ctx, cls, attributes)
        return forward(ctx, *args)

    def new_backward(ctx: Any, *grads: Any) -> Any:
        if backward is None:
            raise NotImplementedError(f"{cls.__name__} has no backward")
        return backward(ctx, *grads)

    body = {"forward": staticmethod(new_forward), "backward": staticmethod(new_backward), "__module__": cls.__module__}
    made = type(cls.__name__, (torch.autograd.Function,), body)
    if not attributes:
        setattr(cls, _ATTRIBUTE, made)
    return made


def _lend(ctx: Any, cls: type, attributes: dict[str, Any]) -> None:
    """What a method finds on `self` besides torch's own: the instance's attributes, the class's helpers and numbers."""
    for owner in reversed([c for c in cls.__mro__ if not _is_torch(c)]):
        for name, value in vars(owner).items():
            if name.startswith("__") or name in ("forward", "backward", _ATTRIBUTE):
                continue
            if isinstance(value, types.FunctionType):
                value = types.MethodType(value, ctx)
            elif isinstance(value, staticmethod | classmethod):
                value = getattr(cls, name)
            setattr(ctx, name, value)
    for name, value in attributes.items():
        setattr(ctx, name, value)


def _plain_method(cls: type, name: str) -> Callable[..., Any] | None:
    """The method if the class writes it as one that takes `self`; None where it is static or inherited from torch."""
    for owner in cls.__mro__:
        if name in vars(owner):
            value = vars(owner)[name]
            return value if isinstance(value, types.FunctionType) and not _is_torch(owner) else None
    return None


def _is_torch(cls: type) -> bool:
    return cls is object or cls.__module__.split(".")[0] == "torch"
