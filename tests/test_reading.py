"""Files that would like to run code, and files that are not checkpoints."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_examples import refusal, same, state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repbnn_cli.checkpoint import load
from repbnn_cli.errors import CheckpointError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 3)


class Creates:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


class CreatesByName(Creates):
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


# -- code in files ----------------------------------------------------------------------------------------------------


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"weights-\xff.pth")
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.pth")
    try:
        (tmp_path / "weights.pth").rename(path)
    except OSError:
        pytest.skip("this file system has no such names")
    assert "its name is not UTF-8, and PyTorch opens no such file; rename it" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", [Creates, CreatesByName])
def test_a_file_that_wants_to_run_code_is_refused(tmp_path: Path, kind: type[Creates], legacy: bool) -> None:
    path, trace = tmp_path / "a.pt", tmp_path / "created"
    torch.save({"state_dict": state(), "x": kind(trace)}, path, _use_new_zipfile_serialization=not legacy)
    text = refusal(path)
    assert not trace.exists()
    assert ("posix.system" if kind is Creates else "io.open") in text
    assert "asks for code that is not weights" in text
    assert "load it with --unsafe-load" in text
    load(path, unsafe=True)
    assert trace.exists()


def test_code_within_numpy_objects_is_refused(tmp_path: Path) -> None:
    path, trace = tmp_path / "a.pt", tmp_path / "created"
    torch.save({"state_dict": state(), "best": np.array([Creates(trace)], dtype=object)}, path)
    assert "posix.system" in refusal(path)
    assert not trace.exists()


def test_the_environment_does_not_open_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, trace = tmp_path / "a.pt", tmp_path / "created"
    torch.save({"state_dict": state(), "x": Creates(trace)}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refusal(path)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_pickles_are_not_run_either(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "a.pth", tmp_path / "created"
    path.write_bytes(pickle.dumps({"w": [1.0], "x": Creates(trace)}, protocol=protocol))
    assert "a plain Python pickle that asks for posix.system, not written by torch.save" in refusal(path)
    refusal(path, unsafe=True)
    assert not trace.exists()


def test_other_pickle_protocols(tmp_path: Path) -> None:
    path, trace = tmp_path / "a.pt", tmp_path / "created"
    torch.save({"state_dict": state(), "x": Creates(trace)}, path, pickle_protocol=4)
    assert "asks for code that is not weights: posix.system;" in refusal(path)
    torch.save({"state_dict": state()}, path, pickle_protocol=4)
    assert "written with pickle protocol 4, which the safe loader does not read" in refusal(path)
    assert not trace.exists()


def test_a_pickled_module_needs_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    net = Net()
    torch.save(nn.DataParallel(net), path)
    text = refusal(path)
    assert "not weights: test_reading.Net; nothing" in text  # of torch.nn's own classes there are many
    torch.save(nn.DataParallel(nn.Conv2d(3, 4, 3)), path)
    assert "torch.nn.modules.conv.Conv2d, torch.nn.parallel.data_parallel.DataParallel" in refusal(path)
    torch.save(nn.DataParallel(net), path)
    ckpt = load(path, unsafe=True)
    same(ckpt.tensors, dict(net.state_dict()))
    assert ckpt.prefix == "module."
    assert ckpt.notes == ("a pickled DataParallel: its state_dict() was taken",)
    torch.save({"epoch": 1, "model": net}, path)
    ckpt = load(path, unsafe=True)
    assert (ckpt.container, ckpt.metadata) == ("model", {"epoch": 1})
    same(ckpt.tensors, dict(net.state_dict()))


def test_a_module_whose_code_is_not_here(tmp_path: Path) -> None:
    path, code = tmp_path / "a.pt", tmp_path / "somewhere.py"
    code.write_text("import torch\nclass Gone(torch.nn.Linear): pass\n")
    program = f"import torch, somewhere; torch.save(somewhere.Gone(1, 1), {str(path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert "somewhere.Gone" in refusal(path)
    assert "needs the code that it was pickled with (No module named 'somewhere')" in refusal(path, unsafe=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 1)), path)
    assert "a TorchScript archive, which holds code" in refusal(path)
    assert set(load(path, unsafe=True).tensors) == {"weight", "bias"}


def test_framework_checkpoints_with_foreign_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": state("model."), "hyper_parameters": {"net": Net, "x": struct.Struct}}, path)
    text = refusal(path)
    assert "_struct.Struct" in text
    assert f"{Net.__module__}.Net" in text


# -- what is not a checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty (0 bytes)"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "looks like a JPEG image; give the checkpoint itself"),
        (b"\x89PNG\r\n\x1a\n", "looks like a PNG image"),
        (b"\n <!DOCTYPE html><html>", "looks like a web page"),
        (b"<?xml version='1.0'?><Error>", "looks like a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "looks like a Git LFS pointer, not the file itself"),
        (b"\x1f\x8b\x08\x00", "looks like gzip-compressed; unpack it first"),
        (b"Hello world\nmore", "looks like text ('Hello world')"),
        (bytes(1000), "begins with zero bytes only"),
        (bytes(range(200, 250)), "not a checkpoint (it begins with c8 c9 ca cb cc cd ce cf)"),
        (b"x" * 257 + b"ustar" + bytes(250), "looks like a tar archive"),
        (b"PK\x03\x04" + bytes(100), "a truncated or damaged torch file"),
        (struct.pack("<Q", 5000) + b'{"w":{"dtype"', "a truncated safetensors file"),
        (struct.pack("<Q", 8) + b'{"w":3}  ', "a damaged or truncated safetensors file"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert expected in refusal(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "best.pth").write_bytes(b"x")
    assert f"no such file; did you mean {tmp_path / 'best.pth'}?" in refusal(tmp_path / "bset.pth")
    assert "no such file; check the path" in refusal(tmp_path / "nowhere" / "x.pth")
    assert f"is a folder; give the checkpoint file in it, e.g. {tmp_path / 'best.pth'}" in refusal(tmp_path)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or device" in refusal(tmp_path / "pipe")


def test_other_zip_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    assert "looks like a NumPy .npz archive" in refusal(tmp_path / "a.npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "looks like a zip archive without a torch checkpoint" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_truncated_files(tmp_path: Path, legacy: bool, share: float) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state_dict": state()}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "truncated or damaged torch file" in refusal(path)


@given(st.integers(0, 10**9), st.binary(min_size=1, max_size=40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_damage_anywhere_is_refused_in_one_line_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, junk: bytes, legacy: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.save({"state_dict": state()}, path, _use_new_zipfile_serialization=not legacy)
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place : place + len(junk)] = junk
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert load(path).tensors


def test_a_repacked_archive_is_read(tmp_path: Path) -> None:
    source, path = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"state_dict": state()}, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    same(load(path).tensors, state())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "an empty dictionary"),
        ({"state_dict": {}}, "state_dict is empty"),
        ({"state_dict": {"w": [1.0], "b": [2.0]}}, "state_dict holds a dictionary of 2 × list"),
        ({"epoch": 3, "lr": 0.1}, "holds no state dict but a dictionary of 1 × int, 1 × float"),
        ({"model": {"w": np.ones(3)}}, "model holds a dictionary of 1 × NumPy array"),
        ([1, 2, 3], "holds a list of 3, not a dictionary of tensors"),
        (torch.ones(2, 3), "holds a tensor of shape (2, 3), not a dictionary of tensors"),
        ("text", "holds text, not a dictionary of tensors"),
        (None, "holds nothing, not a dictionary of tensors"),
        ({"w": torch.ones(2, device="meta")}, "1 tensor without data (w)"),
    ],
)
def test_no_weights_in_it(tmp_path: Path, content: object, expected: str) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path)
    assert expected in refusal(path)
