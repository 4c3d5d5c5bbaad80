"""Times the sides of a comparison on a GPU, interleaved, L2-cold, without launch overhead; and the card's ceilings.

A side is called once per buffer set, enough sets that no call finds its data in L2. Those calls are recorded as one
CUDA graph, whose replays are timed with events: what is measured is the card, not Python. Replays of all sides take
turns, so that clocks and temperature do to all of them what they do to one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch._dynamo

T = TypeVar("T")
Call = Callable[[], object]
COMPILED = "torch.compile bf16"  # the side that targets are set against


@dataclass(frozen=True)
class Row:
    """One line of the table. moved: bytes that the first side has to read and write.

    sides: name → makes, for one set of fresh buffers, the call to time. The first side is the kernel under test.
    check: raises AssertionError where it is not what the reference computes, on fresh random inputs.
    faster: how much faster than COMPILED the first side is to be. kept: side → counts the bytes that a forward saves
    for its backward; less_kept: how much less than COMPILED the first side is to keep.
    """

    name: str
    moved: int
    sides: Mapping[str, Callable[[], Call]]
    check: Callable[[], None]
    faster: float | None = None
    kept: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    less_kept: float | None = None


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median of `replays` replays, and the distance between the quartiles."""

    median: float
    spread: float
    replays: int


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """torch.compile for one shape after the other. By itself it gives up after eight, says so in a log and goes on
    eagerly; with fullgraph=True it raises instead, should the limit ever be too low."""
    torch._dynamo.config.recompile_limit = 256
    made: Callable[..., T] = torch.compile(function, dynamic=False, fullgraph=True)
    return made


def time_row(row: Row, replays: int) -> dict[str, Timing]:
    """Timings of all sides."""
    sets = buffer_sets(row.moved)
    graphs = {name: _recorded([make() for _ in range(sets)]) for name, make in row.sides.items()}
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(replays):
        for name, graph in graphs.items():
            taken[name].append(_elapsed(graph.replay) / sets)
    return {name: _timing(times) for name, times in taken.items()}


def buffer_sets(moved: int) -> int:
    """Sets of buffers that together are twice the L2 cache, 2 at least and 64 at most."""
    cache: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(64, max(2, -(-2 * cache // moved)))


def ceilings(replays: int) -> dict[str, float]:
    """What the card does at best, in this process: a copy in TB/s, a bf16 matrix product in TFLOP/s."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    copy, product = _recorded([lambda: target.copy_(source)]), _recorded([lambda: a @ b])
    copying = statistics.median(_elapsed(copy.replay) for _ in range(replays))
    multiplying = statistics.median(_elapsed(product.replay) for _ in range(replays))
    return {"copy_tb_s": 2 * source.numel() / copying / 1e6, "bf16_tflop_s": 2 * 8192**3 / multiplying / 1e6}


def _recorded(calls: list[Call]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls * 2:  # compiles, picks algorithms, fills caches
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph


def _elapsed(run: Callable[[], object]) -> float:
    """Microseconds on the card."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000


def _timing(times: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(times, n=4)
    return Timing(middle, high - low, len(times))
