"""The kernels' benchmark without a GPU: what it refuses to time, that its checks run, and that they can fail."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import fused_rows
import kernel_timing
import kernels as benchmark
import norm_rows
from kernel_timing import COMPILED, Row, Timing


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    return benchmark.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU, which it would time")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch) == 3
    assert "no CUDA GPU is visible, nothing is timed; --check runs the checks alone" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    assert call(monkeypatch, "--check") == 3
    assert "device 'cpu' is no GPU" in capsys.readouterr().err


def test_checks_run_alone_and_can_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["--check", "--only", "CIFAR ResNet-20 16→32"]
    assert call(monkeypatch, *rows) == 0
    assert capsys.readouterr().err.split("\n")[:2] == [
        "ok     CIFAR ResNet-20 16→32 3×3 /2 32² β=1",
        "ok     CIFAR ResNet-20 16→32 3×3 /2 32² β=2",
    ]
    right = fused_rows.run

    def one_value_wrong(*given: Any, **options: Any) -> Any:
        values, signs = right(*given, **options)
        values[0, -1, -1, -1] += 1
        return values, signs

    monkeypatch.setattr(fused_rows, "run", one_value_wrong)
    assert call(monkeypatch, *rows) == 4
    assert "FAILED CIFAR ResNet-20 16→32 3×3 /2 32² β=1: values differ from float64" in capsys.readouterr().err
    assert call(monkeypatch, "--check", "--only", "no such layer") == 2


def test_layers_are_those_of_the_networks() -> None:
    """Distinct layers, and the bytes of one: CIFAR ResNet-18's 64→64 at 32², batch 256, are 2·2·256·64·32² and 1/32."""
    assert Counter(layer.network for layer in fused_rows.LAYERS) == {
        "CIFAR ResNet-20": 5, "CIFAR ResNet-18": 7, "ImageNet ResNet-18": 7, "ReActNet-A": 18,
    }  # fmt: skip
    assert len(set(fused_rows.LAYERS)) == len(fused_rows.LAYERS)
    layer = next(layer for layer in fused_rows.LAYERS if str(layer) == "CIFAR ResNet-18 64→64 3×3 32²")
    values = 256 * 64 * 32**2
    assert fused_rows.moved(layer, 1, 256) == 4 * values + 2 * values // 8
    assert fused_rows.moved(layer, 2, 256) == 2 * fused_rows.moved(layer, 1, 256)


def test_the_norms_check_can_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["--check", "--only", "CIFAR ResNet-20 norm 64"]
    assert call(monkeypatch, *rows) == 0
    assert capsys.readouterr().err == "".join(f"ok     CIFAR ResNet-20 norm 64 8² β={beta}\n" for beta in (1, 2))
    right = norm_rows.ours
    for wrong, said in (
        (lambda values, signs: (values + 0.1, signs), "values differ from float64"),
        (lambda values, signs: (values, signs ^ 1), "signs are not those of the values"),
        (lambda values, signs: (values.detach() * 0.99 + values * 0.01, signs), "gradient of x differs from float64"),
    ):
        monkeypatch.setattr(norm_rows, "ours", lambda *given, wrong=wrong: wrong(*right(*given)))
        assert call(monkeypatch, *rows) == 4
        assert said in capsys.readouterr().err


def test_bytes_of_a_norm() -> None:
    """64 channels at 8², batch 256, β = 1: five passes over x, five over values in bf16, four over bits."""
    assert norm_rows.moved(64, 8, 1, 256) == 256 * 64 * 64 * (5 * 2 + 5 * 2) + 4 * 256 * 64 * 64 // 8
    assert len(norm_rows.shapes()) == len(set(norm_rows.shapes()))
    assert {network for network, _, _ in norm_rows.shapes()} == {layer.network for layer in fused_rows.LAYERS}


def test_kept_memory_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = norm_rows.operands(32, 4, 2, 2, torch.device("cpu"))
    assert norm_rows.kept(norm_rows.ours, given) == given[0].numel() * 2 + given[3].numel() // 8
    assert norm_rows.kept(norm_rows.plain, given) > 4 * norm_rows.kept(norm_rows.ours, given)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # takes a C++ compiler, and long
    assert call(monkeypatch, "--kept", "--only", "CIFAR ResNet-20 norm 64") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == [f"CIFAR ResNet-20 norm 64 8² β={beta}" for beta in (1, 2)]
    assert shown[0].endswith("2.82× !")
    assert shown[1].endswith("7.20×")


def test_more_shapes_than_the_compiler_likes_are_compiled_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with torch._dynamo.config.patch(recompile_limit=8):
        fast = kernel_timing.compiled(lambda x: x.sin())
        for size in range(2, 14):
            fast(torch.ones(size))
        assert len(made) == 12


def test_the_table_marks_and_counts_missed_targets() -> None:
    row = Row("a", 3_000_000, {}, lambda: None, faster=2.0, kept={}, less_kept=4.0)

    def result(compiled: float, kept: int) -> benchmark.Result:
        timings = {"fused": Timing(10.0, 1.0, 50), COMPILED: Timing(compiled, 1.0, 50)}
        return benchmark.Result(row, timings, {"fused": 1_000_000, COMPILED: kept})

    good, bad = result(20.0, 4_000_000), result(19.9, 3_900_000)
    assert benchmark.line(good).split("fused")[1] == (
        "    10.0 ±  0.5 µs  0.30 TB/s  torch.compile bf16  2.00×  kept 1.000 MB  torch.compile bf16  4.00×"
    )
    assert benchmark.line(bad).count("!") == 2
    assert benchmark._counts([good, bad]) == [
        "time: 1 of 2 rows reach their target over torch.compile",
        "kept memory: 1 of 2 rows reach their target over torch.compile",
    ]


def test_targets_are_those_of_wide_layers_and_of_resnet20() -> None:
    found = {str(layer): [fused_rows.target(layer, beta) for beta in (1, 2)] for layer in fused_rows.LAYERS}
    assert found["CIFAR ResNet-20 16→16 3×3 32²"] == [2.0, 1.5]
    assert found["ImageNet ResNet-18 64→64 3×3 56²"] == [3.0, 2.0]
    assert found["ReActNet-A 32→32 3×3 112²"] == [None, None]
