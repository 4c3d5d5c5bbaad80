"""Fused blocks: what is matched, what is not and why, and the same predictions as the network they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import BinaryConv, Body, Residual, images, planned, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import recognize, surgery, zoo
from repbnn_cli.binary_conv import SignConv2d
from repbnn_cli.deploy import agreement, folds, forms
from repbnn_cli.deploy.forms import BinaryForm, binary_form
from repbnn_cli.deploy.fuse import Fused, fuse
from repbnn_cli.deploy.match import folded
from repbnn_cli.graph import Network, capture
from repbnn_cli.kernels import Backend, choose
from repbnn_cli.layers import LearnableBias, RPReLU
from repbnn_cli.profiler import shapes
from repbnn_cli.recognize import Layer
from repbnn_cli.rep_layers import fold
from repbnn_cli.zoo.vgg_small import VGGSmall

TORCH = Backend("torch", "asked for")
Side = tuple[Network, dict[str, Layer]]


def captured(model: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> Side:
    network = capture(randomize(model), shape)
    return network, recognize.recognize(network)


def rep_side(model: nn.Module, shape: tuple[int, ...] = (3, 8, 8), beta: int = 2) -> Side:
    """The Rep version, with copies that have drifted apart as training leaves them."""
    plan = planned(randomize(model), shape, beta=beta)
    return shapes.rep_network(plan, randomize(surgery.apply(plan), seed=2))


def assert_same(side: Side, fused: Fused, x: Tensor) -> agreement.Agreement:
    found = agreement.compare(side[0], fused, [x])
    assert found.holds, str(found)
    assert found.images == len(x)
    assert found.flipped < len(x)  # else nothing about logits was compared
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The networks of the zoo: how many blocks fuse, in which form, and why the others do not

WHOLE = "convolution + BatchNorm{} + residual + hardtanh"
ZOO: dict[str, tuple[str, int, int]] = {
    # name: (what the last matched block does, blocks matched, binary convolutions left)
    "irnet_resnet20": (WHOLE, 18, 0),
    "rbnn_resnet20": (WHOLE, 18, 0),
    "recu_resnet20": (WHOLE, 18, 0),
    "fracbnn_resnet20_1bit": ("convolution + BatchNorm{} + RPReLU", 19, 0),
    "fracbnn_resnet20": ("convolution + BatchNorm{}", 1, 18),
}


@pytest.mark.parametrize("beta", [1, 2])
@pytest.mark.parametrize("name", ZOO)
def test_zoo_network_and_its_rep_version_predict_the_same_fused(name: str, beta: int) -> None:
    parts, matched, missed = ZOO[name]
    torch.manual_seed(0)
    model = zoo.build(name)
    side = captured(model, (3, 32, 32)) if beta == 1 else rep_side(model, (3, 32, 32), beta)
    fused = fuse(*side, TORCH)
    assert (len(fused.matches.matched), len(fused.matches.missed)) == (matched, missed)
    repeats = {1: "", 2: " ×4"}[beta] if matched > 1 else {1: "", 2: " ×2"}[beta]
    assert " + ".join(fused.matches.matched[-1].parts) == parts.format(repeats)
    assert_same(side, fused, images(3, 32).sigmoid())


@pytest.mark.parametrize("beta", [1, 2])
def test_triton_runs_a_whole_network_as_the_torch_backend_does(beta: int) -> None:
    triton = choose(torch.device("cpu"), "triton")  # interpreted: see conftest.py
    model = zoo.build("irnet_resnet20")
    side = captured(model) if beta == 1 else rep_side(model)
    x = images(1)
    assert_same(side, fuse(*side, triton), x)
    assert agreement.compare(side[0], fuse(*side, triton), [x]).logits < 1e-6


def test_gates_are_left_alone_and_said() -> None:
    network, layers = captured(zoo.build("fracbnn_resnet20"), (3, 32, 32))
    missed = fuse(network, layers, TORCH).matches.missed
    assert {m.reason for m in missed} == {"it runs 2 convolutions (a gate, or a mixture)"}
    assert missed[0].path == "layer1.0.conv1"


class SmallReAct(nn.Module):
    """RSign, conv, bn, + x, RPReLU, twice, then two convolutions of one RSign side by side: ReActNet's block, small."""

    def __init__(self, conv: Callable[..., nn.Module], width: int = 8) -> None:
        super().__init__()
        self.signs = nn.ModuleList(LearnableBias(width) for _ in range(3))
        self.convs = nn.ModuleList(conv(width, width, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(4))
        self.acts = nn.ModuleList(RPReLU(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = self.acts[i](self.norms[i](self.convs[i](self.signs[i](x))) + x)
        shifted = self.signs[2](x)
        halves = [self.norms[i](self.convs[i](shifted)) + x for i in (2, 3)]
        return torch.cat(halves, 1)


@pytest.mark.parametrize("rep", [False, True])
def test_rsign_travels_as_packed_signs(rep: bool) -> None:
    from repbnn_cli.binary_conv import SignConv2d

    model = Body(SmallReAct(SignConv2d), out=16)
    side = rep_side(model) if rep else captured(model)
    fused = fuse(*side, TORCH)
    blocks = fused.blocks
    assert [b.block.activation for b in blocks] == ["rprelu", "rprelu", "none", "none"]
    assert [b.signs for b in blocks] == [True, True, False, False]
    assert blocks[1].block.sign_shift is not None
    targets = [str(n.target) for n in fused.module.graph.nodes if n.op == "call_module"]
    assert [t for t in targets if "signs" in t] == ["body.signs.0"]  # the others ride in the block before
    assert_same(side, fused, images(4))


def test_values_that_nobody_reads_are_not_written() -> None:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [BinaryConv(8, 8, 3, padding=1, bias=True), nn.BatchNorm2d(8), nn.Hardtanh()]
    side = captured(Body(nn.Sequential(*layers)))
    fused = fuse(*side, TORCH)
    assert [(b.values, b.signs) for b in fused.blocks] == [(False, True), (False, True), (True, False)]
    assert_same(side, fused, images(4))


class Gained(nn.BatchNorm2d):
    """A BatchNorm with something of its own behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = nn.Parameter(torch.rand(channels) + 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain.view(1, -1, 1, 1)


def test_a_batch_norm_that_does_more_than_one_is_not_folded() -> None:
    model = Residual()
    model.bn1 = Gained(8)
    side = captured(model)
    fused = fuse(*side, TORCH)
    assert {block.path: "BatchNorm" in block.parts for block in fused.blocks} == {"conv1": False, "conv2": True}
    x = images(4)
    with torch.no_grad():
        torch.testing.assert_close(fused.module(x), side[0].module(x))


def test_pooling_before_batchnorm_leaves_the_convolution_alone() -> None:
    from repbnn_cli.binary_conv import ReCUConv2d

    side = captured(VGGSmall(10, conv=ReCUConv2d), (3, 32, 32))
    matched = {m.path: m for m in fuse(*side, TORCH).matches.matched}
    assert matched["conv1"].parts == ("convolution",)
    assert matched["conv1"].then == "max_pool2d"
    assert matched["conv2"].then is None


class TwoBranches(nn.Module):
    """A binary bypass beside a binary convolution, as in RBNN's ResNet-18: both blocks end in the same sum."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.bn1 = BinaryConv(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.bypass, self.bn2 = BinaryConv(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        bypass = self.bn2(self.bypass(x))
        return F.hardtanh(self.bn1(self.main(x)) + bypass)


@pytest.mark.parametrize("rep", [False, True])
def test_a_sum_of_two_blocks_belongs_to_one_of_them(rep: bool) -> None:
    model = Body(TwoBranches())
    side = rep_side(model) if rep else captured(model)
    fused = fuse(*side, TORCH)
    first, second = fused.matches.matched
    assert (first.parts[2:], second.parts[2:]) == (("residual", "hardtanh"), ())
    assert_same(side, fused, images(4))


def test_foreign_network_fuses_by_behaviour() -> None:
    for side in (captured(Residual()), rep_side(Residual())):
        fused = fuse(*side, TORCH)
        assert [m.path for m in fused.matches.matched] == ["conv1", "conv2"]
        assert fused.matches.matched[1].parts[-1] == "PReLU"
        assert_same(side, fused, images(4))


# ---------------------------------------------------------------------------------------------------------------------
# Parts


class InPlace(nn.Module):
    """The residual is written to between the convolution that reads it and the sum that adds it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = BinaryConv(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        x.mul_(2)
        return F.hardtanh(out + x)


def test_operands_written_in_place_are_not_fused() -> None:
    side = captured(Body(InPlace()))
    fused = fuse(*side, TORCH)
    assert [m.reason for m in fused.matches.missed] == ["bn is changed in place before the block ends"]
    torch.testing.assert_close(fused.module(images()), side[0].module(images()))


class Accumulate(nn.Module):
    """x += block: x is read again afterwards, so the sum cannot move into a block that leaves x as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = BinaryConv(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        x += self.bn(self.conv(x))
        return F.hardtanh(x) + kept


def test_sums_into_the_residual_stay_outside() -> None:
    side = captured(Body(Accumulate()))
    fused = fuse(*side, TORCH)
    assert [m.parts for m in fused.matches.matched] == [("convolution", "BatchNorm")]
    torch.testing.assert_close(fused.module(images()), side[0].module(images()))


def test_exact_zeros_in_a_kernel_are_a_reason() -> None:
    model = Residual()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, :2] = 0
        model.conv2.weight[3] = 0  # a filter of zeros has scale 0: no question of sign
    side = captured(model)
    fused = fuse(*side, TORCH)
    assert [(m.path, m.reason) for m in fused.matches.missed] == [
        ("conv1", "2 of its 576 weights have sign 0, which no bit can hold")
    ]
    assert fused.matches.matched[0].block.scale[3] == 0
    assert_same(side, fused, images(4))


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("kind", ["IRConv2d", "RBNNConv2d", "ReCUConv2d", "SignConv2d", "FracConv2d"])
def test_form_of_our_kinds_is_what_they_compute_in_float64(kind: str, repeats: int) -> None:
    from repbnn_cli import binary_conv
    from repbnn_cli.rep_layers import make_rep

    torch.manual_seed(0)
    conv = getattr(binary_conv, kind)(5, 6, 3, stride=2, padding=1).eval()
    conv = make_rep(conv, 2, repeats, binary=True)
    form = binary_form(conv, 5)
    assert isinstance(form, BinaryForm)
    assert (form.repeats, form.stride, form.padding, form.centred) == (repeats, (2, 2), (1, 1), kind == "RBNNConv2d")
    x = images(2, 7, 5)
    signs = (forms.centre(x) if form.centred else x).sign().double()
    expected = F.conv2d(signs, form.kernel.double(), None, 2, 1) * form.scale.view(-1, 1, 1)
    torch.testing.assert_close(conv(x).double(), expected.repeat(1, repeats, 1, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 3), (1, 1, 2), (5, 4, 0), (8, 8, 0), (8, 1, 7), (2, 3, 5)]
)
def test_form_of_a_convolution_whose_first_pixels_see_only_padding(size: int, stride: int, padding: int) -> None:
    conv = SignConv2d(8, 8, size, stride=stride, padding=padding).eval()
    form = binary_form(conv, 8)
    assert isinstance(form, BinaryForm)
    x = images(2, 11, 8)
    expected = F.conv2d(x.sign().double(), form.kernel.double(), None, stride, padding) * form.scale.view(-1, 1, 1)
    torch.testing.assert_close(conv(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_is_over_padding_alone_has_no_form() -> None:
    conv = SignConv2d(4, 4, 1, stride=20, padding=1).eval()
    assert binary_form(conv, 4) == "the centre of its kernel is over no pixel of an 8x8 image but padding"


class TwoBit(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d((x.clamp(-1, 1) * 1.5).round() / 1.5, self.weight.sign(), None, padding=1)


class Squashed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.sign(), self.weight.sign(), None, padding=1).tanh()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (TwoBit(4, 4, 3), "its input is not the sign of the activations (2-bit, or shifted inside)"),
        (Squashed(4, 4, 3), "more than a scale and a bias per filter follow its convolution inside"),
        (nn.Conv2d(4, 4, 3), "its input is not the sign of the activations (2-bit, or shifted inside)"),
        (BinaryConv(4, 4, 3, groups=2), "it is a conv2d in 2 groups"),
        (BinaryConv(4, 4, 3, dilation=2), "it has dilation, or padding given by name"),
    ],
)
def test_what_has_no_form(module: nn.Module, reason: str) -> None:
    before = {n: t.clone() for n, t in module.state_dict().items()}
    assert binary_form(module.eval(), 4) == reason
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_folding_a_batchnorm_is_exact_in_float64() -> None:
    norm = randomize(nn.Sequential(nn.BatchNorm2d(5))).double()
    scale, shift = folded(norm[0])
    x = images(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(norm(x), x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), rtol=1e-14, atol=1e-14)


def test_folds_behind_elementwise_work_leave_outputs_alone() -> None:
    network, _ = rep_side(zoo.build("irnet_resnet20"), (3, 16, 16))
    moved = folds.behind_elementwise(network)
    assert torch.equal(moved.module(images(2, 16)), network.module(images(2, 16)))

    def number(side: Network) -> int:
        return sum(n.target is fold for n in side.graph.nodes)

    assert (number(network), number(moved)) == (13, 3)  # two channel pads and the pooling at the end remain


def test_counts_zeros_that_packing_rounds_up() -> None:
    class Holes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = BinaryConv(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(x))

    network, layers = captured(Body(Holes()))
    fused = fuse(network, layers, TORCH)
    (block,) = fused.blocks
    fused.module(images())
    assert block.zeros == 0  # not counting
    block.counting = True
    seen: list[Any] = []
    network.module.body.conv.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    network.module(images())
    fused.module(images())
    assert block.zeros == int((seen[0] == 0).sum()) > 0


def test_agreement_notices_a_wrong_block() -> None:
    side = captured(Residual())
    fused = fuse(*side, TORCH)
    assert agreement.compare(side[0], fused, [images(4)]).holds
    fused.blocks[1].block.shift[0] += 0.5
    assert not agreement.compare(side[0], fused, [images(4)]).holds
    fused = fuse(*side, TORCH)
    fused.blocks[0].block.packed_weight[0] ^= 1
    assert not agreement.compare(side[0], fused, [images(4)]).holds


def test_the_given_network_is_left_as_it_was() -> None:
    network, layers = captured(Residual())
    code, state = network.module.code, {n: t.clone() for n, t in network.module.state_dict().items()}
    fused = fuse(network, layers, TORCH)
    assert network.module.code == code
    assert list(fused.module.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in network.module.state_dict().items())
    network.module.train()
    with pytest.raises(ValueError, match="eval mode"):
        fuse(network, layers, TORCH)
