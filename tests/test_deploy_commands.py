"""export packed, evaluate --backend, profile --latency and the zeros that inspect counts, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import repbnn_cli
from repbnn_cli import checkpoint as checkpoints
from repbnn_cli import result as results
from repbnn_cli.cli import run
from repbnn_cli.deploy import latency, packed

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "irnet_resnet20_cifar10.pth"
TINY = """
import torch
from torch import nn
from torch.nn import functional as F

class Binary(nn.Conv2d):
    def forward(self, x):
        scale = self.weight.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(x.sign(), self.weight.sign() * scale, None, self.stride, self.padding)

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 8, 8, bias=False), nn.BatchNorm2d(4)
        self.conv, self.bn1 = Binary(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        x = self.bn(self.stem(x))
        x = F.hardtanh(self.bn1(self.conv(x)) + x)
        return self.fc(x.mean((2, 3)))

class Half(Tiny):
    def __init__(self):
        super().__init__()
        self.half()

    def forward(self, x):
        return super().forward(x.to(self.fc.weight.dtype))

def make():
    torch.manual_seed(0)
    return Tiny()
"""
OWN = ["--model", "tiny.py:make"]


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A result of a small network of the user's own; every test runs in its folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    Path("tiny.py").write_text(TINY)
    exec(compile(TINY, "tiny.py", "exec"), names)
    torch.save({"state_dict": names["make"]().state_dict()}, "tiny.pt")  # type: ignore[operator]
    assert run(["transform", "tiny.pt", *OWN, "-o", "rep.repbnn.pt", "--verify", "quick"]) == 0
    return "rep.repbnn.pt"


def test_export_says_what_the_bytes_are_and_evaluates_the_same(result: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    capsys.readouterr()
    assert run(["export", "packed", result, *OWN, "-o", "net.packed"]) == 0
    size = Path("net.packed").stat().st_size
    out, said = capsys.readouterr()
    assert said.endswith("next: repbnn evaluate net.packed --model tiny.py:make --data folder:DIR\n")
    assert f"{size:,} = header " in out
    assert "as `repbnn profile` predicts" in out
    assert run(["export", "packed", result, *OWN, "-o", "net.packed", "--json", "--force"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert run(["profile", result, *OWN, "--json"]) == 0
    assert facts["data"] == json.loads(capsys.readouterr().out)["totals"]["packed"]["after"]
    assert facts["bytes"] == size == facts["header"] + facts["data"]
    found = []
    for target in (result, "net.packed"):
        assert run(["evaluate", target, *OWN, "--data", "digits", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["top1"] == found[1]["top1"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[1]["backend"]["name"] == "torch"


@pytest.mark.parametrize("name", ["Half", "make"])
def test_export_of_half_precision_and_of_a_convolution_that_takes_each_copy_alone(
    result: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("alone.yaml").write_text(
        "extends: reptran\nrules:\n  own: {part: backbone, match: {path: conv}, apply: tile}\n"
    )
    own, rules = ["--model", f"tiny.py:{name}"], ["--rules", "alone.yaml"] if name == "make" else []
    assert run(["transform", "tiny.pt", *own, *rules, "-o", "own.pt", "--verify", "quick"]) == 0
    what = f"own.pt --model tiny.py:{name}"
    assert f"wrote own.pt; next: repbnn profile {what}, repbnn report {what} --markdown\n" in capsys.readouterr().err
    assert run(["export", "packed", "own.pt", *own, "-o", "own.packed"]) == 0
    assert "modules, each on the same inputs: largest relative" in capsys.readouterr().out


def test_evaluate_on_triton_says_which_blocks_it_fuses(result: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    found = []
    for backend in ("torch", "triton"):
        capsys.readouterr()
        assert (
            run(["evaluate", result, *OWN, "--data", "digits", "--backend", backend, "--device", "cpu", "--json"]) == 0
        )
        shown = capsys.readouterr()
        found.append(json.loads(shown.out))
    assert found[0]["top1"] == found[1]["top1"]
    assert found[1]["backend"]["fused"] == [
        {"path": "conv", "parts": ["convolution", "BatchNorm ×4", "residual", "hardtanh"], "then": None}
    ]
    assert "backend triton (asked for; interpreted on the CPU)" in shown.err
    assert "blocks: 1 of 1 binary convolutions run fused with what follows them" in shown.err
    assert "no activation was exactly 0" in shown.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "packed", "irnet_resnet20"], 2, "a zoo name has no trained weights to export"),
        (["export", "packed", "nothere.pt"], 3, "nothere.pt: no such file"),
        (["export", "packed", "rep.repbnn.pt"], 2, "name it again: --model tiny.py:make"),
        (["export", "packed", "rep.repbnn.pt", *OWN, "-o", "no/x.packed"], 2, "the folder no does not exist"),
        (["evaluate", "tiny.pt", *OWN, "--backend", "tritn"], 2, "--backend: unknown value 'tritn'; expected one of"),
        (["evaluate", "tiny.pt", *OWN, "--backend", "triton", "--device", "cpu"], 2, "device 'cpu' is no GPU"),
        (["profile", "tiny.pt", *OWN, "--latency", "--batch", "1,x"], 2, "--batch 1,x: expected batch sizes"),
        (["profile", "tiny.pt", *OWN, "--latency", "--csv"], 2, "--latency measures time and knows --batch"),
        (["finetune", "net.packed", "--data", "digits"], 2, "is a packed network, whose latent weights are gone"),
        (["export", "packed", "net.packed"], 2, "net.packed: is a packed network already"),
        (
            ["transform", "net.packed"],
            2,
            "net.packed: is a packed network (`repbnn export packed`), for inference alone",
        ),
    ],
)
def test_bad_input_gets_one_line(
    result: str, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if "net.packed" in arguments:
        assert run(["export", "packed", str(CHECKPOINT), "-o", "net.packed"]) == 0
    capsys.readouterr()
    assert run(arguments) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_a_packed_file_can_be_inspected_profiled_and_loaded(result: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "packed", str(CHECKPOINT), "-o", "net.packed"]) == 0
    capsys.readouterr()
    assert run(["inspect", "net.packed", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["network"], shown["kernels"], shown["norms"]) == ("irnet_resnet20", 18, 20)
    assert shown["kernel_shapes"]["layer1.0.conv1"] == [16, 16, 3, 3]
    assert run(["profile", "net.packed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["packed"] == 46440
    assert repbnn_cli.load_packed("net.packed")(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_latency_of_both_sides_and_of_fused_blocks(
    result: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "ROUNDS", (5, 5))
    monkeypatch.setattr(latency, "SAMPLE_SECONDS", 1e-3)
    capsys.readouterr()
    options = [*OWN, "--latency", "--batch", "1,2", "--device", "cpu"]
    assert run(["profile", result, *options, "--backend", "triton", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["before", "before, fused", "after", "after, fused"]
    assert [(t["batch"], t["network"]) for t in found["timings"]] == [(b, n) for b in (1, 2) for n in names]
    assert found["blocks"]["after, fused"]["fused"][0]["path"] == "conv"
    for timing in found["timings"]:
        assert timing["median_ms"] > 0 <= timing["iqr_ms"]
        assert timing["images_per_s"] == pytest.approx(1e3 * timing["batch"] / timing["median_ms"])
        assert len(timing["rounds_ms"]) == 5
    assert run(["profile", result, *options]) == 0
    shown = capsys.readouterr().out
    assert "CPU threads" in shown
    assert "no block is fused" in shown


def test_timing_statistics() -> None:
    timing = latency.Timing("x", 4, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), 1)
    assert timing.median == 0.4
    assert timing.iqr == pytest.approx(0.4)
    assert timing.images_per_s == pytest.approx(10)


def test_inspect_counts_weights_with_sign_zero(result: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)
    tensors = state.get("state_dict", state)
    name = next(n for n in tensors if n.endswith("layer2.1.conv2.weight"))
    # IR-Net centres its kernels: a filter of ±1 in equal numbers has mean 0, so its stored zeros keep sign 0.
    filters = tensors[name]
    filters[0] = torch.ones_like(filters[0])
    filters[0, ::2] = -1
    filters[0, :2, 0, 0] = 0
    torch.save(state, "zeros.pth")
    capsys.readouterr()
    assert run(["inspect", "zeros.pth", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kernel zeros"]
    assert (found["zeros"], found["as_applied"], found["layers"]) == (2, True, {"layer2.1.conv2": 2})
    assert run(["inspect", "zeros.pth"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "2 of 267,264 weights in binary kernels have sign 0 (layer2.1.conv2 2); torch.sign(0) is 0, packed bits" in text
    )
    assert run(["inspect", "tiny.pt", "--json"]) == 3  # the user's code is not run for a look
    found = json.loads(capsys.readouterr().out)["kernel zeros"]
    assert (found["zeros"], found["as_applied"], found["weights"]) == (0, False, 4 * 3 * 64 + 4 * 4 * 9)
    assert run(["inspect", result, "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["kernel zeros"]["as_applied"]


def test_inspect_says_what_became_of_a_result(result: str, capsys: pytest.CaptureFixture[str]) -> None:
    opened = checkpoints.load(result)
    payload = results.payload_in(opened)
    assert payload is not None
    about = {"top1": 71.5, "recipe": "r", "epochs": 2, "seed": 1, "data_notes": ["a note"],
             "inherited": {"fit_steps": 200}}  # fmt: skip
    results.save(results.with_tensors(payload, opened.tensors, about), Path("trained.repbnn.pt"))
    torch.save({"state_dict": torch.load("tiny.pt"), "recipe_text": "a: 1\nb: 2", "epoch": 3}, "long.pt")
    capsys.readouterr()
    assert run(["inspect", "trained.repbnn.pt"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "71.5 % top-1 (recipe r, seed 1, epoch 2 of 2); fitted to its source first about the data a note" in text
    assert run(["inspect", result]) == 0
    assert "accuracy" not in capsys.readouterr().out
    assert run(["inspect", "long.pt"]) == 3
    assert "recipe_text (2 lines, whole with --json), epoch 3" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("kernels", "expected"), [("binary", 71.5), ("float", None)])
def test_an_accuracy_of_float_kernels_is_not_that_of_the_packed_network(
    result: str, kernels: str, expected: float | None
) -> None:
    opened = checkpoints.load(result)
    payload = results.payload_in(opened)
    assert payload is not None
    about = {"top1": 71.5, "recipe": "r", "epochs": 2, "kernels": kernels}
    results.save(results.with_tensors(payload, opened.tensors, about), Path("trained.repbnn.pt"))
    assert run(["export", "packed", "trained.repbnn.pt", *OWN, "-o", "trained.packed"]) == 0
    assert packed.open_packed("trained.packed", "tiny.py:make").header["training"]["top1"] == expected


def test_a_packed_network_has_the_accuracy_that_it_was_measured_with_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the paper's of the network that it is, or came from."""
    monkeypatch.chdir(tmp_path)
    assert run(["transform", str(CHECKPOINT), "-o", "rep.repbnn.pt", "--verify", "quick"]) == 0
    assert run(["export", "packed", str(CHECKPOINT), "-o", "net.packed"]) == 0
    assert run(["export", "packed", "rep.repbnn.pt", "-o", "rep.packed"]) == 0
    opened = checkpoints.load("rep.repbnn.pt")
    payload = results.payload_in(opened)
    assert payload is not None
    about = {"top1": 54.5, "data": "cifar10", "recipe": "r", "kernels": "binary"}
    results.save(results.with_tensors(payload, opened.tensors, about), Path("trained.repbnn.pt"))
    assert run(["export", "packed", "trained.repbnn.pt", "-o", "trained.packed"]) == 0
    capsys.readouterr()
    assert run(["compare", "net.packed", "rep.packed", "trained.packed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["networks"]
    assert [(n["target"], n["network"]) for n in found] == [
        ("net.packed", "irnet_resnet20"), ("rep.packed", "Rep-irnet_resnet20"), ("trained.packed", "Rep-irnet_resnet20")
    ]  # fmt: skip
    assert [n["top1"] for n in found] == [62.35, None, 54.5]
    assert found[2]["top1_from"] == "measured on cifar10 after training it"
    torch.save(torch.load(CHECKPOINT, weights_only=True) | {"best_prec1": 85.25}, "stated.pth")
    assert run(["export", "packed", "stated.pth"]) == 0
    capsys.readouterr()
    assert run(["compare", "stated.pth", "stated.packed", "--json"]) == 0
    stated, as_packed = json.loads(capsys.readouterr().out)["networks"]
    assert (stated["top1"], stated["top1_from"]) == (as_packed["top1"], as_packed["top1_from"])
    assert stated["top1"] is not None
    opened = packed.open_packed("stated.packed")
    packed.save(packed.pack(opened.network, opened.layers, opened.origin), "plain.packed")  # nothing is said of it
    assert run(["compare", "plain.packed"]) == 0


def test_a_network_of_half_precision_is_timed_and_has_no_packed_form(
    result: str, capsys: pytest.CaptureFixture[str]
) -> None:
    del result
    half = ["--model", "tiny.py:Half"]
    torch.save({name: t.half() for name, t in torch.load("tiny.pt")["state_dict"].items()}, "half.pt")
    assert run(["transform", "half.pt", *half, "--verify", "quick", "-o", "half.repbnn.pt"]) == 0
    assert run(["profile", "half.repbnn.pt", *half, "--latency", "--batch", "1"]) == 0
    capsys.readouterr()
    assert run(["export", "packed", "half.repbnn.pt", *half, "-o", "half.packed"]) == 2
    assert capsys.readouterr().err == (
        "error: the network computes in float16, a packed one in float32; build it in float32 and save that\n"
    )
