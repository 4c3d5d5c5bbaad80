"""Where each convolution and linear layer stands in the network: first, trunk, bypass or last (RepTran, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from torch import Tensor, fx

from repbnn_cli.channels import memory_of, operator_name
from repbnn_cli.graph import Network, kernel_like
from repbnn_cli.graph.proxies import is_write
from repbnn_cli.graph.static import roots, static_nodes
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.recognize import CONVOLUTIONS, Layer

# Each multiplies by a matrix; where that is a parameter, it is a layer, whether or not it was told as one.
PRODUCTS = (
    "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "bilinear", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
_JOINS = ("add", "sub", "cat", "concat", "concatenate", "radd", "stack")


def holds_tensor(value: Any) -> bool:
    """A tensor, or a tuple or list with one in it; sizes and other numbers are not."""
    if isinstance(value, tuple | list):
        return any(holds_tensor(v) for v in value)
    return isinstance(value, Tensor)


def other_layers(network: Network, layers: Mapping[str, Layer]) -> set[fx.Node]:
    """The nodes for which `is_other_layer` holds."""
    static = static_nodes(network.graph)
    return {node for node in network.graph.nodes if is_other_layer(network, layers, static, node)}


def is_other_layer(network: Network, layers: Mapping[str, Layer], static: Set[fx.Node], node: fx.Node) -> bool:
    """Whether a node holds a kernel, and is no convolution or linear layer: an LSTM, a product with a parameter."""
    held: Iterable[Any] = ()
    if _role(node, layers) in ("unknown", "weightless"):
        held = fetch(network.module, str(node.target)).parameters()
    elif node.op in ("call_function", "call_method") and node not in static and operator_name(node) in PRODUCTS:
        held = [n.meta["value"] for n in node.all_input_nodes if n in static and _of_parameters(n)]
    return any(isinstance(t, Tensor) and kernel_like(t) for t in held)


def _of_parameters(node: fx.Node) -> bool:
    return any(not str(root.target).startswith("_tensor_constant") for root in roots(node))


def positions(network: Network, layers: Mapping[str, Layer], others: Set[fx.Node] = frozenset()) -> dict[str, str]:
    """Module path → position, for every convolution and linear layer.

    first: none comes before it; last: none comes after it; bypass: on the branch of a sum or concatenation that has
    fewer binary convolutions (then fewer convolutions) than the branch beside it; trunk: all others.
    others: nodes that hold another kind of layer (`other_layers`); what comes before one of them is not the last.
    """
    bit: dict[str, int] = {}
    for node in network.graph.nodes:
        if node.op == "call_module" and node.target in layers and layers[node.target].role in CONVOLUTIONS:
            bit.setdefault(str(node.target), 1 << len(bit))
    before: dict[fx.Node, int] = {}
    bypass = 0
    binary = sum(b for path, b in bit.items() if layers[path].binary)
    after = dict.fromkeys(bit, 0)
    for node in network.graph.nodes:
        sources = [n for n in node.all_input_nodes if holds_tensor(n.meta["value"])]
        above = 0
        for source in sources:
            above |= before[source]
        own = bit.get(str(node.target), 0) if node.op == "call_module" else 0
        if own:
            after[str(node.target)] |= above
        before[node] = above | own
        if node.op in ("call_function", "call_method") and operator_name(node) in _JOINS:
            bypass |= _smaller_branch([before[s] for s in sources], binary)
        for written in memory_of(node.args[0]) if is_write(node) else ():
            before[written] |= before[node]
    with_successor = 0
    for above in (*after.values(), *(before[node] for node in others)):
        with_successor |= above
    result: dict[str, str] = {}
    for path, own in bit.items():
        if not after[path]:
            result[path] = "first"
        elif not own & with_successor:
            result[path] = "last"
        else:
            result[path] = "bypass" if own & bypass else "trunk"
    return result


def ends(network: Network, layers: Mapping[str, Layer], others: Set[fx.Node]) -> set[fx.Node]:
    """Those of `others` that have a convolution or linear layer before them, and no layer of any kind behind them."""
    convolving = {n for n in network.graph.nodes if n.op == "call_module" and _role(n, layers) in CONVOLUTIONS}
    found = set()
    for node in others:
        above, below = _reached(node, lambda n: n.all_input_nodes), _reached(node, lambda n: list(n.users))
        if above & convolving and not below & (convolving | others):
            found.add(node)
    return found


def _role(node: fx.Node, layers: Mapping[str, Layer]) -> str:
    return layers[str(node.target)].role if node.target in layers else ""


def _reached(node: fx.Node, beside: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = beside(node)
    while todo:
        at = todo.pop()
        if at not in seen:
            seen.add(at)
            todo = [*todo, *beside(at)]
    return seen


def _smaller_branch(branches: list[int], binary: int) -> int:
    """The convolutions that only the smaller of two joined branches has; none when either has none of its own."""
    found = 0
    for i, one in enumerate(branches):
        for other in branches[i + 1 :]:
            mine, theirs = one & ~other, other & ~one
            if not mine or not theirs:
                continue
            sizes = [((side & binary).bit_count(), side.bit_count()) for side in (mine, theirs)]
            if sizes[0] != sizes[1]:
                found |= mine if sizes[0] < sizes[1] else theirs
    return found
