"""Training on Triton kernels against training on torch: layers, a Rep network, whole runs, and the command."""

from __future__ import annotations

import copy
import json
import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import transformed
from torch import Tensor, nn
from train_examples import run, tiny, toy

from repbnn_cli import binary_conv, cli
from repbnn_cli.errors import StoppedError, UsageError
from repbnn_cli.kernels import Backend
from repbnn_cli.rep_layers import RepBatchNorm2d
from repbnn_cli.runs import Progress
from repbnn_cli.train import backends, engine
from repbnn_cli.train.ranks import Ranks

pytest.importorskip("triton")

TRITON = Backend("triton", "asked for; interpreted on the CPU")
SHORT = ("schedule.warmup=0", "epochs=1")
KINDS = ["FracConv2d", "GatedConv2d", "IRConv2d", "RBNNConv2d", "ReCUConv2d", "SignConv2d"]


def rep(kind: str = "IRConv2d", beta: int = 2, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A RepBNN with one RepBconv and two BatchNorms over a repeat, in training, without its dropout."""
    made = transformed(tiny(conv=getattr(binary_conv, kind)), rule="reptran", beta=beta)[1].to(dtype).train()
    for part in made.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, RepBatchNorm2d):
            nn.init.normal_(part.weight)  # copies that differ
    return made


def images(dtype: torch.dtype, count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5)).to(dtype)


def learned(network: nn.Module, backend: str, steps: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The last logits, all gradients and all tensors after some steps of SGD, of a copy of the network."""
    network = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    like = next(network.parameters())
    with backends.running_on(network, backend, Ranks()):
        for _ in range(steps):
            optimizer.zero_grad()
            logits = network(images(like.dtype))
            logits.square().sum().backward()
            optimizer.step()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return logits.detach(), gradients, network.state_dict()


@pytest.mark.parametrize(("kind", "beta"), [*((kind, 2) for kind in KINDS), ("IRConv2d", 4)])
def test_a_rep_network_learns_the_same(kind: str, beta: int) -> None:
    network = rep(kind, beta)
    (ours, *mine), (theirs, *plain) = (learned(network, backend, steps=2) for backend in ("triton", "torch"))
    # In float64 no sign is decided by the order of a sum; SignConv2d's kernel has its scale up to the last bits.
    tolerance = 1e-12 if kind == "SignConv2d" else 1e-13
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=tolerance)
    for tensors, others in zip(mine, plain, strict=True):
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, others[name], rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", ["FracConv2d", "IRConv2d", "RBNNConv2d", "ReCUConv2d"])
def test_a_convolution_whose_scale_is_a_power_of_two_gives_the_same_bits(kind: str) -> None:
    network = tiny(conv=getattr(binary_conv, kind)).conv
    x = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(0))
    plain = network(x)
    with backends.running_on(network, "triton", Ranks()):
        assert torch.equal(network(x), plain)
    assert network.conv_signs is None


def test_a_float_kernel_stage_stays_with_torch(tmp_path: Path) -> None:
    made = [run(tmp_path / b, "kernels=float", *SHORT, options=engine.Options(backend=b)) for b in ("triton", "torch")]
    assert made[0].rows == made[1].rows


def test_a_run_learns_as_on_torch_and_resumes_exactly(tmp_path: Path) -> None:
    options, data = engine.Options(backend="triton", log_every=1), toy(train=48, test=8)
    whole = run(tmp_path / "whole", *SHORT, options=options, dataset=data)
    other = run(tmp_path / "torch", *SHORT, dataset=data)
    assert whole.rows[-1]["loss"] == pytest.approx(other.rows[-1]["loss"], rel=1e-5)
    assert whole.notes == ()

    def stop(progress: Progress) -> None:
        if progress.batch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        run(tmp_path / "cut", *SHORT, options=options, dataset=data, on_step=stop)
    with pytest.raises(UsageError, match=r"belongs to another run \(backend was triton, is torch\)"):
        run(tmp_path / "cut", *SHORT, resume=True, dataset=data)
    again = run(tmp_path / "cut", *SHORT, resume=True, options=options, dataset=data)
    assert again.rows == whole.rows
    stored = [torch.load(outcome.last, weights_only=True)["state_dict"] for outcome in (whole, again)]
    for name, tensor in stored[0].items():
        assert torch.equal(tensor, stored[1][name])


def test_several_processes_keep_the_statistics_that_they_share() -> None:
    network = rep()
    assert backends.lines(network, TRITON, Ranks()) == [
        f"backend {TRITON}: forward of 1 binary convolution, 2 BatchNorms over a repeat"
    ]
    shared = Ranks(0, 2)
    assert backends.lines(network, TRITON, shared)[0].endswith("forward of 1 binary convolution")
    with backends.running_on(network, "triton", shared):
        assert all(m.by_batch is None for m in network.modules() if isinstance(m, RepBatchNorm2d))
    with backends.running_on(network, "triton", Ranks()):
        assert all(m.by_batch is not None for m in network.modules() if isinstance(m, RepBatchNorm2d))
    assert all(m.by_batch is None for m in network.modules() if isinstance(m, RepBatchNorm2d))


def test_exact_zeros_are_told() -> None:
    network = tiny().eval()
    assert backends.notes(network, images(torch.float32), "triton") == []
    nn.init.zeros_(network.bn1.weight)
    nn.init.zeros_(network.bn1.bias)
    (said,) = backends.notes(network, images(torch.float32), "triton")
    assert said.startswith(
        "in the last network 1,536 activations of 3 images and 0 weights are exactly 0: +1 in packed"
    )
    assert backends.notes(network, images(torch.float32), "torch") == []


def test_one_value_per_channel_has_no_variance() -> None:
    norm = RepBatchNorm2d(8, repeats=4)
    with (
        backends.running_on(norm, "triton", Ranks()),
        pytest.raises(ValueError, match="expected 2 or more values per channel"),
    ):
        norm(torch.ones(1, 2, 1, 1))


NETWORK = """
import torch
from torch import nn
from repbnn_cli.binary_conv import IRConv2d

def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 32, 32), nn.BatchNorm2d(8), IRConv2d(8, 8, 1), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

torch.save({"state_dict": make().state_dict()}, "make.pt")
torch.save({"state_dict": plain().state_dict()}, "plain.pt")
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`repbnn finetune` of a network of the user's, in a folder of its own."""
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(NETWORK)
    runpy.run_path("own.py")
    quick = ["--data", "digits", "--set", "augmentation=none", "--set", "batch=512", "--epochs", "1"]
    return lambda *more, build="make": cli.run(
        ["finetune", f"{build}.pt", "--model", f"own.py:{build}", *quick, "--run-dir", "run", *more]
    )


def test_the_command_says_what_runs(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--backend", "triton", "--json") == 0
    shown = capsys.readouterr()
    assert shown.err.count("backend ") == 1
    assert "backend triton (asked for; interpreted on the CPU): forward of 1 binary convolution\n" in shown.err
    assert "exactly 0" not in str(json.loads(shown.out)["notes"])
    assert json.loads(Path("run/environment.json").read_text())["options"]["backend"] == "triton"


def test_a_device_that_cannot_is_named(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert command("--backend", "triton", "--device", "cpu") == 2
    assert "--backend triton: device 'cpu' is no GPU; expected --device cuda" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize("backend", ["triton", "int8"])
def test_a_network_that_would_not_run_on_it_is_refused(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    assert command("--backend", backend, "--device", "cpu", build="plain") == 2
    said = f"--backend {backend}: the network has no binary convolution of repbnn's own kinds"
    assert said in capsys.readouterr().err
    assert not Path("run").exists()
