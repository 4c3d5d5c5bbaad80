"""How messages say things that many of them say."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Sequence
from pathlib import Path


def some(items: Sequence[object], most: int = 3, separator: str = ", ") -> str:
    """The first few, and how many more: `a, b, c and 4 more`."""
    return separator.join(map(str, items[:most])) + (f" and {len(items) - most} more" if items[most:] else "")


def counted(count: int, what: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count:,} {what}" + "s" * (count != 1)


def nearest_file(path: Path, ending: str = "") -> str:
    """What follows "no such file": the file in that folder that may be meant, of those with this ending."""
    with contextlib.suppress(OSError, ValueError):
        names = [entry.name for entry in os.scandir(path.parent) if entry.is_file() and entry.name.endswith(ending)]
        close = difflib.get_close_matches(path.name, names, n=1)
        if close:
            return f"; did you mean {path.parent / close[0]}?"
    return "; check the path"
