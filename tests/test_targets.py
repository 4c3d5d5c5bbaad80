"""What a command line names, for every command that reads it: untrusted files, several state dicts, and options that
contradict the target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from repbnn_cli.cli import run

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "irnet_resnet20_cifar10.pth"
RESULT = CHECKPOINT.with_name("irnet_resnet20_8_epochs-rep2.repbnn.pt")


class Settings:
    """What a training script pickles beside its weights."""


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    return found


@pytest.fixture
def foreign(state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "args": Settings()}, "foreign.pth")
    return "foreign.pth"


EXPORT = ["export", "packed", "-o", "net.packed", "--zeros-as-plus"]


@pytest.mark.parametrize(
    "command", [["transform", "--dry-run"], ["profile"], ["lint"], ["inspect"], EXPORT], ids=lambda c: str(c[0])
)
def test_unsafe_load_reads_foreign_classes(
    command: list[str], foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, foreign]) == 3
    assert "load it with --unsafe-load" in capsys.readouterr().err
    assert run([*command, foreign, "--unsafe-load"]) == 0


def test_unsafe_load_of_a_network_to_evaluate(foreign: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", foreign, "--data", "digits"]) == 3
    assert "asks for code" in capsys.readouterr().err
    assert run(["evaluate", foreign, "--data", "digits", "--unsafe-load"]) == 0


def test_inspect_counts_zeros_of_the_state_dict_that_key_names(
    state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = {n: t.clone() for n, t in state.items()}
    kernel = other["module.layer1.0.conv1.weight"].zero_()
    kernel[:, 0, 0, 0], kernel[:, 1, 0, 0] = 1, -1  # IR-Net takes the mean off: 0 here
    torch.save({"state_dict": state, "ema": other}, "two.pth")
    found = {}
    for key in ("state_dict", "ema"):
        assert run(["inspect", "two.pth", "--key", key, "--json"]) == 0
        found[key] = json.loads(capsys.readouterr().out)["kernel zeros"]
    assert found["state_dict"] != found["ema"]


CONTRADICTIONS = [
    (["--arch", "recu_resnet20"], "has irnet_resnet20 in it; leave --arch out"),
    (["--model-args", '{"width": 2}'], "takes none; leave --model-args out"),
    (["--key", "source_tensors"], "leave --key out"),
]
# Networks of the zoo, without a transform, take other input sizes.
OF_A_RESULT = [*CONTRADICTIONS, (["--input-size", "3x64x64"], "has 3x32x32 in it; leave --input-size out")]


@pytest.mark.parametrize(
    ("name", "what", "said", "message"),
    [
        *((str(RESULT), "a result", *case) for case in OF_A_RESULT),
        *(("irnet_resnet20", "a network of the zoo", *case) for case in CONTRADICTIONS),
    ],
)
def test_an_option_that_contradicts_the_target_is_refused(
    name: str, what: str, said: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("profile", "lint"):
        assert run([command, name, *said]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {said[0]} {said[1]}: ")
        assert f"{name} is {what}" in error
        assert message in error
    assert run(["finetune", name, *said, "--data", "digits"]) == 2
    assert message in capsys.readouterr().err


def test_an_option_that_agrees_with_the_target_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", str(RESULT), "--arch", "irnet_resnet20", "--input-size", "3x32x32"]) == 0


def test_arguments_of_no_model_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["transform", "--dry-run"], ["profile"], ["rules", "init"]):
        assert run([*command, str(CHECKPOINT), "--model-args", "{}"]) == 2
        assert "name it with --model" in capsys.readouterr().err


def test_rules_of_a_result_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lint", str(RESULT), "--rules", "reptran"]) == 2
    assert "has its rules in it; leave --rules out" in capsys.readouterr().err
