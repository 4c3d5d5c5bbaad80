"""The logits that a network gives, whatever they come in; and whether they are those of some classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from repbnn_cli.errors import RepbnnError, UsageError


def logits_of(output: Any) -> Tensor:
    """The logits of a forward, the first of a tuple or what a dict calls so."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    logits = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(logits, Tensor):
        keys = f" ({', '.join(map(str, logits))})" if isinstance(logits, Mapping) else ""
        raise UsageError(
            f"the network's output is a {type(logits).__name__}{keys}; expected logits, a tuple that begins with "
            "them, or a dict that calls them logits: return that from a subclass, whose tensors keep their names, and "
            "name it with --model"
        )
    return logits.float()


def checked_logits(forward: Callable[[Tensor], object], images: Tensor, classes: int, name: str = "network") -> Tensor:
    """The logits of images, (N, classes); UsageError where the network takes no such images or gives anything else."""
    try:
        output = forward(images)
    except (RepbnnError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        size = "x".join(map(str, images.shape[1:]))
        text = " ".join(str(error).split())[:200]
        one = name == "network" and images.shape[1] == 3 and "to have 1 channels" in text
        grey = f", or make its images grey by --input-size 1x{'x'.join(map(str, images.shape[2:]))}" if one else ""
        raise UsageError(
            f"the {name} does not run on the data's images of {size} ({type(error).__name__}: {text}); choose the data "
            f"set that it was made for{grey}"
        ) from error
    logits = logits_of(output)
    if logits.ndim != 2:
        size = "x".join(map(str, logits.shape[1:])) or "no dimension"
        raise UsageError(
            f"the {name}'s output for an image is {size}, expected {classes} logits, one for each class of the data "
            "set; what gives images or maps cannot be trained or measured on classes"
        )
    if logits.shape[1] != classes:
        raise UsageError(
            f"the {name} has {logits.shape[1]} outputs, the data set {classes} classes; choose the data set that it "
            f"was made for, or build it with {classes} classes"
        )
    return logits
