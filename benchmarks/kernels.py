"""Our Triton kernels beside eager and compiled torch on one GPU: checks every row, times it, prints one table last.

    python benchmarks/kernels.py [--only TEXT] [--batch 256] [--replays 50] [--json]
    TRITON_INTERPRET=1 python benchmarks/kernels.py --check [--only TEXT]   # no GPU: the checks alone, on small images
    TRITON_INTERPRET=1 python benchmarks/kernels.py --kept [--only TEXT]    # no GPU: kept memory alone, on small images

Two sorts of rows: blocks of inference (fused_rows.py), and norms of training, forward and backward (norm_rows.py).
Microseconds are medians over the replays, ± half the distance between the quartiles; × is how many times longer the
other side takes; TB/s is what has to move divided by the time, beside the copy ceiling measured in the same call; kept
is what a forward saves for its backward. ! marks a row that misses its target over torch.compile; the last lines count
them.
Exit codes: 3 without a GPU, 4 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import fused_rows
import norm_rows
import torch
import triton
from kernel_timing import COMPILED, Row, Timing, ceilings, time_row

from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import choose


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="check against the reference; time nothing")
    parser.add_argument("--kept", action="store_true", help="what training keeps for its backward; time nothing")
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
    if device.type == "cpu" and not (options.check or options.kept):
        print("kernels.py: no CUDA GPU is visible, nothing is timed; --check runs the checks alone", file=sys.stderr)
        return 3
    made = [
        rows(options.batch, device, None if device.type == "cuda" else 5) for rows in (fused_rows.rows, norm_rows.rows)
    ]
    chosen = [row for row in chain(*made) if options.only in row.name]
    if not chosen:
        print(f"kernels.py: no row's name holds '{options.only}'", file=sys.stderr)
        return 2
    if options.kept:
        print("\n".join(f"{row.name:<40}{kept_text(row, count_kept(row))}" for row in chosen if row.kept))
        return 0
    failed = [row.name for row in chosen if not _passes(row)]
    if failed:
        return 4
    if options.check:
        return 0
    best = ceilings(options.replays)
    results = [measured(row, options.replays) for row in chosen]
    print(_json(best, results) if options.json else _table(best, results, options))
    return 0


def _passes(row: Row) -> bool:
    try:
        row.check()
    except AssertionError as error:
        print(f"FAILED {row.name}: {error}", file=sys.stderr)
        return False
    print(f"ok     {row.name}", file=sys.stderr)
    return True


@dataclass(frozen=True)
class Result:
    """A row as it was measured: timings and kept bytes of its sides, the kernel under test first."""

    row: Row
    timings: Mapping[str, Timing]
    kept: Mapping[str, int]

    @property
    def faster(self) -> bool | None:
        """Whether it reaches its target over torch.compile; None where it has none."""
        return reached(self.row.faster, {name: timing.median for name, timing in self.timings.items()})

    @property
    def less_kept(self) -> bool | None:
        return reached(self.row.less_kept, self.kept)


def reached(target: float | None, found: Mapping[str, float]) -> bool | None:
    """Whether the first side needs so many times less than torch.compile."""
    return None if target is None else found[COMPILED] >= target * next(iter(found.values()))


def measured(row: Row, replays: int) -> Result:
    return Result(row, time_row(row, replays), count_kept(row))


def count_kept(row: Row) -> dict[str, int]:
    return {name: count() for name, count in row.kept.items()}


def _table(best: Mapping[str, float], results: list[Result], options: argparse.Namespace) -> str:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    lines = [
        f"{properties.name}, torch {torch.__version__}, Triton {triton.__version__}, batch {options.batch}, medians of "
        f"{options.replays} replays; this card copies {best['copy_tb_s']:.2f} TB/s and multiplies bf16 at "
        f"{best['bf16_tflop_s']:.0f} TFLOP/s"
    ]
    return "\n".join([*lines, *map(line, results), *_counts(results)])


def line(result: Result) -> str:
    """A row of the table."""
    (ours, mine), *others = result.timings.items()
    slower = "".join(f"  {other} {timing.median / mine.median:5.2f}×" for other, timing in others)
    speed = f"{mine.median:7.1f} ± {mine.spread / 2:4.1f} µs {result.row.moved / mine.median / 1e6:5.2f} TB/s"
    text = f"{result.row.name:<40} {ours} {speed}{slower}{_missed(result.faster)}"
    return text + kept_text(result.row, result.kept) if result.kept else text


def kept_text(row: Row, kept: Mapping[str, int]) -> str:
    (_, least), *others = kept.items()
    more = "".join(f"  {other} {count / least:5.2f}×" for other, count in others)
    return f"  kept {least / 1e6:.3f} MB{more}{_missed(reached(row.less_kept, kept))}"


def _missed(reached: bool | None) -> str:
    return " !" if reached is False else ""


def _counts(results: list[Result]) -> list[str]:
    """How many rows reach their targets."""
    lines = []
    for what, found in (("time", [r.faster for r in results]), ("kept memory", [r.less_kept for r in results])):
        with_target = [reached for reached in found if reached is not None]
        if with_target:
            lines.append(f"{what}: {sum(with_target)} of {len(with_target)} rows reach their target over torch.compile")
    return lines


def _json(best: Mapping[str, float], results: list[Result]) -> str:
    versions = {"torch": torch.__version__, "triton": triton.__version__, "device": torch.cuda.get_device_name()}
    rows = {
        r.row.name: {"microseconds": {side: vars(t) for side, t in r.timings.items()}, "kept_bytes": dict(r.kept),
                     "moved_bytes": r.row.moved, "target": r.row.faster, "target_reached": r.faster,
                     "kept_target": r.row.less_kept, "kept_target_reached": r.less_kept}
        for r in results
    }  # fmt: skip
    return json.dumps({"versions": versions, "ceilings": best, "rows": rows}, indent=1)


if __name__ == "__main__":
    sys.exit(main())
