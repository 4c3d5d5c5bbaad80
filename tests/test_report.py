"""Costs and reports as text: what is shown, that it fits, that it is the same every time, and that it is valid."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import rule_set
from rich.console import Console, RenderableType
from torch import Tensor, nn

from repbnn_cli import number_text, paper, profiler, report, surgery, zoo
from repbnn_cli.errors import UsageError
from repbnn_cli.graph import capture
from repbnn_cli.profiler import Change, Comparison, Profile, shapes
from repbnn_cli.recognize import recognize
from repbnn_cli.views import tables
from repbnn_cli.views.cost_rows import SORT_KEYS, pairs, rows


@cache
def comparison(name: str = "irnet_resnet20") -> Comparison:
    network = capture(zoo.build(name).eval(), zoo.ARCHS[name].input_shape, shapes_only=True)
    plan = surgery.plan(network, rule_set())
    after = profiler.profile(*shapes.rep_network(plan, surgery.apply(plan)))
    return profiler.compare(profiler.profile(network, plan.layers), after)


@cache
def unknown() -> Profile:
    """A network with an operation that the profiler does not know."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nchw,c->nhw", self.conv(x), torch.ones(4))

    network = capture(Net().eval(), (3, 5, 5))
    return profiler.profile(network, recognize(network))


def text(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), markup=False, highlight=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    ("value", "exact", "compact"),
    [
        (0, "0", "0"), (999, "999", "999"), (1000, "1,000", "1.00k"), (12345, "12,345", "12.3k"),
        (99950, "99,950", "100k"), (999499, "999,499", "999k"), (999500, "999,500", "1.00M"),
        (4816896000, "4,816,896,000", "4.82G"), (1536.5, "1,536.5", "1.54k"), (2.0, "2", "2"),
        (2.68 * 10**8, "268,000,000", "268M"), (0.04, "0", "0.04"),
    ],
)  # fmt: skip
def test_numbers(value: float, exact: str, compact: str) -> None:
    assert (number_text.exact(value), number_text.compact(value)) == (exact, compact)


@given(st.integers(0, 10**15))
def test_compact_is_short_and_close(value: int) -> None:
    shown = number_text.compact(value)
    power = {"k": 3, "M": 6, "G": 9, "T": 12, "P": 15}.get(shown[-1], 0)
    assert len(shown) <= 5
    assert float(shown.rstrip("kMGTP")) * 10**power == pytest.approx(value, rel=0.00501)


@pytest.mark.parametrize(
    ("before", "after", "delta", "percent"),
    [(640, 1280, "+640", "+100.00 %"), (640, 320, "-320", "-50.00 %"), (5, 5, "0", "0"), (0, 7, "+7", "new")],
)
def test_changes(before: int, after: int, delta: str, percent: str) -> None:
    change = Change(before, after)
    assert (number_text.signed(change.delta), number_text.percent(change)) == (delta, percent)
    assert number_text.percent(change, short=True) == percent.replace("0 %", "%")


@given(st.text(min_size=1, max_size=60), st.integers(5, 40))
def test_shortened_keeps_both_ends(path: str, width: int) -> None:
    short = number_text.shortened(path, width)
    assert len(short) == min(len(path), width)
    assert short[:2] == path[:2]
    assert short[-2:] == path[-2:]


def test_markdown_cells_cannot_be_broken_out_of() -> None:
    table = number_text.markdown_table(("a", "b"), [("x|y\nz", number_text.code("`|`"))])
    assert table.splitlines()[2] == "| x\\|y z | `` `\\|` `` |"
    assert number_text.fenced("```yaml\n```") == "````\n```yaml\n```\n````\n"
    assert number_text.safe("<b> & *x*") == "&lt;b&gt; &amp; \\*x\\*"
    assert number_text.safe("a ~b~") == "a \\~b\\~"  # GitHub strikes through with one tilde, too


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_depth_sums_what_is_below() -> None:
    profile = comparison().after
    grouped = rows(profile, depth=1)
    assert [r.path for r in grouped] == ["conv1", "bn1", "(network)", "layer1", "layer2", "layer3", "bn2", "linear"]
    stage = next(r for r in grouped if r.path == "layer2")
    members = [c for c in profile.layers if c.path.startswith("layer2.")]
    assert (stage.layers, stage.bops) == (len(members), sum(c.bops for c in members))
    assert stage.packed == sum(c.packed for c in members)
    for depth in (1, 2, 3):
        for column in ("macs", "flops", "bops", "other", "parameters", "packed", "latent"):
            total = sum(getattr(r, column) for r in rows(profile, depth=depth))
            assert total == sum(getattr(r, column) for r in rows(profile))
    assert all(p.before and p.after for p in pairs(comparison(), depth=2))


@pytest.mark.parametrize("key", SORT_KEYS)
def test_sorting(key: str) -> None:
    values = [getattr(r, key) for r in rows(comparison().after, sort=key)]
    assert values == sorted(values, reverse=key != "path")
    assert len(pairs(comparison(), sort=key)) == len(comparison().layers)


def test_bad_sort_and_depth() -> None:
    with pytest.raises(UsageError, match=r"--sort size: unknown key; expected one of ops, flops, bops"):
        rows(comparison().after, sort="size")
    with pytest.raises(UsageError, match=r"--depth 0: expected 1 or more"):
        pairs(comparison(), depth=0)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize("name", ["irnet_resnet20", "reactnet_a"])
@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("side", ["before", "both"])
def test_tables_fit(name: str, width: int, side: str) -> None:
    """No line is too long, and no row of a table is broken in two or cut: its last number is there."""
    cost: tables.Cost = comparison(name) if side == "both" else comparison(name).before
    shown = text(tables.rich_cost(cost, layers=True, width=width), width).splitlines()
    assert max(map(len, shown)) <= width
    start = next(i for i, line in enumerate(shown) if line.startswith("─")) + 1
    count = len(comparison(name).before.layers)
    if side == "both":
        count = sum(bool(p.row.ops or p.row.packed) for p in pairs(comparison(name)))
    assert all(re.search(r"(\d[kMG]?|\d%|new)$", line.rstrip()) for line in shown[start : start + count])
    assert not any("…" in line for line in shown[start : start + count]), "these paths have room"


def test_long_paths_lose_their_middle() -> None:
    profile = unknown()
    long = replace(profile, layers=tuple(replace(c, path="encoder." * 20 + "conv") for c in profile.layers))
    shown = text(tables.rich_cost(long, layers=True))
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"^encoder\.enc.*…[a-z.]*coder\.conv ", shown, re.MULTILINE)


@pytest.mark.parametrize("kind", ["rich", "markdown"])
def test_what_stands_under_every_table(kind: str) -> None:
    show = (lambda c: text(tables.rich_cost(c), 300)) if kind == "rich" else tables.markdown_cost
    for cost in (comparison(), comparison().before, unknown()):
        shown = show(cost)
        assert "1 multiply-accumulate = 1 operation" in shown
        assert "OPs = FLOPs + BOPs / 64" in shown
    assert "Not counted: nothing" in show(comparison())
    assert "NOT COUNTED, einsum ×1 (:einsum)" in show(unknown())
    assert "Not counted: nothing" not in show(unknown())
    assert "RBNN's rotation" in show(comparison("rbnn_resnet20"))


def test_exact_totals_are_shown() -> None:
    shown = text(tables.rich_cost(comparison()))
    assert re.search(r"^OPs without BN +1,069,696 +1,070,336 +\+640 +\+0\.06 %", shown, re.MULTILINE)
    assert re.search(r"^Packed \(B\) +46,440 +53,672 +\+7,232 +\+15\.57 %", shown, re.MULTILINE)
    markdown = tables.markdown_totals(comparison())
    assert "| OPs without BN | 1,069,696 | 1,070,336 | +640 | +0.06 % |" in markdown


def test_markdown_tables_are_rectangular() -> None:
    for made in (tables.markdown_cost(comparison(), layers=True), tables.markdown_cost(unknown(), layers=True)):
        for block in re.findall(r"(?:^\|.*\n)+", made, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_csv() -> None:
    profile = comparison().before
    lines = list(csv.DictReader(io.StringIO(tables.csv_cost(profile))))
    assert len(lines) == len(profile.layers)
    assert sum(int(line["bops"]) for line in lines) == profile.totals.bops
    assert lines[0]["input_shape"] == "3x32x32"
    both = list(csv.DictReader(io.StringIO(tables.csv_cost(comparison(), sort="packed"))))
    assert sum(int(line["packed_delta"]) for line in both) == 7232
    assert "einsum,not counted" in tables.csv_cost(unknown())


def test_json_holds_everything() -> None:
    profile = comparison().before
    plain = json.loads(json.dumps(tables.cost_as_dict(profile), allow_nan=False))
    assert plain["totals"]["ops_without_bn"] == 1069696
    assert sum(c["latent"] for c in plain["layers"]) == plain["totals"]["latent"]
    assert "1 multiply-accumulate = 1 operation, binary or float; biases are not counted." in plain["convention"]
    assert plain["not_counted"] == []
    both = json.loads(json.dumps(tables.cost_as_dict(comparison()), allow_nan=False))
    assert both["totals"]["fc"] == {"before": 640, "after": 1280, "delta": 640, "ratio": 2.0}
    assert both["layers"][-1]["delta"]["ops"] == 640
    assert tables.cost_as_dict(unknown())["not_counted"][0]["type"] == "einsum"


def test_zoo_table() -> None:
    entries = [
        tables.ZooRow(a.name, a.network, a.method, a.data, 29_343_592, 87_126_016, 97_211_392, paper.accuracy(a))
        for a in zoo.ARCHS.values()
    ]
    shown = text(tables.rich_zoo(entries))
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"^adambnn_reactnet_a +AdamBNN +29\.3M +87\.1M +70\.5 +71\.34 +T8", shown, re.MULTILINE)
    assert all(a in shown for a in zoo.ARCHS)
    assert json.loads(json.dumps(tables.zoo_as_dict(entries)))["networks"][0]["accuracy"]["table"] == "Table 7"


# ---------------------------------------------------------------------------------------------------------------------
# The report


@cache
def given_report(name: str = "irnet_resnet20") -> report.ReportInput:
    arch = zoo.ARCHS[name]
    network = capture(zoo.build(name).eval(), arch.input_shape, shapes_only=True)
    plan = surgery.plan(network, rule_set())
    return report.ReportInput(
        title="ckpt | best, β = 2",
        rules_name=plan.rules.name,
        rules_text=plan.rules.text,
        options={"beta": 2, "inherit": "fold", "last_layer": "all"},
        plan=[row.as_plain() for row in plan.rows()],
        certificate=[{"name": "captured = source", "passed": True, "summary": "max |Δ| = 0", "values": {"max": 0.0}}],
        costs=comparison(name),
        arch=name,
        network=f"{arch.method} {arch.network}",
        source_file="ckpt|best.pth",
        source_sha256="0" * 64,
        source_bytes=1_234_567,
        accuracy=62.2,
        accuracy_key="best_prec1",
        published=paper.accuracies(arch),
        published_costs=paper.costs(arch, 2, "all"),
        notes=["<b> is not markup"],
        environment={"torch": "2.0", "python": "3.11"},
    )


@pytest.mark.parametrize(
    ("beta", "last_layer", "rules", "shown"),
    [
        (2, "all", "reptran", "| Rep-IR-Net | paper, Table 3 | 1,070,336 | 87.59 |"),
        (4, "all", "reptran", "| Rep-IR-Net | paper, Table 3 | 1,070,336 | 88.07 |"),
        (2, "1_over_beta", "reptran", "| Rep-IR-Net | paper, Table 2 | 1,070,336 | 87.5 |"),
        (2, "all", "bn-before-repeat", "| Rep-IR-Net | paper, Table 4 | 1,070,336 | 82.74 |"),
        (4, "all", "bn-before-repeat", None),
        (2, "all", "mine", None),
    ],
)
def test_a_rep_network_stands_beside_the_papers_of_the_same_setting(
    beta: int, last_layer: str, rules: str, shown: str | None
) -> None:
    options = {"beta": beta, "inherit": "fold", "last_layer": last_layer}
    made = report.markdown(report.document(report.build(replace(given_report(), options=options, rules_name=rules))))
    assert [line for line in made.splitlines() if line.startswith("| Rep-IR-Net")] == ([shown] if shown else [])


def test_report_says_what_was_done() -> None:
    shown = report.markdown(report.document(report.build(given_report())))
    for line in (
        "# RepBNN report: ckpt \\| best, β = 2",
        "| source checkpoint | `ckpt\\|best.pth`, 1,234,567 bytes |",
        f"| source SHA-256 | `{'0' * 64}` |",
        "| β | 2 |",
        "| source accuracy | 62.2 % top-1 (stated in the checkpoint as `best_prec1`) |",
        "| first layer | `first-layer` | repeat output | (16) → (32) | 1 |",
        "| captured = source | ok | max \\|Δ\\| = 0 |",
        "| OPs with BN | 1,446,656 | 1,541,632 | +94,976 | +6.57 % |",
        "| Table 7 | main result | 86.5 | 87.6 |",
        "| Table 2 | OPs without BN | 1,069,696 | 1,069,696 | 1,070,336 | 1,070,336 |",
        "| torch | `2.0` |",
        "- &lt;b&gt; is not markup",
    ):
        assert line in shown.splitlines(), line
    assert given_report().rules_text.strip() in shown
    assert "off the exact count" not in shown
    assert "made" not in shown.split("##")[0]


def test_report_shows_both_numbers_where_the_paper_rounds() -> None:
    """Table 1: ours exact, the paper's as printed, and which of them its own definition does not give."""
    made = report.build(given_report("reactnet_a"))
    shown = report.markdown(report.document(made))
    assert "| Table 1 | Bconv (BOPs) | 4,816,896,000 | 4.822 ×10⁹ | 4,816,896,000 | 4.822 ×10⁹ |" in shown
    assert "| Table 1 | BN (FLOPs) | 10,085,376 | 1.009 ×10⁷ | 12,606,720 | 1.261 ×10⁷ |" in shown
    off = re.findall(r"^- Table 1, (.*): the paper's (\S+) .* is (\S+) % off", shown, re.MULTILINE)
    assert off == [
        ("Bconv (BOPs), source", "4.822", "+0.11"),
        ("Bconv (BOPs), Rep", "4.822", "+0.11"),
        ("OPs without BN, source", "0.872", "+0.08"),
        ("OPs with BN, source", "0.973", "+0.09"),
    ]
    costs = {c["metric"]: c for c in report.as_dict(made)["paper"]["costs"]}
    assert costs["bconv"]["source"] == {"here": 4816896000, "paper": pytest.approx(4.822e9), "printed": "4.822 ×10⁹"}


def test_same_input_same_bytes() -> None:
    first, second = report.build(given_report()), report.build(given_report.__wrapped__())
    assert report.markdown(report.document(first)) == report.markdown(report.document(second))
    assert json.dumps(report.as_dict(first)) == json.dumps(report.as_dict(second))
    assert "| made | 2024-01-01 |" in report.markdown(
        report.document(report.build(replace(given_report(), timestamp="2024-01-01")))
    )


def test_report_json() -> None:
    failed = ({"name": "identity", "passed": False, "summary": "", "values": {"max": float("inf")}},)
    made = report.build(replace(given_report(), certificate=failed))
    assert not made.passed
    plain = json.loads(json.dumps(report.as_dict(made), allow_nan=False))
    assert plain["certificate"] == {
        "passed": False,
        "checks": [{"name": "identity", "passed": False, "summary": "", "values": {"max": "inf"}}],
    }
    assert plain["rules"]["text"] == given_report().rules_text
    assert plain["costs"]["totals"]["packed"]["delta"] == 7232
    assert plain["convention"][0].startswith("1 multiply-accumulate")
    assert "**FAILED**" in report.markdown(report.document(made))


def test_report_leaves_out_what_is_not_known() -> None:
    bare = replace(
        given_report(), arch=None, network=None, source_file=None, source_sha256=None, accuracy=None, published=(),
        published_costs=(), environment={}, notes=(), plan=[],
    )  # fmt: skip
    shown = report.markdown(report.document(report.build(bare)))
    assert "None" not in shown
    assert "In the paper" not in shown
    assert "## Environment" not in shown
    assert "β = 1 is the identity" in shown


def test_report_tables_are_rectangular() -> None:
    shown = report.markdown(report.document(report.build(given_report("reactnet_a"))))
    for block in re.findall(r"(?:^\|.*\n)+", shown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert shown.count("<details>") == shown.count("</details>") == 4
