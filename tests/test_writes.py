"""Writes as edges: a graph computes the same when it is run out of order, and no value in it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import conv, randomize, transformed
from torch import Tensor, fx, nn
from torch.nn import functional as F

from repbnn_cli import graph
from repbnn_cli.train import reconstruct
from repbnn_cli.train.writes import Edges, WriteError, as_edges
from repbnn_cli.verify.lockstep import tensors_of

Form = Callable[["Net", Tensor, Tensor], Tensor]


class Net(nn.Module):
    """A stem, two binary convolutions, and between them what `form` makes of the stem's output and the first one's."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8), conv(8, 8), nn.BatchNorm2d(8)
        self.fc, self.relu, self.same, self.form = nn.Linear(8, 5), nn.ReLU(inplace=True), nn.Identity(), form

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn(self.stem(x)))
        y = self.form(self, x, self.bn1(self.conv1(x)))
        y = F.hardtanh(self.bn2(self.conv2(y)) + y)
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))


def joined(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat((x, y), 1)


def narrow(_: Net, x: Tensor, y: Tensor) -> Tensor:
    y.narrow(1, 4, 4).add_(x.narrow(1, 0, 4))
    return y


def part(_: Net, x: Tensor, y: Tensor) -> Tensor:
    y[:, 4:] += x[:, :4]
    return y


def assignment(_: Net, x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    z[:, :4], z[:, 4:, ::2] = x[:, 4:], y[:, :4, ::2]
    return z


def part_of_part(_: Net, x: Tensor, y: Tensor) -> Tensor:
    half = y[:, 2:].narrow(1, 2, 4)
    half += x[:, :4]
    half *= 0.5
    return y


def module(net: Net, x: Tensor, y: Tensor) -> Tensor:
    net.relu(y)
    return y + x


def module_of_part(net: Net, x: Tensor, y: Tensor) -> Tensor:
    net.relu(y[:, 4:])
    return y + x


def chunks(_: Net, x: Tensor, y: Tensor) -> Tensor:
    one, other = y.chunk(2, 1)
    summed, _ = one + x[:, 4:], other.mul_(0.5)
    return joined(summed, other)


def before_and_after(_: Net, x: Tensor, y: Tensor) -> Tensor:
    before = y * 1.0
    y[:, :4] = 0.25
    return y + before


# Each with what it computes, written without a write.
FORMS: dict[Form, Form] = {
    narrow: lambda _, x, y: joined(y[:, :4], y[:, 4:] + x[:, :4]),
    part: lambda _, x, y: joined(y[:, :4], y[:, 4:] + x[:, :4]),
    assignment: lambda _, x, y: joined(x[:, 4:], F.pad(y[:, :4, ::2].unsqueeze(3), (0, 0, 0, 1)).flatten(2, 3)),
    part_of_part: lambda _, x, y: joined(y[:, :4], (y[:, 4:] + x[:, :4]) * 0.5),
    module: lambda _, x, y: y.relu() + x,
    module_of_part: lambda _, x, y: joined(y[:, :4], y[:, 4:].relu()) + x,
    chunks: lambda _, x, y: joined(y[:, :4] + x[:, 4:], y[:, 4:] * 0.5),
    before_and_after: lambda _, x, y: joined(torch.full_like(y[:, :4], 0.25), y[:, 4:]) + y * 1.0,
}


def alias(net: Net, x: Tensor, y: Tensor) -> Tensor:
    z = net.same(y)
    z += x
    return y


def view(_: Net, x: Tensor, y: Tensor) -> Tensor:
    y.view(y.shape[0], -1).clamp_(min=0)
    return y + x


def data(_: Net, x: Tensor, y: Tensor) -> Tensor:
    y.data.mul_(0.5)
    y.data = y.data + x
    return y


def twice(_: Net, x: Tensor, y: Tensor) -> Tensor:
    whole, half = y.flatten(2), y[:, 4:]
    half += x[:, :4]
    y.mul_(2)
    whole -= 1
    return joined(y[:, :4], half) + y


def one_after_another(_: Net, x: Tensor, y: Tensor) -> Tensor:
    y[:, 4:] += x[:, :4]
    first = y[:, :4]
    y[:, 2:] *= 2
    first -= x[:, 4:]
    return y


REFUSED = (twice, one_after_another)  # by a transform


def lazily(edges: Edges, root: nn.Module, x: Tensor) -> Any:
    """The graph's outputs, each node run when it is first asked for, the last operand first; and no value changes."""
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in values:
            for used in reversed(node.all_input_nodes):
                value(used)
            before = {n: [t.clone() for t in tensors_of(v)] for n, v in values.items()}
            values[node] = x.clone() if node.op == "placeholder" else edges.run(root, node, value)
            for other, tensors in before.items():
                assert all(map(torch.equal, tensors, tensors_of(values[other]))), (node, other)
        return values[node]

    (output,) = edges.graph.find_nodes(op="output")
    return fx.map_arg(output.args[0], value)


@pytest.mark.parametrize("form", [*FORMS, alias, view, data, *REFUSED], ids=lambda form: form.__name__)
def test_a_graph_with_edges_for_writes_computes_the_same_in_another_order(form: Form) -> None:
    model = randomize(Net(form))
    source = graph.capture(model, (3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    networks = [(source.module, source.graph)]
    if form not in REFUSED:
        _, rep = transformed(model)
        assert isinstance(rep, fx.GraphModule)
        networks.append((rep.eval(), rep.graph))
    for root, written in networks:
        names = [node.name for node in written.nodes]
        with torch.no_grad():
            edges = as_edges(root, written, x[:2])
            torch.testing.assert_close(lazily(edges, root, x), root(x), rtol=0, atol=0)
        edges.graph.lint()
        assert [node.name for node in written.nodes] == names  # the graph itself stays as it is
        kept = [node.name for node in edges.graph.nodes if node.name in names]
        assert kept == [name for name in names if name in kept]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_networks_that_write_are_fitted_as_those_that_do_not(form: Form) -> None:
    found = []
    for spelling in (form, FORMS[form]):
        torch.manual_seed(0)
        plan, rep = transformed(randomize(Net(spelling)))
        assert isinstance(rep, fx.GraphModule)
        given = [torch.randn(16, 3, 8, 8) for _ in range(3)]
        kept, left = [x.clone() for x in given], []
        units = reconstruct.reconstruct(plan, rep, given, steps=10, on_left=lambda path, why, to=left: to.append(why))
        assert left == []
        assert all(map(torch.equal, given, kept))
        found.append({unit.path: (unit.before, unit.after) for unit in units})
        assert set(found[-1]) == {"conv1", "conv2", "fc"}
    for path in ("conv2", "fc"):
        assert found[0][path] == pytest.approx(found[1][path], rel=1e-3)


def broadcast(_: Net, x: Tensor, y: Tensor) -> Tensor:
    y[...] = x.mean((1, 2, 3), keepdim=True)
    return y


def number(_: Net, x: Tensor, y: Tensor) -> Tensor:
    y[...] = 0.5
    y[:, :4] = x[:, :4]
    return y


def part_before_data(_: Net, x: Tensor, y: Tensor) -> Tensor:
    half = y[:, :4]
    y.data = y.data + x
    half += 1
    return joined(half, y[:, 4:])


def shape(_: Net, x: Tensor, y: Tensor) -> Tensor:
    half = y[:, :4]
    y.unsqueeze_(1)
    y += 1
    return joined(half, y.squeeze(1)[:, 4:])


def index(_: Net, x: Tensor, y: Tensor) -> Tensor:
    at = (x.sum() * 0).long()
    one = y[:, at]
    at += 1
    one.add_(5)
    return y


def largest(_: Net, x: Tensor, y: Tensor) -> Tensor:
    most, _ = y.max(1, keepdim=True)
    most[:, :, :2] = 0
    return y * most


@pytest.mark.parametrize("form", [broadcast, number, part_before_data, shape, index, largest], ids=lambda f: f.__name__)
def test_what_is_followed_is_right_and_what_is_not_is_said(form: Form) -> None:
    source = graph.capture(randomize(Net(form)), (3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    try:
        edges = as_edges(source.module, source.graph, x[:2])
    except WriteError:
        assert form not in (broadcast, number)
        return
    with torch.no_grad():
        torch.testing.assert_close(lazily(edges, source.module, x), source.module(x), rtol=0, atol=0)


class Rewriting(nn.Conv2d):
    """BinaryNet's layer: the signs take the place of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x.data = x.data.sign()
        return super().forward(x)


def test_a_write_that_a_module_hides_is_noticed() -> None:
    class Hiding(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x, y: net.hidden(y) + y)
            self.hidden = Rewriting(8, 8, 1)

    source = graph.capture(randomize(Hiding()), (3, 8, 8), leaf=lambda path, _: path == "hidden" or None)
    with pytest.raises(WriteError, match="cannot be followed"):
        as_edges(source.module, source.graph, torch.randn(2, 3, 8, 8))


def test_parameters_are_written_to_as_ever() -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) * 3)

        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.clamp_(-1, 1)
            x = F.conv2d(x, self.weight)
            x += self.weight.mean()
            return x

    source = graph.capture(Clamped(), (3, 8, 8))
    before = source.module.weight.detach().clone()
    edges = as_edges(source.module, source.graph, torch.randn(2, 3, 8, 8))
    assert [node.name for node in edges.written] == ["iadd"]
    assert [node.name for node in edges.lasting] == ["clamp_"]
    assert torch.equal(source.module.weight, before)


def test_targets_are_those_behind_a_write_to_a_parameter() -> None:
    class Clamping(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x, y: y + x)

        def forward(self, x: Tensor) -> Tensor:
            self.fc.weight.data.clamp_(-0.01, 0.01)
            return super().forward(x)

    plan, rep = transformed(randomize(Clamping()))
    assert isinstance(rep, fx.GraphModule)
    given = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    (*_, last) = reconstruct.reconstruct(plan, rep, given, steps=0)
    with torch.no_grad():
        ours, theirs = (torch.cat([network(x) for x in given]) for network in (rep, plan.network.module.eval()))
    assert last.path == "fc"
    assert float((ours - theirs).square().mean() / theirs.var(correction=0)) == pytest.approx(last.after, rel=0.05)


class Halves(nn.Module):
    """Writes into what it takes, and gives something else."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return x + 1


def test_a_write_whose_result_nothing_shows_is_said() -> None:
    class Writing(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x, y: net.halves(y) + y)
            self.halves = Halves()

    model = randomize(Writing())
    source = graph.capture(model, (3, 8, 8), leaf=lambda path, _: path == "halves" or None)
    with pytest.raises(WriteError, match=r"^the network writes .* cannot be followed \(test_writes\.py:\d+\)$"):
        as_edges(source.module, source.graph, torch.randn(2, 3, 8, 8))
