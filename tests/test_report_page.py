"""The page as one file: well formed, nothing loaded, names escaped, a text and a table for every chart."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from networks import images, planned, randomize
from pages import SVG_TAGS, Node, Reader, check_page, tables_of
from train_examples import run as train

from repbnn_cli import anatomy, profiler, report, runs, surgery, zoo
from repbnn_cli.anatomy import tensor_stats
from repbnn_cli.number_text import exact
from repbnn_cli.profiler import shapes
from repbnn_cli.report import Evidence, ReportInput, Standing

EVIL = "<script>alert(\"x\")</script>|'q'&amp;</style></svg>*b*\\`c`--><img src=x onerror=y>"


@pytest.fixture(scope="module")
def given_values(tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    """Everything that a report can hold, of one network."""
    torch.manual_seed(0)
    source = randomize(zoo.build("irnet_resnet20"))
    plan = planned(source, (3, 32, 32))
    rep = surgery.apply(plan).eval()
    network, layers = shapes.rep_network(plan, rep)
    batch = images(2, 32)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(folder, "epochs=1", "schedule.warmup=0")
    before = profiler.profile(plan.network, plan.layers)
    return ReportInput(
        title="irnet_resnet20, β = 2",
        rules_name=plan.rules.name,
        rules_text=plan.rules.text,
        options={"beta": 2, "inherit": "fold", "last_layer": "all"},
        plan=[row.as_plain() for row in plan.rows()],
        certificate=[{"name": "identity", "passed": True, "summary": "max |Δ| = 0", "values": {}}],
        costs=profiler.compare(before, profiler.profile(network, layers)),
        arch="irnet_resnet20",
        network="IR-Net ResNet-20",
        source_file="ckpt.pth",
        source_bytes=1,
        result_file="rep.repbnn.pt",
        accuracy=62.35,
        accuracy_key="best_prec1",
        notes=["a note"],
        environment={"torch": "2"},
        data="CIFAR-10",
        training={"top1": 80.5, "recipe": "mine", "data": "cifar10", "seed": 1, "epochs": 3},
        runs=[runs.read(folder)],
        evidence=Evidence(
            blocks=anatomy.blocks(plan, network),
            weights=(tensor_stats.weights(source, plan.layers), tensor_stats.weights(rep, layers)),
            activations=(
                tensor_stats.activations(source, plan.layers, batch),
                tensor_stats.activations(rep, layers, batch),
            ),
            images="2 images",
            maps=tensor_stats.feature_maps(plan, rep, batch),
            others=[Standing("other.pth", "yours", 2_000_000, 61.0), Standing("later.pth", "yours", 1_500_000, None)],
        ),
    )


def page_of(given: ReportInput) -> Node:
    text = report.page(report.document(report.build(given)))
    assert text.startswith("<!doctype html>\n")
    return Reader(text).root


def test_the_page_is_one_well_formed_file_that_loads_nothing(given_values: ReportInput) -> None:
    root = page_of(given_values)
    check_page(root)
    sections = [s.attributes["id"] for s in root.all("section")]
    linked = [a.attributes["href"][1:] for nav in root.all("nav") for a in nav.all("a")]
    assert linked == sections[1:]
    assert linked == [
        "changes", "certificate", "costs", "accuracy", "runs", "network", "tensors", "maps", "environment",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What comes from a user


def spoiled(value: Any, words: str, *, keep: Sequence[str] = ()) -> Any:
    """The same values with `words` behind every text; keys of mappings stay."""
    if isinstance(value, str):
        return value + words
    if isinstance(value, Path):
        return value.with_name(value.name + words.replace("/", "∕"))
    if isinstance(value, dict):
        return {k: v if k in keep else spoiled(v, words, keep=keep) for k, v in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(spoiled(v, words, keep=keep) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(
            value, **{n: v if n in keep else spoiled(v, words, keep=keep) for n, v in fields.items()}
        )
    return value


KEPT = ("costs", "options", "stage", "name", "inputs", "group", "kind", "change", "action", "part", "data", "stages")


def test_no_text_of_a_user_becomes_markup(given_values: ReportInput) -> None:
    evil = spoiled(given_values, EVIL, keep=KEPT)
    evil = dataclasses.replace(
        evil,
        environment={f"torch{EVIL}": f"2{EVIL}"},
        training={"top1": 80.5, "recipe": EVIL, "data": EVIL},
        costs=spoiled_costs(evil.costs),
        evidence=dataclasses.replace(
            evil.evidence, others=[Standing(f"o{EVIL}", "yours", 2e6, 61.0), Standing(f"l{EVIL}", "yours", 1e6, None)]
        ),
    )
    root = page_of(evil)
    check_page(root)
    kinds = [sorted((n.tag for n in r.all()), key=str) for r in (root, page_of(given_values))]
    assert [kinds[0].count(tag) for tag in ("img", "svg", "table", "section", "b", "strong")] == [
        kinds[1].count(tag) for tag in ("img", "svg", "table", "section", "b", "strong")
    ]
    body = next(root.all("body")).text
    for start in (
        "irnet_resnet20", "irnet_resnet20, β = 2", "IR-Net ResNet-20", "ckpt.pth", "rep.repbnn.pt", "best_prec1",
        "a note", "max |Δ| = 0", "torch", "layer1.0.conv1", "o", "l", "reptran", "2 images", "toy",
    ):  # fmt: skip
        assert f"{start}{EVIL}" in body, start
    assert evil.rules_text in next(n.text for n in root.all("pre"))
    (image, *_) = root.all("img")
    assert EVIL in image.attributes["alt"]


def spoiled_costs(costs: profiler.Comparison) -> profiler.Comparison:
    sides = {
        side: dataclasses.replace(
            profile, layers=tuple(dataclasses.replace(c, path=c.path + EVIL) for c in profile.layers)
        )
        for side, profile in (("before", costs.before), ("after", costs.after))
    }
    return profiler.compare(sides["before"], sides["after"])


def test_drawings_stay_xml_whatever_names_are_in_them(given_values: ReportInput) -> None:
    evil = report.document(report.build(spoiled(given_values, f"{EVIL}\x00\x1b\ud800\uffff", keep=KEPT)))
    drawings = [p for p in evil.plots() if isinstance(p, report.Plot)]
    assert len(drawings) >= 10
    for plot in drawings:
        root = ElementTree.fromstring(plot.file().encode())
        assert {e.tag.rpartition("}")[2] for e in root.iter()} <= SVG_TAGS | {"style"}


# ---------------------------------------------------------------------------------------------------------------------
# For those who do not see it


def test_every_drawing_says_what_it_shows(given_values: ReportInput) -> None:
    root = page_of(given_values)
    drawings = [*root.all("svg")]
    assert len(drawings) >= 12
    for drawing in drawings:
        assert drawing.attributes["role"] == "img"
        title, description = drawing.children[:2]
        assert (title.tag, description.tag) == ("title", "desc")
        assert drawing.attributes["aria-labelledby"].split() == [title.attributes["id"], description.attributes["id"]]
        assert title.text == next(drawing.above("figure").all("figcaption")).text
        assert len(description.text) > 20
    for image in root.all("img"):
        assert len(image.attributes["alt"]) > 40
    for scrolled in root.all("pre", "div"):
        if scrolled.attributes.get("class") in ("table", "canvas", None):
            assert scrolled.attributes["tabindex"] == "0", "what scrolls has to be reachable by keys"


def test_every_chart_has_its_numbers_in_a_table(given_values: ReportInput) -> None:
    root = page_of(given_values)
    charts = {d.children[0].attributes["id"].removesuffix("-title"): d for d in root.all("svg")}
    tips = {
        name: [t.text for e in d.children if e.tag in ("rect", "circle", "path") for t in e.all("title")]
        for name, d in charts.items()
    }
    costs = {cell for table in tables_of(root, "costs") for row in table for cell in row}
    for tip in (*tips["ops"], *tips["sizes"]):
        value = re.search(r": ([\d,]+)", tip)
        assert value, tip
        as_bops = exact(64 * int(value[1].replace(",", "")))  # the chart shows binary convolutions as OPs
        assert {value[1], as_bops} & costs, tip
    per_layer = [row[:1] + row[2:4] for row in tables_of(root, "costs")[-1][1:]]
    for tip in tips["layers"]:
        name, before, after = re.fullmatch(r"(.*): ([\d,]+) → ([\d,]+) OPs", tip).groups()  # type: ignore[union-attr]
        assert [name, before, after] in per_layer
    standing = tables_of(root, "accuracy")[0]
    for tip in tips["landscape"]:
        name, ops, top1 = re.fullmatch(r"(.*): ([\d,]+) OPs, top-1 ([\d.]+) %", tip).groups()  # type: ignore[union-attr]
        assert [name, ops, top1] in [[r[0], r[2], r[3]] for r in standing]
    assert "later.pth" in {row[0] for row in standing}
    sides = tables_of(root, "tensors")
    columns = {(heading, len(table) - 1) for table in sides for heading in table[0]}
    assert ("near zero %", 20) in columns  # 18 binary layers, the first and the last
    assert {("positive %", 18), ("within ±1 %", 18), ("source %", 48), ("Rep %", 48)} <= columns
    bins = next(table for table in sides if table[0][0] == "w / mean |w|")[1:]
    assert sum(float(row[1]) for row in bins) == pytest.approx(100, abs=0.3)
    binary = [w for w in given_values.evidence.weights[0] if w.role.startswith("binary")]
    total = sum(w.count for w in binary)
    assert [float(row[1]) for row in bins] == pytest.approx(
        [100 * sum(w.histogram[b] for w in binary) / total for b in range(48)], abs=0.006
    )
    operations = {cell for table in tables_of(root, "network") for row in table for cell in row}
    assert {"conv1", "bn1", "hardtanh", "linear", "RepBconv"} <= operations
    assert any(name.startswith("run-") for name in charts)
    assert tables_of(root, "runs")[1][0][:2] == ["stage", "epoch"]
    covered = {"ops", "sizes", "layers", "landscape", "weights", "near-zero", "positive", "window", "network"}
    assert {n for n in charts if not n.startswith(("run-", "block-"))} == covered, (
        "a chart that this test knows nothing of"
    )


def test_headings_name_the_columns_that_sort(given_values: ReportInput) -> None:
    root = page_of(given_values)
    sortable = [t for t in root.all("table") if t.attributes.get("class") == "sortable"]
    assert len(sortable) >= 6
    for table in sortable:
        headings = next(table.all("thead")).children[0].children
        widths = {len(row.children) for row in table.all("tr")}
        assert widths == {len(headings)}
        for heading in headings:
            (button,) = heading.children
            assert (button.attributes["role"], button.attributes["tabindex"]) == ("button", "0")


# ---------------------------------------------------------------------------------------------------------------------
# The same every time


def test_same_values_same_page_and_a_date_only_where_it_is_asked_for(given_values: ReportInput) -> None:
    def text(given: ReportInput) -> str:
        return report.page(report.document(report.build(given)))

    plain = text(given_values)
    assert plain == text(dataclasses.replace(given_values))
    dated = text(dataclasses.replace(given_values, timestamp="2031-02-03T04:05:06+00:00"))
    added = dated.replace('<tr><th scope="row">made</th><td>2031-02-03T04:05:06+00:00</td></tr>', "")
    assert added == plain
    made = report.as_dict(report.build(given_values))
    assert json.dumps(made) == json.dumps(report.as_dict(report.build(given_values)))
    assert str(given_values.runs[0].path.parent) not in plain + json.dumps(made), "a report says nothing of its machine"
