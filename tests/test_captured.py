"""Recording a step: static inputs, warm-up calls that count, replays. A GPU's graphs are replaced by ones of calls.

The real recording needs a GPU and is not run here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_examples import recipe, tiny, toy

from repbnn_cli.binary_conv import IRConv2d, RBNNConv2d
from repbnn_cli.data.batches import Batches
from repbnn_cli.train.captured import WARM_UP, Captured, CudaGraphs
from repbnn_cli.train.schedules import Binarization
from repbnn_cli.train.steps import Step, averaged, optimizer_for


class Calls(CudaGraphs):
    """Replays by calling again. As a GPU does it, recording computes nothing, and outputs are overwritten in place."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def aside(self, run: Callable[[], Any]) -> Any:
        self.log.append("aside")
        return run()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.log.append("record")
        output = torch.empty(2)

        def replay() -> None:
            self.log.append("replay")
            found = run()
            if found is not None:
                output.copy_(found)

        return replay, output


def test_every_call_counts_once_and_sees_its_own_input() -> None:
    graphs, seen = Calls(), []

    def double(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return 2 * x

    captured = Captured(double, graphs)
    given = [torch.tensor([float(n), n + 0.5]) for n in range(6)]
    outputs = [captured(x).clone() for x in given]
    assert all(torch.equal(x, y) for x, y in zip(given, seen, strict=True))
    assert all(torch.equal(2 * x, y) for x, y in zip(given, outputs, strict=True))
    assert graphs.log == ["aside"] * WARM_UP + ["record"] + ["replay"] * (6 - WARM_UP)
    assert captured(given[0]) is captured(given[1])  # one output, overwritten


def test_other_shapes_are_computed_as_they_are() -> None:
    graphs = Calls()
    captured = Captured(lambda x: 2 * x, graphs)
    captured(torch.ones(2))
    assert torch.equal(captured(torch.ones(3)), torch.full((3,), 2.0))
    assert graphs.log == ["aside"]


@pytest.mark.parametrize("optimizer", ["{name: sgd, lr: 0.05}", "{name: adam, lr: 1e-2}"])
def test_a_recorded_step_is_the_step(optimizer: str) -> None:
    """Two networks, one by plain steps, one by recorded ones; learning rate and t change between them."""
    stage = recipe(f"optimizer={optimizer}", "ema=0.9", "accumulate=2").stages[0]
    networks, finals = [tiny(seed=1)], []
    networks[0].drop.p = 0.0  # random numbers go on in the second network
    networks.append(copy.deepcopy(networks[0]))
    for network, recorded in zip(networks, (False, True), strict=True):
        lr, totals = torch.tensor(0.0), torch.zeros(3, dtype=torch.float64)
        ema = {name: tensor.clone() for name, tensor in averaged(network).items()}
        step = Step(network, stage, optimizer_for(network, stage, lr), totals, ema=ema)
        taken = Captured(step, Calls()) if recorded else step
        schedule = Binarization("ede", network)
        for epoch in range(3):
            schedule.set(epoch, 3)
            lr.fill_(0.1 / (epoch + 1))
            for images, labels in Batches(toy().train, 16, seed=0).epoch(epoch):
                taken(images, labels)
        finals.append({**network.state_dict(), **{f"ema {n}": t for n, t in ema.items()}, "totals": totals})
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    assert finals[0]["totals"][2] == 3 * 64
    assert all(bool(torch.isfinite(tensor).all()) for tensor in finals[0].values())


def test_schedules_live_on_the_device_that_records_them() -> None:
    network = nn.Sequential(IRConv2d(2, 2, 3), RBNNConv2d(2, 2, 3))
    Binarization("ede", network, "meta")
    assert all(tensor.is_meta for conv in network for tensor in (conv.t, conv.k))
