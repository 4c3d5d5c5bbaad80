"""`repbnn rules init`: the file says what was found, and unchanged it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from idiom_networks import Net, Sign, conv, generic
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from repbnn_cli import drafts, rules, source, surgery
from repbnn_cli.cli import app
from repbnn_cli.graph.interception import interceptable
from repbnn_cli.source import Origin, Source


class Learned(nn.Module):
    """A flat kernel, scales by filter and shifts by input channel, under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(8 * 8 * 9, 1))
        self.gain, self.shift = nn.Parameter(torch.rand(8, 1, 1) + 0.5), nn.Parameter(torch.rand(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        kernel = Sign.apply(self.weights.view(len(self.gain), -1, 3, 3))
        return F.conv2d(Sign.apply(x - self.shift), kernel, padding=1) * self.gain


class Everything(Net):
    """One of each: foreign and torch layers, a called convolution, a parameter of the block, a module per replica."""

    def build(self) -> None:
        self.conv1, self.bn1, self.act = conv(), nn.BatchNorm2d(8), nn.PReLU(8)
        self.own, self.bn2 = Learned(), nn.BatchNorm2d(8)
        self.kernel, self.scale = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.rand(1, 8, 1, 1))
        self.norm, self.pool = nn.GroupNorm(2, 8), nn.AvgPool2d(2)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.layers = nn.ModuleDict({"a[0]": conv(), "a*": nn.BatchNorm2d(8)})

    def body(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x))) + self.down(x)
        x = self.bn2(self.own(x)) + x * self.scale
        x = self.norm(F.conv2d(Sign.apply(x), Sign.apply(self.kernel), padding=1)) + x
        return self.pool(self.layers["a*"](self.layers["a[0]"](x)))


def everything() -> Source:
    torch.manual_seed(0)
    with interceptable():
        model = generic(Everything())
    return Source(model, Origin(None, "net.py:make", {}, None, ((3, 8, 8),)), reason="written here")


def planned(src: Source, rule_set: rules.RuleSet) -> surgery.Plan:
    return surgery.plan(source.capture(src.model, src.origin, rule_set), rule_set)


@pytest.mark.parametrize("beta", [2, 4])
@pytest.mark.parametrize("base", ["reptran", "bn-before-repeat", "last-layer-2"])
def test_unchanged_it_gives_the_same_plan_and_the_same_tensors(tmp_path: Path, base: str, beta: int) -> None:
    src = everything()
    before = rules.load(base)
    (tmp_path / "mine.yaml").write_text(drafts.draft(src, base, before).text("A title."))
    after = rules.load(tmp_path / "mine.yaml")
    plans = [planned(src, r.with_options(beta=beta)) for r in (before, after)]
    assert [row.as_plain() for row in plans[0].rows()] == [row.as_plain() for row in plans[1].rows()]
    one, other = (surgery.apply(plan).state_dict() for plan in plans)
    assert list(one) == list(other)
    assert all(torch.equal(t, other[n]) for n, t in one.items())


def test_every_module_has_its_role_and_its_evidence() -> None:
    found = drafts.draft(everything(), "reptran", rules.load("reptran"))
    entries = {e.path: e for e in found.entries}
    assert found.decide == ()
    assert entries["own"].declared == {
        "role": "binary_conv",
        "kernel": "weights",
        "kernel_shape": [8, 8, 3, 3],
        "weight_bits": 1,
        "activation_bits": 1,
        "per_channel": {"gain": {"channels": "out", "axis": 0}, "shift": {"channels": "in", "axis": 1}},
    }
    assert entries["act"].declared == {"role": "per_channel", "per_channel": {"weight": {"channels": "in", "axis": 0}}}
    assert entries["conv2d_call"].declared is None
    assert {p for p, e in entries.items() if e.declared is None} == {"conv2d_call"}
    text = found.text("A title.")
    assert all(" ".join(e.evidence.split()) in text for e in found.entries if e.declared is not None)
    assert max(map(len, text.splitlines())) < 200
    assert yaml.safe_load(text)["extends"] == "reptran"


class Odd(nn.Module):
    """Mixes channels with a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, self.table)


class LeftToDecide(Net):
    def build(self) -> None:
        self.conv, self.bn, self.odd = conv(), nn.BatchNorm2d(8), Odd()

    def body(self, x: Tensor) -> Tensor:
        return self.odd(self.bn(self.conv(x)))


def test_what_is_left_to_decide_is_marked() -> None:
    src = Source(generic(LeftToDecide()), Origin(None, "net.py:make", {}, None, ((3, 8, 8),)))
    found = drafts.draft(src, "reptran", rules.load("reptran"))
    text = found.text("A title.")
    assert "# DECIDE: odd: Odd has tensor table (8, 8)" in text
    assert found.decide[0].startswith("odd: Odd has tensor table (8, 8)")
    assert found.decide[1].startswith("transform refuses: ")
    assert "#  - match: {path: odd}" in text
    assert yaml.safe_load(text)["modules"]


NET = """
import torch
from torch import nn

class Binary(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(torch.sign(x), torch.sign(self.weight), None)

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Binary(8, 8, 3, bias=False), nn.BatchNorm2d(8),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    torch.manual_seed(0)
    space: dict[str, object] = {}
    exec(NET, space)
    torch.save(space["make"]().state_dict(), "ckpt.pt")  # type: ignore[operator]
    return tmp_path


def run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_from_the_command_line_to_a_transform(folder: Path) -> None:
    run("rules", "init", "ckpt.pt", "--model", "net.py:make", "-o", "mine.yaml")
    assert "# Binary: 1 module" in (folder / "mine.yaml").read_text()
    plain = [
        json.loads(run("transform", "ckpt.pt", "--model", "net.py:make", "--dry-run", "--json", *more))
        for more in ((), ("--rules", "mine.yaml"))
    ]
    assert plain[0]["plan"] == plain[1]["plan"]


def test_a_file_of_ones_own_as_the_base(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "base.yaml").write_text(
        "extends: reptran\noptions: {beta: 4}\nmodules:\n- match: {path: '2'}\n  role: binary_conv\n"
    )
    run("rules", "init", "ckpt.pt", "--model", "net.py:make", "--rules", "base.yaml", "-o", "sub/mine.yaml")
    text = (folder / "sub/mine.yaml").read_text()
    assert "extends: ../base.yaml" in text
    assert "declared there already" in text
    assert rules.load(folder / "sub/mine.yaml").options.beta == 4


@pytest.mark.parametrize("name", ["irnet_resnet20", "fracbnn_resnet20"])
def test_zoo_networks(name: str, tmp_path: Path) -> None:
    plain = json.loads(run("rules", "init", name, "--json"))
    assert plain["decide"] == []
    assert [m["path"] for m in plain["modules"] if m["role"] == "binary_conv"]
    run("rules", "init", name, "-o", str(tmp_path / "r.yaml"))
    src = Source(source.from_origin(o := Origin(name, None, {}, None, ((3, 32, 32),))), o)
    plans = [planned(src, rules.load(r)) for r in ("reptran", tmp_path / "r.yaml")]
    assert [row.as_plain() for row in plans[0].rows()] == [row.as_plain() for row in plans[1].rows()]
