"""The 8-bit convolution of signs: exact, with zeros and padding, and with the gradients of a plain convolution."""

from __future__ import annotations

import json
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from repbnn_cli import binary_conv, cli
from repbnn_cli.binary_conv import IRConv2d, RBNNConv2d, ReCUConv2d, SignConv2d, signs_convolved_by
from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import int8_conv2d
from repbnn_cli.kernels.int8_conv2d import sign_conv2d
from repbnn_cli.train import backends

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "irnet_resnet20_cifar10.pth"

pytestmark = pytest.mark.skipif(not int8_conv2d.available(), reason="this PyTorch has no 8-bit convolution here")


def drawn(shape: tuple[int, ...], seed: int, *, zeros: bool) -> Tensor:
    signs = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).sign()
    if zeros:
        signs.view(-1)[:: max(signs.numel() // 7, 1)] = 0
    return signs


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), inputs=st.sampled_from([1, 3, 16, 31, 33, 96]), outputs=st.sampled_from([1, 5, 16, 40]),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)), kernel=st.sampled_from([(1, 1), (3, 3), (3, 1), (2, 3)]),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    zeros=st.booleans(), channels_last=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
@example(1, 1, 40, (3, 3), (2, 3), (1, 2), (0, 0), False, False, 0)  # oneDNN's sums are wrong there
def test_the_result_is_the_float64_convolution_rounded_once(
    batch: int, inputs: int, outputs: int, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], zeros: bool, channels_last: bool, seed: int,
) -> None:  # fmt: skip
    layout = torch.channels_last if channels_last else torch.contiguous_format
    signs = drawn((batch, inputs, *size), seed, zeros=zeros).to(memory_format=layout)
    scale = torch.rand(outputs, 1, 1, 1, generator=torch.Generator().manual_seed(seed)) + 0.1
    weights = drawn((outputs, inputs, *kernel), seed + 1, zeros=zeros) * scale
    expected = F.conv2d(signs.double(), weights.double(), None, stride, padding)
    assert torch.equal(sign_conv2d(signs, weights, stride, padding), expected.float())


def test_a_forward_may_write_into_what_it_gives() -> None:
    signs = drawn((2, 16, 5, 5), 0, zeros=False).requires_grad_()
    kernel = (drawn((8, 16, 3, 3), 1, zeros=False) * 0.5).requires_grad_()
    found, plain = sign_conv2d(signs, kernel), F.conv2d(signs, kernel)
    found += 1
    assert torch.equal(found.relu_(), (plain + 1).relu())
    assert torch.equal(
        torch.autograd.grad(found.sum(), kernel)[0], torch.autograd.grad((plain + 1).relu().sum(), kernel)[0]
    )


def test_a_filter_of_zeros_gives_zeros() -> None:
    signs, kernel = drawn((2, 4, 5, 5), 0, zeros=False), drawn((3, 4, 3, 3), 1, zeros=False)
    kernel[1] = 0
    found = sign_conv2d(signs, kernel)
    assert torch.equal(found[:, 1], torch.zeros(2, 3, 3))
    assert torch.equal(found, F.conv2d(signs, kernel))


def test_more_products_than_16_bits_hold_are_added_up_exactly() -> None:
    """ReActNet-A at β = 2 adds 18 432 products; here they all have one sign, at the end of the range."""
    signs, kernel = torch.ones(1, 8192, 3, 3), torch.ones(2, 8192, 3, 3)
    kernel[1] = -1
    assert sign_conv2d(signs, kernel).flatten().tolist() == [73728.0, -73728.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_a_float64_convolution(dtype: torch.dtype) -> None:
    """In float32 to rounding; in bfloat16 the arriving gradient keeps 8 bits, sums of them a hundredth."""
    signs, kernel = drawn((4, 24, 9, 7), 0, zeros=True), drawn((12, 24, 3, 3), 1, zeros=True) * 0.5
    arriving = torch.randn(4, 12, 5, 4, generator=torch.Generator().manual_seed(2))
    found, expected = [], []
    for convolve, result, to in (
        (partial(sign_conv2d, gradients=dtype), found, torch.float32),
        (F.conv2d, expected, torch.float64),
    ):
        x, w = (t.to(to).clone().requires_grad_() for t in (signs, kernel))
        out = convolve(x, w, stride=(2, 2), padding=(1, 1))
        result += torch.autograd.grad(out, (x, w), arriving.to(to))
    for own, true in zip(found, expected, strict=True):
        error = (own.double() - true).norm() / true.norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-2)
        assert own.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(
    filters=st.integers(1, 9), inputs=st.sampled_from([1, 5, 16]), size=st.tuples(st.integers(4, 8), st.integers(4, 8)),
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 1), (2, 3), (4, 4)]), stride=st.sampled_from([(1, 1), (1, 2)]),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)), channels_last=st.booleans(),
)  # fmt: skip
def test_few_filters_have_the_same_gradient(
    filters: int, inputs: int, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], channels_last: bool,
) -> None:  # fmt: skip
    """Padding wider than the kernel, too, where the gradient has rows that no pixel reaches."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = drawn((2, inputs, *size), 0, zeros=True).contiguous(memory_format=layout).requires_grad_()
    w = drawn((filters, inputs, *kernel), 1, zeros=True).requires_grad_()
    out = sign_conv2d(x, w, stride, padding)
    arriving = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(out, (x, w), arriving)
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    expected = torch.autograd.grad(F.conv2d(x, w, None, stride, padding), (x, w), arriving.double())
    for own, true in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), true, rtol=1e-5, atol=1e-4)


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    signs, kernel = drawn((2, 4, 5, 5), 0, zeros=False), drawn((3, 4, 3, 3), 1, zeros=False).requires_grad_()
    sign_conv2d(signs, kernel).sum().backward()
    assert kernel.grad is not None
    assert signs.grad is None


def test_the_operator_keeps_the_rules_of_torch_operators() -> None:
    levels = (drawn((2, 6, 7, 5), 0, zeros=True) + 1).to(torch.uint8)
    for memory in (torch.contiguous_format, torch.channels_last):
        arguments = (levels.contiguous(memory_format=memory), drawn((4, 6, 3, 3), 1, zeros=False), [2, 1], [1, 0])
        torch.library.opcheck(torch.ops.repbnn.int8_conv2d.default, arguments)


def with_scales_of_both_signs(layer: torch.nn.Module) -> torch.nn.Module:
    """A learned scale may become negative, or 0."""
    if hasattr(layer, "alpha"):
        layer.alpha.data.copy_(((torch.arange(len(layer.alpha)) - 2) / 2).view(-1, 1, 1))
        assert 0 in layer.alpha
    return layer


@pytest.mark.parametrize("kind", [IRConv2d, RBNNConv2d, ReCUConv2d, SignConv2d])
def test_a_layer_computes_and_learns_the_same_with_it(kind: type) -> None:
    torch.manual_seed(0)
    layer = with_scales_of_both_signs(kind(8, 6, 3, stride=2, padding=1).train())
    x = torch.randn(3, 8, 9, 9)
    results = []
    for convolve in (None, sign_conv2d):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        with signs_convolved_by(layer, convolve):
            out = layer(inputs)
        out.square().sum().backward()
        results.append([out.detach(), inputs.grad, *(p.grad.clone() for p in layer.parameters())])
    for plain, eight in zip(*results, strict=True):
        torch.testing.assert_close(eight, plain, rtol=1e-5, atol=1e-5)


NETWORK = """
import torch
from torch import nn
from repbnn_cli.binary_conv import IRConv2d

def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 32, 32), nn.BatchNorm2d(8), IRConv2d(8, 8, 1), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )

torch.save({"state_dict": make().state_dict()}, "make.pt")
"""


def finetune(folder: str, *more: str) -> int:
    quick = ["--data", "digits", "--set", "augmentation=none", "--set", "batch=128", "--epochs", "1"]
    return cli.run(["finetune", "make.pt", "--model", "own.py:make", *quick, "--run-dir", folder, *more])


def test_a_run_says_that_it_computes_in_8_bits_and_learns_what_one_on_torch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(NETWORK)
    runpy.run_path("own.py")
    assert finetune("eight", "--device", "cpu") == 0
    shown = capsys.readouterr().err
    assert "backend int8 (exact, and the fastest on a CPU): forward of 1 binary convolution" in shown
    assert "training step not compiled: the run is too short to repay it; --compile on does it all the same" in shown
    assert finetune("plain", "--device", "cpu", "--backend", "torch") == 0
    assert finetune("bf16", "--device", "cpu", "--gradients", "bf16") == 0
    rows = {name: json.loads(Path(name, "metrics.jsonl").read_text()) for name in ("eight", "plain", "bf16")}
    assert rows["eight"]["loss"] == pytest.approx(rows["plain"]["loss"], rel=1e-3)
    assert rows["bf16"]["loss"] == pytest.approx(rows["plain"]["loss"], rel=0.05)
    assert rows["bf16"]["loss"] != rows["eight"]["loss"]


def test_what_8_bits_cannot_do_is_refused_with_what_can() -> None:
    with pytest.raises(UsageError, match=r"--backend int8: device 'cuda' is no CPU; --backend torch runs everywhere"):
        backends.choose(torch.device("cuda"), "int8")
    with pytest.raises(UsageError, match=r"--backend: unknown value 'int4'; expected one of auto, torch, triton, int8"):
        backends.choose(torch.device("cpu"), "int4")
    with pytest.raises(UsageError, match=r"--backend int8: the network has no binary convolution of repbnn's own kind"):
        backends.check(torch.nn.Conv2d(3, 8, 3), "int8")
    with pytest.raises(UsageError, match=r"--gradients bf16: is part of backend int8, and this run has backend torch"):
        backends.choose(torch.device("cpu"), "torch", "bf16")
    with pytest.raises(UsageError, match=r"--gradients: unknown value 'half'; expected one of exact, bf16"):
        backends.choose(torch.device("cpu"), "auto", "half")


def test_a_computer_without_the_operator_trains_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_conv2d, "available", lambda: False)
    assert backends.choose(torch.device("cpu")).name == "torch"
    with pytest.raises(UsageError, match=r"--backend int8: this PyTorch lacks it on this computer"):
        backends.choose(torch.device("cpu"), "int8")


@pytest.mark.parametrize("kind", ["FracConv2d", "GatedConv2d", "IRConv2d", "RBNNConv2d", "ReCUConv2d", "SignConv2d"])
def test_kernels_laid_out_once_give_what_they_give_laid_out_each_time(kind: str) -> None:
    """Also for images of another size than the first ones; afterwards the network is what it was."""
    torch.manual_seed(0)
    layer = with_scales_of_both_signs(getattr(binary_conv, kind)(8, 6, 3, stride=2, padding=1).eval())
    network = torch.nn.Sequential(layer, torch.nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        for size in (9, 12):
            x = torch.randn(3, 8, size, size)
            plain = network(x)
            with signs_convolved_by(network, sign_conv2d):
                each = network(x)
            with backends.evaluating_in_8_bits(network):
                assert torch.equal(network(x), each)
                assert torch.equal(network(x[:, :, :7, :7]), network(x[:, :, :7, :7].contiguous()))
            torch.testing.assert_close(each, plain, rtol=1e-5, atol=1e-5)
            assert torch.equal(network(x), plain)
    assert "binary_weight" not in layer.__dict__
    assert int8_conv2d._held == {}


def test_held_kernels_keep_the_rules_of_torch_operators() -> None:
    levels = (drawn((2, 6, 7, 5), 0, zeros=True) + 1).to(torch.uint8)
    kernel = drawn((4, 6, 3, 3), 1, zeros=False)
    with int8_conv2d.held(kernel, (2, 1), (1, 0)):
        number = next(iter(int8_conv2d._held))
        arguments = (levels, number, [4, 3, 3], [2, 1], [1, 0])
        torch.library.opcheck(torch.ops.repbnn.int8_conv2d_held.default, arguments)


def test_evaluate_in_8_bits_finds_the_same_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    found = []
    for more in ([], ["--backend", "int8"]):
        assert cli.run(["evaluate", str(CHECKPOINT), "--data", "digits", "--device", "cpu", "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["backend"]["name"] == "int8"
    assert found[1]["top1"] == pytest.approx(found[0]["top1"], abs=0.5)
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-2)


@pytest.mark.parametrize("whole", [False, True])
def test_a_kernel_of_nan_gives_nan(whole: bool) -> None:
    """So that a training that diverges is noticed in the step in which it does."""
    signs, kernel = drawn((2, 4, 5, 5), 0, zeros=False), drawn((3, 4, 3, 3), 1, zeros=False)
    kernel[1, ..., slice(None) if whole else 0] = torch.nan
    out = sign_conv2d(signs, kernel)
    assert out[:, 1].isnan().all()
    assert torch.equal(out[:, ::2], F.conv2d(signs, kernel)[:, ::2])
