"""The generators that a network's own code may draw from: torch's, Python's and NumPy's."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_PYTHON, _NUMPY = 625, 624  # words in the states of the two Mersenne twisters; Python's includes its position


def seed(number: int) -> None:
    """Seeds all of them, torch's on every device."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


@contextlib.contextmanager
def kept(devices: Sequence[int | torch.device] = ()) -> Iterator[None]:
    """Leaves all of them as they were; devices: the GPUs whose generators count."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def seeded(number: int) -> Iterator[None]:
    """Seeds all of them for a while, and leaves them as they were."""
    with kept():
        seed(number)
        yield


def states() -> Tensor:
    """The states of Python's and NumPy's generators as numbers, (1253,) in float64: for a file without code in it."""
    _, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    python = [*words, math.nan if gauss is None else gauss]
    own = [*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]]
    return torch.tensor(python + own, dtype=torch.float64)


def set_states(numbers: Tensor) -> None:
    """What `states` gave is what they go on from."""
    values = numbers.tolist()
    words, gauss, own = values[:_PYTHON], values[_PYTHON], values[_PYTHON + 1 :]
    random.setstate((3, tuple(int(n) for n in words), None if math.isnan(gauss) else gauss))
    key, (position, has_gauss, cached) = np.array(own[:_NUMPY], dtype=np.uint32), own[_NUMPY:]
    state = {"key": key, "pos": int(position)}
    np.random.set_state({"bit_generator": "MT19937", "state": state, "has_gauss": int(has_gauss), "gauss": cached})
