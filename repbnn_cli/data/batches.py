"""Batches of a data set that lives on the device as uint8: shuffled, augmented in one gather per epoch, normalised.

Everything random is a function of (seed, epoch): an epoch is entered at any batch, on any number of ranks, on any
device, and gives the same images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from repbnn_cli.data.sharding import Sharding
from repbnn_cli.data.splits import Split
from repbnn_cli.errors import UsageError

# What the code bases of the paper's systems use, for CIFAR as well as for ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Source(Protocol):
    """What a training loop needs of its data: batches of an epoch, from any batch on."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


class Plan(NamedTuple):
    """The random numbers of one epoch, each int64 (N,) on the CPU: position i of the epoch shows image order[i], cut
    at row top[i] and column left[i] of the padded image, mirrored where flip[i] is 1."""

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor


def generator_for(*numbers: int) -> torch.Generator:
    """A CPU generator that is a function of these numbers: neighbouring seeds and epochs share nothing."""
    # The CPU's Mersenne Twister takes 32 bits of a seed and ignores the rest, so the numbers are hashed into them.
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


class Normaliser:
    """uint8 images to ``(x/255 − mean)/std`` in ``dtype``; mean 0, std 1 gives the range [0, 1]."""

    def __init__(
        self, device: torch.device | str, dtype: torch.dtype, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        if len(mean) != len(std) or any(value <= 0 for value in std):
            raise UsageError(f"mean {tuple(mean)} and std {tuple(std)}: need one number per channel each, std above 0")
        self.dtype = dtype
        self._shift = torch.tensor([255.0 * value for value in mean], device=device).view(-1, 1, 1)
        self._scale = torch.tensor([255.0 * value for value in std], device=device).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """(n, C, H, W) uint8 → the same shape and memory layout in ``dtype``; computed in float32."""
        return images.to(torch.float32).sub_(self._shift).div_(self._scale).to(self.dtype)


class Batches:
    """The training batches of a split.

    batch_size, drop_last, rank, world: see ``Sharding``. ``pad`` zero pixels are put around every image, a random
    window of its size is cut, and half of the images are mirrored; ``pad=0, flip=False`` is no augmentation.

    A position in training is (epoch, batch): ``epoch(e, start=b)`` gives batch b and all after it, bit for bit as an
    epoch entered at its start. Images are in channels_last memory format unless that is switched off.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        pad: int = 4,
        flip: bool = True,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
        channels_last: bool = True,
    ) -> None:
        self.sharding = Sharding(len(split), batch_size, drop_last, rank, world)
        self.seed, self.pad, self.flip, self.shuffle, self.channels_last = seed, pad, flip, shuffle, channels_last
        self.device = torch.device(device)
        self.normalise = Normaliser(self.device, dtype, mean, std)
        self._count, channels, self._height, self._width = split.images.shape
        self._labels = split.labels.to(self.device)
        # (N, H + 2·pad, W + 2·pad, C): with the channels last a row of a window is one piece of memory.
        padded = (self._count, self._height + 2 * pad, self._width + 2 * pad, channels)
        self._padded = torch.zeros(padded, dtype=torch.uint8, device=self.device)
        inner = self._padded[:, pad : pad + self._height, pad : pad + self._width]
        inner.copy_(split.images.to(self.device).permute(0, 2, 3, 1))

    def __len__(self) -> int:
        return len(self.sharding)

    def plan(self, epoch: int) -> Plan:
        """The order, crops and flips of an epoch; the same for every rank, device and position."""
        generator, count = generator_for(self.seed, epoch), self._count
        order = torch.randperm(count, generator=generator)
        top, left = torch.randint(2 * self.pad + 1, (2, count), generator=generator)
        flip = torch.randint(2, (count,), generator=generator)
        return Plan(order if self.shuffle else torch.arange(count), top, left, flip if self.flip else flip.zero_())

    def raw(self, epoch: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """The rest of the epoch for this rank from batch ``start`` on, augmented, not normalised.

        uint8 (n, C, H, W) in channels_last layout, and labels (n,), on the device: batches lie one after the other.
        """
        plan = self.plan(epoch)
        mine = torch.cat(
            [torch.arange(0), *(torch.arange(part.start, part.stop) for part in self.sharding.parts(start))]
        )
        order, top, left = (numbers[mine].to(self.device) for numbers in plan[:3])
        mirrored = plan.flip[mine].nonzero()[:, 0].to(self.device)
        images = self._windows()[order, top, left]
        if len(mirrored):
            images[mirrored] = images[mirrored].flip(2)
        return images.permute(0, 3, 1, 2), self._labels[order]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of batch ``start`` and all after it: images normalised, (n, C, H, W); labels int64 (n,)."""
        images, labels = self.raw(epoch, start)
        position = 0
        for mine in self.sharding.parts(start):
            part = slice(position, position + mine.stop - mine.start)
            batch = self.normalise(images[part])
            yield (batch if self.channels_last else batch.contiguous()), labels[part]
            position = part.stop

    def _windows(self) -> Tensor:
        """(N, 2·pad+1, 2·pad+1, H, W, C): every window of every image, as a view.

        Gathering [image, top, left] from it needs three numbers per image instead of three per pixel.
        """
        image, row, column, channel = self._padded.stride()
        count, positions = self._count, 2 * self.pad + 1
        size = (count, positions, positions, self._height, self._width, self._padded.shape[3])
        return self._padded.as_strided(size, (image, row, column, row, column, channel))


def eval_batches(
    split: Split,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    rank: int = 0,
    world: int = 1,
    channels_last: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of every image once, in order, not augmented; the last batch is the smaller rest.

    Rank r of ``world`` gets the r-th part of every batch (of the last one perhaps nothing, and then no batch). A split
    that is to be gone through often belongs on the device first: ``split.to(device)``.
    """
    sharding = Sharding(len(split), batch_size, False, rank, world)
    normalise = Normaliser(device, dtype, mean, std)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for part in sharding.parts():
        if part.start < part.stop:
            images = split.images[part].to(device, non_blocking=True).contiguous(memory_format=layout)
            yield normalise(images), split.labels[part].to(device, non_blocking=True)
