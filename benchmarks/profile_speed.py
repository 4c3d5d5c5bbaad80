"""How long `repbnn profile` takes beside fvcore's counter, on AdamBNN ReActNet-A, both in this process; target ≤ 1/5.

    python benchmarks/profile_speed.py [--arch adambnn_reactnet_a] [--repeats 5]

Ours: shape-only capture, recognition, profile. fvcore's: FlopCountAnalysis(model, input).total(), batch 1. The model is
built before either clock starts; each side runs once to warm up; the best of the repeats counts. Prints ours, fvcore's,
their ratio and the versions. Exit code 1 when the ratio is above the target.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import time
from collections.abc import Callable

import fvcore
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from repbnn_cli import profiler, zoo
from repbnn_cli.graph import capture
from repbnn_cli.recognize import recognize

TARGET = 1 / 5


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after one that is not timed."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def ours(model: nn.Module, shape: tuple[int, ...]) -> profiler.Profile:
    network = capture(model, shape, shapes_only=True)
    return profiler.profile(network, recognize(network))


def theirs(model: nn.Module, shape: tuple[int, ...]) -> float:
    analysis = FlopCountAnalysis(model, torch.zeros(1, *shape))
    return float(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="adambnn_reactnet_a", choices=list(zoo.ARCHS))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    arch = zoo.ARCHS[options.arch]
    model = arch.builder(arch.num_classes).eval()
    mine = best(lambda: ours(model, arch.input_shape), options.repeats)
    other = best(lambda: theirs(model, arch.input_shape), options.repeats)
    ratio = mine / other
    print(f"repbnn  {mine:8.3f} s")
    print(f"fvcore  {other:8.3f} s")
    print(f"ratio   {ratio:8.3f}   target ≤ {TARGET:.3f}   {'ok' if ratio <= TARGET else 'MISSED'}")
    print(f"{arch.name}, best of {options.repeats}, 1 thread, {platform.machine()}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, fvcore {fvcore.__version__}")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
