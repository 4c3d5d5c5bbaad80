"""Batches that hold several images a sample, factors in any order, and writes into parts of a tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from idiom_networks import Net, Sign, conv, generic, refusal, transformed
from merged_reference import assert_identical, both
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import graph, rules, surgery
from repbnn_cli.binary_conv import SignConv2d

# ---------------------------------------------------------------------------------------------------------------------
# Two images through one backbone


class Pair(Net):
    """Two images become one batch, and two halves again."""

    width = 8

    def build(self) -> None:
        self.conv, self.bn = conv(), nn.BatchNorm2d(8)
        self.join, self.bn2 = conv(16, 8), nn.BatchNorm2d(8)

    def halves(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        raise TypeError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        z = self.bn0(self.stem(torch.cat([x, y], dim=0)))
        one, other = self.halves(self.bn(self.conv(z)) + z, x.shape[0])
        return self.fc(self.bn2(self.join(torch.cat((one, other), 1))).mean((2, 3)))


HALVES: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "chunk": lambda x, n: x.chunk(2),
    "chunk, keyword": lambda x, n: torch.chunk(x, chunks=2, dim=0),
    "split": lambda x, n: torch.split(x, [n, n], dim=0),
    "slices": lambda x, n: (x[:n], x[n:]),
    "slices of all axes": lambda x, n: (x[:n, :, :], x[n:, :, :]),
    "narrow": lambda x, n: (x.narrow(0, 0, n), x.narrow(0, n, n)),
    "negative axis": lambda x, n: torch.split(x, (n, n), -4),
    "strides": lambda x, n: (x[::2], x[1::2]),
    "put together again": lambda x, n: torch.cat((x[n:], x[:n])).chunk(2),
}


@pytest.mark.parametrize("name", HALVES)
def test_two_images_of_a_sample_in_one_batch(name: str) -> None:
    kind = type("Halves", (Pair,), {"halves": lambda self, x, n: HALVES[name](x, n)})
    plan = transformed(kind, shape=((3, 8, 8), (3, 8, 8)))
    assert [e.path for e in plan.edits if e.action == "rep_conv"] == ["conv", "join"]


# ---------------------------------------------------------------------------------------------------------------------
# XNOR-Net: a convolution times the mean of its inputs' magnitudes, K, times that of its filters, a


class Xnor(Net):
    """`product` says in which order; behind it another convolution."""

    def build(self) -> None:
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.bn = conv(), nn.BatchNorm2d(8)

    def product(self, y: Tensor, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
        raise TypeError

    def body(self, x: Tensor) -> Tensor:
        k = F.avg_pool2d(x.abs().mean(1, keepdim=True), 3, 1, 1)
        w = self.conv1.weight
        a, b = w.abs().mean((1, 2, 3)).view(1, -1, 1, 1), self.conv1.bias[None, :, None, None]
        y = F.conv2d(Sign.apply(x), Sign.apply(w), None, 1, 1)
        return self.bn(self.conv(self.bn1(self.product(y, k, a, b)) + x))


ORDERS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "y a K": lambda y, k, a, b: y * a * k,
    "y K a": lambda y, k, a, b: y * k * a,
    "y (a K)": lambda y, k, a, b: y * (a * k),
    "y (K a)": lambda y, k, a, b: k * a * y,
    "y (a K), a first": lambda y, k, a, b: (a * k) * y,
    "y K a + b": lambda y, k, a, b: y * k * a + b,
    "y a + b": lambda y, k, a, b: y * a + b,
}


@pytest.mark.parametrize("beta", [2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_factors_of_filters_and_of_inputs_in_any_order(order: str, beta: int) -> None:
    kind = type("Ordered", (Xnor,), {"product": lambda self, *given: ORDERS[order](*given)})
    plan = transformed(kind, beta=beta)
    assert [e.action for e in plan.edits].count("rep_conv") == 2


# ---------------------------------------------------------------------------------------------------------------------
# Operators of one replica, and casts


class Doubled(Net):
    """Each channel twice, by a method that no table knows."""

    width = 16

    def build(self) -> None:
        self.conv, self.bn = conv(8, 16), nn.BatchNorm2d(16)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x.repeat_interleave(2, dim=1)


class CastSlope(Net):
    """A slope that takes its dtype from the activations it meets, where replicas are samples."""

    def build(self) -> None:
        self.conv, self.bn, self.gate = conv(), nn.BatchNorm2d(8), nn.Linear(8, 16)

    def body(self, x: Tensor) -> Tensor:
        scale, shift = self.gate(x.mean((2, 3))).chunk(2, 1)
        y = self.bn(self.conv(x)) * (1 + scale[..., None, None]) + shift[:, :, None, None]
        return x + F.prelu(y, torch.tensor(0.2).to(y)) + torch.tensor(0.1).type_as(x)


@pytest.mark.parametrize("kind", [Doubled, CastSlope])
def test_operators_by_trial_and_casts(kind: type[nn.Module]) -> None:
    plan = transformed(kind)
    assert "conv" in [e.path for e in plan.edits if e.action == "rep_conv"]


# ---------------------------------------------------------------------------------------------------------------------
# Writes into parts


class Improved(Net):
    """MeliusNet: the last channels of a tensor are improved by a convolution."""

    def build(self) -> None:
        self.conv, self.bn, self.last = conv(8, 4), nn.BatchNorm2d(4), conv()

    def improve(self, x: Tensor, r: Tensor) -> Tensor:
        raise TypeError

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.improve(x.clone(), self.bn(self.conv(x))))


def by_narrow(x: Tensor, r: Tensor) -> Tensor:
    x.narrow(1, 4, 4).add_(r)
    return x


def by_slice(x: Tensor, r: Tensor) -> Tensor:
    x[:, 4:] += r
    return x


def by_method_of_slice(x: Tensor, r: Tensor) -> Tensor:
    x[:, 4:, :, :].add_(r)
    return x


def by_assignment(x: Tensor, r: Tensor) -> Tensor:
    x[:, 4:, ...] = x[:, 4:, ...] + r
    return x


def by_chunk(x: Tensor, r: Tensor) -> Tensor:
    x.narrow(1, 0, 8).narrow(1, 4, 4).mul_(0.5).add_(r)
    return x


def twice(x: Tensor, r: Tensor) -> Tensor:
    x[:, 4:] += r
    x[:, :4] -= r
    x[:, ::2, 1:] = 0.25
    return x


def into_zeros(x: Tensor, r: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :4] = x[:, 4:]
    out[:, 4:, ::2] = r[:, :, ::2]
    return out


def by_halves(x: Tensor, r: Tensor) -> Tensor:
    one, other = x[:, :4], x[:, 4:]
    other += r
    return torch.cat((one, other), 1)


WRITES = [by_narrow, by_slice, by_method_of_slice, by_assignment, by_chunk, twice, into_zeros, by_halves]


@pytest.mark.parametrize("improve", WRITES)
def test_writes_into_parts(improve: Callable[[Tensor, Tensor], Tensor]) -> None:
    kind = type("Written", (Improved,), {"improve": lambda self, x, r: improve(x, r)})
    assert [e.path for e in transformed(kind).edits if e.action == "rep_conv"] == ["conv", "last"]


@pytest.mark.parametrize("improve", WRITES)
def test_writes_into_parts_against_the_second_reference(improve: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Written(Improved):
        def build(self) -> None:
            self.conv, self.bn = SignConv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.last = SignConv2d(8, 8, 3, padding=1)

        def improve(self, x: Tensor, r: Tensor) -> Tensor:
            return improve(x, r)

    torch.manual_seed(0)
    source = generic(Written())
    rep = surgery.apply(surgery.plan(graph.capture(source, (3, 8, 8)), rules.load("reptran")))
    actual, expected, merged = both(source, rep, torch.randn(3, 3, 8, 8))
    assert_identical(actual, expected)
    assert set(merged) >= {"conv", "last", "fc"}


def with_a_view(x: Tensor, r: Tensor) -> Tensor:
    whole = x.view(x.shape[0], 8, -1)
    x[:, 4:] += r
    return x + whole.view_as(x)


def with_a_part(x: Tensor, r: Tensor) -> Tensor:
    before = x[:, :4]
    x.narrow(1, 0, 4).add_(r)
    return torch.cat((before, x[:, 4:]), 1)


@pytest.mark.parametrize("improve", [with_a_view, with_a_part])
def test_a_write_that_others_in_the_same_memory_see_is_refused(improve: Callable[[Tensor, Tensor], Tensor]) -> None:
    message = refusal(type("Written", (Improved,), {"improve": lambda self, x, r: improve(x, r)}))
    assert "writes into an expanded tensor, or others in its memory" in message
    assert "torch.cat((x[:, :k], x[:, k:] + y), 1)" in message


def by_row(x: Tensor, r: Tensor) -> Tensor:
    x[0] = 0
    return torch.cat((x[:, :4], x[:, 4:] + r), 1)


def by_rows(x: Tensor, r: Tensor) -> Tensor:
    x[: x.shape[0] // 2] += 1
    return torch.cat((x[:, :4], x[:, 4:] + r), 1)


@pytest.mark.parametrize("improve", [by_row, by_rows])
def test_a_write_into_some_samples_is_refused(improve: Callable[[Tensor, Tensor], Tensor]) -> None:
    message = refusal(type("Written", (Improved,), {"improve": lambda self, x, r: improve(x, r)}))
    assert "writes into an expanded tensor" in message


def dropped(x: Tensor, r: Tensor) -> Tensor:
    F.relu(x[:, 4:], inplace=True)
    return torch.cat((x[:, :4], x[:, 4:] + r), 1)


def out_of(x: Tensor, r: Tensor) -> Tensor:
    y = x.clone()
    torch.neg(x, out=y)
    return torch.cat((y[:, :4], y[:, 4:] + r), 1)


@pytest.mark.parametrize(
    ("improve", "message"),
    [
        (dropped, "relu works in place, and its result is dropped; go on with its result"),
        (out_of, "neg writes into what `out` names; go on with its result"),
    ],
)
def test_a_write_that_no_edge_shows_is_refused(improve: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    kind = type("Aside", (Improved,), {"improve": lambda self, x, r: improve(x, r)})
    assert message in refusal(kind)


class Untrainable(Net):
    """Autograd takes no write into one of several views; a run without gradients does."""

    def build(self) -> None:
        self.conv, self.bn = conv(8, 4), nn.BatchNorm2d(4)

    def body(self, x: Tensor) -> Tensor:
        one, other = torch.split(x, [4, 4], dim=1)
        other += self.bn(self.conv(x))
        return torch.cat((one, other), 1)


def test_a_network_that_cannot_be_trained_by_itself_is_told_so() -> None:
    message = refusal(Untrainable)
    assert "the network itself cannot be trained here" in message
    assert "test_idiom_batches.py" in message


class Overwritten(Untrainable):
    """Autograd notices in the backward that a value was written to which it still needs."""

    def body(self, x: Tensor) -> Tensor:
        y = torch.exp(self.bn(self.conv(x)))
        z = y * 2
        y += 1
        return torch.cat((y, z), 1)


def test_a_network_whose_backward_fails_is_told_so_without_a_line_of_this_tool() -> None:
    message = refusal(Overwritten)
    assert message.startswith("the network itself cannot be trained here")
    assert "modified by an inplace operation" in message
