"""Options that would be ignored, contradict each other, or fail late are refused at once; and standard output is for
results alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from repbnn_cli import views
from repbnn_cli.cli import run

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "irnet_resnet20_cifar10.pth"
RESULT = ROOT / "checkpoints" / "irnet_resnet20_8_epochs-rep2.repbnn.pt"

TALKATIVE = """
import torch
from torch import nn

class Bin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()
    @staticmethod
    def backward(ctx, g):
        return g

class BinConv(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(Bin.apply(x), Bin.apply(self.weight), None, 1, 1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv = BinConv(8, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)
    def forward(self, x):
        print("hello from forward")
        x = self.bn0(self.stem(x))
        return self.fc((x + self.bn1(self.conv(x))).mean((2, 3)))

def make():
    return Net()
"""
WIDE = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with the user's network, which prints when it runs, its checkpoint, and the RepBNN of that."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(TALKATIVE)
    namespace: dict[str, object] = {}
    exec(compile(TALKATIVE, "net.py", "exec"), namespace)
    torch.manual_seed(0)
    torch.save(namespace["make"]().state_dict(), "own.pth")  # type: ignore[operator]
    assert run(["transform", "own.pth", "--model", "net.py:make", "-o", "own.repbnn.pt"]) == 0
    capsys.readouterr()
    return tmp_path


MODEL = ["--model", "net.py:make"]


@pytest.mark.parametrize(
    "command",
    [
        ["transform", "own.pth", *MODEL, "--force", "-o", "own.repbnn.pt"],
        ["profile", "own.pth", *MODEL],
        ["lint", "own.pth", *MODEL],
        ["evaluate", "own.repbnn.pt", *MODEL, "--data", "digits"],
        ["finetune", "own.repbnn.pt", *MODEL, "--data", "digits", "--set", "iterations=1", "--fit", "0"],
        ["explain", "own.repbnn.pt", *MODEL],
        ["report", "own.repbnn.pt", *MODEL],
    ],
    ids=lambda command: str(command[0]),
)
def test_json_is_alone_on_stdout_though_the_network_prints(
    command: list[str], own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--json"]) == 0
    shown = capsys.readouterr()
    json.loads(shown.out)
    assert "hello from forward" in shown.err


def test_a_listing_is_alone_on_stdout_though_the_network_prints(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", "own.pth", *MODEL, "--csv"]) == 0
    assert "hello" not in capsys.readouterr().out


def test_help_and_version_stay_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["profile", "--help"], ["rules", "list", "--help"], ["--version"]):
        assert run(arguments) == 0
        shown = capsys.readouterr()
        assert "repbnn" in shown.out
        assert shown.err == ""


def test_report_and_compare_put_other_networks_beside_the_users(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = ["irnet_resnet20", str(CHECKPOINT)]
    assert run(["compare", "own.repbnn.pt", *others, *MODEL, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["networks"]) == 3
    assert run(["report", "own.repbnn.pt", *others, *MODEL, "--json"]) == 0


def test_compare_takes_the_code_of_each_network(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    Path("wide.py").write_text(WIDE)
    exec(WIDE, names)
    torch.save(names["make"]().state_dict(), "wide.pth")
    other = ["--model", "wide.py:make"]
    command = ["compare", "own.repbnn.pt", "wide.pth", "irnet_resnet20", "--json"]
    for models in ([*MODEL, *other], [*other, *MODEL]):
        assert run([*command, *models]) == 0
        found = json.loads(capsys.readouterr().out)["networks"]
        assert [n["target"] for n in found] == ["own.repbnn.pt", "wide.pth", "irnet_resnet20"]
        assert found[1]["totals"]["parameters"] == 3 * 8 * 9 + 8 * 10 + 10
    assert run([*command, *MODEL]) == 3
    assert "wide.pth" in capsys.readouterr().err
    assert run(["compare", "own.repbnn.pt", "irnet_resnet20", *MODEL, *other]) == 2
    assert "--model wide.py:make: own.repbnn.pt, irnet_resnet20 are built without it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        # Another network's code than that which builds the target.
        (["finetune", "irnet_resnet20", "--model", "no.py:no", "--data", "digits"], "leave --model out"),
        (["transform", "irnet_resnet20", "--model", "no.py:no"], "leave --model out"),
        (["profile", str(RESULT), "--model", "no.py:no"], "a network of the zoo, which no other code builds"),
        (["explain", str(RESULT), "--model", "no.py:no"], "a network of the zoo, which no other code builds"),
        (["compare", str(RESULT), "irnet_resnet20", "--model", "no.py:no"], "leave --model out"),
        # A place or a value twice.
        (["finetune", str(RESULT), "--epochs", "2", "--set", "epochs=1"], "say the same twice"),
        (["finetune", str(RESULT), "--distill", "0.5", "--set", "distillation.weight=1"], "say the same twice"),
        # What only inherited weights go through.
        (["finetune", "irnet_resnet20", "--data", "digits", "--fit", "10"], "--fit: is for weights that"),
        (["finetune", str(CHECKPOINT), "--data", "digits", "--calibrate", "10"], "--calibrate: is for weights that"),
        # Values that nothing can be done with.
        (["finetune", str(RESULT), "--eval-batch", "0"], "--eval-batch"),
        (["finetune", str(RESULT), "--fit", "-5"], "--fit"),
        (["finetune", str(RESULT), "--calibrate", "-5"], "--calibrate"),
        (["finetune", str(RESULT), "--save-every", "-1"], "--save-every"),
        (["finetune", str(RESULT), "--workers", "-3"], "--workers"),
        (["finetune", str(RESULT), "--seed", "99999999999999999999"], "--seed"),
        (["transform", str(CHECKPOINT), "--seed", "-1"], "--seed"),
        (["calibrate", str(RESULT), "--fit", "-5"], "--fit"),
        (["finetune", str(RESULT), "--compile", "foo"], "--compile: unknown value 'foo'"),
        (["finetune", str(RESULT), "--device", "meta"], "--device meta: nothing here was made for it"),
        (["finetune", str(RESULT), "--device", "cuda:99"], "--device cuda:99: PyTorch"),
        # Options of another table.
        (["profile", str(RESULT), "--batch", "8"], "--batch: are for --latency"),
        (["profile", str(RESULT), "--device", "cpu", "--backend", "torch"], "--device, --backend: are for --latency"),
        (["profile", str(RESULT), "--latency", "--max-ops", "0"], "--max-ops: --latency measures time"),
        (["profile", str(RESULT), "--latency", "--depth", "0", "--verbose"], "--depth, --verbose: --latency"),
        # What is in the file already.
        (["inspect", str(RESULT), "--arch", "reactnet_a"], "leave --arch out"),
        (["inspect", str(RESULT), "--key", "tensors"], "leave --key out"),
        # A file that could not hold it.
        (["finetune", str(CHECKPOINT), "--data", "digits", "-o", "net.safetensors"], "name it .pth"),
    ],
)
def test_what_would_be_ignored_or_fail_late_is_refused(
    command: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(command) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert not list(tmp_path.iterdir())


def test_distill_0_switches_a_recipes_teacher_off(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "show", "own-network"]) == 0
    Path("mine.yaml").write_text(capsys.readouterr().out)
    command = ["finetune", "own.repbnn.pt", *MODEL, "--recipe", "mine.yaml", "--data", "digits", "--fit", "0",
               "--set", "iterations=1"]  # fmt: skip
    assert run([*command, "--set", "distillation.weight=0.5"]) == 2
    assert run([*command, "--distill", "0"]) == 0


def test_a_run_is_not_resumed_with_another_network(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["finetune", *MODEL, "--data", "digits", "--set", "iterations=2", "--fit", "0", "--run-dir", "run"]
    assert run([*train, "own.repbnn.pt"]) == 0
    state = torch.load("own.pth", weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, "other.pth")
    assert run(["transform", "other.pth", *MODEL, "-o", "other.repbnn.pt"]) == 0
    before = Path("run/checkpoints/best.pt").read_bytes()
    capsys.readouterr()
    assert run([*train, "other.repbnn.pt", "--resume"]) == 2
    assert "belongs to another run (sha256 was" in capsys.readouterr().err
    assert Path("run/checkpoints/best.pt").read_bytes() == before
    assert run([*train, "own.repbnn.pt", "--resume"]) == 0


def test_safetensors_says_that_it_leaves_the_source_out(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transform", "own.pth", *MODEL, "-o", "own.repbnn.safetensors"]) == 0
    assert "holds no source network, as with --slim" in capsys.readouterr().err
    assert run(["transform", "own.pth", *MODEL, "--slim", "-o", "slim.repbnn.safetensors"]) == 0
    assert "holds no source network" not in capsys.readouterr().err


def test_rules_init_writes_json_where_it_is_told_to(own: Path) -> None:
    assert run(["rules", "init", "own.pth", *MODEL, "--json", "-o", "rules.json"]) == 0
    json.loads(Path("rules.json").read_text())


@pytest.mark.parametrize(
    "command", [["rules", "check", "mine.yaml", "--network", str(CHECKPOINT)], ["lint", str(CHECKPOINT), "--rules",
                "mine.yaml"]], ids=lambda c: str(c[0]))  # fmt: skip
def test_a_declaration_that_matches_no_module_is_said(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "schema: 1\nname: mine\nextends: reptran\nmodules:\n  - match: {path: nowhere}\n    role: binary_conv\n"
    )
    assert run(command) == 2
    assert "matches no module" in capsys.readouterr().err


def test_rules_are_checked_against_a_network_of_the_users(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["rules", "check", "reptran", "--network", "own.pth", *MODEL, "--json"]) == 0
    claims = {rule["rule"]: rule["claims"] for rule in json.loads(capsys.readouterr().out)["rules"]}
    assert any(claims.values())
    assert run(["rules", "check", "reptran", *MODEL]) == 2
    assert capsys.readouterr().err.startswith("error: --network: is missing")


def test_a_sweep_checks_what_its_cells_would_fail_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(ROOT / "experiments" / "table-3.yaml")
    twice = ["--epochs", "2", "--set", "epochs=1"]
    for wrong in (["--set", "optimizer.lrr=1"], ["--data", "nosuch:foo"], ["--device", "nonsense"], twice):
        for mode in ([], ["--dry-run"]):
            assert run(["sweep", file, *wrong, *mode]) == 2
            assert wrong[1].split("=")[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run(["sweep", file, "--dry-run", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert all(line.startswith("repbnn ") for cell in cells for line in cell["commands"])


def test_inspect_shows_a_network_whose_weights_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    state["module.layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    assert run(["inspect", str(tmp_path / "nan.pth"), "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)
    assert shown["network"] == "irnet_resnet20"
    assert "NaN or infinity in" in shown["problem"]


def test_a_file_is_read_though_it_is_called_like_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("irnet_resnet20").mkdir()
    assert run(["profile", "irnet_resnet20"]) == 0
    Path("irnet_resnet20").rmdir()
    Path("irnet_resnet20").write_bytes(CHECKPOINT.read_bytes())
    capsys.readouterr()
    assert run(["inspect", "irnet_resnet20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["network"] == "irnet_resnet20"
    assert run(["evaluate", "irnet_resnet20", "--data", "cifar10:nowhere"]) == 3
    assert "nowhere: no such file or folder" in capsys.readouterr().err


def test_json_has_null_for_what_is_not_finite() -> None:
    value = {"loss": float("nan"), "rows": [{"x": float("inf")}, (1.5, 2)]}
    assert json.loads(views.json_text(value)) == {"loss": None, "rows": [{"x": None}, [1.5, 2]]}
