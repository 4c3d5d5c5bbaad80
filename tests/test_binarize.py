"""Sign estimators against their closed formulas, and the binary convolutions' kernels, scales and schedules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repbnn_cli import binarize
from repbnn_cli.binary_conv import (
    BinaryConv2d,
    FracConv2d,
    GatedConv2d,
    IRConv2d,
    Pair,
    RBNNConv2d,
    ReCUConv2d,
    SignConv2d,
    signs_convolved_by,
)
from repbnn_cli.train.health import float_kernels

KINDS: dict[str, Callable[..., BinaryConv2d]] = {
    "irnet": IRConv2d,
    "rbnn": RBNNConv2d,
    "recu": ReCUConv2d,
    "sign": SignConv2d,
    "flat": lambda *args, **kwargs: SignConv2d(*args, **kwargs, flat=True),
    "frac": FracConv2d,
    "gated": GatedConv2d,
}
X = torch.tensor([-2.0, -1.3, -1.0, -0.6, -1e-3, 0.0, 1e-3, 0.3, 0.99, 1.0, 1.3, 5.0], dtype=torch.float64)
G = torch.linspace(0.5, 2.0, len(X), dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor = X, g: Tensor = G) -> Tensor:
    leaf = x.clone().requires_grad_()
    function(leaf).backward(g)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (binarize.ste_sign, lambda x: 1.0 if abs(x) <= 1 else 0.0),
        (lambda x: binarize.ste_sign(x, 1.3), lambda x: 1.0 if abs(x) <= 1.3 else 0.0),
        (lambda x: binarize.ste_sign(x, math.inf), lambda _: 1.0),
        (binarize.approx_sign, lambda x: max(0.0, 2 - 2 * abs(x))),
        (lambda x: binarize.ede_sign(x, scalar(0.5), scalar(2.0)), lambda x: 2 * 0.5 * (1 - math.tanh(0.5 * x) ** 2)),
        (lambda x: binarize.ede_sign(x, scalar(10.0), scalar(1.0)), lambda x: 10 * (1 - math.tanh(10 * x) ** 2)),
        (
            lambda x: binarize.rbnn_sign(x, scalar(0.5), scalar(2.0)),
            lambda x: max(0.0, 2 * (math.sqrt(2) * 0.5 - 0.25 * abs(x))),
        ),
        (
            lambda x: binarize.rbnn_sign(x, scalar(1.0), scalar(1.0)),
            lambda x: max(0.0, math.sqrt(2) - abs(x)),
        ),
    ],
    ids=["ste", "ste 1.3", "identity", "approx", "ede early", "ede late", "rbnn early", "rbnn late"],
)
def test_sign_and_its_gradient(function: Callable[[Tensor], Tensor], slope: Callable[[float], float]) -> None:
    assert torch.equal(function(X), torch.sign(X))
    expected = G * torch.tensor([slope(x) for x in X.tolist()], dtype=torch.float64)
    torch.testing.assert_close(gradient(function), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_standardised_sign_has_the_gradient_that_autograd_finds(t: float) -> None:
    x = (torch.randn(3, 4, 5, 6, dtype=torch.float64) * 3 + 2).requires_grad_()
    centred = x - x.mean((1, 2, 3), keepdim=True)
    standard = centred / (centred.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    g, slope = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
    expected = binarize.rbnn_sign(standard, slope, torch.ones_like(slope))
    found = binarize.standardised_sign(x, slope)
    assert torch.equal(found, expected)
    (wanted,), (given,) = torch.autograd.grad(expected, x, g), torch.autograd.grad(found, x, g)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)


def test_scaled_sign_gives_the_scale_no_gradient_and_takes_none_from_it() -> None:
    scale = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(binarize.scaled_sign(X, scale), 0.25 * X.sign(), rtol=0, atol=1e-15)
    assert torch.equal(gradient(lambda x: binarize.scaled_sign(x, scale)), G * (X.abs() <= 1))
    assert scale.grad is None


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_uniform_quantize(bits: int) -> None:
    levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    x = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64) + 1e-6  # off the ties between two levels
    nearest = levels[(x.unsqueeze(1) - levels).abs().argmin(dim=1)]
    torch.testing.assert_close(binarize.uniform_quantize(x, bits), nearest, rtol=0, atol=1e-12)
    assert torch.equal(gradient(lambda v: binarize.uniform_quantize(v, bits)), G * (X.abs() <= 1))


def test_gate_step_learns_only_where_it_is_open() -> None:
    assert torch.equal(binarize.gate_step(X), (X > 0).double())
    assert torch.equal(gradient(binarize.gate_step), G * (X > 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_protocol(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = KINDS[kind](6, 4, 3, stride=2, padding=1).to(dtype)
    x = torch.randn(2, 6, 8, 8, dtype=dtype)
    assert conv.latent_kernel().shape == conv.binary_weight().shape == (4, 6, 3, 3)
    assert getattr(conv, conv.kernel_name).numel() == 4 * 6 * 9
    assert (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((3, 3), (2, 2), (1, 1), 1)
    assert torch.equal(conv.binary_weight().sign().abs(), torch.ones(4, 6, 3, 3, dtype=dtype))
    assert len(conv.binarize_input(x).detach().mul(3).round().unique()) <= 2**conv.activation_bits
    assert conv(x).shape == (2, 4, 4, 4)
    assert conv(x).dtype == dtype
    for name in conv.out_channel_tensors:
        assert getattr(conv, name).numel() == 4
    assert not [n for n, _ in conv.named_buffers() if n not in conv.state_dict()]


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_computes_the_same(kind: str) -> None:
    torch.manual_seed(0)
    conv = KINDS[kind](8, 4, 3, padding=1).eval()
    x = torch.randn(2, 8, 6, 6)
    other = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(x.contiguous(memory_format=torch.channels_last)), conv(x), rtol=1e-4, atol=1e-5)


def test_ir_scale_is_a_power_of_two_without_gradient() -> None:
    torch.manual_seed(0)
    conv = IRConv2d(5, 3, 3).double()
    scale = conv.binary_weight().abs().detach()
    assert torch.equal(scale, scale[:, :1, :1, :1].expand_as(scale))
    w = conv.weight.detach()
    centred = w - w.mean((1, 2, 3), keepdim=True)
    standard = centred / centred.std((1, 2, 3), keepdim=True)
    expected = 2 ** standard.abs().mean((1, 2, 3)).log2().round()
    assert torch.equal(scale[:, 0, 0, 0], expected)

    # The kernel's gradient: EDE's slope and the constant scale, through the standardisation.
    conv.t.fill_(0.7)
    conv.k.fill_(1.5)
    g = torch.randn_like(w)
    conv.binary_weight().backward(g)
    leaf = w.clone().requires_grad_()
    centred = leaf - leaf.mean((1, 2, 3), keepdim=True)
    surrogate = 1.5 * torch.tanh(0.7 * centred / centred.std((1, 2, 3), keepdim=True))
    surrogate.backward(g * expected.view(-1, 1, 1, 1))
    torch.testing.assert_close(conv.weight.grad, leaf.grad, rtol=1e-6, atol=1e-9)


def test_schedule_is_written_in_place_and_survives_a_meta_build() -> None:
    with torch.device("meta"):
        conv = IRConv2d(4, 4, 3)
    conv.load_state_dict(IRConv2d(4, 4, 3).state_dict(), assign=True)
    assert (conv.t.item(), conv.k.item()) == (10.0, 1.0)
    slopes = []
    for t, k in ((1e-3, 1e3), (1.0, 1.0)):
        conv.t.fill_(t)
        conv.k.fill_(k)
        slopes.append(gradient(conv.binarize_input, torch.full((1, 4, 1, 1), 0.5), torch.ones(1, 4, 1, 1))[0, 0].item())
    assert slopes == pytest.approx([1.0, 1 - math.tanh(0.5) ** 2], rel=1e-5)
    duplicate = copy.deepcopy(conv)
    duplicate.t.fill_(3.0)
    assert conv.t.item() == 1.0


def test_sign_kernel_is_sign_times_mean() -> None:
    torch.manual_seed(0)
    conv = SignConv2d(3, 2, 3, flat=True)
    torch.nn.init.normal_(conv.weights)
    latent = conv.latent_kernel().detach()
    expected = latent.sign() * latent.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(conv.binary_weight().detach(), expected, rtol=1e-6, atol=1e-6)
    conv.binary_weight().sum().backward()
    assert torch.equal(conv.weights.grad, (conv.weights.detach().abs() <= 1).float())


def test_recu_clamps_and_scales_as_described() -> None:
    torch.manual_seed(0)
    conv = ReCUConv2d(4, 3, 3).double()
    w = conv.weight.detach().clone().requires_grad_()
    centred = w - w.mean((1, 2, 3), keepdim=True)
    standard = 2 * math.sqrt(2) * centred / centred.std((1, 2, 3), keepdim=True)
    quantile = (-standard.abs().mean() * math.log(2 - 2 * 0.85)).item()
    g = torch.randn_like(w)
    standard.clamp(-quantile, quantile).backward(g)
    conv.binary_weight().backward(g)
    torch.testing.assert_close(conv.weight.grad, w.grad, rtol=1e-6, atol=1e-9)

    # The division by the standard deviation happens in training only and never changes a sign.
    x = 5 * torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(conv.train().binarize_input(x), conv.eval().binarize_input(x))
    assert torch.equal(gradient(conv.binarize_input, x, torch.ones_like(x)), (2 - 2 * x.abs()).clamp_min(0))
    assert not torch.equal(gradient(conv.train().binarize_input, x, torch.ones_like(x)), (2 - 2 * x.abs()).clamp_min(0))


@pytest.mark.parametrize(("channels", "kernel", "sizes"), [(16, 3, (12, 12)), (32, 3, (16, 18)), (64, 1, (8, 8))])
def test_rotations_stay_orthogonal_and_approach_the_signs(channels: int, kernel: int, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = RBNNConv2d(channels, 24, kernel).double()
    assert (len(conv.R1), len(conv.R2)) == sizes

    def agreement() -> float:
        """Mean |rotated entry|: the cosine to the nearest corner of the hypercube, since rotations keep norms."""
        w = conv.weight.detach()
        centred = w - w.mean((1, 2, 3), keepdim=True)
        grid = (centred / centred.std((1, 2, 3), keepdim=True)).view(24, *sizes)
        return (conv.R1.t() @ grid @ conv.R2).abs().mean().item()

    history = [agreement()]
    for _ in range(4):
        conv.rotate_(alternations=1)
        history.append(agreement())
    assert history == sorted(history)
    assert history[-1] > history[0] + 1e-3
    for r in (conv.R1, conv.R2):
        torch.testing.assert_close(r @ r.t(), torch.eye(len(r), dtype=torch.float64), rtol=0, atol=1e-10)


def test_rbnn_angle_blends_between_kernel_and_rotation() -> None:
    torch.manual_seed(0)
    conv = RBNNConv2d(8, 5, 3)
    with torch.no_grad():
        conv.rotate.fill_(0.0)
        assert torch.equal(conv.binary_weight(), (conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)).sign())
        conv.rotate.fill_(-math.pi / 2)
        rotated = conv.binary_weight()
        conv.rotate.fill_(math.pi / 2)
        assert torch.equal(conv.binary_weight(), rotated)
        x = torch.randn(2, 8, 6, 6) + 0.5
        assert torch.equal(conv.binarize_input(x), (x - x.mean((1, 2, 3), keepdim=True)).sign())
        torch.testing.assert_close(conv(x), F.conv2d(conv.binarize_input(x), rotated) * conv.alpha)


def test_rbnn_resize_gives_new_rotations_without_chance() -> None:
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(0)
        conv = RBNNConv2d(16, 16, 3)
        torch.manual_seed(seed)
        conv.resize(32, 8)
        conv.weight.data = conv.weight.data.reshape(8, 32, 3, 3)
        conv.alpha.data, conv.rotate.data = conv.alpha.data[:8], conv.rotate.data[:8]
        conv.rotate_()
        outcomes.append(conv.R2)
        assert conv(torch.randn(1, 32, 4, 4)).shape == (1, 8, 2, 2)
    assert outcomes[0].shape == (18, 18)
    assert torch.equal(*outcomes)


def test_gate_chooses_between_one_and_two_bits() -> None:
    torch.manual_seed(0)
    conv = GatedConv2d(8, 4, 3)
    x = torch.randn(2, 8, 6, 6)
    kernel = conv.weight.detach().sign()
    two_bits = ((x.clamp(-1, 1) + 1) * 1.5).round() / 1.5 - 1
    full, coarse = F.conv2d(two_bits, kernel), F.conv2d(two_bits.sign(), kernel) * 2 / 3
    for threshold, expected in ((-100.0, full), (100.0, coarse), (0.3, torch.where(coarse > 0.3, full, coarse))):
        conv.threshold.data.fill_(threshold)
        torch.testing.assert_close(conv(x), expected)
    conv(x).square().sum().backward()
    assert conv.threshold.grad is not None
    assert conv.threshold.grad.abs().sum() > 0


def test_constant_filter_and_constant_sample_stay_finite() -> None:
    for kind in (IRConv2d, RBNNConv2d, ReCUConv2d):
        conv = kind(4, 2, 3)
        torch.nn.init.constant_(conv.weight, 0.5)
        assert conv(torch.full((1, 4, 5, 5), 0.25)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_signs_are_convolved_by_what_is_asked(kind: str) -> None:
    """It gets signs, and one magnitude per filter; 2-bit activations and float kernels never go there."""
    torch.manual_seed(0)
    conv, x = KINDS[kind](6, 4, 3, stride=2, padding=1), torch.randn(2, 6, 8, 8)
    expected, calls = conv(x), []

    def convolve(signs: Tensor, kernel: Tensor, stride: Pair, padding: Pair) -> Tensor:
        calls.append((signs, kernel))
        if conv.output_scale() is None:
            return F.conv2d(signs, kernel, None, stride, padding)
        # The scale is in the kernel: exact sums, rounded once.
        return F.conv2d(signs.double(), kernel.double(), None, stride, padding).float()

    with signs_convolved_by(conv, convolve):
        assert torch.equal(conv(x), expected)
        assert len(calls) == 1
        with float_kernels(conv):
            assert not torch.equal(conv(x), expected)
        assert len(calls) == 1
        assert torch.equal(conv(x), expected)
        assert len(calls) == 2
    assert torch.equal(conv(x), expected)
    assert len(calls) == 2
    signs, kernel = calls[0]
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    largest = kernel.abs().amax((1, 2, 3), keepdim=True).expand_as(kernel)
    torch.testing.assert_close(kernel.abs(), largest, rtol=1e-4, atol=0)
