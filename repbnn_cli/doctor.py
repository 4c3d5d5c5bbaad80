"""What a machine has for `repbnn`, and what is wrong: versions, devices, optional parts, data sets, known conflicts.

What is needed, and which version, is read from the installed package's own requirements. Looking changes nothing, and
what fails is an item of the list: `repbnn doctor` is for machines on which things fail. torch is imported here only
while its devices are looked at, torchvision (which can take the interpreter down with it) in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import repbnn_cli

State = Literal["ok", "absent", "problem"]
GROUPS = ("versions", "devices", "optional parts", "data sets", "conflicts")
# What each optional requirement of pyproject.toml is for.
_ENABLES = {
    "scikit-learn": "`--data digits`: training without a download",
    "tensorboard": "training curves in TensorBoard",
    "triton": "the fused GPU kernels; on a CPU, their tests (TRITON_INTERPRET=1)",
}
_COMPILERS = ("c++", "g++", "clang++", "cl")
_TORCHVISION_SECONDS = 60


@dataclass(frozen=True)
class Item:
    """One thing looked at. absent: not there, and not needed; problem: in the way of something. note: what it enables,
    or what to do."""

    group: str
    name: str
    state: State
    value: str
    note: str = ""


def examine() -> list[Item]:
    """Everything, group by group; never raises."""
    found: list[Item] = []
    probes: tuple[tuple[str, Callable[[], Iterator[Item]]], ...] = (
        ("versions", _versions), ("devices", _devices), ("optional parts", _optional), ("data sets", _data_sets),
        ("conflicts", _conflicts),
    )  # fmt: skip
    for group, probe in probes:
        try:
            for item in probe():
                found.append(item)
        except Exception as error:  # a broken library is what this command is for
            found.append(Item(group, "could not be looked at", "problem", _line(error)))
    if not any(i.group == "conflicts" for i in found):
        found.append(Item("conflicts", "none known", "ok", ""))
    return found


def as_plain(items: list[Item]) -> dict[str, Any]:
    return {
        "problems": sum(i.state == "problem" for i in items),
        **{group: [_without_group(i) for i in items if i.group == group] for group in GROUPS},
    }


def _without_group(item: Item) -> dict[str, Any]:
    return {key: value for key, value in asdict(item).items() if key != "group"}


# ---------------------------------------------------------------------------------------------------------------------
# Versions


@dataclass(frozen=True)
class Requirement:
    """A requirement of this package: `torch>=2.6`; extra: the optional part that it belongs to, or ""."""

    name: str
    least: str
    extra: str

    @property
    def installed(self) -> str | None:
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def fits(self) -> bool:
        return self.installed is not None and numbers(self.installed) >= numbers(self.least)


def requirements() -> list[Requirement]:
    """Those of the installed package, as pyproject.toml has them."""
    found = []
    for text in importlib.metadata.requires("repbnn") or ():
        match = re.match(r"([\w.-]+)\s*(?:>=\s*([\w.]+))?", text)
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", text)
        if match:
            found.append(Requirement(match[1], match[2] or "", extra[1] if extra else ""))
    return found


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) for 2.13.0+cpu; what follows the numbers does not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _versions() -> Iterator[Item]:
    yield Item("versions", "repbnn", "ok", repbnn_cli.__version__, str(Path(repbnn_cli.__file__).parent))
    yield Item("versions", "Python", "ok", platform.python_version(), sys.executable)
    yield Item("versions", "system", "ok", platform.platform(terse=True))
    for need in requirements():
        if not need.extra:
            yield _version(need)


def _version(need: Requirement) -> Item:
    if need.installed is None:
        return Item("versions", need.name, "problem", "not installed", f'pip install "{need.name}>={need.least}"')
    if not need.fits:
        return Item(
            "versions", need.name, "problem", need.installed, f'too old: pip install "{need.name}>={need.least}"'
        )
    return Item("versions", need.name, "ok", need.installed, f"needs {need.least} or later" if need.least else "")


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> Iterator[Item]:
    import torch

    what = f"{_cores()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    yield Item("devices", "cpu", "ok", what)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        yield Item("devices", f"cuda:{index}", "ok", f"{properties.name}, {size}")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU that its CUDA can use"
        yield Item("devices", "cuda", "absent", "", f"{why}; enables --device cuda and the fused kernels")


# ---------------------------------------------------------------------------------------------------------------------
# Optional parts


def _optional() -> Iterator[Item]:
    for need in requirements():
        if need.extra in ("", "dev"):
            continue
        enables = _ENABLES.get(need.name, f"the extra `{need.extra}`")
        if need.installed is None:
            yield Item("optional parts", need.name, "absent", "", f"{enables}: pip install 'repbnn[{need.extra}]'")
        elif not need.fits:
            note = f"needs {need.least} or later for {enables}: pip install -U 'repbnn[{need.extra}]'"
            yield Item("optional parts", need.name, "problem", need.installed, note)
        else:
            yield Item("optional parts", need.name, "ok", need.installed, enables)
    compiler = _compiler()
    note = "torch.compile, and Triton's launchers"
    yield Item("optional parts", "C++ compiler", "ok" if compiler else "absent", compiler or "", note)


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((path for name in (*filter(None, [named]), *_COMPILERS) if (path := shutil.which(name))), None)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def _data_sets() -> Iterator[Item]:
    from repbnn_cli import data

    folder = data.data_folder()
    for name in ("cifar10", "cifar100"):
        found = data.find(name)
        if found is None:
            yield Item("data sets", name, "absent", "", f"repbnn data {name} puts it into {folder}")
        else:
            yield Item("data sets", name, "ok", str(found), f"--data {name}")
    digits = importlib.util.find_spec("sklearn") is not None
    yield Item("data sets", "digits", "ok" if digits else "absent", "scikit-learn's" if digits else "", "--data digits")
    place = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**30
    writable = os.access(place, os.W_OK)
    note = "" if writable else "not writable: set XDG_CACHE_HOME to a folder that is"
    yield Item("data sets", "cache", "ok" if writable else "problem", f"{folder}, {free:.0f} GiB free", note)


# ---------------------------------------------------------------------------------------------------------------------
# Conflicts


def _conflicts() -> Iterator[Item]:
    for check in (_torchvision, _gpu_without_cuda, _numpy, _threads, _distutils):
        try:
            problem = check()
        except Exception as error:
            problem = (check.__name__.strip("_"), f"could not be looked at: {_line(error)}", "")
        if problem:
            name, value, note = problem
            yield Item("conflicts", name, "problem", value, note)


Conflict = tuple[str, str, str] | None  # name, what is wrong, what to do


def _torchvision() -> Conflict:
    """A torchvision of another build than torch's raises on import, in any program that imports both."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    run = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, timeout=_TORCHVISION_SECONDS
    )
    if run.returncode == 0:
        return None
    said = run.stderr.strip().splitlines()
    what = said[-1][:160] if said else f"ends with code {run.returncode}"
    return (
        "torchvision",
        f"cannot be imported: {what}",
        "install the one that belongs to this torch (same index, same +cpu or +cu), or uninstall it: repbnn needs none",
    )


def _gpu_without_cuda() -> Conflict:
    import torch

    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if torch.version.cuda is not None or torch.version.hip is not None or not driver:
        return None
    return "torch", f"{torch.__version__} is built without CUDA, on a machine with an NVIDIA driver", (
        "install a CUDA build of torch to use the GPU"
    )  # fmt: skip


def _numpy() -> Conflict:
    import torch

    try:
        torch.zeros(1).numpy()
    except Exception as error:  # "Numpy is not available": built for another major version
        return "NumPy", f"torch cannot use it: {_line(error)}", "install matching versions: pip install -U torch numpy"
    return None


def _threads() -> Conflict:
    import torch

    threads, cores = torch.get_num_threads(), _cores()
    if threads <= cores:
        return None
    what = f"torch uses {threads} threads on {cores} cores"
    return "threads", what, f"OMP_NUM_THREADS={cores}: more threads than cores are several times slower"


def _distutils() -> Conflict:
    if importlib.util.find_spec("thop") is None or importlib.util.find_spec("distutils") is not None:
        return None
    return "thop", "imports distutils, which this Python no longer has", (
        "pip install setuptools, for `profile --cross-check`"
    )  # fmt: skip


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
