"""Which source channel each expanded channel stands for, through every operator: what is carried, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from merged_reference import assert_identical, both
from networks import Body, conv, images, planned, randomize, transformed, written
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import verify
from repbnn_cli.channels import (
    Compact,
    Tiled,
    concatenated,
    flattened,
    grouped,
    permutation,
    plain,
)
from repbnn_cli.errors import SurgeryError
from repbnn_cli.recognize.trials import acts_per_sample, commutes

# ---------------------------------------------------------------------------------------------------------------------
# Maps


def test_a_repeated_output_counts_up_again_and_again() -> None:
    assert Compact(2, 4, 4, "before_batch_norm").index == (0, 1, 2, 3, 0, 1, 2, 3)
    assert plain(3, 2) == Tiled((0, 1, 2, 0, 1, 2), 3)
    assert plain(3, 2).plain
    assert not Tiled((0, 0, 1, 1), 2).plain


def test_replica_is_the_how_manieth_copy() -> None:
    assert plain(2, 3).replica == (0, 0, 1, 1, 2, 2)
    assert Tiled((0, 0, 1, 1), 2).replica == (0, 1, 0, 1)


def test_concatenation_gives_a_a_b_b() -> None:
    joined = concatenated([plain(2, 2), plain(1, 2)])
    assert joined == Tiled((0, 1, 0, 1, 2, 2), 3)


def test_flatten_multiplies() -> None:
    assert flattened(plain(2, 2), 3) == Tiled((0, 1, 2, 3, 4, 5) * 2, 6)


def test_permutation_takes_one_order_to_another() -> None:
    have, want = Tiled((0, 0, 1, 1), 2), plain(2, 2)
    order = permutation(have, want)
    assert order == (0, 2, 1, 3)
    assert [have.index[j] for j in order] == list(want.index)
    assert permutation(plain(2, 2), Tiled((0, 0, 0, 1), 2)) is None


def test_grouped_puts_all_replicas_of_a_group_side_by_side() -> None:
    assert grouped(plain(4, 2), 2).index == (0, 1, 0, 1, 2, 3, 2, 3)


def test_commutes_and_acts_per_sample() -> None:
    x = torch.randn(2, 4, 3, 3)
    assert commutes(torch.tanh, [x])
    assert commutes(lambda v: v.cumsum(2), [x])
    assert not commutes(lambda v: v.flip(1) + v, [x])
    assert not commutes(lambda v: v - v.mean(1, keepdim=True), [x])
    assert not commutes(lambda v: v * torch.linspace(0, 1, v.shape[1]).view(1, -1, 1, 1), [x])
    assert acts_per_sample(lambda v: v.flip(1), [x])
    assert not acts_per_sample(lambda v: v * torch.linspace(0, 1, len(v)).view(-1, 1, 1, 1), [x])
    assert not acts_per_sample(lambda v: v.flip(0), [x])


# ---------------------------------------------------------------------------------------------------------------------
# Operators: between a stem of 8 channels and a last RepConv


class ConstantShuffle(nn.Module):
    """Knows its channel numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)


class Through(nn.Module):
    """A binary convolution, then `operation`, then another binary convolution and BatchNorm."""

    def __init__(self, operation: Callable[[Through, Tensor], Tensor], out: int) -> None:
        super().__init__()
        self.first, self.norm = conv(8, 8), nn.BatchNorm2d(8)
        self.second, self.norm2 = conv(out, 8), nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.shuffle = ConstantShuffle()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return self.norm2(self.second(self.operation(self, y)))


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def gate(m: Through, x: Tensor) -> Tensor:
    scale = m.excite(F.relu(m.squeeze(F.adaptive_avg_pool2d(x, 1))))
    return x * torch.sigmoid(scale)


def linear_gate(m: Through, x: Tensor) -> Tensor:
    n, c, _, _ = x.size()
    scale = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))
    return x * scale.view(n, c, 1, 1).expand_as(x)


def parts(x: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, 1)
    c, d, e = torch.split(x, [2, 3, 3], dim=1)
    return torch.cat([b, a * 2, d, c, e], 1)


def doubled(x: Tensor) -> Tensor:
    return torch.cat([x, x * 0.5], 1)


OPERATIONS: dict[str, tuple[Callable[[Through, Tensor], Tensor], int]] = {
    "elementwise": (lambda m, x: F.hardtanh(x * 2 - 0.5).clamp(min=-0.9) + torch.where(x > 0, x, -x), 8),
    "add": (lambda m, x: x + torch.tanh(x), 8),
    "product": (lambda m, x: x * x.sigmoid() / 2, 8),
    "cat": (lambda m, x: doubled(x), 16),
    "cat of cats": (lambda m, x: torch.cat([doubled(x), x], dim=1), 24),
    "cat and add": (lambda m, x: doubled(x) + F.pad(x, (0, 0, 0, 0, 4, 4)), 16),
    "cat plus plain": (lambda m, x: doubled(x) - shuffle(doubled(x), 2), 16),
    "channel padding": (lambda m, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0), 16),
    "padding by zeros": (lambda m, x: torch.cat([torch.zeros_like(x), x], 1), 16),
    "spatial padding": (lambda m, x: F.pad(x, (1, 1, 1, 1)), 8),
    "slice": (lambda m, x: x[:, 2:6], 4),
    "strided slice": (lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1), 8),
    "narrow": (lambda m, x: x.narrow(1, 3, 5), 5),
    "chunk and split": (lambda m, x: parts(x), 16),
    "pooling": (lambda m, x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2), 8),
    "interpolation": (lambda m, x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2) + x, 8),
    "channel shuffle": (lambda m, x: shuffle(x, 2), 8),
    "channel shuffle by torch": (lambda m, x: F.channel_shuffle(x, 4), 8),
    "flip": (lambda m, x: x.flip(1) + x, 8),
    "roll": (lambda m, x: torch.roll(x, 3, 1), 8),
    "view with constant sizes": (lambda m, x: x.view(-1, 8, 64).reshape(-1, 8, 8, 8), 8),
    "view(-1, C)": (lambda m, x: x.permute(0, 2, 3, 1).reshape(-1, 8).view(-1, 8, 8, 8).permute(0, 3, 1, 2), 8),
    "pixel shuffle": (lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), 8),
    "gate": (gate, 8),
    "gate of linear layers": (linear_gate, 8),
    "mean over channels": (lambda m, x: x - x.mean(1, keepdim=True), 8),
    "maximum over channels": (lambda m, x: x * torch.amax(x, dim=1, keepdim=True), 8),
    "softmax over channels": (lambda m, x: x.softmax(1) * 8 - 1, 8),
    "per-channel parameter": (lambda m, x: x * m.gain, 8),
    "spatial statistics": (lambda m, x: (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1), 8),
    "maximum of two": (lambda m, x: torch.maximum(x, shuffle(x, 2)) + torch.minimum(x, -x), 8),
    "own module with constant sizes": (lambda m, x: m.shuffle(x), 8),
    "in place": (lambda m, x: x.mul_(0.5).add_(0.1).relu_(), 8),
    "dropout in eval": (lambda m, x: F.dropout(x, 0.5, m.training), 8),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("beta", [2, 4])
def test_operator_is_carried(name: str, beta: int) -> None:
    torch.manual_seed(0)
    operation, out = OPERATIONS[name]
    model = randomize(Body(Through(operation, out)))
    plan, rep = transformed(model, beta=beta)
    certificate = verify.verify(model, plan, rep, gradients=True)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    for batch in (1, 3):
        actual, expected, index = both(model, rep, images(batch))
        assert_identical(actual, expected)
    assert len(index["body.second"]) == beta * out
    assert rep.get_submodule("body.second").weight.shape == (8 // beta, beta * out, 3, 3)


@pytest.mark.parametrize("kind", ["function", "module"])
def test_random_operators_draw_for_each_copy(kind: str) -> None:
    """Directly behind a convolution, whose copies would share what is drawn if it were drawn before the repeat."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.drop = conv(8, 8), nn.BatchNorm2d(8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(self.drop(y) if kind == "module" else F.dropout(y, 0.5, self.training))

    model = randomize(Body(Noisy()))
    plan, rep = transformed(model)
    assert verify.verify(model, plan, rep, gradients=True).passed
    seen: list[Tensor] = []
    rep.get_submodule("body.norm").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rep.train()
    rep(images())
    (dropped,) = seen
    assert dropped.shape[1] == 16
    copies = [(c == 0) for c in dropped.split(4, 1)]  # β² copies of 4 convolution channels
    assert not any(torch.equal(copies[0], other) for other in copies[1:])


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "view with batch": lambda x: x.view(x.size(0), -1),
    "view with constant": lambda x: x.view(-1, 8 * 4 * 4),
    "reshape": lambda x: x.reshape(x.shape[0], 8 * 4 * 4),
    "nn.Flatten": nn.Flatten(),
    "two steps": lambda x: x.view(x.size(0), 8, -1).flatten(1),
}


class Headed(nn.Module):
    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.norm1 = conv(8, 8), nn.BatchNorm2d(8)
        self.head = head
        self.norm2 = nn.BatchNorm1d(128)
        self.fc = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm1(self.conv(self.norm(self.stem(x)))), 2)
        return self.fc(self.norm2(self.head(x)))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("last_layer", ["all", "1_over_beta", "1_over_beta2"])
def test_flatten_in_every_spelling(name: str, last_layer: str) -> None:
    model = randomize(Headed(HEADS[name]))
    plan, rep = transformed(model, last_layer=last_layer)
    certificate = verify.verify(model, plan, rep, gradients=False)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    actual, expected, index = both(model, rep, images(3))
    assert_identical(actual, expected)
    assert (
        index["fc"]
        == {"all": [*range(128)] * 2, "1_over_beta": [*range(128)], "1_over_beta2": [*range(64)]}[last_layer]
    )


def test_binary_hidden_and_last_linear_layers() -> None:
    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.sign(), self.weight.sign() * self.weight.detach().abs().mean(1, keepdim=True), self.bias)

        def binarize_input(self, x: Tensor) -> Tensor:
            return x.sign()

        def binary_weight(self) -> Tensor:
            return self.weight.sign() * self.weight.detach().abs().mean(1, keepdim=True)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3 * 8 * 8, 16)
            self.norm = nn.BatchNorm1d(16)
            self.hidden = Linear(16, 12, bias=False)
            self.norm1 = nn.BatchNorm1d(12)
            self.fc = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.hardtanh(self.norm(self.stem(x.flatten(1))))
            return self.fc(self.norm1(self.hidden(x)))

    model = randomize(Dense())
    plan, rep = transformed(model)
    assert rep.hidden.weight.shape == (6, 32)
    assert plan.layers["hidden"].role == "binary_linear"
    assert verify.verify(model, plan, rep, gradients=True).passed
    actual, expected, _ = both(model, rep, images())
    assert_identical(actual, expected)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, by name


REFUSED: dict[str, Callable[[Through, Tensor], Tensor]] = {
    "einsum": lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.gain.view(8, 1) @ m.gain.view(1, 8)),
    "setitem": lambda m, x: _written(x),
    "fft": lambda m, x: torch.fft.fft(x, dim=1).real,
    "stack and sum": lambda m, x: torch.stack([x, x.tanh(), -x * 0.3], 0).sum(0),
}


def _written(x: Tensor) -> Tensor:
    x = x * 1
    x[:, 0] = x[:, 1]
    return x


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_channels_is_refused_with_its_place_or_carried_right(name: str) -> None:
    """Or carried, and then right: never guessed."""
    model = randomize(Body(Through(REFUSED[name], 8)))
    try:
        plan, rep = transformed(model)
    except SurgeryError as error:
        message = str(error)
        assert message.startswith("test_channels.py:")
        assert "(body)" in message
        assert "node " in message
        assert ";" in message
        assert "\n" not in message
        return
    assert verify.verify(model, plan, rep, gradients=False).passed
    actual, expected, _ = both(model, rep, images())
    assert_identical(actual, expected)


def test_channels_that_move_into_the_batch_and_stay_there_are_refused() -> None:
    model = Body(Through(lambda m, x: x.permute(1, 0, 2, 3).contiguous(), 2))
    with pytest.raises(SurgeryError, match=r"test_channels\.py:\d+ \(body\)"):
        planned(model)


def test_without_a_rule_for_operators_they_are_refused() -> None:
    rules = written("extends: reptran\nremove: [bypass-weightless]\n")
    with pytest.raises(
        SurgeryError, match=r"networks\.py:\d+.*no rule lets adaptive_avg_pool2d carry expanded channels"
    ):
        planned(Body(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))), rule=rules)


def test_outputs_that_are_expanded_are_noted() -> None:
    class Features(Body):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(self.bn(self.stem(x)))
            return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), x

    model = randomize(Features(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))))
    plan, rep = transformed(model)
    (note,) = plan.notes
    assert "returns this expanded: 2× as many channels; `[:, :8]` of it is one replica, `apply: keep` leaves" in note
    assert [t.shape[1] for t in rep(images())] == [5, 16]
