"""A training step of a RepBNN on one CPU thread: with and without matrix products for few, often repeated channels.

    OMP_NUM_THREADS=1 python benchmarks/rep_step.py [--betas 2 4 8] [--rounds 5] [--batch 128]

IR-Net's ResNet-20, compiled, 8-bit convolutions, as `repbnn finetune` runs it. "before": a BatchNorm over a repeat as
torch.compile writes it, gradients of kernels by oneDNN; "now": both by matrix products where the backend says so;
"source": the untransformed network, whose convolutions cost as many multiply-accumulates. The gradients of both sides
are compared in float64 before anything is timed. All sides in one process, in turns; a time is the median of the
process's own seconds, a ratio the median of the rounds' ratios, with its quartiles.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch import nn
from train_step import LASTING, Call, gradients, mid_schedule, spent, training_step

from repbnn_cli import graph, rules, surgery, zoo
from repbnn_cli.kernels import int8_conv2d
from repbnn_cli.kernels.matmul_batch_norm import rep_batch_norm
from repbnn_cli.train import backends, memory
from repbnn_cli.train.compiled import float_masks
from repbnn_cli.train.ranks import Ranks


def rep_network(beta: int) -> nn.Module:
    source = zoo.build("irnet_resnet20")
    captured = graph.capture(source.eval(), (3, 32, 32))
    return mid_schedule(surgery.apply(surgery.plan(captured, rules.load("reptran").with_options(beta=beta))))


def step_of(network: nn.Module, batch: int, *, products: bool) -> Call:
    """A compiled step; compiled here, for what the network runs on is decided while it is traced."""
    network = copy.deepcopy(network).train().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with nullcontext() if products else patch.object(backends, "repeating_norms", lambda *_: []):
        LASTING.enter_context(backends.running_on(network, "int8", Ranks()))
    inner = training_step(torch.compile(network, dynamic=False), network, x, torch.arange(batch) % 10)
    few = int8_conv2d._FEW if products else 0

    def step() -> None:
        with patch.object(int8_conv2d, "_FEW", few):  # the compiled code is for this value alone
            inner()

    with float_masks():
        step()
    return step


def worst_difference(network: nn.Module) -> float:
    """Between the gradients of a step in float64 with and without products, eager: the largest, relative."""
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    plain, ours = (copy.deepcopy(network).double().train() for _ in range(2))
    norms = backends.repeating_norms(ours, "int8", Ranks())
    for norm in norms:
        norm.by_batch = rep_batch_norm
    wanted, found = (gradients(side, side, x, y) for side in (plain, ours))
    floor = 1e-3 * torch.stack([gradient.norm() for gradient in wanted]).norm()
    pairs = zip(wanted, found, strict=True)
    return max(float((own - true).norm() / true.norm().clamp_min(floor)) for true, own in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    memory.keep_freed(torch.device("cpu"))
    print(f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread, batch {args.batch}")
    for beta in args.betas:
        torch._dynamo.reset()
        network = rep_network(beta)
        difference = worst_difference(network)
        if difference > 1e-10:
            print(f"beta {beta}: gradients differ by {difference:.1e} in float64", file=sys.stderr)
            return 1
        norms = len(backends.repeating_norms(network, "int8", Ranks()))
        sides = {
            "source": step_of(mid_schedule(zoo.build("irnet_resnet20")), args.batch, products=False),
            "before": step_of(network, args.batch, products=False),
            "now": step_of(network, args.batch, products=True),
        }
        rounds = [{name: spent(step) for name, step in sides.items()} for _ in range(args.rounds)]
        print(f"beta {beta}: {norms} BatchNorms by matrix products; gradients in float64 differ by {difference:.1e}")
        for name in sides:
            ratios = [each["before"] / each[name] for each in rounds]
            low, _, high = statistics.quantiles(ratios, n=4)
            seconds = statistics.median(each[name] for each in rounds)
            print(f"  {name:<8}{seconds:>7.2f} s {args.batch / seconds:>7.1f} images/s "
                  f"{statistics.median(ratios):>6.2f}×  ({low:.2f} to {high:.2f})", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
