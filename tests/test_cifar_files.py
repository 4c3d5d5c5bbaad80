"""The official CIFAR files: every format gives its pixels, what is missing or hostile is named, nothing of it runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from data_examples import (
    LAYOUT,
    LAYOUTS,
    official_files,
    packed,
    python_batch,
    refusal,
    rows,
    shrink,
    text,
    write_files,
)

from repbnn_cli.data import load
from repbnn_cli.data import sets as data
from repbnn_cli.data.cifar_files import CIFAR10_CLASSES, unpickled
from repbnn_cli.errors import DataError

every_package = pytest.mark.parametrize("package", LAYOUT.values(), ids=["-".join(key) for key in LAYOUT])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def test_the_official_packages_have_their_published_sizes() -> None:
    for layout in LAYOUTS:
        assert layout.train_rows * len(layout.train) == 50000
        assert layout.test_rows * len(layout.test) == 10000


@pytest.mark.usefixtures("small")
@every_package
def test_official_files_give_their_pixels_from_a_folder_its_parent_and_an_archive(
    tmp_path: Path, package: data.Layout
) -> None:
    files = official_files(package)
    inside = {f"{package.folder}/{name}": content for name, content in files.items()}
    parent = write_files(tmp_path / "parent", inside)
    archive = packed(tmp_path / package.archive, {**inside, f"{package.folder}/readme.html": b"<p>"})
    sets = [load(f"{package.data}:{path}") for path in (parent, parent / package.folder, archive)]
    for found in sets:
        pixels, labels = (np.concatenate(part) for part in zip(*(rows(package, n) for n in package.train), strict=True))
        assert torch.equal(found.train.images, torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
        assert torch.equal(found.train.labels, torch.from_numpy(labels))
        assert torch.equal(found.test.labels, torch.from_numpy(rows(package, package.test[0])[1]))
        assert (found.train.images.dtype, found.train.labels.dtype) == (torch.uint8, torch.int64)
        assert found.train.images.is_contiguous()
        assert found.name == package.data
        assert found.classes == (CIFAR10_CLASSES if package.data == "cifar10" else found.classes)
        assert len(found.classes) == package.classes
        assert found.notes == ()
    assert len({found.fingerprint for found in sets}) == 1
    assert [found.source for found in sets] == [str(parent), str(parent / package.folder), str(archive)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_python_and_binary_batches_are_the_same_data(tmp_path: Path, name: str) -> None:
    both = [write_files(tmp_path / kind, official_files(LAYOUT[name, kind])) for kind in ("python", "binary")]
    python, binary = (load(f"{name}:{folder}") for folder in both)
    assert python.fingerprint == binary.fingerprint
    assert python.classes == binary.classes


@pytest.mark.usefixtures("small")
@every_package
def test_missing_files_are_named_with_the_way_to_get_them(tmp_path: Path, package: data.Layout) -> None:
    files = official_files(package)
    kept = dict(list(files.items())[2:]) or files
    folder = write_files(tmp_path / "d", kept if package.data == "cifar10" else dict([*files.items()][:1]))
    missing = [name for name in package.files if not (folder / name).exists()]
    assert missing
    assert refusal(f"{package.data}:{folder}") == (
        f"{folder}: {package.what}: {len(files) - len(missing)} of {len(files)} files, missing {', '.join(missing)}; "
        f"copy them from {package.archive}, or run: repbnn data {package.data}"
    )


@pytest.mark.usefixtures("small")
def test_truncated_and_wrong_files_are_named(tmp_path: Path) -> None:
    package = LAYOUT["cifar10", "python"]
    files = official_files(package)
    folder = write_files(tmp_path / "d", files)
    file = folder / "data_batch_3"

    file.write_bytes(files["data_batch_3"][:-5000])
    assert f"{folder}: data_batch_3: a truncated or damaged python batch" in refusal(f"cifar10:{folder}")
    pixels, labels = rows(package, "data_batch_3")
    file.write_bytes(python_batch(pixels[:12], labels[:12].tolist()))
    assert "data_batch_3: 12 images and 12 labels, expected 20 of each" in refusal(f"cifar10:{folder}")
    file.write_bytes(python_batch(pixels, [10, *labels.tolist()[1:]]))
    assert "data_batch_3: a label outside 0..9" in refusal(f"cifar10:{folder}")
    file.write_bytes(python_batch(pixels, [0] * 20))
    assert "28 images of class 0, expected 10 of each class" in refusal(f"cifar10:{folder}")
    file.write_bytes(python_batch(pixels, labels.tolist(), key=b"other"))
    assert "no list of numbers 'labels'" in refusal(f"cifar10:{folder}")
    file.write_bytes(b"\x80\x02]." + b"\0" * 10)
    assert "holds a list, expected a dictionary" in refusal(f"cifar10:{folder}")

    binary = write_files(tmp_path / "b", official_files(LAYOUT["cifar100", "binary"]))
    (binary / "test.bin").write_bytes(b"\0" * 5000)
    assert "test.bin: 5000 bytes, no multiple of 3074" in refusal(f"cifar100:{binary}")
    (binary / "test.bin").write_bytes(b"\0" * 3074)
    assert "test.bin: 1 images and 1 labels, expected 200 of each" in refusal(f"cifar100:{binary}")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def _protocol(value: object, protocol: int) -> bytes:
    return pickle.dumps({"data": value, "labels": [1]}, protocol=protocol)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("protocol", range(5))
def test_a_malicious_batch_is_refused_and_nothing_of_it_runs(tmp_path: Path, protocol: int) -> None:
    folder = write_files(tmp_path / "d", official_files(LAYOUT["cifar10", "python"]))
    (folder / "test_batch").write_bytes(_protocol(Evil(), protocol))
    assert refusal(f"cifar10:{folder}") == (
        f"{folder}: test_batch: asks for code that is not data: {os.system.__module__}.system; nothing of it was run. "
        "Take the file from cifar-10-python.tar.gz"
    )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        b'cbuiltins\neval\n(S\'open("executed", "w")\'\ntR.',
        b"(S'touch executed'\nios\nsystem\n.",  # INST
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x04pass\x85R.",  # STACK_GLOBAL
        b"\x80\x02cnumpy\nndarray\n)\x81}U\x09__class__cbuiltins\nprint\nsb.",  # BUILD
        b"\x80\x02cnumpy\nndarray.__class__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
        b"\x80\x02ccopyreg\n_reconstructor\n.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02K\x01Q.",  # a persistent id
        b"\x80\x02cnumpy\nndarray\n.",  # a class where data belongs
        b"\x80\x02}U\x01acnumpy\ndtype\n" + text(b"O8") + b"K\x00K\x01\x87Rs.",
    ],
)
def test_pickles_that_reach_beyond_data_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"asks for code that is not data|truncated or damaged"):
        unpickled(content, "x", "y")
    assert not (tmp_path / "executed").exists()


def test_a_pickle_cannot_change_what_reads_the_next_one() -> None:
    # BUILD sets attributes on the object before it; here on what stands for an array and its parts.
    names = ("numpy\nndarray", "numpy\ndtype", "numpy.core.multiarray\n_reconstruct", "_codecs\nencode")
    for name in names:
        for attribute in (b"__setstate__", b"__defaults__", b"__init__", b"numpy"):
            state = b"N}X" + len(attribute).to_bytes(4, "little") + attribute + b")s\x86b."
            with pytest.raises(DataError):
                unpickled(b"\x80\x02c" + name.encode() + b"\n" + state, "x", "y")
    pixels = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    read = unpickled(python_batch(pixels, [3, 4]), "x", "y")
    assert np.array_equal(read[b"data"], pixels)
    assert read[b"labels"] == [3, 4]
    assert set(read) == {b"batch_label", b"labels", b"data", b"filenames"}


def test_a_batch_written_by_python_3_is_read() -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for protocol in range(5):
        assert np.array_equal(unpickled(_protocol(pixels, protocol), "x", "y")[b"data"], pixels)
