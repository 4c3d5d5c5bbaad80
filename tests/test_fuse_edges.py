"""What looks like a block, or lies between two, and is not: fused networks compute what they computed before."""

from __future__ import annotations

import math

import pytest
import torch
from networks import Body, images, planned, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import recognize, surgery
from repbnn_cli.binary_conv import SignConv2d
from repbnn_cli.deploy import agreement, folds
from repbnn_cli.deploy.forms import binary_form
from repbnn_cli.deploy.fuse import Fused, fuse
from repbnn_cli.graph import Network, capture
from repbnn_cli.kernels import Backend
from repbnn_cli.profiler import shapes

TORCH = Backend("torch", "asked for")


def block(width: int = 8) -> tuple[SignConv2d, nn.BatchNorm2d]:
    return SignConv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)


class TwoBlocks(nn.Module):
    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = block()
        self.conv2, self.bn2 = block()
        self.activation = activation or nn.Identity()
        self.shift = nn.Parameter(torch.linspace(-1, 1, 8).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))


class ShiftAsAStatement(TwoBlocks):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out.add_(self.shift)
        return self.bn2(self.conv2(out))


class WritesIntoAPart(TwoBlocks):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        x[:, :4].mul_(-1)
        return self.bn2(self.conv2(out)) + x


class WritesBeforeTheSum(TwoBlocks):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        x[:, :4].mul_(-1)
        return out + x


class WritesThroughAModule(TwoBlocks):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        F.relu(self.activation(x), inplace=True)
        return out + x


class EndsBeforeItBegan(nn.Module):
    """The shortcut's block runs first and ends last."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.bn1 = SignConv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.conv, self.bn2 = block()

    def forward(self, x: Tensor) -> Tensor:
        short = self.bn1(self.short(F.avg_pool2d(x, 2)))
        return F.interpolate(self.bn2(self.conv(x)), scale_factor=0.5) + short


class OffsetPReLU(nn.PReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


class Tanh(nn.Hardtanh):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class BoundedShift(nn.Module):
    """A shift of what lies between -4 and 4, and only that."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, 8).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-4, 4) + self.shift


class AlwaysByItsBatch(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> AlwaysByItsBatch:
        del mode
        return super().train(True)


def hooked() -> nn.Module:
    module = nn.Hardtanh()
    module.register_forward_hook(lambda m, args, out: out * 2)
    return module


def with_norm(kind: type[nn.BatchNorm2d]) -> nn.Module:
    model = TwoBlocks()
    model.bn1 = kind(8)
    return model


NETWORKS = {
    "shift as a statement": ShiftAsAStatement,
    "write into a part of the input": WritesIntoAPart,
    "write before the sum": WritesBeforeTheSum,
    "write through a module": WritesThroughAModule,
    "blocks in another order": EndsBeforeItBegan,
    "a PReLU of its own": lambda: TwoBlocks(OffsetPReLU(8)),
    "a Hardtanh of its own": lambda: TwoBlocks(Tanh()),
    "a hook": lambda: TwoBlocks(hooked()),
    "a bounded shift": lambda: TwoBlocks(BoundedShift()),
    "statistics of the batch": lambda: with_norm(AlwaysByItsBatch),
}


def sides(model: nn.Module) -> tuple[Network, Fused]:
    network = capture(randomize(Body(model)), (3, 8, 8))
    return network, fuse(network, recognize.recognize(network), TORCH)


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_computes_what_it_did(name: str) -> None:
    network, fused = sides(NETWORKS[name]())
    assert fused.matches.matched or "is changed in place before the block ends" in fused.matches.missed[0].reason
    x = 5 * images(6)
    torch.testing.assert_close(fused.module(x.clone()), network.module(x.clone()), rtol=1e-4, atol=1e-4)
    assert agreement.compare(network, fused, [x]).holds


class SmallThreshold(nn.Conv2d):
    def __init__(self, threshold: float) -> None:
        super().__init__(4, 4, 3, bias=False)
        self.threshold = nn.Parameter(torch.full((1, 4, 1, 1), threshold))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(torch.sign(x + self.threshold), torch.sign(self.weight))


@pytest.mark.parametrize("threshold", [1.0, 1e-2, 1e-4])
def test_a_threshold_of_any_size_is_no_plain_sign(threshold: float) -> None:
    assert binary_form(SmallThreshold(threshold), 4) == (
        "its input is not the sign of the activations (2-bit, or shifted inside)"
    )


def test_nan_in_a_later_batch_is_no_agreement() -> None:
    network, fused = sides(TwoBlocks())
    fine, spoilt = images(4), images(4)
    spoilt[0, 0, 0, 0] = math.nan
    for batches in ([fine, spoilt], [spoilt, fine]):
        assert not agreement.compare(network, fused, batches).holds


class Windows(nn.Module):
    """Blocks over (N·2, C, H/2, W): an image's two halves as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = block()
        self.conv2, self.bn2 = block()

    def forward(self, x: Tensor) -> Tensor:
        halves = x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
        halves = F.hardtanh(self.bn1(self.conv1(halves)) + halves)
        halves = F.hardtanh(self.bn2(self.conv2(halves)) + halves)
        return halves.unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(2, 3)


def test_folds_of_several_rows_a_sample_are_moved_as_they_are() -> None:
    plan = planned(randomize(Body(Windows())), (3, 8, 8), beta=2)
    network, layers = shapes.rep_network(plan, randomize(surgery.apply(plan), seed=2))
    x = images(3)
    assert torch.equal(folds.behind_elementwise(network).module(x), network.module(x))
    fused = fuse(network, layers, TORCH)
    assert {"residual", "hardtanh"} <= set(fused.matches.matched[0].parts)
    assert agreement.compare(network, fused, [x]).holds
