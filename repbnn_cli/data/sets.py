"""Data sets by name: finds, reads and checks them; ``Batches`` and ``eval_batches`` bring them to the network."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from repbnn_cli.data import cifar_files
from repbnn_cli.data.archives import archive_entries, content_key, folder_entries, unreadable
from repbnn_cli.data.cache import cache_folder, cached
from repbnn_cli.data.cifar_files import CIFAR10_CLASSES, LAYOUTS, Layout
from repbnn_cli.data.imagenet import ImageFolders, open_folders
from repbnn_cli.data.images import TESTS, TRAIN, ImageTree
from repbnn_cli.data.splits import Dataset, fingerprint_of, split_of
from repbnn_cli.errors import DataError, UsageError

_FORMS = {
    "cifar10": "cifar10[:FOLDER-or-ARCHIVE]",
    "cifar100": "cifar100[:FOLDER-or-ARCHIVE]",
    "folder": "folder:FOLDER-or-ARCHIVE",
    "imagenet": "imagenet:FOLDER",
    "digits": "digits",
}
# Images per class in train and test, and the number of classes.
_COUNTS = {"cifar10": (5000, 1000, 10), "cifar100": (500, 100, 100)}
_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "folder": "images"}


def data_folder() -> Path:
    """Where ``repbnn data NAME`` puts what it downloads, and the first place where a name without a path is sought."""
    return cache_folder() / "data"


def open_data(spec: str) -> Dataset | ImageFolders:
    """The data set that ``spec`` names: ``load``'s, or the ImageNet-style folders of ``imagenet:FOLDER``."""
    name, path = _parsed(spec)
    if name == "imagenet":
        assert path is not None
        return open_folders(path)
    return load(spec)


def load(spec: str, *, cache: Path | None = None) -> Dataset:
    """The data set that ``spec`` names, in memory.

    ``cifar10:PATH`` and ``cifar100:PATH``: the official python or binary batches, as a folder, its parent or an
    archive; or images, ``train/CLASS/*`` and ``test/CLASS/*``, as a folder or archive (.tar, .tar.gz, .tar.xz, .zip).
    Without a path the usual places are searched. ``folder:PATH``: images with any classes. ``digits``: scikit-learn's
    handwritten digits. What is slow to decode is kept in ``cache`` (default: ``cache_folder()``).

    Raises UsageError for an unknown name, DataError for a data set that is missing, incomplete or damaged.
    """
    name, path = _parsed(spec)
    if name == "imagenet":
        raise UsageError(f"{spec}: is read batch by batch and cannot be loaded into memory; expected another data set")
    if name == "digits":
        return _digits()
    path = path or _found(name)
    try:
        if path.is_dir():
            dataset = _from_folder(name, path, cache)
        elif path.is_file():
            dataset = cached(name, content_key(path), lambda: _from_archive(name, path), folder=cache)
        else:
            raise DataError(f"{path}: no such file or folder; check the path{_how_to_get(name)}")
    except OSError as error:
        raise unreadable(path, error) from None
    if name in _COUNTS:
        _check_counts(dataset, path)
    return replace(dataset, source=str(path))


def check_spec(spec: str) -> None:
    """Raises UsageError for what no `--data` can be; whether the data is there is not looked at."""
    _parsed(spec)


def check_there(spec: str) -> None:
    """Raises UsageError for what no `--data` can be, DataError where nothing is at its path; what, is not looked at."""
    name, path = _parsed(spec)
    if path is not None and not path.exists():
        raise DataError(f"{path}: no such file or folder; check the path{_how_to_get(name)}")


def _parsed(spec: str) -> tuple[str, Path | None]:
    name, _, path = spec.partition(":")
    if name not in _FORMS:
        close = difflib.get_close_matches(name, _FORMS, n=1)
        hint = f"; did you mean {_FORMS[close[0]]}?" if close else ""
        raise UsageError(f"--data {spec}: unknown data set; expected one of {', '.join(_FORMS.values())}{hint}")
    if name == "digits" and path:
        raise UsageError(f"--data {spec}: digits come with scikit-learn and take no path; expected digits")
    if name in ("folder", "imagenet") and not path:
        raise UsageError(f"--data {spec}: needs a path; expected {_FORMS[name]}")
    return name, Path(path).expanduser() if path else None


def _how_to_get(name: str) -> str:
    return f", or run: repbnn data {name}" if name in _COUNTS else ""


def find(name: str) -> Path | None:
    """The first official package of ``cifar10`` or ``cifar100`` in the usual places, not looked into."""
    places = [folder / part for folder in _places() for part in _packages(name)]
    return next((path for path in places if path.exists()), None)


def _places() -> list[Path]:
    return [data_folder(), Path("data"), Path()]


def _packages(name: str) -> list[str]:
    return [part for layout in LAYOUTS if layout.data == name for part in (layout.folder, layout.archive)]


def _found(name: str) -> Path:
    found = find(name)
    if found is not None:
        return found
    places, names = _places(), _packages(name)
    raise DataError(
        f"{name}: not found in {', '.join(map(str, places[:2]))} or the current folder (as {', '.join(names)}); "
        f"run: repbnn data {name}, or say where it is with --data {_FORMS[name]}"
    )


def _from_folder(name: str, folder: Path, cache: Path | None) -> Dataset:
    for place in (folder, *(folder / layout.folder for layout in LAYOUTS if layout.data == name)):
        present = [entry.name for entry in os.scandir(place) if entry.is_file()] if place.is_dir() else []
        layout = cifar_files.layout_of(name, present)
        if layout is not None:
            files = {file: (place / file).read_bytes() for file in layout.files if file in present}
            return _official(layout, files, str(place))
    splits = tuple(split for split in (TRAIN, *TESTS) if (folder / split).is_dir())
    if splits:
        return cached(name, content_key(folder, splits), lambda: _from_images(name, folder, splits), folder=cache)
    for layout in LAYOUTS:
        path = folder / layout.archive
        if layout.data == name and path.is_file():
            return cached(name, content_key(path), partial(_from_archive, name, path), folder=cache)
    split = Path(os.path.abspath(folder))
    meant = f"; did you mean {name}:{os.path.normpath(folder / '..')}?" if split.name in (TRAIN, *TESTS) else ""
    raise DataError(f"{folder}: no {_TITLES[name]} in it; {_expected(name)}{_how_to_get(name)}{meant}")


def _from_archive(name: str, path: Path) -> Dataset:
    wanted = {file for layout in LAYOUTS if layout.data == name for file in layout.files}
    official: dict[str, bytes] = {}
    with ImageTree(str(path)) as tree:
        for entry in archive_entries(path):
            file = entry.name.rpartition("/")[2]
            if file in wanted:
                official[file] = entry.read()
            else:
                tree.add(entry)
        layout = cifar_files.layout_of(name, official)
        if layout is not None:
            return _official(layout, official, str(path))
        if not tree:
            raise DataError(f"{path}: no {_TITLES[name]} in it; {_expected(name)}{_how_to_get(name)}")
        return tree.dataset(name)


def _from_images(name: str, folder: Path, splits: tuple[str, ...]) -> Dataset:
    with ImageTree(str(folder)) as tree:
        for entry in folder_entries(folder, splits):
            tree.add(entry)
        return tree.dataset(name)


def _expected(name: str) -> str:
    official = [layout.folder for layout in LAYOUTS if layout.data == name]
    images = f"images as {TRAIN}/CLASS/*.png|jpg and {TESTS[0]}/CLASS/*.png|jpg"
    return f"expected {', '.join([*official, images])}"


def _official(layout: Layout, files: Mapping[str, bytes], where: str) -> Dataset:
    train, test, classes = cifar_files.read(layout, files, where)
    return Dataset(layout.data, train, test, classes, fingerprint_of(train, test), where)


def _check_counts(dataset: Dataset, path: Path) -> None:
    """Refuse a CIFAR data set of images that is not all of it, naming the first class that differs."""
    *per_split, count = _COUNTS[dataset.name]
    title, folder = _TITLES[dataset.name], f"a part of it, or anything else, can be given as folder:{path}"
    names = CIFAR10_CLASSES if dataset.name == "cifar10" else dataset.classes
    missing, unknown = sorted(set(names) - set(dataset.classes)), sorted(set(dataset.classes) - set(names))
    if missing or unknown or len(dataset.classes) != count:
        what = [f"no images of {', '.join(missing)}"] if missing else []
        what += [f"unknown classes {', '.join(unknown[:5])}"] if unknown else []
        what = what or [f"{len(dataset.classes)} classes, expected {count}"]
        raise DataError(f"{path}: not {title}: {'; '.join(what)}{_how_to_get(dataset.name)}; {folder}")
    for split, label, expected in ((dataset.train, "train", per_split[0]), (dataset.test, "test", per_split[1])):
        counts = torch.bincount(split.labels, minlength=count)
        wrong = [index for index in range(count) if counts[index] != expected]
        if wrong:
            listed = ", ".join(f"{dataset.classes[index]} {int(counts[index])}" for index in wrong[:5])
            more = f" and {len(wrong) - 5} more classes" if wrong[5:] else ""
            raise DataError(
                f"{path}: {title} is incomplete: {label} has {listed}{more}, expected {expected} images of each class; "
                f"copy it again{_how_to_get(dataset.name)}; {folder}"
            )
    size = tuple(dataset.train.images.shape[1:])
    if size != (3, 32, 32) or tuple(dataset.test.images.shape[1:]) != size:
        raise DataError(f"{path}: not {title}: images of {size[2]}x{size[1]} pixels, expected 32x32; {folder}")


def _digits() -> Dataset:
    """scikit-learn's 1797 digits (8×8, 17 grey levels) as 3×32×32: every fifth of each digit is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "digits: come with scikit-learn, which is not installed; run: pip install 'repbnn[digits]'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    grey = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    # Every pixel becomes 4×4: the same on every machine, which no interpolation promises.
    images = np.broadcast_to(grey.repeat(4, axis=2).repeat(4, axis=3), (len(grey), 3, 32, 32))
    test = np.zeros(len(images), dtype=bool)
    for digit in range(10):
        test[np.flatnonzero(labels == digit)[4::5]] = True
    train, tests = (split_of(images[chosen], labels[chosen]) for chosen in (~test, test))
    return Dataset("digits", train, tests, tuple("0123456789"), fingerprint_of(train, tests), "scikit-learn")
