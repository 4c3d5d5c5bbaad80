"""The official CIFAR files, python and binary batches, read without executing anything that is in them.

https://www.cs.toronto.edu/~kriz/cifar.html describes both. A python batch is a pickle of one dictionary; it is read by
an unpickler that knows NumPy arrays, text and numbers and refuses every other name in the file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from repbnn_cli.checkpoint.pickles import ArrayStandIn, DtypeStandIn
from repbnn_cli.data.splits import Split, split_of
from repbnn_cli.errors import DataError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """The files of one official package. rows: images per file; labels: key, or label bytes before each binary row."""

    data: str
    what: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    train_rows: int
    test_rows: int
    labels: bytes | int
    names: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that has to be there."""
        return (*self.train, *self.test, *([self.names] if self.names else []))

    @property
    def classes(self) -> int:
        return 10 if self.data == "cifar10" else 100


LAYOUTS = (
    Layout(
        data="cifar10",
        what="CIFAR-10 python batches",
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test=("test_batch",),
        train_rows=10000,
        test_rows=10000,
        labels=b"labels",
    ),
    Layout(
        data="cifar10",
        what="CIFAR-10 binary batches",
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test=("test_batch.bin",),
        train_rows=10000,
        test_rows=10000,
        labels=1,
    ),
    Layout(
        data="cifar100",
        what="CIFAR-100 python batches",
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        train=("train",),
        test=("test",),
        train_rows=50000,
        test_rows=10000,
        labels=b"fine_labels",
        names="meta",
    ),
    Layout(
        data="cifar100",
        what="CIFAR-100 binary batches",
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        train=("train.bin",),
        test=("test.bin",),
        train_rows=50000,
        test_rows=10000,
        labels=2,
        names="fine_label_names.txt",
    ),
)


def layout_of(data: str, names: Collection[str]) -> Layout | None:
    """The official package of ``cifar10`` or ``cifar100`` that these file names belong to; the fuller one of two."""
    found = [layout for layout in LAYOUTS if layout.data == data and set(layout.files) & set(names)]
    return max(found, key=lambda layout: len(set(layout.files) & set(names)), default=None)


def read(layout: Layout, files: Mapping[str, bytes], where: str) -> tuple[Split, Split, tuple[str, ...]]:
    """Training split, test split and class names from the contents of the layout's files.

    Images come in the order of the files, as uint8 (N, 3, 32, 32). Raises DataError naming files that are missing,
    damaged, of another size than the official ones, or that ask for code; and classes without all of their images.
    """
    missing = [name for name in layout.files if name not in files]
    if missing:
        raise DataError(
            f"{where}: {layout.what}: {len(layout.files) - len(missing)} of {len(layout.files)} files, missing "
            f"{', '.join(missing)}; copy them from {layout.archive}, or run: repbnn data {layout.data}"
        )
    train = _split(layout, layout.train, layout.train_rows, files, where)
    test = _split(layout, layout.test, layout.test_rows, files, where)
    return train, test, _class_names(layout, files, where)


def _split(layout: Layout, names: tuple[str, ...], rows: int, files: Mapping[str, bytes], where: str) -> Split:
    read_rows = _python_rows if isinstance(layout.labels, bytes) else _binary_rows
    parts = [read_rows(layout, files[name], f"{where}: {name}") for name in names]
    for name, (images, labels) in zip(names, parts, strict=True):
        if images.shape != (rows, _PIXELS) or labels.shape != (rows,):
            raise DataError(
                f"{where}: {name}: {len(images)} images and {len(labels)} labels, expected {rows} of each; "
                f"copy it again from {layout.archive}"
            )
        if labels.min() < 0 or labels.max() >= layout.classes:
            raise DataError(f"{where}: {name}: a label outside 0..{layout.classes - 1}; not a {layout.what} file")
    labels = np.concatenate([part[1] for part in parts])
    counts = np.bincount(labels, minlength=layout.classes)
    expected = rows * len(names) // layout.classes
    if (counts != expected).any():
        label = int(np.flatnonzero(counts != expected)[0])
        raise DataError(
            f"{where}: {', '.join(names)}: {counts[label]} images of class {label}, expected {expected} of each class; "
            f"copy them again from {layout.archive}"
        )
    return split_of(np.concatenate([part[0] for part in parts]).reshape(-1, 3, 32, 32), labels)


def _binary_rows(layout: Layout, content: bytes, where: str) -> tuple[Any, Any]:
    assert isinstance(layout.labels, int)
    width = layout.labels + _PIXELS
    if len(content) % width or not content:
        raise DataError(f"{where}: {len(content)} bytes, no multiple of {width}; copy it again from {layout.archive}")
    table = np.frombuffer(content, np.uint8).reshape(-1, width)
    # CIFAR-100 rows begin with the coarse label; the one before the pixels is the fine one.
    return table[:, layout.labels :], table[:, layout.labels - 1].astype(np.int64)


def _python_rows(layout: Layout, content: bytes, where: str) -> tuple[Any, Any]:
    assert isinstance(layout.labels, bytes)
    batch = unpickled(content, where, layout.archive)
    images = batch.get(b"data")
    labels = batch.get(layout.labels)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2:
        raise DataError(f"{where}: no uint8 array 'data' in it; not one of the {layout.what}, give the official file")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        key = layout.labels.decode()
        raise DataError(f"{where}: no list of numbers '{key}' in it; not one of the {layout.what}")
    return images, np.array(labels, dtype=np.int64)


def _class_names(layout: Layout, files: Mapping[str, bytes], where: str) -> tuple[str, ...]:
    if layout.names is None:
        return CIFAR10_CLASSES
    if isinstance(layout.labels, bytes):
        listed = unpickled(files[layout.names], f"{where}: {layout.names}", layout.archive).get(b"fine_label_names")
        names = [bytes(name).decode("utf-8", "replace") for name in listed] if isinstance(listed, list) else []
    else:
        names = files[layout.names].decode("utf-8", "replace").split()
    if len(set(names)) != layout.classes:
        raise DataError(
            f"{where}: {layout.names}: {len(set(names))} class names, expected {layout.classes}; "
            f"copy it again from {layout.archive}"
        )
    return tuple(names)


class _ForeignNameError(Exception):
    """The pickle asks for something that is not data."""


def unpickled(content: bytes, where: str, archive: str) -> dict[bytes, Any]:
    """The dictionary in a python batch: keys are bytes; values dicts, lists, bytes, text, numbers and arrays.

    Nothing is imported and no function of the file's choice is called: the names that a pickled array needs stand for
    functions made here, for this one file, and every other name is refused. Raises DataError.
    """
    try:
        content_of_file = _Reader(io.BytesIO(content)).load()
        batch = _plain(content_of_file)
    except _ForeignNameError as asked:
        raise DataError(
            f"{where}: asks for code that is not data: {asked}; nothing of it was run. Take the file from {archive}"
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        what = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(
            f"{where}: a truncated or damaged python batch ({what}); copy it again from {archive}"
        ) from None
    if not isinstance(batch, dict):
        raise DataError(f"{where}: holds a {type(batch).__name__}, expected a dictionary; take the file from {archive}")
    return {key.encode("latin1") if isinstance(key, str) else key: value for key, value in batch.items()}


class _Reader(pickle.Unpickler):
    """An unpickler whose every name is looked up in a table of its own."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, encoding="bytes")

        # A pickle may set attributes on a function it was given, so each file gets functions of its own. (The two
        # classes have a __setstate__, which is called instead and takes nothing but the state of an array.)
        def array(*_: Any) -> ArrayStandIn:
            return ArrayStandIn()

        def encoded(text: str, encoding: Any = "latin1") -> bytes:
            return text.encode("latin1")

        self._known: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): ArrayStandIn,
            ("numpy", "dtype"): DtypeStandIn,
            ("numpy.core.multiarray", "_reconstruct"): array,
            ("numpy._core.multiarray", "_reconstruct"): array,
            ("_codecs", "encode"): encoded,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise _ForeignNameError(f"{module}.{name}")
        return self._known[module, name]


def _plain(value: Any) -> Any:
    """``value`` with arrays in the place of their stand-ins, once it is clear that it holds nothing but data."""
    if isinstance(value, ArrayStandIn):
        return value.value
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    if type(value) is list:
        return [_plain(item) for item in value]
    if value is None or type(value) in (bytes, str, int, float, bool):
        return value
    raise _ForeignNameError(f"a {type(value).__name__}")
