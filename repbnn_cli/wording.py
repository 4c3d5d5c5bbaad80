"""How messages say things that many of them say."""

from __future__ import annotations

from collections.abc import Sequence


def some(items: Sequence[object], most: int = 3, separator: str = ", ") -> str:
    """The first few, and how many more: `a, b, c and 4 more`."""
    return separator.join(map(str, items[:most])) + (f" and {len(items) - most} more" if items[most:] else "")
