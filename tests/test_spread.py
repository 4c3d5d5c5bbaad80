"""`finetune --spread`: a fresh RepBNN whose copies start with thresholds of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from networks import Residual, transformed
from train_examples import OWN_NETWORK, own_network

from repbnn_cli.cli import run
from repbnn_cli.errors import UsageError
from repbnn_cli.rep_layers import RepBatchNorm2d
from repbnn_cli.train.inheritance import spread_shifts


@pytest.mark.parametrize("beta", [2, 4])
def test_the_copies_are_set_apart_and_replicas_of_a_channel_on_either_side(beta: int) -> None:
    rep = transformed(Residual(), beta=beta, inherit="none")[1]
    before = {name: tensor.clone() for name, tensor in rep.state_dict().items()}
    spread_shifts(rep, 0.5)
    norms = {f"{n}.bias": m for n, m in rep.named_modules() if isinstance(m, RepBatchNorm2d) and m.repeats == beta**2}
    assert len(norms) == 3
    for name, tensor in rep.state_dict().items():
        if name not in norms:
            assert torch.equal(tensor, before[name]), name  # the first layer's copies, too
            continue
        copies = tensor.view(beta**2, -1)  # (copy, channel of the convolution)
        assert torch.equal(copies, copies[:, :1].expand_as(copies))
        assert copies[:, 0].sort().values.tolist() == pytest.approx(torch.linspace(-0.5, 0.5, beta**2).tolist())
        replicas = tensor.view(beta, -1)  # (replica, source channel)
        torch.testing.assert_close(replicas.sum(0), torch.zeros(replicas.shape[1]))
        assert (replicas.amin(0) < 0).all()
        assert (replicas.amax(0) > 0).all()


def test_the_copies_then_cross_zero_at_different_inputs() -> None:
    """A convolution channel of one value: how many of its copies are positive counts up with the value."""
    rep = transformed(Residual(), inherit="none")[1]
    spread_shifts(rep, 0.75)
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).view(-1, 1, 1, 1).expand(-1, 4, 1, 1)
    positive = (rep.bn1.eval()(values) > 0).sum(1).flatten() // 4
    assert positive.tolist() == [0, 1, 2, 3, 4]


def test_a_network_without_repeating_norms_has_nothing_to_spread() -> None:
    rep = transformed(Residual(), rule="bn-before-repeat", inherit="none")[1]
    with pytest.raises(UsageError, match="--spread: no BatchNorm of this network repeats a RepConv's output"):
        spread_shifts(rep, 0.5)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    Path("net.py").write_text(OWN_NETWORK)
    torch.save(own_network().state_dict(), "own.pt")
    own = ["--model", "net.py:make"]
    for inherit in ("none", "fold"):
        start = ["transform", "own.pt", *own, "--input-size", "3x32x32", "--inherit", inherit, "-o", f"{inherit}.pt"]
        assert run(start) == 0
    quick = ["--data", "digits", "--set", "augmentation=none", "--set", "batch=256", "--epochs", "1", "--spread", "0.5"]
    tip = "a short run gains from --spread 0.75"
    assert run(["finetune", "none.pt", *own, *quick[:-2], "--run-dir", "plain"]) == 0
    assert tip in capsys.readouterr().err
    assert run(["finetune", "none.pt", *own, *quick, "--run-dir", "r"]) == 0
    assert tip not in capsys.readouterr().err
    rows = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1]
    trained = torch.load("r/checkpoints/best.pt", weights_only=True)["training"]
    assert trained["inherited"] == {"spread": 0.5}
    capsys.readouterr()
    assert run(["report", "r/checkpoints/best.pt", *own, "--markdown"]) == 0
    assert "BatchNorm shifts of the copies started apart, from -0.5 to 0.5" in capsys.readouterr().out
    for again in ("fold.pt", "r/checkpoints/best.pt"):
        assert run(["finetune", again, *own, *quick, "--run-dir", "s"]) == 2
        assert "error: --spread: is for a RepBNN that starts afresh" in capsys.readouterr().err
    assert not Path("s").exists()
