"""Schedules: every epoch's value against the closed formula, written in place into networks and Rep networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from networks import transformed

from repbnn_cli import zoo
from repbnn_cli.binary_conv import BinaryConv2d, IRConv2d, RBNNConv2d, ReCUConv2d
from repbnn_cli.rep_layers import RepBconv2d
from repbnn_cli.train import schedules
from repbnn_cli.train.schedules import Binarization, LearningRate, learning_rate

EPOCHS = 40


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_learning_rates_are_the_formulas(epoch: int) -> None:
    cosine = 0.1 * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))
    assert learning_rate("cosine", epoch, EPOCHS, lr=0.1) == pytest.approx(cosine, rel=1e-12)
    assert learning_rate("linear", epoch, EPOCHS, lr=0.1) == pytest.approx(0.1 * (1 - epoch / EPOCHS), rel=1e-12)
    step = 0.1 if epoch < 10 else 0.01 if epoch < 30 else 0.001
    assert learning_rate("step", epoch, EPOCHS, lr=0.1, milestones=(10, 30)) == pytest.approx(step, rel=1e-12)


def test_warm_up_rises_linearly_to_the_full_rate_and_then_the_schedule_starts_at_its_beginning() -> None:
    rates = [learning_rate("cosine", e, EPOCHS, lr=0.1, warmup=5) for e in range(EPOCHS)]
    assert rates[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert rates[6:] == pytest.approx([0.05 * (1 + math.cos(math.pi * (e - 5) / 35)) for e in range(6, EPOCHS)])
    assert learning_rate("linear", 0, 3, lr=0.1, warmup=0.3) == pytest.approx(0.1)  # a part of an epoch: never above lr


def test_the_learning_rate_is_one_tensor_that_is_filled() -> None:
    rate = LearningRate(torch.device("cpu"))
    value = rate.value
    rate.set(0.25)
    assert rate.value is value
    assert float(value) == rate.current == 0.25


@pytest.mark.parametrize(
    ("name", "arch", "low"), [("ede", "irnet_resnet20", 1e-3), ("rbnn", "rbnn_resnet20_bireal", 1e-2)]
)
def test_t_and_k_rise_log_linearly_in_every_convolution(name: str, arch: str, low: float) -> None:
    network = zoo.build(arch)
    convs = [m for m in network.modules() if isinstance(m, BinaryConv2d)]
    tensors = [(conv.t, conv.k) for conv in convs]
    schedule = Binarization(name, network)
    assert schedule.convs == convs
    for epoch in range(EPOCHS):
        values = schedule.set(epoch, EPOCHS)
        t = low * (10 / low) ** (epoch / EPOCHS)
        assert values == pytest.approx({"t": t, "k": max(1 / t, 1.0)}, rel=1e-9)
        for conv, (t_tensor, k_tensor) in zip(convs, tensors, strict=True):
            assert conv.t is t_tensor
            assert conv.k is k_tensor
            assert float(conv.t) == pytest.approx(t, rel=1e-6)
            assert float(conv.k) == pytest.approx(max(1 / t, 1.0), rel=1e-6)


def test_tau_rises_exponentially_in_every_convolution() -> None:
    network = zoo.build("recu_resnet20")
    schedule = Binarization("recu", network)
    a = 0.14 / (math.e - 1)
    for epoch in range(EPOCHS):
        tau = 0.85 - a + a * math.exp(epoch / EPOCHS)
        assert schedule.set(epoch, EPOCHS) == pytest.approx({"tau": tau}, rel=1e-12)
        for conv in schedule.convs:
            assert float(conv.tau) == pytest.approx(tau, rel=1e-6)
    assert schedules.recu_tau(0, EPOCHS) == pytest.approx(0.85)
    assert schedules.recu_tau(EPOCHS, EPOCHS) == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("name", "arch", "kind"),
    [("ede", "irnet_resnet20", IRConv2d), ("rbnn", "rbnn_resnet20", RBNNConv2d), ("recu", "recu_resnet20", ReCUConv2d)],
)
def test_a_rep_network_is_driven_like_its_source(name: str, arch: str, kind: type[BinaryConv2d]) -> None:
    _, rep = transformed(zoo.build(arch).eval(), (3, 32, 32))
    schedule = Binarization(name, rep)
    assert len(schedule.convs) == 18
    assert all(isinstance(conv, kind) and isinstance(conv, RepBconv2d) for conv in schedule.convs)
    schedule.set(3, 7)
    key = "tau" if name == "recu" else "t"
    assert len({float(getattr(conv, key)) for conv in schedule.convs}) == 1
    assert schedule.notes() == []


def test_rotation_in_batches_is_that_of_each_convolution() -> None:
    torch.manual_seed(0)
    convs = [RBNNConv2d(i, o, 3) for i, o in ((8, 8), (8, 8), (8, 16), (16, 16), (16, 16))]
    alone = copy.deepcopy(convs)
    schedules.rotate(convs)
    for conv, other in zip(convs, alone, strict=True):
        other.rotate_()
        torch.testing.assert_close(conv.R1, other.R1, rtol=0, atol=2e-4)
        torch.testing.assert_close(conv.R2, other.R2, rtol=0, atol=2e-4)
        torch.testing.assert_close(conv.R2 @ conv.R2.t(), torch.eye(len(conv.R2)), rtol=0, atol=1e-4)


def test_a_schedule_that_does_not_fit_is_told() -> None:
    network = zoo.build("recu_resnet20")
    schedule = Binarization("ede", network)
    assert schedule.set(0, 10) == {}
    assert schedule.notes() == [
        "the recipe's schedule ede has nothing to drive: the network has no IRConv2d",
        "18 convolutions (ReCUConv2d) keep t, k or τ: binarization is ede",
    ]
    assert Binarization("none", zoo.build("resnet20")).notes() == []
