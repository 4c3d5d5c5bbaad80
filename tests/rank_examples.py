"""What test_ranks.py lets two processes do: `torchrun ... rank_examples.py FOLDER TASK`; alone it is one process."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_examples import Tiny, recipe, toy

from repbnn_cli.errors import RepbnnError
from repbnn_cli.rep_layers import RepBatchNorm2d
from repbnn_cli.runs import Progress
from repbnn_cli.train import engine
from repbnn_cli.train.inheritance import Preparation
from repbnn_cli.train.norms import synchronised
from repbnn_cli.train.ranks import Ranks, joined


class Exact(nn.Module):
    """The tiny network in float64, in which the order of sums decides on no sign."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tiny = Tiny()
        self.tiny.drop.p = dropout
        self.tiny.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.tiny(x.double())


NORMS = {
    "plain": lambda: nn.BatchNorm2d(4),
    "rep": lambda: RepBatchNorm2d(16, repeats=4),
    "vectors": lambda: nn.BatchNorm1d(4, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
}


def normalise(ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """Output, gradients and statistics of every kind of BatchNorm, of the whole batch; ranks have 3 and 5 samples."""
    found = {}
    for name, make in NORMS.items():
        torch.manual_seed(1)
        norm = make().double()
        for parameter in norm.parameters():
            parameter.data.uniform_(0.5, 2)
        shape = (8, 4) if name == "vectors" else (8, 4, 3, 2)
        whole = torch.randn(shape, dtype=torch.float64) * 3 + 1
        share = (slice(3), slice(3, 8))[ranks.rank] if ranks.size > 1 else slice(8)
        x = whole[share].clone().requires_grad_()
        with synchronised(norm, ranks):
            norm(x)
            y = norm(x)
            (
                y * torch.arange(y.shape[1], dtype=torch.float64).view(1, -1, *[1] * (y.dim() - 2))
            ).square().sum().backward()
        gradients = {n: ranks.sum(p.grad) for n, p in norm.named_parameters() if p.grad is not None}
        eval_forward = norm.eval()(whole)
        found[name] = {
            "y": y.detach(),
            "x.grad": x.grad,
            "eval": eval_forward.detach(),
            **gradients,
            **norm.state_dict(),
        }
    return found


def gradients(ranks: Ranks) -> list[Tensor | None]:
    """What four parameters have on average: each rank left another one out, and nobody used the last."""
    parameters = [nn.Parameter(torch.zeros(2, i + 1)) for i in range(4)]
    for i in (0, 1 + ranks.rank):
        parameters[i].grad = torch.full_like(parameters[i], 10.0 * i + ranks.rank)
    ranks.average_gradients(parameters)
    return [p.grad for p in parameters]


def train(
    ranks: Ranks,
    folder: Path,
    *,
    dropout: float = 0.0,
    at: tuple[int, int] = (0, 0),
    what: str = "",
    resume: bool = False,
) -> None:
    """A run of three epochs, with something happening to the last rank at an epoch and batch."""
    network = Exact(dropout)

    def interfere(p: Progress) -> None:
        if (p.epoch, p.batch) != at:
            return
        if what == "signal" and ranks.rank == ranks.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "nan" and ranks.rank == ranks.size - 1:
            network.tiny.fc.weight.data.fill_(math.nan)
        if what == "die" and ranks.rank == ranks.size - 1:
            raise OSError("a worker met something unexpected")

    engine.finetune(network, toy(), recipe("ema=0.9"), folder, ranks=ranks, on_step=interfere, prepare=Preparation(2),
                    resume=resume, options=engine.Options(log_every=1))  # fmt: skip
    torch.save(network.state_dict(), folder / f"weights-{ranks.rank}.pt")


def attempt(ranks: Ranks, folder: Path, what: str, **arguments: Any) -> None:
    """A run that is to be refused or stopped: says on which rank, with which exit code and message."""
    try:
        train(ranks, folder, what=what, **arguments)
    except RepbnnError as error:
        # In one write, whatever the buffering: the ranks share the stream.
        print(f"{what}|{ranks.rank}|{error.exit_code}|{error}\n", end="", flush=True)


def main() -> None:
    folder, task = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as (ranks, _):
        if task == "die":
            train(ranks, folder / "run", at=(2, 1), what="die")
        torch.save(normalise(ranks), folder / f"norms-{ranks.rank}.pt")
        torch.save(gradients(ranks), folder / f"gradients-{ranks.rank}.pt")
        train(ranks, folder / f"run-{ranks.size}")
        train(ranks, folder / "whole", dropout=0.2)
        attempt(ranks, folder / "stopped", "signal", dropout=0.2, at=(2, 2))
        train(ranks, folder / "stopped", dropout=0.2, resume=True)
        attempt(ranks, folder / "stopped", "second")
        attempt(ranks, folder / "nan", "nan", at=(2, 1))


if __name__ == "__main__":
    main()
