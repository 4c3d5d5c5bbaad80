"""A training step of ResNet-20 on one CPU thread against straightforward eager code, and ReActNet-A's inference.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py [--rounds 9] [--only IR-Net] [--batch 128] [--json]

All sides of a row run in this process and take turns. "straightforward" is benchmarks/straightforward.py: the papers'
formulas, one operation a line, NCHW. "eager" and "compiled" are what `repbnn finetune --compile off` and `on` run
(channels_last, 8-bit convolution of signs), and `repbnn evaluate --backend int8`; "bf16" is `--gradients bf16` on top.
Before anything is timed the gradients of a step are compared in float64, all sides with one set of weights, and a
difference ends the run. "straightforward" runs as a script does, by glibc's defaults; our sides keep memory between
steps, as the commands do, and "straightforward, memory kept" tells how much of the ratio that alone is. A time is the
median of the process's own seconds (waiting for a busy machine is none of them), a ratio the median of the rounds'
ratios with its quartiles. Targets: IR-Net 1.9×, ReCU 2.2×, RBNN 1.9×, ReActNet-A 6×; exit code 1 where one is missed.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from straightforward import straightforward
from torch import Tensor, nn

from repbnn_cli import zoo
from repbnn_cli.binary_conv import BinaryConv2d
from repbnn_cli.kernels.int8_conv2d import sign_conv2d
from repbnn_cli.train import backends, memory
from repbnn_cli.train.compiled import float_masks

TRAINING = {
    "IR-Net": ("irnet_resnet20", 1.9),
    "ReCU": ("recu_resnet20", 2.2),
    "RBNN bireal": ("rbnn_resnet20_bireal", 1.9),
}
INFERENCE = {"ReActNet-A": ("reactnet_a", 6.0)}
STRAIGHTFORWARD, KEPT = "straightforward", "straightforward, memory kept"
Call = Callable[[], object]
LASTING = ExitStack()  # until the process ends: kernels laid out, and how the compiler writes a step


def mid_schedule(network: nn.Module) -> nn.Module:
    """t and k as in the middle of training, where estimators have gradients everywhere."""
    for module in network.modules():
        if isinstance(module, BinaryConv2d) and hasattr(module, "t"):
            module.t.fill_(1.0)
            module.k.fill_(1.0)
    return network


def with_eight_bits(network: nn.Module, gradients: torch.dtype = torch.float32) -> nn.Module:
    for module in network.modules():
        if isinstance(module, BinaryConv2d):
            module.conv_signs = partial(sign_conv2d, gradients=gradients)
    return network.to(memory_format=torch.channels_last)


def gradients(network: Callable[[Tensor], Tensor], parameters: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    parameters.zero_grad()
    F.cross_entropy(network(x), y).backward()
    return [p.grad.clone() for p in parameters.parameters()]


def worst_difference(base: nn.Module, size: int) -> float:
    """Of the gradients of a step in float64, straightforward against ours, eager and compiled: the largest one."""
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    y = torch.arange(4)
    plain, ours = straightforward(copy.deepcopy(base)).double().train(), copy.deepcopy(base).double().train()
    for module in plain.modules():  # tensors that are no buffers do not follow .double()
        for name in ("t", "k", "tau", "r1", "r2"):
            if isinstance(getattr(module, name, None), Tensor):
                setattr(module, name, getattr(module, name).double())
    wanted = dict(zip((n for n, _ in plain.named_parameters()), gradients(plain, plain, x, y), strict=True))
    worst = 0.0
    # A scale before a BatchNorm has no gradient but rounding; it is measured by what is a thousandth of all gradients.
    floor = 1e-3 * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for side in (ours, torch.compile(ours, dynamic=False)):
        found = dict(zip((n for n, _ in ours.named_parameters()), gradients(side, ours, x, y), strict=True))
        for name, true in wanted.items():
            own = found[name if name in found else f"{name}s"].reshape(true.shape)
            worst = max(worst, float((own - true).norm() / true.norm().clamp_min(floor)))
    return worst


def training_step(forward: Callable[[Tensor], Tensor], network: nn.Module, x: Tensor, y: Tensor) -> Call:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()

    return step


def inference(forward: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    def infer() -> Tensor:
        with torch.no_grad():
            return forward(x)

    return infer


def training_sides(base: nn.Module, batch: int) -> dict[str, Call]:
    x, y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    last = x.contiguous(memory_format=torch.channels_last)
    plain = straightforward(copy.deepcopy(base)).train()
    eager, compiled = (with_eight_bits(copy.deepcopy(base)).train() for _ in range(2))
    rounded = with_eight_bits(copy.deepcopy(base), torch.bfloat16).train()
    return {
        STRAIGHTFORWARD: training_step(plain, plain, x, y),
        "eager": training_step(eager, eager, last, y),
        "compiled": training_step(torch.compile(compiled, dynamic=False), compiled, last, y),
        "bf16": training_step(torch.compile(rounded, dynamic=False), rounded, last, y),
    }


def inference_sides(base: nn.Module, batch: int) -> dict[str, Call]:
    x = torch.randn(batch, 3, 224, 224)
    last = x.contiguous(memory_format=torch.channels_last)
    plain = straightforward(copy.deepcopy(base)).eval()
    eager, compiled = (copy.deepcopy(base).to(memory_format=torch.channels_last).eval() for _ in range(2))
    for network in (eager, compiled):
        LASTING.enter_context(backends.evaluating_in_8_bits(network))
    return {
        STRAIGHTFORWARD: inference(plain, x),
        "eager": inference(eager, last),
        "compiled": inference(torch.compile(compiled, dynamic=False), last),
    }


def largest_block(network: nn.Module, x: Tensor) -> int:
    """Bytes of the largest tensor that a module of the network gives."""
    found = [0]

    def seen(module: nn.Module, given: object, result: Tensor) -> None:
        found.append(result.nbytes)

    hooks = [module.register_forward_hook(seen) for module in network.modules()]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return max(found)


def give_back_freed(largest: int) -> None:
    """Undoes `memory.keep_freed`: the thresholds that glibc itself comes to in a process that frees such blocks."""
    library = ctypes.CDLL(None)
    for key, value in ((-1, 2 * largest), (-3, largest), (-4, 65536)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX
        library.mallopt(key, value)
    library.malloc_trim(0)


def spent(call: Call) -> float:
    """Of the process, of the second of two calls: the first one fills what is kept."""
    call()
    began = time.process_time()
    call()
    return time.process_time() - began


def timed(sides: dict[str, Call], rounds: int, largest: int) -> dict[str, list[float]]:
    """Process seconds of every side in each round; one round of each comes first and does not count."""
    found: dict[str, list[float]] = {name: [] for name in (STRAIGHTFORWARD, KEPT, *sides)}
    for _ in range(rounds + 1):
        give_back_freed(largest)
        found[STRAIGHTFORWARD].append(spent(sides[STRAIGHTFORWARD]))
        memory.keep_freed(torch.device("cpu"))
        found[KEPT].append(spent(sides[STRAIGHTFORWARD]))
        for name, call in sides.items():
            if name != STRAIGHTFORWARD:
                found[name].append(spent(call))
    return {name: values[1:] for name, values in found.items()}


def row_of(label: str, target: float, batch: int, found: dict[str, list[float]]) -> dict[str, Any]:
    base = found[STRAIGHTFORWARD]
    row: dict[str, Any] = {"row": label, "batch": batch, "target": target, "n": len(base), "sides": {}}
    for name, seconds in found.items():
        ratios = [b / s for b, s in zip(base, seconds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        row["sides"][name] = {"images_per_s": batch / statistics.median(seconds), "ratio": statistics.median(ratios),
                              "quartiles": [low, high]}  # fmt: skip
    row["reached"] = row["sides"]["compiled"]["ratio"]
    return row


def show(row: dict[str, Any]) -> None:
    print(f"{row['row']}, batch {row['batch']}, n = {row['n']}, target {row['target']}×")
    for name, side in row["sides"].items():
        low, high = side["quartiles"]
        print(f"  {name:<30}{side['images_per_s']:>8.1f} images/s {side['ratio']:>6.2f}×  ({low:.2f} to {high:.2f})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--batch", type=int, default=128, help="of the training rows; inference has 8")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.manual_seed(0)
    LASTING.enter_context(float_masks())
    if not args.json:
        print(
            f"PyTorch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread"
        )
    rows = []
    for label, (arch, target) in {**TRAINING, **INFERENCE}.items():
        if args.only and args.only.lower() not in label.lower():
            continue
        torch._dynamo.reset()  # a network of one class is compiled eight times at most, then runs as it is
        base = mid_schedule(zoo.build(arch))
        if label in TRAINING:
            difference = worst_difference(base, 32)
            if difference > 1e-10:
                print(f"{label}: gradients differ by {difference:.1e} in float64", file=sys.stderr)
                return 1
            sides, batch, size = training_sides(base, args.batch), args.batch, 32
        else:
            difference, sides, batch, size = None, inference_sides(base, 8), 8, 224
        largest = largest_block(copy.deepcopy(base), torch.randn(batch, 3, size, size))
        times = timed(sides, args.rounds, largest)
        row = {**row_of(label, target, batch, times), "float64_difference": difference}
        rows.append(row)
        if not args.json:
            show(row)
            if difference is not None:
                print(f"  gradients in float64 differ by at most {difference:.1e}", flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))
    return int(any(row["reached"] < row["target"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
