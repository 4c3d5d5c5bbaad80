"""Standard output is for results alone: what a user's network prints while it runs goes to standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

_kept: TextIO | None = None


def results() -> TextIO:
    """Where results are written: standard output, also while everybody else's goes elsewhere."""
    return _kept or sys.stdout


@contextlib.contextmanager
def for_results_alone() -> Iterator[None]:
    """Meanwhile only what is written to `results()` reaches standard output."""
    global _kept
    before, _kept = _kept, results()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _kept = before
