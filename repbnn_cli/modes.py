"""Joins the graphs of training and of eval mode where they differ only in what one mode writes into its parameters.

Research code clamps a scale `if self.training:`. A graph has no branches; the write becomes a node that asks for the
mode when it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from repbnn_cli.proxies import INPLACE, set_data
from repbnn_cli.static import static_nodes
from repbnn_cli.tracer import FunctionCall

_READS = (getattr, operator.getitem)


def only_when(training: bool, wanted: bool, write: str | Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """Writes into x if the network is in the wanted mode; gives x either way. write: a method's name or a function."""
    if training == wanted:
        (getattr(type(x), write) if isinstance(write, str) else write)(x, *args, **kwargs)
    return x


def is_write(node: fx.Node) -> bool:
    """Whether a node changes one of its operands: `x.clamp_()`, `x[i] = v`, `x.data = v`, `x += v`, F.relu_(x)."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        if node.target in (set_data, operator.setitem, only_when):
            return True
        name = getattr(node.target, "__name__", "")
        if name in INPLACE:
            return True
    else:
        return False
    return name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "is_", "not_")


def join(longer: fx.Graph, shorter: fx.Graph, *, training: bool) -> bool:
    """Makes `longer`, the graph of the mode that `training` says, right for both modes; False where that cannot be.

    It can when everything that `longer` has beyond `shorter` reads and writes parameters and is used by nothing else.
    """
    extra = _beyond(longer, shorter)
    if extra is None:
        return False
    static = static_nodes(longer)
    for node in extra:
        known = is_write(node) or node.op == "get_attr" or (node.op == "call_function" and node.target in _READS)
        if not known or node not in static or not extra.issuperset(node.users):
            return False
    for node in [n for n in longer.nodes if n in extra and is_write(n)]:
        with longer.inserting_before(node):
            mode = longer.get_attr("training")
            mode.meta = {**node.meta, "value": training}
            guarded = longer.call_function(only_when, (mode, training, node.target, *node.args), node.kwargs)
        guarded.meta = dict(node.meta)
        node.replace_all_uses_with(guarded)
        longer.erase_node(node)
    return True


def _beyond(longer: fx.Graph, shorter: fx.Graph) -> set[fx.Node] | None:
    """The nodes of `longer` that `shorter` lacks; None where it lacks one that `shorter` has."""
    # Parameters are looked up where they are first read, which the writes may have moved.
    read = {str(n.target): n for n in longer.nodes if n.op == "get_attr"}
    same = {n: read[str(n.target)] for n in shorter.nodes if n.op == "get_attr" and str(n.target) in read}
    extra: set[fx.Node] = set()
    left = iter([n for n in shorter.nodes if n not in same])
    wanted = next(left, None)
    for node in longer.nodes:
        if node.op == "get_attr":
            continue
        if wanted is not None and _alike(node, wanted, same):
            same[wanted] = node
            wanted = next(left, None)
        else:
            extra.add(node)
    return extra if wanted is None else None


def _alike(node: fx.Node, other: fx.Node, same: dict[fx.Node, fx.Node]) -> bool:
    if node.op != other.op or _identity(node.target) != _identity(other.target):
        return False
    args, kwargs = fx.map_arg((other.args, other.kwargs), lambda n: same.get(n, n))
    return bool((node.args, node.kwargs) == (args, kwargs))


def _identity(target: Any) -> Any:
    return target.function if isinstance(target, FunctionCall) else target
