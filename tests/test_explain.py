"""`repbnn explain`: what it says of a tensor is checked against the tensor by formulas written out here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Residual, conv, randomize, rule_set, transformed, written
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli.channels import Tiled, concatenated, flattened, plain
from repbnn_cli.cli import run
from repbnn_cli.errors import UsageError
from repbnn_cli.explain import Explainer, Story, Whole
from repbnn_cli.explain.explain_words import made_from, tiled_text
from repbnn_cli.inherit import Columns, runs

ROOT = Path(__file__).resolve().parent.parent


class Concatenating(nn.Module):
    """Two branches concatenated: the expanded stream is [A A B B], not [A B A B]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.bn_a = conv(8, 8), nn.BatchNorm2d(8)
        self.b, self.bn_b = conv(8, 4), nn.BatchNorm2d(4)
        self.c, self.bn_c = conv(12, 12), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        x = torch.cat([self.bn_a(self.a(x)), self.bn_b(self.b(x))], 1)
        return self.fc((self.bn_c(self.c(x)) + x).mean((2, 3)))


def explainer(model: nn.Module, **options: Any) -> Explainer:
    plan, rep = transformed(randomize(model), **options)
    return Explainer(plan, rep)


def story(explained: Explainer, path: str) -> Story:
    told = explained.one(path)
    assert isinstance(told, Story)
    return told


def pairs(source: nn.Module, rep: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    return source.get_parameter(path), rep.get_parameter(path)


# -- what a kernel is made from -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inherit", "said", "filter_of"),
    [
        ("fold", "filters o, o + 4, o + 8, o + 12,", lambda o, r: o + 4 * r),
        ("reshape", "filters 4·o, 4·o + 1, 4·o + 2, 4·o + 3,", lambda o, r: 4 * o + r),
    ],
)
def test_the_filters_it_names_are_those_that_the_kernel_holds(
    inherit: str, said: str, filter_of: Callable[[int, int], int]
) -> None:
    explained = explainer(Residual(), beta=4, inherit=inherit)
    (weight,) = story(explained, "conv2").tensors
    assert (weight.name, weight.before, weight.after) == ("weight", (16, 8, 3, 3), (4, 32, 3, 3))
    assert said in weight.made_from
    assert "input j has that filter's column j mod 8" in weight.made_from
    assert weight.values == "as the transform made them"
    source, rep = pairs(explained.plan.network.module, explained.module, "conv2.weight")
    for o in range(4):
        for j in range(32):
            assert torch.equal(rep[o, j], source[filter_of(o, j // 8), j % 8])


def test_columns_of_a_kernel_behind_a_concatenation() -> None:
    explained = explainer(Concatenating())
    told = story(explained, "c")
    runs = "0–7 ← 0–7, 8–19 ← 0–11, 20–23 ← 8–11"  # [A A B B], as few stretches as say it
    assert told.inputs[0].text == f"expanded channels stand for source channels: {runs}"
    assert told.inputs[0].index == (*range(8), *range(8), *range(8, 12), *range(8, 12))
    assert runs in told.tensors[0].made_from
    source, rep = pairs(explained.plan.network.module, explained.module, "c.weight")
    assert torch.equal(rep[1, 9], source[1 + 6, 1])  # the second copy of channel 1, so the second filter
    assert torch.equal(rep[1, 17], source[1, 9])


@pytest.mark.parametrize(
    ("way", "said", "value"),
    [
        ("all", "column j of 32 is the source's column j mod 16, divided by 2", lambda w, j: w[:, j % 16] / 2),
        ("1_over_beta", "column j of 16 is the source's column j", lambda w, j: w[:, j]),
        ("1_over_beta2", "column j of 8 is the sum of the source's columns j, j + 8", lambda w, j: w[:, j::8].sum(1)),
    ],
)  # fmt: skip
def test_columns_of_the_last_layer(way: str, said: str, value: Callable[[Tensor, int], Tensor]) -> None:
    explained = explainer(Residual(), last_layer=way)
    (weight,) = story(explained, "fc").tensors
    assert said in weight.made_from
    source, rep = pairs(explained.plan.network.module, explained.module, "fc.weight")
    assert torch.equal(rep, torch.stack([value(source, j) for j in range(rep.shape[1])], 1))


def test_values_that_were_trained_since_are_said_to_be() -> None:
    explained = explainer(Residual())
    with torch.no_grad():
        explained.module.get_parameter("bn1.weight").mul_(1.5)
    values = {t.name: t.values for t in story(explained, "bn1").tensors}
    assert values["weight"] == "changed since the transform"
    assert values["bias"] == "as the transform made them"
    fresh = explainer(Residual(), inherit="none")
    assert {t.made_from for t in story(fresh, "conv1").tensors} == {"a fresh start (inherit: none)"}
    assert "a fresh start (inherit: none)" in story(fresh, "act").what
    assert "the source channel's values" not in story(fresh, "act").what
    before = explainer(Residual(), inherit="none", rule="bn-before-repeat")
    assert "the mean of those" not in story(before, "bn1").what


class Tokens(nn.Module):
    """A norm over the channels of tokens, (N, positions, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.c, self.bn, self.fc = conv(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 4)) + x
        return self.fc((self.bn(self.c(x)) + x).mean((2, 3)))


def test_a_norm_of_each_replica_is_not_said_to_take_tokens_for_channels() -> None:
    (taken,) = story(explainer(Tokens()), "norm").inputs
    assert taken.before == taken.after == (16, 8), "replicas are samples there"


# -- words for any map -------------------------------------------------------------------------------------------


def said_index(text: str) -> list[int]:
    """The map that a text describes, read as a person would."""
    if found := re.fullmatch(r"expanded channel j of (\d+) stands for source channel j mod (\d+)", text):
        return [j % int(found[2]) for j in range(int(found[1]))]
    index: dict[int, int] = {}
    for start, stop, source in re.findall(r"(\d+)(?:–(\d+))? ← (\d+)", text):
        for j in range(int(start), int(stop or start) + 1):
            index[j] = int(source) + j - int(start)
    return [index[j] for j in range(len(index))]


tiled = st.builds(plain, st.integers(1, 6), st.integers(2, 3))


@given(st.lists(tiled, min_size=1, max_size=3), st.integers(1, 3))
def test_a_map_in_words_is_the_map(parts: list[Tiled], positions: int) -> None:
    state = flattened(concatenated(parts), positions)
    text = tiled_text(state)
    if "runs in all" in text:
        assert len(runs(state.index)) > 6
        assert said_index(text) == list(state.index[: len(said_index(text))])
    else:
        assert said_index(text) == list(state.index)


def test_sums_of_columns_in_words() -> None:
    assert made_from(Columns(((0, 2), (1, 3)))) == "column j of 2 is the sum of the source's columns j, j + 2"
    assert made_from(Columns(((1, 3), (0, 2)))) == "2 columns, each the sum of 2 of the source's (the first of 1 + 3)"


# -- roles, rules, neighbours ----------------------------------------------------------------------------------


def test_a_module_has_its_rule_role_channels_and_neighbours() -> None:
    told = story(explainer(Residual()), "conv1")
    assert (told.role, told.part, told.rule, told.position) == (
        "binary_conv",
        "backbone",
        "backbone-binary-conv",
        "trunk",
    )
    assert told.where.endswith(f"reptran.yaml:{line_of('backbone-binary-conv:')}")
    assert "1-bit weights" in told.evidence
    assert told.output is not None
    assert (told.output.before, told.output.after) == ((8, 8, 8), (4, 8, 8))
    assert told.output.text.endswith(
        "channel j of 16 is convolution channel j mod 4 and stands for source channel j mod 8"
    )
    why = {n.path: n.why for n in told.with_it}
    assert why == {"bn": "input", "bn1": "behind"}


def test_a_batch_norm_before_the_repeat_is_said_to_be_there() -> None:
    explained = explainer(Residual(), rule="bn-before-repeat")
    told = story(explained, "bn1")
    assert (told.before, told.after) == ("(8)", "(4)")
    assert told.what.startswith("stands before the repeat")
    assert {t.made_from for t in told.tensors} == {"entry o is the mean of the source's entries o, o + 4"}
    source, rep = pairs(explained.plan.network.module, explained.module, "bn1.weight")
    assert torch.allclose(rep, (source[:4] + source[4:]) / 2)


def test_the_other_side_of_a_sum_is_named() -> None:
    why = {n.path: n.why for n in story(explainer(Residual()), "conv2").with_it}
    assert why["bn3"] == "sum"
    assert why["bn2"] == "behind"


def test_what_training_alone_calls_is_said_to_be() -> None:
    class Auxiliary(Residual):
        def forward(self, x: Tensor) -> Any:
            x = self.bn1(self.conv1(F.hardtanh(self.bn(self.stem(x)))))
            y = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
            return (y, self.fc2(self.bn2(self.conv2(x)).mean((2, 3)))) if self.training else y

    model = Auxiliary()
    model.fc, model.fc2 = nn.Linear(8, 5), nn.Linear(16, 5)
    explained = explainer(model)
    for path, alone in (("conv1", False), ("bn2", True), ("conv2", True), ("fc2", True)):
        told = story(explained, path)
        assert (told.kind, told.evidence.endswith("; in training mode alone the forward gets there")) == (
            "module",
            alone,
        )


def line_of(text: str) -> int:
    lines = (ROOT / "rules" / "reptran.yaml").read_text("utf-8").splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.strip() == text)


def test_what_a_rule_keeps_and_what_nothing_reaches() -> None:
    explained = explainer(
        Residual(),
        rule=written("extends: reptran\nrules:\n  mine:\n    part: last_layer\n    match: {path: fc}\n"
                     "    apply: select_inputs\n    share: 1_over_beta\n"),
    )  # fmt: skip
    assert story(explained, "fc").rule == "mine"
    assert story(explained, "fc").where == "mine.yaml:3"
    still = explainer(Residual(), beta=1)
    assert story(still, "conv1").what == "with β = 1 nothing is repeated"
    assert isinstance(still.whole(), Whole)
    assert {g.part for g in still.whole().groups} == {"unchanged"}


def test_the_whole_story_has_every_changed_module_once() -> None:
    explained = explainer(Concatenating())
    groups = explained.whole().groups
    told = [p for g in groups if g.part != "unchanged" for p in g.paths]
    assert sorted(told) == sorted(e.path for e in explained.plan.edits)
    assert list(dict.fromkeys(g.part for g in groups)) == ["first_layer", "backbone", "last_layer"]


def test_paths_of_tensors_operators_and_blocks() -> None:
    explained = explainer(Residual())
    assert story(explained, "bn1.running_mean").path == "bn1"
    operator = next(p for p in explained.nodes if p.startswith(":add"))
    told = story(explained, operator)
    assert (told.kind, told.changed) == ("operator", False)
    assert "networks.py:" in told.evidence

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.unused = Residual(), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.inner(x))

    outer = explainer(Outer())
    block = outer.one("inner")
    assert isinstance(block, Whole)
    assert {p for g in block.groups for p in g.paths} >= {"inner.conv1", "inner.fc"}
    assert "never called" in story(outer, "unused").what
    with pytest.raises(UsageError, match=r"conv1: the network has no such module; it has inner\.conv1"):
        outer.one("conv1")


# -- the command -----------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = str(ROOT / "checkpoints" / "irnet_resnet20_cifar10.pth")
    assert run(["transform", checkpoint, "-o", "r.repbnn.pt"]) == 0
    capsys.readouterr()
    for command in (["explain", "r.repbnn.pt"], ["explain", "r.repbnn.pt", "layer3.0.conv1"]):
        assert run(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert run([*command, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["options"] == {"beta": 2, "inherit": "fold", "last_layer": "all"}
    assert told["module"]["where"] == f"rules/reptran.yaml:{line_of('backbone-binary-conv:')}"
    assert told["module"]["tensors"][0]["made_from"].startswith("filter o is made from the source's filters o, o + 32,")
    assert told["module"]["inputs"][0]["index"] == [j % 32 for j in range(64)]
    assert run(["explain", "r.repbnn.pt", "layer3.0.conv7"]) == 2
    assert "nearest: layer3.0.conv" in capsys.readouterr().err
    assert run(["explain", checkpoint]) == 2
    assert "is not a result of `repbnn transform`" in capsys.readouterr().err


def test_rules_can_be_read_where_they_were_written() -> None:
    assert rule_set().rules[0].where.endswith(".yaml:22")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c, self.norm = conv(8, 8), nn.BatchNorm2d(8)
        self.last = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.c(self.bn(self.stem(x))))
        return self.last(x.mean(2).transpose(1, 2))[0][:, -1]


def test_what_takes_one_replica_is_told_what_it_takes() -> None:
    told = story(explainer(Recurrent(), last_layer="1_over_beta"), "last")
    assert "takes one of the 2 replicas and stays as it is" in told.what
    assert [(m.before, m.after, m.index) for m in told.inputs] == [((8, 8), (8, 8), None)]
