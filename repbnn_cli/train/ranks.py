"""The processes of a run: one alone, or several started by torchrun that act as one.

Several give what one gives with the same global batch, up to the order of sums: `Sharding` cuts every batch among them,
gradients are averaged over them, BatchNorm takes its statistics over the whole batch (`norms`), and test images are
counted together. Random numbers of the forward (dropout) differ from rank to rank. Rank 0 alone writes and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from repbnn_cli.errors import RepbnnError, UsageError

T = TypeVar("T")


class Ranks:
    """This process, rank `rank` of `size`; by default alone. What communicates is to be called by all of them."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks; the tensor itself is left as it is."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, stacked in their order."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Every gradient becomes its mean over the ranks, which all end with the same bits.

        One collective after the backward, not many during it: these networks have few weights, a step may consist of
        several backwards, and the forward may be anything (compiled, or foreign code), without a wrapper around it.
        """
        if self.size == 1 or not parameters:
            return
        # Not every rank has every gradient: a forward may leave a layer out by chance. What none has stays None.
        missing = [p.grad is None for p in parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        known = gradients[0].new_tensor([not m for m in missing])
        flat = torch.cat([known, *(g.reshape(-1) for g in gradients)])
        dist.all_reduce(flat)
        flat /= self.size
        known, *means = flat.split([len(gradients), *(g.numel() for g in gradients)])
        for parameter, gradient, mean in zip(parameters, gradients, means, strict=True):
            parameter.grad = gradient.copy_(mean.view(gradient.shape))
        for parameter, ranks, absent in zip(parameters, known, missing, strict=True):
            if absent and not ranks:  # to read it is to wait for a GPU: only where this rank had none
                parameter.grad = None

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers: how they agree on stopping."""
        if self.size == 1:
            return number
        agreed = torch.tensor(number)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)

    def on_first(self, act: Callable[[], T]) -> T:
        """What rank 0 gets from `act`, on every rank; an error of ours that it meets is raised on every rank."""
        if self.size == 1:
            return act()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = act()
            except RepbnnError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The body runs on rank 0 and then, even if it failed, on the others, which find what it put into a cache."""
        if self.size > 1 and not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.first:
                dist.barrier()


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun's environment describes, and this one's device: `cuda` becomes the GPU of its number.

    gloo for tensors on the CPU, nccl for those on a GPU.
    """
    if launched() == 1:
        yield Ranks(), device
        return
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise UsageError(f"rank {local} of this machine: there are only {count} GPUs; use --nproc-per-node {count}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
