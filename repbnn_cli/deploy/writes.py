"""Where a graph writes into its tensors: what is computed at another place than before must not see other values."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from repbnn_cli.graph import Network
from repbnn_cli.profiler.liveness import owners, written_by


class Writes:
    """The writes of a graph, to be asked about the tensors that they change."""

    def __init__(self, network: Network) -> None:
        self._owner = owners(network)
        self._at = {node: i for i, node in enumerate(network.graph.nodes)}
        self._written = {n: into for n in network.graph.nodes if (into := written_by(network, n)) is not None}

    def between(
        self, first: fx.Node, last: fx.Node, read: Iterable[fx.Node], own: Collection[fx.Node] = ()
    ) -> fx.Node | None:
        """What is written into behind one node and before another, in memory that `read` lies in too; None if nothing.

        own: nodes whose writes do not count.
        """
        memory = {self._owner[n] for n in read}
        for node, into in self._written.items():
            inside = self._at[first] < self._at[node] < self._at[last]
            if inside and node not in own and self._owner[into] in memory:
                return into
        return None

    def ever(self, node: fx.Node) -> bool:
        """Whether anything is written into the memory that the value of a node lies in."""
        return any(self._owner[into] is self._owner[node] for into in self._written.values())
