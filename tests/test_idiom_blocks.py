"""Blocks of research code, each in a small network that is captured, transformed and verified, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from idiom_networks import Net, SignAndScale, conv, refusal, transformed
from torch import Tensor, nn
from torch.nn import functional as F


class Blocks(Net):
    """A convolution and its BatchNorm, for bodies to play with."""

    def build(self) -> None:
        self.conv, self.bn = conv(), nn.BatchNorm2d(8)
        self.setup()

    def setup(self) -> None:
        pass


class PreluBeforeBn(Blocks):
    def setup(self) -> None:
        self.act = nn.PReLU(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.act(self.conv(x))) + x


class PreActivation(Blocks):
    def body(self, x: Tensor) -> Tensor:
        return self.conv(F.hardtanh(self.bn(x))) + x


class NoNorm(Blocks):
    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) * 0.05) + x


class BlockScales(Blocks):
    """Scales and shifts that the block owns, in several shapes, used by channel."""

    def setup(self) -> None:
        self.a, self.b = nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Parameter(torch.ones(8))
        self.c = nn.Parameter(torch.ones(8, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)) * self.b.view(1, -1, 1, 1)
        return y * self.a + (1 - self.a) * x + self.c.abs()


class FixedSizeScale(Blocks):
    """`view(1, 8, 1, 1)` cannot follow a tiled parameter: the copies share it."""

    def setup(self) -> None:
        self.b = nn.Parameter(torch.ones(8))

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.b.view(1, 8, 1, 1) + x


class ClampInTraining(Blocks):
    def setup(self) -> None:
        self.a = nn.Parameter(torch.full((1, 8, 1, 1), 1.2))

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            self.a.data.clamp_(0.1, 0.9)
        return self.bn(self.conv(x)) * self.a + x


class ClampLoop(Blocks):
    def body(self, x: Tensor) -> Tensor:
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.data.clamp_(min=0.01)
        return self.bn(self.conv(x)) + x


class LooksAtValues(Blocks):
    """A branch on the activations' values: it is said, and the operators that it alone needs are left out."""

    def body(self, x: Tensor) -> Tensor:
        if x.detach().abs().max() < 0:
            x = x * 2
        return self.bn(self.conv(x)) + x


class TwoResults(Blocks):
    def body(self, x: Tensor) -> Tensor:
        signs, size = SignAndScale.apply(x)
        return self.bn(self.conv(signs) * size) + x


class ChannelMean(Blocks):
    """The number of channels in arithmetic."""

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * (x.sum(1, keepdim=True) / x.size(1)) + x


class Groups(Blocks):
    def setup(self) -> None:
        self.norm, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)

    def body(self, x: Tensor) -> Tensor:
        return self.instance(self.norm(self.conv(x))) + x


class Dense(Blocks):
    width = 24

    def setup(self) -> None:
        self.conv2, self.bn2 = conv(16, 8), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.bn(self.conv(x))], 1)
        return torch.cat([x, self.bn2(self.conv2(x))], 1)


class MixedMaps(Blocks):
    """One scale for a concatenated stream, [A A B B], and for a fresh one, [A B A B]."""

    width = 16

    def setup(self) -> None:
        self.conv2, self.bn2 = conv(16, 16), nn.BatchNorm2d(16)
        self.a = nn.Parameter(torch.full((1, 16, 1, 1), 0.4))

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.bn(self.conv(x))], 1)
        return self.a * x + (1 - self.a) * self.bn2(self.conv2(x)).clamp(-1, 1)


class Rearranged(Blocks):
    """Shuffle, narrow, space to depth, channels last."""

    width = 16

    def setup(self) -> None:
        self.conv2, self.bn2 = conv(16, 16), nn.BatchNorm2d(16)

    def body(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.bn(self.conv(x)).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)
        y = F.pixel_unshuffle(y.narrow(1, 0, 4), 2)
        y = y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.bn2(self.conv2(y)) + y


class Lists(Blocks):
    def setup(self) -> None:
        self.stages = nn.ModuleList([nn.Sequential(conv(), nn.BatchNorm2d(8)) for _ in range(2)])

    def body(self, x: Tensor) -> Tensor:
        outputs = [x]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]) + outputs[-1])
        return outputs[-1] + 0.5 * outputs[1]


class PooledFirst(Blocks):
    def body(self, x: Tensor) -> Tensor:
        return self.bn(F.max_pool2d(self.conv(x), 2)) + F.avg_pool2d(x, 2)


class HardCodedView(Blocks):
    width = 8 * 16

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.bn(self.conv(self.bn0(self.stem(x)))), 2)
        return self.fc(x.view(-1, 128))


class NormOnLogits(Blocks):
    def setup(self) -> None:
        self.last = nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        return F.log_softmax(self.last(self.fc((self.bn(self.conv(x)) + x).mean((2, 3)))), 1)


class StemOfSeveral(Blocks):
    def setup(self) -> None:
        self.stem2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn2(self.stem2(torch.relu(x))))
        return self.bn(self.conv(x)) + x


class ConvClassifier(Blocks):
    def setup(self) -> None:
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        return self.head(self.bn(self.conv(x)) + x).mean((2, 3))


class Gate(Blocks):
    def setup(self) -> None:
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid()
        )

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.se(x) + x


class SeveralOutputs(Blocks):
    def setup(self) -> None:
        self.side = nn.Linear(8, 3)

    def forward(self, x: Tensor, gain: float = 1.0) -> Any:
        x = self.bn0(self.stem(x))
        y = (self.bn(self.conv(x)) + x).mean((2, 3)) * gain
        return {"logits": self.fc(y), "side": self.side(y)}


BLOCKS = [
    PreluBeforeBn, PreActivation, NoNorm, BlockScales, FixedSizeScale, ClampInTraining, ClampLoop, LooksAtValues,
    TwoResults, ChannelMean, Groups, Dense, MixedMaps, Rearranged, Lists, PooledFirst, HardCodedView, NormOnLogits,
    StemOfSeveral, ConvClassifier, Gate, SeveralOutputs,
]  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("beta", [2, 4])
def test_blocks(kind: type[nn.Module], beta: int) -> None:
    transformed(kind, beta=beta)


def test_scales_of_a_block_are_tiled_so_that_the_copies_can_drift_apart() -> None:
    tiled = {e.path: e.after for e in transformed(BlockScales).edits if e.action == "parameter"}
    assert tiled == {"a": "(1, 16, 1, 1)", "b": "(16)", "c": "(16, 1, 1)"}


class NarrowGate(Blocks):
    def setup(self) -> None:
        self.se = nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 8), nn.Sigmoid())

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.se(x.mean((2, 3))).unsqueeze(-1).unsqueeze(-1) + x


class SpatialAttention(Blocks):
    """CBAM's: one map for all channels, from their mean and their maximum."""

    def setup(self) -> None:
        self.attention = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def body(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        maps = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)
        return y * torch.sigmoid(self.attention(maps)) + x


@pytest.mark.parametrize(("kind", "path"), [(NarrowGate, "se.0"), (SpatialAttention, "attention")])
@pytest.mark.parametrize("beta", [2, 4])
def test_a_float_layer_with_fewer_outputs_than_beta_is_applied_to_each_replica(
    kind: type[nn.Module], path: str, beta: int
) -> None:
    plan = transformed(kind, beta=beta)
    assert [e.path for e in plan.edits if e.action == "per_replica"] == [path]
    (note,) = [note for note in plan.notes if f"has fewer outputs than β = {beta}" in note]
    assert f"({path})" in note


class Six(Blocks):
    def setup(self) -> None:
        self.squeeze, self.widen = nn.Linear(8, 6), nn.Linear(6, 8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.widen(self.squeeze(x.mean((2, 3))))[:, :, None, None] + x


def test_other_layers_that_beta_does_not_divide_are_refused() -> None:
    message = refusal(Six, beta=4)
    assert "squeeze: beta 4 does not divide its 6 output channels" in message
    assert "`apply: tile`" in message


def test_a_gate_is_applied_to_each_replica_by_a_rule() -> None:
    plan = transformed(
        NarrowGate, 'rules: {gate: {part: backbone, match: {path: "se.*"}, apply: tile, optional: true}}'
    )
    assert [e.path for e in plan.edits if e.action == "per_replica"] == ["se.0", "se.2"]


class FunctionalNorm(Blocks):
    def setup(self) -> None:
        self.gain, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def body(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), None, None, self.gain, self.shift, training=True) + x


class NormOverChannels(Blocks):
    def setup(self) -> None:
        self.norm = nn.LayerNorm(8)

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x


class FunctionalPrelu(Blocks):
    def setup(self) -> None:
        self.slope = nn.Parameter(torch.full((8,), 0.25))

    def body(self, x: Tensor) -> Tensor:
        return self.bn(F.prelu(self.conv(x), self.slope)) + x


class BatchInFunction(Blocks):
    """Replicas cannot be given to what looks at a whole batch."""

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + Centred.apply(x)


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1) - x.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.flip(1) - grad.mean()


@pytest.mark.parametrize("kind", [FunctionalNorm, FunctionalPrelu, NormOverChannels])
def test_functions_with_parameters_by_channel(kind: type[nn.Module]) -> None:
    transformed(kind)


def test_the_parameters_of_a_functional_batch_norm_are_tiled() -> None:
    assert {e.path: e.after for e in transformed(FunctionalNorm).edits if e.action == "parameter"} == {
        "gain": "(16)",
        "shift": "(16)",
    }


class Reused(Blocks):
    def body(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)) + x
        return self.bn(self.conv(x)) + x


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (BatchInFunction, ["test_idiom_blocks.py:", "mixes channels in a way that is not known"]),
    ],
)
def test_what_cannot_be_carried_is_named(kind: type[nn.Module], says: list[str]) -> None:
    message = refusal(kind)
    assert all(text in message for text in says), message


def test_a_module_that_is_called_twice_is_carried_where_both_calls_agree() -> None:
    transformed(Reused)
