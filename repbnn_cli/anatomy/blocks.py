"""The graph of a network as blocks that people can look at, each operation with what the transform made of it.

Plain values; draws nothing. A block is a module of the user's own tree: the network is split along that tree until no
block has more than `MOST` operations, or until there is nothing to split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from repbnn_cli.channels import operator_name
from repbnn_cli.graph import Network
from repbnn_cli.graph.static import static_nodes
from repbnn_cli.plan import Plan
from repbnn_cli.positions import holds_tensor

MOST = 24
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One node of the graph. path: dotted module path, or the module whose forward calls the function.

    kind: role of the module, `function`, or `input`. change: the plan's action for it, "" where nothing changed.
    before, after: its output's shape without batch in source and Rep network; after is None where it cannot be told.
    inputs: names of the operations that it reads, in any block.
    """

    name: str
    label: str
    path: str
    kind: str
    change: str
    before: Shape
    after: Shape | None
    inputs: tuple[str, ...]

    @property
    def expanded(self) -> bool:
        return bool(self.change) or (self.after is not None and self.after != self.before)


@dataclass(frozen=True)
class Block:
    """Operations of one module, in the order of the graph; `path` is "" for what the network's own forward calls."""

    path: str
    operations: tuple[Operation, ...]

    @property
    def name(self) -> str:
        """The module's path; for calls of the network's own forward the first and last of them."""
        if self.path:
            return self.path
        labels = [o.path if o.kind not in ("function", "input") else o.label for o in self.operations]
        return labels[0] if len(labels) == 1 else f"{labels[0]} … {labels[-1]}"

    @property
    def last(self) -> Operation:
        return self.operations[-1]

    def likeness(self) -> tuple[object, ...]:
        """Equal for blocks of the same operations, connections and changes, whatever their paths and sizes."""
        place = {o.name: i for i, o in enumerate(self.operations)}
        prefix = len(self.path)
        return tuple(
            (
                o.label if o.kind == "function" else o.path[prefix:],
                o.kind,
                o.change,
                tuple(place.get(i, -1) for i in o.inputs),
            )
            for o in self.operations
        )


def blocks(plan: Plan, rep: Network) -> tuple[Block, ...]:
    """The source network's graph in blocks; rep: the Rep network with shapes, as `shapes.rep_network` gives it."""
    graph = plan.network.graph
    hidden = static_nodes(graph)
    nodes = [
        n
        for n in graph.nodes
        if n.op not in ("output", "get_attr") and n not in hidden and holds_tensor(n.meta["value"])
    ]
    keys = _keys(nodes)
    runs: list[tuple[str, list[fx.Node]]] = []
    found: dict[str, list[fx.Node]] = {}
    for node in nodes:
        key = keys[node]
        if key and key in found:  # a module whose calls others interrupt is one block still
            found[key].append(node)
        elif not key and runs and not runs[-1][0]:
            runs[-1][1].append(node)
        else:
            runs.append((key, [node]))
            found.setdefault(key, runs[-1][1])
    shown = set(nodes)
    changes = {e.path: e.action for e in plan.edits}
    after = {n.name: n for n in rep.graph.nodes}
    return tuple(
        Block(key, tuple(_operation(n, plan, shown, changes, after) for n in members)) for key, members in runs
    )


def _keys(nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """Block of every node: the network itself, split as long as a block is too long to be read."""
    homes = {n: _home(n) for n in nodes}
    keys: dict[fx.Node, tuple[str, ...]] = dict.fromkeys(nodes, ())
    todo: list[tuple[str, ...]] = [()]
    while todo:
        block = todo.pop()
        members = [n for n in nodes if keys[n] == block]
        if len(members) <= MOST:
            continue
        deeper = {n: homes[n][: len(block) + 1] for n in members if len(homes[n]) > len(block)}
        keys.update(deeper)
        todo += sorted(set(deeper.values()))
    return {n: ".".join(key) for n, key in keys.items()}


def _home(node: fx.Node) -> tuple[str, ...]:
    """The module in which a node is called, as the parts of its path."""
    path = str(node.target).rpartition(".")[0] if node.op == "call_module" else str(node.meta.get("path", ""))
    return tuple(path.split(".")) if path else ()


def _operation(
    node: fx.Node, plan: Plan, shown: set[fx.Node], changes: Mapping[str, str], after: Mapping[str, fx.Node]
) -> Operation:
    module = node.op == "call_module"
    path = str(node.target) if module else str(node.meta.get("path", ""))
    label = path.rpartition(".")[2] if module else "input" if node.op == "placeholder" else operator_name(node)
    layer = plan.layers.get(path) if module else None
    kind = layer.role if layer else "input" if node.op == "placeholder" else "function"
    step = plan.steps.get(node.name)
    there = after.get(step.node) if step else None
    return Operation(
        node.name,
        label,
        path,
        kind,
        changes.get(path, "") if module else "",
        _shape(node.meta["value"]) or (),
        _unfolded(there.meta.get("value"), node.meta["value"]) if there is not None else None,
        tuple(n.name for n in node.all_input_nodes if n in shown),
    )


def _unfolded(value: object, source: object) -> Shape | None:
    """Shape without batch, replicas that are samples of their own (`channels.Folded`) counted as channels again."""
    shape = _shape(value)
    if isinstance(value, Tensor) and isinstance(source, Tensor) and shape and len(source):
        return (shape[0] * (len(value) // len(source)), *shape[1:])
    return shape


def _shape(value: object) -> Shape | None:
    """Without batch; of several tensors the first one's."""
    if isinstance(value, Tensor):
        return tuple(value.shape[1:])
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return next((s for v in value if (s := _shape(v)) is not None), None)
    return None
