"""A report as a document: sections of tables, lists, listings and figures, which Markdown and HTML write in their ways.

Text is plain: each format escapes it. `Code` and `Strong` are the only markup inside a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repbnn_cli.report.svg import Plot


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Strong:
    text: str


Span = str | Code | Strong
Line = Span | tuple[Span, ...]


@dataclass(frozen=True)
class Table:
    """The first `left` columns are text, the others numbers. sortable: the reader may want other orders."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Line]]
    left: int = 1
    caption: str = ""
    sortable: bool = False


@dataclass(frozen=True)
class Items:
    lines: Sequence[Line]


@dataclass(frozen=True)
class Paragraph:
    line: Line


@dataclass(frozen=True)
class Listing:
    text: str
    language: str = ""


@dataclass(frozen=True)
class Picture:
    """Pixels as a PNG file; description as of a Plot."""

    name: str
    title: str
    description: str
    width: int
    height: int
    png: bytes


@dataclass(frozen=True)
class Figures:
    """Drawings that belong together, beside each other where there is room. wide: each takes the whole width."""

    plots: Sequence[Plot | Picture]
    wide: bool = False


@dataclass(frozen=True)
class Folded:
    """Shown on request. screen: only where it can be opened, in HTML."""

    summary: str
    blocks: Sequence[Block]
    screen: bool = False


Block = Table | Items | Paragraph | Listing | Figures | Folded


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """lead: what stands under the title."""

    title: str
    lead: Sequence[Block]
    sections: Sequence[Section]

    def plots(self) -> list[Plot | Picture]:
        """All drawings but those for the screen, in order."""
        found: list[Plot | Picture] = []
        todo = [*self.lead, *(b for s in self.sections for b in s.blocks)]
        while todo:
            block = todo.pop(0)
            if isinstance(block, Figures):
                found += block.plots
            elif isinstance(block, Folded) and not block.screen:
                todo = [*block.blocks, *todo]
        return found
