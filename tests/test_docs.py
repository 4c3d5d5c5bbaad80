"""The documentation runs: its code blocks, its commands (with one epoch instead of eight), and what is generated."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from repbnn_cli.cli import run
from repbnn_cli.rules.rule_models import schema
from repbnn_cli.rules.rule_reference import reference
from repbnn_cli.train import reconstruct

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / "docs" / page).read_text("utf-8"))


def test_every_room_is_in_the_wheel_and_on_the_map_of_the_house() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = [file.parent.name for file in (ROOT / "repbnn_cli").glob("*/__init__.py")]
    assert sorted(project["packages"]) == sorted(
        ["repbnn_cli", "repbnn_cli.rules_data", *(f"repbnn_cli.{folder}" for folder in folders)]
    )
    house = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    files = [file.name for file in (ROOT / "repbnn_cli").glob("[!_]*.py")]
    assert [room for room in (*(f"{folder}/" for folder in folders), *files) if f"`{room}`" not in house] == []


def test_the_rule_reference_is_the_models() -> None:
    assert (ROOT / "docs" / "rule-reference.md").read_text("utf-8") == reference()


def test_the_explained_rule_language_names_every_key() -> None:
    explained = (ROOT / "rules" / "README.md").read_text("utf-8")
    keys = {key for model in (schema(), *schema()["$defs"].values()) for key in model["properties"]}
    assert {key for key in keys if f"`{key}`" not in explained} == {"channels", "axis"}  # of per_channel, in its row
    assert "{channels: out, axis: 0}" in explained


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("rules/**/*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8"))
        if not (page.parent / link).exists()
    ]
    assert broken == []


def test_the_python_pages_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    names: dict[str, object] = {}
    for block in blocks("python-api.md"):
        exec(compile(block, "docs/python-api.md", "exec"), names)


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)  # of another test in this process
    monkeypatch.setattr(reconstruct, "MEMORY", 2**26)  # some eighty images are enough to see that it fits
    network, start, load = blocks("tutorial.md")
    (tmp_path / "net.py").write_text(network)
    exec(compile(start, "start.py", "exec"), {})
    page = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    commands = re.findall(r"^    repbnn (.+)$", page, re.M)
    assert len(commands) == 7
    for command in commands:
        quick = command.replace("--epochs 8", "--epochs 1").replace("batch=32", "batch=256")
        quick = quick.replace("finetune rep.pt", "finetune rep.pt --fit 2")
        assert run(shlex.split(quick)) == 0, command
    assert "certificate | passed" in (tmp_path / "REPORT.md").read_text("utf-8")
    exec(compile(load, "docs/tutorial.md", "exec"), {})
    sys.modules.pop("net", None)
