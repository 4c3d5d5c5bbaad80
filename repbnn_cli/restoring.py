"""Leaving a model as it was, whatever its forward did to it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from repbnn_cli import seeds


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
    with seeds.kept(sorted({t.device.index or 0 for t, _, _ in tensors if t.is_cuda})):
        try:
            yield
        finally:
            for module, saved in attributes:
                _restore(module, saved)
            with torch.no_grad():
                for tensor, data, value in tensors:
                    # What was not written to need not be writable: `register_buffer("blur", kernel.expand(...))`.
                    tensor.data = data if torch.equal(data, value) else data.copy_(value)


@contextlib.contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """Restores training or eval mode of the modules and all below them on leaving."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def kept_in_eval(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that stay in eval mode when the network is trained, because its own `train` says so, by path."""
    if all(type(m).train is nn.Module.train for m in network.modules()):
        return {}
    with unchanged(network):
        network.train()
        return {path: module for path, module in network.named_modules() if path and not module.training}


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
