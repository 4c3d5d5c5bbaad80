"""A small state dict, and what every refusal of a file has to look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from repbnn_cli.checkpoint import load
from repbnn_cli.errors import CheckpointError


def state(prefix: str = "") -> dict[str, torch.Tensor]:
    tensors = {
        "conv1.weight": torch.arange(54.0).reshape(2, 3, 3, 3),
        "bn1.weight": torch.ones(2),
        "bn1.num_batches_tracked": torch.tensor(7),
        "fc.weight": torch.zeros(10, 2),
    }
    return {prefix + name: tensor for name, tensor in tensors.items()}


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert "\x1b" not in text
    assert "Traceback" not in text
    assert caught.value.exit_code == 3
    return text
