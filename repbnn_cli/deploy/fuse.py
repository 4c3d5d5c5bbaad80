"""A captured network whose blocks run as one kernel each; every other node, tensor and name stays what it was.

Between two blocks only the packed signs travel where nobody else reads the values: the float tensor is then never
written. They travel without a ring (`signs_ring` of blocks.run), since several blocks with different padding may take
them: each pads the words that it takes with zeros, one small copy, and its border_sums make that exact zero padding.
The network that was given keeps its graph, and shares its modules with the fused one.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from repbnn_cli.deploy.folds import behind_elementwise
from repbnn_cli.deploy.forms import centre
from repbnn_cli.deploy.match import Match, Matches, match
from repbnn_cli.deploy.writes import Writes
from repbnn_cli.graph import KeptGraphModule, Network, bare
from repbnn_cli.kernels import Backend
from repbnn_cli.kernels.blocks import PackedBlock, run
from repbnn_cli.kernels.packing import count_zeros
from repbnn_cli.recognize import Layer

_FOLDER = "packed_blocks"


class FusedBlock(nn.Module):
    """A block as a module of the graph: forward(x, residual) → (values or None, packed signs or None).

    x: float activations, or the packed signs of the block before. The block is no part of the state dict: the modules
    that it was made from still hold the weights.
    zeros: while `counting`, how many of the values whose sign this block took were exactly 0 (+1 in packed bits, 0 in
    torch.sign); counting costs the memory traffic that fusing saves.
    """

    def __init__(self, found: Match, block: PackedBlock, backend: Backend, *, values: bool, signs: bool) -> None:
        super().__init__()
        self.path, self.call, self.parts, self.centred = found.path, found.call, found.parts, found.centred
        self.block, self.backend = block, backend
        self.values, self.signs = values, signs
        self.counting, self.zeros = False, 0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        if x.dtype != torch.int32:
            if self.centred:
                x = centre(x)
            if self.counting:
                self.zeros += int(count_zeros(x))
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        wanted = self.values or (self.signs and self.counting)
        values, signs = run(self.block, x, residual, backend=self.backend, values=wanted, signs=self.signs)
        if self.signs and self.counting and values is not None:
            shift = self.block.sign_shift
            self.zeros += int(count_zeros(values if shift is None else values + shift.view(-1, 1, 1)))
        return (values if self.values else None), signs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedBlock:
        # Only moves reach a block: its tensors are float32 and int32 by definition.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.block = self.block.to(fn(torch.empty(0)).device)
        return self

    def extra_repr(self) -> str:
        return f"{self.path}: {' + '.join(self.parts)}, {self.backend.name}"


@dataclass(frozen=True)
class Fused:
    """module: what runs; matches: which blocks it runs fused, and which binary convolutions it does not."""

    module: fx.GraphModule
    matches: Matches
    backend: Backend

    @property
    def blocks(self) -> tuple[FusedBlock, ...]:
        return tuple(m for m in self.module.modules() if isinstance(m, FusedBlock))

    def counting(self) -> fx.GraphModule:
        """The module, its blocks counting exact zeros from now on."""
        for block in self.blocks:
            block.counting = True
        return self.module


def fuse(network: Network, layers: Mapping[str, Layer], backend: Backend) -> Fused:
    """The network with every matching block fused; `layers` is what `recognize` says. In eval mode only."""
    if network.module.training:
        raise ValueError("fused blocks have BatchNorm folded: put the network into eval mode first")
    network = behind_elementwise(network)
    matches = match(network, layers)
    tree = bare(network.module, copy.copy)
    blocks = nn.ModuleList()
    tree.add_module(_FOLDER, blocks)
    graph = _Rewrite(network, matches, blocks, backend).graph_of(network.graph)
    module = KeptGraphModule(tree, graph, class_name=f"Fused{type(network.module).__name__}")
    graph.lint()
    module.recompile()
    return Fused(module.eval(), matches, backend)


@dataclass(frozen=True)
class _Signs:
    """Packed signs that a block hands on. of: the node whose signs they are, its last one or the RSign behind it;
    to: the first nodes of the blocks that take them; values: whether somebody reads the values as well."""

    of: fx.Node | None
    to: frozenset[fx.Node]
    values: bool


class _Rewrite:
    """One pass over the graph: a block is put where its last node was, all other nodes are copied."""

    def __init__(self, network: Network, matches: Matches, blocks: nn.ModuleList, backend: Backend) -> None:
        self.matches, self.blocks, self.backend = matches, blocks, backend
        self.writes = Writes(network)
        self.takers = {m.nodes[0]: m for m in matches.matched if not m.centred}
        self.plan = {m.last: self._signs_of(m) for m in matches.matched}
        self.new: dict[fx.Node, fx.Node] = {}
        self.packed: dict[fx.Node, fx.Node] = {}  # a block's first node → the packed signs that it takes
        self.graph = fx.Graph()

    def graph_of(self, old: fx.Graph) -> fx.Graph:
        ends = {m.last: m for m in self.matches.matched}
        inside = {n for m in self.matches.matched for n in m.nodes}
        gone = {s.of for s in self.plan.values() if s.of is not None and s.to == frozenset(s.of.users)} - set(ends)
        for node in old.nodes:
            if node in ends:
                self._block(ends[node])
            elif node not in inside and node not in gone:
                self.new[node] = self.graph.node_copy(node, lambda n: self.new[n])
        return self.graph

    def _signs_of(self, found: Match) -> _Signs:
        """One sort of signs per block: of the value as it is, or behind one RSign."""
        last = found.last
        for of in (last, *(u for u in last.users if u in self.matches.shifts)):
            takers = (u for u in of.users if u in self.takers)
            # Signs are those of the block's end: what is written into later has others.
            to = frozenset(u for u in takers if self.writes.between(last, u, (last, of)) is None)
            if to:
                served = to if of is last else {of} if to == frozenset(of.users) else set()
                return _Signs(of, to, values=bool(set(last.users) - served))
        return _Signs(None, frozenset(), values=True)

    def _block(self, found: Match) -> None:
        signs, name = self.plan[found.last], f"{_FOLDER}.{len(self.blocks)}"
        block = found.block
        if signs.of is not None and signs.of is not found.last:
            block = replace(block, sign_shift=self.matches.shifts[signs.of])
        self.blocks.append(
            FusedBlock(found, block, self.backend, values=signs.values, signs=signs.of is not None)
        )  # fmt: skip
        given = self.packed.get(found.nodes[0]) or self.new[found.input]
        operands = (given,) if found.residual is None else (given, self.new[found.residual])
        both = self.graph.call_module(name, operands)
        if signs.values:
            self.new[found.last] = self.graph.call_function(operator.getitem, (both, 0))
            self.new[found.last].meta = dict(found.last.meta)
        if signs.of is not None:
            words = self.graph.call_function(operator.getitem, (both, 1))
            self.packed |= dict.fromkeys(signs.to, words)
