"""Rules decide what a transform does; a plan says it; what cannot be done is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from merged_reference import assert_identical, both
from networks import BinaryConv, Body, Residual, conv, images, planned, randomize, transformed, written
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import surgery, verify
from repbnn_cli.errors import RulesError, SurgeryError, UsageError


def residual(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Residual(**options))


# ---------------------------------------------------------------------------------------------------------------------
# β that does not divide


def test_beta_that_does_not_divide_names_layer_and_remedy() -> None:
    with pytest.raises(UsageError) as caught:
        planned(residual(width=6), beta=4)
    assert str(caught.value).startswith(
        "conv1: beta 4 does not divide its 6 output channels; possible here: 1, 2, 3, 6"
    )
    assert caught.value.exit_code == 2


def test_beta_has_to_divide_each_group() -> None:
    with pytest.raises(UsageError) as caught:
        planned(Body(nn.Sequential(conv(8, 8, groups=4), nn.BatchNorm2d(8))), beta=4)
    assert "body.0: beta 4 does not divide its 2 output channels of each of its 4 groups" in str(caught.value)
    assert "possible here: 1, 2" in str(caught.value)


def test_way_3_needs_beta_to_divide_the_inputs_of_the_classifier() -> None:
    class Narrow(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = F.hardtanh(self.bn(self.stem(x)))
            x = self.bn1(self.conv1(x)) + x
            return self.narrow(F.adaptive_avg_pool2d(x, 1).flatten(1)[:, :7])

    model = Narrow()
    model.narrow = nn.Linear(7, 5)
    with pytest.raises(UsageError, match=r"^narrow: beta 2 does not divide its 7 inputs \(last_layer: 1_over_beta2\)"):
        planned(model, last_layer="1_over_beta2")


# ---------------------------------------------------------------------------------------------------------------------
# Rules decide


def test_deleting_or_editing_a_rule_changes_the_transform() -> None:
    model = residual()
    edited = written("extends: reptran\nrules:\n  bypass-float-conv: {repeat: after_batch_norm}\n")
    rep = transformed(model, rule=edited)[1]
    assert (rep.bn3.num_features, rep.bn1.num_features) == (8, 16)
    removed = written("extends: reptran\nremove: [bypass-float-conv]\n")
    with pytest.raises(
        SurgeryError, match=r"networks\.py:\d+ \(shortcut\).*no rule says what becomes of this float_conv"
    ):
        planned(model, rule=removed)
    kept = written("extends: reptran\nrules:\n  bypass-float-conv: {apply: keep}\n")
    with pytest.raises(SurgeryError, match=r"\(shortcut\).*mine\.yaml:.*keeps it as it is, but its input is expanded"):
        planned(model, rule=kept)
    nothing = written("extends: reptran\nremove: [first-layer]\n")
    with pytest.raises((SurgeryError, RulesError)):
        planned(model, rule=nothing)


def test_a_rule_for_one_path_wins_over_the_rule_for_all() -> None:
    rules = written(
        "extends: reptran\n"
        "rules:\n"
        "  late: {part: backbone, match: {path: conv2}, apply: rep_conv, repeat: after_batch_norm}\n"
    )
    model = residual()
    plan, rep = transformed(model, rule=rules)
    assert (rep.bn1.num_features, rep.bn2.num_features) == (16, 8)
    rows = {row.path: row for row in plan.rows()}
    assert rows["conv2"].rule == "late"
    assert rows["conv1"].rule == "backbone-binary-conv"
    assert verify.verify(model, plan, rep, gradients=False).passed


def test_two_rules_for_one_module_and_a_rule_for_none_are_errors() -> None:
    clash = written(
        "extends: reptran\n"
        "rules:\n"
        "  one: {part: backbone, match: {path: conv2}, apply: rep_conv}\n"
        "  two: {part: backbone, match: {path: 'conv*2'}, apply: rep_conv}\n"
    )
    with pytest.raises(RulesError, match=r"both claim conv2"):
        planned(residual(), rule=clash)
    idle = written("extends: reptran\nrules:\n  one: {part: backbone, match: {path: conv9}, apply: rep_conv}\n")
    with pytest.raises(RulesError, match=r"matches no module.*'conv9'"):
        planned(residual(), rule=idle)


def test_plan_changes_nothing_and_says_everything() -> None:
    model = residual()
    plan = planned(model)
    rows = {row.path: row for row in plan.rows()}
    rep = surgery.apply(plan)
    for path, row in rows.items():
        assert row.where.startswith("reptran") or "reptran" in row.where
        if row.action == "rep_conv":
            assert row.after == str(tuple(rep.get_submodule(path).weight.shape)).replace("'", "")
    assert {r.action for r in rows.values()} == {
        "repeat_output", "rep_conv", "rep_batch_norm", "per_channel", "select_inputs"
    }  # fmt: skip
    assert {r.part for r in rows.values()} == {"first_layer", "backbone", "bypass", "last_layer"}
    assert rows["shortcut"].part == "bypass"
    assert json.loads(json.dumps([r.as_plain() for r in plan.rows()]))
    changed = {n for n, p in model.state_dict().items() if p.shape != rep.state_dict()[n].shape}
    assert {n.rpartition(".")[0] for n in changed} <= set(rows)


def test_grouped_and_depthwise_convolutions() -> None:
    depthwise = BinaryConv(8, 8, 3, padding=1, groups=8, bias=False)
    convolutions = (conv(8, 8, groups=2), depthwise, conv(8, 8, 1))
    body = nn.Sequential(*(part for c in convolutions for part in (c, nn.BatchNorm2d(8))))
    model = randomize(Body(body))
    plan, rep = transformed(model)
    certificate = verify.verify(model, plan, rep, gradients=True)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    cost = next(c for c in certificate.checks if c.name == "convolution cost unchanged")
    assert cost.values["depthwise"] == ["body.2"]
    assert rep.get_submodule("body.2").weight.shape == (16, 1, 3, 3)
    assert rep.get_submodule("body.2").groups == 16
    assert rep.get_submodule("body.0").weight.shape == (4, 8, 3, 3)
    actual, expected, _ = both(model, rep, images())
    assert_identical(actual, expected)
