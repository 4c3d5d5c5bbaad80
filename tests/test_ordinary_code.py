"""Networks written in ordinary ways that were refused, did not run, or were transformed wrongly."""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import BinaryConv, Body, Residual, conv, images, planned, randomize, signs, transformed, written
from torch import Tensor, fx, nn

from repbnn_cli import graph, surgery
from repbnn_cli.channels import Tiled
from repbnn_cli.deploy import agreement
from repbnn_cli.errors import CheckpointError, SurgeryError
from repbnn_cli.graph.proxies import is_write
from repbnn_cli.user_code import user_model
from repbnn_cli.verify import Certificate, verify
from repbnn_cli.verify.certificate import _training
from repbnn_cli.verify.lockstep import difference


class Block(nn.Module):
    """A binary convolution with BatchNorm and bypass; `end` is what a test is about."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = conv(8, 8), nn.BatchNorm2d(8)
        self.setup()

    def setup(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.b(self.c(x)) + x)

    def end(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def certified(network: nn.Module, beta: int = 2) -> Certificate:
    plan, rep = transformed(randomize(network), beta=beta)
    return verify(network, plan, rep.eval(), gradients=True)


def around(block: nn.Module, out: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    return Body(block, out=out)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments by name


class ScaledConv(BinaryConv):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class ConvOption(Block):
    def setup(self) -> None:
        self.c = ScaledConv(8, 8, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(x, scale=2.0)) + x


class UpTo(Block):
    def setup(self) -> None:
        self.c = conv(8, 8, stride=2)
        self.up, self.b2 = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b2(self.up(self.b(self.c(x)), output_size=x.shape[2:])) + x


class InputsByName(Block):
    def setup(self) -> None:
        self.shift = Shift()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat(tensors=[self.shift(x=self.b(input=self.c(x=x))), x], dim=1)
        return torch.mean(input=x, dim=(2, 3), keepdim=True) / x.size(dim=1) + x


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


@pytest.mark.parametrize(("block", "out"), [(ConvOption, 8), (UpTo, 8), (InputsByName, 16)])
def test_arguments_by_name(block: type[nn.Module], out: int) -> None:
    assert certified(around(block(), out)).passed


# ---------------------------------------------------------------------------------------------------------------------
# Modules that are more than their shapes


class ReluFlat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).reshape(x.size(0), -1)


class ChannelsLastFlat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(x.size(0), -1)


class Flattening(nn.Module):
    def __init__(self, flat: nn.Module) -> None:
        super().__init__()
        self.stem, self.bn, self.block = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), ConvOption()
        self.flat, self.fc = flat, nn.Linear(8 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flat(self.block(self.bn(self.stem(x)))))


@pytest.mark.parametrize("flat", [ReluFlat, ChannelsLastFlat, nn.Flatten])
def test_what_flattens_may_do_more(flat: type[nn.Module]) -> None:
    assert certified(Flattening(flat())).passed


class Duplicated(Block):
    """Channels doubled by a list as long as sizes say."""

    times: type = list

    def end(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(x, 2)
        few = y[:, :4]
        copies = self.times([few]) * (y.shape[1] // few.shape[1])
        return torch.cat(copies, 1) + y + torch.cat((len(few.shape) // 2) * self.times([few]), 1)


class DuplicatedInTuples(Duplicated):
    times = tuple


@pytest.mark.parametrize("block", [Duplicated, DuplicatedInTuples])
def test_lists_as_long_as_sizes_say(block: type[nn.Module]) -> None:
    assert certified(around(block())).passed


class SigmoidOfOnes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)[:, :, None, None]


class Gated(Block):
    def setup(self) -> None:
        self.gate = SigmoidOfOnes()

    def end(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))


class Distance(nn.Module):
    """Of two inputs: with equal ones it would look elementwise."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * (x - y).pow(2).sum(1, keepdim=True)


class TwoInputs(Block):
    def setup(self) -> None:
        self.distance = Distance()

    def forward(self, x: Tensor) -> Tensor:
        return self.distance(self.b(self.c(x)), x)


class Mixture(Block):
    """Two weights for two branches, as many as the capture has samples."""

    def setup(self) -> None:
        self.d, self.e, self.w = conv(8, 8), nn.BatchNorm2d(8), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.b(self.c(x)), self.e(self.d(x))], 1)
        return torch.einsum("k,nkchw->nchw", F.softmax(self.w, 0), both) + x


class CountingNorm(nn.BatchNorm2d):
    """With a buffer that no channel has an entry of."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("history", torch.zeros(3))


class WithHistory(Block):
    def setup(self) -> None:
        self.b = CountingNorm(8)

    def end(self, x: Tensor) -> Tensor:
        return x


class Blurred(Block):
    """A filter that is one kernel seen by every channel: not to be written to."""

    def setup(self) -> None:
        self.register_buffer("blur", torch.full((1, 1, 3, 3), 1 / 9).expand(8, 1, 3, 3))

    def end(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.blur, padding=1, groups=8)


@pytest.mark.parametrize("block", [Gated, TwoInputs, Mixture, WithHistory, Blurred])
def test_modules_are_what_they_do(block: type[nn.Module]) -> None:
    assert certified(around(block())).passed


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


@pytest.mark.parametrize("path", ["stem", "bn", "conv1", "bn1", "shortcut", "fc"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("foreign", [False, True])
def test_hooks_of_a_layer_are_a_part_of_it(path: str, before: bool, foreign: bool) -> None:
    network = randomize(Residual())
    module = network.get_submodule(path)
    if before:
        module.register_forward_pre_hook(lambda _, given: (given[0] * 1.5 + 0.1,))
    else:
        module.register_forward_hook(lambda _, given, out: out * 1.5 - 0.1)
    plan, rep = transformed(network)
    certificate = verify(network, plan, rep.eval(), gradients=foreign)
    assert certificate.passed, str(certificate)


# ---------------------------------------------------------------------------------------------------------------------
# Replicas as samples: one value beside all channels, outputs without channels, outputs with names


class SoftGate(Block):
    def end(self, x: Tensor) -> Tensor:
        y = x.softmax(1)
        return x * y.amax(1, keepdim=True)


class Normalised(Block):
    def end(self, x: Tensor) -> Tensor:
        y = x.flip(1)
        return (y - y.mean(1, keepdim=True)) / y.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("block", [SoftGate, Normalised])
def test_one_value_for_all_channels_beside_them(block: type[nn.Module]) -> None:
    assert certified(around(block())).passed


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), Plain())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cosine_similarity(self.trunk(x).mean((2, 3)), self.trunk(y).mean((2, 3)))


class Plain(Block):
    def end(self, x: Tensor) -> Tensor:
        return x


def test_a_similarity_is_that_of_all_replicas() -> None:
    network = randomize(Siamese())
    plan, rep = transformed(network, shape=((3, 8, 8), (3, 8, 8)))
    assert verify(network, plan, rep.eval(), gradients=True).passed
    assert rep(images(4), images(4, seed=2)).shape == (4,)


class Result(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Record:
    logits: Tensor
    features: Tensor


@pytest.mark.parametrize("kind", [Result, Record])
def test_outputs_with_names(kind: type) -> None:
    class Named(Body):
        def forward(self, x: Tensor) -> object:
            x = self.body(self.bn(self.stem(x))).mean((2, 3))
            return kind(logits=self.fc(x), features=x)

    network = Named(Plain())
    plan, rep = transformed(randomize(network))
    certificate = verify(network, plan, rep.eval(), gradients=True)
    assert certificate.passed, str(certificate)
    (note,) = plan.notes
    assert '`match: {path: ":mean"}, apply: select_inputs, share: 1_over_beta` gives one replica' in note
    given = rep(images(3))
    assert isinstance(given, kind)
    assert given.features.shape == (3, 16)


class Recursive(Block):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.b(self.c(x)) + x
        return x


def test_the_certificate_counts_every_call() -> None:
    (cost,) = (c for c in certified(around(Recursive())).checks if c.name == "convolution cost unchanged")
    assert cost.values["macs"] == [3 * 64 * 8 * 8 * 9] * 2


class Bases(BinaryConv):
    """ABC-Net: one kernel, applied to several binarisations of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(super(Bases, self).forward(x - shift) for shift in (-0.5, 0.0, 0.5))  # type: ignore[return-value]


def test_the_certificate_counts_every_convolution_of_a_forward() -> None:
    class Several(Plain):
        def setup(self) -> None:
            self.c = Bases(8, 8, 3, padding=1, bias=False)

    (cost,) = (c for c in certified(around(Several())).checks if c.name == "convolution cost unchanged")
    assert cost.values["macs"] == [3 * 64 * 8 * 8 * 9] * 2


@pytest.mark.parametrize("in_place", [True, False])
def test_a_bypass_is_one_however_it_is_added(in_place: bool) -> None:
    class Down(Block):
        def setup(self) -> None:
            self.down = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.c(x))
            if in_place:
                y += self.down(x)
                return y
            return y + self.down(x)

    parts = {e.path: e.part for e in planned(randomize(around(Down()))).edits}
    assert (parts["body.c"], parts["body.down"]) == ("backbone", "bypass")


def test_that_no_layer_becomes_a_repconv_is_noted() -> None:
    tiled = written("extends: reptran\nrules:\n  mine: {part: backbone, match: {path: body.c}, apply: tile}\n")
    assert "no binary layer becomes a RepConv (body.c)" in planned(randomize(around(Plain())), rule=tiled).notes


# ---------------------------------------------------------------------------------------------------------------------
# Writes


class InPlacePower(Block):
    def end(self, x: Tensor) -> Tensor:
        x = x * 1.0
        x **= 2
        return x.requires_grad_()


class Masks(Block):
    def end(self, x: Tensor) -> Tensor:
        return x * ((x > -1) & (x < 1)).float()


class MinusInfinity(Block):
    """An attention mask."""

    def end(self, x: Tensor) -> Tensor:
        return x.masked_fill(x < 0, -math.inf).exp()


class WrittenLater(Block):
    """Another form of what is written to exists by then."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        z = y + x
        F.relu_(y)
        return (y + x) + z


class Assigned(nn.Module):
    """An assignment to what is not expanded yet."""

    def __init__(self) -> None:
        super().__init__()
        self.network = randomize(Residual())

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 0.5
        return self.network(x * 2 + x)


def test_an_assignment_before_the_expansion() -> None:
    assert certified(Assigned()).passed


@pytest.mark.parametrize("block", [InPlacePower, Masks, MinusInfinity, WrittenLater])
def test_writes_and_masks(block: type[nn.Module]) -> None:
    assert certified(around(block())).passed


class WritesToItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = randomize(Residual())

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        return self.network(x)


def test_a_forward_may_write_to_its_input() -> None:
    assert certified(WritesToItsInput()).passed


def test_parameters_may_be_frozen() -> None:
    network = randomize(Residual()).requires_grad_(False)
    found = {c.name: c for c in certified(network).checks}
    assert found["captured learns as source"].passed
    assert "0 gradients compared" in found["captured learns as source"].summary


@pytest.mark.parametrize(("call", "writes"), [
    (operator.and_, False), (operator.or_, False), (operator.iand, True), (operator.ipow, True), (torch.relu_, True),
])  # fmt: skip
def test_what_writes(call: Callable[..., object], writes: bool) -> None:
    tape = fx.Graph()
    x = tape.placeholder("x")
    assert is_write(tape.call_function(call, (x, x))) is writes


# ---------------------------------------------------------------------------------------------------------------------
# Names, groups, parametrisations


class Named(nn.Module):
    """A module that has the name the tool would give a helper."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), conv(8, 8)
        self.conv_repeat, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        y = self.conv(x)
        return self.fc(self.conv_repeat(x + y * F.hardtanh(y)).mean((2, 3)))


def test_helpers_have_names_of_their_own() -> None:
    assert certified(Named()).passed


class GroupConv(nn.Module):
    """Groups and kernel shape under names of its own."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.shape, self.number = (8, 8 // groups, 3, 3), groups
        self.weight = nn.Parameter(torch.randn(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(signs(x), signs(self.weight).view(self.shape), None, 1, 1, 1, self.number)


class Grouped(Block):
    def __init__(self, groups: int, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = GroupConv(groups), norm

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.norm(self.first(x))) + x
        return self.b(self.c(x)) + x


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.Identity()])
@pytest.mark.parametrize("groups", [2, 8])
def test_groups_under_another_name(groups: int, norm: nn.Module) -> None:
    assert certified(around(Grouped(groups, norm))).passed


class Parametrised(Block):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.c = layer

    def end(self, x: Tensor) -> Tensor:
        return x


def test_the_gains_of_weight_norm_are_those_of_the_shared_filters() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, 1, 1, bias=False))
    network = around(Parametrised(layer))
    plan, rep = transformed(randomize(network))
    gains = rep.get_submodule("body.c").parametrizations.weight.original0
    expected = layer.parametrizations.weight.original0.view(2, 4).mean(0)
    torch.testing.assert_close(gains.flatten(), expected)
    assert verify(network, plan, rep.eval(), gradients=True).passed


class Turned(nn.Module):
    """Keeps a kernel as one column."""

    def forward(self, w: Tensor) -> Tensor:
        return w.view(8, 8, 3, 3)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.reshape(-1, 1)


def test_parametrisations_that_know_their_size_are_refused() -> None:
    flat = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
    nn.utils.parametrize.register_parametrization(flat, "weight", Turned(), unsafe=True)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, 1, 1, bias=False))
    for layer in (flat, spectral):
        with pytest.raises(SurgeryError, match=r"body\.c"):
            transformed(randomize(around(Parametrised(layer))))


def test_a_layer_with_a_weight_from_a_hook_is_named() -> None:
    network = around(Parametrised(conv(8, 8)))
    nn.utils.weight_norm(network.stem)
    with pytest.raises(SurgeryError, match=r"stem: its weight is computed before each forward.*remove_weight_norm"):
        transformed(randomize(network))


def test_a_checkpoint_of_the_former_weight_norm_fits_the_new_one() -> None:
    old, new = nn.Conv1d(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3))
    nn.utils.weight_norm(old)
    user_model.load_weights(new, old.state_dict())
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(new(x), old(x))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        user_model.load_weights(new, {"weight_g": torch.ones(4, 1, 1)})


def test_a_last_layer_that_normalises_its_kernel_is_told_what_to_do() -> None:
    network = around(Plain())
    network.fc = nn.utils.parametrizations.weight_norm(network.fc)
    check = certified(network).checks[-1]
    assert not check.passed
    assert "`--last-layer 1_over_beta`" in check.summary
    plan, rep = transformed(randomize(network), last_layer="1_over_beta")
    assert verify(network, plan, rep.eval(), gradients=True).passed


# ---------------------------------------------------------------------------------------------------------------------
# Captures


def test_a_forward_of_the_instance_is_the_one_that_is_captured() -> None:
    network = randomize(Residual())
    plain = network.forward
    network.forward = types.MethodType(lambda self, x: plain(x) * 2, network)  # type: ignore[method-assign]
    assert certified(network).passed


def test_shapes_of_numpy_and_of_nonsense() -> None:
    network = randomize(Residual())
    assert graph.capture(network, tuple(np.array([3, 8, 8]))).example == ((2, 3, 8, 8),)
    with pytest.raises(TypeError):
        graph.capture(network, (3, (1, 2)))


class Noisy(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return self.b(y + 0 * torch.randn_like(y)) + x


def test_noise_is_drawn_for_each_replica() -> None:
    plan = planned(randomize(around(Noisy())))
    (noise,) = (step for name, step in plan.steps.items() if name.startswith("randn_like"))
    assert isinstance(noise.state, Tiled)
    assert surgery.apply(plan) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons


def test_nan_is_never_equal_and_infinities_are() -> None:
    zero, nan, infinite = torch.zeros(2), torch.tensor([math.nan, 0.0]), torch.tensor([-math.inf, 0.0])
    assert math.isnan(difference((zero, zero), (zero, nan)))
    assert math.isnan(difference((nan, zero), (zero, zero)))
    assert difference((infinite,), (infinite.clone(),)) == 0.0
    assert difference((infinite,), (zero,)) == math.inf


class Weighted(nn.Module):
    def __init__(self, w: nn.Parameter, factor: float) -> None:
        super().__init__()
        self.w, self.factor = w, factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w + (self.w * 0).sqrt() * self.factor


def test_a_gradient_that_is_nan_on_one_side() -> None:
    one = Weighted(nn.Parameter(torch.ones(2)), 0.0)
    plain = nn.Module()
    plain.w = one.w
    plain.forward = types.MethodType(lambda self, x: x * self.w, plain)  # type: ignore[method-assign]
    assert not _training(plain, one, [torch.ones(3, 2)]).passed


def test_a_module_that_gives_nan_is_no_agreement() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)).eval()
    one, other = (graph.capture(network, (3, 4, 4)) for _ in range(2))
    with torch.no_grad():
        fresh = nn.Conv2d(3, 3, 1)
        fresh.weight.fill_(math.nan)
        other.module.add_module("0", fresh)
    found = agreement.compare_modules(one, other, [images(size=4)])
    assert math.isnan(found.largest)
    assert not found.holds
    assert found.where == "0"
