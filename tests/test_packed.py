"""The packed file: its size is the profile's, its layout the documented one, and it predicts what it was made from."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import BinaryConv, Body, Residual, images, planned, randomize, rule_set
from torch import Tensor, nn

import repbnn_cli
from repbnn_cli import checkpoint, profiler, recognize, source, surgery, zoo
from repbnn_cli.deploy import agreement, packed
from repbnn_cli.deploy.fuse import fuse
from repbnn_cli.deploy.zeros import in_kernels
from repbnn_cli.errors import CheckpointError, UsageError
from repbnn_cli.graph import Network
from repbnn_cli.kernels import Backend
from repbnn_cli.profiler import shapes
from repbnn_cli.recognize import Layer
from repbnn_cli.rules import RuleSet, loads
from repbnn_cli.source import Origin

TORCH = Backend("torch", "asked for")


def zoo_sides(
    name: str, shape: tuple[int, ...]
) -> tuple[Origin, list[tuple[Network, dict[str, Layer], RuleSet | None]]]:
    """A zoo network and its Rep version with drifted copies, captured as the commands capture them."""
    torch.manual_seed(0)
    origin = Origin(name, None, {}, None, (shape,))
    network = source.capture(randomize(zoo.build(name)), origin)
    plan = surgery.plan(network, rule_set())
    rep = shapes.rep_network(plan, randomize(surgery.apply(plan), seed=2))
    return origin, [(network, recognize.recognize(network), None), (*rep, plan.rules)]


def written(tmp_path: Path, origin: Origin, side: tuple[Network, dict[str, Layer], RuleSet | None]) -> Path:
    made = packed.pack(side[0], side[1], origin, rules=side[2])
    place = tmp_path / "net.packed"
    packed.save(made, place, force=True)
    return place


# Every kind of binary convolution, gates, RSign and RPReLU, flat kernels, tensors that nobody calls (bn3, the teacher).
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("irnet_resnet20", 16),
        ("rbnn_resnet20", 16),
        ("recu_resnet20", 16),
        ("fracbnn_resnet20", 16),
        ("birealnet18", 32),
        ("irnet_imagenet_resnet18", 32),
    ],
)
def test_size_is_the_profile_s_and_predictions_are_the_network_s(tmp_path: Path, name: str, size: int) -> None:
    origin, sides = zoo_sides(name, (3, size, size))
    for network, layers, rules in sides:
        made = packed.pack(network, layers, origin, rules=rules)
        place = tmp_path / "net.packed"
        header = packed.save(made, place, force=True)
        predicted = profiler.profile(network, layers).totals.packed
        assert made.data_bytes == predicted
        assert place.stat().st_size == header + predicted
        assert header == 8 + struct.unpack("<Q", place.read_bytes()[:8])[0]
        again = packed.open_packed(place)
        assert again.layers == layers
        assert profiler.profile(again.network, again.layers).totals.packed == predicted
        found = agreement.compare(network, fuse(again.network, again.layers, TORCH), [images(2, size).sigmoid()])
        assert found.holds, str(found)
        assert found.flipped < 2
        assert packed.pack(again.network, again.layers, origin, rules=rules).tensors.keys() == made.tensors.keys()


def by_hand(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """docs/packed-format.md, followed without torch or this package: entries, their bytes, the header's JSON."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    about = json.loads(entries.pop("__metadata__")["repbnn_packed"])
    types = {"F32": np.float32, "U8": np.uint8, "I64": np.int64}
    arrays = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        data = raw[8 + length + start : 8 + length + end]
        arrays[name] = np.frombuffer(data, types[entry["dtype"]]).reshape(entry["shape"])
    return entries, arrays, about


def test_a_reader_made_from_the_documentation_gets_kernel_and_norm(tmp_path: Path) -> None:
    origin, (side, _) = zoo_sides("irnet_resnet20", (3, 16, 16))
    _, arrays, about = by_hand(written(tmp_path, origin, side))
    conv, norm = side[0].module.get_submodule("layer1.0.conv1"), side[0].module.get_submodule("layer1.0.bn1")
    kernel = about["kernels"]["layer1.0.conv1"]
    filters, channels, rows, columns = kernel["shape"]
    octets = arrays["layer1.0.conv1.kernel_bits"]
    read = np.empty(kernel["shape"], np.float32)
    for o in range(filters):
        for y in range(rows):
            for x in range(columns):
                for c in range(channels):
                    k = ((o * rows + y) * columns + x) * channels + c
                    sign = 1 if octets[k // 8] >> (k % 8) & 1 else -1
                    read[o, c, y, x] = sign * arrays[kernel["scale"]][o]
    torch.testing.assert_close(torch.from_numpy(read), conv.binary_weight().detach())
    x = torch.randn(2, 16, 3, 3)
    scale, shift = (torch.from_numpy(arrays[f"layer1.0.bn1.{n}"].copy()).view(-1, 1, 1) for n in ("scale", "shift"))
    torch.testing.assert_close(x * scale + shift, norm(x).detach(), rtol=1e-5, atol=1e-5)


@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4) | st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 99)
)
def test_bits_come_back(shape: tuple[int, ...], seed: int) -> None:
    signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
    data = packed.to_bits(signs)
    assert data.dtype == torch.uint8
    assert data.numel() == (signs.numel() + 7) // 8
    assert torch.equal(packed.from_bits(data, shape), signs)
    with pytest.raises(ValueError, match="bytes of bits for a kernel of"):
        packed.from_bits(data, (*shape[:-1], shape[-1] + 8))


# ---------------------------------------------------------------------------------------------------------------------
# Networks of somebody else's code


class LearnedScale(nn.Conv2d):
    """A scale learned per filter and multiplied into the kernel; its weights are centred first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.weight.shape[0], 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)).sign() * self.gain
        return nn.functional.conv2d(x.sign(), kernel, self.bias, self.stride, self.padding)


class TiedNetwork(nn.Module):
    """Two layers share one tensor, and a parameter is used by the forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv = LearnedScale(8, 8, 3, padding=1)
        self.act, self.act2 = nn.PReLU(8), nn.PReLU(8)
        self.act2.weight = self.act.weight
        self.gain = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        x = self.act2(self.conv(x)) * self.gain
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("make", [Residual, lambda: Body(LearnedScale(8, 8, 3, padding=1)), TiedNetwork])
def test_foreign_networks_come_back_with_their_code(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(1)
    plan = planned(randomize(make()))
    network = plan.network
    origin = Origin(None, "net.py:make", {}, None, ((3, 8, 8),))
    rep = shapes.rep_network(plan, randomize(surgery.apply(plan), seed=2))
    for side in ((network, recognize.recognize(network), None), (*rep, plan.rules)):
        place = written(tmp_path, origin, side)
        with pytest.raises(UsageError, match=r"its source network is built by your code; name it again: --model net"):
            repbnn_cli.load_packed(place)
        again = repbnn_cli.load_packed(place, model=make)
        torch.testing.assert_close(again(images()), side[0].module(images()), rtol=1e-5, atol=1e-5)
        assert packed.read(place).data_bytes == profiler.profile(side[0], side[1]).totals.packed


def test_zeros_are_refused_or_become_plus() -> None:
    model = randomize(Body(BinaryConv(8, 8, 3, padding=1)))
    with torch.no_grad():
        model.body.weight[0, 0, 0, :2] = 0
    network = planned(model).network
    layers = recognize.recognize(network)
    assert in_kernels(network, layers).layers == {"body": 2}
    origin = Origin(None, "net.py:make", {}, None, ((3, 8, 8),))
    message = "body: 2 of its 576 weights have sign 0, which no bit can hold; --zeros-as-plus makes them [+]1"
    with pytest.raises(UsageError, match=message):
        packed.pack(network, layers, origin)
    made = packed.pack(network, layers, origin, zeros_as_plus=True)
    assert made.zeros == 2
    signs = packed.from_bits(made.tensors["body.kernel_bits"], (8, 8, 3, 3))
    assert torch.equal(signs, torch.where(model.body.weight >= 0, 1.0, -1.0))


class TwoValued(nn.Conv2d):
    """Two values that are not ± one another: one bit a weight, but no sign times a scale."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x.sign(), (self.weight > 0).float() + 0.5, None, padding=1)


class StaysInTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (TwoValued(8, 8, 3, bias=False), "body: its kernel does not have one magnitude per filter; it has no packed"),
        (nn.BatchNorm2d(8, track_running_stats=False), "body: a BatchNorm without running statistics depends on its"),
        (StaysInTraining(8), "body: a BatchNorm in training mode depends on its batch"),
    ],
)
def test_what_has_no_packed_form(body: nn.Module, message: str) -> None:
    network = planned(randomize(Body(body))).network
    with pytest.raises(UsageError, match=message):
        packed.pack(network, recognize.recognize(network), Origin(None, "net.py:make", {}, None, ((3, 8, 8),)))


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    origin, (side, _) = zoo_sides("irnet_resnet20", (3, 16, 16))
    return written(tmp_path_factory.mktemp("packed"), origin, side).read_bytes()


def damaged(raw: bytes, how: str) -> bytes:
    length = struct.unpack("<Q", raw[:8])[0]
    head, data = raw[8 : 8 + length], raw[8 + length :]
    if how == "truncated":
        return raw[:-1]
    if how == "truncated in the header":
        return raw[:500]
    if how == "a bit flipped":
        return raw[:-7] + bytes([raw[-7] ^ 1]) + raw[-6:]
    old, new = {
        "newer": (b'\\"version\\":1', b'\\"version\\":9'),
        "header": (b'\\"version\\"', b'\\"vorsion\\"'),
        "shape": (b"[16,16,3,3]", b"[16,16,3,4]"),
    }[how]
    assert old in head
    return raw[:8] + head.replace(old, new, 1) + data


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "a damaged or truncated safetensors file"),
        ("truncated in the header", "a truncated safetensors file; copy or download it again"),
        ("a bit flipped", "is damaged, it does not have the SHA-256 that its header states; copy it again"),
        ("newer", "written by a newer repbnn (format version 9, this one reads up to 1); update with: pip install"),
        ("header", "its header is damaged ('version'); export the network again"),
        ("shape", "is damaged, it does not have the SHA-256 that its header states; copy it again"),
    ],
)
def test_a_damaged_file_gets_one_clear_line(tmp_path: Path, sound: bytes, how: str, message: str) -> None:
    place = tmp_path / "net.packed"
    place.write_bytes(damaged(sound, how))
    with pytest.raises(CheckpointError) as caught:
        packed.open_packed(place)
    assert str(caught.value).startswith(f"{place}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_no_packed_networks(tmp_path: Path) -> None:
    place = tmp_path / "state.pt"
    torch.save({"w": torch.zeros(3)}, place)
    assert not packed.is_packed(checkpoint.load(place))
    with pytest.raises(
        CheckpointError, match="is no packed network; expected a file that `repbnn export packed` wrote"
    ):
        packed.read(place)


@pytest.mark.parametrize(
    ("part", "value"),
    [("norms", None), ("kernels", None), ("kernels", []), ("unstored", []), ("rules", 3), ("source", None)],
)
def test_a_header_of_other_kinds_is_refused_in_one_line(sound: bytes, tmp_path: Path, part: str, value: Any) -> None:
    place = tmp_path / "net.packed"
    place.write_bytes(sound)
    read = packed.read(place)
    with pytest.raises(CheckpointError, match="its tensors do not fit the network that its source and rules make"):
        packed.build(packed.Packed(read.tensors, {**read.header, part: value}), place)


def test_a_kernel_of_another_shape_is_refused(sound: bytes, tmp_path: Path) -> None:
    """(16, 144, 1, 1) has as many bits as (16, 16, 3, 3)."""
    place = tmp_path / "net.packed"
    place.write_bytes(sound)
    read = packed.read(place)
    path, kernel = next((p, k) for p, k in read.header["kernels"].items() if k["shape"] == [16, 16, 3, 3])
    kernels = {**read.header["kernels"], path: {**kernel, "shape": [16, 144, 1, 1]}}
    with pytest.raises(CheckpointError, match=r"a kernel of \(16, 144, 1, 1\), expected \(16, 16, 3, 3\)"):
        packed.build(packed.Packed(read.tensors, {**read.header, "kernels": kernels}), place)


class Unfolded(nn.Conv2d):
    """A convolution as a product, which counts its calls."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args, padding=1, bias=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        n, _, h, w = x.shape
        return (self.weight.sign().flatten(1) @ nn.functional.unfold(x.sign(), 3, padding=1)).view(n, -1, h, w)


class Counted(BinaryConv):
    def __init__(self, *args: int) -> None:
        super().__init__(*args, padding=1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_looking_at_kernels_leaves_the_network_alone() -> None:
    network = planned(randomize(Body(Counted(8, 8, 3)))).network
    in_kernels(network, recognize.recognize(network))
    made = packed.pack(network, recognize.recognize(network), Origin(None, "net.py:make", {}, None, ((3, 8, 8),)))
    assert float(network.module.get_buffer("body.calls")) == float(made.tensors["body.calls"]) == 0


def test_a_kernel_that_cannot_be_seen_is_said() -> None:
    rules = loads("extends: reptran\nmodules: [{match: {type: Unfolded}, role: binary_conv, leaf: true}]")
    network = planned(randomize(Body(Unfolded(8, 8, 3))), rule=rules).network
    layers = recognize.recognize(network, rules.declare)
    with pytest.raises(UsageError, match="body: applies its kernel by none of torch's convolutions"):
        in_kernels(network, layers)
