"""torch.compile for the network of a training step, or of an evaluation: where it pays, and whether it works.

Compiled, a sign with its estimator, a BatchNorm and an activation are one pass over memory instead of ten, forward and
backward. Compiling takes a minute on a CPU, so short runs do without it. Whether a run is compiled is a function of its
arguments alone: a resumed run decides as it did at its beginning, and ends with the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from repbnn_cli import seeds
from repbnn_cli.errors import UsageError
from repbnn_cli.logits import logits_of
from repbnn_cli.train import memory
from repbnn_cli.train.feeds import Feed
from repbnn_cli.train.recipes import Recipe

MODES = ("auto", "on", "off")
WORTH = {"cpu": 5e7, "cuda": 6e9}
"""Pixels (images × height × width, over all epochs) from which compiling pays: 1 and 120 epochs of CIFAR-10."""


TALK = "BatchNorms of several processes talk to each other within the forward"


@dataclass(frozen=True)
class Forward:
    """What to call for the network's output. note: for the user, whether it is compiled and why not."""

    call: Callable[[Tensor], object]
    compiled: bool
    note: str


def forward_of(network: nn.Module, mode: str, feed: Feed, recipe: Recipe, processes: int = 1) -> Forward:
    """Of a training step, if `mode` ("auto", "on", "off") and the run want it; the network is left as it was.

    processes: how many compute a step together. Raises UsageError for "on" where it cannot be compiled.
    """
    batch = recipe.header.batch
    epochs = sum(stage.length(len(feed.train)) for stage in recipe.stages)
    example = feed.example[:1].expand(batch // recipe.stages[0].accumulate // processes, -1, -1, -1)
    images = epochs * len(feed.train) * batch
    return _forward(network, mode, example, images, processes=processes, train=True)


def inference_of(network: nn.Module, mode: str, example: Tensor, images: int) -> Forward:
    """Of an evaluation of so many images, in batches like example; a batch of another size is not compiled for."""
    found = _forward(network, mode, example, images, processes=1, train=False)
    if not found.compiled:
        return found
    return replace(found, call=lambda x: found.call(x) if x.shape == example.shape else network(x))


def check_mode(mode: str) -> None:
    """Raises UsageError for a value that `--compile` has not."""
    if mode not in MODES:
        raise UsageError(f"--compile: unknown value '{mode}'; expected one of {', '.join(MODES)}")


def _forward(
    network: nn.Module, mode: str, example: Tensor, images: int, *, processes: int, train: bool
) -> Forward:  # fmt: skip
    check_mode(mode)
    what = "training step" if train else "network"
    reason = _against(mode, example, images, processes)
    if reason is None:
        # Shapes as they are: a step's never change but for the last batch of a folder, which compiles once more.
        compiled = torch.compile(network, dynamic=False)
        whole = example.clone(memory_format=torch.preserve_format)
        reason = _failure(network, compiled, whole, train=train)
        if reason is None:
            return Forward(compiled, True, f"{what} compiled by torch.compile")
        if mode == "on":
            raise UsageError(f"--compile on: the network cannot be compiled here: {reason}; --compile off does without")
    return Forward(network, False, f"{what} not compiled: {reason}")


def _against(mode: str, example: Tensor, images: int, processes: int) -> str | None:
    """Why not to compile, before anything is tried; None to go on."""
    if mode == "off":
        return "asked for"
    if processes > 1:
        if mode == "on":
            raise UsageError(f"--compile on: {TALK}; expected one process, or --compile off")
        return TALK
    kind = example.device.type
    if mode == "on":
        return None
    if kind not in WORTH:
        return f"never tried on {kind}; --compile on tries"
    if images * example[0, 0].numel() < WORTH[kind]:
        return "the run is too short to repay it; --compile on does it all the same"
    return None


@contextmanager
def float_masks() -> Iterator[None]:
    """While a CPU's step is compiled: hardtanh's gradient by a factor that is 0 or 1 instead of a mask.

    Where a mask is kept from the forward for the backward, it is stored as booleans, one after the other: ten times the
    time of the hardtanh itself.
    """
    from torch._inductor.decomposition import select_decomp_table

    def factor(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
        return grad * torch.minimum(x - low, high - x).clamp_min(0).sign()

    table, operator = select_decomp_table(), torch.ops.aten.hardtanh_backward.default
    before = table[operator]
    table[operator] = factor
    try:
        yield
    finally:
        table[operator] = before


def _failure(
    network: nn.Module, compiled: Callable[[Tensor], object], example: Tensor, *, train: bool
) -> str | None:  # fmt: skip
    """Why a forward of `compiled` (train: and a backward) fails, in a line, or None; leaves no trace on the network."""
    buffers = [tensor.clone() for tensor in network.buffers()]
    training = network.training
    with seeds.kept([example.device] if example.device.type == "cuda" else []):
        try:
            network.train(train)
            with float_masks() if example.device.type == "cpu" else nullcontext(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")  # torch about its own code
                with torch.set_grad_enabled(train):
                    logits = logits_of(compiled(example))
                if train:
                    logits.square().mean().backward()
        except Exception as error:  # whatever a compiler may raise: it is said, and the run goes on without
            if not memory.ran_out(error):  # the first step will meet that, too, and knows what to say
                text = str(error).strip()
                return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
        finally:
            network.zero_grad(set_to_none=True)
            network.train(training)
            with torch.no_grad():
                for own, before in zip(network.buffers(), buffers, strict=True):
                    own.copy_(before)
    return None
