"""`repbnn doctor` on machines on which something is wrong: it says what, and never fails itself."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repbnn_cli import doctor
from repbnn_cli.cli import run
from repbnn_cli.doctor import Item

ROOT = Path(__file__).resolve().parent.parent


def items(group: str) -> dict[str, Item]:
    return {i.name: i for i in doctor.examine() if i.group == group}


def versions_with(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Installed versions as they would be elsewhere; None: not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        found = versions[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_requirements_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {n.name: n.least for n in doctor.requirements() if not n.extra}
    assert needed == dict(line.split(">=") for line in project["dependencies"])
    extras = {n.extra for n in doctor.requirements() if n.extra}
    assert extras == set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("version", "least", "fits"),
    [("2.13.0+cpu", "2.6", True), ("2.6", "2.6", True), ("2.5.1", "2.6", False), ("10", "9.1", True)],
)
def test_versions_compare_as_numbers(version: str, least: str, fits: bool) -> None:
    assert (doctor.numbers(version) >= doctor.numbers(least)) is fits


def test_old_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions_with(monkeypatch, torch="2.1.0+cu118", fvcore=None, triton="3.1.0", tensorboard=None)
    found = items("versions")
    assert (found["torch"].state, found["torch"].note) == ("problem", 'too old: pip install "torch>=2.6"')
    assert (found["fvcore"].state, found["fvcore"].value) == ("problem", "not installed")
    assert found["numpy"].state == "ok"
    optional = items("optional parts")
    assert optional["triton"].state == "problem"
    assert "needs 3.6 or later for the fused GPU kernels" in optional["triton"].note
    assert optional["tensorboard"].state == "absent"
    assert optional["tensorboard"].note.endswith("pip install 'repbnn[tensorboard]'")


def broken_torchvision(folder: Path) -> None:
    (folder / "torchvision.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')


def crashing_torchvision(folder: Path) -> None:
    (folder / "torchvision.py").write_text("import os\nos.abort()")


@pytest.mark.parametrize(
    ("write", "said"),
    [(broken_torchvision, "operator torchvision::nms does not exist"), (crashing_torchvision, "cannot be imported: ")],
)
def test_a_torchvision_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], said: str
) -> None:
    write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    conflict = doctor._torchvision()
    assert conflict is not None
    assert said in conflict[1]
    (tmp_path / "torchvision.py").write_text("")
    assert doctor._torchvision() is None


def test_a_gpu_that_this_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    conflict = doctor._gpu_without_cuda()
    assert conflict is not None
    assert "built without CUDA, on a machine with an NVIDIA driver" in conflict[1]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert doctor._gpu_without_cuda() is None


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert doctor._threads() == (
        "threads",
        "torch uses 8 threads on 2 cores",
        "OMP_NUM_THREADS=2: more threads than cores are several times slower",
    )


def test_data_sets_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert items("data sets")["cifar10"].state == "absent"
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    found = items("data sets")
    assert (found["cifar10"].state, found["cifar10"].value) == ("ok", "data/cifar-10-batches-py")
    assert found["cifar100"].state == "absent"


def test_a_library_that_fails_is_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise OSError("libcudart.so: cannot open\nshared object file")

    monkeypatch.setattr(torch.cuda, "is_available", fails)
    monkeypatch.setattr(doctor, "_threads", fails)
    assert items("devices")["could not be looked at"].value == (
        "OSError: libcudart.so: cannot open shared object file"
    )  # fmt: skip
    assert items("conflicts")["fails"].state == "problem"
    assert run(["doctor"]) == 0


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line in doctor.GROUPS] == list(doctor.GROUPS)
    versions_with(monkeypatch, fvcore=None)
    assert run(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] >= 1
    assert {i["name"]: i["state"] for i in told["versions"]}["fvcore"] == "problem"
    assert told["devices"][0]["name"] == "cpu"
