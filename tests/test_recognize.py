"""What a module is said to be, and on what evidence: by type, by what it does, by declaration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import BinaryConv, Body, Residual, Sign, planned, randomize, transformed, written
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import graph, surgery, verify, zoo
from repbnn_cli.binary_conv import GatedConv2d, IRConv2d, RBNNConv2d, SignConv2d
from repbnn_cli.errors import RulesError, SurgeryError
from repbnn_cli.graph import probe
from repbnn_cli.layers import LearnableBias
from repbnn_cli.recognize import Layer, recognize


def layer_of(module: nn.Module, width: int = 8, out: int | None = None) -> Layer:
    """What `module`, as the body of a network, is recognised as."""
    return recognize(graph.capture(randomize(Body(module, width, out)), (3, 8, 8)))["body"]


# ---------------------------------------------------------------------------------------------------------------------
# torch's layers and ours


@pytest.mark.parametrize(
    ("module", "role"),
    [
        (nn.Conv2d(8, 8, 3), "float_conv"),
        (nn.Conv2d(8, 8, 3, groups=2), "float_conv"),
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise_conv"),
        (nn.BatchNorm2d(8), "batch_norm"),
        (nn.BatchNorm2d(8, affine=False), "batch_norm"),
        (nn.PReLU(8), "per_channel"),
        (nn.PReLU(), "weightless"),
        (nn.Hardtanh(), "weightless"),
        (nn.MaxPool2d(2), "weightless"),
        (LearnableBias(8), "per_channel"),
        (IRConv2d(8, 8, 3), "binary_conv"),
        (GatedConv2d(8, 8, 3), "binary_conv"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else v,
)
def test_by_type(module: nn.Module, role: str) -> None:
    layer = layer_of(module)
    assert layer.role == role
    assert type(module).__name__ in layer.evidence or role == "weightless"
    if role.endswith("conv"):
        assert layer.kernel == "weight"
        assert layer.kernel_shape == tuple(module.weight.shape)
        assert (layer.in_channels, layer.out_channels) == (8, 8)


def test_linear_layers() -> None:
    layers = recognize(graph.capture(Residual(), (3, 8, 8)))
    assert layers["fc"].role == "float_linear"
    assert layers["fc"].out_tensors == {"bias": 0}


@pytest.mark.parametrize("kind", [RBNNConv2d, GatedConv2d, SignConv2d])
def test_our_layers_name_their_tensors(kind: Callable[..., nn.Module]) -> None:
    module = kind(8, 8, 3, padding=1)
    layer = layer_of(module)
    assert (
        layer.out_tensors
        == {
            RBNNConv2d: {"alpha": 0, "rotate": 0},
            GatedConv2d: {"threshold": 1},
            SignConv2d: {},
        }[kind]
    )
    assert (layer.weight_bits, layer.activation_bits) == (1, 2 if kind is GatedConv2d else 1)


def test_flat_kernel_of_ours() -> None:
    layer = layer_of(SignConv2d(8, 4, 3, flat=True), out=4)
    assert (layer.kernel, layer.kernel_shape) == ("weights", (4, 8, 3, 3))


def test_every_zoo_convolution_is_known_and_binary_ones_are_binary() -> None:
    for name in ("irnet_resnet20", "fracbnn_resnet20", "resnet20", "rbnn_resnet18"):
        model = zoo.build(name).eval()
        layers = recognize(graph.capture(model, (3, 32, 32), shapes_only=True))
        assert "unknown" not in {v.role for v in layers.values()}
        convolutions = [v for v in layers.values() if v.role.endswith("conv")]
        float_ones = [v.path for v in convolutions if not v.binary]
        if name != "resnet20":
            assert float_ones == ([] if name == "fracbnn_resnet20" else ["conv1"])
        else:
            assert len(float_ones) == len(convolutions)


# ---------------------------------------------------------------------------------------------------------------------
# Other people's


class WeightsOnly(nn.Conv2d):
    """Binarises weights; the activation is the block's business."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, Sign.apply(self.weight), self.bias, self.stride, self.padding)


class Standardised(nn.Conv2d):
    """A float convolution by a class of its own."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / 2
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding)


class Flat(nn.Module):
    """An own module with a kernel stored as (N, 1) and plain numbers."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.into, self.out = into, out
        self.weights = nn.Parameter(torch.randn(into * out * 9, 1))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weights.view(self.out, self.into, 3, 3)
        return F.conv2d(Sign.apply(x), Sign.apply(kernel) * kernel.detach().abs().mean(), padding=1)


class Scaled(nn.Module):
    """Learned scales per filter and shifts per input channel, in every shape that occurs; 8 channels in and out."""

    def __init__(self, shape: tuple[int, ...], side: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.factor = nn.Parameter(torch.rand(shape) + 0.5)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        if self.side == "in":
            return F.conv2d(Sign.apply(x - 0.3 * self.factor.view(1, -1, 1, 1)), Sign.apply(self.weight), padding=1)
        if self.side == "kernel":
            return F.conv2d(Sign.apply(x), Sign.apply(self.weight) * self.factor.view(-1, 1, 1, 1), padding=1)
        return F.conv2d(Sign.apply(x), Sign.apply(self.weight), padding=1) * self.factor.view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("module", "role", "bits"),
    [
        (BinaryConv(8, 8, 3, padding=1), "binary_conv", 1),
        (WeightsOnly(8, 8, 3, padding=1), "binary_conv", 32),
        (Standardised(8, 8, 3, padding=1), "float_conv", 32),
        (Flat(8, 8), "binary_conv", 1),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_by_what_it_does(module: nn.Module, role: str, bits: int) -> None:
    body = nn.Sequential(module)
    network = graph.capture(randomize(Body(body)), (3, 16, 16))  # enough values to count their bits
    layer = recognize(network)["body.0"]
    assert layer.role == role
    assert layer.kernel_shape == (8, 8, 3, 3)
    assert layer.activation_bits == bits
    assert type(module).__name__ in layer.evidence
    if isinstance(module, Flat):
        assert layer.kernel == "weights"


@pytest.mark.parametrize("shape", [(8,), (8, 1, 1), (8, 1, 1, 1), (1, 8, 1, 1)], ids=str)
@pytest.mark.parametrize(("side", "found"), [("out", "out"), ("kernel", "out"), ("in", "in")])
def test_the_side_of_a_tensor_is_found_by_what_it_reaches(shape: tuple[int, ...], side: str, found: str) -> None:
    """As many channels in as out: sizes alone do not tell."""
    layer = layer_of(Scaled(shape, side))
    axis = next(a for a, n in enumerate(shape) if n > 1)
    assert layer.role == "binary_conv"
    assert layer.kernel == "weight"
    assert (layer.out_tensors, layer.in_tensors) == (
        ({"factor": axis}, {}) if found == "out" else ({}, {"factor": axis})
    )


@pytest.mark.parametrize("side", ["out", "kernel", "in"])
def test_and_the_transform_of_such_a_layer_is_right(side: str) -> None:
    model = randomize(Body(nn.Sequential(Scaled((8, 1, 1), side), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))))
    plan, rep = transformed(model)
    assert rep.get_submodule("body.0").factor.shape == ((4, 1, 1) if side != "in" else (16, 1, 1))
    certificate = verify.verify(model, plan, rep, gradients=True)
    assert [c.summary for c in certificate.checks if not c.passed] == []


class Idle(Scaled):
    """A tensor that nobody reads (an older version did), or that counts in training only."""

    def __init__(self, shape: tuple[int, ...], use: str) -> None:
        super().__init__(shape, "out")
        self.factor.data.fill_(1.0)
        self.beta, self.use = nn.Parameter(torch.rand(shape)), use

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.use == "in" and self.training:
            return y + (x * self.beta).sum(1, keepdim=True)[:, :, 1:-1, 1:-1].mean((2, 3), keepdim=True) * 5
        if self.use == "hidden":
            y = y + self._parameters["beta"].sum() * 0 + self.beta.detach() * 0
        return y


@pytest.mark.parametrize("shape", [(8,), (8, 1, 1)], ids=str)
def test_a_tensor_that_nobody_reads_hinders_nothing(shape: tuple[int, ...]) -> None:
    layer = layer_of(Idle(shape, "unread"))
    assert (layer.role, layer.out_tensors) == ("binary_conv", {"factor": 0, "beta": 0})


def test_what_counts_in_training_only_is_found_there() -> None:
    layer = layer_of(Idle((8, 1, 1), "in"))
    assert (layer.role, layer.in_tensors) == ("binary_conv", {"beta": 0})


def test_what_is_read_without_effect_is_not_guessed() -> None:
    layer = layer_of(Idle((8, 1, 1), "hidden"))
    assert layer.role == "unknown"
    assert "has the tensor beta (8, 1, 1), whose channel axis cannot be told" in layer.evidence


def test_looking_leaves_no_trace() -> None:
    model = randomize(Body(Scaled((8, 1, 1), "in")))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    recognize(graph.capture(model, (3, 8, 8)))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


class Gate(nn.Module):
    """A parameter-free helper in the user's code."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class ChannelScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


def test_foreign_layers_without_a_convolution() -> None:
    assert layer_of(Gate()).role == "weightless"
    layer = layer_of(ChannelScale())
    assert layer.role == "per_channel"
    assert dict(layer.in_tensors) == {"gain": 1, "shift": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Unknown, and declared


class Mixing(nn.Module):
    """Mixes channels by a matrix product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, self.table)


def test_unknown_is_said_where_it_matters() -> None:
    layer = layer_of(Mixing())
    assert layer.role == "unknown"
    assert "Mixing" in layer.evidence
    assert "declare" in layer.evidence
    with pytest.raises(SurgeryError, match=r"\(body\).*no known role.*Mixing.*table \(8, 8\)"):
        planned(Body(Mixing()))


def test_unknown_in_front_of_the_first_layer_is_none_of_our_business() -> None:
    class Whitened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.colours = Mixing()
            self.colours.table = nn.Parameter(torch.randn(3, 3))
            self.rest = Residual()

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.colours(x))

    model = randomize(Whitened())
    plan, rep = transformed(model)
    assert verify.verify(model, plan, rep, gradients=False).passed


DECLARED = """
extends: reptran
modules:
  - match: {{type: {type}}}
    role: binary_conv
    {more}
"""


def declared(kind: str, more: str) -> Any:
    return written(DECLARED.format(type=kind, more=more))


def test_a_declaration_says_where_the_kernel_is() -> None:
    more = (
        "kernel: weights\n    kernel_shape: [out, into, 3, 3]\n    attributes: {into: in_channels, out: out_channels}"
    )
    rules = declared("Flat", more)
    model = randomize(Body(nn.Sequential(Flat(8, 8), nn.BatchNorm2d(8))))
    plan = planned(model, rule=rules)
    layer = plan.layers["body.0"]
    assert (layer.kernel, layer.kernel_shape, layer.role) == ("weights", (8, 8, 3, 3), "binary_conv")
    assert layer.evidence.startswith("declared at mine.yaml:")
    assert dict(layer.attributes) == {"into": "in_channels", "out": "out_channels"}
    rep = surgery.apply(plan)
    flat = rep.get_submodule("body.0")
    assert (flat.into, flat.out, tuple(flat.weights.shape)) == (16, 4, (576, 1))
    assert verify.verify(model, plan, rep, gradients=True).passed


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("kernel: wieghts", r"^mine\.yaml:4.*body\.0 has no tensor 'wieghts'; it has weights"),
        (
            "kernel: weights\n    kernel_shape: [8, 8, 5, 5]",
            r"body\.0\.weights holds 576 values, \[8, 8, 5, 5\] needs 1600",
        ),
        ("kernel: weights\n    kernel_shape: [out, nothing, 3, 3]", r"body\.0 has no whole number 'nothing'"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(more: str, says: str) -> None:
    with pytest.raises(RulesError, match=says):
        planned(Body(nn.Sequential(Flat(8, 8), nn.BatchNorm2d(8))), rule=declared("Flat", more))


def test_a_declaration_overrides_what_would_be_found() -> None:
    rules = declared("Standardised", "kernel: weight")
    model = randomize(Body(nn.Sequential(Standardised(8, 8, 3, padding=1), nn.BatchNorm2d(8))))
    assert planned(model).layers["body.0"].role == "float_conv"
    assert planned(model, rule=rules).layers["body.0"].role == "binary_conv"


def test_bits_are_read_off_the_values() -> None:
    """Which zero padding and exact zeros do not disturb."""

    class Zeroes(BinaryConv):
        def binarize_input(self, x: Tensor) -> Tensor:
            return Sign.apply(F.relu(x) - F.relu(-x - 0.5))

    for module, bits in ((Zeroes(8, 8, 3, padding=1), 1), (BinaryConv(8, 8, 3, padding=1), 1)):
        network = graph.capture(randomize(Body(nn.Sequential(module))), (3, 16, 16))
        assert recognize(network)["body.0"].activation_bits == bits


ONE_BIT = {
    "exact 0, 1": lambda x: (x > 0).float(),
    "0, 1 behind a clamp": lambda x: (x > 0.1).float().detach() + x.clamp(0, 1) - x.clamp(0, 1).detach(),
    "signs behind a clamp": lambda x: x.sign().detach() + x.clamp(-1, 1) - x.clamp(-1, 1).detach(),
    "signs behind the values": lambda x: x.sign().detach() + x - x.detach(),
    "another order": lambda x: (torch.where(x >= 0.5, 1.0, -1.0) - x.clamp(0, 1)).detach() + x.clamp(0, 1),
}


class Quantised(BinaryConv):
    def __init__(self, quantiser: Callable[[Tensor], Tensor]) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.quantiser = quantiser

    def binarize_input(self, x: Tensor) -> Tensor:
        return self.quantiser(x)


@pytest.mark.parametrize("how", ONE_BIT)
def test_an_estimator_that_rounds_leaves_one_bit(how: str) -> None:
    """`s.detach() + x - x.detach()` is s up to the last bits of x, which makes a third and a fourth value."""
    network = graph.capture(randomize(Body(nn.Sequential(Quantised(ONE_BIT[how])))), (3, 32, 32))
    layer = recognize(network)["body.0"]
    assert (layer.role, layer.activation_bits) == ("binary_conv", 1)


def test_levels_that_lie_close_are_counted_apart_from_rounding() -> None:
    step = 1e-3  # a hundred times what counts as rounding
    for levels, bits in ((4, 2), (16, 4), (256, 8), (5000, 32)):
        values = torch.randint(levels, (40000,), generator=torch.Generator().manual_seed(0)) * step
        noise = torch.rand(40000, generator=torch.Generator().manual_seed(1)) * step * levels * 5e-7
        assert probe.value_bits(values + noise) == bits
    assert probe.value_bits(torch.rand(500000)) == 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_kernel_behind_an_estimator_is_binary_in_every_precision(dtype: torch.dtype) -> None:
    """ReActNet's: sign · magnitude − clamp + clamp, whose rounding is that of the latent weight."""

    class HardBinary(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight.abs().mean((1, 2, 3), keepdim=True).detach()
            signs, passing = scale * self.weight.sign(), self.weight.clamp(-1, 1)
            return F.conv2d(x.sign(), signs.detach() - passing.detach() + passing, None, 1, 1)

    model = Body(nn.Sequential(HardBinary(8, 8, 3, bias=False)))
    nn.init.normal_(model.body[0].weight, std=0.05)
    layer = recognize(graph.capture(model.to(dtype).eval(), (3, 16, 16)))["body.0"]
    assert (layer.role, layer.weight_bits) == ("binary_conv", 1)
