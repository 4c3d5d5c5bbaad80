"""`repbnn lint`: a network without faults passes; each fault is found by its check, there and nowhere else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import graph
from repbnn_cli.cli import run
from repbnn_cli.lint import CHECKS, Outcome, lint, worst
from repbnn_cli.recognize import recognize
from repbnn_cli.views.advice_views import checks_markdown

ROOT = Path(__file__).resolve().parent.parent


class Clipped(torch.autograd.Function):
    """Never 0; the gradient passes where |x| ≤ 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1)


class Identity(Clipped):
    """The gradient always passes."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class TorchSign(Clipped):
    """sign(0) = 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()


class Binary(nn.Module):
    """A 3×3 binary convolution padded with ones, with knobs for everything that can go wrong."""

    sign: type[Clipped] = Clipped
    binary_input = binary_weight = True
    standardise = False
    pad = "ones"

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(out, into, 3, 3) * 1.8 - 0.9)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.standardise:
            weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        kernel = self.sign.apply(weight) * 0.05 if self.binary_weight else weight
        x = Clipped.apply(x) if self.binary_input else x
        if self.pad == "argument":
            return F.conv2d(x, kernel, None, self.stride, 1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), value=float(self.pad == "ones")), kernel, None, self.stride)


class Skip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2]


class Net(nn.Module):
    """Stem, a block, a block that downsamples, classifier: as the checks want it."""

    residual = True

    def __init__(self, width: int = 32, out: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = Binary(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Binary(width, out, 2), nn.BatchNorm2d(out)
        self.pool: nn.Module = nn.AvgPool2d(2)
        self.down, self.bn3 = nn.Conv2d(width, out, 1), nn.BatchNorm2d(out)
        self.fc = nn.Linear(out, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        y = self.bn1(self.conv1(x))
        x = F.hardtanh(y + x) if self.residual else F.hardtanh(y)
        x = self.bn2(self.conv2(x)) + self.bn3(self.down(self.pool(x)))
        return self.fc(F.hardtanh(x).mean((2, 3)))


def net(change: Callable[[Net], object] = lambda net: None, **sizes: int) -> Net:
    torch.manual_seed(0)
    made = Net(**sizes).eval()
    with torch.no_grad():
        change(made)
    return made


def outcomes(model: nn.Module, *, trained: bool = True) -> tuple[Outcome, ...]:
    network = graph.capture(model, (3, 8, 8))
    return lint(network, recognize(network), trained=trained)


def found(model: nn.Module) -> dict[str, list[str]]:
    """Check → places."""
    return {o.check.name: [p.path for p in o.places] for o in outcomes(model) if o.places}


def knobs(path: str, **values: Any) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        for name, value in values.items():
            setattr(net.get_submodule(path) if path else net, name, value)

    return change


def zero_weight(sign: type[Clipped]) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        net.conv1.sign = sign
        net.conv1.weight[5, 3, 1, 1] = 0

    return change


def zero_filter(net: Net) -> None:
    net.conv2.sign = TorchSign
    net.conv2.weight[7] = 0


def far(**values: Any) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        net.conv1.weight.mul_(3)
        knobs("conv1", **values)(net)

    return change


def all_float(net: Net) -> None:
    for conv in (net.conv1, net.conv2):
        conv.binary_input = conv.binary_weight = False


def strided(net: Net) -> None:
    net.pool, net.down.stride = nn.Identity(), (2, 2)


FAULTS: dict[str, tuple[Net, dict[str, list[str]]]] = {
    "a weight of 0": (net(zero_weight(TorchSign)), {"zero-weights": ["conv1"]}),
    "a filter of 0": (net(zero_filter), {"empty-filters": ["conv2"]}),
    "latent weights that the clipped gradient does not reach": (net(far()), {"dead-latent-weights": ["conv1"]}),
    "latent weights that nothing clips": (net(far(sign=Identity)), {"far-latent-weights": ["conv1"]}),
    "a channel without variance": (net(lambda n: n.bn1.running_var[2].fill_(1e-9)), {"small-variance": ["bn1"]}),
    "float weights": (net(knobs("conv2", binary_weight=False)), {"float-weights": ["conv2"]}),
    "float inputs": (net(knobs("conv2", binary_input=False)), {"float-inputs": ["conv2"]}),
    "no binary layer": (net(all_float), {"nothing-binary": [""]}),
    "no shortcut": (net(knobs("", residual=False)), {"no-residual": ["conv1"]}),
    "a strided 1×1 convolution": (net(strided), {"skipped-inputs": ["down"]}),
    "a strided slice": (net(knobs("", pool=Skip())), {"skipped-inputs": ["pool"]}),
    "zero padding by the convolution": (net(knobs("conv1", pad="argument")), {"zero-padding": ["conv1"]}),
    "zero padding before it": (net(knobs("conv1", pad="zeros")), {"zero-padding": ["conv1"]}),
    "24 channels": (net(width=24), {"input-words": ["conv1", "conv2"]}),
    "60 output channels": (net(out=60), {"output-lanes": ["conv2"]}),
    "1000 classes": (net(classes=1000), {"large-last-layer": ["fc"]}),
}
HARMLESS: dict[str, Net] = {
    "as it should be": net(),
    "a weight of 0 whose sign is +1": net(zero_weight(Clipped)),
    "large latent weights that are standardised first": net(far(standardise=True, sign=Identity)),
    "a max-pooled shortcut": net(knobs("", pool=nn.MaxPool2d(2))),
}


def test_every_check_has_a_fault_that_it_finds() -> None:
    assert {name for _, expected in FAULTS.values() for name in expected} == {c.name for c in CHECKS}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_where_it_is_and_nowhere_else(fault: str) -> None:
    model, expected = FAULTS[fault]
    assert found(model) == expected


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_no_fault_is_not_found(name: str) -> None:
    assert found(HARMLESS[name]) == {}


def test_shortcuts_around_blocks_count_and_parallel_branches_do_not() -> None:
    class Branches(Net):
        """conv1 inside a longer shortcut; conv2 beside another binary convolution, without any shortcut."""

        def __init__(self) -> None:
            super().__init__(out=32)
            self.conv3, self.conv2 = Binary(32, 32), Binary(32, 32)
            self.conv4 = Binary(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.stem(x))
            x = self.conv3(F.hardtanh(self.bn1(self.conv1(x)))) + x
            x = self.bn2(self.conv2(x)) + self.bn3(self.conv4(x))
            return self.fc(F.hardtanh(x).mean((2, 3)))

    torch.manual_seed(0)
    assert found(Branches().eval()) == {"no-residual": ["conv2", "conv4"]}


def test_a_constant_is_no_shortcut() -> None:
    class Shifted(Net):
        def __init__(self) -> None:
            super().__init__(out=32)
            self.shift = nn.Parameter(torch.randn(1, 32, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.stem(x))
            return self.fc(F.hardtanh(self.bn1(self.conv1(x)) + self.shift).mean((2, 3)))

    torch.manual_seed(0)
    assert found(Shifted().eval()) == {"no-residual": ["conv1"]}


def test_latent_weights_of_a_convolution_called_in_the_forward() -> None:
    class Called(Net):
        def __init__(self) -> None:
            super().__init__(out=32)
            self.latent = nn.Parameter(torch.randn(32, 32, 1, 1) * 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.stem(x))
            x = F.conv2d(Clipped.apply(x), Clipped.apply(self.latent) * self.latent.abs().mean().detach()) + x
            return self.fc(F.hardtanh(x).mean((2, 3)))

    torch.manual_seed(0)
    model = Called().eval()
    (place,) = next(o for o in outcomes(model) if o.check.name == "dead-latent-weights").places
    share = float((model.latent.abs() > 1).double().mean())
    assert place.path == "conv2d_call"
    assert place.detail.startswith(f"{share:.1%} ")


def test_without_trained_weights_what_needs_them_is_not_checked() -> None:
    model, _ = FAULTS["a filter of 0"]
    skipped = {o.check.name for o in outcomes(model, trained=False) if o.skipped}
    assert skipped == {c.name for c in CHECKS if c.trained}
    assert worst(outcomes(model, trained=False)) is None
    assert worst(outcomes(model)) == "error"


def test_the_documented_table_is_made_from_the_checks() -> None:
    assert checks_markdown() in (ROOT / "docs" / "lint.md").read_text("utf-8")


def test_looking_changes_nothing() -> None:
    model = net(knobs("conv1", pad="argument"))
    model.train()
    model.fc.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    outcomes(model)
    assert model.training
    assert not model.fc.bias.requires_grad
    assert model.conv1.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = str(ROOT / "checkpoints" / "irnet_resnet20_cifar10.pth")
    assert run(["lint", checkpoint, "--strict"]) == 0  # notes alone
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "note: ±1 inputs padded with zeros (zero-padding)" in lines
    assert run(["lint", checkpoint, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    places = {c["check"]: [p["path"] for p in c["places"]] for c in told["checks"]}
    assert places["skipped-inputs"] == ["layer2.0.shortcut", "layer3.0.shortcut"]
    assert len(places["input-words"]) == 7  # the six convolutions of 16 channels, and the first of 32
    assert told["worst"] == "note"

    assert run(["transform", checkpoint, "-o", "r.repbnn.pt"]) == 0
    capsys.readouterr()
    assert run(["lint", "r.repbnn.pt", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["network"] == "Rep-irnet_resnet20"
    assert {c["check"]: c["found"] for c in told["checks"]}["input-words"] == 0  # 16 became 32

    assert run(["lint", "irnet_vgg_small", "--strict"]) == 4
    shown = capsys.readouterr()
    assert "no trained weights" in shown.out
    assert "error: irnet_vgg_small: --strict: found no-residual; what to do is in the table" in shown.err
    assert run(["lint", "irnet_resnet21"]) == 2
    assert run(["lint", "irnet_resnet20", "--model", "net.py:make"]) == 2  # --model is not left aside


def test_a_rule_file_says_what_a_network_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "extends: reptran\nmodules:\n  - match: {path: '0'}\n    role: binary_conv\n    kernel: nothing\n"
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    torch.save(model.state_dict(), "ckpt.pt")
    own = ["lint", "ckpt.pt", "--model", "net.py:make", "--input-size", "3x8x8"]
    assert run(own) == 0
    assert "no layer is binary" in capsys.readouterr().out
    assert run([*own, "--rules", "mine.yaml"]) == 2  # it was read
    assert "mine.yaml:3: 0 has no tensor 'nothing'" in capsys.readouterr().err
    assert run([*own, "--rules", "nowhere.yaml"]) == 2


def test_depthwise_layers_and_fixed_filters_are_not_told_what_they_cannot_do() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
            self.depthwise, self.bn1 = Depthwise(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
            self.fc = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.stem(x))
            mean = F.conv2d(x.abs().mean(1, keepdim=True), torch.full((1, 1, 3, 3), 1 / 9), padding=1)
            return self.fc((self.bn1(self.depthwise(x) * mean) + x).mean((2, 3)))

    class Depthwise(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(Clipped.apply(x), Clipped.apply(self.weight), None)

    assert not {"input-words", "float-inputs"} & set(found(Odd()))
