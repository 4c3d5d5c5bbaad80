"""Time per batch of several networks that take turns, so that whatever else the machine does hits all of them alike.

A sample is `inner` forwards in a row, as many as take about `SAMPLE_SECONDS`, divided by their number; each network
gets `WARM_UP` forwards before its first one. On a GPU the clock is CUDA's events around the same forwards. Inputs are
random and on the device already.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repbnn_cli.graph import random_inputs

WARM_UP = 3
SAMPLE_SECONDS = 0.02
ROUNDS = (5, 50)  # at least and at most, within the budget


@dataclass(frozen=True)
class Timing:
    """Seconds per batch of one network: one value per round, each the mean of `inner` forwards."""

    name: str
    batch: int
    seconds: tuple[float, ...]
    inner: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Distance between the quartiles."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low

    @property
    def images_per_s(self) -> float:
        return self.batch / self.median


@torch.inference_mode()
def measure(
    networks: Mapping[str, nn.Module],
    input_shapes: Sequence[Sequence[int]],
    batches: Sequence[int],
    device: torch.device,
    *,
    budget: float = 10.0,
) -> list[Timing]:
    """Timings per batch size, networks in their order. budget: seconds to spend on each batch size, about."""
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    timings: list[Timing] = []
    for batch in batches:
        first = next(iter(networks.values()))
        inputs = [x.to(device) for x in random_inputs(first, [(batch, *shape) for shape in input_shapes], seed=0)]
        inner = {name: _inner(network, inputs, clock) for name, network in networks.items()}
        samples: dict[str, list[float]] = {name: [] for name in networks}
        started = time.perf_counter()
        while len(next(iter(samples.values()))) < ROUNDS[1]:
            if len(next(iter(samples.values()))) >= ROUNDS[0] and time.perf_counter() - started > budget:
                break
            for name, network in networks.items():
                samples[name].append(clock(network, inputs, inner[name]) / inner[name])
        timings += [Timing(name, batch, tuple(samples[name]), inner[name]) for name in networks]
    return timings


_Clock = Callable[[nn.Module, Sequence[Tensor], int], float]


def _inner(network: nn.Module, inputs: Sequence[Tensor], clock: _Clock) -> int:
    """Forwards per sample, after the warm-up."""
    clock(network, inputs, WARM_UP)
    return max(1, round(SAMPLE_SECONDS / max(clock(network, inputs, 1), 1e-9)))


def _cpu_seconds(network: nn.Module, inputs: Sequence[Tensor], forwards: int) -> float:
    started = time.perf_counter()
    for _ in range(forwards):
        network(*inputs)
    return time.perf_counter() - started


def _cuda_seconds(network: nn.Module, inputs: Sequence[Tensor], forwards: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(forwards):
        network(*inputs)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
