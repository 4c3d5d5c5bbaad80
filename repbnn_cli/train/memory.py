"""Memory: kept between steps; and out of memory, recognised and turned into the batch size that would fit, measured."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from repbnn_cli.errors import MemoryExceededError

# What PyTorch's allocator says of the computer's own memory, which it has no error class for.
_CPU = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


# malloc.h of glibc
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed(device: torch.device) -> None:
    """On a CPU: what one step frees stays with this process, for the next step, until the process ends.

    By default glibc hands large blocks back to the system at once, which gives them out again page by page, zeroed: a
    fifth of a training step of ResNet-20, and a quarter of its Rep network's. No effect on results, and none where the
    C library is another one.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_MMAP_MAX, 0)


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out, of a GPU or of the computer."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _CPU)


def fits(act: Callable[[], object]) -> bool:
    """Does it; False where memory ran out. Only then nothing holds on to its tensors any more: the traceback did."""
    try:
        act()
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return False
    return True


def step_too_large(
    step: Callable[[Tensor, Tensor], object], images: Tensor, labels: Tensor, batch: int, accumulate: int,
    processes: int, kept: str,
) -> MemoryExceededError:  # fmt: skip
    """Says which batch would fit a step that ran out of memory with this one, by trying.

    The steps are taken for good: what is in memory is lost, `kept` says what is on the disk.
    """
    text = f"a step with batch {batch} does not fit into the memory of {images.device}"
    if processes > 1:  # a step by one of them would wait for the others
        advice = f"start another run with --set accumulate={2 * accumulate}, or a smaller batch"
        return MemoryExceededError(f"{text}, cut among {processes} processes; {kept}; {advice}")
    most = largest_fitting(lambda n: step(images[:n], labels[:n]), below=len(labels))
    if most == 1:
        return MemoryExceededError(f"{text}, nor do 2 images; {kept}; use a smaller network")
    parts = math.ceil(batch * accumulate / most)
    return MemoryExceededError(
        f"{text}; measured: {most} images fit; {kept}; start another run with --set batch={most}, or with --set "
        f"accumulate={parts} (BatchNorm then sees one part of a batch at a time)"
    )


def evaluation_too_large(network: nn.Module, images: Tensor, kept: str) -> MemoryExceededError:
    """Says how many test images at a time would fit, by trying."""
    with torch.no_grad():
        most = largest_fitting(lambda n: network.eval()(images[:n]), below=len(images))
    return MemoryExceededError(
        f"{len(images)} test images at a time do not fit into the memory of {images.device}; measured: {most} fit; "
        f"{kept}; --resume --eval-batch {most} goes on"
    )


def largest_fitting(attempt: Callable[[int], object], below: int) -> int:
    """The largest n < below for which attempt(n) does not run out of memory, by bisection; 1 when not even 2 does.

    Not 1 itself: BatchNorm in training refuses a single value per channel.
    To be called outside of any `except` block, see `fits`.
    """
    release()
    most, fails = 1, below
    while fails - most > 1:
        middle = (most + fails) // 2
        if fits(partial(attempt, middle)):
            most = middle
        else:
            fails = middle
        release()
    return most


def release() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
