"""What a loaded data set is: images and labels of training and test, class names, and a fingerprint of all of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    images: uint8 (N, C, H, W), contiguous; labels: int64 (N,), each below the number of classes. Both on one device.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8, self.images.dtype
        assert self.images.dim() == 4, self.images.shape
        assert self.labels.dtype == torch.int64, self.labels.dtype
        assert self.labels.shape == self.images.shape[:1], (self.labels.shape, self.images.shape)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Split:
        """The same split on ``device``; itself when it is there already."""
        device = torch.device(device)
        if self.images.device.type == device.type and device.index in (None, self.images.device.index):
            return self
        return Split(self.images.to(device), self.labels.to(device))


def grey(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) → (N, 1, H, W): ITU-R 601 luma as Pillow rounds it; of equal channels, their value."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).to(torch.uint8).unsqueeze(1)


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    name: ``cifar10``, ``cifar100``, ``digits`` or ``folder``; classes: names in label order; fingerprint: sha256 over
    the images and labels of both splits; source: where it was read from; notes: what has to be said beside every
    number that comes from it (e.g. that the images went through JPEG).
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    fingerprint: str
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return self.test.images.shape[1]

    def in_grey(self) -> Dataset:
        """The same images with one channel."""
        train, test = (Split(torch.cat([*map(grey, s.images.split(4096))]), s.labels) for s in (self.train, self.test))
        return replace(self, train=train, test=test)


def split_of(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Split:
    """A Split of arrays (N, C, H, W) and (N,); no copy where the layout is right already."""
    return Split(
        torch.from_numpy(np.ascontiguousarray(images, dtype=np.uint8)),
        torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)),
    )


def fingerprint_of(train: Split, test: Split) -> str:
    """sha256 (hex) over shape, image bytes and labels of both splits; the same on every machine."""
    digest = hashlib.sha256()
    for split in (train, test):
        digest.update(repr(tuple(split.images.shape)).encode())
        digest.update(split.images.cpu().contiguous().numpy().data)
        digest.update(split.labels.cpu().contiguous().numpy().astype("<i8", copy=False).data)
    return digest.hexdigest()
