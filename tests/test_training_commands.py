"""The training commands through the command line, on scikit-learn's digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import repbnn_cli
from repbnn_cli.cli import run

pytest.importorskip("sklearn", reason="needs the extra `digits`")
CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "irnet_resnet20_cifar10.pth"
QUICK = ["--data", "digits", "--set", "augmentation=none", "--set", "batch=256", "--epochs", "1"]


@pytest.fixture
def rep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt.pth").write_bytes(CHECKPOINT.read_bytes())
    assert run(["transform", "ckpt.pth"]) == 0
    return tmp_path / "checkpoints" / "ckpt-rep2.repbnn.pt"


def test_finetune_a_result_gives_a_result(rep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["finetune", str(rep), *QUICK, "--calibrate", "2", "--distill", "0.5", "--run-dir", "r", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    best = outcome["best"]
    payload = torch.load(best, weights_only=True)
    assert payload["training"]["top1"] == outcome["best_top1"]
    assert [row["epoch"] for row in map(json.loads, Path("r/metrics.jsonl").read_text().splitlines())] == [0, 1]
    assert repbnn_cli.load(best)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert run(["evaluate", best, "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(outcome["best_top1"])
    assert run(["profile", best, "--json"]) == 0


def test_a_network_of_the_users_is_trained_transformed_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(8, 10))\n"
    )
    torch.save({"state_dict": _tiny().state_dict()}, "start.pt")
    own = ["--model", "tiny.py:make"]
    assert run(["finetune", "start.pt", *own, *QUICK, "--set", "mean=[0.5, 0.5, 0.5]", "--json"]) == 0
    shown = capsys.readouterr()
    assert "recipe own-network" in shown.err
    outcome = json.loads(shown.out)
    # Measured with the run's own preprocessing, though nothing on the command line says so: mean 0.5 would be lost.
    assert run(["evaluate", outcome["best"], *own, "--data", "digits", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["top1"] == pytest.approx(outcome["best_top1"])
    assert run(["evaluate", outcome["best"], *own, "--data", "digits", "--recipe", "own-network", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] != pytest.approx(evaluated["loss"])


def _tiny() -> torch.nn.Module:
    layers = (torch.nn.Conv2d(3, 8, 3, 4), torch.nn.BatchNorm2d(8), torch.nn.AdaptiveAvgPool2d(1))
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8, 10))


def test_calibrate_writes_another_result(rep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["calibrate", str(rep), "--data", "digits", "--batches", "2", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    before, after = (repbnn_cli.load(p).state_dict() for p in (rep, rep.with_name("ckpt-rep2-calibrated.repbnn.pt")))
    changed = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert changed <= {"running_mean", "running_var", "num_batches_tracked"}
    assert "running_mean" in changed


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["finetune", "irnet_resnet21", "--data", "digits"], 2, "unknown network 'irnet_resnet21'"),
        (["finetune", "irnet_resnet20", *QUICK, "--recipe", "nothing"], 2, "nothing"),
        (["finetune", "irnet_resnet20", *QUICK, "--set", "optimiser.lr=1"], 2, "optimizer"),
        (["finetune", "irnet_resnet20", "--data", "cifar10:nowhere"], 3, "nowhere"),
        (["finetune", "irnet_resnet20", *QUICK, "--distill", "0.5"], 2, "--distill"),
        (["finetune", "reactnet_a"], 2, "--data"),
        (["evaluate", "irnet_resnet20", "--data", "digits"], 2, "no trained weights"),
        (["recipes", "show", "nothing"], 2, "nothing"),
    ],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(command) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*"))


def test_recipes_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "list", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    for name in names:
        assert run(["recipes", "check", name]) == 0
    assert len(names) == 13
