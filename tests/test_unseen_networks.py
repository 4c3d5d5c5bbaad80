"""Structures found in other people's networks that were refused, crashed, or described wrongly."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from networks import BConv, signs
from torch import Tensor, nn

from repbnn_cli import checkpoint, profiler, surgery
from repbnn_cli.deploy import agreement, packed
from repbnn_cli.deploy.zeros import applied_kernel
from repbnn_cli.errors import RepbnnError, UsageError
from repbnn_cli.graph.probe import _kernel_bits
from repbnn_cli.recognize import recognize
from repbnn_cli.rules import load
from repbnn_cli.source import Origin, capture
from repbnn_cli.verify import Certificate, verify


class ConvNorm(nn.Module):
    """Kernel and norm in one module, the convolution called as a function."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bn = nn.Parameter(torch.randn(c, c, 3, 3)), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(F.conv2d(signs(x), signs(self.weight), padding=1))
        return out


class Body(nn.Module):
    """Stem and one binary convolution; `end` is what a test is about."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        self.c1, self.n1 = BConv(c, c, 3, bias=False), nn.BatchNorm2d(c)
        self.fc = nn.Linear(c, 10)
        self.setup(c)

    def setup(self, c: int) -> None:
        pass

    def forward(self, x: Tensor) -> object:
        x = self.stem(x)
        return self.end(self.n1(self.c1(x)) + x)

    def end(self, x: Tensor) -> object:
        raise NotImplementedError


COST = "convolution cost unchanged"


def certified(network: nn.Module, beta: int = 2, last_layer: str | None = None) -> Certificate:
    torch.manual_seed(1)
    for tensor in network.parameters():
        nn.init.normal_(tensor)
    network.eval()
    rules = load("reptran").with_options(beta, None, last_layer)
    plan = surgery.plan(capture(network, Origin(None, "net", {}, None, ((3, 8, 8),)), rules), rules)
    return verify(network, plan, surgery.apply(plan).eval(), gradients=True)


@pytest.mark.parametrize("beta", [2, 4])
@pytest.mark.parametrize(
    "largest",
    [
        lambda x: torch.max(x, 2)[0],
        lambda x: x.max(dim=2).values,
        lambda x: x.max(2)[0] + x.min(2)[0],
        lambda x: x.amax(2),
    ],
    ids=["item", "values", "pair", "amax"],
)
def test_maximum_over_time_or_points(largest: Callable[[Tensor], Tensor], beta: int) -> None:
    class Points(Body):
        def end(self, x: Tensor) -> object:
            return self.fc(largest(x.flatten(2)))

    assert certified(Points(), beta).passed


class Pyramid(Body):
    """One kernel on two scales: once in the trunk, once on a branch."""

    def setup(self, c: int) -> None:
        self.shared, self.down, self.fc = ConvNorm(c), ConvNorm(c), nn.Linear(2 * c, 10)

    def end(self, x: Tensor) -> object:
        small = self.down(F.avg_pool2d(x, 2))
        return self.fc(torch.cat([self.shared(x).mean((2, 3)), self.shared(small).mean((2, 3))], 1))


class Bases(Body):
    """ABC-Net: several binary bases of one latent kernel."""

    def setup(self, c: int) -> None:
        self.w, self.bn = nn.Parameter(torch.randn(c, c, 3, 3)), nn.BatchNorm2d(c)

    def end(self, x: Tensor) -> object:
        h = signs(x)
        y = sum(
            a * F.conv2d(h, signs(self.w + u * self.w.std()), padding=1) for a, u in ((0.5, -1), (0.3, 0), (0.2, 1))
        )
        return self.fc((self.bn(y) + x).mean((2, 3)))


@pytest.mark.parametrize("kind", [Pyramid, Bases])
def test_one_kernel_called_at_several_places(kind: type[Body]) -> None:
    assert certified(kind()).passed


def test_a_kernel_that_a_hook_sets_is_refused_by_name() -> None:
    class Hooked(Body):
        def setup(self, c: int) -> None:
            self.c2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
            self.latent = nn.Parameter(self.c2.weight.detach().clone())
            del self.c2.weight
            self.c2.register_forward_pre_hook(lambda m, _: setattr(m, "weight", signs(self.latent)))

        def end(self, x: Tensor) -> object:
            return self.fc(self.c2(signs(x)).mean((2, 3)))

    with pytest.raises(RepbnnError, match=r"c2.*has no `weight` before it runs"):
        certified(Hooked())


def test_outputs_in_the_middle_are_described_as_they_are() -> None:
    class Stages(Body):
        def setup(self, c: int) -> None:
            self.head1, self.back, self.head2 = nn.Conv2d(c, 6, 1), nn.Conv2d(6, c, 1), nn.Conv2d(c, 6, 1)

        def end(self, x: Tensor) -> object:
            maps = self.head1(x)
            return maps, self.head2(x + self.back(maps))

    check = next(c for c in certified(Stages()).checks if c.name == "output shapes")
    assert check.values["source"] == [(3, 6, 8, 8), (3, 6, 8, 8)]
    assert check.values["rep"] == [(3, 12, 8, 8), (3, 6, 8, 8)]
    assert check.summary.endswith("some carry all replicas of their channels")


def test_a_kernel_that_is_mostly_zero_is_not_binary() -> None:
    identity = torch.eye(16).view(16, 16, 1, 1)
    sign = torch.randn(16, 16, 3, 3).sign()
    assert _kernel_bits(identity) == 32
    assert _kernel_bits(sign) == 1
    sign[0, 0, 0, 0] = 0  # the sign of an exact zero
    assert _kernel_bits(sign) == 1


def test_safetensors_are_read_whatever_byte_the_length_of_their_header_begins_with(tmp_path: Path) -> None:
    met = set()
    for padding in range(0, 300, 8):
        place = tmp_path / "net.safetensors"
        safetensors.torch.save_file({"w": torch.ones(3)}, place, metadata={"note": "x" * padding})
        (length,) = struct.unpack("<Q", place.read_bytes()[:8])
        met.add(length % 256)
        assert torch.equal(checkpoint.load(place).tensors["w"], torch.ones(3))
    assert 0x80 in met


def test_a_binary_convolution_taken_for_the_last_layer_is_said() -> None:
    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
            self.c1, self.bn1 = BConv(16, 16, 3), nn.BatchNorm2d(16)
            self.c2, self.bn2 = BConv(16, 16, 3), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> object:
            x = self.bn0(self.stem(x))
            return self.bn2(self.c2(self.bn1(self.c1(x)) + x))

    check = next(c for c in certified(Headless()).checks if c.name == COST)
    assert check.summary.endswith("; last layers that take more inputs: c2")


class AlphaBehind(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.sign(), self.weight.sign(), None, 1, 1) * self.weight.abs().mean((1, 2, 3)).view(1, -1, 1, 1)


def test_zeros_as_plus_with_a_scale_behind_the_convolution(tmp_path: Path) -> None:
    class Net(Body):
        def setup(self, c: int) -> None:
            self.c2 = AlphaBehind(c, c, 3, bias=False)
            with torch.no_grad():
                self.c2.weight[3, 1, 0, 2] = 0

        def end(self, x: Tensor) -> object:
            return self.fc((self.c2(x) + x).mean((2, 3)))

    torch.manual_seed(0)
    origin = Origin(None, "net", {}, None, ((3, 8, 8),))
    network = capture(Net().eval(), origin)
    layers = recognize(network)
    made = packed.pack(network, layers, origin, zeros_as_plus=True)
    again = packed.build(made, tmp_path / "net.packed", Net)
    assert made.header["kernels"]["c2"]["zeros"] == 1
    images = [torch.randn(2, 3, 8, 8)]
    assert not agreement.compare_modules(network, again.network, images).holds  # a 0 became +1
    plus = {"c2": packed.zeros_made_plus(applied_kernel(network, "c2"))}
    found = agreement.compare_modules(network, again.network, images, plus)
    assert found.holds, str(found)


class Blur(nn.Module):
    """Antialiasing as it is written: one fixed filter, for as many channels as there are."""

    def __init__(self, c: int, how: str) -> None:
        super().__init__()
        self.how, self.c = how, c
        self.register_buffer("filter", torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None])

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if self.how == "as samples":
            return F.conv2d(x.reshape(n * c, 1, h, w), self.filter, None, 2, 1).view(n, c, h // 2, w // 2)
        if self.how == "own number":
            return F.conv2d(x, self.filter.repeat(self.c, 1, 1, 1), None, 2, 1, groups=self.c)
        filters = self.filter.expand(c, -1, -1, -1) if self.how == "expand" else self.filter.repeat(c, 1, 1, 1)
        return F.conv2d(x, filters, None, 2, 1, groups=c)


@pytest.mark.parametrize("how", ["repeat", "expand", "own number", "as samples"])
def test_a_fixed_filter_made_for_the_channels_there_are(how: str) -> None:
    class Net(Body):
        def setup(self, c: int) -> None:
            self.blur = Blur(c, how)

        def end(self, x: Tensor) -> object:
            return self.fc(self.blur(x).mean((2, 3)))

    assert certified(Net()).passed
    network = capture(Net().eval(), Origin(None, "net", {}, None, ((3, 8, 8),)))
    assert profiler.profile(network, recognize(network)).totals.conv == 64 * 27 * 16 + 16 * 16 * 9


class Ternary(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        threshold = 0.7 * self.weight.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(signs(x), self.weight.sign() * (self.weight.abs() > threshold), None, 1, 1)


def test_ternary_kernels_have_two_bits() -> None:
    class Net(Body):
        def setup(self, c: int) -> None:
            self.c1 = Ternary(c, c, 3, bias=False)

        def end(self, x: Tensor) -> object:
            return self.fc(x.mean((2, 3)))

    origin = Origin(None, "net", {}, None, ((3, 8, 8),))
    network = capture(Net().eval(), origin)
    layers = recognize(network)
    assert (layers["c1"].role, layers["c1"].weight_bits) == ("binary_conv", 2)
    assert profiler.profile(network, layers).totals.bconv == 2 * 64 * 16 * 16 * 9
    assert certified(Net()).passed
    with pytest.raises(UsageError, match="c1: its kernel has 2 bits"):
        packed.pack(network, layers, origin)
    some = torch.randn(16, 16, 3, 3).sign()
    some[:, :, 0, 0] = (torch.rand(16, 16) < 0.7) * some[:, :, 0, 0]  # 3 % zeros
    assert _kernel_bits(some) == 1
    assert _kernel_bits(torch.randn(16, 16, 3, 3).relu().sign()) == 1  # {0, 1}


class DenseHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.c1, self.bn1 = BConv(16, 16, 3), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.bn0(self.stem(x))
        return self.head(self.bn1(self.c1(x)) + x)


def test_convolutions_at_the_end_that_grow_are_named() -> None:
    class TwoHeads(DenseHead):
        def __init__(self) -> None:
            super().__init__()
            self.boxes, self.classes = nn.Conv2d(16, 4, 3), nn.Conv2d(16, 10, 1)
            self.head = nn.Identity()

        def forward(self, x: Tensor) -> object:
            x = super().forward(x)
            return self.boxes(x), self.classes(x)

    check = next(c for c in certified(TwoHeads()).checks if c.name == COST)
    assert check.summary.endswith("; last layers that take more inputs: boxes, classes")
    assert check.values["last"] == ["boxes", "classes"]


class MeanOfMagnitudes(DenseHead):
    """XNOR-Net's K: the mean of |x| around each pixel, by a fixed filter over one channel."""

    def forward(self, x: Tensor) -> object:
        x = self.bn0(self.stem(x))
        k = F.conv2d(x.abs().mean(1, keepdim=True), torch.full((1, 1, 3, 3), 1 / 9), padding=1)
        return self.head(self.bn1(self.c1(x) * k) + x).mean((2, 3))


@pytest.mark.parametrize(("last_layer", "grows"), [("all", True), ("1_over_beta", False), ("1_over_beta2", False)])
def test_only_a_last_layer_that_grows_is_named(last_layer: str, grows: bool) -> None:
    check = next(c for c in certified(DenseHead(), last_layer=last_layer).checks if c.name == COST)
    assert check.values["last"] == (["head"] if grows else [])
    assert ("take more inputs: head" in check.summary) == grows


@pytest.mark.parametrize("beta", [2, 4])
def test_a_fixed_filter_that_runs_once_for_each_replica_is_named(beta: int) -> None:
    check = next(c for c in certified(MeanOfMagnitudes(), beta).checks if c.name == COST)
    assert f"layers that grow ×{beta}: conv2d_call" in check.summary
