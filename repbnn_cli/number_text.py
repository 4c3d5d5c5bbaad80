"""Numbers, shapes and paths as text, and text that is safe in Markdown; the same everywhere that figures are shown."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

from repbnn_cli.profiler import Change


def exact(value: int | float) -> str:
    """1,070,336; one decimal only where a value is not whole."""
    tenths = round(value, 1)
    return f"{int(tenths):,}" if float(tenths).is_integer() else f"{tenths:,.1f}"


def compact(value: int | float) -> str:
    """Three digits and a power of 1000: 442k, 1.07M, 40.1M."""
    rounded = float(f"{value:.3g}")
    if abs(rounded) < 1000:
        return f"{rounded:g}"
    magnitude = int(math.log10(abs(rounded)))
    power = min(magnitude // 3, 5)
    return f"{rounded / 1000**power:.{max(0, 2 - magnitude % 3)}f}{'kMGTP'[power - 1]}"


def signed(value: int | float) -> str:
    """+1,024,000, -320, 0."""
    return ("+" if value > 0 else "") + exact(value)


def percent(change: Change, *, short: bool = False) -> str:
    """+1.18 %, short +1.2%; "new" where there was nothing before."""
    if not change.delta:
        return "0"
    if change.ratio is None:
        return "new"
    more = 100 * (change.ratio - 1)
    return f"{more:+.1f}%" if short else f"{more:+.2f} %"


def shape_text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def compact_shape(text: str) -> str:
    """16×32×3×3 for "(16, 32, 3, 3)"."""
    return text.replace(", ", "×").replace("(", "").replace(")", "")


def shortened(text: str, width: int) -> str:
    """A path that is too long loses its middle."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


def markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A GitHub table; the first `left` columns are text, the others numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(cell(c) for c in line) + " |" for line in (headings, rule, *lines)) + "\n"


def cell(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def safe(text: str) -> str:
    """Text outside code spans: no markup of its own, as GitHub reads it."""
    escaped = re.sub(r"[\\*`]|(?<!\w)_|_(?!\w)|~|(?<=])\(", r"\\\g<0>", str(text))
    return html.escape(escaped, quote=False)


def code(text: str) -> str:
    """A code span, also for text with backticks."""
    if not text:
        return ""
    if "\\|" in text:  # in a cell a code span cannot hold both
        return f"<code>{''.join(c if c.isalnum() else f'&#{ord(c)};' for c in text)}</code>"
    fence = "`" * (1 + max((len(run) for run in _runs(text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _runs(text: str) -> list[str]:
    return [run for run in "".join(c if c == "`" else " " for c in text).split() if run]


def fenced(text: str, language: str = "") -> str:
    """A code block, also for text with code blocks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in _runs(text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"
