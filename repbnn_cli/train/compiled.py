"""torch.compile for the network of a training step: where it pays, and whether it works, which is tried before a run.

Compiled, a sign with its estimator, a BatchNorm and an activation are one pass over memory instead of ten, forward and
backward. Compiling takes a minute on a CPU, so short runs do without it. Whether a run is compiled is a function of its
arguments alone: a resumed run decides as it did at its beginning, and ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repbnn_cli.errors import UsageError
from repbnn_cli.train import memory
from repbnn_cli.train.feeds import Feed
from repbnn_cli.train.measure import logits_of
from repbnn_cli.train.recipes import Recipe

MODES = ("auto", "on", "off")
WORTH = {"cpu": 2e8, "cuda": 6e9}
"""Pixels (images × height × width, over all epochs) from which compiling pays: 4 and 120 epochs of CIFAR-10."""


TALK = "BatchNorms of several processes talk to each other within the forward"


@dataclass(frozen=True)
class Forward:
    """What a training step calls for the network's output. note: for the user, whether it is compiled and why not."""

    call: Callable[[Tensor], object]
    compiled: bool
    note: str


def forward_of(network: nn.Module, mode: str, feed: Feed, recipe: Recipe, processes: int = 1) -> Forward:
    """The network, compiled if `mode` ("auto", "on", "off") and the run want it; the network is left as it was.

    processes: how many compute a step together. Raises UsageError for "on" where it cannot be compiled.
    """
    if mode not in MODES:
        raise UsageError(f"--compile: unknown value '{mode}'; expected one of {', '.join(MODES)}")
    batch = recipe.header.batch
    epochs = sum(stage.length(len(feed.train)) for stage in recipe.stages)
    images = feed.example[:1].expand(batch // recipe.stages[0].accumulate // processes, -1, -1, -1)
    reason = _against(mode, images, epochs * len(feed.train) * batch, processes)
    if reason is None:
        # Shapes as they are: a step's never change but for the last batch of a folder, which compiles once more.
        compiled = torch.compile(network, dynamic=False)
        reason = _failure(network, compiled, images.clone(memory_format=torch.preserve_format))
        if reason is None:
            return Forward(compiled, True, "training step compiled by torch.compile")
        if mode == "on":
            raise UsageError(f"--compile on: the network cannot be compiled here: {reason}; --compile off does without")
    return Forward(network, False, f"training step not compiled: {reason}")


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


def _failure(network: nn.Module, compiled: Callable[[Tensor], object], example: Tensor) -> str | None:
    """Why one forward and backward of `compiled` fail, in a line, or None; leaves no trace on the network."""
    buffers = [tensor.clone() for tensor in network.buffers()]
    training = network.training
    with torch.random.fork_rng([example.device] if example.device.type == "cuda" else []):
        try:
            network.train()
            logits_of(compiled(example)).square().mean().backward()
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
