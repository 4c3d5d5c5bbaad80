"""A document as Markdown for GitHub; drawings are links to files beside it, where there is a folder for them."""

from __future__ import annotations

import html
from collections.abc import Iterator
from urllib.parse import quote

from repbnn_cli.number_text import cell, code, fenced, markdown_table, safe
from repbnn_cli.report.document import (
    Block,
    Code,
    Document,
    Figures,
    Items,
    Line,
    Listing,
    Paragraph,
    Picture,
    Strong,
    Table,
)  # fmt: skip
from repbnn_cli.report.svg import Plot


def file_name(plot: Plot | Picture) -> str:
    return f"{plot.name}.{'png' if isinstance(plot, Picture) else 'svg'}"


def markdown(document: Document, plots: str | None = None) -> str:
    """plots: the folder of the drawings, as seen from the file that the text is for; None leaves drawings out."""
    parts = [f"# {cell(safe(document.title))}\n"]
    parts += [text for block in document.lead for text in _block(block, plots)]
    for section in document.sections:
        texts = [text for block in section.blocks for text in _block(block, plots)]
        if texts:
            parts += [f"## {safe(section.title)}\n", *texts]
    return "\n".join(parts).rstrip() + "\n"


def _block(block: Block, plots: str | None) -> Iterator[str]:
    if isinstance(block, Table):
        rows = [[_line(c) for c in row] for row in block.rows]
        yield markdown_table([safe(h) for h in block.headings], rows, left=block.left)
    elif isinstance(block, Items):
        if block.lines:
            yield "\n".join(f"- {_line(line)}" for line in block.lines) + "\n"
    elif isinstance(block, Paragraph):
        yield f"{_line(block.line)}\n"
    elif isinstance(block, Listing):
        yield fenced(block.text, block.language)
    elif isinstance(block, Figures):
        if plots is not None:
            yield "\n".join(_link(plot, plots) for plot in block.plots) + "\n"
    elif not block.screen:
        body = "\n".join(text for b in block.blocks for text in _block(b, plots))
        if body:
            yield f"<details>\n<summary>{_in_html(block.summary)}</summary>\n\n{body}\n</details>\n"


def _in_html(text: str) -> str:
    """Inside a line of HTML, where Markdown does not read."""
    return html.escape(" ".join(text.split()), quote=False)


def _link(plot: Plot | Picture, folder: str) -> str:
    words = safe(" ".join(f"{plot.title}. {plot.description}".split())).replace("[", "\\[").replace("]", "\\]")
    return f"![{words}]({quote('/'.join(part for part in (folder, file_name(plot)) if part))})"


def _line(line: Line) -> str:
    if isinstance(line, tuple):
        return "".join(_line(span) for span in line)
    if isinstance(line, Code):
        return code(line.text)
    if isinstance(line, Strong):
        return f"**{safe(line.text)}**"
    return safe(line)
