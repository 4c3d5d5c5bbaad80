"""Layers that are no convolution module: products with a parameter, transposed convolutions, what ends a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import BConv, signs
from torch import Tensor, nn

from repbnn_cli import profiler, surgery
from repbnn_cli.channels import plain
from repbnn_cli.errors import RulesError, SurgeryError
from repbnn_cli.inherit import Columns, Kernel, Members
from repbnn_cli.plan import Plan
from repbnn_cli.recognize import recognize
from repbnn_cli.rules import RuleSet, load, loads
from repbnn_cli.source import Origin, capture
from repbnn_cli.verify import verify


class Net(nn.Module):
    """Stem, one binary convolution, and `end`. SHARED: kernel → the axis of its outputs."""

    SHARED: ClassVar[Mapping[str, int]] = {}

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.c1, self.n1 = BConv(c, c, 3, bias=False), nn.BatchNorm2d(c)
        self.setup(c)

    def setup(self, c: int) -> None:
        self.fc = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> object:
        x = self.n0(self.stem(x))
        return self.end(self.n1(self.c1(x)) + x)

    def end(self, x: Tensor) -> object:
        return self.fc(x.mean((2, 3)))


def made(network: type[Net]) -> Net:
    torch.manual_seed(1)
    net = network()
    for tensor in net.parameters():
        nn.init.normal_(tensor)
    return net.eval()


def planned(net: nn.Module, *, beta: int = 2, last_layer: str | None = None, rules: RuleSet | None = None) -> Plan:
    rules = (rules or load("reptran")).with_options(beta, None, last_layer)
    return surgery.plan(capture(net, Origin(None, "net", {}, None, ((3, 8, 8),)), rules), rules)


def actions(plan: Plan) -> dict[str, str]:
    return {e.path: e.action for e in plan.edits}


def check(network: type[Net], *, beta: int = 2, last_layer: str | None = None, rules: RuleSet | None = None) -> Plan:
    """The certificate passes, and where filters that share a channel are alike, the Rep network is the source.

    Its convolutions then give β times what the source's give, which BatchNorm on a batch's statistics takes away.
    """
    net = made(network)
    plan = planned(net, beta=beta, last_layer=last_layer, rules=rules)
    certificate = verify(net, plan, surgery.apply(plan).eval(), gradients=True)
    assert certificate.passed, str(certificate)
    with torch.no_grad():
        for name, axis in {"c1.weight": 0, **network.SHARED}.items():
            own = net.get_parameter(name)
            one = own.narrow(axis, 0, own.shape[axis] // beta)
            own.copy_(torch.cat([one] * beta, axis))
    net.double().train()
    plan = planned(net, beta=beta, last_layer=last_layer, rules=rules)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    rep = surgery.apply(plan).train()
    torch.testing.assert_close(rep(x), net(x), rtol=1e-4, atol=1e-5)
    return plan


class Products(Net):
    """x @ w with (I, O), square and not; mm with (O, I) turned; a scale per output; addmm."""

    SHARED: ClassVar = {"w1": 1, "w2": 1, "w3": 0, "scale": 1}

    def setup(self, c: int) -> None:
        self.w1, self.m1 = nn.Parameter(torch.empty(c, c)), nn.BatchNorm1d(c)
        self.w2, self.scale = nn.Parameter(torch.empty(c, 24)), nn.Parameter(torch.empty(1, 24))
        self.m2 = nn.BatchNorm1d(24)
        self.w3, self.m3 = nn.Parameter(torch.empty(32, 24)), nn.BatchNorm1d(32)
        self.w4, self.bias = nn.Parameter(torch.empty(32, 10)), nn.Parameter(torch.empty(10))

    def end(self, x: Tensor) -> object:
        x = self.m1(x.mean((2, 3)) @ self.w1)
        x = self.m2(signs(x).mm(signs(self.w2) * self.scale))
        x = self.m3(torch.matmul(signs(x), signs(self.w3).t()))
        return torch.addmm(self.bias, x, self.w4)


class Multiplier(nn.Module):
    def __init__(self, into: int, out: int, *, binary: bool = True) -> None:
        super().__init__()
        self.weight, self.binary = nn.Parameter(torch.empty(into, out)), binary

    def forward(self, x: Tensor) -> Tensor:
        return signs(x) @ signs(self.weight) if self.binary else x @ self.weight


class InModules(Net):
    SHARED: ClassVar = {"hidden.weight": 1}

    def setup(self, c: int) -> None:
        self.hidden, self.m, self.out = Multiplier(c, 32), nn.BatchNorm1d(32), Multiplier(32, 10, binary=False)

    def end(self, x: Tensor) -> object:
        return self.out(self.m(self.hidden(x.mean((2, 3)))))


class Patches(Net):
    """A binary convolution as im2col and a product."""

    SHARED: ClassVar = {"w": 0}

    def setup(self, c: int) -> None:
        self.w, self.m, self.fc = nn.Parameter(torch.empty(32, 9 * c)), nn.BatchNorm2d(32), nn.Linear(32, 10)

    def end(self, x: Tensor) -> object:
        y = torch.matmul(signs(self.w), F.unfold(signs(x), 3, padding=1))
        return self.fc(self.m(y.view(x.shape[0], -1, *x.shape[2:])).mean((2, 3)))


@pytest.mark.parametrize("last_layer", ["all", "1_over_beta"])
@pytest.mark.parametrize("beta", [2, 4])
@pytest.mark.parametrize("network", [Products, InModules, Patches])
def test_products_with_a_parameter_are_layers(network: type[Net], beta: int, last_layer: str) -> None:
    plan = check(network, beta=beta, last_layer=last_layer)
    found = actions(plan)
    assert "per_replica" not in found.values()
    wanted = {Products: (4, 1), InModules: (2, 1), Patches: (2, 1)}[network]
    assert [list(found.values()).count(a) for a in ("rep_conv", "select_inputs")] == list(wanted)


def test_the_parameters_of_products_keep_their_layout() -> None:
    plan = planned(made(Products), beta=2)
    rep = surgery.apply(plan)
    shapes = {n: tuple(t.shape) for n, t in rep.named_parameters() if n.startswith("w") or n in ("scale", "bias")}
    assert shapes == {"w1": (32, 8), "w2": (32, 12), "scale": (1, 12), "w3": (16, 48), "w4": (64, 10), "bias": (10,)}


@given(
    groups=st.integers(1, 4), into=st.integers(1, 5), beta=st.sampled_from([1, 2, 4]),
    taps=st.sampled_from([(), (2, 3)]), inherit=st.sampled_from(["fold", "reshape"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_kernel_stored_inputs_first_is_filled_like_one_stored_outputs_first(
    groups: int, into: int, beta: int, taps: tuple[int, ...], inherit: str, seed: int
) -> None:
    out = groups * beta
    kernel = torch.randn((out, into, *taps), generator=torch.Generator().manual_seed(seed))
    index = plain(into, beta)
    plain_one = Kernel(tuple(kernel.shape), Members(out, beta, inherit), index.index, index.replica)
    turned_one = replace(plain_one, inputs_first=True)
    turned = kernel.transpose(0, 1).contiguous()
    assert torch.equal(turned_one(turned), plain_one(kernel).transpose(0, 1))
    assert turned_one.result_shape(turned.shape) == tuple(turned_one(turned).shape)
    assert turned_one.made(turned, turned_one(turned))
    assert not turned_one.made(turned, turned_one(turned) + 1)
    columns = Columns(tuple((i,) for i in index.index), 1 / beta)
    assert torch.equal(replace(columns, axis=0)(turned), columns(kernel).transpose(0, 1))


def test_products_are_counted_as_what_they_are() -> None:
    network = capture(made(Products), Origin(None, "net", {}, None, ((3, 8, 8),)))
    layers = recognize(network)
    counted = profiler.profile(network, layers).totals
    assert counted.fc == 16 * 16 + 32 * 10
    assert counted.bconv == 16 * 16 * 9 * 64 + 16 * 24 + 24 * 32
    roles = {p: layer.role for p, layer in layers.items() if layer.called}
    assert list(roles.values()) == ["float_linear", "binary_linear", "binary_linear", "float_linear"]


def test_a_captured_product_is_the_product() -> None:
    net = made(Products)
    network = capture(net, Origin(None, "net", {}, None, ((3, 8, 8),)))
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(network.module(x), net(x))


def test_a_captured_product_learns_as_the_product_does() -> None:
    """Its gradient is added up in another order where it is a convolution of patches."""
    net = made(Patches).double()
    network = capture(net, Origin(None, "net", {}, None, ((3, 8, 8),)))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for module in (net, network.module):
        module.zero_grad()
        module(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) > 5
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


class Decoder(Net):
    """Transposed convolutions: in floats with a bias, binary with a scale per filter, and last."""

    SHARED: ClassVar = {"up1.weight": 1, "up2.weight": 1}

    def setup(self, c: int) -> None:
        self.up1, self.m1 = nn.ConvTranspose2d(c, 24, 2, 2), nn.BatchNorm2d(24)
        self.up2, self.m2 = BinaryUp(24, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.out = nn.ConvTranspose2d(16, 2, 3, 1, 1)

    def end(self, x: Tensor) -> object:
        return self.out(self.m2(self.up2(self.m1(self.up1(x)))))


class BinaryUp(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        scale = self.weight.abs().mean((0, 2, 3), keepdim=True)
        return F.conv_transpose2d(signs(x), signs(self.weight) * scale, None, self.stride, self.padding)


class Called(Net):
    """The same called as functions, with kernels of children and of the network's own."""

    SHARED: ClassVar = {"up1.weight": 1, "w": 1}

    def setup(self, c: int) -> None:
        self.up1, self.m1 = nn.ConvTranspose2d(c, 24, 2, 2), nn.BatchNorm2d(24)
        self.w, self.m2 = nn.Parameter(torch.empty(24, 16, 4, 4)), nn.BatchNorm2d(16)
        self.out = nn.ConvTranspose2d(16, 2, 3, 1, 1)

    def end(self, x: Tensor) -> object:
        x = self.m1(F.conv_transpose2d(x, self.up1.weight, self.up1.bias, stride=2))
        scale = self.w.abs().mean((0, 2, 3), keepdim=True)
        x = self.m2(F.conv_transpose2d(signs(x), signs(self.w) * scale, stride=2, padding=1))
        return F.conv_transpose2d(x, self.out.weight, self.out.bias, 1, 1)


@pytest.mark.parametrize("last_layer", ["all", "1_over_beta"])
@pytest.mark.parametrize("beta", [2, 4])
def test_transposed_convolutions_that_are_called_as_functions(beta: int, last_layer: str) -> None:
    plan = check(Called, beta=beta, last_layer=last_layer)
    calls = {path: (layer.role, actions(plan)[path]) for path, layer in plan.layers.items() if layer.called}
    assert list(calls.values()) == [
        ("float_conv", "rep_conv"), ("binary_conv", "rep_conv"), ("float_conv", "select_inputs")
    ]  # fmt: skip
    rep = surgery.apply(plan)
    assert tuple(rep.get_parameter("up1.weight").shape) == (16 * beta, 24 // beta, 2, 2)
    assert tuple(rep.get_parameter("w").shape) == (24 * beta, 16 // beta, 4, 4)


@pytest.mark.parametrize("last_layer", ["all", "1_over_beta"])
@pytest.mark.parametrize("beta", [2, 4])
def test_transposed_convolutions(beta: int, last_layer: str) -> None:
    plan = check(Decoder, beta=beta, last_layer=last_layer)
    found = actions(plan)
    assert [found[p] for p in ("c1", "up1", "up2", "out")] == ["rep_conv"] * 3 + ["select_inputs"]
    assert plan.layers["up2"].role == "binary_conv"
    rep = surgery.apply(plan)
    assert tuple(rep.get_parameter("up1.weight").shape) == (16 * beta, 24 // beta, 2, 2)
    assert [rep.get_submodule("up1").in_channels, rep.get_submodule("up1").out_channels] == [16 * beta, 24 // beta]


@pytest.mark.parametrize("kind", [Decoder, Called])
def test_a_transposed_convolution_costs_its_kernel_at_each_input(kind: type[Net]) -> None:
    network = capture(made(kind), Origin(None, "net", {}, None, ((3, 8, 8),)))
    counted = profiler.profile(network, recognize(network)).totals
    assert counted.conv == 64 * 27 * 16 + 64 * 16 * 24 * 4 + 32 * 32 * 16 * 2 * 9
    assert counted.bconv == 64 * 16 * 16 * 9 + 16 * 16 * 24 * 16 * 16


DECLARED = "extends: reptran\nmodules:\n  - {match: {path: %s}, role: %s}\n"


class OwnUp(nn.Module):
    """A transposed convolution of a class of its own, with a scale per filter."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.empty(into, out, 2, 2)), nn.Parameter(torch.empty(1, out, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(signs(x), signs(self.weight), stride=2) * self.scale


class OwnDecoder(Net):
    SHARED: ClassVar = {"up.weight": 1, "up.scale": 1}

    def setup(self, c: int) -> None:
        self.up, self.m, self.fc = OwnUp(c, 24), nn.BatchNorm2d(24), nn.Linear(24, 10)

    def end(self, x: Tensor) -> object:
        return self.fc(self.m(self.up(x)).mean((2, 3)))


@pytest.mark.parametrize("declared", [False, True])
def test_a_transposed_convolution_of_a_class_of_its_own(declared: bool) -> None:
    rules = loads(DECLARED % ("up", "binary_conv")) if declared else None
    plan = check(OwnDecoder, rules=rules)
    assert actions(plan)["up"] == "rep_conv"
    assert tuple(surgery.apply(plan).get_parameter("up.weight").shape) == (32, 12, 2, 2)


def test_a_transposed_convolution_can_be_declared_or_tiled() -> None:
    assert actions(check(Decoder, rules=loads(DECLARED % ("up1", "float_conv"))))["up1"] == "rep_conv"
    plan = planned(made(Decoder), rules=loads(DECLARED % ("up1", "weightless")))
    assert actions(plan)["up1"] == "per_replica"
    tiled = "extends: reptran\nrules:\n  up: {part: backbone, match: {path: up1}, apply: tile}\n"
    plan = planned(net := made(Decoder), rules=loads(tiled))
    assert actions(plan)["up1"] == "per_replica"
    certificate = verify(net, plan, surgery.apply(plan).eval(), gradients=False)
    cost = next(c for c in certificate.checks if c.name == "convolution cost unchanged")
    assert cost.summary.endswith("layers that grow ×2: up1; last layers that take more inputs: out")


class GroupedUp(Net):
    def setup(self, c: int) -> None:
        self.up, self.fc = nn.ConvTranspose2d(c, c, 2, 2, groups=2), nn.Linear(c, 10)

    def end(self, x: Tensor) -> object:
        return self.fc(self.up(x).mean((2, 3)))


def test_a_grouped_transposed_convolution_is_refused_with_a_way_out() -> None:
    with pytest.raises(SurgeryError, match=r"grouped ConvTranspose2d, of which no RepConv is made; `role: weightless`"):
        planned(made(GroupedUp))
    with pytest.raises(RulesError, match=r"up is a grouped ConvTranspose2d"):
        planned(made(GroupedUp), rules=loads(DECLARED % ("up", "float_conv")))
    assert actions(check(GroupedUp, rules=loads(DECLARED % ("up", "weightless"))))["up"] == "per_replica"


# ---------------------------------------------------------------------------------------------------------------------
# What ends a network and is neither


class Recurrent(Net):
    def setup(self, c: int) -> None:
        self.last = nn.LSTM(c, 8, batch_first=True)

    def end(self, x: Tensor) -> object:
        return self.last(x.mean(2).transpose(1, 2))[0][:, -1]


class Einsum(Net):
    def setup(self, c: int) -> None:
        self.w = nn.Parameter(torch.empty(10, c))

    def end(self, x: Tensor) -> object:
        return torch.einsum("nc,oc->no", x.mean((2, 3)), self.w)


class Bilinear(Net):
    def setup(self, c: int) -> None:
        self.last = nn.Bilinear(c, c, 5)

    def end(self, x: Tensor) -> object:
        x = x.mean((2, 3))
        return self.last(x, x)


class Attention(Net):
    def setup(self, c: int) -> None:
        self.last = nn.MultiheadAttention(c, 2, batch_first=True)

    def end(self, x: Tensor) -> object:
        tokens = x.flatten(2).transpose(1, 2)
        return self.last(tokens, tokens, tokens)[0].mean(1)


@pytest.mark.parametrize("network", [Recurrent, Einsum, Bilinear, Attention])
def test_what_cannot_take_more_inputs_takes_one_replica(network: type[Net]) -> None:
    """No binary convolution is taken for the last layer instead."""
    with pytest.raises(SurgeryError, match=r"last-layer\), and is no convolution or .*; `--last-layer 1_over_beta`"):
        planned(made(network))
    plan = check(network, last_layer="1_over_beta")
    assert actions(plan)["c1"] == "rep_conv"
    assert list(actions(plan).values())[-1] == "first_replica"


class Within(Net):
    """A recurrent layer in the middle."""

    def setup(self, c: int) -> None:
        self.gru, self.fc = nn.GRU(c, 8, batch_first=True), nn.Linear(8, 10)

    def end(self, x: Tensor) -> object:
        return self.fc(self.gru(x.mean(2).transpose(1, 2))[0][:, -1])


def test_a_rule_ends_the_expansion_in_the_middle() -> None:
    with pytest.raises(SurgeryError) as caught:
        planned(made(Within))
    rule = str(caught.value).partition("(rule file: `")[2].partition("`)")[0]
    plan = check(Within, rules=loads(f"extends: reptran\n{rule}\n"))  # the very words of the message
    assert actions(plan) == {
        "stem": "repeat_output", "n0": "rep_batch_norm", "c1": "rep_conv", "n1": "rep_batch_norm",
        "gru": "first_replica",
    }  # fmt: skip


class Mixed(Net):
    """A product with a parameter over channels in the middle, in a form that is no linear layer."""

    def setup(self, c: int) -> None:
        self.w, self.fc = nn.Parameter(torch.empty(c, c)), nn.Linear(c, 10)

    def end(self, x: Tensor) -> object:
        return self.fc(torch.einsum("nchw,oc->nohw", x, self.w).mean((2, 3)))


def test_a_product_that_is_applied_to_each_replica_is_said() -> None:
    plan = check(Mixed)
    assert actions(plan)[":einsum"] == "per_replica"


# ---------------------------------------------------------------------------------------------------------------------
# Outputs without channels


@pytest.mark.parametrize(
    ("reduced", "shape"),
    [
        (lambda x: x.pow(2).mean(1), (2, 8, 8)),
        (lambda x: x.pow(2).sum(dim=1, keepdim=True).sigmoid(), (2, 1, 8, 8)),
        (lambda x: F.normalize(x.pow(2).mean(1).flatten(1)), (2, 64)),
        (lambda x: x.pow(2).mean((1, 2, 3)), (2,)),
        (lambda x: x.abs().mean(), ()),
        (lambda x: (x > 9).any(1), (2, 8, 8)),
    ],
    ids=["map", "gate", "normalised", "energy", "number", "bools"],
)
def test_an_output_without_channels_has_the_sources_shape(
    reduced: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    class Maps(Net):
        def end(self, x: Tensor) -> object:
            return self.fc(x.mean((2, 3))), reduced(x)

    net = made(Maps)
    plan = planned(net)
    rep = surgery.apply(plan).eval()
    assert verify(net, plan, rep, gradients=True).passed
    x = torch.randn(2, 3, 8, 8)
    assert tuple(rep(x)[1].shape) == shape == tuple(net(x)[1].shape)
    check(Maps)


def test_a_binary_layer_of_few_inputs_is_binary() -> None:
    class Narrow(Net):
        def setup(self, c: int) -> None:
            self.hidden, self.m, self.fc = Multiplier(c, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)

        def end(self, x: Tensor) -> object:
            return self.fc(self.m(self.hidden(x.mean((2, 3)))))

    layers = recognize(capture(made(Narrow), Origin(None, "net", {}, None, ((3, 8, 8),))))
    (hidden,) = (layer for path, layer in layers.items() if path.startswith("hidden"))
    assert (hidden.role, hidden.weight_bits, hidden.activation_bits) == ("binary_linear", 1, 1)
