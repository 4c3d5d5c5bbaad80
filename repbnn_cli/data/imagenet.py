"""ImageNet-style folders, ``train/<wnid>/*`` and ``val/<wnid>/*``: decoded and augmented in worker processes.

What happens to an image is a function of (seed, epoch, image) alone, so the number of workers changes nothing and an
epoch can be entered at any batch. Damaged images are named and skipped, up to a limit.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from repbnn_cli.data.archives import unreadable
from repbnn_cli.data.batches import MEAN, STD, Normaliser, generator_for
from repbnn_cli.data.image_crops import Augmentation, Pixels, centre_pixels, training_pixels
from repbnn_cli.data.images import FORMATS, SUFFIXES, TESTS, TRAIN
from repbnn_cli.data.sharding import Sharding
from repbnn_cli.data.splits import grey
from repbnn_cli.errors import DataError, UsageError
from repbnn_cli.wording import some


@dataclass(frozen=True)
class FolderSplit:
    """Files below ``folder`` with their labels; names: fixed-width bytes (n,), relative to it; labels: int64 (n,)."""

    # One array, not a list of texts: worker processes share it without touching a reference count per name.
    folder: Path
    names: np.ndarray[Any, np.dtype[np.bytes_]]
    labels: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.folder / os.fsdecode(bytes(self.names[index]))


@dataclass(frozen=True)
class ImageFolders:
    """An ImageNet-style data set on the disk. fingerprint: sha256 over the names and sizes of all files; channels: that
    its batches have, 3 or 1."""

    name: str
    train: FolderSplit
    test: FolderSplit
    classes: tuple[str, ...]
    fingerprint: str
    source: str
    notes: tuple[str, ...] = ()
    channels: int = 3

    def in_grey(self) -> ImageFolders:
        """The same images with one channel."""
        return replace(self, channels=1)


def open_folders(folder: Path) -> ImageFolders:
    """The data set in ``folder``: ``train/CLASS/*`` and ``val/CLASS/*`` (or ``test``), classes in alphabetical order.

    Lists the folders, opens no image. Raises DataError for splits or classes that are missing or without images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    test = next((name for name in reversed(TESTS) if (folder / name).is_dir()), None)
    if test is None or not (folder / TRAIN).is_dir():
        missing = TRAIN if test else "val"
        raise DataError(f"{folder}: no folder {missing} in it; expected train/CLASS/*.jpg and val/CLASS/*.jpg")
    try:
        listed = {name: _listed(folder / name) for name in (TRAIN, test)}
    except OSError as error:
        raise unreadable(folder, error) from None
    classes = {name: set(listed[name]) for name in listed}
    for name, other in ((TRAIN, test), (test, TRAIN)):
        absent = sorted(classes[other] - classes[name])
        if absent:
            flat = "" if classes[name] else ": its images have to be sorted into one folder per class"
            shown = some(absent, 5)
            raise DataError(
                f"{folder / name}: no images of {shown}, {other}/ has{flat or '; add them, or remove both'}"
            )
    digest = hashlib.sha256()
    names = tuple(sorted(classes[TRAIN]))
    train, tests = (_split(folder / name, names, listed[name], digest) for name in (TRAIN, test))
    return ImageFolders("imagenet", train, tests, names, digest.hexdigest(), str(folder))


def _listed(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Class → its image files as (name, bytes), sorted; classes without any are left out."""
    classes = {}
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            files = sorted(
                (file.name, file.stat().st_size)
                for file in os.scandir(entry.path)
                if file.name.lower().endswith(SUFFIXES) and not file.name.startswith(".")
            )
            if files:
                classes[entry.name] = files
    if not classes and folder.name == TRAIN:
        raise DataError(f"{folder}: no images in it; expected one folder per class with .jpg or .png files")
    return classes


def _split(folder: Path, classes: Sequence[str], listed: dict[str, list[tuple[str, int]]], digest: Any) -> FolderSplit:
    names, labels = [], []
    for label, name in enumerate(classes):
        for file, size in listed[name]:
            names.append(os.fsencode(f"{name}/{file}"))
            labels.append(label)
            digest.update(names[-1] + f"\0{size}\n".encode())
    digest.update(b"\0")
    return FolderSplit(folder, np.array(names, dtype=np.bytes_), np.array(labels, dtype=np.int64))


# -- batches ----------------------------------------------------------------------------------------------------------


def warn(message: str) -> None:
    """Report a damaged image as a Python warning, where nobody gives `Damages` a function of their own."""
    warnings.warn(message, stacklevel=2)


class FolderBatches:
    """The training batches of an ImageNet-style split; what ``batches.Batches`` is for a split in memory.

    batch_size, drop_last, rank, world: see ``Sharding``. ``workers`` processes decode (0: this one). A damaged image
    gives its place to the next good one of the data set, so that batches keep their size; see ``Damages``.
    """

    def __init__(
        self,
        split: FolderSplit,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        augmentation: Augmentation | None = None,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
        channels_last: bool = True,
        channels: int = 3,
        workers: int = 4,
        damages: Damages | None = None,
    ) -> None:
        self.sharding = Sharding(len(split), batch_size, drop_last, rank, world)
        self.seed, self.device, self.channels_last = seed, torch.device(device), channels_last
        self.channels = channels
        self.normalise = Normaliser(self.device, dtype, mean, std)
        damages = damages or Damages()
        self._decoder = _Decoder(split, seed, augmentation or Augmentation(), damages.limit)
        self._reader = _Reader(self._decoder, self.device, workers, damages)

    def __len__(self) -> int:
        return len(self.sharding)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of batch ``start`` and all after it: images normalised, (n, C, S, S); labels int64 (n,)."""
        count = len(self._decoder.split)
        order = torch.randperm(count, generator=generator_for(self.seed, epoch)).tolist()
        keys = [[(epoch, index) for index in order[part]] for part in self.sharding.parts(start)]
        for images, labels in self._reader.read(keys):
            batch = self.normalise(images if self.channels == 3 else grey(images))
            yield (batch if self.channels_last else batch.contiguous()), labels


def eval_folder_batches(
    split: FolderSplit,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    size: int = 224,
    resize: int = 256,
    rank: int = 0,
    world: int = 1,
    channels_last: bool = True,
    channels: int = 3,
    workers: int = 4,
    damages: Damages | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) in order: shorter side resized to ``resize``, centre ``size`` cut out.

    A damaged image is left out of its batch; see ``Damages``.
    """
    sharding = Sharding(len(split), batch_size, False, rank, world)
    if not 0 < size <= resize:
        raise UsageError(f"test images: cannot cut {size} pixels out of {resize}; choose a size up to {resize}")
    normalise = Normaliser(device, dtype, mean, std)
    damages = damages or Damages()
    reader = _Reader(_Decoder(split, None, (size, resize), damages.limit), torch.device(device), workers, damages)
    keys = [[(0, index) for index in range(part.start, part.stop)] for part in sharding.parts()]
    for images, labels in reader.read(keys):
        batch = normalise(images if channels == 3 else grey(images))
        yield (batch if channels_last else batch.contiguous()), labels


class _Sample(NamedTuple):
    """pixels: uint8 (S, S, 3), None for a damaged image that nothing replaces; damaged: index and reason of each."""

    pixels: Pixels | None
    label: int
    damaged: list[tuple[int, str]]


class _Decoder(torch.utils.data.Dataset[_Sample]):
    """Decodes image ``index`` of ``epoch``; runs in the worker processes."""

    def __init__(
        self, split: FolderSplit, seed: int | None, how: Augmentation | tuple[int, int], max_damaged: int
    ) -> None:
        self.split, self._seed, self._how, self._max_damaged = split, seed, how, max_damaged

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        epoch, wanted = key
        damaged: list[tuple[int, str]] = []
        # Testing replaces nothing: every image counts once.
        attempts = 1 if isinstance(self._how, tuple) else min(self._max_damaged + 1, len(self.split))
        for offset in range(attempts):
            index = (wanted + offset) % len(self.split)
            try:
                return _Sample(self._pixels(epoch, wanted, index), int(self.split.labels[index]), damaged)
            except Exception as error:  # a damaged image raises anything
                what = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
                damaged.append((index, what))
        return _Sample(None, -1, damaged)

    def _pixels(self, epoch: int, wanted: int, index: int) -> Pixels:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; the pixels are what counts
            with Image.open(self.split.path(index), formats=FORMATS) as image:
                if isinstance(self._how, tuple):
                    return centre_pixels(image, *self._how)
                # Text seeds are hashed; the place in the epoch decides, whichever image ends up in it.
                return training_pixels(image, self._how, random.Random(f"{self._seed},{epoch},{wanted}"))


class Damages:
    """The damaged images that one process has met: tells `report` of each once, raises DataError beyond the limit."""

    def __init__(self, report: Callable[[str], None] = warn, limit: int = 10) -> None:
        self.limit, self._report = limit, report
        self._seen: set[Path] = set()

    def add(self, path: Path, reason: str) -> None:
        if path in self._seen:
            return
        self._seen.add(path)
        line = f"{path}: damaged image ({reason})"
        if len(self._seen) > self.limit:
            raise DataError(f"{line}, and {self.limit} were skipped before it; copy the data set again")
        self._report(f"{line}, skipped ({len(self._seen)} of at most {self.limit}); copy it again")


_Batch = tuple[Tensor, Tensor, list[tuple[int, str]]]


class _Reader:
    """Runs the decoder over lists of keys and brings the batches to the device."""

    def __init__(self, decoder: _Decoder, device: torch.device, workers: int, damages: Damages) -> None:
        self._decoder, self._device, self._workers, self._damages = decoder, device, workers, damages

    def read(self, batches: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 (n, 3, S, S) in channels_last layout and labels (n,), per list of keys that has an image."""
        loader: DataLoader[Any] = DataLoader(
            self._decoder,
            batch_sampler=[keys for keys in batches if keys],
            num_workers=self._workers,
            collate_fn=_collated,
            pin_memory=self._device.type == "cuda",
            # Else every epoch draws from the global generator, and one that is entered again after a resume once more.
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_parent,
        )
        try:
            for images, labels, damaged in loader:
                for index, reason in damaged:
                    self._damages.add(self._decoder.split.path(index), reason)
                if len(labels):
                    yield (
                        images.to(self._device, non_blocking=True).permute(0, 3, 1, 2),
                        labels.to(self._device, non_blocking=True),
                    )
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{self._decoder.split.folder}: a process that decodes images died ({str(error).splitlines()[0]}); "
                "often memory or /dev/shm is full: use fewer --workers"
            ) from None


def _collated(samples: list[_Sample]) -> _Batch:
    good = [sample for sample in samples if sample.pixels is not None]
    pixels = (
        np.stack([sample.pixels for sample in good if sample.pixels is not None]) if good else np.zeros((0, 1, 1, 3))
    )
    labels = torch.tensor([sample.label for sample in good], dtype=torch.int64)
    return torch.from_numpy(pixels), labels, [damage for sample in samples for damage in sample.damaged]


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the training process decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
