"""The profiler's figures, each rederived here as arithmetic or counted by brute force."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import networks
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import rule_set
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import channels, profiler, surgery, zoo
from repbnn_cli.graph import capture
from repbnn_cli.graph.interception import interceptable
from repbnn_cli.plan import Plan
from repbnn_cli.profiler import LayerCost, Profile, counting, shapes
from repbnn_cli.recognize import recognize
from repbnn_cli.rep_layers import RepBatchNorm2d


def profile_of(model: nn.Module, shape: tuple[int, ...], *, batch: int = 2) -> Profile:
    network = capture(model.eval(), shape, batch=batch)
    return profiler.profile(network, recognize(network))


@cache
def zoo_source(name: str) -> Profile:
    network = capture(zoo.build(name).eval(), zoo.ARCHS[name].input_shape, shapes_only=True)
    return profiler.profile(network, recognize(network))


@cache
def zoo_plan(name: str, rules: str = "reptran", **options: object) -> Plan:
    network = capture(zoo.build(name).eval(), zoo.ARCHS[name].input_shape, shapes_only=True)
    return surgery.plan(network, rule_set(rules, **options))


@cache
def zoo_rep(name: str, rules: str = "reptran", **options: object) -> Profile:
    plan = zoo_plan(name, rules, **options)
    return profiler.profile(*shapes.rep_network(plan, surgery.apply(plan)))


def layer(profile: Profile, path: str, call: int = 1) -> LayerCost:
    return next(c for c in profile.layers if c.key == (path, call))


# ---------------------------------------------------------------------------------------------------------------------
# The paper's tables


def test_table_1_source() -> None:
    """ReActNet-A at 224×224: stem of stride 2, then blocks whose resolution halves where their width doubles."""
    widths = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    side, bconv, norms = 112, 0, 32 * 112**2
    for into, out in pairwise(widths):
        side //= 2 if out != into and out != 64 else 1
        bconv += side**2 * (into * into * 9 + into * out)
        norms += side**2 * (into + out)
    totals = zoo_source("reactnet_a").totals
    assert totals.fc == 1024 * 1000
    assert totals.conv == 112**2 * 32 * 3 * 9 == 10_838_016
    assert totals.bconv == bconv == 4_816_896_000
    assert totals.bn == 2 * norms == 10_085_376
    assert totals.ops_without_bn == totals.fc + totals.conv + bconv // 64 == 87_126_016
    assert totals.ops_with_bn == totals.ops_without_bn + totals.bn == 97_211_392


def test_table_1_rep() -> None:
    source, rep = zoo_source("reactnet_a").totals, zoo_rep("reactnet_a").totals
    assert rep.fc == 2 * source.fc
    assert rep.conv == source.conv
    assert rep.bconv == source.bconv
    assert rep.bn == source.bn * 5 // 4 == 12_606_720
    assert rep.ops_without_bn == 88_150_016
    assert rep.ops_with_bn == 100_756_736


@pytest.mark.parametrize(("last_layer", "ops"), [("all", 1070336), ("1_over_beta", 1069696), ("1_over_beta2", 1069376)])
@pytest.mark.parametrize("name", ["irnet_resnet20", "recu_resnet20"])
def test_table_2(name: str, last_layer: str, ops: int) -> None:
    """ResNet-20 at 32×32: 6 convolutions at 16 channels, then 1 + 5 at 32 and at 64 (the first has half the inputs)."""
    stages = 6 * 16 * 16 * 32**2 + (16 * 32 + 5 * 32 * 32) * 16**2 + (32 * 64 + 5 * 64 * 64) * 8**2
    inputs = {"all": 128, "1_over_beta": 64, "1_over_beta2": 32}[last_layer]
    convolutions = 3 * 16 * 9 * 32**2 + 9 * stages // 64
    assert zoo_source(name).totals.ops_without_bn == convolutions + 64 * 10 == 1069696
    assert zoo_rep(name, last_layer=last_layer).totals.ops_without_bn == convolutions + inputs * 10 == ops


@pytest.mark.parametrize("beta", [2, 4, 8])
def test_shared_normalisation_factor(beta: int) -> None:
    """(1/(2β) + β/2) of every BatchNorm behind a repeat; before the classifier there is none, only β·64 channels."""
    source, rep = zoo_source("irnet_resnet20"), zoo_rep("irnet_resnet20", beta=beta)
    factor = Fraction(1, 2 * beta) + Fraction(beta, 2)
    assert layer(rep, "bn2").flops == beta * layer(source, "bn2").flops == beta * 2 * 64
    behind = source.totals.bn - 2 * 64
    assert rep.totals.bn - beta * 2 * 64 == factor * behind
    assert layer(rep, "bn1").flops == factor * layer(source, "bn1").flops, "the first layer's, too"


def test_batch_norm_before_the_repeat_is_not_shared() -> None:
    """The released network's first BatchNorm keeps its C channels and costs what it did."""
    source, rep = zoo_source("reactnet_a"), zoo_rep("reactnet_a", "reptran-released")
    assert layer(rep, "feature.0.bn1").flops == layer(source, "feature.0.bn1").flops == 2 * 32 * 112**2
    assert layer(rep, "feature.1.bn1").flops * 4 == layer(source, "feature.1.bn1").flops * 5


def test_a_shift_called_beta_is_no_expansion_factor() -> None:
    norm = nn.BatchNorm2d(4)
    norm.beta = nn.Parameter(torch.zeros(4))
    assert profile_of(nn.Sequential(norm), (4, 3, 3)).totals.bn == 2 * 4 * 9


def test_rep_batch_norm_knows_beta() -> None:
    assert RepBatchNorm2d(64, 4).beta == 2
    assert RepBatchNorm2d(64, 2, beta=2).beta == 2
    rep = surgery.apply(zoo_plan("irnet_resnet20"))
    assert {m.beta for m in rep.modules() if isinstance(m, RepBatchNorm2d)} == {2}


@pytest.mark.parametrize("name", ["irnet_resnet18", "rbnn_resnet18", "recu_vgg_small", "birealnet18"])
def test_repeats_cost_no_convolution(name: str) -> None:
    source, rep = zoo_source(name).totals, zoo_rep(name).totals
    assert (rep.conv, rep.bconv, rep.packed_1bit) == (source.conv, source.bconv, source.packed_1bit)
    assert rep.fc == 2 * source.fc


def test_full_precision_convolutions_keep_their_cost() -> None:
    source, rep = zoo_source("resnet20_bireal").totals, zoo_rep("resnet20_bireal", "full-precision").totals
    assert (rep.conv, rep.bconv) == (source.conv, 0)


def test_gated_convolutions_count_two_bits() -> None:
    """Upper bound of FracBNN: the 1-bit network's BOPs twice, but for the first convolution, and it is said."""
    gated, plain = zoo_source("fracbnn_resnet20"), zoo_source("fracbnn_resnet20_1bit")
    first = 96 * 16 * 9 * 32**2
    assert layer(plain, "conv1").bops == layer(gated, "conv1").bops == first, "±1 from the encoder: binary"
    assert gated.totals.bops - first == 2 * (plain.totals.bops - first)
    assert any("upper bound" in note for note in gated.notes)
    assert not any("upper bound" in note for note in plain.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Counting


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3), into=st.integers(1, 3), out=st.integers(1, 3), kernel=st.integers(1, 3),
    stride=st.integers(1, 3), dilation=st.integers(1, 2), side=st.integers(5, 9), dims=st.integers(1, 3),
    bias=st.booleans(),
)  # fmt: skip
def test_convolution_macs_by_brute_force(
    groups: int, into: int, out: int, kernel: int, stride: int, dilation: int, side: int, dims: int, bias: bool
) -> None:
    """A convolution of ones with ones gives, at every output, the number of products that it took."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = kind(groups * into, groups * out, kernel, stride, dilation=dilation, groups=groups, bias=bias)
    with torch.no_grad():
        counter = copy.deepcopy(conv)
        counter.weight.fill_(1)
        if counter.bias is not None:
            counter.bias.zero_()
        products = int(counter(torch.ones(1, groups * into, *[side] * dims)).sum())
    cost = profile_of(nn.Sequential(conv), (groups * into, *[side] * dims)).layers[0]
    assert (cost.kind, cost.macs, cost.flops, cost.bops) == ("conv", products, products, 0)


def test_padding_counts_as_any_position() -> None:
    assert profile_of(nn.Conv2d(3, 5, 3, padding=1), (3, 6, 6)).totals.conv == 36 * 5 * 3 * 9


@pytest.mark.parametrize(
    ("model", "shape", "kind", "macs"),
    [
        (nn.Linear(7, 3), (7,), "fc", 21),
        (nn.Linear(7, 3), (5, 7), "fc", 5 * 21),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5), "conv", 25 * 4 * 3 * 9),
    ],
)
def test_other_products(model: nn.Module, shape: tuple[int, ...], kind: str, macs: int) -> None:
    cost = profile_of(nn.Sequential(model), shape).layers[0]
    assert (cost.kind, cost.macs, cost.flops) == (kind, macs, macs)


class Functional(nn.Module):
    """Convolution, product and normalisation as functions on the network's own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.matrix = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel.sign(), padding=1)
        x = F.batch_norm(x, self.mean, torch.ones_like(self.mean))
        x = F.max_pool2d(F.relu(x), 2).mean((2, 3))
        return F.linear(x, self.matrix) @ torch.ones(5, 2)


def test_functions_are_counted() -> None:
    profile = profile_of(Functional(), (3, 6, 6))
    totals = profile.totals
    assert (totals.conv, totals.bn, totals.fc) == (36 * 4 * 27, 2 * 4 * 36, 20 + 10)
    assert totals.other == 4 * 36 + 4 * 9 * 4 + 4 * 9  # relu, 2×2 windows, mean
    assert totals.parameters == 4 * 27 + 20
    assert totals.latent == 4 * (4 * 27 + 20 + 4)
    assert not profile.omissions
    assert not any("bit widths are not known" in note for note in profile.notes), "they were seen"
    assert any("depend on parameters alone" in note for note in profile.notes), "the kernel's sign"


def test_bits_of_products_are_known_where_values_were_seen() -> None:
    class Signs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).sign() @ x.flatten(2).sign().transpose(1, 2)

    for shapes_only in (False, True):
        network = capture(Signs(), (3, 6, 6), shapes_only=shapes_only)
        found = profiler.profile(network, recognize(network))
        assert (found.totals.bops, found.totals.fc) == ((0, 9 * 36) if shapes_only else (9 * 36, 0))
        assert any("bit widths are not known" in note for note in found.notes) is shapes_only


@pytest.mark.parametrize(
    ("model", "operations"),
    [
        (nn.ReLU(), 4 * 36),
        (nn.PReLU(4), 4 * 36),
        (nn.MaxPool2d(3, 2), 9 * 4 * 4),
        (nn.AvgPool2d((2, 3)), 6 * 4 * 3 * 2),
        (nn.AdaptiveAvgPool2d(1), 4 * 36),
        (nn.Softmax(1), 3 * 4 * 36),
        (nn.GroupNorm(2, 4), 4 * 4 * 36),
        (nn.Upsample(scale_factor=2, mode="bilinear"), 4 * 4 * 144),
        (nn.Upsample(scale_factor=2), 0),
        (nn.Flatten(), 0),
        (nn.Dropout(), 0),
    ],
)
def test_elementwise_work_is_beside_the_ops(model: nn.Module, operations: int) -> None:
    profile = profile_of(nn.Sequential(model), (4, 6, 6))
    assert profile.totals.other == operations
    assert profile.totals.ops_with_bn == 0
    assert not profile.omissions


@pytest.mark.parametrize("name", ["resnet20", "rbnn_resnet20"])
def test_macs_agree_with_fvcore(name: str) -> None:
    """An independent counter with the same convention; it sees binary convolutions as convolutions."""
    analysis = FlopCountAnalysis(zoo.build(name).eval(), torch.zeros(1, *zoo.ARCHS[name].input_shape))
    counted = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    ours = zoo_source(name)
    assert counted["conv"] == sum(c.macs for c in ours.layers if c.kind in ("conv", "bconv"))
    assert counted["linear"] == ours.totals.fc


def test_figures_are_per_image() -> None:
    model = networks.Residual()
    assert profile_of(model, (3, 8, 8), batch=2) == profile_of(model, (3, 8, 8), batch=5)


def test_ops_are_exact() -> None:
    assert profiler.ops(5, 128) == 7
    assert isinstance(profiler.ops(5, 128), int)
    assert profiler.ops(5, 32) == 5.5


class OneBitWeights(nn.Conv2d):
    """Binary weights, float activations."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.sign(), padding=1)


@pytest.mark.parametrize(("activation", "kind"), [(torch.relu, "conv"), (F.hardtanh, "conv"), (torch.sign, "bconv")])
def test_precision_is_that_of_the_widest_operand(activation: Callable[[Tensor], Tensor], kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = OneBitWeights(4, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(activation(x))

    cost = layer(profile_of(Net(), (4, 9, 9)), "conv")
    macs = 81 * 6 * 4 * 9
    assert (cost.kind, cost.macs) == (kind, macs)
    assert (cost.flops, cost.bops) == ((0, macs) if kind == "bconv" else (macs, 0))
    assert cost.packed_1bit == math.ceil(6 * 4 * 9 / 8), "the weights are 1 bit either way"


def test_foreign_binary_convolutions() -> None:
    """A Conv2d subclass that binarises inside: BOPs, and what cannot be seen is said."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), networks.conv(8, 8), nn.BatchNorm2d(8))
    profile = profile_of(networks.randomize(model), (3, 12, 12))
    cost = layer(profile, "1")
    assert (cost.kind, cost.bops, cost.weight_bits, cost.activation_bits) == ("bconv", 144 * 8 * 8 * 9, 1, 1)
    assert any("cannot be seen" in note and "(1)" in note for note in profile.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is silent, nothing is touched


class Spectral(nn.Module):
    """An operation that is in no table."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x.flatten(1).view(x.size(0), -1)).real


class OwnSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Binarises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        slope = torch.tanh(2 * x)
        return x.sign().detach() - slope.detach() + slope


class SignOfConvolution(OwnSign):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(F.conv2d(x, torch.ones(8, 8, 3, 3), padding=1) >= 0, 1.0, -1.0)


class Same(OwnSign):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def test_a_function_of_the_users_own_that_binarises_is_a_sign_for_each_element() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.act = Binarises()

        def forward(self, x: Tensor) -> Tensor:
            x = Doubles.apply(self.stem(x))
            x = F.conv2d(OwnSign.apply(x), self.conv.weight.sign(), padding=1)
            x = F.conv2d(self.act(x), self.conv.weight.sign(), padding=1)
            x = F.conv2d(SignOfConvolution.apply(x), self.conv.weight.sign(), padding=1)
            return F.conv2d(Same.apply(x.sign()), self.conv.weight.sign(), padding=1)

    with interceptable():
        profile = profile_of(Net(), (3, 6, 6))
    # Real numbers are no signs; a function that mixes them does more than that; and what are signs need no other.
    unknown = ["Doubles.apply", "SignOfConvolution.apply", "Same.apply"]
    assert [o.type.removeprefix("test_profiler.") for o in profile.omissions] == unknown
    work = {r.type.removeprefix("test_profiler."): r.other for r in profile.layers}
    assert work["OwnSign.apply"] == work["Binarises"] == 8 * 6 * 6


def test_unknown_operations_are_listed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm, self.own = nn.Conv2d(3, 4, 3), nn.LSTM(4, 5), Spectral()

        def forward(self, x: Tensor) -> Tensor:
            x = torch.einsum("nchw->nc", self.conv(x))
            return self.own(self.lstm(x)[0])

    profile = profile_of(Net(), (3, 6, 6))
    assert [(o.type, o.path) for o in profile.omissions] == [
        ("einsum", ":einsum"),
        ("LSTM", "lstm"),
        ("Spectral", "own"),
    ]
    assert all(o.where.startswith("test_profiler.py:") and "not counted" in o.reason for o in profile.omissions)
    assert profile.totals.flops == layer(profile, "conv").flops
    assert layer(profile, "lstm").parameters == 4 * 5 * (4 + 5) + 8 * 5, "sizes are known all the same"


def test_every_known_operator_is_counted_or_free() -> None:
    """What the transform carries by name, the profiler knows by name."""
    known = counting.FREE_FUNCTIONS | set(counting.FUNCTIONS)
    tables = channels.POINTWISE | channels.SPATIAL | channels.RANDOM | channels.REDUCE | channels.FOLDABLE
    carried = {name.rstrip("_") for name in tables}
    assert carried - known <= {"boolean_dispatch", "einops", "sort", "topk"}, "these are listed when they occur"
    assert not counting.FREE_FUNCTIONS & set(counting.FUNCTIONS)


def test_columns_add_up() -> None:
    """Every total is the sum of its column, and the sizes are those of the module itself."""
    for name, side in (("irnet_imagenet_resnet18", zoo_source), ("rbnn_resnet20", zoo_rep)):
        profile = side(name)
        totals = profile.totals
        for kind in ("fc", "conv", "bn", "bconv"):
            assert getattr(totals, kind) == sum(c.flops + c.bops for c in profile.layers if c.kind == kind)
        for column in ("macs", "other", "parameters", "packed", "packed_1bit", "packed_32bit", "latent"):
            assert getattr(totals, column) == sum(getattr(c, column) for c in profile.layers)
        assert totals.ops_with_bn == sum(Fraction(c.ops) for c in profile.layers)
        model = zoo.build(name) if side is zoo_source else surgery.apply(zoo_plan(name))
        assert totals.parameters == sum(p.numel() for p in model.parameters())
        assert totals.latent == sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_the_model_is_left_as_it_was() -> None:
    model = networks.randomize(networks.Residual()).train()
    network = capture(model, (3, 8, 8))
    layers = recognize(network)
    state = copy.deepcopy(model.state_dict())
    attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}
    graph, code = str(network.graph), network.module.code
    profiler.profile(network, layers)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(m.training for m in model.modules())
    assert (str(network.graph), network.module.code) == (graph, code)


@pytest.mark.parametrize("signs_first", [True, False])
def test_a_layer_called_on_signs_and_on_values_costs_what_values_do(signs_first: bool) -> None:
    class BinaryWeights(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight.sign(), padding=1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = BinaryWeights(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            first, second = (x.sign(), x + 0.1) if signs_first else (x + 0.1, x.sign())
            return self.conv(first) + self.conv(second)

    totals = profile_of(Net(), (4, 6, 6)).totals
    assert (totals.bops, totals.conv) == (0, 2 * 4 * 4 * 9 * 36)


def test_reused_tied_and_uncalled_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.other, self.never = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.other.weight = self.twice.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.twice(self.twice(x)))

    profile = profile_of(Net(), (4, 6, 6))
    assert profile.totals.conv == 3 * 36 * 4 * 4 * 9
    assert [(c.path, c.call, c.parameters) for c in profile.layers] == [
        ("twice", 1, 4 * 4 * 9 + 4),
        ("twice", 2, 0),
        ("other", 1, 4),
        ("never", 0, 4 * 4 * 9 + 4),
    ]
    assert layer(profile, "never", 0).packed == 0
    assert layer(profile, "never", 0).latent == 4 * (4 * 4 * 9 + 4)
    assert any("Not used" in note and "never" in note for note in profile.notes)


def test_of_a_list_of_parameters_those_that_nobody_reads_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList(torch.ones(()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scales[0] + self.scales[2]

    (note,) = (n for n in profile_of(Net(), (4, 6, 6)).notes if "Not used" in n)
    assert note == "Not used in eval mode, so neither counted nor deployed: scales.1."


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def test_packed_sizes_of_irnet() -> None:
    """1 bit a weight and a scale per filter; BatchNorm as scale and shift; stem and classifier float."""
    convs = [(16, 16)] * 6 + [(16, 32)] + [(32, 32)] * 5 + [(32, 64)] + [(64, 64)] * 5
    totals = zoo_source("irnet_resnet20").totals
    assert totals.packed_1bit == sum(i * o * 9 // 8 for i, o in convs)
    norms = 16 + sum(o for _, o in convs) + 64
    assert totals.packed_32bit == 4 * (16 * 27 + sum(o for _, o in convs) + 2 * norms + 650)
    assert totals.latent == 4 * (16 * 27 + sum(i * o * 9 for i, o in convs) + 4 * norms + 650) + 8 * 20


def test_training_only_tensors_are_not_deployed() -> None:
    """RBNN's R1, R2 and angles, ReCU's τ; their learned scale is, as IR-Net's computed one."""
    sizes = {n: layer(zoo_source(f"{n}_resnet20"), "layer1.0.conv1") for n in ("irnet", "recu", "rbnn")}
    assert {c.packed for c in sizes.values()} == {16 * 16 * 9 // 8 + 4 * 16}
    kernel = 4 * 16 * 16 * 9
    assert sizes["irnet"].latent == kernel
    assert sizes["recu"].latent == kernel + 4 * 16 + 4
    assert sizes["rbnn"].latent == kernel + 4 * 16 * 2 + 4 * (12**2 + 12**2)


def test_fracbnn_has_no_scales() -> None:
    plain = layer(zoo_source("fracbnn_resnet20_1bit"), "layer1.0.conv1")
    gated = layer(zoo_source("fracbnn_resnet20"), "layer1.0.conv1")
    assert (plain.packed_1bit, plain.packed_32bit) == (16 * 16 * 9 // 8, 0)
    assert (gated.packed_1bit, gated.packed_32bit) == (16 * 16 * 9 // 8, 4 * 16), "a threshold per filter"


def test_rep_networks_pack_worse() -> None:
    """About 1 % more OPs, but the classifier and all BatchNorms double: the table has to show it."""
    comparison = profiler.compare(zoo_source("reactnet_a"), zoo_rep("reactnet_a"))
    assert comparison.totals["ops_without_bn"].ratio == pytest.approx(1.0118, abs=1e-4)
    assert comparison.totals["packed"].ratio == pytest.approx(1.546, abs=1e-3)


def test_a_kernel_that_the_forward_also_touches_stays_a_kernel() -> None:
    """`self.conv.weight.data = ...` before the call: the weight is the convolution's, not a float tensor of its own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = OneBitWeights(4, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.conv.weight.data = self.conv.weight.data.clamp(-1, 1)
            return self.conv(x.sign())

    profile = profile_of(Net(), (4, 9, 9))
    assert [(c.path, c.packed_1bit, c.packed_32bit) for c in profile.layers if c.latent] == [("conv", 27, 4 * (6 + 6))]


def test_kernels_of_convolutions_called_as_functions_are_packed() -> None:
    """F.conv2d(sign(x), sign(self.weight)): one bit a weight; the signs are nodes of their own, counted once."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x.sign(), self.weight.sign(), padding=1)

    profile = profile_of(Net(), (4, 9, 9))
    totals = profile.totals
    assert (totals.bconv, totals.other) == (81 * 6 * 4 * 9, 81 * 4)
    assert (totals.packed_1bit, totals.packed_32bit, totals.latent) == (27, 4 * 6, 4 * 216)


def test_half_precision_is_latent_in_two_bytes() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).half()
    network = capture(model.eval(), (4,), shapes_only=True)
    totals = profiler.profile(network, recognize(network)).totals
    assert (totals.latent, totals.packed) == (2 * 15, 4 * 15)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    ("model", "elements"),
    [
        (nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 1, 1)), 3 + 3),
        (nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 1, 1)), 2 + 3),
        (nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Identity(), nn.Linear(108, 2)), 2 + 3),
    ],
)
def test_peak_memory(model: nn.Module, elements: int) -> None:
    assert profile_of(model, (2, 6, 6)).totals.peak == 4 * 36 * elements


def test_a_bypass_keeps_its_tensor_alive() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(self.b(x)) + x.view(x.shape)

    profile = profile_of(Net(), (2, 6, 6))
    assert profile.peak.bytes == 4 * 36 * (3 + 3 + 3), "the bypass, input and output of the second call"
    assert (profile.peak.node, profile.peak.path) == ("b_1", "b")


# ---------------------------------------------------------------------------------------------------------------------
# Side by side


def test_comparison_matches_layers_and_functions_by_path() -> None:
    comparison = profiler.compare(zoo_source("irnet_resnet20"), zoo_rep("irnet_resnet20"))
    assert all(pair.before and pair.after for pair in comparison.layers)
    assert [p.layer.path for p in comparison.layers] == [c.path for c in zoo_source("irnet_resnet20").layers]
    assert comparison.totals["fc"] == profiler.Change(640, 1280)
    assert (comparison.totals["fc"].delta, comparison.totals["fc"].ratio) == (640, 2.0)
    assert profiler.Change(0, 3).ratio is None


def test_layers_of_one_side_only_stand_in_their_place() -> None:
    before = profile_of(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), (3,))
    after = profile_of(nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 2), nn.Sigmoid()), (3,))
    pairs = profiler.compare(before, after).layers
    assert [(p.layer.path, p.before is None, p.after is None) for p in pairs] == [
        ("0", False, False), ("1", False, True), ("2", False, False), ("3", True, False)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["rbnn_resnet18", "recu_vgg_small", "fracbnn_resnet20"])
def test_a_second_capture_counts_the_same(name: str) -> None:
    """Captured again, the Rep network loses the names of its functions and nothing else."""
    rep = surgery.apply(zoo_plan(name))
    network = capture(rep, zoo.ARCHS[name].input_shape, shapes_only=True)
    assert profiler.profile(network, recognize(network)).totals == zoo_rep(name).totals


def test_a_user_network_on_both_sides() -> None:
    """A foreign network, captured with its values: the Rep side takes bit widths and roles from the source's layers."""
    network = capture(networks.randomize(networks.Residual()).eval(), (3, 16, 16))
    plan = surgery.plan(network, rule_set())
    before = profiler.profile(network, plan.layers)
    after = profiler.profile(*shapes.rep_network(plan, surgery.apply(plan)))
    assert before.totals.bops == after.totals.bops > 0
    assert (before.totals.conv, before.omissions) == (after.totals.conv, after.omissions)
