"""A function of tensors as one CUDA graph: its kernels start together, without Python between them.

What the function reads besides its inputs (weights, learning rate, t, k, τ) has to stay where it is and be changed in
place; what the host decides inside it is decided once, when it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repbnn_cli.errors import UsageError

WARM_UP = 3
Run = Callable[[], Any]


class Captured:
    """Calls `function` with tensors of the first call's shapes by replaying a recording of it; others as it is.

    The first calls run it as it is, aside, so that everything that is made once (an optimiser's state, a compiled
    kernel, a library's workspace) is there when it is recorded. Every call counts: none is computed twice. An output is
    a tensor that the next call overwrites. graphs: how to run aside and to record; another one in tests.
    """

    def __init__(self, function: Callable[..., Any], graphs: CudaGraphs | None = None) -> None:
        self._function, self._graphs = function, graphs or CudaGraphs()
        self._inputs: list[Tensor] = []
        self._calls = 0
        self._replay: Run | None = None
        self._output: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        if not self._inputs:
            self._inputs = [torch.empty_like(tensor) for tensor in inputs]
        if any(own.shape != given.shape for own, given in zip(self._inputs, inputs, strict=True)):
            return self._function(*inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        if self._calls < WARM_UP:
            self._calls += 1
            return self._graphs.aside(self._run)
        if self._replay is None:
            self._replay, self._output = self._graphs.record(self._run)
        self._replay()
        return self._output

    def _run(self) -> Any:
        return self._function(*self._inputs)


class CudaGraphs:
    """Records on a GPU."""

    def aside(self, run: Run) -> Any:
        """Runs on a stream of its own, as libraries want it before a recording, in order with all other work."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            output = run()
        current.wait_stream(side)
        return output

    def record(self, run: Run) -> tuple[Run, Any]:
        """Records without computing: what replays it, and the output that a replay fills."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Thread-local: a thread that pins images for the next batch is no part of the recording.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise UsageError(
                f"the step cannot be recorded as a CUDA graph ({first}); the network asks the device for a value, "
                "perhaps; --no-cuda-graph runs it operation by operation"
            ) from error
        return graph.replay, output
