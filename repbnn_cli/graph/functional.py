"""Convolutions that a forward calls as functions (`F.conv2d(x, sign(self.weight))`), as modules of the captured graph.

A rule, a plan and a profile speak of modules. The module made here holds no tensors: its kernel and bias stay what they
were, tensors computed in the graph, so the names in the state dict and the gradients stay, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from repbnn_cli.graph.probe import ARGUMENTS, CALLED_CONVOLUTIONS, TRANSPOSED_ARGUMENTS, TRANSPOSED_CONVOLUTIONS
from repbnn_cli.graph.static import roots, static_nodes


class ConvolutionCall(nn.Module):
    """One call of `F.conv2d` or its kin: forward(x, kernel, bias) with the stride, padding etc. of that call.

    The kernel is (O, I/groups, k...), of a transposed convolution, too.
    kind: "conv1d", "conv2d", "conv3d", "linear", "conv_transpose2d" and kin; options: the call's other arguments by
    name; of: where it is called, and which parameters make its kernel and bias.
    """

    def __init__(
        self, function: Callable[..., Tensor], kind: str, options: Mapping[str, Any], of: tuple[Any, ...] = ()
    ) -> None:
        super().__init__()
        self.function, self.kind, self.options, self._of = function, kind, dict(options), of
        self.groups = int(self.options.get("groups", 1))
        self.transposed = function in TRANSPOSED_CONVOLUTIONS

    def forward(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        turned = kernel.transpose(0, 1) if self.transposed else kernel
        return self.function(x, turned, bias, **self.options)

    def like(self, other: ConvolutionCall) -> bool:
        """Whether both are the same call, of one line and with the same arguments."""
        return (self.kind, self.options, self._of) == (other.kind, other.options, other._of)

    def extra_repr(self) -> str:
        return ", ".join([self.kind, *(f"{name}={value}" for name, value in self.options.items())])


def as_modules(graph: fx.Graph, made: dict[str, ConvolutionCall]) -> None:
    """Replaces calls whose kernel comes from parameters alone by modules, and adds these to `made`: path → module.

    A kernel that depends on the input (mixed for each sample, say) stays a plain operator. `made`: of another graph of
    the same network, whose modules are taken where they are the same call.
    """
    static = static_nodes(graph)
    called: set[str] = set()
    for node in list(graph.nodes):
        kind, transposed = _kind(node)
        names = TRANSPOSED_ARGUMENTS if transposed else ARGUMENTS
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs) if kind else {}
        x, kernel, bias = (given.pop(name, None) for name in names[:3])
        if kind is None or x in static or kernel not in static or not (bias is None or bias in static):
            continue
        if _holds_node(list(given.values())) or (transposed and given.get("groups", 1) != 1):
            continue
        of = (node.meta.get("where"), tuple(str(n.target) for n in (*roots(kernel), *(roots(bias) if bias else ()))))
        call = ConvolutionCall(node.target if kind != "linear" else F.linear, kind, given, of)
        path = _path(node.meta.get("path", ""), call, made, called)
        called.add(path)
        with graph.inserting_before(node):
            outputs_first = _turned(graph, kernel) if transposed else kernel
            new = graph.call_module(path, (x, outputs_first) if bias is None else (x, outputs_first, bias))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _kind(node: fx.Node) -> tuple[str | None, bool]:
    """The kind of convolution that a node calls, if any, and whether it is a transposed one."""
    if node.op != "call_function":
        return None, False
    return (TRANSPOSED_CONVOLUTIONS | CALLED_CONVOLUTIONS).get(node.target), node.target in TRANSPOSED_CONVOLUTIONS


def _turned(graph: fx.Graph, kernel: fx.Node) -> fx.Node:
    """(I, O, k...) → (O, I, k...)."""
    new = graph.call_method("transpose", (kernel, 0, 1))
    new.meta = {**kernel.meta, "value": kernel.meta["value"].transpose(0, 1)}
    return new


def _path(owner: str, call: ConvolutionCall, made: dict[str, ConvolutionCall], called: Container[str]) -> str:
    """Where the module of a call is: where the same one is, that this graph has not called yet, or in a free place."""
    base = f"{owner}.{call.kind}_call" if owner else f"{call.kind}_call"
    for n in itertools.count():
        path = f"{base}_{n}" if n else base
        other = made.setdefault(path, call)
        if other is call or (path not in called and other.like(call)):
            return path
    raise AssertionError("there are paths without end")


def _holds_node(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds_node(v) for v in value)
    return isinstance(value, fx.Node)
