"""Ways in which networks are put together, each transformed, verified by the tool and by the second implementation."""

from __future__ import annotations

from collections.abc import Callable

import idioms
import pytest
import torch
from merged_reference import assert_identical, both
from networks import BinaryConv, Body, Sign, conv, randomize, transformed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from repbnn_cli import graph, rules, surgery, verify
from repbnn_cli.rep_layers import RepMixin


class BinaryConv1d(nn.Conv1d):
    def binarize_input(self, x: Tensor) -> Tensor:
        return Sign.apply(x)

    def binary_weight(self) -> Tensor:
        return Sign.apply(self.weight) * self.weight.detach().abs().mean((1, 2), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(self.binarize_input(x), self.binary_weight(), self.bias, self.stride, self.padding)


class OneDimensional(nn.Module):
    """Takes images as 3 · 8 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv1d(24, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.conv, self.bn1 = BinaryConv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x.flatten(1, 2)))
        return self.fc((self.bn1(self.conv(x)) + x).mean(2))


class PreActivation(nn.Module):
    """BatchNorm sized by the convolution's input, none behind the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(conv(8, 8) for _ in range(2))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.convs, strict=False):
            x = layer(F.hardtanh(norm(x))) + x
        return self.fc(self.norms[2](x).mean((2, 3)))


class InPlaceSum(nn.Module):
    """An alias of a convolution's output, which a sum then writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(8, 8), conv(8, 8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        alias = y
        y += x
        return self.norm(self.b(y * 0.3 + alias + 0.01))


class BypassFirst(nn.Module):
    """`x + conv(x)`: the concatenated tensor comes first in the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.ModuleList(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)) for _ in range(2))
        self.rest = nn.ModuleList(nn.Sequential(conv(16, 16), nn.BatchNorm2d(16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([half(x) for half in self.halves], 1)
        for part in self.rest:
            x = x + part(x)
        return x


class NormalisedLogits(Body):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)))
        self.last = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.last(super().forward(x)), dim=1)


class Norms(nn.Module):
    """BatchNorms without scales, without statistics, and another kind of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(8, 8) for _ in range(3))
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False), nn.GroupNorm(2, 8)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = norm(layer(x))
        return x


class ParameterView(nn.Module):
    """Parameters that the forward uses by itself: one for all channels, one for each, reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(8, 8), nn.BatchNorm2d(8)
        self.alpha, self.gain = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x) * self.alpha) + x * self.gain.view(1, -1, 1, 1)


class WideningDepthwise(nn.Module):
    """Depthwise with two filters per channel, then pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.BatchNorm2d(16)
        self.pointwise, self.norm2 = conv(16, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.pointwise(self.norm(self.depthwise(x))))


def lenet() -> nn.Module:
    """Float, plain, without BatchNorm or residuals, with hidden linear layers."""
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5))


def mlp() -> nn.Module:
    hidden = [nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.BatchNorm1d(16)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, 5))


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "one-dimensional": OneDimensional,
    "pre-activation": PreActivation,
    "in-place sum": lambda: Body(InPlaceSum()),
    "bypass first": lambda: Body(BypassFirst(), 8, 16),
    "BatchNorm on the logits": NormalisedLogits,
    "norms": lambda: Body(Norms()),
    "parameter view": lambda: Body(ParameterView()),
    "widening depthwise": lambda: Body(WideningDepthwise()),
    "LeNet": lenet,
    "MLP": mlp,
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("beta", [2, 4])
def test_structure(name: str, beta: int) -> None:
    torch.manual_seed(0)
    model = randomize(STRUCTURES[name]())
    plan, rep = transformed(model, beta=beta)
    certificate = verify.verify(model, plan, rep, gradients=True)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    actual, expected, _ = both(model, rep, torch.randn(3, 3, 8, 8))
    assert_identical(actual, expected)
    assert any(isinstance(m, RepMixin) for m in rep.modules())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dilation": lambda: BinaryConv(8, 8, 3, padding=2, dilation=2, bias=False),
    "padding by name": lambda: nn.Conv2d(8, 8, 3, padding="same", bias=False),
    "reflecting": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False),
    "parametrised": lambda: weight_norm(nn.Conv2d(8, 8, 3, padding=1, bias=False)),
    "not square": lambda: BinaryConv(8, 8, (1, 3), (2, 1), (0, 1), bias=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_arguments_of_a_convolution_are_kept(name: str) -> None:
    model = randomize(Body(nn.Sequential(LAYERS[name](), nn.BatchNorm2d(8))))
    plan, rep = transformed(model)
    certificate = verify.verify(model, plan, rep, gradients=True)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    layer, source = rep.get_submodule("body.0"), model.body[0]
    assert isinstance(layer, RepMixin)
    assert (layer.in_channels, layer.out_channels) == (16, 4)
    for option in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        assert getattr(layer, option) == getattr(source, option)


def test_two_heads_are_both_last_layers() -> None:
    class Heads(Body):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)))
            self.aux = nn.Linear(8, 7)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.adaptive_avg_pool2d(self.body(self.bn(self.stem(x))), 1).flatten(1)
            return self.fc(x), self.aux(x)

    model = randomize(Heads())
    plan, rep = transformed(model)
    assert verify.verify(model, plan, rep, gradients=True).passed
    assert [t.shape[1] for t in rep(torch.randn(2, 3, 8, 8))] == [5, 7]
    assert {r.path for r in plan.rows() if r.part == "last_layer"} == {"fc", "aux"}


def test_a_kernel_overwritten_from_a_latent_tensor_is_resized_with_it() -> None:
    model = idioms.OverwrittenWeight().eval()
    plan = surgery.plan(graph.capture(model, (3, 8, 8)), rules.load("reptran"))
    certificate = verify.verify(model, plan, surgery.apply(plan), gradients=True)
    assert certificate.passed, certificate.as_plain()
