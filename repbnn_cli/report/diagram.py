"""The network drawn: an overview with a lane per resolution, and every block operation by operation.

What the transform expanded has a coloured frame, and its colour says what it became; everything else is grey.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from repbnn_cli.anatomy import Block, Operation, Shape
from repbnn_cli.number_text import shape_text
from repbnn_cli.report.svg import Plot, fitted, path, rect, text, text_width
from repbnn_cli.wording import counted

CHANGES: Mapping[str, tuple[str, int]] = {
    "rep_conv": ("RepConv", 1),
    "repeat_output": ("output × β", 2),
    "rep_batch_norm": ("BatchNorm (shared)", 3),
    "batch_norm": ("BatchNorm", 3),
    "per_channel": ("per channel", 4),
    "parameter": ("parameter", 4),
    "per_replica": ("each copy", 4),
    "depthwise": ("depthwise", 2),
    "select_inputs": ("inputs", 6),
    "first_replica": ("one copy", 6),
}  # fmt: skip
_OTHER = ("changed", 4)
_WIDE, _BOX, _BETWEEN, _GAP = 148, 62, 24, 24  # a block of the overview, and what is between two
_ROW, _WIDTH, _HEIGHT = 44, 208, 28


def change_of(operation: Operation) -> tuple[str, int]:
    """What an operation became, and its colour; a binary RepConv is a RepBconv."""
    name, colour = CHANGES.get(operation.change, _OTHER)
    return ("RepBconv" if operation.change == "rep_conv" and operation.kind.startswith("binary") else name), colour


def shapes(before: Shape, after: Shape | None) -> str:
    """16×32×32, or "16→32, 32×32" where only the channels grow."""
    if after is None or after == before or not before:
        return shape_text(before)
    if len(before) == len(after) and before[1:] == after[1:]:
        rest = f", {shape_text(before[1:])}" if before[1:] else ""
        return f"{before[0]}→{after[0]}{rest}"
    return f"{shape_text(before)}→{shape_text(after)}"


def lanes(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Blocks in order, those of one resolution that follow one another side by side in a lane."""
    found: list[tuple[str, list[Block]]] = []
    for block in blocks:
        size = block.last.before[1:]
        name = shape_text(size) if size else "vectors"
        if found and found[-1][0] == name:
            found[-1][1].append(block)
        else:
            found.append((name, [block]))
    return found


def overview(name: str, title: str, blocks: Sequence[Block]) -> Plot:
    """Lanes from left to right, blocks from top to bottom; the data's way is the line between them."""
    columns = lanes(blocks)
    most = max((len(members) for _, members in columns), default=1)
    legend, legend_width = _change_legend(blocks)
    wide = max([_WIDE, *(9 + _counts(b)[1] for b in blocks)])
    lane = wide + _BETWEEN
    width, height = math.ceil(max(lane * len(columns) + 8, legend_width + 16)), 34 + most * (_BOX + _GAP) + 26
    parts = []
    corner: tuple[float, float] | None = None  # where the lane before ended
    for i, (size, members) in enumerate(columns):
        x = 8 + lane * i
        parts.append(text(x, 16, fitted(size, wide - 2, 13), "bold"))
        for j, block in enumerate(members):
            y = 28 + j * (_BOX + _GAP)
            if j:
                parts.append(_arrow(x + 70, y - _GAP, x + 70, y))
            elif corner is not None:
                middle = x - 12
                d = f"M{corner[0]} {corner[1]}V{corner[1] + 8}H{middle}V{y - 6}H{x + 70}V{y}"
                parts.append(path(d, "axis", width=1.5) + _head(x + 70, y))
            parts.append(_overview_box(block, x, y, wide))
        corner = (x + 70, 28 + len(members) * (_BOX + _GAP) - _GAP)
    parts.append(f'<g transform="translate(8 {height - 8})">{legend}</g>')
    count = sum(1 for b in blocks if any(o.change for o in b.operations))
    said = "; ".join(f"{size}: {', '.join(b.name for b in members)}" for size, members in columns)
    shown = f"{counted(len(blocks), 'block')} by resolution, {count} of them with modules that the transform changed"
    return Plot(name, title, f"{shown}. {said}.", width, height, "".join(parts))


def _overview_box(block: Block, x: float, y: float, wide: float) -> str:
    counts = Counter(change_of(o) for o in block.operations if o.change)
    shape = shapes(block.last.before, block.last.after)
    many = len(block.operations)
    tip = f"{block.name}: {many} operation{'s' if many > 1 else ''}, {shape}; " + (
        ", ".join(f"{n} {what}" for (what, _), n in counts.items()) or "nothing changed"
    )
    frame = "s1" if counts else "axis"
    return "".join(
        (
            rect(x, y, wide, _BOX, "mark" if counts else "ground", radius=5, tip=tip),
            path(f"M{x} {y + 5}V{y + _BOX - 5}", frame, width=3),
            path(_rounded(x, y, wide, _BOX), "grid"),
            text(x + 9, y + 17, _fitted_name(block.name, wide - 14), "bold"),
            text(x + 9, y + 33, fitted(shape, wide - 14, 10.5), "soft small"),
            f'<g transform="translate({x + 9} {y + 51})">{_counts(block)[0]}</g>',
        )
    )


def _fitted_name(name: str, room: float) -> str:
    """A block's name; of "first … last" the two are cut, not the gap between them."""
    first, gap, last = name.partition(" … ")
    last = fitted(last, max(room / 2, room - text_width(first, 13)) - text_width(gap, 13), 13)
    return fitted(first, room - text_width(gap + last, 13), 13) + gap + last


def _counts(block: Block) -> tuple[str, float]:
    """How many operations changed in each way, a coloured square and a number each; and how wide that is."""
    parts, x = [], 0.0
    for colour, n in Counter(change_of(o)[1] for o in block.operations if o.change).items():
        parts.append(rect(x, -9, 9, 9, f"f{colour}") + text(x + 12, 0, n, "small"))
        x += 18 + text_width(str(n), 10.5)
    return "".join(parts), x


def _change_legend(blocks: Sequence[Block]) -> tuple[str, float]:
    """What the colours mean, in one line; and how wide that is."""
    names: dict[int, list[str]] = {}
    for what, colour in dict.fromkeys(change_of(o) for b in blocks for o in b.operations if o.change):
        names.setdefault(colour, []).append(what)
    parts, x = [], 0.0
    for colour, words in names.items():
        label = ", ".join(words)
        parts.append(rect(x, -9, 9, 9, f"f{colour}") + text(x + 13, 0, label, "small"))
        x += 13 + text_width(label, 10.5) + 16
    return "".join(parts), x


def detail(name: str, block: Block, names: Mapping[str, str]) -> Plot:
    """One block, an operation a row or side by side where branches run beside each other.

    names: operation → block, to say where a block's inputs come from.
    """
    places = _places(block)
    columns = 1 + max((c for _, c in places.values()), default=0)
    inner = {o.name for o in block.operations}
    skips = [(i, o) for o in block.operations for i in o.inputs if i in inner and _skips(places, i, o.name)]
    right = 14 + columns * (_WIDTH + 16)
    width, height = right + 14 * len(skips) + 10, 16 + _ROW * (1 + max((r for r, _ in places.values()), default=0)) + 4
    parts = []
    for operation in block.operations:
        for source in operation.inputs:
            if source in inner and (source, operation) not in skips:
                parts.append(_edge(places[source], places[operation.name]))
    for k, (source, operation) in enumerate(skips):
        parts.append(_bypass(places, source, operation.name, right + 14 * k))
    parts += [
        _operation_box(o, places[o.name], [names[i] for i in o.inputs if i not in inner]) for o in block.operations
    ]
    title = f"Block {block.name}"
    return Plot(name, title, "; ".join(_in_words(o) for o in block.operations) + ".", width, height, "".join(parts))


def _in_words(operation: Operation) -> str:
    shape = shapes(operation.before, operation.after)
    return f"{operation.label} {shape}" + (f" ({change_of(operation)[0]})" if operation.change else "")


def _places(block: Block) -> dict[str, tuple[int, int]]:
    """Row (the longest way from the block's inputs) and column of every operation."""
    places: dict[str, tuple[int, int]] = {}
    taken: set[tuple[int, int]] = set()
    for operation in block.operations:
        above = [places[i] for i in operation.inputs if i in places]
        row = 1 + max((r for r, _ in above), default=-1)
        wanted = min((c for _, c in above), default=0)
        column = next(c for c in itertools.count(wanted) if (row, c) not in taken)
        places[operation.name] = (row, column)
        taken.add((row, column))
    return places


def _skips(places: Mapping[str, tuple[int, int]], source: str, target: str) -> bool:
    """Whether something stands in the straight way between two operations."""
    (top, column), (bottom, at) = places[source], places[target]
    return any(c in (column, at) and top < r < bottom for r, c in places.values()) if bottom > top + 1 else False


def _corner(place: tuple[int, int]) -> tuple[float, float]:
    return 14 + place[1] * (_WIDTH + 16), 12 + place[0] * _ROW


def _edge(source: tuple[int, int], target: tuple[int, int]) -> str:
    (x1, y1), (x2, y2) = _corner(source), _corner(target)
    x1, x2, y1 = x1 + 40, x2 + 40, y1 + _HEIGHT
    if x1 == x2:
        return _arrow(x1, y1, x2, y2)
    # Down in the column that is further right: a branch beside the main one has it to itself.
    bend = y1 + 8 if x2 > x1 else y2 - 8
    return path(f"M{x1} {y1}V{bend}H{x2}V{y2}", "axis", width=1.5) + _head(x2, y2)


def _bypass(places: Mapping[str, tuple[int, int]], source: str, target: str, x: float) -> str:
    """Around everything, on the right; between two rows where another operation stands to the right of an end."""
    (x1, y1), (x2, y2) = _corner(places[source]), _corner(places[target])
    start, end = x1 + _WIDTH, x2 + _WIDTH
    if _free_on_the_right(places, source):
        from_y = y1 + _HEIGHT / 2 + 5
        d = f"M{start} {from_y}"
    else:
        from_y = y1 + _HEIGHT + 5
        d = f"M{start - 24} {y1 + _HEIGHT}V{from_y}"
    straight = _free_on_the_right(places, target)
    to_y = y2 + _HEIGHT / 2 - 5 if straight else y2 - 10
    d += f"H{x - 6}Q{x} {from_y} {x} {from_y + 6}V{to_y - 6}Q{x} {to_y} {x - 6} {to_y}"
    if straight:
        return path(f"{d}H{end}", "s5", width=1.5) + path(f"M{end} {to_y}l6 -3.5v7z", "f5", width=0)
    return path(f"{d}H{end - 24}V{y2}", "s5", width=1.5) + _head(end - 24, y2)


def _free_on_the_right(places: Mapping[str, tuple[int, int]], name: str) -> bool:
    row, column = places[name]
    return not any(r == row and c > column for r, c in places.values())


def _operation_box(operation: Operation, place: tuple[int, int], outside: Sequence[str]) -> str:
    x, y = _corner(place)
    shape = shapes(operation.before, operation.after)
    tip = f"{operation.path or 'network'}: {operation.label}, {operation.kind}, {shape}"
    tip += f"; became {change_of(operation)[0]}" if operation.change else ""
    tip += f"; reads {', '.join(dict.fromkeys(outside))}" if outside else ""
    ground = "mark" if operation.change else "ground"
    parts = [rect(x, y, _WIDTH, _HEIGHT, ground, radius=4, tip=tip), path(_rounded(x, y, _WIDTH, _HEIGHT, 4), "grid")]
    if operation.change:
        colour = change_of(operation)[1]
        parts.append(path(f"M{x} {y + 4}V{y + _HEIGHT - 4}", f"s{colour}", width=4))
    shape = fitted(shape, 132, 10.5)
    room = _WIDTH - 22 - text_width(shape, 10.5)
    label = fitted(operation.label, room, 13 if operation.change else 12)
    parts.append(text(x + 9, y + 18, label, "bold" if operation.change else ""))
    parts.append(text(x + _WIDTH - 6, y + 18, shape, "soft small", anchor="end"))
    if outside:
        parts.append(path(f"M{x + 40} {y - 9}V{y}", "axis", width=1.5, tip=tip) + _head(x + 40, y))
    return "".join(parts)


def _rounded(x: float, y: float, width: float, height: float, r: float = 5) -> str:
    return (
        f"M{x + r} {y}H{x + width - r}Q{x + width} {y} {x + width} {y + r}V{y + height - r}"
        f"Q{x + width} {y + height} {x + width - r} {y + height}H{x + r}Q{x} {y + height} {x} {y + height - r}"
        f"V{y + r}Q{x} {y} {x + r} {y}Z"
    )


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return path(f"M{x1} {y1}L{x2} {y2}", "axis", width=1.5) + _head(x2, y2)


def _head(x: float, y: float) -> str:
    return path(f"M{x} {y}l-3.5 -6h7z", "f5", width=0)
