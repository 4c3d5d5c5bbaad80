"""The published figures: what the tables print, and how a network finds its own."""

from __future__ import annotations

import pytest

from repbnn_cli import paper, zoo
from repbnn_cli.zoo import ARCHS

PUBLISHED = {
    "irnet_resnet20": (86.5, 87.6, "Table 7"),
    "recu_resnet20": (87.5, 89.0, "Table 7"),
    "rbnn_resnet20": (86.5, 88.6, "Table 7"),
    "rbnn_resnet20_bireal": (87.8, 88.7, "Table 7"),
    "rbnn_resnet18": (92.2, 93.1, "Table 7"),
    "recu_resnet18": (92.8, 93.6, "Table 7"),
    "irnet_vgg_small": (90.4, 86.9, "Table 7"),
    "rbnn_vgg_small": (91.3, 92.3, "Table 7"),
    "recu_vgg_small": (92.2, 92.4, "Table 7"),
    "fracbnn_resnet20_1bit": (87.2, 87.6, "Table 7"),
    "resnet20": (91.73, 90.62, "Table 6"),
    "resnet20_bireal": (90.57, 90.84, "Table 6"),
    "birealnet18": (56.4, 57.1, "Table 8"),
    "irnet_imagenet_resnet18": (58.1, None, "Table 8"),
    "rbnn_imagenet_resnet18": (59.9, None, "Table 8"),
    "recu_imagenet_resnet18": (61.0, 62.3, "Table 8"),
    "reactnet_a": (69.4, 70.2, "Table 8"),
    "adambnn_reactnet_a": (70.5, 71.34, "Table 8"),
}


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda a: a.name)
def test_main_result_of_every_network(arch: zoo.Arch) -> None:
    """Networks that the paper does not train have none: nobody gets a neighbour's figure."""
    found = paper.accuracy(arch)
    assert (None if found is None else (found.raw, found.rep, found.table)) == PUBLISHED.get(arch.name)


def test_every_row_of_table_7_has_a_network() -> None:
    networks = {(a.data, a.network, a.method) for a in ARCHS.values()}
    assert {(r.data, r.network, r.method) for r in (*paper.TABLE_7, *paper.TABLE_6)} <= networks


def test_tables_agree_with_each_other() -> None:
    """Table 7 rounds what Tables 2, 3 and 5 print with two digits."""
    main = {(r.network, r.method): r for r in paper.TABLE_7}
    default = [r for r in (*paper.TABLE_2, *paper.TABLE_3) if r.setting in ("last layer way 1", "β = 2")]
    assert len(default) == 4
    for row in (*default, *paper.TABLE_5):
        assert row.raw == pytest.approx(main[row.network, row.method].raw, abs=0.051)
        assert row.rep == pytest.approx(main[row.network, row.method].rep, abs=0.051)
    after = {r.method: r.rep for r in paper.TABLE_4 if "after" in r.setting}
    assert after == {r.method: r.rep for r in default}


def test_everything_about_one_network() -> None:
    rows = paper.accuracies(ARCHS["recu_resnet20"])
    assert [r.table for r in rows] == ["Table 7"] + ["Table 2"] * 3 + ["Table 3"] * 3 + ["Table 4"] * 2 + ["Table 5"]
    assert [r.rep for r in rows if r.setting.startswith("β")] == [88.97, 89.59, 88.72]
    assert paper.accuracies(ARCHS["fracbnn_resnet20"]) == ()


def test_costs() -> None:
    for name in ("reactnet_a", "adambnn_reactnet_a"):
        found = {c.metric: c for c in paper.costs(ARCHS[name], 2, "all")}
        assert found["bconv"].raw.as_number() == pytest.approx(4.822e9)
        assert found["bn"].rep == paper.Rounded(1.261, 7)
        assert {c.table for c in found.values()} == {"Table 1"}
    assert [c.rep.value for w in paper.WAYS for c in paper.costs(ARCHS["irnet_resnet20"], 2, w)] == [
        1070336, 1069696, 1069376
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "beta", "last_layer"),
    [
        ("reactnet_a", 4, "all"),
        ("reactnet_a", 2, "1_over_beta"),
        ("fracbnn_imagenet", 2, "all"),
        ("resnet20", 2, "all"),
    ],
)
def test_no_costs_where_the_paper_has_none(name: str, beta: int, last_layer: str) -> None:
    assert paper.costs(ARCHS[name], beta, last_layer) == ()


def test_table_1_sums() -> None:
    """OPs = FC + Conv + Bconv/64, + BN, within the rounding of four printed digits."""
    for side in (0, 1):
        row = {metric: sides[side].as_number() for metric, sides in paper.TABLE_1.items()}
        assert row["fc"] + row["conv"] + row["bconv"] / 64 == pytest.approx(row["ops_without_bn"], abs=1e5)
        assert row["ops_without_bn"] + row["bn"] == pytest.approx(row["ops_with_bn"], abs=1e5)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (paper.TABLE_2[1], "87.50"),
        (paper.TABLE_7[-2], "93.1"),
        (paper.TABLE_7[7], "89.0"),
        (paper.TABLE_8[-1], "71.34"),
    ],
)
def test_digits_as_printed(row: paper.Accuracy, text: str) -> None:
    assert paper.as_printed(row, row.rep) == text
    assert paper.as_printed(row, None) == ""


def test_figure_1_holds_the_headline() -> None:
    best = max(p.top1 for p in paper.FIGURE_1 if p.ops.as_number() < 1e8)
    assert [p.name for p in paper.FIGURE_1 if p.top1 == best and p.ops.value < 1] == ["RepBNN"]
    assert len(paper.FIGURE_1) == 12
