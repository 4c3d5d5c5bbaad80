"""Our Triton kernels beside eager and compiled torch on one GPU: checks every row, times it, prints one table last.

    python benchmarks/kernels.py [--only TEXT] [--batch 256] [--replays 50] [--json]
    TRITON_INTERPRET=1 python benchmarks/kernels.py --check [--only TEXT]   # no GPU: the checks alone, on small images

Microseconds are medians over the replays, ± half the distance between the quartiles; × is how many times longer the
other side takes; TB/s is what has to move divided by the time, beside the copy ceiling measured in the same call. Exit
codes: 3 without a GPU, 4 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys

import fused_rows
import torch
import triton
from kernel_timing import Row, Timing, ceilings, time_row

from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import choose


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="check against the reference; time nothing")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        choose(device, "triton")
    except UsageError as error:
        print(f"kernels.py: {error}", file=sys.stderr)
        return 3
    if device.type == "cpu" and not options.check:
        print("kernels.py: no CUDA GPU is visible, nothing is timed; --check runs the checks alone", file=sys.stderr)
        return 3
    rows = fused_rows.rows(options.batch, device, check_on=None if device.type == "cuda" else 5)
    chosen = [row for row in rows if options.only in row.name]
    if not chosen:
        print(f"kernels.py: no row's name holds '{options.only}'", file=sys.stderr)
        return 2
    failed = [row.name for row in chosen if not _passes(row)]
    if failed:
        return 4
    if options.check:
        return 0
    best = ceilings(options.replays)
    results = {row.name: (row, time_row(row, options.replays)) for row in chosen}
    print(_json(best, results) if options.json else _table(best, results))
    return 0


def _passes(row: Row) -> bool:
    try:
        row.check()
    except AssertionError as error:
        print(f"FAILED {row.name}: {error}", file=sys.stderr)
        return False
    print(f"ok     {row.name}", file=sys.stderr)
    return True


Results = dict[str, tuple[Row, dict[str, Timing]]]


def _table(best: dict[str, float], results: Results) -> str:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    lines = [
        f"{properties.name}, torch {torch.__version__}, Triton {triton.__version__}; this card copies "
        f"{best['copy_tb_s']:.2f} TB/s and multiplies bf16 at {best['bf16_tflop_s']:.0f} TFLOP/s"
    ]
    for name, (row, timings) in results.items():
        (ours, mine), *others = timings.items()
        slower = "".join(f"  {other} {timing.median / mine.median:5.2f}×" for other, timing in others)
        speed = f"{mine.median:7.1f} ± {mine.spread / 2:4.1f} µs {row.moved / mine.median / 1e6:5.2f} TB/s"
        lines.append(f"{name:<40} {ours} {speed}{slower}")
    return "\n".join(lines)


def _json(best: dict[str, float], results: Results) -> str:
    measured = {name: {side: vars(t) for side, t in timings.items()} for name, (_, timings) in results.items()}
    versions = {"torch": torch.__version__, "triton": triton.__version__, "device": torch.cuda.get_device_name()}
    return json.dumps({"versions": versions, "ceilings": best, "microseconds": measured}, indent=1)


if __name__ == "__main__":
    sys.exit(main())
