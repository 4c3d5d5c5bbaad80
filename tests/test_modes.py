"""Networks that branch on `self.training`: two graphs over the same modules, transformed and verified together."""

from __future__ import annotations

import copy
import operator
import random
from typing import Any

import numpy as np
import pytest
import torch
from idiom_networks import Net, generic, refusal, transformed
from networks import Sign, assert_same_outcome, conv, images
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from repbnn_cli import graph, rules, surgery, verify
from repbnn_cli.errors import CaptureError
from repbnn_cli.graph import KeptGraphModule
from repbnn_cli.plan import Plan


class Modes(Net):
    def build(self) -> None:
        self.conv, self.bn, self.conv2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8), conv(8, 8), nn.BatchNorm2d(8)
        self.setup()

    def setup(self) -> None:
        pass

    def body(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)) + x
        return self.bn2(self.conv2(x)) + x


class StochasticDepth(Modes):
    """Written out in the forward, in place into memory that was not initialised."""

    def body(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.training:
            y = y * x.new_empty((len(x), 1, 1, 1)).bernoulli_(0.9) / 0.9
        x = y + x
        return drop_path(self.bn2(self.conv2(x)), 0.5, self.training) + x


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    if rate == 0.0 or not training:
        return x
    mask = (1 - rate) + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    return x.div(1 - rate) * mask.floor_()


class Noise(Modes):
    """Draws for every channel, so for every replica."""

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.randn_like(x) * 0.1
        return super().body(x)


class EarlyReturn(Modes):
    def body(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if not self.training:
            return y + x * 2
        return self.bn2(self.conv2(y + x))


class Auxiliary(Modes):
    """A second classifier, with a binary convolution of its own, in training alone."""

    def setup(self) -> None:
        self.aux_conv, self.aux_bn, self.aux = conv(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.bn0(self.stem(x))
        y = self.body(x)
        if self.training:
            return self.fc(y.mean((2, 3))), self.aux(self.aux_bn(self.aux_conv(x)).mean((2, 3)))
        return self.fc(y.mean((2, 3)))


class Features(Modes):
    def forward(self, x: Tensor) -> Any:
        y = self.body(self.bn0(self.stem(x)))
        return (self.fc(y.mean((2, 3))), y) if self.training else self.fc(y.mean((2, 3)))


class Probabilities(Modes):
    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return x if self.training else {"scores": x.softmax(1), "labels": x.argmax(1)}


class MoreLayers(Modes):
    """A branch that is left out of the deployed network; constants that differ by mode."""

    def setup(self) -> None:
        self.extra, self.extra_bn = conv(8, 8), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            return super().body(x * torch.full((), 0.5)) + self.extra_bn(self.extra(x))
        return super().body(x * torch.full((), 2.0))


class Calls(Modes):
    """Kernels that the forward hands to F.conv2d, in training one more of them, and first."""

    def setup(self) -> None:
        self.first, self.second = (nn.Parameter(torch.randn(8, 8, 3, 3)) for _ in range(2))
        self.only = nn.Parameter(torch.randn(8, 8, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + F.conv2d(Sign.apply(x), Sign.apply(self.only)) / 8
        x = self.bn(F.conv2d(Sign.apply(x), Sign.apply(self.first), padding=1)) + x
        return self.bn2(F.conv2d(Sign.apply(x), Sign.apply(self.second), padding=1)) + x


class WithoutGradient(Modes):
    """What a graph has no block for: a clamp of parameters, statistics of its own, a lesson from its own teacher."""

    def setup(self) -> None:
        self.register_buffer("mean", torch.zeros(1))
        self.teacher, self.teacher_bn = conv(8, 8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            with torch.no_grad():
                for module in self.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.weight.clamp_(0.1, 1.0)
        x = self.bn0(self.stem(x))
        y = self.body(x)
        logits = self.fc(y.mean((2, 3)))
        if not self.training:
            return logits - self.mean
        with torch.no_grad():
            self.mean.mul_(0.9).add_(logits.mean() * 0.1)
            lesson = self.teacher_bn(self.teacher(x))
            with torch.enable_grad():
                shifted = lesson + y
        return logits, F.mse_loss(y, lesson) + shifted.mean() + y.pow(2).sum((1, 2, 3)).mean()


class Compared(Modes):
    """`if self.training == True`, checkpointed in training."""

    def body(self, x: Tensor) -> Tensor:
        if self.training == True:  # noqa: E712
            return super().body(checkpoint(F.hardtanh, x, use_reentrant=True) * 2)
        return super().body(x)


class Variables(Modes):
    """As of 2017: `Variable`, a size as a whole, a new tensor that is filled with noise."""

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + Variable(torch.randn(x.size())) * 0.1 + x.new(x.size()).normal_() * 0.1
        return super().body(Variable(x))


class Mixed(Modes):
    """Mixup: another order of the batch, drawn for its size."""

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            x = 0.7 * x + 0.3 * x[torch.randperm(x.size(0))]
        return super().body(x)


class Embedding(Modes):
    """Features in eval mode, logits in training: the last convolution is the last layer in one of them alone."""

    def forward(self, x: Tensor) -> Any:
        y = self.body(self.bn0(self.stem(x))).mean((2, 3))
        return self.fc(y) if self.training else y


class Clamped(Modes):
    """Writes into its parameters in training alone."""

    def setup(self) -> None:
        self.scale = nn.Parameter(torch.full((1, 8, 1, 1), 1.2))

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.data.clamp_(0.1, 0.9)
        return super().body(x) * self.scale


class Identical(Modes):
    """`self.training is True`, which no value of a graph is."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x * 3 if self.training is True else x)


class LookedUp(Modes):
    def body(self, x: Tensor) -> Tensor:
        y = {True: self.bn, False: self.bn2}[self.training](self.conv(x)) + x
        return self.bn2(self.conv2(y)) + y


KINDS = [
    StochasticDepth, Noise, EarlyReturn, Auxiliary, Features, Probabilities, MoreLayers, Calls, Clamped,
    WithoutGradient, Compared, Variables, Mixed, Embedding, Identical,
    LookedUp,
]  # fmt: skip


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return generic(kind())


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_network_does_in_each_mode_what_its_source_does(kind: type[nn.Module], mode: bool) -> None:
    model = made(kind).train(mode)
    captured = graph.capture(model, (3, 8, 8)).module
    assert captured.training is mode
    for train in (True, False, True):
        assert_same_outcome(model, captured, images(3), train=train)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [2, 4])
def test_the_certificate_speaks_of_both_modes(kind: type[nn.Module], beta: int) -> None:
    model = made(kind)
    plan, rep = in_both_modes(model, beta=beta)
    certificate = verify.verify(model, plan, rep, gradients=True)
    assert certificate.passed, [(c.name, c.summary) for c in certificate.checks if not c.passed]
    assert [c.name for c in certificate.checks][-2:] == ["merged-kernel identity", "identity in training mode"]


def in_both_modes(model: nn.Module, beta: int = 2) -> tuple[Plan, KeptGraphModule]:
    plan = surgery.plan(graph.capture(model, (3, 8, 8)), rules.load("reptran").with_options(beta=beta))
    return plan, surgery.apply(plan)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (Noise, Calls, Variables, WithoutGradient)])
def test_where_the_filters_that_share_a_channel_are_alike_training_is_the_source_s(kind: type[nn.Module]) -> None:
    """Closed form: a RepConv then gives β times the source's output, and a BatchNorm on batch statistics with hardly
    any ε takes the factor away. So both networks compute the same in training mode, masks of whole samples included."""
    model = made(kind).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-12
            elif isinstance(module, nn.Conv2d) and module is not model.stem:
                module.weight[4:] = module.weight[:4]
    _, rep = in_both_modes(model)
    outputs = []
    for network in (model, rep):
        torch.manual_seed(5)
        outputs.append(network.train()(images(6, dtype=torch.float64)))
    theirs, ours = (list(o) if isinstance(o, tuple) else [o] for o in outputs)
    if kind is Features:  # all replicas of it
        theirs[1] = torch.cat([theirs[1]] * 2, 1)
    assert [o.shape for o in ours] == [t.shape for t in theirs]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def test_the_rep_network_returns_what_its_mode_returns() -> None:
    plan, rep = in_both_modes(made(Auxiliary))
    assert {e.path: (e.action, e.after) for e in plan.edits if e.path.startswith("aux")} == {
        "aux_conv": ("rep_conv", "(4, 16, 3, 3)"),
        "aux_bn": ("rep_batch_norm", "(16)"),
        "aux": ("select_inputs", "(3, 16)"),
    }
    for network in (rep, copy.deepcopy(rep), surgery.apply(plan, state=rep.state_dict())):
        assert [t.shape for t in network.train()(images())] == [(2, 5), (2, 3)]
        assert network.eval()(images()).shape == (2, 5)
    assert not [name for name in rep.state_dict() if "in_training" in name]


def test_a_fault_in_what_training_alone_computes_is_found() -> None:
    model = made(Auxiliary)
    plan, rep = in_both_modes(model)
    with torch.no_grad():
        rep.aux.weight.copy_(rep.aux.weight.roll(1, 1))
    failed = [c.name for c in verify.verify(model, plan, rep, gradients=False).checks if not c.passed]
    assert failed == ["weights carried over", "identity in training mode"]


def test_a_wrong_operator_in_training_mode_is_found() -> None:
    model = made(StochasticDepth)
    plan, rep = in_both_modes(model)
    assert rep.in_training is not None
    node = next(n for n in rep.in_training.graph.nodes if n.target is operator.truediv)
    node.args = (node.args[0], 0.25)
    (failed,) = [c for c in verify.verify(model, plan, rep, gradients=False).checks if not c.passed]
    assert (failed.name, failed.values["failed"]) == ("identity in training mode", [f":{node.name}"])


def test_beta_one_keeps_both_modes() -> None:
    model = made(Auxiliary)
    plan, rep = in_both_modes(model, beta=1)
    torch.testing.assert_close(rep.train()(images()), model.train()(images()))
    assert verify.verify(model, plan, rep, gradients=True).passed


def test_a_rule_may_speak_of_what_training_alone_calls() -> None:
    text = "rules: {mine: {part: last_layer, match: {path: aux}, apply: select_inputs, share: 1_over_beta}}"
    assert next(e for e in transformed(Auxiliary, text).edits if e.path == "aux").after == "(3, 8)"


# ---------------------------------------------------------------------------------------------------------------------
# Parts that stay in eval mode


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(x), 0.5, self.training)
        return x * 3 if self.training else x


def test_a_flag_that_is_only_handed_on_needs_no_graph_of_its_own() -> None:
    class HandedOn(Modes):
        def body(self, x: Tensor) -> Tensor:
            return super().body(F.dropout(x, 0.3, self.training))

    assert graph.capture(made(HandedOn), (3, 8, 8)).in_training is None


class Frozen(Modes):
    """Keeps a part in eval mode, as teachers and the BatchNorms of detectors are kept."""

    def setup(self) -> None:
        self.part = Dropping()

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.part.eval()
        return self

    def body(self, x: Tensor) -> Tensor:
        return self.part(super().body(x))


class FrozenWithBranch(Frozen):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x * 2 if self.training else x)


class FrozenByForward(Frozen):
    """Each forward does it again."""

    def train(self, mode: bool = True) -> FrozenByForward:
        nn.Module.train(self, mode)
        return self

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            self.part.eval()
        return super().body(x)


@pytest.mark.parametrize("kind", [Frozen, FrozenWithBranch, FrozenByForward])
def test_what_a_network_keeps_in_eval_mode_stays_in_it(kind: type[nn.Module]) -> None:
    model = made(kind)
    plan, rep = in_both_modes(model)
    assert verify.verify(model, plan, rep, gradients=True).passed
    for network in (plan.network.module, rep, copy.deepcopy(rep)):
        network.train()
        assert [n for n, m in network.named_modules() if not m.training] == ["part", "part.norm"]
        before = network.part.norm.running_mean.clone()
        network(images())
        assert torch.equal(network.part.norm.running_mean, before)
        assert not any(m.training for m in network.eval().modules())
    torch.manual_seed(1)
    expected = model.train()(images())
    torch.manual_seed(1)
    assert torch.equal(plan.network.module.train()(images()), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What a graph cannot follow: noted, or refused


class Remembers(Modes):
    """Counts what nothing depends on, and leaves a loss for the training script."""

    def setup(self) -> None:
        self.calls, self.loss = 0, None

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = super().body(x)
        self.loss = y.pow(2).mean()
        return y


def test_an_attribute_that_a_forward_sets_is_noted() -> None:
    model = made(Remembers)
    network = graph.capture(model, (3, 8, 8))
    (note,) = network.notes
    assert note.endswith(": sets loss, which the transformed network does not")
    assert (model.calls, model.loss) == (0, None)
    assert_same_outcome(model, network.module, images(), train=True)


class Taught(Modes):
    """A teacher inside the network, trained before."""

    def setup(self) -> None:
        self.teacher = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), conv(8, 8), conv(8, 8))
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        z = super().forward(x)
        return (z, self.teacher(x).mean((2, 3))) if self.training else z


def test_a_frozen_layer_that_becomes_a_rep_conv_is_noted() -> None:
    plan = transformed(Taught)
    assert [n for n in plan.notes if "frozen (requires_grad = False)" in n and "teacher.2" in n]
    kept = transformed(Taught, 'rules: {teacher: {part: first_layer, match: {path: "teacher.*"}, apply: keep}}')
    assert not [n for n in kept.notes if "frozen" in n]
    assert not [e for e in kept.edits if e.path.startswith("teacher")]


class WarmUp(Modes):
    """A number that decides, in an attribute."""

    def setup(self) -> None:
        self.step = 0

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            self.step += 1
            x = x * min(1.0, self.step / 100)
        return super().body(x)


class FirstBatch(Modes):
    """A scale that the first batch sets; a graph would set it for ever."""

    def setup(self) -> None:
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("done", torch.zeros(1, dtype=torch.bool))

    def body(self, x: Tensor) -> Tensor:
        if self.training and not self.done:
            self.scale.data.copy_(x.abs().mean())
            self.done.fill_(True)
        return super().body(x) * self.scale


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (WarmUp, "the forward changes step, and the next one computes something else from it"),
        (FirstBatch, "decides on done, which the forward itself writes to (test_modes.py:"),
    ],
)
def test_what_a_graph_would_do_for_ever_is_refused(kind: type[nn.Module], says: str) -> None:
    model = made(kind)
    with pytest.raises(CaptureError) as caught:
        graph.capture(model, (3, 8, 8))
    assert says in str(caught.value)
    as_before = made(kind).state_dict()
    assert all(torch.equal(t, as_before[n]) for n, t in model.state_dict().items())


class Coin(Modes):
    def heads(self) -> bool:
        raise NotImplementedError

    def body(self, x: Tensor) -> Tensor:
        if self.training and self.heads():
            return x
        return super().body(x)


class PythonCoin(Coin):
    def heads(self) -> bool:
        return random.random() < 0.5


class NumpyCoin(Coin):
    def heads(self) -> bool:
        return bool(np.random.rand() < 0.5)


class TorchCoin(Coin):
    def heads(self) -> bool:
        return bool(torch.rand(1) < 0.5)


@pytest.mark.parametrize("kind", [PythonCoin, NumpyCoin, TorchCoin])
def test_a_coin_that_decides_in_training_is_refused(kind: type[nn.Module]) -> None:
    model = made(kind)
    with pytest.raises(
        CaptureError, match=r"before this line a random number is drawn in training mode .*`torch\.rand"
    ):
        graph.capture(model, (3, 8, 8))
    assert not model.training


class OtherChannels(Modes):
    """The BatchNorm is behind the convolution in one mode, behind the sum in the other."""

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y + x if self.training else y) + x


class SumBehind(Modes):
    """In one mode the convolution's BatchNorm takes its repeat over, in the other something else has to."""

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn2(y + x) if self.training else self.bn(y) + x


def test_a_convolution_whose_repeat_another_layer_takes_over_in_each_mode() -> None:
    plan = transformed(SumBehind)
    assert next(e.repeats for e in plan.edits if e.path == "conv") == 1


def test_a_module_with_other_channels_in_each_mode_is_refused() -> None:
    assert "bn: carries other channels in training mode" in refusal(OtherChannels)
