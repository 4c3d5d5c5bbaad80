"""The kernels' benchmark without a GPU: what it refuses to time, that its checks run, and that they can fail."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import fused_rows
import kernels as benchmark


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
