"""Rule sets: what the shipped files say, how files extend each other, and which rule claims which module."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from rule_examples import NETWORK, claims, rule, subject

from repbnn_cli import rules
from repbnn_cli.errors import RulesError, UsageError
from repbnn_cli.rules import RuleSet, rule_files, rule_models

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (
    "bn-before-repeat",
    "full-precision",
    "last-layer-1",
    "last-layer-2",
    "last-layer-3",
    "reptran",
    "reptran-released",
)
REP_CONVS = (
    "backbone-binary-conv",
    "backbone-float-conv",
    "backbone-linear",
    "bypass-float-conv",
    "bypass-binary-conv",
)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Shipped files


def by_name(rule_set: RuleSet) -> dict[str, rules.Rule]:
    return {r.name: r for r in rule_set.rules}


def test_the_shipped_files_are_listed_with_their_summaries() -> None:
    listed = rules.names()
    assert tuple(listed) == SHIPPED
    for name, summary in listed.items():
        assert rules.load(name).name == name
        assert summary


def test_reptran_is_the_paper() -> None:
    reptran = rules.load("reptran")
    assert reptran.options.model_dump() == {"beta": 2, "inherit": "fold", "last_layer": "all"}
    assert {r.part for r in reptran.rules} == {"first_layer", "backbone", "bypass", "last_layer"}
    assert all(r.repeat == "before_batch_norm" for r in reptran.rules if r.apply in ("rep_conv", "repeat_output"))
    assert claims(reptran) == {
        "conv1": "first-layer",
        "bn1": "backbone-per-channel",
        "layer1.0.conv1": "backbone-binary-conv",
        "layer1.0.bn1": "backbone-per-channel",
        "layer1.0.act": "backbone-per-channel",
        "layer1.0:add": "bypass-weightless",
        "layer1.0.down": "bypass-float-conv",
        "fc": "last-layer",
    }


@pytest.mark.parametrize("role", ["binary_conv", "float_conv", "depthwise_conv", "binary_linear", "float_linear"])
@pytest.mark.parametrize("position", ["first", "trunk", "bypass", "last"])
def test_reptran_claims_every_convolution_wherever_it_stands(role: str, position: str) -> None:
    ends = tuple(s for s in NETWORK if s.position in ("first", "last"))
    expected = {"first": "first-layer", "last": "last-layer"}.get(position)
    claimed = rules.load("reptran").assign((*ends, subject("x", role, position)))["x"]
    assert claimed.name == expected or (expected is None and claimed.apply in ("rep_conv", "tile"))


def test_the_released_network_differs_in_two_places() -> None:
    paper, released = by_name(rules.load("reptran")), by_name(rules.load("reptran-released"))
    assert released["first-layer"].repeat == "after_batch_norm"
    assert released["bypass-weightless"].align == "position"
    assert [n for n in paper if paper[n] != released[n]] == ["first-layer", "bypass-weightless"]


def test_the_ablations_change_what_they_ablate() -> None:
    paper = rules.load("reptran")
    for way, share in enumerate(("all", "1_over_beta", "1_over_beta2"), start=1):
        ablation = rules.load(f"last-layer-{way}")
        assert ablation.options.last_layer == share
        assert ablation.rules == paper.rules
    before = by_name(rules.load("bn-before-repeat"))
    assert {n for n, r in before.items() if r != by_name(paper)[n]} == set(REP_CONVS)
    assert {r.repeat for r in before.values() if r.apply == "rep_conv"} == {"after_batch_norm"}


def test_full_precision_is_for_float_networks() -> None:
    full = rules.load("full-precision")
    network = tuple(s for s in NETWORK if s.role != "binary_conv")
    with pytest.raises(RulesError, match=r"^rules/reptran.yaml:\d+ rules.backbone-float-conv.match: matches no"):
        full.assign(network)
    network = (*network, subject("layer1.0.conv1", "float_conv", "trunk"), subject("odd", "binary_conv", "trunk"))
    claimed = claims(full, network)
    assert claimed["layer1.0.conv1"] == "backbone-float-conv"
    assert claimed["layer1.0.down"] == "bypass-float-conv"
    assert "odd" not in claimed


def test_the_files_are_found_where_an_installation_has_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path, "other.yaml", "extends: reptran\n")
    monkeypatch.setattr(rule_files.resources, "files", lambda package: tmp_path)
    assert list(rule_files.shipped()) == ["other"]
    monkeypatch.setattr(rule_files.resources, "files", lambda package: tmp_path / "nothing")
    with pytest.raises(RulesError, match="missing from this installation"):
        rule_files.shipped()


def test_importing_rules_does_not_import_torch() -> None:
    code = "import sys, repbnn_cli.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# The language: schema and reference


def test_the_published_schema_is_the_generated_one() -> None:
    published = (ROOT / "rules" / "schema.json").read_text(encoding="utf-8")
    assert published == rules.schema_text(), "write it again: rules/README.md, at the end"
    assert json.loads(published) == rules.schema()


def test_the_schema_accepts_no_null() -> None:
    assert "null" not in rules.schema_text()


def models() -> list[type[BaseModel]]:
    return [m for m in vars(rule_models).values() if isinstance(m, type) and issubclass(m, rule_models._Model)]


def test_the_reference_names_every_key_and_every_value() -> None:
    reference = (ROOT / "rules" / "README.md").read_text(encoding="utf-8")
    code = set(re.findall(r"[\w-]+", " ".join(re.findall(r"`[^`\n]+`", reference))))
    keys = {f.alias or name for m in models() for name, f in m.model_fields.items()}
    assert not keys - code
    kinds = ("Part", "Role", "Position", "Action", "Repeat", "Share", "Inherit", "Cached")
    assert not {value for kind in kinds for value in getattr(rule_models, kind).__args__} - code
    assert not set(SHIPPED) - code


def test_the_reference_s_examples_are_valid() -> None:
    reference = (ROOT / "rules" / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", reference, re.DOTALL)
    ten_lines, values, selectors = (rules.loads(text) for text in examples)
    assert len(examples[0].splitlines()) <= 10
    declared = ten_lines.declare("layer1.0.conv1", ("BinarizeConv2d", "nets.BinarizeConv2d"))
    assert declared is not None
    assert declared.kernel == "weights"
    assert values.options.model_dump() == {"beta": 4, "inherit": "fold", "last_layer": "all"}
    assert by_name(values)["first-layer"].repeat == "after_batch_norm"
    assert by_name(values)["last-layer"].match.position == ()
    assert by_name(values)["bypass-float-conv"].repeat is None
    network = (
        subject("a", "binary_conv", "trunk"),
        subject("b", "binary_conv", "trunk", "MyConv"),
        subject("stem.2", "binary_conv", "trunk", "MyConv"),
    )
    assert claims(selectors, network) == {"a": "all", "b": "mine", "stem.2": "stem2"}


# ---------------------------------------------------------------------------------------------------------------------
# Values: flags > the file > the file it extends > defaults


def test_precedence_of_values(tmp_path: Path) -> None:
    write(
        tmp_path, "base.yaml", f"options: {{beta: 4, inherit: reshape}}\nrules: {{a: {rule('{role: binary_conv}')}}}\n"
    )
    mine = rules.load(write(tmp_path, "mine.yaml", "extends: base.yaml\noptions: {beta: 8}\n"))
    assert mine.options.beta == 8  # the file over the one it extends
    assert mine.options.inherit == "reshape"  # the extended file over the default
    assert mine.options.last_layer == "all"  # the default
    flagged = mine.with_options(beta=2, last_layer="1_over_beta")
    assert flagged.options.model_dump() == {"beta": 2, "inherit": "reshape", "last_layer": "1_over_beta"}
    assert yaml.safe_load(flagged.text)["options"] == flagged.options.model_dump()
    assert mine.options.beta == 8
    assert mine.with_options() == mine


def test_a_default_that_is_written_out_still_wins_over_the_extended_file(tmp_path: Path) -> None:
    write(
        tmp_path, "base.yaml", f"options: {{beta: 4}}\nrules: {{a: {rule('{role: binary_conv}', 'optional: true')}}}\n"
    )
    mine = "extends: base.yaml\noptions: {beta: 2}\nrules: {a: {optional: false}}\n"
    loaded = rules.load(write(tmp_path, "mine.yaml", mine))
    assert loaded.options.beta == 2
    assert not loaded.rules[0].optional


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"beta": 0}, "beta: found 0; expected at least 1"),
        ({"beta": True}, "beta: found true; expected a whole number"),
        ({"inherit": "fol"}, "inherit: unknown value 'fol'; expected one of fold, reshape, none; nearest: fold"),
        ({"last_layer": "2"}, "last_layer: unknown value '2'; expected one of all, 1_over_beta, 1_over_beta2"),
    ],
)
def test_wrong_flags(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        rules.load("reptran").with_options(**flags)
    assert str(error.value) == message


def test_rules_merge_per_name_and_per_key(tmp_path: Path) -> None:
    text = "extends: reptran\nrules:\n  last-layer: {match: {path: head}}\n  first-layer: {repeat: after_batch_norm}\n"
    loaded = rules.load(write(tmp_path, "mine.yaml", text))
    paper, mine = by_name(rules.load("reptran")), by_name(loaded)
    assert list(paper) == list(mine)
    assert mine["last-layer"].apply == "select_inputs"  # inherited
    assert mine["last-layer"].match.position == ()  # one value, replaced whole
    assert mine["first-layer"].match == paper["first-layer"].match


def test_where_is_the_last_file_that_wrote_match_or_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        "extends: reptran\nrules:\n  last-layer: {match: {path: head}}\n  first-layer:\n    repeat: after_batch_norm\n"
    )
    write(tmp_path, "mine.yaml", text)
    mine = by_name(rules.load("mine.yaml"))
    assert mine["last-layer"].where == "mine.yaml:3"
    line = (ROOT / "rules" / "reptran.yaml").read_text(encoding="utf-8").splitlines().index("  first-layer:") + 1
    assert mine["first-layer"].where == f"rules/reptran.yaml:{line}"
    assert by_name(rules.loads(rules.load("reptran").text))["first-layer"].where.startswith("<stored rules>:")


def test_a_chain_is_relative_to_each_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab" / "deep").mkdir(parents=True)
    write(tmp_path, "base.yaml", f"rules:\n  a: {rule('{role: binary_conv}')}\n")
    write(tmp_path / "lab", "middle.yaml", "extends: ../base.yaml\noptions: {beta: 4}\n")
    write(tmp_path / "lab" / "deep", "mine.yaml", "extends: ../middle.yaml\nsummary: mine\n")
    loaded = rules.load("lab/deep/mine.yaml")
    assert (loaded.name, loaded.summary, loaded.options.beta) == ("mine", "mine", 4)
    assert loaded.source == "lab/deep/mine.yaml"
    assert loaded.rules[0].where == "base.yaml:2"


def test_a_bare_shipped_name_means_the_shipped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "reptran", f"rules: {{a: {rule('{role: binary_conv}')}}}\n")
    assert len(rules.load("reptran").rules) > 1
    assert len(rules.load("./reptran").rules) == 1
    assert len(rules.load(tmp_path / "reptran").rules) == 1


def test_remove_comes_before_the_file_s_own_rules() -> None:
    text = "extends: reptran\nremove: [backbone-float-conv, bypass-float-conv]\nrules:\n  bypass-float-conv: "
    mine = by_name(rules.loads(text + rule("{path: down}")))
    assert "backbone-float-conv" not in mine
    assert mine["bypass-float-conv"].part == "backbone"  # nothing of the removed one is left
    assert not mine["bypass-float-conv"].optional


def test_an_inherited_key_that_the_new_action_does_not_have_is_left_out() -> None:
    mine = by_name(rules.loads("extends: reptran\nrules: {backbone-binary-conv: {apply: keep}}"))
    assert mine["backbone-binary-conv"].repeat is None


def test_module_entries_are_added_or_changed_by_their_match(tmp_path: Path) -> None:
    base = "extends: reptran\nmodules:\n  - {match: {type: A}, role: binary_conv, kernel: w, weight_bits: 2}\n"
    write(tmp_path, "base.yaml", base)
    more = "  - {match: {type: [A]}, kernel: v}\n  - {match: {path: x}, leaf: true}\n"
    first, second = rules.load(write(tmp_path, "mine.yaml", "extends: base.yaml\nmodules:\n" + more)).modules
    assert (first.role, first.kernel, first.weight_bits) == ("binary_conv", "v", 2)
    assert second.match.path == ("x",)
    text = "extends: base.yaml\nmodules: [{match: {type: A}, role: batch_norm}]\n"
    (changed,) = rules.load(write(tmp_path, "other.yaml", text)).modules
    assert (changed.kernel, changed.weight_bits) == (None, None)  # not of that role: left out


def test_deleting_or_editing_a_rule_changes_who_claims_what() -> None:
    shipped = yaml.safe_load((ROOT / "rules" / "reptran.yaml").read_text(encoding="utf-8"))
    before = rules.load("reptran").assign(NETWORK)
    for name in list(shipped["rules"]):
        fewer = dict(shipped, rules={n: r for n, r in shipped["rules"].items() if n != name})
        after = rules.loads(yaml.safe_dump(fewer)).assign(NETWORK)
        assert {p for p in before if p not in after} == {p for p, r in before.items() if r.name == name}
    shipped["rules"]["bypass-float-conv"]["repeat"] = "after_batch_norm"
    after = rules.loads(yaml.safe_dump(shipped)).assign(NETWORK)
    assert {p for p in before if before[p] != after[p]} == {"layer1.0.down"}


def test_anchors_and_merge_keys() -> None:
    text = """
extends: reptran
rules:
  one: &one {part: backbone, match: {path: a}, apply: rep_conv, optional: true}
  two: {<<: *one, match: {path: b}}
  three: {<<: [*one], apply: keep, match: {path: c}}
"""
    mine = by_name(rules.loads(text))
    assert (mine["two"].match.path, mine["two"].apply, mine["two"].optional) == (("b",), "rep_conv", True)
    assert mine["three"].apply == "keep"


# ---------------------------------------------------------------------------------------------------------------------
# The resolved text


@pytest.mark.parametrize("name", SHIPPED)
def test_the_resolved_text_gives_the_rule_set_back(name: str) -> None:
    loaded = rules.load(name)
    again = rules.loads(loaded.text)
    assert again == loaded
    assert again.text == loaded.text
    assert "extends" not in loaded.text


def test_comments_order_of_keys_and_folder_do_not_change_the_text(tmp_path: Path) -> None:
    written = "name: x\nrules:\n  a:\n    apply: tile   # why\n    match: {role: weightless}\n    part: bypass\n"
    short = "rules: {a: {part: bypass, match: {role: [weightless]}, apply: tile, optional: false}}"
    loaded = rules.load(write(tmp_path, "x.yaml", short))
    assert rules.loads(written).text == loaded.text
    assert rules.loads(written) == loaded
    assert str(tmp_path) not in loaded.text
