"""Other tools' counts: they are what those tools give on the network itself, and every difference has its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import thop
import torch
from fvcore.nn import FlopCountAnalysis
from networks import BinaryConv, Residual, transformed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from repbnn_cli import crosscheck, graph, profiler
from repbnn_cli.binary_conv import GatedConv2d, RBNNConv2d
from repbnn_cli.cli import run
from repbnn_cli.crosscheck import CrossCheck, Reason, Tool, cross_check
from repbnn_cli.profiler import shapes
from repbnn_cli.recognize import recognize

ROOT = Path(__file__).resolve().parent.parent
# Residual on 3×8×8 with 8 channels, 5 classes, by hand.
STEM, CONV1, CONV2, SHORTCUT, FC = 64 * 8 * 27, 64 * 8 * 72, 16 * 16 * 72, 16 * 16 * 8, 16 * 5
RESIDUAL = STEM + CONV1 + CONV2 + SHORTCUT + FC
NORMS = 64 * 8 * 2 + 16 * 16 * 2  # elements that the four BatchNorms of Residual give


def checked(model: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> CrossCheck:
    network = graph.capture(model.eval(), shape)
    layers = recognize(network)
    return cross_check(network, layers, profiler.profile(network, layers))


def tools(check: CrossCheck) -> dict[str, Tool]:
    assert not [t.failed for t in check.tools if t.failed]
    for tool in check.tools:
        assert sum(r.macs for r in tool.reasons) == pytest.approx(tool.gap)
        assert tool.macs - check.macs == pytest.approx(tool.gap)
    return {t.name: t for t in check.tools}


def amounts(tool: Tool) -> dict[tuple[str, str], float]:
    """(kind, first word that matters) → MACs."""
    return {(r.kind, r.what.split()[3 if r.kind == "unseen" else 1].rstrip(":")): r.macs for r in tool.reasons}


def test_figures_are_those_of_the_tools_on_the_network_itself() -> None:
    model, x = Residual().eval(), torch.randn(1, 3, 8, 8)
    found = tools(checked(model))
    direct = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).tracer_warnings("none")
    assert found["fvcore"].reported == direct.total()
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert found["torch FlopCounterMode"].reported == counter.get_total_flops()
    assert found["thop"].reported == thop.profile(model, (x,), verbose=False)[0]


def test_every_gap_of_a_plain_network_by_hand() -> None:
    check = checked(Residual())
    assert check.macs == RESIDUAL
    assert check.binary == CONV1 + CONV2
    found = tools(check)
    assert found["torch FlopCounterMode"].reported == 2 * RESIDUAL
    assert found["torch FlopCounterMode"].reasons == ()
    assert amounts(found["fvcore"])["addition", "batch_norm"] == 2 * NORMS
    thop_alone = amounts(found["thop"])
    assert thop_alone["unseen", "BinaryConv"] == -(CONV1 + CONV2)
    assert thop_alone["addition", "BatchNorm2d"] == 4 * NORMS
    (unseen,) = (r for r in found["thop"].reasons if r.kind == "unseen")
    assert unseen.places == ("conv1", "conv2")
    with_handlers = amounts(found["thop with handlers"])
    assert {kind for kind, _ in with_handlers} == {"addition"}
    assert with_handlers["addition", "BatchNorm2d"] == 4 * NORMS


def test_a_rep_network_is_seen_through_handlers() -> None:
    plan, rep = transformed(Residual())
    network, layers = shapes.rep_network(plan, rep)  # type: ignore[arg-type]
    check = cross_check(network, layers, profiler.profile(network, layers))
    found = tools(check)
    assert check.macs == RESIDUAL + FC  # way 1: the classifier takes twice the inputs
    assert found["torch FlopCounterMode"].gap == 0
    assert not [r for r in found["thop with handlers"].reasons if r.kind != "addition"]
    assert {r.what for r in found["thop"].reasons if r.kind == "unseen"} == {
        "does not see RepBinaryConv: it has no rule for that class",
        "does not see RepConv2d: it has no rule for that class",
    }


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.fc = layer, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x).mean((2, 3)))


def test_two_convolutions_of_a_gated_layer() -> None:
    found = tools(checked(OneLayer(GatedConv2d(8, 8, 3, padding=1)), (8, 8, 8)))
    (reason,) = (r for r in found["fvcore"].reasons if r.kind == "repeated")
    assert reason.macs == 64 * 8 * 72
    assert "2 times, for as many convolutions in its forward; here once, with 2-bit inputs" in reason.what


def test_work_on_parameters_alone_is_an_addition() -> None:
    layer = RBNNConv2d(8, 8, 3, padding=1)
    found = tools(checked(OneLayer(layer), (8, 8, 8)))
    n1, n2 = layer.R1.shape[0], layer.R2.shape[0]
    products = sum(r.macs for r in found["torch FlopCounterMode"].reasons if "of parameters alone" in r.what)
    assert products == 8 * (n1 * n1 * n2 + n1 * n2 * n2)  # R1ᵀ·X, then ·R2, for each of 8 filters


def test_convolutions_called_in_a_forward() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, padding=1).mean((2, 3))

    found = tools(checked(Called()))
    assert found["torch FlopCounterMode"].gap == 0
    assert amounts(found["thop"])["unseen", "ConvolutionCall"] == -64 * 8 * 27


def test_a_difference_without_a_reason_is_said_to_have_none() -> None:
    network = graph.capture(Residual().eval(), (3, 8, 8))
    layers = recognize(network)
    (reason,) = crosscheck._reasons(network, layers, {"conv1": 100}, {("conv1", "conv"): 130.0})
    assert reason == Reason("unexplained", "counts BinaryConv differently", 30, ("conv1",))


def test_it_leaves_the_network_alone_and_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    model = Residual().eval()
    names = list(model.state_dict())
    checked(model)
    assert list(model.state_dict()) == names
    assert not any(m._forward_hooks for m in model.modules())
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_tool_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no rule for\nthis")

    monkeypatch.setattr(thop, "profile", broken)
    found = {t.name: t for t in checked(Residual()).tools}
    assert found["thop"].failed == "ValueError: no rule for this"
    assert found["fvcore"].failed == ""


def test_a_forward_that_insists_on_its_batch() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = BinaryConv(3, 8, 3, padding=1, bias=False), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).view(2, 8, 64).mean(2))

    found = tools(checked(Fixed()))
    assert found["torch FlopCounterMode"].macs == 64 * 8 * 27 + 32


# -- the commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt.pth").write_bytes((ROOT / "checkpoints" / "irnet_resnet20_cifar10.pth").read_bytes())
    assert run(["transform", "ckpt.pth", "-o", "rep.repbnn.pt"]) == 0
    capsys.readouterr()
    return "rep.repbnn.pt"


def test_cross_check_on_the_command_line(result_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", result_file, "--cross-check"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "does not see RepIRConv2d" in " ".join(shown.out.split())
    assert "NOT EXPLAINED" not in shown.out
    assert run(["profile", result_file, "--cross-check", "--json"]) == 0
    sides = json.loads(capsys.readouterr().out)["cross_check"]
    assert {side: check["macs"] for side, check in sides.items()} == {"before": 40_551_040, "after": 40_551_680}
    assert {t["gap"] for c in sides.values() for t in c["tools"] if t["name"].startswith("torch")} == {0}
    assert run(["profile", result_file, "--cross-check", "--csv"]) == 2


def test_max_ops_is_a_gate_on_the_rep_network(result_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", result_file, "--max-ops", "1070336"]) == 0
    assert run(["profile", "ckpt.pth", "--max-ops", "1.06970e6"]) == 0  # the source takes 1,069,696
    capsys.readouterr()
    assert run(["profile", result_file, "--max-ops", "1070335"]) == 4
    shown = capsys.readouterr()
    assert "OPs without BN" in shown.out  # the table is there for whoever reads the log
    (line,) = shown.err.splitlines()
    assert line == (
        "error: rep.repbnn.pt: the Rep network takes 1,070,336 OPs without BN, more than --max-ops 1,070,335"
    )
    for wrong in ("0", "-1", "nan"):
        assert run(["profile", result_file, "--max-ops", wrong]) == 2


def test_compare(result_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "ckpt.pth", result_file, "irnet_vgg_small"]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "ckpt.pth: stated in the file (best_prec1)" in shown
    assert run([*command, "--json"]) == 0
    source, rep, vgg = json.loads(capsys.readouterr().out)["networks"]
    assert (source["totals"]["ops_without_bn"], rep["totals"]["ops_without_bn"]) == (1_069_696, 1_070_336)
    assert (source["top1"], rep["top1"], vgg["top1"]) == (62.35, None, 90.4)
    assert vgg["top1_from"] == "published for CIFAR-10, RepBNN Table 7"
    assert run([*command, "--csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = dict(zip(lines[0].split(","), lines[2].split(","), strict=True))
    assert (row["network"], row["ops_without_bn"], row["top1"]) == ("Rep-irnet_resnet20", "1070336", "")
    assert run([*command, "--markdown", "-o", "c.md"]) == 0
    assert "| OPs without BN | 1,069,696 | 1,070,336 |" in Path("c.md").read_text("utf-8")
    assert run([*command, "--markdown", "-o", "c.md"]) != 0  # would overwrite
    assert run(["compare", "ckpt.pth", "nothing.pt"]) == 3
