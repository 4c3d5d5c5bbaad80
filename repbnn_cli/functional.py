"""Convolutions that a forward calls as functions (`F.conv2d(x, sign(self.weight))`), as modules of the captured graph.

A rule, a plan and a profile speak of modules. The module made here holds no tensors: its kernel and bias stay what they
were, tensors computed in the graph, so the names in the state dict and the gradients stay, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from repbnn_cli.probe import CALLED_CONVOLUTIONS
from repbnn_cli.static import static_nodes

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class ConvolutionCall(nn.Module):
    """One call of `F.conv2d` or its kin: forward(x, kernel, bias) with the stride, padding etc. of that call.

    kind: "conv1d", "conv2d", "conv3d" or "linear"; options: the call's other arguments by name.
    """

    def __init__(self, function: Callable[..., Tensor], kind: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.kind, self.options = function, kind, dict(options)
        self.groups = int(self.options.get("groups", 1))

    def forward(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.function(x, kernel, bias, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([self.kind, *(f"{name}={value}" for name, value in self.options.items())])


def as_modules(graph: fx.Graph) -> dict[str, ConvolutionCall]:
    """Replaces calls whose kernel comes from parameters alone; returns the modules by the path that the graph calls.

    A kernel that depends on the input (mixed for each sample, say) stays a plain operator.
    """
    static = static_nodes(graph)
    made: dict[str, ConvolutionCall] = {}
    for node in list(graph.nodes):
        kind = CALLED_CONVOLUTIONS.get(node.target) if node.op == "call_function" else None
        given = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs) if kind else {}
        operands = [given.pop(name, None) for name in _NAMES[:3]]
        x, kernel, bias = operands
        if kind is None or x in static or kernel not in static or not (bias is None or bias in static):
            continue
        if _holds_node(list(given.values())):
            continue
        path = _free_path(node.meta.get("path", ""), kind, made)
        made[path] = ConvolutionCall(node.target if kind != "linear" else F.linear, kind, given)
        with graph.inserting_before(node):
            new = graph.call_module(path, tuple(operands[:2] if bias is None else operands))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return made


def _free_path(owner: str, kind: str, taken: Mapping[str, Any]) -> str:
    base = f"{owner}.{kind}_call" if owner else f"{kind}_call"
    path, n = base, 1
    while path in taken:
        path, n = f"{base}_{n}", n + 1
    return path


def _holds_node(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds_node(v) for v in value)
    return isinstance(value, fx.Node)
