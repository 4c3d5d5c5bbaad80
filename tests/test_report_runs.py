"""Training runs in reports: curves are the rows of metrics.jsonl, states and distances are right, damage is said."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from drawings import axis, read
from train_examples import OWN_NETWORK, own_network, run, tiny, toy

from repbnn_cli import cli, report, runs
from repbnn_cli.binary_conv import GatedConv2d
from repbnn_cli.errors import StoppedError
from repbnn_cli.report.document import Block, Code, Figures, Folded, Items, Line, Strong, Table
from repbnn_cli.runs import Progress
from repbnn_cli.train import engine, recipes
from repbnn_cli.train.inheritance import Preparation

PUBLISHED = "published={irnet_resnet20: {table: Table 7, raw: 86.5, rep: 87.6}}"
ABOUT = {"name": "net", "arch": "irnet_resnet20", "beta": 2, "target": "rep.pt", "sha256": "ab", "source_top1": 62.4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """done: three epochs and what was before them; two: two stages; stopped: in its second epoch; other/done: a name
    that is there twice."""
    root = tmp_path_factory.mktemp("runs")
    bars = dataclasses.replace(toy(), name="cifar10")
    run(root / "done", PUBLISHED, "data=cifar10", dataset=bars, about=ABOUT, seed=3, prepare=Preparation(2))
    run(root / "other" / "done", "epochs=1", "schedule.warmup=0")
    made = recipes.override(recipes.load("fracbnn-cifar10"), ["batch=16", "iterations=6", "schedule={name: linear}"])
    engine.finetune(tiny(conv=GatedConv2d), toy(), made, root / "two")

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.batch) == (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        run(root / "stopped", on_step=stop, options=engine.Options(log_every=1))
    return root


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def blocks_of(*found: Path) -> list[Block]:
    document = report.runs_document([runs.read(f) for f in found], "runs")
    return [block for section in document.sections for block in walk(section.blocks)]


def walk(blocks: Any) -> Iterator[Block]:
    for block in blocks:
        yield block
        if isinstance(block, Folded):
            yield from walk(block.blocks)


def plain(line: Line) -> str:
    if isinstance(line, tuple):
        return "".join(map(plain, line))
    return line.text if isinstance(line, Code | Strong) else line


def tables(*found: Path) -> list[list[dict[str, str]]]:
    return [
        [dict(zip(block.headings, map(plain, row), strict=True)) for row in block.rows]
        for block in blocks_of(*found)
        if isinstance(block, Table)
    ]


def curves(name: str, *found: Path) -> list[list[tuple[float, float]]]:
    """The curves of a chart, by what its axes say, in the order of its legend."""
    plots = [p for block in blocks_of(*found) if isinstance(block, Figures) for p in block.plots]
    (plot,) = (p for p in plots if p.name == name)
    assert isinstance(plot, report.Plot)
    shapes = read(plot)
    across, up = axis(shapes, vertical=False), axis(shapes, vertical=True)
    paths = [s for s in shapes if s.tag == "path"]
    return [[(across(x), up(y)) for x, y in path.corners] for path in reversed(paths)]


def near(rows: list[tuple[float, float]]) -> list[Any]:
    reach = max(y for _, y in rows) - min(y for _, y in rows)
    return [(pytest.approx(x, abs=0.02), pytest.approx(y, abs=0.02 * reach + 1e-3)) for x, y in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Curves and tables


def test_curves_are_the_rows_of_the_metrics(folders: Path) -> None:
    rows = metrics(folders / "done")
    assert [r["epoch"] for r in rows] == [0, 1, 2, 3]
    trained = [r for r in rows if r["epoch"]]
    train, test = curves("run-top1", folders / "done")
    assert train == near([(r["epoch"], r["train_top1"]) for r in trained])
    assert test == near([(r["epoch"], r["test_top1"]) for r in rows])
    train, test = curves("run-loss", folders / "done")
    assert train == near([(r["epoch"], r["loss"]) for r in trained])
    assert test == near([(r["epoch"], r["test_loss"]) for r in rows])
    (flips,) = curves("run-flips", folders / "done")
    assert flips == near([(r["epoch"], 100 * fmean(r["flips"].values())) for r in trained])
    assert max(y for _, y in flips) > 0


def test_the_epochs_are_a_table_too(folders: Path) -> None:
    rows, table = metrics(folders / "done"), tables(folders / "done")[1]
    assert [(r["stage"], r["epoch"], r["test top-1"]) for r in table] == [
        (r["stage"], str(r["epoch"]), f"{r['test_top1']:.4g}") for r in rows
    ]
    assert [r["loss"] for r in table] == ["", *(f"{r['loss']:.4g}" for r in rows[1:])]
    assert [r["flipped %"] for r in table][1:] == [f"{100 * fmean(r['flips'].values()):.2f}" for r in rows[1:]]


def test_a_run_says_what_it_reached_and_how_far_from_the_paper_that_is(folders: Path) -> None:
    rows = metrics(folders / "done")
    best = max(r["test_top1"] for r in rows if r["epoch"])
    (row,) = tables(folders / "done")[0]
    assert row == {
        "run": "done", "network": "net, β = 2", "data": "cifar10", "recipe": "toy", "seed": "3", "epochs": "3 of 3",
        "source": "62.40", "before": f"{rows[0]['test_top1']:.2f}", "best": f"{best:.2f}",
        "last": f"{rows[-1]['test_top1']:.2f}", "paper": "87.60", "Δ paper": f"{best - 87.6:+.2f}",
    }  # fmt: skip
    (items,) = (b for b in blocks_of(folders / "done") if isinstance(b, Items))
    first = next(r["epoch"] for r in rows if r["epoch"] and r["test_top1"] == best)
    (said,) = map(plain, items.lines)
    assert said.startswith(f"done: finished; best after epoch {first}; the paper's figure is of Table 7")
    plots = [p for b in blocks_of(folders / "done") if isinstance(b, Figures) for p in b.plots]
    assert "paper: 87.6" in {s.words for s in read(plots[0])}  # type: ignore[arg-type]


def test_an_unfinished_run_is_said_to_be_one(folders: Path) -> None:
    (row,) = tables(folders / "stopped")[0]
    assert (row["epochs"], row["before"], row["paper"], row["Δ paper"]) == ("1 of 3", "", "", "")
    page = report.page(report.runs_document([runs.read(folders / "stopped")], "stopped"))
    assert "unfinished: goes on at stage train, epoch 2 of 3, batch 4" in page
    (plot,) = (p for b in blocks_of(folders / "stopped") if isinstance(b, Figures) for p in b.plots
               if p.name == "run-top1")  # fmt: skip
    assert len([s for s in read(plot) if s.tag == "circle"]) == 2, "a point of training and one of the test"  # type: ignore[arg-type]


def test_stages_follow_one_another(folders: Path) -> None:
    rows = metrics(folders / "two")
    assert [(r["stage"], r["epoch"]) for r in rows] == [
        ("activations", 1), ("activations", 2), ("kernels", 1), ("kernels", 2),
    ]  # fmt: skip
    _, test = curves("run-top1", folders / "two")
    assert test == near([(float(i), r["test_top1"]) for i, r in enumerate(rows, 1)])
    (row,) = tables(folders / "two")[0]
    assert row["epochs"] == "4 of 4"
    assert row["best"] == f"{max(r['test_top1'] for r in rows[2:]):.2f}", (
        "of the last stage: only it has binary kernels"
    )
    assert "stages one after the other" in report.page(report.runs_document([runs.read(folders / "two")], "two"))
    assert [r["stage"] for r in tables(folders / "two")[1]] == ["activations", "activations", "kernels", "kernels"]


def test_runs_of_one_name_are_told_apart(folders: Path) -> None:
    both = folders / "done", folders / "other" / "done"
    assert [r["run"] for r in tables(*both)[0]] == [f"{folders.name}/done", "other/done"]
    assert len(curves("run-top1", *both)) == 4


def test_runs_of_one_name_in_folders_of_one_name_are_told_apart(folders: Path, tmp_path: Path) -> None:
    for name, figure in (("raw", 86.5), ("rep", 87.6), ("own", None)):
        shutil.copytree(folders / "done", tmp_path / name / "sweep" / "done")
        file = tmp_path / name / "sweep" / "done" / "environment.json"
        about = json.loads(file.read_text())
        about["stages"][-1] |= {"published": figure, "table": "Table 7"}
        file.write_text(json.dumps(about))
    both = [tmp_path / name / "sweep" / "done" for name in ("raw", "rep")]
    assert [r["run"] for r in tables(*both)[0]] == ["raw/sweep/done", "rep/sweep/done"]
    # One line named "paper" would be true of one of them.
    own = tmp_path / "own" / "sweep" / "done"
    shown = []
    for found in (both, [both[0], own], both[:1]):
        plots = [p for block in blocks_of(*found) if isinstance(block, Figures) for p in block.plots]
        shown += ["paper: " in p.body for p in plots if isinstance(p, report.Plot) and p.name == "run-top1"]
    assert shown == [False, False, True]


def test_what_is_not_a_number_has_no_point(folders: Path, tmp_path: Path) -> None:
    copy = copied(folders / "done", tmp_path)
    rows = metrics(copy)
    rows[2]["test_loss"] = float("nan")
    rows[3]["loss"] = float("inf")
    (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    train, test = curves("run-loss", copy)
    assert ([round(x) for x, _ in train], [round(x) for x, _ in test]) == ([1, 2], [0, 1, 3])
    assert json.dumps(report.runs_as_list([runs.read(copy)]), allow_nan=False)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def copied(folder: Path, into: Path) -> Path:
    for file in folder.rglob("*"):
        if file.is_file():
            there = into / folder.name / file.relative_to(folder)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(file.read_bytes())
    return into / folder.name


def test_a_folder_of_runs_is_reported_in_every_format(folders: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = copied(folders / "done", tmp_path)
    copied(folders / "stopped", tmp_path / "more")
    copied(folders / "two", tmp_path / "more")
    assert cli.run(["report", str(done), "--runs", "more", "--markdown", "-o", "r.md"]) == 0
    assert cli.run(["report", str(done), "--runs", "more", "--html", "-o", "r.html"]) == 0
    assert cli.run(["report", str(done), "--runs", "more", "--json", "-o", "r.json"]) == 0
    found = json.loads(Path("r.json").read_text())["runs"]
    assert [r["path"] for r in found] == ["done", "stopped", "two"]
    assert found[0]["rows"] == metrics(done)
    assert Path("r.md").read_text().startswith("# RepBNN report: 3 training runs\n")
    for name in ("done", "stopped", "two"):
        assert f"| `{name}` |" in Path("r.md").read_text()
        assert f"<code>{name}</code>" in Path("r.html").read_text()
    assert str(tmp_path) not in Path("r.md").read_text() + Path("r.html").read_text() + Path("r.json").read_text()


def spoil(name: str, text: str | None) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink() if text is None else write(folder / name, text)


def write(file: Path, text: str) -> None:
    file.write_text(text)


DAMAGE = {
    "no run": (spoil("run.json", None), 2, "holds no run"),
    "no environment": (spoil("environment.json", None), 3, "environment.json: cannot be read"),
    "environment cut": (spoil("environment.json", '{"seed": 1,'), 3, "environment.json:1: is not JSON"),
    "environment a list": (spoil("environment.json", "[1]"), 3, "environment.json: is no JSON object"),
    "environment empty": (spoil("environment.json", "{}"), 3, "environment.json: is not what a run records (KeyError"),
    "network a number": (
        spoil("environment.json", '{"seed": 1, "data": "d", "network": 3}'),
        3,
        "environment.json: is",
    ),
    "stages wrong": (spoil("environment.json", '{"seed": 1, "data": "d", "stages": [{"n": 1}]}'), 3, "TypeError"),
    "rows of nothing": (
        spoil("metrics.jsonl", "{}\n"),
        3,
        "metrics.jsonl:1: is no row of a run (expected stage, epoch",
    ),
    "rows of numbers": (spoil("metrics.jsonl", "7\n"), 3, "metrics.jsonl:1: is no row of a run"),
    "rows no text": (lambda f: (f / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), 3, "metrics.jsonl: cannot be read"),
    "recipe gone": (spoil("recipe.yaml", None), 3, "recipe.yaml: cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_one_line_and_nothing_is_written(
    case: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, code, said = DAMAGE[case]
    copy = copied(folders / "done", tmp_path)
    damage(copy)
    assert cli.run(["report", "--runs", str(copy), str(copy), "--html", "-o", str(tmp_path / "out.html")]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "out.html").exists()


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", "--runs", str(tmp_path / "no"), str(tmp_path), "-o", str(tmp_path / "o.md")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {tmp_path / 'no'}: holds no run (run.json is not there); expected a folder that " \
        "`repbnn finetune` wrote"  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_the_run_of_a_result_gives_its_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Rep network after training: the summary has what best.pt reached, the landscape a point for it."""
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    Path("net.py").write_text(OWN_NETWORK)
    torch.manual_seed(0)
    torch.save({"state_dict": own_network().state_dict(), "best_prec1": 12.5}, "own.pt")
    own = ["--model", "net.py:make"]
    quick = ["--data", "digits", "--set", "augmentation=none", "--set", "batch=256", "--epochs", "1", "--run-dir", "r"]
    assert cli.run(["transform", "own.pt", *own, "--input-size", "3x32x32", "-o", "rep.pt"]) == 0
    assert cli.run(["finetune", "rep.pt", *own, *quick, "--fit", "0"]) == 0
    assert cli.run(["report", "r", *own, "--markdown", "-o", "r.md"]) == 0
    assert cli.run(["report", "r", *own, "--json", "-o", "r.json"]) == 0
    best = max(row["test_top1"] for row in metrics(Path("r")))
    shown, made = Path("r.md").read_text(), json.loads(Path("r.json").read_text())
    (line,) = (line for line in shown.splitlines() if line.startswith("| Rep accuracy |"))
    assert re.fullmatch(
        rf"\| Rep accuracy \| {best:g} % top-1 \(recipe \S+, data digits, seed 0, epoch \d of 1\) \|", line
    ), line
    ops = made["costs"]["totals"]["ops_without_bn"]
    assert f"| Rep network | this report | {ops['after']:,.0f} | {best:g} |" in shown
    assert f"| source network | this report | {ops['before']:,.0f} | 12.5 |" in shown
    assert [r["path"] for r in made["runs"]] == ["r"]
    assert made["training"]["top1"] == best
    assert Path("r-plots/run-top1.svg").is_file()
