"""Around a run: signals, what can be wrong with its arguments together, and the environment that it ran in."""

from __future__ import annotations

import contextlib
import platform
import signal
import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn

import repbnn_cli
from repbnn_cli import seeds
from repbnn_cli.data import Dataset, ImageFolders
from repbnn_cli.errors import UsageError
from repbnn_cli.logits import checked_logits
from repbnn_cli.restoring import unchanged
from repbnn_cli.train import health
from repbnn_cli.train.recipes import Recipe
from repbnn_cli.verify.lockstep import tensors_of


def stopping() -> list[int]:
    """The signals that ask a run to stop: the keyboard's, a scheduler's, a closing terminal's (but under nohup)."""
    hangups = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # not on Windows
    return [signal.SIGINT, signal.SIGTERM, *(n for n in hangups if signal.getsignal(n) is not signal.SIG_IGN)]


class Signals:
    """Turns the first signal that asks to stop into `received`; a second one does what it always does.

    patient: a second one does nothing. torchrun hands on what the terminal sends to all, and ends by itself who takes
    too long.
    """

    received = 0

    def __init__(self, *, patient: bool = False) -> None:
        self._patient = patient

    def __enter__(self) -> Signals:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in stopping()}
        return self

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        if not self._patient:
            self.__exit__()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def check(
    network: nn.Module, teacher: nn.Module | None, recipe: Recipe, example: Tensor, classes: int
) -> str | None:  # fmt: skip
    """Raises UsageError for what can be wrong with the arguments together; example: a few images, normalised.

    What a person should know about the network's outputs in training, or None.
    """
    for stage in recipe.stages:
        if stage.distillation.weight and teacher is None:
            wanted = stage.distillation.teacher
            raise UsageError(
                f"recipe {recipe.name}: stage {stage.name} distils from {wanted}; name it with --teacher, or --set "
                "distillation.weight=0 (--distill WEIGHT learns from the source in a result)"
            )
        if stage.kernels == "float" and not health.binary_convs(network):
            raise UsageError(f"recipe {recipe.name}: stage {stage.name} trains float kernels first, which needs binary "
                             "convolutions of repbnn's; choose another recipe")  # fmt: skip
    halves = [name for name, p in network.named_parameters() if p.dtype == torch.float16]
    if halves:
        raise UsageError(f"{halves[0]}: is in float16, in which training loses the small steps of latent weights; "
                         "train the network in float32")  # fmt: skip
    for name, part in (("network", network), ("teacher", teacher)):
        if part is None:
            continue
        training = part.training
        with torch.no_grad(), seeds.kept():
            checked_logits(part.eval(), example, classes, name)
        part.train(training and part is network)
    returned = 1
    # What fails here will fail in the first step, which knows what to say.
    with contextlib.suppress(RuntimeError, ValueError, TypeError), unchanged(network), torch.no_grad():
        returned = len(tensors_of(network.train()(example)))
    if returned > 1:
        return (
            f"in training the network returns {returned} tensors; the loss is that of the first, so what only the "
            "others depend on is not trained"
        )
    return None


def environment(dataset: Dataset | ImageFolders, device: torch.device) -> dict[str, Any]:
    """Versions, hardware, command and data, as plain values."""
    return {
        "repbnn": repbnn_cli.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "data": dataset.name,
        "data_source": dataset.source,
        "data_notes": list(dataset.notes),
    }
