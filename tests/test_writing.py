"""Writing: whole or not at all, nothing by accident, the same bytes for the same content."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from writing_examples import every_writer, example

from repbnn_cli.checkpoint import VERSION, load
from repbnn_cli.errors import CheckpointError, UsageError
from repbnn_cli.writing import atomic_write_text, check_output, save, save_safetensors

ROOT = Path(__file__).parent.parent

plain_values = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats() | st.text()
tensors = st.builds(
    lambda dtype, shape: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.bfloat16]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
payloads = st.dictionaries(
    st.text(),
    st.recursive(
        plain_values | tensors,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text() | st.integers(0, 99), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right or (left != left and right != right))  # NaN is NaN


# -- content ----------------------------------------------------------------------------------------------------------


@given(payloads)
@settings(max_examples=60, deadline=None)
def test_payloads_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, payload: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.pt"
    save(payload, path, force=True)
    assert equal(torch.load(path, weights_only=True), payload)


def test_our_own_format_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.repbnn.pt"
    save(example(), path)
    ckpt = load(path)
    assert (ckpt.format, ckpt.container, ckpt.prefix, ckpt.notes) == ("repbnn", "tensors", "", ())
    assert equal(ckpt.payload, example())
    assert equal(ckpt.tensors, example()["tensors"])


def test_names_in_our_own_format_keep_their_prefix(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save({**example(), "tensors": {"model.w": torch.ones(1)}, "source": {"s.w": torch.zeros(1)}}, path)
    assert list(load(path).tensors) == ["model.w"]
    source = load(path, key="source")
    assert (source.format, list(source.tensors)) == ("repbnn", ["s.w"])


def test_a_newer_or_broken_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save({**example(), "version": VERSION + 1}, path)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: written by a newer repbnn (format version {VERSION + 1}, this one reads up to {VERSION}); "
        "update with: pip install --upgrade repbnn"
    )
    save({**example(), "tensors": 3}, path, force=True)
    with pytest.raises(CheckpointError, match="says it is a repbnn result but has no valid version and tensors"):
        load(path)


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        (nn.Linear(1, 1), "payload['a'][0] is a torch.nn.modules.linear.Linear"),
        (np.ones(3), "payload['a'][0] is a numpy.ndarray"),
        (Path("x"), "payload['a'][0] is a pathlib"),
        ({1, 2}, "payload['a'][0] is a builtins.set"),
        (b"raw", "payload['a'][0] is a builtins.bytes"),
        (torch.float32, "payload['a'][0] is a torch.dtype"),
        ({"b": {(1, 2): 3}}, "payload['a'][0]['b'] has the key (1, 2)"),
        (torch.ones(1, device="meta"), "payload['a'][0] is a tensor without plain data"),
        (torch.ones(2, 2).to_sparse(), "payload['a'][0] is a tensor without plain data"),
    ],
)
def test_only_tensors_and_plain_values(tmp_path: Path, entry: object, where: str) -> None:
    with pytest.raises(TypeError) as caught:
        save({"a": [entry]}, tmp_path / "a.pt")
    assert where in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_numbers_and_parameters_become_plain(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    weight = nn.Parameter(torch.ones(2))
    save({"f": np.float64(1.5), "p": weight, "n": torch.Size([1, 2])[0], "t": weight * 2}, path)
    loaded = torch.load(path, weights_only=True)
    assert equal(loaded, {"f": 1.5, "p": torch.ones(2), "n": 1, "t": torch.full((2,), 2.0)})
    assert not loaded["t"].requires_grad


def test_a_view_brings_only_its_own_part(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    base = torch.arange(1_000_000.0)
    save({"a": base[5:8], "b": base.reshape(1000, 1000).t()[:2, :2], "c": base.expand(2, -1)[:, 0]}, path)
    assert path.stat().st_size < 5000
    expected = {
        "a": torch.tensor([5.0, 6.0, 7.0]),
        "b": torch.tensor([[0.0, 1000.0], [1.0, 1001.0]]),
        "c": torch.zeros(2),
    }
    assert equal(torch.load(path, weights_only=True), expected)


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    big = torch.ones(10_000)
    save({"a": big, "b": big}, path)
    assert path.stat().st_size < 50_000


def test_writing_over_the_file_that_the_tensors_are_mapped_from(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(100_000.0)}, path)
    ckpt = load(path)
    save({"format": "repbnn", "version": VERSION, "tensors": ckpt.tensors}, path, force=True)
    assert torch.equal(ckpt.tensors["w"], torch.arange(100_000.0))
    assert torch.equal(load(path).tensors["w"], torch.arange(100_000.0))


# -- the same content, the same bytes ---------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_the_name_or_on_which_objects_are_one(tmp_path: Path) -> None:
    word = "".join(["be", "ta"])
    assert word is not "beta"  # noqa: F632
    save({"beta": "beta", "x": ["beta", "beta"]}, tmp_path / "one.pt")
    save({"beta": word, "x": ["".join(["b", "eta"]), word]}, tmp_path / "another name.bin")
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another name.bin").read_bytes()


def test_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    held = example()
    del held["tensors"]
    program = f"""
import torch
from repbnn_cli.writing import save, save_safetensors
tensors = {{"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}}
save({{**{held!r}, "tensors": tensors}}, "other.pt")
save_safetensors(tensors, {{"b": "2", "a": "1"}}, "other.safetensors")
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
    save(example(), tmp_path / "here.pt")
    save_safetensors(example()["tensors"], {"a": "1", "b": "2"}, tmp_path / "here.safetensors")
    for suffix in (".pt", ".safetensors"):
        assert (tmp_path / f"here{suffix}").read_bytes() == (tmp_path / f"other{suffix}").read_bytes()


# -- safetensors ------------------------------------------------------------------------------------------------------


def test_safetensors_are_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    held = {
        "z.half": torch.arange(3).half(),
        "scalar": torch.tensor(5),
        "empty": torch.zeros(0, 4),
        "odd": torch.tensor([True, False, True]),
        "view": torch.arange(12.0).reshape(3, 4).t(),
        "brain": torch.ones(5, dtype=torch.bfloat16),
        "double": torch.ones(1, dtype=torch.float64),
    }
    save_safetensors(held, {"b": "2", "a": 'β "quoted"'}, path)
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"a": 'β "quoted"', "b": "2"}
        assert set(opened.keys()) == set(held)
        for name, tensor in held.items():
            assert equal(opened.get_tensor(name), tensor)
    assert equal({name: load(path).tensors[name] for name in held}, held)


def test_safetensors_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^c: a torch.complex64 tensor"):
        save_safetensors({"c": torch.ones(1, dtype=torch.complex64)}, {}, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"metadata\['a'\] is a int"):
        save_safetensors({}, {"a": 1}, tmp_path / "a.safetensors")  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


# -- not by accident --------------------------------------------------------------------------------------------------


@every_writer
def test_nothing_is_overwritten_without_force(tmp_path: Path, writer: Callable[[Path, bool], None]) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    path.chmod(0o640)
    with pytest.raises(UsageError) as caught:
        writer(path, False)
    assert str(caught.value) == f"{path}: exists already; give another name, or --force to overwrite it"
    assert path.read_text() == "old"
    writer(path, True)
    assert path.read_bytes() != b"old"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@every_writer
def test_a_file_that_appears_meanwhile_stays(
    tmp_path: Path, writer: Callable[[Path, bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", lambda _: path.write_text("somebody else's"))
    with pytest.raises(UsageError, match="exists already"):
        writer(path, False)
    assert path.read_text() == "somebody else's"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@every_writer
def test_new_files_have_the_usual_rights(tmp_path: Path, writer: Callable[[Path, bool], None]) -> None:
    (tmp_path / "usual").write_text("")
    writer(tmp_path / "out", False)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


@every_writer
def test_file_systems_without_links(
    tmp_path: Path, writer: Callable[[Path, bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    writer(tmp_path / "out", False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "latest").symlink_to("real")
    atomic_write_text(tmp_path / "latest", "new", force=True)
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "is a folder; give the name of a file in it"),
        ("nowhere/out", "does not exist; create it first"),
        ("file/out", "file is not a folder; choose another place"),
        ("x" * 300, "is not a usable file name (File name too long)"),
    ],
)
def test_places_that_cannot_be_written(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / name
    for attempt in (lambda: check_output(path), lambda: save(example(), path)):
        with pytest.raises(UsageError) as caught:
            attempt()
        assert expected in str(caught.value)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match=r"is not writable; choose another place$"):
        check_output(tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a file system that refuses everybody")
@every_writer
def test_a_file_system_that_refuses(writer: Callable[[Path, bool], None]) -> None:
    with pytest.raises(UsageError, match=r"^/proc/out: .*choose another place$"):
        writer(Path("/proc/out"), False)
