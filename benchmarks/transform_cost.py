"""What `repbnn transform` costs beyond `import torch`, in time and memory, on AdamBNN's ReActNet-A (29 M parameters).

    python benchmarks/transform_cost.py [--runs 5] [--arch adambnn_reactnet_a]

Both commands run as processes of their own, in turn. Prints, per run and as a median: seconds of the transform minus
seconds of `import torch` (target: below 1.5), and peak memory of the transform minus that of `import torch`, over the
size of the checkpoint (target: below 3).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from repbnn_cli import zoo


def measure(command: list[str], cwd: str) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {message}")
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--arch", default="adambnn_reactnet_a")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{options.arch}.pth.tar"
        torch.manual_seed(0)
        torch.save({"state_dict": zoo.build(options.arch).state_dict()}, path)
        size = path.stat().st_size
        transform = [sys.executable, "-m", "repbnn_cli", "transform", str(path), "--arch", options.arch, "--force"]
        baseline = [sys.executable, "-c", "import torch"]
        seconds, memory = [], []
        for run in range(options.runs + 1):
            base, whole = measure(baseline, folder), measure(transform, folder)
            if run == 0:
                continue  # the first pair fills the file cache
            seconds.append(whole[0] - base[0])
            memory.append((whole[1] - base[1]) / size)
            print(f"run {run}: {seconds[-1]:.2f} s beyond import torch, {memory[-1]:.2f} × the checkpoint's size")
        print(
            f"{options.arch}, checkpoint {size / 1e6:.0f} MB, torch {torch.__version__}, {platform.machine()}, "
            f"{os.cpu_count()} cores, n = {options.runs}: median {statistics.median(seconds):.2f} s "
            f"({min(seconds):.2f}–{max(seconds):.2f}), {statistics.median(memory):.2f} × the checkpoint's size"
        )


if __name__ == "__main__":
    main()
