"""Lets code that was written for a GPU run where there is none: `.cuda()` and CUDA devices mean the CPU meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repbnn_cli.user_code.legacy import legacy_functions, old_names

_CPU = torch.device("cpu")
_LEGACY_TYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")


@contextlib.contextmanager
def cpu_only() -> Iterator[None]:
    """While active, whatever asks for a CUDA device gets the CPU; with CUDA at hand it does nothing at all.

    Covers `.cuda()`, `.to("cuda")`, `device="cuda"` and `torch.device` arguments, `torch.cuda.FloatTensor` and its
    kin, `torch.cuda.set_device`, `torch.cuda.device`, default tensor types, pinned memory, and `torch.load` without
    `map_location`. `torch.cuda.is_available()` keeps telling the truth. nn.DataParallel is a plain wrapper without
    CUDA by itself. A model whose forward says `.cuda()` needs it around its forward as well.
    """
    if torch.cuda.is_available():
        yield
        return
    substitutes = list(_substitutes())
    originals = [(holder, name, getattr(holder, name)) for holder, name, _ in substitutes]
    try:
        for holder, name, substitute in substitutes:
            setattr(holder, name, substitute)
        with _CudaMeansCpu():
            yield
    finally:
        for holder, name, original in originals:
            setattr(holder, name, original)


def is_foreign(model: nn.Module) -> bool:
    """Whether any of its modules' code is neither torch's nor this package's."""
    return any(not type(m).__module__.startswith(("torch.", "repbnn_cli.")) for m in model.modules())


@contextlib.contextmanager
def foreign_code() -> Iterator[None]:
    """Around code that was written for other machines and other times: CUDA may be missing, functions and names old."""
    with cpu_only(), legacy_functions(), old_names():
        yield


def running(model: nn.Module) -> AbstractContextManager[None]:
    """`foreign_code` around foreign code, nothing around ours: it costs a little at every operation."""
    return foreign_code() if is_foreign(model) else contextlib.nullcontext()


def _substitutes() -> Iterator[tuple[Any, str, Any]]:
    # Each its own function: torch.compile keeps a table of torch's functions by identity.
    yield torch.cuda, "set_device", lambda *_, **__: None
    yield torch.cuda, "synchronize", lambda *_, **__: None
    yield torch.cuda, "current_device", lambda: 0
    yield torch.cuda, "get_device_name", lambda *_, **__: "CPU"
    yield torch.cuda, "device", lambda *_: contextlib.nullcontext()
    for kind in _LEGACY_TYPES:
        yield torch.cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor")
    yield Tensor, "cuda", lambda tensor, *_, **__: tensor  # where no mode reaches: in a custom backward
    yield torch, "set_default_tensor_type", _with_cpu_type(torch.set_default_tensor_type)
    yield torch, "set_default_device", _with_cpu_device(torch.set_default_device)
    yield torch, "load", _with_cpu_location(torch.load)


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.cuda, Tensor.pin_memory):
            return args[0]
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is Tensor.to:
            args = (args[0], *(_CPU if _is_cuda(argument) else argument for argument in args[1:]))
        elif func is Tensor.type:
            args = tuple(_cpu_type(argument) for argument in args)
            kwargs = {name: _cpu_type(value) for name, value in kwargs.items()}
        else:
            # Text may mean anything (an einsum pattern); a device object is a device wherever it stands.
            args = tuple(_CPU if isinstance(a, torch.device) and a.type == "cuda" else a for a in args)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    # A bare number counts GPUs.
    return isinstance(device, int) and not isinstance(device, bool)


def _cpu_type(kind: Any) -> Any:
    return kind.replace("torch.cuda.", "torch.") if isinstance(kind, str) else kind


def _with_cpu_type(original: Callable[..., None]) -> Callable[..., None]:
    return lambda kind: original(_cpu_type(kind))


def _with_cpu_device(original: Callable[..., None]) -> Callable[..., None]:
    return lambda device: original(_CPU if _is_cuda(device) else device)


def _with_cpu_location(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return original(f, "cpu" if map_location is None or _is_cuda(map_location) else map_location, *args, **kwargs)

    return load
