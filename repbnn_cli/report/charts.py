"""The charts of a report, values → `Plot`: costs before and after, layers, the landscape, distributions, curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from repbnn_cli.number_text import compact, exact
from repbnn_cli.report.svg import (
    Plot,
    Scale,
    curve,
    fitted,
    line,
    marker,
    rect,
    rounded_range,
    text,
    text_width,
    ticks,
)  # fmt: skip

WIDE, NARROW = 960, 400
KIND_COLOURS: Mapping[str, int] = {"bconv": 1, "conv": 2, "bn": 3, "fc": 4, "other": 5}
KIND_NAMES: Mapping[str, str] = {
    "bconv": "binary convolution", "conv": "float convolution", "bn": "BatchNorm", "fc": "fully connected",
    "other": "elementwise",
}  # fmt: skip
BEFORE, AFTER, PAPER = 5, 1, 6  # their colours in every chart
_MARKERS = ("circle", "square", "diamond", "triangle")
_TILT = 58  # of the layers' names, in degrees
_COS, _SIN = math.cos(math.radians(_TILT)), math.sin(math.radians(_TILT))
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Pair:
    """One quantity before and after."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Bar:
    """One layer: what it costs before and after, and of which kind it is."""

    name: str
    kind: str
    before: float
    after: float


@dataclass(frozen=True)
class Point:
    """A network by operations and accuracy. group: whose it is; top1 None: only its cost is known."""

    name: str
    group: str
    ops: float
    top1: float | None


@dataclass(frozen=True)
class Line:
    """One curve: points in order of x; colour: one of its own instead of the next one."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int | None = None


@dataclass(frozen=True)
class Gain:
    """A difference, ours beside the paper's, None where there is none. group: what it stands under; deviation: of ours
    over several runs."""

    group: str
    name: str
    ours: float | None
    deviation: float | None
    paper: float | None


def paired_bars(name: str, title: str, pairs: Sequence[Pair], unit: str) -> Plot:
    """Horizontal bars, source above Rep, with their values."""
    left, right, top, row = 130, 52, 34, 46
    height = top + row * len(pairs) + 12
    most = max((max(p.before, p.after) for p in pairs), default=0) or 1
    scale = Scale(0, most, left, NARROW - right)
    parts = [_legend([("before", BEFORE), ("after", AFTER)], left)[0]]
    for i, pair in enumerate(pairs):
        y = top + row * i
        parts.append(text(left - 8, y + 21, fitted(pair.name, left - 10), anchor="end"))
        for value, colour, offset, side in ((pair.before, BEFORE, 2, "before"), (pair.after, AFTER, 19, "after")):
            tip = f"{pair.name}, {side}: {exact(value)} {unit}"
            parts.append(rect(left, y + offset, scale(value) - left, 14, f"f{colour}", tip=tip))
            parts.append(text(scale(value) + 5, y + offset + 11, compact(value), "small"))
    parts.append(line(left, top - 4, left, height - 10, "axis"))
    said = "; ".join(f"{p.name} {compact(p.before)} → {compact(p.after)}" for p in pairs)
    return Plot(name, title, f"{unit}, before → after: {said}.", NARROW, height, "".join(parts))


def gains(name: str, title: str, rows: Sequence[Gain], unit: str) -> Plot:
    """Horizontal bars from zero to either side, ours above the paper's, with their values; a whisker is ± one
    deviation."""
    width, top, heading, bottom = 640, 30, 26, 42
    sides = [("ours", AFTER)] + ([("paper", PAPER)] if any(r.paper is not None for r in rows) else [])
    row, groups = 8 + 16 * len(sides), list(dict.fromkeys(r.group for r in rows))
    ground = top + heading * len(groups) + row * len(rows)
    ends = [0.0, *(r.ours + s * (r.deviation or 0) for r in rows if r.ours is not None for s in (-1, 1)),
            *(r.paper for r in rows if r.paper is not None)]  # fmt: skip
    low, high = min(ends), max(ends)
    margin = 0.04 * ((high - low) or 1.0)
    names = [fitted(r.name, 170) for r in rows]
    left = 30 + max((text_width(words) for words in names), default=0)
    right = width - 16 - max((text_width(words, 10.5) for r in rows for words in _gain_texts(r)), default=0)
    x = Scale(low - margin * (low < 0), high + margin * (high > 0 or low == high), left, right)
    spread = "whisker: ± one standard deviation" if any(r.deviation is not None for r in rows) else ""
    parts, y, values = [_legend(sides, 12, after=spread)[0]], float(top), ticks(x.low, x.high, 6)
    for group in groups:
        parts.append(text(12, y + 17, fitted(group, width - 24, 13), "bold"))
        members = [(one, words) for one, words in zip(rows, names, strict=True) if one.group == group]
        first, y = y + heading, y + heading + row * len(members)
        parts += [line(x(tick), first, x(tick), y, "grid") for tick in values]
        for i, (one, words) in enumerate(members):
            parts.append(text(left - 10, first + row * (i + 0.5) + 4, words, anchor="end"))
            parts += _gain_bars(one, sides, x, first + row * i + 4, width - 8, unit)
        parts.append(line(x(0), first, x(0), y, "axis", width=1.5))
    parts.append(line(left, ground, right, ground, "axis"))
    for tick, words in zip(values, _tick_texts(values), strict=True):
        parts.append(text(x(tick), ground + 16, words, "soft small", anchor="middle"))
    parts.append(text((left + right) / 2, ground + 34, unit, "soft", anchor="middle"))
    said = "; ".join(f"{r.group} {r.name} " + ", ".join(
        f"{side} {words}" for (side, _), words in zip(sides, _gain_texts(r), strict=False)) for r in rows)  # fmt: skip
    return Plot(name, title, f"{unit}: {said}.", width, round(ground) + bottom, "".join(parts))


def layer_bars(name: str, title: str, bars: Sequence[Bar]) -> Plot:
    """A column per layer, coloured by kind; a dash marks what it was before."""
    names = [fitted(b.name, 180, 10.5) for b in bars]
    longest = max((text_width(n, 10.5) for n in names), default=0)
    left, top, bottom, right = max(62.0, longest * _COS + 6), 34, round(longest * _SIN) + 24, 12
    height = 212 + bottom
    most = max((max(b.before, b.after) for b in bars), default=0) or 1
    y = Scale(0, most * 1.05, height - bottom, top)
    step = (WIDE - left - right) / max(len(bars), 1)
    parts = [_horizontal_grid(y, left, WIDE - right)]
    kinds = [k for k in KIND_COLOURS if any(b.kind == k for b in bars)]
    parts.append(_legend([(KIND_NAMES[k], KIND_COLOURS[k]) for k in kinds], left, after="dash: before")[0])
    label_every = math.ceil(13 / step)
    for i, bar in enumerate(bars):
        x, width = left + step * i, max(step * 0.72, 1)
        tip = f"{bar.name}: {exact(bar.before)} → {exact(bar.after)} OPs"
        parts.append(rect(x + (step - width) / 2, y(bar.after), width, y(0) - y(bar.after), _fill(bar.kind), tip=tip))
        parts.append(line(x + step * 0.06, y(bar.before), x + step * 0.94, y(bar.before), "axis", width=2))
        if i % label_every == 0:
            place = f"translate({x + step / 2 + 4:.1f} {height - bottom + 8}) rotate(-{_TILT})"
            label = text(0, 0, names[i], "small", anchor="end")
            parts.append(f'<g transform="{place}">{label}</g>')
    parts.append(line(left, y(0), WIDE - right, y(0), "axis"))
    largest = sorted(bars, key=lambda b: -b.after)[:3]
    said = ", ".join(f"{b.name} {compact(b.after)}" for b in largest)
    return Plot(name, title, f"OPs of {len(bars)} layers; largest afterwards: {said}.", WIDE, height, "".join(parts))


def landscape(name: str, title: str, points: Sequence[Point]) -> Plot:
    """Accuracy over operations; a network whose accuracy is not known is a vertical line."""
    left, top, bottom, right, height = 52, 40, 46, 20, 430
    width = 720
    known = [p for p in points if p.top1 is not None]
    fewest, most = min(p.ops for p in points), max(p.ops for p in points)
    # Networks that cost nearly the same stand nearly at the same place.
    margin = max(0.1 * (most - fewest), 0.15 * most)
    x_low, x_high = fewest - margin, most + margin
    heights = [p.top1 for p in known if p.top1 is not None] or [0.0, 100.0]
    y_low, y_high = rounded_range(min(heights), max(heights), margin=0.12)
    x, y = Scale(max(x_low, 0), x_high, left, width - right), Scale(y_low, y_high, height - bottom, top)
    parts = [
        _horizontal_grid(y, left, width - right, plain=True),
        line(left, y(y_low), width - right, y(y_low), "axis"),
    ]
    for tick in ticks(x.low, x.high, 6):
        parts.append(line(x(tick), y(y_low), x(tick), y(y_low) + 4, "axis"))
        parts.append(text(x(tick), height - bottom + 18, compact(tick), "soft small", anchor="middle"))
    parts.append(text((left + width - right) / 2, height - 8, "OPs without BN", "soft", anchor="middle"))
    parts.append(text(left, top - 10, "top-1 %", "soft", anchor="middle"))
    groups = list(dict.fromkeys(p.group for p in points))
    styles = {g: ((5, 1, 2, 3, 4, 6)[i % 6], _MARKERS[i % 4]) for i, g in enumerate(groups)}
    parts.append(_marker_legend(styles, left + 46, 16))
    field = left + 2, top - 8, width - 2, y(y_low) - 2
    taken = [_around(x(p.ops), y(p.top1)) for p in known if p.top1 is not None]
    drawn, labels = [], []
    for point in points:
        colour, shape = styles[point.group]
        if point.top1 is None:
            parts.append(line(x(point.ops), top, x(point.ops), y(y_low), f"s{colour}", width=2, dash="5 4"))
            labels.append(_label(f"{point.name} (accuracy not known)", x(point.ops), y(y_low) - 8, taken, field))
            continue
        tip = f"{point.name}: {exact(point.ops)} OPs, top-1 {point.top1:g} %"
        drawn.append(marker(shape, x(point.ops), y(point.top1), f"f{colour}", tip=tip))
        labels.append(_label(point.name, x(point.ops), y(point.top1), taken, field))
    parts += [*drawn, *labels]
    said = "; ".join(f"{p.name} {compact(p.ops)}{'' if p.top1 is None else f', {p.top1:g} %'}" for p in points)
    return Plot(name, title, f"OPs and top-1 accuracy: {said}.", width, height, "".join(parts))


def histogram(name: str, title: str, sides: Sequence[tuple[str, Sequence[int]]], reach: float, axis: str) -> Plot:
    """Shares per bin, sides as outlines over one another; filled for the last one."""
    left, top, bottom, right, height = 44, 34, 42, 12, 240
    shares = [(side, [n / (sum(counts) or 1) for n in counts]) for side, counts in sides]
    most = max((max(s) for _, s in shares if s), default=0) or 1
    x, y = Scale(-reach, reach, left, NARROW - right), Scale(0, most * 1.06, height - bottom, top)
    parts = [_horizontal_grid(y, left, NARROW - right, as_percent=True)]
    legend, drawn = [], []
    for i, (side, values) in enumerate(shares):
        colour = AFTER if i == len(shares) - 1 else BEFORE
        legend.append((side, colour))
        width = 2 * reach / len(values)
        corners = [(x(-reach), y(0))]
        for b, value in enumerate(values):
            corners += [(x(-reach + b * width), y(value)), (x(-reach + (b + 1) * width), y(value))]
        corners.append((x(reach), y(0)))
        drawn.append(curve(corners, f"s{colour}", dash="" if colour == AFTER else "5 4"))
    parts += reversed(drawn)
    for tick in ticks(-reach, reach, 6):
        parts.append(text(x(tick), height - bottom + 16, f"{tick:g}", "soft small", anchor="middle"))
    parts.append(line(left, y(0), NARROW - right, y(0), "axis"))
    parts.append(text((left + NARROW - right) / 2, height - 8, axis, "soft", anchor="middle"))
    parts.append(_legend(legend, left)[0])
    middle = len(shares[-1][1]) // 2 if shares else 0
    said = "; ".join(f"{side}: {100 * sum(v[middle - 4 : middle + 4]):.1f} % in the middle" for side, v in shares)
    said += f" eight of {2 * middle} bins" if shares else ""
    return Plot(name, title, f"Distribution of {axis} within ±{reach:g}. {said}.", NARROW, height, "".join(parts))


def lines(
    name: str, title: str, curves: Sequence[Line], *, across: str, unit: str = "",
    target: tuple[str, float] | None = None, low: float | None = None, high: float | None = None,
) -> Plot:  # fmt: skip
    """Curves over one axis; target: a horizontal line with its name, in a colour of its own."""
    bottom, right = 42, 14
    shown = [c for c in curves if c.points]
    places = [i for i, c in enumerate(curves) if c.points]  # one without points keeps its looks, for other charts
    xs = [px for c in shown for px, _ in c.points] or [0.0, 1.0]
    ys = [py for c in shown for _, py in c.points] + ([target[1]] if target else []) or [0.0, 1.0]
    y_low, y_high = rounded_range(min(ys), max(ys))
    y_low, y_high = y_low if low is None else low, y_high if high is None else high
    left = max(48.0, 14 + max(text_width(words, 10.5) for words in _tick_texts(ticks(y_low, y_high))))
    colours = [one.colour or i % 5 + 1 for i, one in zip(places, shown, strict=True)]
    dashes = [
        "5 4" if one.colour == BEFORE else "" if one.colour else _DASHES[i // 5 % 4 if len(curves) > 5 else i % 4]
        for i, one in zip(places, shown, strict=True)
    ]
    named = [(one.name, colour) for one, colour in zip(shown, colours, strict=True)]
    legend, lowest = _legend(named, left, room=NARROW - left - right, dashes=dashes)
    top = round(lowest) + 36
    height = top + 186 + bottom
    x, y = Scale(min(xs), max(xs), left, NARROW - right), Scale(y_low, y_high, height - bottom, top)
    parts = [
        _horizontal_grid(y, left, NARROW - right, plain=True),
        line(left, y(y_low), NARROW - right, y(y_low), "axis"),
    ]
    for tick in ticks(x.low, x.high, 6):
        if tick == int(tick):
            parts.append(text(x(tick), height - bottom + 16, f"{tick:g}", "soft small", anchor="middle"))
    parts.append(text((left + NARROW - right) / 2, height - 8, across, "soft", anchor="middle"))
    parts.append(text(6, top - 10, unit, "soft small"))
    if target:
        parts.append(line(left, y(target[1]), NARROW - right, y(target[1]), f"s{PAPER}", width=1.5, dash="7 4"))
    drawn = []
    for one, colour, dash in zip(shown, colours, dashes, strict=True):
        pixels = [(x(px), y(min(max(py, y_low), y_high))) for px, py in one.points]
        drawn.append(curve(pixels, f"s{colour}", dash=dash))
        if len(pixels) <= 12:
            drawn[-1] += "".join(marker("circle", px, py, f"f{colour}", size=2.5) for px, py in pixels)
    parts += reversed(drawn)  # the dashed ones on top: a line that another one covers is still seen
    if target:
        parts.append(text(NARROW - right, y(target[1]) - 5, target[0], "small halo", anchor="end"))
    parts.append(legend)
    ends = "; ".join(f"{c.name} from {c.points[0][1]:.4g} to {c.points[-1][1]:.4g}" for c in shown)
    return Plot(name, title, f"{title} by {across}: {ends or 'no values yet'}.", NARROW, height, "".join(parts))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of charts


def _fill(kind: str) -> str:
    return f"f{KIND_COLOURS.get(kind, 5)}"


def _gain_bars(one: Gain, sides: Sequence[tuple[str, int]], x: Scale, y: float, end: float, unit: str) -> Iterator[str]:
    """The bars of one row, 16 pixels apart; end: where their values stand."""
    for (side, colour), value, words in zip(sides, (one.ours, one.paper), _gain_texts(one), strict=False):
        yield text(end, y + 11, words, "small", anchor="end")
        if value is not None:
            left, right = sorted((x(0), x(value)))
            tip = f"{one.group}, {one.name}, {side}: {words} {unit}"
            yield rect(left, y, right - left, 14, f"f{colour}", tip=tip)
            if side == "ours" and one.deviation is not None:
                yield _whisker(x(value - one.deviation), x(value + one.deviation), y + 7)
        y += 16


def _whisker(left: float, right: float, y: float) -> str:
    """On a strip of the ground's colour, so that it is seen on a bar as well as beside it."""
    strip = rect(left, y - 2.5, right - left, 5, "ground")
    caps = "".join(line(x, y - 4, x, y + 4, "axis", width=1.5) for x in (left, right))
    return strip + line(left, y, right, y, "axis", width=1.5) + caps


def _gain_texts(one: Gain) -> tuple[str, str]:
    """Ours and the paper's."""
    spread = "" if one.deviation is None else f" ± {one.deviation:.2f}"
    ours = "–" if one.ours is None else f"{one.ours:+.2f}{spread}"
    return ours, "–" if one.paper is None else f"{one.paper:+.2f}"


def _horizontal_grid(
    y: Scale, left: float, right: float, *, plain: bool = False, as_percent: bool = False
) -> str:  # fmt: skip
    parts = []
    values = ticks(y.low, y.high)
    named = [f"{100 * t:.3g} %" for t in values] if as_percent else [compact(t) for t in values]
    for tick, words in zip(values, _tick_texts(values) if plain else named, strict=True):
        parts.append(line(left, y(tick), right, y(tick), "grid"))
        parts.append(text(left - 6, y(tick) + 4, words, "soft small", anchor="end"))
    return "".join(parts)


def _tick_texts(values: Sequence[float]) -> list[str]:
    """As short as they can be with no two alike."""
    texts: Iterator[list[str]] = ([f"{v:.{digits}g}" for v in values] for digits in range(3, 17))
    return next((found for found in texts if len(set(found)) == len(found)), [f"{v}" for v in values])


def _legend(
    entries: Sequence[tuple[str, int]], x: float, *, after: str = "", room: float = 0, dashes: Sequence[str] = ()
) -> tuple[str, float]:
    """Names beside squares, or beside pieces of their lines, in rows of `room` pixels; and where the last row is."""
    parts, start, y = [], x, 16.0
    swatch = 20 if dashes else 11
    for i, (name, colour) in enumerate(entries):
        words = fitted(name, room - swatch - 5 if room else 260)
        needed = swatch + 5 + text_width(words)
        if room and x > start and x + needed - start > room:
            x, y = start, y + 16
        shown = (
            line(x, y - 4, x + swatch, y - 4, f"s{colour}", width=3, dash=dashes[i])
            if dashes
            else rect(x, y - 10, swatch, 11, f"f{colour}")
        )
        parts.append(shown + text(x + swatch + 5, y, words))
        x += needed + 14
    return "".join(parts) + (text(x, y, after, "soft") if after else ""), y


def _marker_legend(styles: Mapping[str, tuple[int, str]], x: float, y: float) -> str:
    parts = []
    for group, (colour, shape) in styles.items():
        parts.append(marker(shape, x, y - 4, f"f{colour}") + text(x + 11, y, group))
        x += 11 + text_width(group) + 18
    return "".join(parts)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _around(x: float, y: float) -> Box:
    return x - 6, y - 6, x + 6, y + 6


def _label(words: str, x: float, y: float, taken: list[Box], field: Box) -> str:
    """A name beside its point, at the nearest place within `field` that is free; none where there is no room (the
    table has all names). Further away a line leads to the point."""
    words = fitted(words, 250, 10.5)
    width = text_width(words, 10.5)
    for dy in (4, -8, 16, *(s * d for d in range(28, 240, 12) for s in (-1, 1))):
        for at in (x + 9, x - 9 - width):
            box = (at, y + dy - 10, at + width, y + dy + 3)
            if _within(box, field) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                near = at if at > x else at + width
                led = line(x, y, near, y + dy - 4, "axis", width=0.75) if abs(dy) > 16 else ""
                return led + text(at, y + dy, words, "small halo")
    return ""


def _within(box: Box, field: Box) -> bool:
    return box[0] >= field[0] and box[1] >= field[1] and box[2] <= field[2] and box[3] <= field[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
