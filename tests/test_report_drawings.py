"""Drawings read back: lengths and places are the numbers, all fits, the graph marks what the plan changed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise

import pytest
from drawings import Shape, axis, measured, overlap, read
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import planned

from repbnn_cli import anatomy, surgery, zoo
from repbnn_cli.anatomy import Block, Operation
from repbnn_cli.number_text import compact, exact
from repbnn_cli.plan import Plan
from repbnn_cli.profiler import shapes
from repbnn_cli.report import Plot, charts, diagram, svg

NAMES = st.text(st.sampled_from("abmwW.01_-/<>&\"'| β×中😀\x07"), max_size=120)
COUNTS = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 10**13))
PERCENT = st.just(0.0) | st.floats(1e-4, 100)
few = settings(max_examples=40, deadline=None)


def check_fits(plot: Plot) -> list[Shape]:
    """Nothing leaves the drawing, and no text covers another one."""
    found = read(plot)
    for shape in found:
        left, top, right, bottom = shape.box
        assert min(left, top) >= -1, shape
        assert right <= plot.width + 1, shape
        assert bottom <= plot.height + 1, shape
    texts = [s for s in found if s.tag == "text" and s.words and not s.turned]
    for one, other in combinations(texts, 2):
        assert not overlap(one.box, other.box, 0.5), (one.words, other.words)
    return found


def tipped(found: Sequence[Shape], tag: str) -> list[Shape]:
    return [s for s in found if s.tag == tag and s.tip]


# ---------------------------------------------------------------------------------------------------------------------
# Bars


@few
@given(st.lists(st.builds(charts.Pair, NAMES, COUNTS, COUNTS), min_size=1, max_size=6))
def test_paired_bars_are_as_long_as_their_values(pairs: list[charts.Pair]) -> None:
    found = check_fits(charts.paired_bars("ops", "OPs", pairs, "OPs"))
    values = [v for p in pairs for v in (p.before, p.after)]
    bars = tipped(found, "rect")
    assert len({b.box[0] for b in bars}) == 1
    longest = max(b.width for b in bars)
    assert longest > 150 or not any(values)
    for bar, value in zip(bars, values, strict=True):
        assert bar.width == pytest.approx(longest * value / (max(values) or 1), abs=1)
        assert exact(value) in bar.tip
        (label,) = (s for s in found if s.tag == "text" and 0 < s.box[0] - bar.box[2] < 8 and overlap_row(s, bar))
        assert label.words == compact(value)


def overlap_row(one: Shape, other: Shape) -> bool:
    return one.box[1] < other.centre[1] < one.box[3]


GAINS = st.builds(charts.Gain, st.sampled_from(["one", "two", "a network, " * 12]), NAMES, st.none() | st.floats(-9, 9),
                  st.none() | st.floats(0, 9), st.none() | st.floats(-90, 90))  # fmt: skip


@few
@given(st.lists(GAINS, min_size=1, max_size=9))
def test_gains_of_any_values_fit_and_reach_from_zero(rows: list[charts.Gain]) -> None:
    found = check_fits(charts.gains("gains", "Gains", rows, "points"))
    in_order = [r for group in dict.fromkeys(r.group for r in rows) for r in rows if r.group == group]
    values = [v for r in in_order for v in (r.ours, r.paper) if v is not None]
    bars = tipped(found, "rect")
    (zero,) = {s.centre[0] for s in found if s.tag == "line" and s.css == {"axis"} and s.width == 0 and s.height > 20}
    most = max(map(abs, values), default=0)
    longest = max((b.width for b in bars), default=0)
    for bar, value in zip(bars, values, strict=True):
        assert bar.width == pytest.approx(longest * abs(value) / (most or 1), abs=1)
        assert bar.box[2 if value < 0 else 0] == pytest.approx(zero, abs=0.02)


def test_gains_below_zero_are_left_of_it_and_whiskers_are_one_deviation() -> None:
    rows = [
        charts.Gain("one", "up", 1.0, 0.25, 1.5), charts.Gain("two", "down", -2.0, 0.5, -0.5),
        charts.Gain("two", "alone", 0.75, None, None),
    ]  # fmt: skip
    found = check_fits(charts.gains("gains", "", rows, "points"))
    points = axis(found, vertical=False)
    bars = {s.tip: s for s in tipped(found, "rect")}
    assert {tip: tuple(round(points(x), 2) for x in (bar.box[0], bar.box[2])) for tip, bar in bars.items()} == {
        "one, up, ours: +1.00 ± 0.25 points": (0, 1), "one, up, paper: +1.50 points": (0, 1.5),
        "two, down, ours: -2.00 ± 0.50 points": (-2, 0), "two, down, paper: -0.50 points": (-0.5, 0),
        "two, alone, ours: +0.75 points": (0, 0.75),
    }  # fmt: skip
    whiskers = [s for s in found if s.tag == "line" and s.css == {"axis"} and s.height == 0 and s.width < 250]
    assert [tuple(round(points(x), 2) for x in (w.box[0], w.box[2])) for w in whiskers] == [(0.75, 1.25), (-2.5, -1.5)]
    for bar, whisker in zip((b for tip, b in bars.items() if "±" in tip), whiskers, strict=True):
        assert bar.box[1] < whisker.centre[1] < bar.box[3]
    up, names = bars["one, up, ours: +1.00 ± 0.25 points"], {s.words: s for s in found if s.tag == "text"}
    assert names["one"].centre[1] < names["up"].centre[1] < names["two"].centre[1] < names["down"].centre[1]
    assert overlap_row(up, names["+1.00 ± 0.25"])
    without = read(charts.gains("gains", "", [rows[2]], "points"))
    assert not {"paper", "whisker: ± one standard deviation"} & {s.words for s in without}


@few
@given(st.lists(st.builds(charts.Bar, NAMES, st.sampled_from(["bconv", "bn", "?"]), COUNTS, COUNTS), max_size=90))
def test_layer_bars_are_as_high_as_the_axis_says(bars: list[charts.Bar]) -> None:
    found = check_fits(charts.layer_bars("layers", "OPs of every layer", bars))
    columns = tipped(found, "rect")
    dashes = [s for s in found if s.tag == "line" and s.css == {"axis"} and s.width < 800]
    values = [(b.before, b.after) for b in bars]
    most = max((max(v) for v in values), default=0)
    for column, dash, (before, after) in zip(columns, dashes[-len(bars) :] if bars else [], values, strict=True):
        ground = max(c.box[3] for c in columns)
        highest = max(max(c.height for c in columns), max(ground - d.centre[1] for d in dashes))
        assert column.height == pytest.approx(highest * after / (most or 1), abs=1)
        assert ground - dash.centre[1] == pytest.approx(highest * before / (most or 1), abs=1)
        assert column.box[0] <= dash.centre[0] <= column.box[2]
    for left, right in pairwise(columns):
        assert left.box[2] <= right.box[0] + 0.02
    if most > 100:
        value = axis(found, vertical=True)
        tallest = max(columns, key=lambda c: c.height)
        assert value(tallest.box[1]) == pytest.approx(max(a for _, a in values), abs=0.01 * most)


def test_every_layer_of_a_usual_network_is_named() -> None:
    names = [f"feature.{i}.binary_pw_down1" for i in range(40)]
    found = read(charts.layer_bars("layers", "", [charts.Bar(n, "bconv", 1, 1) for n in names]))
    assert [s.words for s in found if s.turned] == names
    assert "…" not in "".join(s.words for s in found)


# ---------------------------------------------------------------------------------------------------------------------
# Points and lines


@few
@given(st.lists(st.builds(charts.Point, NAMES, st.sampled_from(["this report", "yours"]), COUNTS, PERCENT), min_size=1,
                max_size=12), st.lists(COUNTS, max_size=3))  # fmt: skip
def test_the_landscape_fits_and_its_points_are_where_the_axes_say(points: list[charts.Point], lone: list[int]) -> None:
    unknown = [charts.Point("later", "yours", ops, None) for ops in lone]
    found = check_fits(charts.landscape("landscape", "OPs and accuracy", [*points, *unknown]))
    markers = [s for s in found if s.tip]
    assert len(markers) == len(points)
    for marker, text in ((m, t) for m in markers for t in found if t.tag == "text"):
        assert not overlap(marker.box, text.box, 1.5), (marker.tip, text.words)
    lines_ = [s for s in found if s.tag == "line" and s.width == 0 and s.css & {"s1", "s5"}]
    assert len(lines_) == len(unknown)
    check_linear([s.centre[0] for s in (*markers, *lines_)], [p.ops for p in (*points, *unknown)])
    check_linear([-m.centre[1] for m in markers], [p.top1 or 0.0 for p in points])


def check_linear(pixels: Sequence[float], values: Sequence[float]) -> None:
    """To a pixel; larger values have larger pixels."""
    low, high = (chosen(range(len(values)), key=values.__getitem__) for chosen in (min, max))
    span = (values[high] - values[low]) or 1.0
    assert pixels[high] >= pixels[low]
    for pixel, value in zip(pixels, values, strict=True):
        wanted = pixels[low] + (pixels[high] - pixels[low]) * ((value - values[low]) / span)
        assert pixel == pytest.approx(wanted, abs=1)


def test_landscape_axes_name_the_values_of_its_points() -> None:
    points = [charts.Point(f"net {i}", "paper", 1e6 * (1 + i) ** 2, 50 + 7.3 * i) for i in range(7)]
    found = check_fits(charts.landscape("landscape", "", points))
    ops, top1 = axis(found, vertical=False), axis(found, vertical=True)
    for point, marker in zip(points, (s for s in found if s.tip), strict=True):
        assert ops(marker.centre[0]) == pytest.approx(point.ops, abs=49e6 / 600)
        assert top1(marker.centre[1]) == pytest.approx(point.top1, abs=0.15)
    assert {p.name for p in points} <= {s.words for s in found}, "there is room for all names"


def test_points_at_one_place_keep_their_names_apart() -> None:
    points = [charts.Point(f"network number {i}", "yours", 1e6, 60.0) for i in range(8)]
    lone = [charts.Point("source network", "this report", 1e6, None), charts.Point("Rep", "this report", 1e6, None)]
    words = {s.words for s in check_fits(charts.landscape("landscape", "", [*points, *lone]))}
    assert {p.name for p in points} | {f"{p.name} (accuracy not known)" for p in lone} <= words


curves = st.lists(
    st.tuples(NAMES, st.lists(st.one_of(st.just(0.0), PERCENT, st.floats(-1e9, 1e9), st.floats(0, 1e-9)), min_size=1,
                              max_size=30)), max_size=9,
)  # fmt: skip


@few
@given(curves, st.none() | PERCENT)
def test_curves_of_any_values_fit(given_curves: list[tuple[str, list[float]]], target: float | None) -> None:
    made = [charts.Line(n, tuple((float(i), v) for i, v in enumerate(values))) for n, values in given_curves]
    shown = None if target is None else (f"paper: {target:g}", target)
    found = check_fits(charts.lines("run", "Loss", made, across="epoch", unit="% of all", target=shown))
    paths = [s for s in found if s.tag == "path"]
    assert len(paths) == len(made)
    ys = [y for values in given_curves for y in values[1]] + ([] if target is None else [target])
    if not ys or max(ys) == min(ys):
        return
    low, high = min(ys), max(ys)
    top, bottom = (min(s.box[1] for s in paths), max(s.box[3] for s in paths)) if paths else (0, 0)
    tops = [y for _, values in given_curves for y in values]
    if paths and max(tops) > min(tops):
        per_pixel = (max(tops) - min(tops)) / max(bottom - top, 1e-9)
        for path, (_, values) in zip(reversed(paths), given_curves, strict=True):
            for (_, y), value in zip(path.corners, values, strict=True):
                assert max(tops) - (y - top) * per_pixel == pytest.approx(value, abs=per_pixel + 1e-6 * (high - low))


def test_a_curve_is_where_its_axes_say_and_one_point_is_a_dot() -> None:
    values = [10.0, 62.5, 71.25, 80.0]
    line = charts.Line("test", tuple((float(i), v) for i, v in enumerate(values, 1)))
    found = check_fits(charts.lines("run", "", [line], across="epoch", unit="%", target=("paper: 86.5", 86.5)))
    epoch, top1 = axis(found, vertical=False), axis(found, vertical=True)
    (path,) = (s for s in found if s.tag == "path")
    for (x, y), (i, value) in zip(path.corners, line.points, strict=True):
        assert (epoch(x), top1(y)) == (pytest.approx(i, abs=0.02), pytest.approx(value, abs=0.5))
    (target,) = (s for s in found if s.tag == "line" and "s6" in s.css)
    assert top1(target.centre[1]) == pytest.approx(86.5, abs=0.5)
    alone = check_fits(charts.lines("run", "", [charts.Line("test", ((1.0, 50.0),))], across="epoch"))
    (dot,) = (s for s in alone if s.tag == "circle")
    assert axis(alone, vertical=True)(dot.centre[1]) == pytest.approx(50, abs=0.1)


def test_many_curves_have_names_that_tell_them_apart() -> None:
    made = [charts.Line(f"run-{i}, test", ((0.0, 1.0 * i), (1.0, 2.0 * i))) for i in range(20)]
    found = check_fits(charts.lines("run", "", made, across="epoch"))
    assert {c.name for c in made} <= {s.words for s in found}
    plot = charts.lines("run", "", made, across="epoch").body
    looks = [tuple(p.partition(">")[0].split("stroke-dasharray=")[1:]) for p in plot.split("<path ")[1:]]
    colours = [p.split('"')[1] for p in plot.split("<path ")[1:]]
    assert len(set(zip(looks, colours, strict=True))) == 20


def test_a_curve_without_points_keeps_the_looks_of_the_others() -> None:
    made = [charts.Line(f"run-{i}", ((0.0, 1.0 * i), (1.0, 2.0 * i))) for i in range(8)]
    some = [charts.Line(c.name, ()) if i in (0, 3) else c for i, c in enumerate(made)]

    def looks(found: list[charts.Line]) -> list[str]:
        paths = charts.lines("run", "", found, across="epoch").body.split("<path ")[1:][::-1]
        return [re.sub(' d="[^"]*"', "", p.partition("/>")[0]) for p in paths]

    assert looks(some) == [look for i, look in enumerate(looks(made)) if i not in (0, 3)]


@few
@given(st.lists(st.integers(0, 10**7), min_size=48, max_size=48), st.booleans())
def test_a_histogram_is_as_high_as_its_shares(counts: list[int], two: bool) -> None:
    sides = [("source", counts), ("Rep", counts[::-1])] if two else [("Rep", counts)]
    found = check_fits(charts.histogram("weights", "", sides, 3.0, "w / mean |w|"))
    outlines = [s for s in found if s.tag == "path"][::-1]
    for outline, (_, values) in zip(outlines, sides, strict=True):
        ground = outline.corners[0][1]
        heights = [ground - y for _, y in outline.corners[1:-1:2]]
        total, most = sum(values) or 1, max(values) or 1
        assert heights == pytest.approx([max(heights) * v / most for v in values], abs=1)
        assert max(heights) > 100 or not any(values)
        if any(values):
            share = axis(found, vertical=True)
            assert share(ground - max(heights)) == pytest.approx(100 * most / total, abs=0.02 * 100 * most / total)


# ---------------------------------------------------------------------------------------------------------------------
# Scales and text


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_are_round_and_within(low: float, span: float) -> None:
    high = low + span
    found = svg.ticks(low, high)
    slack = 1e-6 * span + 4 * math.ulp(max(abs(low), abs(high)))
    assert all(low - slack <= t <= high + slack for t in found)
    if span > 1e-6 * abs(low):
        assert 2 <= len(found) <= 12
        steps = [b - a for a, b in pairwise(found)]
        assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80), st.integers(20, 300))
def test_text_is_not_wider_than_it_is_taken_for(words: str, room: int) -> None:
    assert svg.text_width(words) >= measured(words, 12)
    assert svg.text_width(words) <= 1.6 * measured(words, 12) + 8
    cut = svg.fitted(words, room)
    assert measured(cut, 12) <= room
    assert cut == words or (len(cut) < len(words) and "…" in cut)


def test_text_that_fits_stays() -> None:
    assert [svg.fitted(words, 100) for words in ("", "BN", "10", "…", "layer1.0.conv1")] == [
        "", "BN", "10", "…", "layer1.0.conv1",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The graph


def test_a_name_loses_only_what_has_no_room() -> None:
    def named(name: str) -> list[str]:
        first, _, last = name.partition(" … ")
        made = [Operation(f"o{i}", label, "", "function", "", (), None, ()) for i, label in enumerate((first, last))]
        return [s.words for s in read(diagram.overview("network", "", [Block("", tuple(made))])) if "bold" in s.css]

    assert "input … hardtanh" in named("input … hardtanh")
    (cut,) = named("adaptive_avg_pool2d … linear")[1:]
    assert re.fullmatch(r"ada.*… linear", cut)


@cache
def parts_of(name: str) -> tuple[Plan, tuple[Block, ...]]:
    plan = planned(zoo.build(name).eval(), zoo.ARCHS[name].input_shape)
    return plan, anatomy.blocks(plan, shapes.rep_network(plan, surgery.apply(plan))[0])


def boxes(found: Sequence[Shape]) -> list[Shape]:
    return tipped(found, "rect")


def check_ways(found: Sequence[Shape]) -> None:
    """No two boxes touch, and no line runs through one."""
    operations = boxes(found)
    assert not [(a.tip, b.tip) for a, b in combinations(operations, 2) if overlap(a.box, b.box)]
    ways = [
        s for s in found if s.tag == "path" and s.css & {"axis", "s5"} and not s.css & {"grid"} and len(s.corners) > 1
    ]
    for way in ways:
        for (x1, y1), (x2, y2) in pairwise(way.corners):
            piece = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
            crossed = [b.tip for b in operations if overlap(piece, b.box, 1.0) and not at_its_frame(piece, b)]
            assert not crossed, (way, crossed)


def at_its_frame(piece: tuple[float, float, float, float], box: Shape) -> bool:
    """The coloured left edge of a box."""
    return piece[0] == piece[2] == box.box[0]


@pytest.mark.parametrize("name", ["reactnet_a", "irnet_resnet20"])
def test_the_overview_marks_exactly_what_the_plan_changed(name: str) -> None:
    plan, parts = parts_of(name)
    plot = diagram.overview("network", "", parts)
    found = check_fits(plot)
    check_ways(found)
    homes = {e.path: max((p.path for p in parts if p.path and e.path.startswith(f"{p.path}.")), key=len, default="")
             for e in plan.edits}  # fmt: skip
    expected = Counter(homes.values())
    marked: Counter[str] = Counter()
    for box, part in zip(boxes(found), parts, strict=True):
        inside = [s for s in found if overlap(s.box, box.box)]
        counted = sum(
            int(s.words) for s in inside if s.tag == "text" and s.words.isdigit() and s.box[1] > box.box[1] + 38
        )
        marked[part.path] += counted
        assert ("mark" in box.css) == bool(counted)
        assert box.tip.startswith(f"{part.name}: ")
        assert all(s.box[2] <= box.box[2] for s in inside if s.tag == "text")
    assert +marked == expected
    assert sum(expected.values()) == len(plan.edits) > 30


@pytest.mark.parametrize("name", ["reactnet_a", "irnet_resnet20", "birealnet18"])
def test_every_block_is_drawn_with_its_changes_and_nothing_overlaps(name: str) -> None:
    plan, parts = parts_of(name)
    names = {o.name: part.name for part in parts for o in part.operations}
    changed, drawn = set(), 0
    for part in parts:
        found = check_fits(diagram.detail("block", part, names))
        check_ways(found)
        drawn += len(boxes(found))
        changed |= {b.tip.partition(":")[0] for b in boxes(found) if "mark" in b.css}
    assert changed == {e.path for e in plan.edits}
    assert drawn == sum(len(p.operations) for p in parts)


@st.composite
def any_block(draw: st.DrawFn) -> Block:
    count = draw(st.integers(1, 14))
    changes = st.sampled_from(["", "rep_conv", "batch_norm", "parameter", "select_inputs", "repeat_output"])
    size = st.lists(st.integers(1, 4096), min_size=0, max_size=4).map(tuple)
    return Block(draw(NAMES), tuple(
        Operation(f"o{i}", draw(NAMES), draw(NAMES), "function", draw(changes), draw(size), draw(st.none() | size),
                  tuple(draw(st.lists(st.sampled_from([*(f"o{j}" for j in range(i)), "outside"]), max_size=3,
                                      unique=True))))
        for i in range(count)
    ))  # fmt: skip


@few
@given(st.lists(any_block(), min_size=1, max_size=5))
def test_any_graph_fits_without_overlaps(parts: list[Block]) -> None:
    for part in parts:
        check_ways(check_fits(diagram.detail("block", part, {"outside": "somewhere else"})))
    check_ways(check_fits(diagram.overview("network", "", parts)))


def test_a_flat_network_counts_its_hundreds() -> None:
    changes = ["rep_conv", "batch_norm", "parameter", "select_inputs", "repeat_output"]
    flat = Block("", tuple(Operation(f"o{i}", "conv", f"conv{i}", "function", changes[i % 5], (8, 8, 8), None, ())
                           for i in range(700)))  # fmt: skip
    found = check_fits(diagram.overview("network", "", [flat]))
    (box,) = boxes(found)
    counts = [s for s in found if s.words == "140"]
    assert len(counts) == 5
    assert all(box.box[0] < s.box[0] and s.box[2] < box.box[2] for s in counts)


def test_colours_need_no_variables_of_css() -> None:
    """Inkscape and librsvg know none: a drawing would be black there."""
    drawing = svg.Plot("p", "t", "d", 10, 10, svg.rect(0, 0, 5, 5, "f1")).file()
    assert "var(" not in drawing
    light, _, dark = drawing.partition("@media screen and (prefers-color-scheme:dark)")
    for part in (light, dark):
        assert re.findall(r"\.plot \.f1\{fill:(#[0-9a-f]{6})\}", part)
