"""How long an epoch of CIFAR-10 ResNet-20 takes on a GPU, β = 1 and 2, one run and several that share it, in one call.

    python benchmarks/gpu_epoch.py [--arch irnet_resnet20] [--epochs 12] [--runs 4] [--data cifar10:DIR]
        [--backend torch]

Targets on an H200: 0.3 s (β = 1) and 0.4 s (β = 2) per epoch at the recipe's batch size. Training is that of `repbnn
finetune` by the network's default recipe: data set on the device, the step compiled and the whole of it in one CUDA
graph. The first three epochs (warm-up, recording) are not counted, the median of the others is. Seconds are those of an
epoch's steps; "all" adds what lies between epochs (evaluation, metrics, states). "eager" is the same step without graph
and compiler, "graph" without the compiler, in the same process. Several runs are as many processes at once; their
images/s are added up. Without --data: noise of CIFAR-10's size, which costs the same. Where PyTorch sees no GPU it says
so, measures nothing and exits with 3; --device cpu --images 256 only tries the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from torch import nn

from repbnn_cli import rules, runs, source, surgery, zoo
from repbnn_cli.data import Dataset, Split, load
from repbnn_cli.data.splits import fingerprint_of
from repbnn_cli.train import engine, recipes

TARGETS = {1: 0.3, 2: 0.4}
WARM = 3


def network_of(arch: str, beta: int) -> nn.Module:
    torch.manual_seed(0)
    plain = zoo.build(arch)
    if beta == 1:
        return plain
    origin = source.Origin(arch, None, {}, None, (zoo.ARCHS[arch].input_shape,))
    rule_set = rules.load("reptran").with_options(beta, None, None)
    return surgery.apply(surgery.plan(source.capture(plain.eval(), origin), rule_set)).train()


def noise(images: int) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    parts = [
        Split(torch.randint(0, 256, (n, 3, 32, 32), generator=draw).to(torch.uint8), torch.arange(n) % 10)
        for n in (images, images // 5)
    ]
    return Dataset("cifar10", *parts, tuple("0123456789"), fingerprint_of(*parts), "noise")


def measure(args: argparse.Namespace, beta: int, *, graph: bool, compiled: bool) -> dict[str, float]:
    """Median seconds of an epoch's steps, of a whole epoch, and images/s, of one run of the engine."""
    origin = source.Origin(args.arch, None, {}, None, (zoo.ARCHS[args.arch].input_shape,))
    dataset = load(args.data) if args.data else noise(args.images)
    compile_mode = "on" if compiled else "off"
    options = engine.Options(cuda_graph=graph, compile=compile_mode, save_seconds=10, backend=args.backend)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        engine.finetune(
            network_of(args.arch, beta), dataset, recipes.for_network(origin), folder, epochs=args.epochs,
            device=args.device, options=options, on_epoch=lambda row: ends.append(time.perf_counter()),
        )  # fmt: skip
        timing = runs.read(folder).timing[WARM:]
    steps = statistics.median(row["seconds"] for row in timing)
    whole = statistics.median(later - sooner for sooner, later in zip(ends[WARM - 1 :], ends[WARM:], strict=False))
    return {"steps": steps, "all": whole, "images_per_s": statistics.median(row["images_per_s"] for row in timing)}


def together(args: argparse.Namespace, beta: int) -> dict[str, float]:
    """The same of `--runs` processes at once: the slowest one's seconds, all their images."""
    command = [sys.executable, __file__, "--arch", args.arch, "--epochs", str(args.epochs), "--device", args.device]
    command += ["--images", str(args.images), "--backend", args.backend, "--one", str(beta)]
    command += ["--data", args.data] if args.data else []
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(args.runs)]
    found = []
    for process in processes:
        text, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"one of {args.runs} runs ended with {process.returncode}")
        found.append(json.loads(text))
    return {
        "steps": max(f["steps"] for f in found),
        "all": max(f["all"] for f in found),
        "images_per_s": sum(f["images_per_s"] for f in found),
    }


def show(label: str, found: dict[str, Any], note: str = "") -> None:
    speed = f"{found['images_per_s']:>9,.0f} images/s"
    print(f"{label:<24} {found['steps']:>7.3f} s  all {found['all']:>7.3f} s  {speed}  {note}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="irnet_resnet20")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--data")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="torch", choices=("torch", "triton"))
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.epochs <= WARM:
        parser.error(f"--epochs {args.epochs}: the first {WARM} do not count; expected more")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"no GPU: PyTorch {torch.__version__} sees none here, nothing was measured", file=sys.stderr)
        return 3
    if args.one:
        print(json.dumps(measure(args, args.one, graph=True, compiled=True)))
        return 0
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU, no figures of a GPU"
    print(f"{args.arch}, {args.data or 'noise'}; {name}; backend {args.backend}; PyTorch {torch.__version__}; "
          f"median of epochs {WARM + 1} to {args.epochs}")  # fmt: skip
    missed = False
    for beta, target in TARGETS.items():
        eager = measure(args, beta, graph=False, compiled=False)
        graph = measure(args, beta, graph=True, compiled=False)
        both = measure(args, beta, graph=True, compiled=True)
        missed |= both["steps"] > target
        show(f"β = {beta}, eager", eager)
        show(f"β = {beta}, graph", graph, f"{eager['steps'] / graph['steps']:.2f}× eager")
        ratio = f"{eager['steps'] / both['steps']:.2f}× eager; target on an H200 {target} s"
        show(f"β = {beta}, graph, compiled", both, ratio)
        show(f"β = {beta}, {args.runs} runs", together(args, beta))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
