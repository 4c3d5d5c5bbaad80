"""SVG read back as geometry: every element with the box it takes, in the drawing's pixels.

Text is measured with the font that comes with Pillow, not with the estimate that the drawings are laid out by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import cos, radians, sin
from xml.etree import ElementTree

from PIL import ImageFont

from repbnn_cli.report import Plot

SVG = "{http://www.w3.org/2000/svg}"
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Shape:
    """tip: the text of its <title>; corners: of text its four, of a path its points; turned: inside a rotated group."""

    tag: str
    css: frozenset[str]
    words: str
    tip: str
    corners: tuple[Point, ...]
    turned: bool

    @property
    def box(self) -> Box:
        xs, ys = [x for x, _ in self.corners], [y for _, y in self.corners]
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def centre(self) -> Point:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def read(plot: Plot) -> list[Shape]:
    """All shapes of a drawing in order, its ground left out. Fails where the file is no XML."""
    root = ElementTree.fromstring(plot.file())
    assert root.get("viewBox") == f"0 0 {plot.width} {plot.height}"
    found = [*_shapes(root, lambda x, y: (x, y), turned=False)]
    assert "ground" in found[0].css
    return found[1:]


def _shapes(element: ElementTree.Element, place, *, turned: bool) -> Iterator[Shape]:  # type: ignore[no-untyped-def]
    for child in element:
        tag = child.tag.removeprefix(SVG)
        if tag == "g":
            moved, angle = _transform(child.get("transform", ""))
            yield from _shapes(child, lambda x, y, m=moved: place(*m(x, y)), turned=turned or bool(angle))
        elif tag not in ("title", "desc", "style"):
            corners = tuple(place(x, y) for x, y in _corners(tag, child))
            css = frozenset(child.get("class", "").split())
            yield Shape(tag, css, child.text or "", child.findtext(f"{SVG}title") or "", corners, turned)


def _transform(words: str):  # type: ignore[no-untyped-def]
    dx, dy = map(float, re.search(r"translate\((\S+) (\S+)\)", words).groups())  # type: ignore[union-attr]
    turned = re.search(r"rotate\((\S+)\)", words)
    angle = radians(float(turned[1])) if turned else 0.0
    return lambda x, y: (dx + x * cos(angle) - y * sin(angle), dy + x * sin(angle) + y * cos(angle)), angle


def _corners(tag: str, e: ElementTree.Element) -> Sequence[Point]:
    def at(*names: str) -> list[float]:
        return [float(e.attrib[name]) for name in names]

    if tag == "rect":
        x, y, w, h = at("x", "y", "width", "height")
        return (x, y), (x + w, y + h)
    if tag == "line":
        x1, y1, x2, y2 = at("x1", "y1", "x2", "y2")
        return (x1, y1), (x2, y2)
    if tag == "circle":
        x, y, r = at("cx", "cy", "r")
        return (x - r, y - r), (x + r, y + r)
    if tag == "path":
        return points(e.attrib["d"])
    assert tag == "text", tag
    x, y = at("x", "y")
    size = 10.5 if "small" in e.get("class", "").split() else 12
    wide = measured(e.text or "", size)
    left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[e.get("text-anchor", "start")]
    top, bottom = y - 0.75 * size, y + 0.2 * size
    return (left, top), (left + wide, top), (left + wide, bottom), (left, bottom)


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(1000)  # large, so that widths are not rounded to whole pixels
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


@cache
def measured(words: str, size: float) -> float:
    return _font().getlength(words) * size / 1000


def points(d: str) -> list[Point]:
    """The points of a path of M, L, H, V, Q, l, v, h and Z; of a curve its end."""
    tokens = re.findall(r"[MLHVQlhvZ]|-?\d+(?:\.\d+)?", d)
    found: list[Point] = []
    x = y = 0.0
    command, i = "", 0
    while i < len(tokens):
        if tokens[i].isalpha():
            command, i = tokens[i], i + 1
            if command == "Z":
                continue
        take = {"H": 1, "V": 1, "h": 1, "v": 1, "Q": 4}.get(command, 2)
        a = [float(t) for t in tokens[i : i + take]]
        i += take
        if command in "ML":
            x, y = a
        elif command == "l":
            x, y = x + a[0], y + a[1]
        elif command in "Hh":
            x = a[0] if command == "H" else x + a[0]
        elif command in "Vv":
            y = a[0] if command == "V" else y + a[0]
        else:
            x, y = a[2:]
        found.append((x, y))
    return found


def overlap(one: Box, other: Box, slack: float = 0.0) -> bool:
    return (
        one[0] + slack < other[2]
        and other[0] + slack < one[2]
        and one[1] + slack < other[3]
        and other[1] + slack < one[3]
    )


def value_of(label: str) -> float:
    """The number that a label of an axis stands for: 12.3k, 4 %, -1."""
    match = re.fullmatch(r"(-?[\d.]+(?:e[-+]?\d+)?)([kMGTP]?)(?: %)?", label)
    assert match, label
    return float(match[1]) * 10 ** {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}[match[2]]


def axis(shapes: Sequence[Shape], *, vertical: bool):  # type: ignore[no-untyped-def]
    """From pixels to values, by what is written at the axis: the line through its first and last label."""
    if vertical:  # labels stand left of their grid lines
        grid = [s for s in shapes if s.tag == "line" and "grid" in s.css]
        named = [(g.box[1], _beside(shapes, g)) for g in grid]
    else:
        lowest = max(s.box[3] for s in shapes if s.tag == "line" and s.css == {"axis"} and s.width > 50)
        row = [s for s in shapes if s.tag == "text" and lowest < s.centre[1] < lowest + 24 and "small" in s.css]
        named = [(s.centre[0], value_of(s.words)) for s in row]
    (p, a), (q, b) = min(named), max(named)
    assert p < q, "an axis needs two labels"
    return lambda pixel: a + (b - a) * (pixel - p) / (q - p)


def _beside(shapes: Sequence[Shape], grid: Shape) -> float:
    (label,) = (
        s for s in shapes
        if s.tag == "text" and s.box[2] < grid.box[0] and abs(s.centre[1] - grid.box[1]) < 3 and "soft" in s.css
    )  # fmt: skip
    return value_of(label.words)
