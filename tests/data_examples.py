"""Small data sets in every official format, for tests: the files look as the real ones do, with fewer rows."""

from __future__ import annotations

import dataclasses
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repbnn_cli.data import cifar_files, load
from repbnn_cli.data import sets as data
from repbnn_cli.data.cifar_files import CIFAR10_CLASSES, Layout
from repbnn_cli.errors import DataError

ROWS = {"cifar10": 20, "cifar100": 200}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Official files of 20 (CIFAR-10) and 200 (CIFAR-100) images, and as many images per class as these give."""
    layouts = [
        dataclasses.replace(layout, train_rows=ROWS[layout.data], test_rows=ROWS[layout.data]) for layout in LAYOUTS
    ]
    monkeypatch.setattr(cifar_files, "LAYOUTS", layouts)
    monkeypatch.setattr(data, "LAYOUTS", layouts)
    monkeypatch.setattr(data, "_COUNTS", {"cifar10": (10, 2, 10), "cifar100": (2, 2, 100)})


LAYOUTS = cifar_files.LAYOUTS
LAYOUT = {(layout.data, "python" if isinstance(layout.labels, bytes) else "binary"): layout for layout in LAYOUTS}


def rows(layout: Layout, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 3072) and labels (n,) of one file, a function of its name; every class equally often."""
    generator = np.random.default_rng(sum(name.removesuffix(".bin").encode()))
    count = ROWS[layout.data]
    labels = generator.permutation(np.arange(count) % layout.classes)
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), labels


def official_files(layout: Layout) -> dict[str, bytes]:
    files = {}
    for name in (*layout.train, *layout.test):
        pixels, labels = rows(layout, name)
        if isinstance(layout.labels, bytes):
            files[name] = python_batch(pixels, labels.tolist(), layout.labels)
        else:
            coarse = [np.zeros((len(labels), 1))] * (layout.labels - 1)
            table = np.concatenate([*coarse, labels[:, None], pixels], axis=1)
            files[name] = table.astype(np.uint8).tobytes()
    names = [f"class_{number:02}" for number in range(100)]
    if layout.names == "meta":
        items = b"".join(text(name.encode()) for name in names)
        files["meta"] = b"\x80\x02}" + text(b"fine_label_names") + b"](" + items + b"es."
    elif layout.names:
        files[layout.names] = "\n".join(names).encode() + b"\n\n"
    return files


def text(value: bytes) -> bytes:
    """A string as Python 2 pickled it."""
    return b"U" + bytes([len(value)]) + value


def python_batch(pixels: np.ndarray, labels: list[int], key: bytes = b"labels") -> bytes:
    """Instruction for instruction what Python 2 and the NumPy of the time wrote into the official files."""
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    shape = b"".join(b"M" + int(side).to_bytes(2, "little") for side in pixels.shape) + b"\x86"
    dtype = b"cnumpy\ndtype\nq\n" + text(b"u1") + b"K\x00K\x01\x87Rq\x0b(K\x03" + text(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85" + text(b"b") + b"\x87Rq\x09"
    array += b"(K\x01" + shape + dtype + b"\x89T" + pixels.size.to_bytes(4, "little") + pixels.tobytes() + b"tb"
    names = b"](" + text(b"a.png") * len(labels) + b"e"
    return (
        b"\x80\x02}q\x01("
        + (text(b"batch_label") + text(b"training batch 1 of 5") + text(key) + b"](" + numbers + b"e")
        + (text(b"data") + array + text(b"filenames") + names + b"u.")
    )


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def packed(path: Path, files: dict[str, bytes]) -> Path:
    """An archive of the kind that the name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    kind = path.suffix.removeprefix(".").replace("tgz", "gz")
    with tarfile.open(path, "w" if kind == "tar" else f"w:{kind}") as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def picture(seed: int, size: tuple[int, int] = (32, 32), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A smooth random image, so that JPEG and resizing change little of it."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(stream, kind)
    return stream.getvalue()


def image_files(suffix: str = ".png", classes: tuple[str, ...] = CIFAR10_CLASSES, train: int = 10) -> dict[str, bytes]:
    """``train`` images per class in train/, two in test/."""
    kind = {".png": "PNG", ".jpg": "JPEG"}[suffix]
    return {
        f"{split}/{label}/{number:04}{suffix}": picture(hash_of(split, label, number), kind=kind)
        for split, count in (("train", train), ("test", 2))
        for label in classes
        for number in range(count)
    }


def hash_of(split: str, label: str, number: int) -> int:
    return sum(split.encode()) * 100000 + sum(label.encode()) * 100 + number


def pixels_of(content: bytes) -> np.ndarray:
    """(3, H, W)"""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)


def refusal(spec: str) -> str:
    """What ``load`` says about a data set that it cannot give."""
    with pytest.raises(DataError) as caught:
        load(spec)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    return str(caught.value)
