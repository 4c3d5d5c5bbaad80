"""A payload in this tool's format, and the three ways to write a file, for tests that hold for each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repbnn_cli.checkpoint import VERSION
from repbnn_cli.writing import atomic_write_text, save, save_safetensors


def example() -> dict[str, Any]:
    return {
        "format": "repbnn",
        "version": VERSION,
        "rules": "base: reptran\n",
        "options": {"beta": 2, "scale": 0.5, "steps": [1, 2], "names": ("a", "b"), "none": None, "on": True},
        "tensors": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)},
    }


WRITERS: dict[str, Callable[[Path, bool], None]] = {
    "checkpoint": lambda path, force: save(example(), path, force=force),
    "safetensors": lambda path, force: save_safetensors(example()["tensors"], {"a": "b"}, path, force=force),
    "text": lambda path, force: atomic_write_text(path, "report\n", force=force),
}
every_writer = pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
