"""The network drawn: an overview with a lane per resolution, and every block operation by operation.

What the transform expanded has a coloured frame, and its colour says what it became; everything else is grey.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from repbnn_cli.anatomy import Block, Operation, Shape
from repbnn_cli.number_text import shape_text, shortened
from repbnn_cli.report.svg import Plot, path, rect, text, text_width

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
}  # fmt: skip
_OTHER = ("changed", 4)
_LANE, _BOX, _GAP = 172, 62, 24
_ROW, _WIDTH, _HEIGHT = 44, 208, 28


def change_of(operation: Operation) -> tuple[str, int]:
    """What an operation became, and its colour; a binary RepConv is a RepBconv."""
    name, colour = CHANGES.get(operation.change, _OTHER)
    return ("RepBconv" if operation.change == "rep_conv" and operation.kind.startswith("binary") else name), colour


def shapes(before: Shape, after: Shape | None) -> str:
    """16×32×32, or "16→32, 32×32" where only the channels grow."""
    if after is None or after == before or not before:
        return shape_text(before)
    if before[1:] == after[1:]:
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
    width, height = max(_LANE * len(columns) + 8, 320), 34 + most * (_BOX + _GAP) + 26
    parts = []
    corner: tuple[float, float] | None = None  # where the lane before ended
    for i, (size, members) in enumerate(columns):
        x = 8 + _LANE * i
        parts.append(text(x, 16, size, "bold"))
        for j, block in enumerate(members):
            y = 28 + j * (_BOX + _GAP)
            if j:
                parts.append(_arrow(x + 70, y - _GAP, x + 70, y))
            elif corner is not None:
                middle = x - 12
                d = f"M{corner[0]} {corner[1]}V{corner[1] + 8}H{middle}V{y - 6}H{x + 70}V{y}"
                parts.append(path(d, "axis", width=1.5) + _head(x + 70, y))
            parts.append(_overview_box(block, x, y))
        corner = (x + 70, 28 + len(members) * (_BOX + _GAP) - _GAP)
    parts.append(_change_legend(blocks, 8, height - 8))
    count = sum(1 for b in blocks if any(o.change for o in b.operations))
    said = "; ".join(f"{size}: {', '.join(b.name for b in members)}" for size, members in columns)
    description = (
        f"{len(blocks)} blocks by resolution, {count} of them with modules that the transform changed. {said}."
    )
    return Plot(name, title, description, width, height, "".join(parts))


def _overview_box(block: Block, x: float, y: float) -> str:
    counts = Counter(change_of(o) for o in block.operations if o.change)
    shape = shapes(block.last.before, block.last.after)
    tip = f"{block.name}: {len(block.operations)} operations, {shape}; " + (
        ", ".join(f"{n} {what}" for (what, _), n in counts.items()) or "nothing changed"
    )
    frame = "s1" if counts else "axis"
    parts = [
        rect(x, y, 148, _BOX, "mark" if counts else "ground", radius=5, tip=tip),
        path(f"M{x} {y + 5}V{y + _BOX - 5}", frame, width=3),
        path(_rounded(x, y, 148, _BOX), "grid"),
        text(x + 9, y + 17, shortened(block.name, 18), "bold"),
        text(x + 9, y + 33, shortened(shape, 24), "soft small"),
    ]
    at = x + 9
    for (_, colour), n in itertools.islice(_by_colour(counts).items(), 5):
        parts.append(rect(at, y + 42, 9, 9, f"f{colour}") + text(at + 12, y + 51, n, "small"))
        at += 18 + text_width(str(n), 10.5)
    return "".join(parts)


def _by_colour(counts: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], int]:
    sums: dict[tuple[str, int], int] = {}
    for (_, colour), n in counts.items():
        sums[("", colour)] = sums.get(("", colour), 0) + n
    return sums


def _change_legend(blocks: Sequence[Block], x: float, y: float) -> str:
    names: dict[int, list[str]] = {}
    for what, colour in dict.fromkeys(change_of(o) for b in blocks for o in b.operations if o.change):
        names.setdefault(colour, []).append(what)
    parts = []
    for colour, words in names.items():
        label = ", ".join(words)
        parts.append(rect(x, y - 9, 9, 9, f"f{colour}") + text(x + 13, y, label, "small"))
        x += 13 + text_width(label, 10.5) + 16
    return "".join(parts)


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
        parts.append(_bypass(places[source], places[operation.name], right + 14 * k))
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


def _bypass(source: tuple[int, int], target: tuple[int, int], x: float) -> str:
    """Around everything, on the right."""
    (x1, y1), (x2, y2) = _corner(source), _corner(target)
    from_y, to_y = y1 + _HEIGHT / 2 + 5, y2 + _HEIGHT / 2 - 5
    d = f"M{x1 + _WIDTH} {from_y}H{x - 6}Q{x} {from_y} {x} {from_y + 6}V{to_y - 6}"
    d += f"Q{x} {to_y} {x - 6} {to_y}H{x2 + _WIDTH}"
    tip = path(f"M{x2 + _WIDTH} {to_y}l6 -3.5v7z", "f5", width=0)
    return path(d, "s5", width=1.5) + tip


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
    room = 25 - len(shape)
    parts.append(text(x + 9, y + 18, shortened(operation.label, max(room, 8)), "bold" if operation.change else ""))
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
