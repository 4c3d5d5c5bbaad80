"""Peak memory of activations: which tensors of a graph are alive together, from shapes alone.

A tensor lives from the node that makes it to the last node that uses it or a view of it. Views and results of in-place
operations share the memory of their source; reshapes are taken to be views. Parameters, and what is computed from them
alone, are no activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from repbnn_cli.graph import Network
from repbnn_cli.graph.proxies import is_write
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.positions import holds_tensor
from repbnn_cli.profiler.counting import name_of, names
from repbnn_cli.rep_layers import ChannelSelect

VIEWS = names(
    """
    getattr getitem view view_as reshape reshape_as flatten unflatten permute transpose swapaxes movedim t chunk split
    tensor_split narrow select unsqueeze squeeze expand expand_as broadcast_to unbind diagonal contiguous detach to type
    float identity requires_grad dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout setitem
    repbnn.set_data repbnn.fold repbnn.unfold repbnn._with_ndim
    """
)
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_FLOAT_BYTES = 4  # activations are float32, whatever the weights are stored in


@dataclass(frozen=True)
class Peak:
    """bytes: the most that is alive at once, per input; node and path: while which call."""

    bytes: int
    node: str
    path: str


def from_input(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value depends on an input; the others depend on parameters and constants alone."""
    live: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in live for n in node.all_input_nodes):
            live.add(node)
    return live


def peak_memory(network: Network, live: set[fx.Node]) -> Peak:
    """The node during which most bytes are alive: its inputs, its result, and what later nodes still need."""
    nodes = list(network.graph.nodes)
    owner = owners(network)
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            last[owner[used]] = position
    ending: dict[int, list[fx.Node]] = {}
    for node, position in last.items():
        ending.setdefault(position, []).append(node)
    alive, peak = 0, Peak(0, "", "")
    sizes: dict[fx.Node, int] = {}
    for position, node in enumerate(nodes):
        if owner[node] is node and node in live and node.op != "output" and holds_tensor(node.meta["value"]):
            sizes[node] = _bytes(node.meta["value"]) // network.batch
            alive += sizes[node]
        if alive > peak.bytes:
            path = str(node.target) if node.op == "call_module" else node.meta.get("path", "")
            peak = Peak(alive, node.name, path)
        alive -= sum(sizes.get(done, 0) for done in ending.get(position, ()))
    return peak


def owners(network: Network) -> dict[fx.Node, fx.Node]:
    """Each node → the one that made the memory which its result lies in."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in network.graph.nodes:
        source = _shares_with(network, node)
        owner[node] = node if source is None else owner[source]
    return owner


def written_by(network: Network, node: fx.Node) -> fx.Node | None:
    """The operand whose values a node changes, if any."""
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    if node.op == "call_module":
        writes = getattr(fetch(network.module, str(node.target)), "inplace", False) is True
    else:
        writes = is_write(node) or node.kwargs.get("inplace") is True
    return _first_operand(node) if writes else None


def _shares_with(network: Network, node: fx.Node) -> fx.Node | None:
    """The node whose memory the result lies in, if any."""
    first = _first_operand(node)
    if first is None or not holds_tensor(first.meta["value"]):
        return None
    if written := written_by(network, node):
        return written
    if node.op == "call_module":
        module: Any = fetch(network.module, str(node.target))
        view = type(module) in _VIEW_MODULES or (isinstance(module, ChannelSelect) and module.prefix)
        return first if view else None
    return first if node.op in ("call_function", "call_method") and name_of(node) in VIEWS else None


def _first_operand(node: fx.Node) -> fx.Node | None:
    return next((a for a in node.args if isinstance(a, fx.Node)), None)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * (_FLOAT_BYTES if value.is_floating_point() else value.element_size())
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0
