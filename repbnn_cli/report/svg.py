"""Drawing primitives: SVG elements as text, scales, ticks, and the `Plot` that both HTML and Markdown show.

Colours are classes (`c1` … `c6`, `ink`, `soft`), whose values are in STYLE: for a page once, for a file inside it; both
follow the reader's light or dark scheme. Numbers are written with two decimals at most: same values, same bytes.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repbnn_cli.number_text import shortened

# Hues that stay apart for every kind of colour blindness, each at least 3:1 on its ground.
_LIGHT = {"c1": "#0b66b0", "c2": "#c2500a", "c3": "#0a7d5a", "c4": "#a03a86", "c5": "#6b7280", "c6": "#8a6d00",
          "ink": "#1b1f24", "soft": "#57606a", "grid": "#d8dee4", "ground": "#fff", "mark": "#e8f1fa"}  # fmt: skip
_DARK = {"c1": "#6cb4f5", "c2": "#ff9b5a", "c3": "#4fd0a5", "c4": "#e79ad0", "c5": "#a7b0bf", "c6": "#e2c04a",
         "ink": "#e6edf3", "soft": "#9aa5b1", "grid": "#30363d", "ground": "#0d1117", "mark": "#16283a"}  # fmt: skip


def _colours(of: Mapping[str, str]) -> str:
    """Written out for each class: what makes a PDF of a drawing (Inkscape, librsvg) knows no variables of CSS."""
    rules = {"text": f"fill:{of['ink']}", "text.soft": f"fill:{of['soft']}", "text.halo": f"stroke:{of['ground']}",
             ".grid": f"stroke:{of['grid']}", ".axis": f"stroke:{of['soft']}", ".ground": f"fill:{of['ground']}",
             ".mark": f"fill:{of['mark']}"}  # fmt: skip
    for i in range(1, 7):
        own = of[f"c{i}"]
        rules |= {f".f{i}": f"fill:{own}", f".s{i}": f"stroke:{own}", f".o{i}": f"stroke:{own};fill:{of['ground']}"}
    return "".join(f".plot {which}{{{what}}}" for which, what in rules.items()) + "\n"


STYLE = f"""
.plot text{{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
.plot text.small{{font-size:10.5px}}.plot text.bold{{font-weight:600}}
.plot text.halo{{paint-order:stroke;stroke-width:3px;stroke-linejoin:round}}
.plot .grid,.plot .axis,{",".join(f".plot .s{i}" for i in range(1, 7))}{{fill:none}}
{_colours(_LIGHT)}@media screen and (prefers-color-scheme:dark){{
{_colours(_DARK)}}}
"""
_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Plot:
    """A drawing. name: for files and ids, [a-z0-9-]; description: what it shows, for those who do not see it."""

    name: str
    title: str
    description: str
    width: int
    height: int
    body: str

    def inline(self) -> str:
        """For a page that has STYLE."""
        return self._svg(f'<svg class="plot" style="--natural:{self.width}px"')

    def file(self) -> str:
        """A file of its own."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="{self.width}" height="{self.height}"'
        ground = rect(0, 0, self.width, self.height, "ground")
        style = f"<style>{STYLE}</style>"
        return self._svg(head, style + ground) + "\n"

    def _svg(self, head: str, first: str = "") -> str:
        ids = f"{self.name}-title {self.name}-desc"
        return (
            f'{head} viewBox="0 0 {self.width} {self.height}" role="img" aria-labelledby="{ids}">'
            f'<title id="{self.name}-title">{escape(self.title)}</title>'
            f'<desc id="{self.name}-desc">{escape(self.description)}</desc>{first}{self.body}</svg>'
        )


def escape(text: object) -> str:
    """Text and attribute values of HTML and SVG; characters that XML does not have become �."""
    allowed = _NO_XML.sub("�", str(text))
    return html.escape(allowed)


def number(value: float) -> str:
    """A coordinate."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")  # + 0.0: no -0


def rect(x: float, y: float, width: float, height: float, css: str, *, tip: str = "", radius: float = 0) -> str:
    round_ = f' rx="{number(radius)}"' if radius else ""
    place = f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 0))}" height="{number(max(height, 0))}"'
    return _closed("rect", f'class="{css}" {place}{round_}', tip)


def line(x1: float, y1: float, x2: float, y2: float, css: str, *, width: float = 1, dash: str = "") -> str:
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line class="{css}" {ends} stroke-width="{number(width)}"{_dash(dash)}/>'


def path(d: str, css: str, *, width: float = 1, dash: str = "", tip: str = "") -> str:
    return _closed("path", f'class="{css}" d="{d}" stroke-width="{number(width)}"{_dash(dash)}', tip)


def curve(points: Sequence[tuple[float, float]], css: str, *, width: float = 2, dash: str = "") -> str:
    """A line through points."""
    d = " ".join(f"{'M' if i == 0 else 'L'}{number(x)} {number(y)}" for i, (x, y) in enumerate(points))
    return path(d, css, width=width, dash=dash)


def text(x: float, y: float, words: object, css: str = "", *, anchor: str = "start") -> str:
    named = f' class="{css}"' if css else ""
    placed = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{number(x)}" y="{number(y)}"{named}{placed}>{escape(words)}</text>'


def marker(shape: str, x: float, y: float, css: str, *, size: float = 5, tip: str = "") -> str:
    """circle, square, diamond or triangle: what colour says, shape says too."""
    r = size
    if shape == "circle":
        return _closed(
            "circle", f'class="{css}" cx="{number(x)}" cy="{number(y)}" r="{number(r)}" stroke-width="2"', tip
        )
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "diamond": [(0, -r * 1.4), (r * 1.4, 0), (0, r * 1.4), (-r * 1.4, 0)],
        "triangle": [(0, -r * 1.2), (r * 1.2, r), (-r * 1.2, r)],
    }[shape]
    d = " ".join(f"{'M' if i == 0 else 'L'}{number(x + a)} {number(y + b)}" for i, (a, b) in enumerate(corners))
    return path(d + "Z", css, width=2, tip=tip)


def _closed(tag: str, attributes: str, tip: str) -> str:
    return f"<{tag} {attributes}><title>{escape(tip)}</title></{tag}>" if tip else f"<{tag} {attributes}/>"


def _dash(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


# ---------------------------------------------------------------------------------------------------------------------
# Scales


@dataclass(frozen=True)
class Scale:
    """From values low … high to pixels start … end, linear."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.end - self.start) * ((value - self.low) / span if span else 0.5)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values within low … high, about `count` of them."""
    span = high - low
    if not 1e-300 < span < math.inf:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999999)
    first = math.ceil(low / step - 1e-9)
    digits = 10 - math.floor(math.log10(step))
    return [round(i * step, digits) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def rounded_range(low: float, high: float, *, margin: float = 0.06) -> tuple[float, float]:
    """A little more than low … high; never empty."""
    if low == high == 0:  # a series of zeros: no room below, where shares and counts cannot be
        high = 1.0
    span = (high - low) or abs(high)
    return low - margin * span, high + margin * span


def text_width(words: str, size: float = 12) -> float:
    """About as wide as the text can be in the fonts of STYLE, the widest of which is DejaVu Sans; East Asian and emoji
    characters are as wide as they are high."""
    return size * sum(map(_em, words))


def _em(c: str) -> float:
    if c > "\u2e80" or c in "mwMW@%…—":
        return 1.0
    if c in "ilI.,:;|'!tfjr()[]/ ":
        return 0.42
    return 0.84 if c.isupper() or c in "#&+=<>≥≤×→~±^" else 0.64


def fitted(words: str, room: float, size: float = 12) -> str:
    """The words, without their middle where they are wider than `room` pixels."""
    if text_width(words, size) <= room:
        return words
    most = min(len(words) - 1, int(room / (0.42 * size)))
    cuts = (shortened(words, length) for length in range(most, 1, -1))
    return next((cut for cut in cuts if text_width(cut, size) <= room), "…")
