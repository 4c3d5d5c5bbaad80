"""Packed networks of other people's convolutions: scales taken from the latent kernel or from tensors
of their own, and read-back module by module, in which no sign that rounding flips counts against the next layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli import profiler, surgery
from repbnn_cli.deploy import agreement, packed
from repbnn_cli.errors import UsageError
from repbnn_cli.graph import Network
from repbnn_cli.profiler.shapes import rep_network
from repbnn_cli.recognize import Layer, recognize
from repbnn_cli.rules import load
from repbnn_cli.source import Origin, capture


class ScaleBehind(nn.Conv2d):
    """α = mean |w| per filter, multiplied with the output."""

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.weight.abs().mean((1, 2, 3)).view(1, -1, 1, 1)
        return F.conv2d(x.sign(), self.weight.sign(), None, 1, 1, 1, self.groups) * alpha


class RowsAndColumns(nn.Conv2d):
    """XNOR-Net++: learned scales of channels, rows and columns, and a step size that is a number."""

    def __init__(self, *sizes: int, **options: bool | int) -> None:
        super().__init__(*sizes, **options)  # type: ignore[arg-type]
        self.alpha = nn.Parameter(torch.rand(sizes[1], 1, 1) + 0.5)
        self.rows = nn.Parameter(torch.rand(1, 8, 1) + 0.5)
        self.columns = nn.Parameter(torch.rand(1, 1, 8) + 0.5)
        self.step = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.sign(), self.weight.sign(), None, 1, 1) * self.step * self.alpha * self.rows * self.columns


class SignsAlone(nn.Conv2d):
    """No scale anywhere: none may be invented."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.sign(), self.weight.sign(), None, 1, 1)


class ScaledByFanIn(nn.Conv2d):
    """A learned gain for each filter over √fan-in, as with standardised weights."""

    def __init__(self, *sizes: int, **options: bool | int) -> None:
        super().__init__(*sizes, **options)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.rand(sizes[1], 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)).sign() * self.gain
        return F.conv2d(x.sign(), kernel / self.weight[0].numel() ** 0.5, None, 1, 1)


class Halved(nn.Conv2d):
    """One number for all filters, which stands in the code alone."""

    def __init__(self, *sizes: int, **options: bool | int) -> None:
        super().__init__(*sizes, **options)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.rand(sizes[1], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.sign(), 0.3 * self.weight.sign(), None, 1, 1) * self.gain


class Net(nn.Module):
    def __init__(self, kind: type[nn.Conv2d], groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn0, self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        options = {"bias": False} | ({"groups": groups} if groups > 1 else {})
        self.conv1, self.conv2 = kind(8, 8, 3, **options), kind(8, 8, 3, **options)  # type: ignore[arg-type]
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        x = self.bn1(self.conv1(x)) + x
        x = self.bn2(self.conv2(x)) + x
        return self.fc(x.mean((2, 3)))


class Calls(nn.Module):
    """A network that calls its binary layers as functions, on kernels of its own; some of them twice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 5)
        self.bn0, self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm1d(16)
        self.kernel, self.matrix = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(8, 16))

    def conv(self, x: Tensor) -> Tensor:
        mean = self.kernel.abs().mean((1, 2, 3), keepdim=True)
        if self.how == "centred":
            return F.conv2d(x.sign(), (self.kernel - self.kernel.mean((1, 2, 3), keepdim=True)).sign(), None, 1, 1)
        if self.how == "scaled":
            return F.conv2d(x.sign(), self.kernel.sign() * mean, None, 1, 1)
        y = F.conv2d(x.sign(), self.kernel.sign(), None, 1, 1)
        if self.how == "behind":
            return y * mean.view(1, -1, 1, 1)
        if self.how == "deviation":
            return y * self.kernel.std((1, 2, 3)).view(1, -1, 1, 1)
        return y + F.conv2d(x, self.kernel, None, 1, 1) if self.how == "float" else y

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        x = self.bn1(self.conv(x)) + x
        if self.how == "twice":
            x = self.bn1(self.conv(x)) + x
        return self.fc(self.bn2(x.mean((2, 3)).sign() @ self.matrix.sign()))


CALLS = {how: partial(Calls, how) for how in ("alone", "scaled", "behind", "centred", "twice")}


def behind() -> nn.Module:
    return Net(ScaleBehind)


def behind_depthwise() -> nn.Module:
    return Net(ScaleBehind, groups=8)


def rows_and_columns() -> nn.Module:
    return Net(RowsAndColumns)


def scaled_by_fan_in() -> nn.Module:
    return Net(ScaledByFanIn)


def halved() -> nn.Module:
    return Net(Halved)


def signs_alone() -> nn.Module:
    return Net(SignsAlone)


@pytest.mark.parametrize("beta", [1, 2, 4])
@pytest.mark.parametrize(
    "make",
    [behind, behind_depthwise, rows_and_columns, scaled_by_fan_in, halved, signs_alone, *CALLS.values()],
    ids=lambda m: m.args[0] if isinstance(m, partial) else m.__name__,
)
def test_a_packed_network_computes_what_the_network_does(
    make: Callable[[], nn.Module], beta: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = make().eval()
    for norm in (m for m in source.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    origin = Origin(None, f"{__name__}:made", {}, None, ((3, 8, 8),))
    rules = load("reptran").with_options(beta, None, None)
    plan = surgery.plan(capture(source, origin, rules), rules)
    network, layers = rep_network(plan, surgery.apply(plan).eval())
    made = packed.pack(network, layers, origin, rules=rules)
    packed.save(made, tmp_path / "net.packed")
    again = packed.open_packed(tmp_path / "net.packed", make)
    images = torch.randn(2, 3, 8, 8)
    found = agreement.compare_modules(network, again.network, [images], None, made.header["unstored"])
    assert found.holds, str(found)
    assert found.modules >= 7
    torch.testing.assert_close(again.network.module(images), network.module(images), rtol=1e-4, atol=1e-4)
    if isinstance(make, partial):
        assert made.data_bytes == packed_bytes(network, layers)
    scales = {path: kernel["scale"] for path, kernel in made.header["kernels"].items()}
    if make is signs_alone:
        assert all(s is None or bool((made.tensors[s] == 1).all()) for s in scales.values())
    if make in (scaled_by_fan_in, halved):  # learned scales are no second time in the file
        assert scales["conv1"] == ("conv1.gain" if make is scaled_by_fan_in else None)
        assert made.data_bytes == packed_bytes(network, layers)
    if make is behind:  # as docs/packed-format.md has it: bits times scale is what the layer applies
        bits = packed.from_bits(made.tensors["conv1.kernel_bits"], tuple(made.header["kernels"]["conv1"]["shape"]))
        kernel = bits * made.tensors[scales["conv1"]].view(-1, 1, 1, 1)
        x = torch.randn(1, bits.shape[1], 8, 8)
        given = network.module.get_submodule("conv1")(x)[:, : len(bits)]
        assert torch.allclose(F.conv2d(x.sign(), kernel, None, 1, 1), given, rtol=1e-5, atol=1e-5)


def packed_bytes(network: Network, layers: Mapping[str, Layer]) -> int:
    return profiler.profile(network, dict(layers)).totals.packed


@pytest.mark.parametrize("how", ["deviation", "float"])
def test_what_a_forward_takes_from_a_latent_kernel_beside_its_signs_is_refused(how: str) -> None:
    torch.manual_seed(0)
    origin = Origin(None, "net", {}, None, ((3, 8, 8),))
    network = capture(Calls(how).eval(), origin)
    with pytest.raises(UsageError, match="kernel: the forward takes more from it than its signs"):
        packed.pack(network, recognize(network), origin)


@pytest.mark.parametrize("how", ["centred", "deviation"])
def test_another_scale_of_the_latent_kernel_is_refused(how: str) -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight.std((1, 2, 3))
            if how == "centred":
                scale = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)).abs().mean((1, 2, 3))
            return F.conv2d(x.sign(), self.weight.sign(), None, 1, 1) * scale.view(1, -1, 1, 1)

    torch.manual_seed(0)
    origin = Origin(None, "net", {}, None, ((3, 8, 8),))
    network = capture(Net(Scaled).eval(), origin)
    with pytest.raises(UsageError, match=r"conv1.weight: the forward takes more from it than its signs and"):
        packed.pack(network, recognize(network), origin)


def test_comparing_modules_notices_a_wrong_one_and_forgives_what_follows_from_it() -> None:
    torch.manual_seed(0)
    origin = Origin(None, "net", {}, None, ((3, 8, 8),))
    one = capture(signs_alone().eval(), origin)
    torch.manual_seed(0)
    other = capture(signs_alone().eval(), origin)
    images = torch.randn(2, 3, 8, 8)
    assert agreement.compare_modules(one, other, [images]).largest == 0
    with torch.no_grad():
        other.module.get_submodule("conv1").weight[0, 0, 0, 0] *= -1  # type: ignore[operator,index]
    found = agreement.compare_modules(one, other, [images])
    assert not found.holds
    assert found.where == "conv1"
    with torch.no_grad():
        other.module.get_submodule("conv1").weight[0, 0, 0, 0] *= -1  # type: ignore[operator,index]
        other.module.get_submodule("bn0").bias += 1e-5  # type: ignore[operator]
    assert agreement.compare_modules(one, other, [images]).holds
    other.module.get_submodule("fc").bias.data[0] = float("nan")  # type: ignore[union-attr,index]
    assert not agreement.compare_modules(one, other, [images]).holds
