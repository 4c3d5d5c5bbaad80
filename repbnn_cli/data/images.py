"""A folder or archive of images, ``train/CLASS/*`` and ``test/CLASS/*``, decoded into one array per split."""

from __future__ import annotations

import io
import os
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from repbnn_cli.data.archives import Entry
from repbnn_cli.data.splits import Dataset, Split, fingerprint_of, split_of
from repbnn_cli.errors import DataError
from repbnn_cli.wording import some

TRAIN, TESTS = "train", ("test", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_LOSSY = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP"}
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_CHUNK = 500
_EXPECTED = "expected train/CLASS/*.png|jpg and test/CLASS/*.png|jpg"


class Place(NamedTuple):
    """Where an image belongs: what is before the split's folder, the split, the class, the file name."""

    root: str
    split: str
    label: str
    file: str

    def __str__(self) -> str:
        return "/".join(part for part in self if part)


def place_of(name: str) -> Place | None:
    """The place of a path like ``any/train/cat/0001.png``; None for all other paths and for hidden files."""
    parts = name.removeprefix("./").rsplit("/", 3)
    root, split, label, file = ["", *parts] if len(parts) == 3 else parts if len(parts) == 4 else [""] * 4
    if split not in (TRAIN, *TESTS) or root.startswith("__MACOSX") or file.startswith("."):
        return None
    return Place(root, split, label, file)


def _is_deeper(name: str) -> bool:
    """Whether an image lies in a folder of a class: ``any/train/cat/young/0001.png``."""
    *folders, file = name.split("/")
    hidden = file.startswith(".") or "__MACOSX" in folders
    return not hidden and os.path.splitext(file)[1].lower() in SUFFIXES and bool({TRAIN, *TESTS} & {*folders[:-2]})


class ImageTree:
    """Collects encoded images one by one, decodes them in threads meanwhile, and makes the data set of them.

    Threads, because libjpeg and the archive's decompression run beside each other outside of Python's lock.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._places: list[Place] = []
        self._ignored: list[str] = []
        self._chunk: list[tuple[Place, bytes]] = []
        self._decoded: list[Future[list[np.ndarray[Any, Any]]]] = []
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))

    def __enter__(self) -> ImageTree:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, entry: Entry) -> None:
        """Take the file if it is an image of the set; what lies beside the images and is none gets into the notes."""
        place = place_of(entry.name)
        if place is None:
            if _is_deeper(entry.name):
                self._ignored.append(entry.name)
            return
        if os.path.splitext(place.file)[1].lower() not in SUFFIXES:
            self._ignored.append(entry.name)
            return
        self._places.append(place)
        self._chunk.append((place, entry.read()))
        if len(self._chunk) == _CHUNK:
            self._submit()

    def dataset(self, name: str) -> Dataset:
        """The data set of all images taken: classes in alphabetical order, images sorted by class and file name.

        Grey and palette images become RGB; all images need one size. Raises DataError for images that cannot be
        decoded or differ in size, for a missing split or class, and for trees that lie in several places.
        """
        self._submit()
        classes, test = self._check()
        images = [image for future in self._decoded for image in future.result()]
        self._check_sizes(images)
        train_split = self._split(images, TRAIN, classes)
        test_split = self._split(images, test, classes)
        fingerprint = fingerprint_of(train_split, test_split)
        return Dataset(name, train_split, test_split, classes, fingerprint, self._where, self._notes(test))

    def _submit(self) -> None:
        if self._chunk:
            self._decoded.append(self._pool.submit(_decode, self._chunk, self._where))
            self._chunk = []

    def _check(self) -> tuple[tuple[str, ...], str]:
        splits = {place.split for place in self._places}
        test = next((split for split in TESTS if split in splits), None)
        if TRAIN not in splits or test is None:
            found = f"images in {', '.join(sorted(splits))} only" if splits else "no images"
            raise DataError(f"{self._where}: {found}; {_EXPECTED}")
        roots = sorted({place.root for place in self._places})
        if len(roots) > 1:
            raise DataError(f"{self._where}: images in several places ({', '.join(roots[:3])}); give one of them")
        classes = {split: {place.label for place in self._places if place.split == split} for split in (TRAIN, test)}
        for split, other in ((TRAIN, test), (test, TRAIN)):
            absent = sorted(classes[other] - classes[split])
            if absent:
                shown = some(absent, 5)
                raise DataError(
                    f"{self._where}: {split}/ has no images of {shown}, {other}/ has; add them, or remove both"
                )
        twice = [place for place, count in Counter(self._places).items() if count > 1]
        if twice:
            raise DataError(
                f"{self._where}: {twice[0]} is there {Counter(self._places)[twice[0]]} times; remove all but one"
            )
        return tuple(sorted(classes[TRAIN])), test

    def _check_sizes(self, images: list[np.ndarray[Any, Any]]) -> None:
        sizes = Counter(image.shape for image in images)
        common = sizes.most_common(1)[0][0]
        for place, image in zip(self._places, images, strict=True):
            if image.shape != common:
                raise DataError(
                    f"{self._where}: {place} is {image.shape[1]}x{image.shape[0]} pixels, most are "
                    f"{common[1]}x{common[0]}; bring all to one size, or give the folder as imagenet:FOLDER"
                )

    def _split(self, images: list[np.ndarray[Any, Any]], split: str, classes: tuple[str, ...]) -> Split:
        chosen = sorted((place, index) for index, place in enumerate(self._places) if place.split == split)
        number = {label: index for index, label in enumerate(classes)}
        array = np.empty((len(chosen), 3, *images[0].shape[:2]), np.uint8)
        for row, (_, index) in enumerate(chosen):
            array[row] = images[index].transpose(2, 0, 1)
        return split_of(array, np.array([number[place.label] for place, _ in chosen], dtype=np.int64))

    def _notes(self, test: str) -> tuple[str, ...]:
        notes = []
        lossy = Counter(_LOSSY.get(os.path.splitext(place.file)[1].lower()) for place in self._places)
        del lossy[None]
        for kind in sorted(filter(None, lossy)):
            notes.append(f"{kind} copy: {lossy[kind]} images went through lossy compression, not the original pixels")
        if self._ignored:
            notes.append(
                f"{len(self._ignored)} files that are no images of a class were left out, e.g. {self._ignored[0]}"
            )
        unused = sum(place.split not in (TRAIN, test) for place in self._places)
        if unused:
            notes.append(f"{unused} images of {TESTS[1]}/ were left out: {test}/ is the test split")
        return tuple(notes)


def _decode(chunk: list[tuple[Place, bytes]], where: str) -> list[np.ndarray[Any, Any]]:
    """RGB arrays (H, W, 3), uint8."""
    images = []
    for place, content in chunk:
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                images.append(np.asarray(image.convert("RGB")))
        except Exception as error:  # a damaged image raises anything
            known = isinstance(error, UnidentifiedImageError)  # its text names an object in memory
            what = "no image of a known format" if known else (str(error) or type(error).__name__).splitlines()[0][:120]
            raise DataError(f"{where}: {place} cannot be decoded ({what}); copy it again, or remove it") from None
    return images
