"""`finetune --spread`: a fresh RepBNN whose copies start with thresholds of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from networks import Residual, conv, transformed
from torch import Tensor, nn
from train_examples import OWN_NETWORK, own_network

from repbnn_cli import zoo
from repbnn_cli.channels import Tiled
from repbnn_cli.cli import run
from repbnn_cli.errors import UsageError
from repbnn_cli.rep_layers import RepBatchNorm2d
from repbnn_cli.train.inheritance import spread_shifts


@pytest.mark.parametrize("beta", [2, 4])
def test_the_copies_are_set_apart_and_replicas_of_a_channel_on_either_side(beta: int) -> None:
    rep = transformed(Residual(), beta=beta, inherit="none")[1]
    before = {name: tensor.clone() for name, tensor in rep.state_dict().items()}
    spread_shifts(rep, 0.5)
    norms = {f"{n}.bias": m for n, m in rep.named_modules() if isinstance(m, RepBatchNorm2d) and m.repeats == beta**2}
    assert len(norms) == 3
    for name, tensor in rep.state_dict().items():
        if name not in norms:
            assert torch.equal(tensor, before[name]), name  # the first layer's copies, too
            continue
        copies = tensor.view(beta**2, -1)  # (copy, channel of the convolution)
        assert torch.equal(copies, copies[:, :1].expand_as(copies))
        assert copies[:, 0].sort().values.tolist() == pytest.approx(torch.linspace(-0.5, 0.5, beta**2).tolist())
        replicas = tensor.view(beta, -1)  # (replica, source channel)
        torch.testing.assert_close(replicas.sum(0), torch.zeros(replicas.shape[1]))
        assert (replicas.amin(0) < 0).all()
        assert (replicas.amax(0) > 0).all()


def test_the_copies_then_cross_zero_at_different_inputs() -> None:
    """A convolution channel of one value: how many of its copies are positive counts up with the value."""
    rep = transformed(Residual(), inherit="none")[1]
    spread_shifts(rep, 0.75)
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).view(-1, 1, 1, 1).expand(-1, 4, 1, 1)
    positive = (rep.bn1.eval()(values) > 0).sum(1).flatten() // 4
    assert positive.tolist() == [0, 1, 2, 3, 4]


class Grouped(nn.Module):
    """Binary convolutions in two groups, whose repeat stays with them: within each group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.bn1 = conv(16, 16, groups=2), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = conv(16, 16, groups=2), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        x = self.bn1(self.conv1(x)) + x
        return self.fc((self.bn2(self.conv2(x)) + x).mean((2, 3)))


def test_groups_are_each_set_apart() -> None:
    plan, rep = transformed(Grouped(), inherit="none")
    spread_shifts(rep, 0.75)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    step = next(s for s in plan.steps.values() if s.node == "bn1")
    assert isinstance(step.state, Tiled)
    with torch.no_grad():
        out = rep.conv1(rep.bn0(rep.stem(x)).repeat(1, 2, 1, 1)[:, : rep.conv1.in_channels])
    alike = [[j for j in range(32) if torch.equal(out[:, j], out[:, i])] for i in range(32)]
    for copies in alike:  # the channels that repeat one convolution channel, in whichever order
        assert rep.bn1.bias[copies].sort().values.tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75])
    for source in range(16):
        replicas = [j for j, i in enumerate(step.state.index) if i == source]
        assert rep.bn1.bias[replicas].sum().item() == pytest.approx(0.0)


def test_a_network_without_repeating_norms_has_nothing_to_spread() -> None:
    rep = transformed(Residual(), rule="bn-before-repeat", inherit="none")[1]
    with pytest.raises(UsageError, match="--spread: no BatchNorm of this network is behind a RepConv's repeat"):
        spread_shifts(rep, 0.5)


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with net.py, a user's network, and own.pt, its checkpoint."""
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    Path("net.py").write_text(OWN_NETWORK)
    torch.save(own_network().state_dict(), "own.pt")


@pytest.mark.usefixtures("own_files")
def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--model", "net.py:make"]
    for inherit in ("none", "fold"):
        start = ["transform", "own.pt", *own, "--input-size", "3x32x32", "--inherit", inherit, "-o", f"{inherit}.pt"]
        assert run(start) == 0
    quick = ["--data", "digits", "--set", "augmentation=none", "--set", "batch=256", "--epochs", "1", "--spread", "0.5"]
    tip = "a short run gains from --spread 0.75"
    assert run(["finetune", "none.pt", *own, *quick[:-2], "--run-dir", "plain"]) == 0
    assert tip in capsys.readouterr().err
    assert run(["finetune", "none.pt", *own, *quick, "--run-dir", "r"]) == 0
    said = capsys.readouterr().err
    assert tip not in said
    assert "BatchNorm shifts from -0.5 to 0.5 behind 1 of 1 RepConvs" in said
    rows = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1]
    trained = torch.load("r/checkpoints/best.pt", weights_only=True)["training"]
    assert trained["inherited"] == {"spread": 0.5}
    capsys.readouterr()
    assert run(["report", "r/checkpoints/best.pt", *own, "--markdown"]) == 0
    assert "BatchNorm shifts of the copies started apart, from -0.5 to 0.5" in capsys.readouterr().out
    for again, more, why in (
        ("r/checkpoints/best.pt", [], "--spread: is for a RepBNN as `repbnn transform` made it, not r"),
        ("fold.pt", ["--fit", "0"], "a part of the fit to the source network, but --fit 0 leaves that out"),
    ):
        assert run(["finetune", again, *own, *quick, *more, "--run-dir", "s"]) == 2
        assert f"{why}\n" in capsys.readouterr().err
    assert not Path("s").exists()


@pytest.mark.usefixtures("own_files")
def test_inherited_weights_are_fitted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--model", "net.py:make", "--data", "digits"]
    assert run(["transform", "own.pt", *own[:2], "--input-size", "3x32x32", "-o", "fold.pt"]) == 0
    fit = ["--fit", "20", "--images", "256"]
    assert run(["calibrate", "fold.pt", *own, *fit, "--spread", "0", "-o", "together.pt"]) == 0
    assert "spread" not in torch.load("together.pt", weights_only=True)["training"]["inherited"]
    assert "apart" not in capsys.readouterr().err
    assert run(["calibrate", "fold.pt", *own, *fit, "-o", "apart.pt"]) == 0
    assert "256 training images, replicas ±0.5 standard deviations apart" in capsys.readouterr().err
    prepared = torch.load("apart.pt", weights_only=True)["training"]["inherited"]
    assert (prepared["spread"], prepared["fit_steps"]) == (0.5, 20)
    assert run(["report", "apart.pt", *own[:2], "--markdown"]) == 0
    assert "aimed from -0.5 to 0.5 standard deviations of it beside the source's" in capsys.readouterr().out
    for option in ("--spread", "--latents"):
        assert run(["calibrate", "apart.pt", *own, *fit, option, "0.5", "-o", "again.pt"]) == 2
        assert f"{option}: of inherited weights" in (said := capsys.readouterr().err)
        assert "but this network was fitted before\n" in said
    quick = ["--set", "augmentation=none", "--set", "batch=256", "--epochs", "1", "--run-dir", "r"]
    assert run(["finetune", "fold.pt", *own, "--fit", "2", *quick]) == 0
    rows = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]  # what was inherited is measured
    assert json.loads(Path("r/environment.json").read_text())["network"]["spread"] == 0.5
    assert run(["finetune", "apart.pt", *own, *quick[:-1], "again"]) == 0
    assert json.loads(Path("again/environment.json").read_text())["network"]["spread"] == 0.5


def test_a_network_without_quantised_values_has_no_thresholds_to_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    monkeypatch.chdir(tmp_path)
    torch.save(zoo.build("resnet20").state_dict(), "float.pth")
    assert run(["transform", "float.pth", "--arch", "resnet20", "--inherit", "fold", "-o", "float.pt"]) == 0
    quick = ["--data", "digits", "--batches", "1", "--fit", "1", "--images", "16"]
    assert run(["calibrate", "float.pt", *quick, "--spread", "0.5"]) == 2
    assert "--spread: no layer of this network quantises what it takes" in capsys.readouterr().err
    assert run(["calibrate", "float.pt", *quick]) == 0
    assert "spread" not in torch.load("float-calibrated.pt", weights_only=True)["training"]["inherited"]
