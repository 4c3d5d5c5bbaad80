"""A document as one HTML file: no network, no other file; style and script (sorting, printing) are inside it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from importlib import resources

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
from repbnn_cli.report.svg import STYLE, Plot, escape

# Nothing may be loaded, whatever text ends up in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(document: Document) -> str:
    """The whole file as text."""
    style, script = (resources.files(__package__).joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    sections = "".join(
        f'<section id="{s.name}"><h2>{escape(s.title)}</h2>{"".join(map(_block, s.blocks))}</section>'
        for s in document.sections
    )
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in document.sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(document.title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(document.title)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f'<main>\n<section id="summary" aria-label="Summary">{"".join(map(_block, document.lead))}</section>\n'
        f"{sections}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{_line(line)}</li>" for line in block.lines) + "</ul>" if block.lines else ""
    if isinstance(block, Paragraph):
        return f"<p>{_line(block.line)}</p>"
    if isinstance(block, Listing):
        return f'<pre tabindex="0"><code>{escape(block.text)}</code></pre>'
    if isinstance(block, Figures):
        css = "figures wide" if block.wide else "figures"
        return f'<div class="{css}">{"".join(map(_figure, block.plots))}</div>'
    body = "".join(map(_block, block.blocks))
    css = ' class="screen"' if block.screen else ""
    return f"<details{css}><summary>{escape(block.summary)}</summary>{body}</details>"


def _figure(plot: Plot | Picture) -> str:
    if isinstance(plot, Plot):
        image = plot.inline()
    else:
        data = base64.b64encode(plot.png).decode("ascii")
        image = (
            f'<img src="data:image/png;base64,{data}" width="{plot.width}" height="{plot.height}" '
            f'alt="{escape(plot.description)}">'
        )
    return (
        f'<figure><figcaption>{escape(plot.title)}</figcaption><div class="canvas" tabindex="0">{image}</div></figure>'
    )


def _table(table: Table) -> str:
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    numeric = [i >= table.left for i in range(len(table.headings))]
    css = ' class="sortable"' if table.sortable else ""
    head = "".join(_heading(h, n, table.sortable) for h, n in zip(table.headings, numeric, strict=True))
    named = any(h for h in table.headings)
    body = "".join(f"<tr>{''.join(_cells(row, numeric))}</tr>" for row in table.rows)
    top = f"<thead><tr>{head}</tr></thead>" if named else ""
    return f'<div class="table" tabindex="0"><table{css}>{caption}{top}<tbody>{body}</tbody></table></div>'


def _heading(words: str, numeric: bool, sortable: bool) -> str:
    css = ' class="n"' if numeric else ""
    if not words:
        return f"<td{css}></td>"
    inner = f'<span role="button" tabindex="0">{escape(words)}</span>' if sortable else escape(words)
    return f'<th scope="col"{css}>{inner}</th>'


def _cells(row: object, numeric: list[bool]) -> Iterator[str]:
    assert isinstance(row, list | tuple)
    for i, (line, n) in enumerate(zip(row, numeric, strict=True)):
        if i == 0:
            yield f'<th scope="row">{_line(line)}</th>'
        else:
            yield f'<td class="n">{_line(line)}</td>' if n else f"<td>{_line(line)}</td>"


def _line(line: Line) -> str:
    if isinstance(line, tuple):
        return "".join(map(_line, line))
    if isinstance(line, Code):
        return f"<code>{escape(line.text)}</code>"
    if isinstance(line, Strong):
        return f"<strong>{escape(line.text)}</strong>"
    return escape(line)
