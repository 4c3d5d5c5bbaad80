"""The training commands through the command line, on scikit-learn's digits."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from train_examples import OWN_NETWORK, own_network

import repbnn_cli
from repbnn_cli import result, runs
from repbnn_cli.cli import run
from repbnn_cli.commands import pupils, training
from repbnn_cli.train import recipes, reconstruct

pytest.importorskip("sklearn", reason="needs the extra `digits`")
CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "irnet_resnet20_cifar10.pth"
QUICK = ["--data", "digits", "--set", "augmentation=none", "--set", "batch=256", "--epochs", "1"]


@pytest.fixture
def rep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt.pth").write_bytes(CHECKPOINT.read_bytes())
    assert run(["transform", "ckpt.pth"]) == 0
    return tmp_path / "checkpoints" / "ckpt-rep2.repbnn.pt"


@pytest.mark.parametrize(
    ("inherited", "prepared", "tip"),
    [
        (True, {}, "a short run keeps more of what was inherited with less"),
        (False, {"fit_steps": 200}, "a short run keeps more of what was inherited with less"),
        (False, {}, "a short run gains from --spread 0.75"),
    ],
)
def test_a_short_run_is_told_what_helps_its_start(
    inherited: bool, prepared: dict[str, int], tip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fresh kernels that `calibrate` fitted to their source are no start from scratch."""
    origin = SimpleNamespace(arch="irnet_resnet20")
    pupil: Any = SimpleNamespace(
        origin=origin, fresh=False, trained=False, beta=2, inherited=inherited, prepared=prepared
    )
    training._recipe(pupil, "irnet-cifar10-resnet20", epochs=5, sets=[], stages=[], spread=False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tip")]
    assert tip in line


def test_finetune_a_result_gives_a_result(
    rep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reconstruct, "MEMORY", 2**26)  # of some eighty images, which makes the fit a short one
    capsys.readouterr()
    assert run(["finetune", str(rep), *QUICK, "--calibrate", "2", "--fit", "1", "--distill", "0.5", "--run-dir", "r",
                "--json"]) == 0  # fmt: skip
    shown = capsys.readouterr()
    outcome = json.loads(shown.out)
    assert "fitting to the source network: 1 steps per convolution, " in shown.err
    assert "tip: lr 0.1 is made for 400 epochs from scratch; a short run keeps more" in shown.err
    assert "with less, e.g. --set optimizer.lr=0.03\n" in shown.err
    best = outcome["best"]
    payload = torch.load(best, weights_only=True)
    assert payload["training"]["top1"] == outcome["best_top1"]
    assert [row["epoch"] for row in map(json.loads, Path("r/metrics.jsonl").read_text().splitlines())] == [0, 1]
    assert repbnn_cli.load(best)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert run(["evaluate", best, "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(outcome["best_top1"])
    assert run(["profile", best, "--json"]) == 0
    assert runs.read("r").network == "ckpt-rep2"
    inherited = payload["training"]["inherited"]
    assert (inherited["fit_steps"], inherited["calibrated_batches"]) == (1, 2)


def test_a_trained_result_is_not_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by more training nor by calibration, and it keeps what is known of its training and its beginning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    Path("net.py").write_text(OWN_NETWORK)
    torch.save(own_network().state_dict(), "own.pt")
    own, data = ["--model", "net.py:make"], ["--data", "digits"]
    assert run(["transform", "own.pt", *own, "--input-size", "3x32x32", "-o", "rep.pt"]) == 0
    assert run(["calibrate", "rep.pt", *own, *data, "--batches", "1", "--fit", "0", "-o", "start.pt"]) == 0
    assert run(["finetune", "start.pt", *own, *QUICK, "--calibrate", "1", "--fit", "1", "--run-dir", "r"]) == 0
    first = torch.load("r/checkpoints/best.pt", weights_only=True)["training"]
    assert first["inherited"]["fit_steps"] == 1  # BatchNorm's statistics alone were estimated before
    capsys.readouterr()
    assert run(["finetune", "r/checkpoints/best.pt", *own, *QUICK, "--calibrate", "1", "--run-dir", "s"]) == 0
    assert run(["calibrate", "s/checkpoints/best.pt", *own, *data, "--batches", "1", "-o", "c.pt"]) == 0
    said = "not fitted to the source network: this network was trained since its transform"
    shown = capsys.readouterr().err
    assert shown.count(said) == 2
    assert "tip:" not in shown
    for path in ("s/checkpoints/best.pt", "c.pt"):
        training = torch.load(path, weights_only=True)["training"]
        assert training["recipe_text"] == first["recipe_text"]
        assert training["inherited"]["fit"] == first["inherited"]["fit"]


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
    assert run(["calibrate", str(rep), "--data", "digits", "--batches", "2", "--fit", "0", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    before, after = (repbnn_cli.load(p).state_dict() for p in (rep, rep.with_name("ckpt-rep2-calibrated.repbnn.pt")))
    changed = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert changed <= {"running_mean", "running_var", "num_batches_tracked"}
    assert "running_mean" in changed


def test_a_second_calibration_says_what_it_was_measured_on(
    rep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    little = ["--batches", "1", "--fit", "0"]
    assert run(["calibrate", str(rep), "--data", "digits", *little, "-o", "first.repbnn.pt"]) == 0
    _folder_of_images()
    assert run(["calibrate", "first.repbnn.pt", "--data", "folder:images", *little, "-o", "second.repbnn.pt"]) == 0
    first, second = (result.training_of(result.read_payload(f"{name}.repbnn.pt")) for name in ("first", "second"))
    assert (first["data"], second["data"]) == ("digits", "folder")
    assert first["data_fingerprint"] != second["data_fingerprint"]
    capsys.readouterr()
    assert run(["compare", "second.repbnn.pt", "--markdown"]) == 0
    assert "measured on folder" in capsys.readouterr().out


VIEWS = """
import torch
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8)
        self.w, self.b2, self.fc = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.BatchNorm2d(8), nn.Linear(8 * 8 * 8, 10)

    def forward(self, x):
        x = self.b(self.c(x))
        x = self.b2(F.conv2d(x.sign(), self.w.sign(), padding=1)) + x
        return self.fc(x.view(x.size(0), x.size(1) * x.size(2) * x.size(3)))
"""


def test_a_network_that_views_its_feature_maps_is_trained_fitted_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("views.py").write_text(VIEWS, "utf-8")
    own = ["--model", "views.py:Net"]
    space: dict[str, type[torch.nn.Module]] = {}
    exec(VIEWS, space)
    torch.save(space["Net"]().state_dict(), "net.pth")
    shape = ["--input-size", "3x32x32"]
    assert run(["finetune", "net.pth", *own, *shape, *QUICK, "--run-dir", "r", "--compile", "off"]) == 0
    assert "images stay contiguous in memory" in capsys.readouterr().err
    assert run(["evaluate", "r/checkpoints/last.pt", *own, *shape, "--data", "digits"]) == 0
    assert run(["transform", "r/checkpoints/last.pt", *own, *shape, "-o", "rep.repbnn.pt"]) == 0
    capsys.readouterr()
    assert run(["calibrate", "rep.repbnn.pt", *own, "--data", "digits", "--fit", "3", "--images", "32"]) == 0
    said = capsys.readouterr().err
    assert "conv2d_call: misses " in said
    assert "keep what they inherited" not in said


def _folder_of_images() -> None:
    for part, count in (("train", 6), ("test", 2)):
        for number, label in enumerate("abcdefghij"):
            folder = Path("images", part, label)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (40 * i, 20, 25 * number)).save(folder / f"{i}.png")


def test_calibrate_takes_a_smaller_batch_where_there_are_few_images(rep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder_of_images()
    assert run(["calibrate", str(rep), "--data", "folder:images", "--batches", "1", "--fit", "0"]) == 0


def test_a_calibrated_file_is_measured_by_the_recipe_it_was_calibrated_with(
    rep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = recipes.for_network(result.open_result(rep).origin).name
    text = recipes.load(name).text.replace("mean:", "mean: [0.1, 0.2, 0.3]  #").replace("name:", "name: mine  #", 1)
    Path("mine.yaml").write_text(text, "utf-8")
    made = ["--data", "digits", "--json"]
    assert run(["calibrate", str(rep), *made, "--batches", "2", "--fit", "0", "--recipe", "mine.yaml"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert run(["evaluate", str(rep.with_name("ckpt-rep2-calibrated.repbnn.pt")), *made]) == 0
    second = json.loads(capsys.readouterr().out)
    assert (first["top1"], first["loss"]) == (second["top1"], second["loss"])


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["finetune", "irnet_resnet21", "--data", "digits"], 2, "unknown network 'irnet_resnet21'"),
        (["finetune", "irnet_resnet20", *QUICK, "--recipe", "nothing"], 2, "nothing"),
        (["finetune", "irnet_resnet20", *QUICK, "--set", "optimiser.lr=1"], 2, "optimizer"),
        (["finetune", "irnet_resnet20", "--data", "cifar10:nowhere"], 3, "nowhere"),
        (["finetune", "irnet_resnet20", *QUICK, "--distill", "0.5"], 2, "--distill"),
        (
            ["finetune", "irnet_resnet20", *QUICK, "--epochs", "5", "--set", "stages.train.epochs=3"],
            2,
            "--epochs 5 and --set stages.train.epochs=...: say the same twice",
        ),
        (["finetune", "reactnet_a"], 2, "--data"),
        (["finetune", "irnet_resnet20", *QUICK, "--teacher-arch", "resnet20"], 2, "name that with --teacher"),
        (
            ["finetune", "irnet_resnet20", *QUICK, "--teacher", "no.pth"],
            2,
            "learns from no teacher; add --distill",
        ),
        (["finetune", "irnet_resnet20", *QUICK, "--teacher", "no.pth", "--distill", "1"], 2, "no.pth: no such file"),
        (
            ["finetune", "irnet_resnet20", *QUICK, "--stage", "kernel"],
            2,
            "stage kernel: irnet-cifar10-resnet20 has",
        ),
        (["finetune", "irnet_resnet20", *QUICK, "--device", "cuda"], 2, "sees no GPU here; use --device cpu"),
        (["finetune", "irnet_resnet20", *QUICK, "--device", "gpu"], 2, "--device gpu: expected auto, cpu or cuda"),
        (
            ["finetune", "irnet_resnet20", *QUICK, "-o", "nowhere/net.pt"],
            2,
            "nowhere/net.pt: the folder nowhere",
        ),
        (["finetune", "irnet_resnet20", *QUICK, "--run-dir", "new", "--resume"], 2, "new: holds no run to resume"),
        (
            ["finetune", "irnet_resnet20", "--data", "digits", "--recipe", "recu-imagenet"],
            2,
            "is for imagenet, folder",
        ),
        (["finetune"], 2, "checkpoints/: holds no result (*.repbnn.pt); run `repbnn transform CHECKPOINT` first"),
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


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["own.pth", "--model", "gone.py:make"], 2, "--data: name the data"),
        (["own.pth", "--model", "gone.py:make", "--data", "folder:nowhere"], 3, "nowhere: no such file or folder"),
        (["own.pth", "--data", "digits", "--recipe", "irnet-cifar10-resnet20", "--set", "epoch=1"], 2, "epoch"),
        (["own.pth", "--data", "digits", "--run-dir", "begun"], 2, "begun: holds a run already"),
        (["own.pth", "--data", "digits", "--run-dir", "own.py/run"], 2, "own.py is no folder); choose another place"),
        (["own.pth", "--data", "digits", "--run-dir", "new", "--resume"], 2, "new: holds no run to resume"),
        (["own.pth", "--data", "digits", "--recipe", "nosuch"], 2, "nosuch"),
        (["own.pth", "--data", "digits", "--device", "cpu:1"], 2, "--device cpu:1: there is one CPU; expected auto"),
        (["begun", "--data", "digits"], 2, "`repbnn finetune own.pth --data 'cifar10:a b'` began; to continue"),
        (["--resume", "--run-dir", "begun"], 2, "that was `repbnn finetune own.pth --data 'cifar10:a b'`: give"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_said_before_the_network_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    """own.pth, and the code that it is said to need, are not there."""
    monkeypatch.chdir(tmp_path)
    Path("begun").mkdir()
    Path("own.py").touch()
    Path("begun/run.json").write_text("{}")
    began = {"command": ["/usr/bin/repbnn", "finetune", "own.pth", "--data", "cifar10:a b"]}
    Path("begun/environment.json").write_text(json.dumps(began))
    assert run(["finetune", *command]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "--recipe", "nosuch"], "nosuch"),
        (["evaluate", "--compile", "perhaps"], "--compile: unknown value 'perhaps'"),
        (["evaluate", "--data", "folder:nowhere"], "nowhere: no such file or folder"),
        (["calibrate", "--recipe", "nosuch"], "nosuch"),
        (["calibrate", "--device", "gpu"], "--device gpu: expected auto"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_network_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    data = [] if "--data" in command else ["--data", "digits"]
    assert run([command[0], "own.repbnn.pt", *command[1:], *data]) in (2, 3)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_in_the_default_folder_is_met_before_the_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pupils, "dataset", lambda *_: pytest.fail("read"))
    taken = Path("runs/irnet_resnet20-irnet-cifar10-resnet20-seed0")
    taken.mkdir(parents=True)
    (taken / "run.json").write_text("{}")
    assert run(["finetune", "irnet_resnet20", "--data", "digits", "--epochs", "1"]) == 2
    assert f"{taken}: holds a run already; --resume continues it" in capsys.readouterr().err


def test_a_fit_that_cannot_be_is_said_before_the_data_are_read(
    rep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pupils, "dataset", lambda *_: pytest.fail("read"))
    command = ["finetune", str(rep), "--data", "digits", "--epochs", "1", "--spread", "0.5", "--fit", "0"]
    assert run(command) == 2
    assert "--spread: of inherited weights it is a part of the fit" in capsys.readouterr().err


def test_iterations_are_not_taken_for_epochs(rep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """100 epochs of ImageNet are longer than 62 500 steps, so that there is no tip for a short run."""
    command = ["finetune", str(rep), "--recipe", "irnet-imagenet", "--data", "digits", "--epochs", "100"]
    assert run(command) == 2
    error = capsys.readouterr().err
    assert "tip:" not in error
    assert "is for imagenet" in error


GREY = """
from torch import nn
def make():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(nn.Conv2d(1, 8, 3, 4), nn.BatchNorm2d(8), *head)

class Named(nn.Sequential):
    def forward(self, x):
        return {"aux": x, "logits": super().forward(x)}

def named():
    return Named(*make())

class Other(nn.Sequential):
    def forward(self, x):
        return {"out": super().forward(x)}

def other():
    return Other(*make())
"""


def test_a_network_of_one_channel_and_one_that_names_its_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("grey.py").write_text(GREY)
    space: dict[str, Any] = {}
    exec(GREY, space)
    torch.save(space["make"]().state_dict(), "net.pth")
    command = ["evaluate", "net.pth", "--data", "digits", "--input-size", "1x32x32", "--json", "--model"]
    assert run([*command, "grey.py:make"]) == 0
    plain = capsys.readouterr()
    assert "the network takes one channel: images become grey" in plain.err
    assert run([*command, "grey.py:named"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == json.loads(plain.out)["loss"]
    assert run([*command, "grey.py:other"]) == 2
    assert "the network's output is a dict (out); expected logits, a tuple that begins with" in capsys.readouterr().err
    train = ["finetune", "net.pth", "--model", "grey.py:make", *QUICK, "--run-dir", "r", "--compile", "off"]
    assert run(train) == 2
    assert "or make its images grey by --input-size 1x32x32" in capsys.readouterr().err
    assert run([*train, "--input-size", "1x32x32"]) == 0
    train[3] = "grey.py:named"
    assert run([*train[:-3], "named", *train[-2:], "--input-size", "1x32x32"]) == 0


def test_a_mistyped_key_in_a_recipe_file_is_shown_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("data: digits\nbatch: 16\nepochs: 1\noptimizer: {name: sgd, lr: 0.1, momentun: 0.9}\n")
    assert run(["finetune", "irnet_resnet20", "--data", "digits", "--recipe", "mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert "mine.yaml:4" in error
    assert "momentun" in error
    assert "momentum" in error


def test_a_small_float_teacher_and_everything_around_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Teacher from a file and the user's code, TensorBoard, -o, one stage of two, the next command."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(8, 10))\n"
    )
    Path("two.yaml").write_text(
        "data: digits\nbatch: 256\nepochs: 2\noptimizer: {name: sgd, lr: 0.05}\nschedule: {name: cosine}\n"
        "stages:\n  first: {hands_over: every tensor}\n  second: {distillation: {weight: 1.0}}\n"
    )
    for name in ("start.pt", "teacher.pt"):
        torch.save({"state_dict": _tiny().state_dict()}, name)
    own = ["--model", "tiny.py:make", "--recipe", "two.yaml", "--data", "digits"]
    lesson = ["--teacher", "teacher.pt", "--teacher-model", "tiny.py:make"]
    assert run(["finetune", "start.pt", *own, *lesson, "--tensorboard", "--run-dir", "r", "-o", "best.pth"]) == 0
    shown = capsys.readouterr()
    assert "stage 1 of 2, first: 2 epochs, binary kernels; hands over every tensor\n" in shown.err
    assert "stage 2 of 2, second: 2 epochs, binary kernels\n" in shown.err
    assert "second epoch 2/2  loss " in shown.err
    assert shown.err.endswith("next: repbnn transform best.pth --model tiny.py:make\n")
    assert shown.out.endswith("\nbest.pth\n")
    kept, best = (torch.load(file, weights_only=True)["state_dict"] for file in ("best.pth", "r/checkpoints/best.pt"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in best.items())
    log = events.EventAccumulator("r/tensorboard").Reload()
    rows = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert [(e.step, e.value) for e in log.Scalars("top1/test")] == [
        (row["step"], pytest.approx(row["test_top1"])) for row in rows
    ]
    assert run(["finetune", "start.pt", *own, *lesson, "--stage", "second", "--run-dir", "s", "--json"]) == 0
    assert [stage["stage"] for stage in json.loads(capsys.readouterr().out)["stages"]] == ["second"]
    assert run(["finetune", "start.pt", *own, "--run-dir", "t"]) == 2
    assert "stage second distils from the source network; name it with --teacher" in capsys.readouterr().err


def test_the_network_of_a_run_is_transformed_under_the_runs_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / "net-seed0" / "checkpoints"
    place.mkdir(parents=True)
    (place.parent / "run.json").write_text("{}")
    (place / "best.pt").write_bytes(CHECKPOINT.read_bytes())
    assert run(["transform", "runs/net-seed0/checkpoints/best.pt"]) == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["net-seed0-rep2.repbnn.pt"]


ODD_OUTPUTS = """
from torch import nn

from net import make

class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = make(), kind

    def forward(self, x):
        if self.kind == "a map":
            return self.net[:4](x)
        if self.kind == "a vector in":
            return self.net[6](x.flatten(1))
        return {"out": self.net(x), "aux": x}
"""


@pytest.mark.parametrize(
    ("kind", "commands", "message"),
    [
        ("a dict", ["evaluate", "calibrate", "finetune"], "the network's output is a dict (out, aux); expected"),
        ("a map", ["evaluate", "calibrate"], "the network's output for an image is 8x6x6, expected 10 logits, one"),
        ("a vector in", ["evaluate"], "the network does not run on the data's images of 3x32x32 (RuntimeError: mat1"),
    ],
)
def test_outputs_that_are_no_logits_are_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str,
    commands: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("net", "odd"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Path("net.py").write_text(OWN_NETWORK)
    Path("odd.py").write_text(f"{ODD_OUTPUTS}\ndef build():\n    return Odd({kind!r})\n")
    torch.save({f"net.{n}": t for n, t in own_network().state_dict().items()}, "own.pt")
    own = ["--model", "odd.py:build"]
    if "calibrate" in commands:
        assert run(["transform", "own.pt", *own, "--inherit", "fold", "-o", "rep.pt", "--verify", "quick"]) == 0
    for command in commands:
        capsys.readouterr()
        assert run([command, "own.pt" if command == "evaluate" else "rep.pt", *own, "--data", "digits"]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert "misses" not in shown  # nothing was fitted
    assert not Path("runs").exists()


def test_a_checkpoint_of_several_entries_and_a_network_with_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `transform` needs to be told, evaluate and finetune take as well, and say it again at their end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    Path("net.py").write_text(OWN_NETWORK.replace("make()", "make(classes)").replace("(8, 10)", "(8, classes)"))
    moving = own_network().state_dict()
    torch.save({"net": own_network().state_dict(), "ema": moving}, "own.pt")
    own = ["--model", "net.py:make", "--model-args", '{"classes": 10}', "--data", "digits"]
    assert run(["evaluate", "own.pt", *own]) == 0
    assert "note: took net of the file; --key takes ema instead\n" in capsys.readouterr().err
    assert run(["evaluate", "own.pt", *own, "--key", "ema", "--json"]) == 0
    torch.save(moving, "moving.pt")
    shown = capsys.readouterr()
    assert "note: took" not in shown.err
    expected = json.loads(shown.out)["top1"]
    assert run(["evaluate", "moving.pt", *own, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == expected
    more = ["--recipe", "own-network", "--epochs", "1", "--set", "batch=512", "--run-dir", "r"]
    assert run(["finetune", "own.pt", *own, "--key", "ema", *more]) == 0
    again = capsys.readouterr().err.splitlines()[-1]
    best = Path("r", "checkpoints", "best.pt")
    assert again == f"""next: repbnn transform {best} --model net.py:make --model-args '{{"classes": 10}}'"""
    assert run([*shlex.split(again)[2:], "-o", "rep.pt"]) == 0


def test_tensorboard_is_asked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(["finetune", "irnet_resnet20", *QUICK, "--tensorboard", "--run-dir", "r"]) == 2
    assert "which is not installed; run: pip install 'repbnn[tensorboard]'" in capsys.readouterr().err
    assert not Path("r").exists()


def test_recipes_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "list", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    for name in names:
        assert run(["recipes", "check", name]) == 0
    assert len(names) == 13
