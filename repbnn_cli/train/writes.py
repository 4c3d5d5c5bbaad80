"""Makes writes edges of a graph: what is written goes on as a value of its own, and no other value changes.

`x[:, 4:] += y` and `self.relu(x)` change x without an edge to who takes x next. Here a node that writes is marked, to
be run on a copy of what it writes into, and whoever took x, or a part of it, afterwards takes the written value. Then
any part of the graph can be run ahead of the rest, and again. Which nodes write, and what lies in the same memory, is
found by running the graph, so that it does not matter how a network spells it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.graph import copied_graph
from repbnn_cli.graph.proxies import set_data
from repbnn_cli.graph.tracer import execute
from repbnn_cli.restoring import unchanged
from repbnn_cli.verify.lockstep import tensors_of


class WriteError(Exception):
    """A network writes in a way that cannot be followed; the message says so, and where."""


_WHOLE = object()
"""In place of an item: all of a tensor. (`...` is what somebody's code may say, and then numbers are broadcast.)"""


class Put:
    """(x, value, operands of the steps...) → a copy of x, value written into the part that the steps lead to."""

    def __init__(self, root: nn.Module, steps: Sequence[_Step], item: Any) -> None:
        """steps: from x to the part; item: what is set of it."""
        self._root = root
        self.__name__ = self.__qualname__ = "put"
        self._operands: dict[fx.Node, int] = {}
        self._steps = [(s.node, *self._with_slots((s.args, s.kwargs), s.parent)) for s in steps]
        self._item = self._with_slots(item, None)

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        return tuple(self._operands)

    def _with_slots(self, given: Any, here: fx.Node | None) -> Any:
        def slot(n: fx.Node) -> Any:
            return _HERE if n is here else _Slot(self._operands.setdefault(n, len(self._operands)))

        return fx.map_arg(given, slot)

    def __call__(self, x: Tensor, value: Any, *operands: Any) -> Tensor:
        x = at = x.clone()
        for node, args, kwargs in self._steps:
            args, kwargs = _filled((args, kwargs), at, operands)
            at = execute(self._root, node, args, kwargs)
        at[_filled(self._item, at, operands)] = value
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Put:
        return self


@dataclass(frozen=True)
class _Step:
    """A node whose value lies in the memory of an operand, its parent; args, kwargs: as the network has them."""

    node: fx.Node
    parent: fx.Node
    args: Any
    kwargs: Any


@dataclass(frozen=True)
class _Slot:
    number: int


_HERE = _Slot(-1)


def _filled(given: Any, here: Any, operands: Sequence[Any]) -> Any:
    if isinstance(given, _Slot):
        return here if given is _HERE else operands[given.number]
    if isinstance(given, slice):
        return slice(*(_filled(v, here, operands) for v in (given.start, given.stop, given.step)))
    if isinstance(given, dict):
        return {name: _filled(value, here, operands) for name, value in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(_filled(value, here, operands) for value in given)
    return given


@dataclass
class Edges:
    """graph: a copy in which writes are edges; written: node that writes → what it writes into, an operand of it;
    lasting: the nodes that write into parameters and buffers, which have no edges to who reads those behind them."""

    graph: fx.Graph
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)
    lasting: list[fx.Node] = field(default_factory=list)

    def run(self, root: nn.Module, node: fx.Node, values: Any) -> Any:
        """What a node gives; values: node → its value, none of which changes."""
        into = self.written.get(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values(n).clone() if n is into else values(n))
        return execute(root, node, args, kwargs)

    def lasting_before(self, node: fx.Node) -> list[fx.Node]:
        """What writes into parameters and buffers before a node runs."""
        return [write for write in self.lasting if self._order[write] < self._order[node]]

    @cached_property
    def _order(self) -> dict[fx.Node, int]:
        return {node: i for i, node in enumerate(self.graph.nodes)}


def as_edges(root: nn.Module, graph: fx.Graph, images: Tensor) -> Edges:
    """The graph over `root` with its writes into activations as edges; images: a small batch, for each of its inputs.

    Writes into parameters and buffers stay what they are. What is made is run out of order, and has to give what the
    graph gives: raises WriteError where it does not, or where a write cannot be followed.
    """
    try:
        following = _Following(root, copied_graph(graph))
        with unchanged(root), torch.no_grad():
            following.run(images)
        with unchanged(root), torch.no_grad():
            same = _gives_the_same(root, following, images)
    except (RuntimeError, AttributeError, TypeError, LookupError, ValueError) as error:
        raise WriteError(_CANNOT) from error
    if not same:
        raise WriteError(_CANNOT)
    return following.edges


_CANNOT = "the network writes into its tensors in a way that cannot be followed"


def _gives_the_same(root: nn.Module, following: _Following, images: Tensor) -> bool:
    """Whether the outputs are those of the graph in its own order, and no value changes, if all is run late."""
    edges = following.edges
    values: dict[fx.Node, Any] = {}
    kept: list[tuple[Tensor, Tensor]] = []

    def value(node: fx.Node) -> Any:
        if node not in values:
            for used in (*edges.lasting_before(node), *reversed(node.all_input_nodes)):
                value(used)
            values[node] = images.clone() if node.op == "placeholder" else edges.run(root, node, value)
            kept.extend((t, t.clone()) for t in tensors_of(values[node]) if not _memory(t) & following.kept)
        return values[node]

    (output,) = edges.graph.find_nodes(op="output")
    ours = tensors_of(fx.map_arg(output.args[0], value))
    return _alike(ours, following.outputs) and all(_alike([t], [was]) for t, was in kept)


def _alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    shapes = [[(t.shape, t.dtype) for t in side] for side in (some, others)]
    return shapes[0] == shapes[1] and all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in zip(some, others, strict=True)
    )


class _Following:
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph, self.edges = root, graph, Edges(graph)
        self.values: dict[fx.Node, Any] = {}  # all of them, so that no memory is used twice
        self.parts: dict[fx.Node, _Step] = {}
        self.now: dict[fx.Node, fx.Node | None] = {}  # what a node's value has become; None: what its parent's says
        self.kept: set[int] = set()  # memory of parameters and buffers
        self.outputs: list[Tensor] = []
        self.outs = {n: out for n in graph.nodes if isinstance(out := n.kwargs.get("out"), fx.Node)}

    def run(self, images: Tensor) -> None:
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                self.values[node] = images.clone()
                continue
            if node.op == "output":
                self.outputs = [t.clone() for t in tensors_of(fx.map_arg(node.args[0], self.values.__getitem__))]
                self._redirect(node)
                continue
            operands, args, kwargs = list(node.all_input_nodes), node.args, node.kwargs
            changed = self._execute(node, operands)
            into = self.outs.get(node, operands[0]) if changed else None
            shared = [n for n in operands if _memory(self.values[node]) & _memory(self.values[n])]
            if shared:
                self.parts[node] = _Step(node, into or shared[0], args, kwargs)
            self._redirect(node)
            if into is not None:
                self._write(node, into, changed)
        for node in reversed(self.graph.nodes):
            if isinstance(node.target, Put) and not node.users:
                self.graph.erase_node(node)

    def _execute(self, node: fx.Node, operands: list[fx.Node]) -> list[fx.Node]:
        """Computes a node's value; the activations among its operands that changed by that."""
        before = {n: [t._version for t in tensors_of(self.values[n])] for n in operands}
        held = [n for n in operands if self.kept & _memory(self.values[n])]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        self.values[node] = execute(self.root, node, args, kwargs)
        if node.op == "get_attr":
            self.kept |= _memory(self.values[node])
        for n in held:  # `parameter.data = x` gives it other memory
            self.kept |= _memory(self.values[n])
        changed = [n for n in operands if before[n] != [t._version for t in tensors_of(self.values[n])]]
        changed = operands[:1] if node.target is set_data else changed
        if any(n in held for n in changed):
            self.edges.lasting.append(node)
            return []
        return changed

    # -- one write ----------------------------------------------------------------------------------------------------
    def _write(self, node: fx.Node, into: fx.Node, changed: list[fx.Node]) -> None:
        x, result = self.values[into], self.values[node]
        if into not in changed or not isinstance(x, Tensor):
            raise WriteError(_cannot(node))
        if node.target is operator.setitem:
            self._becomes(node, into, node.args[2], node.args[1])
            self.graph.erase_node(node)
            return
        if not isinstance(result, Tensor) or not _same_place(x, result):
            raise WriteError(_cannot(node))  # and gives something else
        self.edges.written[node] = self.now.get(into) or into
        if node.target is set_data:  # the tensor has other memory now, and shares none with its parts
            self.now.update({n: node for n, value in self.values.items() if value is x and n is not node})
        else:
            self._becomes(node, into, node, _WHOLE)

    def _becomes(self, node: fx.Node, into: fx.Node, value: Any, item: Any) -> None:
        """From here on `into` has this value at this item of it, and so has all that lies in the same memory."""
        memory = _memory(self.values[into])
        base = into
        steps: list[_Step] = []
        while base in self.parts:
            if base not in self.edges.written:  # which is its operand itself
                steps.insert(0, self.parts[base])
            base = self.parts[base].parent
        self.now.update({n: None for n, v in self.values.items() if n not in (base, node) and memory & _memory(v)})
        if item is _WHOLE:
            self.now[into] = value
            if base is into:
                return
        put = Put(self.root, steps, ... if item is _WHOLE else item)
        with self.graph.inserting_before(node):
            operands = [self._value(n, node) for n in put.operands]
            start = self._value(base, node)
        with self.graph.inserting_after(node):
            self.now[base] = self.graph.call_function(put, (start, value, *operands))

    # -- values by now ------------------------------------------------------------------------------------------------
    def _redirect(self, node: fx.Node) -> None:
        for used in node.all_input_nodes:
            by_now = self._value(used, node)
            if by_now is not used:
                node.replace_input_with(used, by_now)

    def _value(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that gives the value which `node` has by now; parts are taken anew."""
        found = self.now.get(node, node)
        if found is None:
            step = self.parts.get(node)
            if step is None:
                raise WriteError(_cannot(node))
            found = self._value(step.parent, before)
            if node not in self.edges.written:
                found = self._again(step, found, before)
            self.now[node] = found
        return found

    def _again(self, step: _Step, parent: fx.Node, before: fx.Node) -> fx.Node:
        def operand(n: fx.Node) -> fx.Node:
            return parent if n is step.parent else self._value(n, before)

        args, kwargs = fx.map_arg((step.args, step.kwargs), operand)
        with self.graph.inserting_before(before):
            return self.graph.create_node(step.node.op, step.node.target, args, kwargs)


def _cannot(node: fx.Node) -> str:
    where = node.meta.get("where")
    return f"{_CANNOT} ({where})" if where else _CANNOT


def _memory(value: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors_of(value)} - {0}


def _same_place(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
