"""A run's metrics for TensorBoard, as an extra: the numbers of metrics.jsonl, per layer as their means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repbnn_cli.errors import UsageError

TAGS = {
    "loss": "loss/train", "test_loss": "loss/test", "train_top1": "top1/train", "test_top1": "top1/test",
    "test_top5": "top5/test", "lr": "schedule/lr", "t": "schedule/t", "k": "schedule/k", "tau": "schedule/tau",
    "flips": "health/flips", "dead": "health/dead", "images_per_s": "speed/images_per_s",
}  # fmt: skip


@contextmanager
def scalars(folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Takes rows of metrics and writes them below `folder`, by step; UsageError without TensorBoard.

    A resumed run goes on where it does: what was written after that step by the run before it is hidden.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--tensorboard: needs TensorBoard, which is not installed; run: pip install 'repbnn[tensorboard]'"
        ) from None
    writers: list[SummaryWriter] = []

    def write(row: Mapping[str, Any]) -> None:
        if not writers:
            writers.append(SummaryWriter(str(folder), purge_step=row["step"]))
        for key, tag in TAGS.items():
            value = row.get(key)
            if isinstance(value, Mapping):
                value = sum(value.values()) / len(value) if value else None
            if value is not None:
                writers[0].add_scalar(tag, value, row["step"])
        writers[0].flush()

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()
