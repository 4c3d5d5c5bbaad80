"""Where the samples of a batch are in the tensors of a forward: found by changing one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from repbnn_cli.graph import Network, random_inputs
from repbnn_cli.restoring import unchanged


def rows_per_sample(network: Network) -> dict[fx.Node, int]:
    """Node → rows of axis 0 that belong to one sample, for each tensor in which those of a sample lie together.

    Attention in windows makes (N·W, T, C) of (N, H, W, C). A transposed sequence (T, N, C) is none of these.
    """
    one, other = (random_inputs(network.module, network.example, seed=seed) for seed in (0, 1))
    changed = [torch.cat([b[:1], a[1:]]) for a, b in zip(one, other, strict=True)]
    with unchanged(network.module), torch.no_grad():
        network.module.eval()
        before, after = (_Rows(network).values_of(inputs) for inputs in (one, changed))
    rows = {node: len(value) // network.batch for node, value in before.items()}
    return {
        node: n
        for node, n in rows.items()
        if torch.equal(before[node][n:], after[node][n:]) and not torch.equal(before[node][:n], after[node][:n])
    }


class _Rows(fx.Interpreter):
    """Keeps the tensors whose first axis holds several rows for each sample."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.module)
        self.batch = network.batch
        self.kept: dict[fx.Node, Tensor] = {}

    def values_of(self, inputs: list[Tensor]) -> dict[fx.Node, Tensor]:
        self.run(*(x.clone() for x in inputs))
        return self.kept

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) > self.batch and len(value) % self.batch == 0:
            self.kept[n] = value.clone()
        return value
