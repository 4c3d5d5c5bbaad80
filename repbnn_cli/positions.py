"""Where each convolution and linear layer stands in the network: first, trunk, bypass or last (RepTran, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from repbnn_cli.channels import operator_name
from repbnn_cli.graph import Network
from repbnn_cli.recognize import CONVOLUTIONS, Layer

_JOINS = ("add", "sub", "cat", "concat", "concatenate", "radd", "stack")


def holds_tensor(value: Any) -> bool:
    """A tensor, or a tuple or list with one in it; sizes and other numbers are not."""
    if isinstance(value, tuple | list):
        return any(holds_tensor(v) for v in value)
    return isinstance(value, Tensor)


def positions(network: Network, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Module path → position, for every convolution and linear layer.

    first: none comes before it; last: none comes after it; bypass: on the branch of a sum or concatenation that has
    fewer binary convolutions (then fewer convolutions) than the branch beside it; trunk: all others.
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
    with_successor = 0
    for above in after.values():
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
