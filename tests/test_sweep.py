"""Experiments as cells, their commands, a sweep that is interrupted and continues, and its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repbnn_cli import experiments, sweep_report, sweeps
from repbnn_cli.cli import run
from repbnn_cli.errors import RulesError, UsageError
from repbnn_cli.sweeps import Budget

ROOT = Path(__file__).resolve().parent.parent
TEXT = """name: tiny
summary: A try
table: Table 3
data: digits
networks: [irnet_resnet20]
variants:
  raw: {}
  beta-4: {beta: 4, setting: β = 4, set: [optimizer.lr=0.05]}
epochs: 2
seeds: [3, 5]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TEXT, "utf-8")
    return tmp_path


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_experiments_of_the_repository_are_valid(file: Path) -> None:
    made = experiments.load(str(file))
    assert made.name == file.stem
    assert any(not variant.transforms for variant in made.file.variants.values()), "nothing to compare with"


def test_every_variant_of_a_table_has_its_figure_in_the_paper() -> None:
    for file in (ROOT / "experiments").glob("table-*.yaml"):
        made = experiments.load(str(file))
        for network in made.file.networks:
            for name in made.file.variants:
                row = sweeps._row(made, {}, network, name, "raw")
                # Table 4 has no source figure, and Table 7 no IR-Net ResNet-18.
                assert row.published is not None or (file.stem, name) == ("table-4", "raw"), (file.stem, network, name)


def test_cells_are_networks_times_variants_times_seeds() -> None:
    cells = experiments.loads(TEXT, "tiny.yaml").cells
    assert [cell.name for cell in cells] == [
        "irnet_resnet20-raw-seed3", "irnet_resnet20-raw-seed5",
        "irnet_resnet20-beta-4-seed3", "irnet_resnet20-beta-4-seed5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("table: Table 3", "table: Table 9", "tiny.yaml:3 table: the paper has no accuracies in 'Table 9'"),
        ("β = 4", "β = 16", "tiny.yaml:8 variants.beta-4.setting: Table 3 has no such row: 'β = 16'"),
        ("beta: 4", "betta: 4", "tiny.yaml:8 variants.beta-4.betta"),
        ("[3, 5]", "[]", "tiny.yaml:10 seeds: found a list; expected at least one"),
        ("[irnet_resnet20]", "[irnet_resnet20, x/irnet_resnet20.pt]", "two cells would be called"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(old: str, new: str, message: str) -> None:
    with pytest.raises(RulesError) as error:
        experiments.loads(TEXT.replace(old, new), "tiny.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dry_run_prints_the_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", "tiny.yaml", "--dry-run", "--epochs", "7", "--set", "batch=64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6  # four runs, two transforms before them
    assert lines[2].startswith("repbnn transform irnet_resnet20 --beta 4 --seed 3 -o ")
    assert "--epochs 7 --set optimizer.lr=0.05 --set batch=64" in lines[3]
    assert list(here.iterdir()) == [here / "tiny.yaml"]


def finished_run(folder: Path, top1: list[float]) -> None:
    """What `read` of a run needs, as a finished run leaves it."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.pt").touch()
    (folder / "run.json").write_text("{}")
    (folder / "recipe.yaml").write_text("")
    stages = [{"name": "train", "epochs": len(top1)}]
    (folder / "environment.json").write_text(json.dumps({"seed": 0, "data": "digits", "stages": stages}))
    rows = [{"stage": "train", "epoch": n, "test_top1": value} for n, value in enumerate(top1, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_has_means_spreads_and_gains_paired_by_seed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "runs" / "tiny"
    sweeps.begin(folder, experiments.load("tiny.yaml"), Budget("digits", 2))
    for name, top1 in {"raw-seed3": [80, 70], "raw-seed5": [82, 84], "beta-4-seed3": [79, 83]}.items():
        finished_run(folder / f"irnet_resnet20-{name}", [float(t) for t in top1])
    raw, rep = sweeps.read(folder).rows
    assert raw.best == sweeps.Spread(82.0, pytest.approx(8**0.5), 2)  # 80 and 84
    assert raw.last == sweeps.Spread(77.0, pytest.approx(98**0.5), 2)
    assert rep.best == sweeps.Spread(83.0, None, 1)
    assert rep.gain == sweeps.Spread(3.0, None, 1)  # of seed 3 alone: 83 − 80; the means would give 1
    assert (raw.published, raw.published_gain) == (86.50, None)
    assert rep.published == 88.07
    assert rep.published_gain == pytest.approx(1.57)
    assert run(["report", "--sweep", str(folder), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "| `irnet_resnet20` | beta-4 | 1/2 | 83.00 | 83.00 | +3.00 | 88.07 | +1.57 |" in shown
    assert "1 of 4 runs are not finished and not in the figures" in shown
    assert json.loads(sweep_json(folder, capsys))["rows"][1]["gain"] == {"mean": 3.0, "deviation": None, "n": 1}


def sweep_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["report", "--sweep", str(folder), "--json"]) == 0
    return capsys.readouterr().out


def test_another_sweep_in_the_folder_is_refused(here: Path) -> None:
    folder = here / "runs" / "tiny"
    experiment = experiments.load("tiny.yaml")
    sweeps.begin(folder, experiment, Budget("digits", 2))
    sweeps.begin(folder, experiment, Budget("digits", 2))
    with pytest.raises(UsageError, match=r"changed: epochs \(was 2, is 3\)"):
        sweeps.begin(folder, experiment, Budget("digits", 3))
    with pytest.raises(UsageError, match="changed: the experiment file"):
        sweeps.begin(folder, experiments.loads(TEXT + "\n", "tiny.yaml"), Budget("digits", 2))
    with pytest.raises(UsageError, match="holds no sweep"):
        sweeps.read(here)


def test_an_interrupted_sweep_continues(here: Path) -> None:
    """Interrupted while a cell trains; then finished. One cell fails for its own reason, and the others go on."""
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    text = (
        TEXT.replace("[3, 5]", "[3]")
        .replace("beta: 4", "beta: 3")
        .replace("setting: β = 4, ", "")
        .replace("epochs: 2", "epochs: 1")
    )
    (here / "tiny.yaml").write_text(text, "utf-8")
    command = [sys.executable, "-m", "repbnn_cli", "sweep", "tiny.yaml", "--json"]
    command += ["--set", "augmentation=none", "--set", "batch=256"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    states = here / "runs" / "tiny" / "irnet_resnet20-raw-seed3" / "checkpoints"
    end = time.monotonic() + 120
    while time.monotonic() < end and not list(states.glob("state-0-0000-*.pt")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "the same command continues" in said
    assert not (states / "last.pt").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "1 of 2 cells failed" in done.stderr
    assert "beta 3 does not divide" in done.stderr  # the cell's own message
    raw, rep = json.loads(done.stdout)["rows"]
    assert [r["state"] for r in raw["runs"]] == ["finished"]
    assert raw["best"]["n"] == 1
    assert rep["runs"] == []
    assert sweep_report.markdown(sweeps.read(here / "runs" / "tiny")).startswith("# tiny: A try")
