"""A write is whole or not at all: full disks, interrupts, a process killed at any moment."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from writing_examples import every_writer, example

from repbnn_cli import writing
from repbnn_cli.errors import RepbnnError
from repbnn_cli.writing import atomic_write_text, save

ROOT = Path(__file__).parent.parent


# -- whole or not at all ----------------------------------------------------------------------------------------------


@every_writer
@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, writer: Callable[[Path, bool], None], old: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    if old:
        path.write_text(old)

    monkeypatch.setattr(writing, "_Stream", _full_stream())
    with pytest.raises(RepbnnError) as caught:
        writer(path, True)
    assert type(caught.value) is RepbnnError
    assert str(caught.value) == (
        f"{path}: no space left on the device, nothing was written; free some space or choose another place"
    )
    assert (path.read_text() if path.exists() else None) == old
    assert len(list(tmp_path.iterdir())) == bool(old)


def _full_stream() -> type:
    class Full(writing._Stream):
        """A disk with room for five bytes."""

        room = 5

        def write(self, data: Any) -> int:
            self.room -= memoryview(data).nbytes
            if self.room < 0:
                self.failed = OSError(28, "No space left on device")
                raise self.failed
            return super().write(data)

    return Full


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@every_writer
def test_a_device_that_is_full(writer: Callable[[Path, bool], None]) -> None:
    with pytest.raises(RepbnnError, match="/dev/full: no space left on the device") as caught:
        writer(Path("/dev/full"), False)
    assert caught.value.exit_code == 1
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_pipe_needs_no_force(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    atomic_write_text(path, "through\n")
    reader.join(10)
    assert got == ["through\n"]
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("moment", ["write", "fsync", "replace", "link", "after"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_killed_at_any_moment_the_old_or_the_new_file_is_there(tmp_path: Path, moment: str, old: bytes | None) -> None:
    path = tmp_path / "out"
    if old:
        path.write_bytes(old)
    child = os.fork()
    if child == 0:  # the child dies by its own hand at the given moment
        _arm(moment)
        atomic_write_text(path, "new" * 100_000, force=bool(old))
        os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    there = path.read_bytes() if path.exists() else None
    published = moment == "after" or (moment == "link" and old) or (moment == "replace" and not old)
    assert there == (b"new" * 100_000 if published else old)


def _arm(moment: str) -> None:
    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "write":
        writing._Stream.write = die  # type: ignore[assignment, method-assign]
    elif moment != "after":
        setattr(os, moment, die)


def test_a_checkpoint_killed_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "out.pt"
    save(example(), path)
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        original, written = writing._Stream.write, [0]

        def write(self: writing._Stream, data: Any) -> int:
            written[0] += memoryview(data).nbytes
            if written[0] > 100_000:
                self.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, data)

        writing._Stream.write = write  # type: ignore[assignment, method-assign]
        save({"a": [torch.ones(1000) + i for i in range(100)]}, path, force=True)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert path.read_bytes() == before


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(example(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_flat(tmp_path: Path) -> None:
    program = f"""
import resource, torch
from repbnn_cli import writing
held = {{"w": torch.ones(25_000_000)}}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
writing.save(held, {str(tmp_path / "a.pt")!r})
writing.save_safetensors(held, {{}}, {str(tmp_path / "b.safetensors")!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 25_000  # KiB, for 97 MiB of tensors
