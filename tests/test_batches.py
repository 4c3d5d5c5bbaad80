"""Batches: every image once, the augmentation of a slow reference, exact re-entry, and ranks that add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from repbnn_cli.data.batches import MEAN, STD, Batches, Normaliser, eval_batches, generator_for
from repbnn_cli.data.splits import Split, grey
from repbnn_cli.errors import UsageError


def split_of(count: int, height: int = 6, width: int = 5) -> Split:
    """Noise; the label of an image is its number."""
    images = torch.randint(1, 256, (count, 3, height, width), generator=generator_for(count), dtype=torch.uint8)
    return Split(images, torch.arange(count))


def test_grey_is_what_pillow_makes_of_an_image_and_the_value_of_equal_channels() -> None:
    images = split_of(4, 30, 40).images
    expected = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in images]
    assert torch.equal(grey(images)[:, 0], torch.from_numpy(np.stack(expected)))
    same = images[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(grey(same), images[:, :1])


def reference(image: Tensor, top: int, left: int, flip: bool, pad: int) -> Tensor:
    """One image, pixel by pixel, as the recipe says it: zero-pad, cut, mirror, scale to [0, 1], mean and std."""
    channels, height, width = image.shape
    result = torch.zeros(channels, height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            source_row = row + top - pad
            source_column = (width - 1 - column if flip else column) + left - pad
            if 0 <= source_row < height and 0 <= source_column < width:
                result[:, row, column] = image[:, source_row, source_column].double() / 255
    return (result - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]


shapes = st.tuples(st.integers(1, 40), st.integers(1, 12))  # images, images per batch and rank
seeds = st.integers(0, 2**40)


@given(shapes, seeds, st.integers(0, 500), st.booleans(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_image_exactly_once_per_epoch(
    shape: tuple[int, int], seed: int, epoch: int, drop_last: bool, world: int
) -> None:
    count, size = shape[0], shape[1] * world
    if drop_last and size > count:
        return
    ranks = [
        Batches(split_of(count), size, seed=seed, drop_last=drop_last, rank=rank, world=world) for rank in range(world)
    ]
    seen = torch.cat([labels for source in ranks for _, labels in source.epoch(epoch)]).tolist()
    assert len(seen) == len(set(seen)) == (count // size * size if drop_last else count)
    assert all(len(source) == len(list(source.epoch(epoch))) for source in ranks)


@given(shapes, seeds, st.integers(0, 500), st.sampled_from([0, 1, 4]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_pixels_are_those_of_a_slow_reference(
    shape: tuple[int, int], seed: int, epoch: int, pad: int, flip: bool
) -> None:
    split = split_of(shape[0])
    source = Batches(split, shape[1], seed=seed, drop_last=False, pad=pad, flip=flip)
    plan = source.plan(epoch)
    images = torch.cat([images for images, _ in source.epoch(epoch)])
    labels = torch.cat([labels for _, labels in source.epoch(epoch)])
    assert torch.equal(labels, split.labels[plan.order])
    for position, image in enumerate(images):
        order, top, left, mirrored = (int(numbers[position]) for numbers in plan)
        assert torch.allclose(image.double(), reference(split.images[order], top, left, mirrored == 1, pad), atol=1e-6)


@given(shapes, seeds, st.integers(0, 500), st.integers(0, 50), st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_epoch_entered_at_any_batch_is_bit_identical(
    shape: tuple[int, int], seed: int, epoch: int, start: int, drop_last: bool
) -> None:
    if drop_last and shape[1] > shape[0]:
        return
    whole = list(Batches(split_of(shape[0]), shape[1], seed=seed, drop_last=drop_last).epoch(epoch))
    rest = list(Batches(split_of(shape[0]), shape[1], seed=seed, drop_last=drop_last).epoch(epoch, start))
    assert len(rest) == max(0, len(whole) - start)
    for (images, labels), (images_again, labels_again) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), seeds, st.integers(0, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ranks_together_see_what_one_process_sees(
    count: int, part: int, world: int, seed: int, start: int, drop_last: bool
) -> None:
    size = part * world
    if drop_last and size > count:
        return
    split = split_of(count)
    alone = list(Batches(split, size, seed=seed, drop_last=drop_last).epoch(7, start))
    together = [
        list(Batches(split, size, seed=seed, drop_last=drop_last, rank=rank, world=world).epoch(7, start))
        for rank in range(world)
    ]
    for images_and_labels, *parts in zip(alone, *together, strict=True):
        for whole, pieces in zip(images_and_labels, zip(*parts, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(pieces))
        if drop_last:
            assert {len(labels) for _, labels in parts} == {part}


def test_crops_are_uniform_within_the_padding_and_half_of_the_images_are_mirrored() -> None:
    source = Batches(split_of(9000, 2, 2), 100, seed=3)
    plan = source.plan(0)
    for numbers in (plan.top, plan.left):
        counts = torch.bincount(numbers)
        assert len(counts) == 9
        assert counts.min() > 850
        assert counts.max() < 1150
    assert 0.48 < plan.flip.double().mean() < 0.52
    assert (plan.top - plan.left).abs().max() == 8  # drawn one by one


def test_epochs_and_seeds_differ_and_a_stored_order_stays() -> None:
    split = split_of(64)
    orders = {
        tuple(Batches(split, 8, seed=seed).plan(epoch).order.tolist())
        for seed in (0, 1, 2**32, 2**33)
        for epoch in range(3)
    }
    assert len(orders) == 12
    # A run that was started with an older version has to go on with the same images.
    plan = Batches(split, 8, seed=1).plan(2)
    assert [numbers[:8].tolist() for numbers in plan] == STORED


STORED = [
    [45, 14, 63, 39, 48, 26, 28, 57],
    [6, 5, 0, 7, 6, 6, 6, 6],
    [5, 1, 8, 4, 2, 2, 1, 5],
    [0, 0, 0, 1, 1, 1, 0, 1],
]


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    before = torch.get_rng_state()
    next(Batches(split_of(8), 4, seed=0).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    one = Batches(split_of(8), 4, seed=0).plan(0)
    torch.manual_seed(2)
    two = Batches(split_of(8), 4, seed=0).plan(0)
    assert all(torch.equal(*numbers) for numbers in zip(one, two, strict=True))
    torch.set_rng_state(before)


def test_without_shuffling_and_augmentation_images_come_as_they_are() -> None:
    split = split_of(10)
    source = Batches(split, 4, seed=0, pad=0, flip=False, shuffle=False, drop_last=False, mean=(0,) * 3, std=(1,) * 3)
    images = torch.cat([images for images, _ in source.epoch(5)])
    assert torch.equal(images, split.images.float() / 255)
    assert torch.equal(torch.cat([labels for _, labels in source.epoch(5)]), split.labels)


def test_raw_is_what_epoch_normalises() -> None:
    source = Batches(split_of(20), 8, seed=0, drop_last=False)
    images, labels = source.raw(1, start=1)
    assert (images.dtype, len(images)) == (torch.uint8, 12)
    assert images.is_contiguous(memory_format=torch.channels_last)
    batches = list(source.epoch(1, start=1))
    assert torch.equal(source.normalise(images), torch.cat([images for images, _ in batches]))
    assert torch.equal(labels, torch.cat([labels for _, labels in batches]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels_last", [True, False])
def test_dtype_and_memory_format_are_those_asked_for(dtype: torch.dtype, channels_last: bool) -> None:
    split = split_of(8)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    source = Batches(split, 4, seed=0, dtype=dtype, channels_last=channels_last)
    exact = Batches(split, 4, seed=0)
    for (images, _), (expected, _) in zip(source.epoch(0), exact.epoch(0), strict=True):
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=layout)
        assert torch.equal(images, expected.to(dtype))  # computed in float32, rounded once
    for images, _ in eval_batches(split, 4, dtype=dtype, channels_last=channels_last):
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=layout)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_evaluation_sees_every_image_once_in_order(count: int, part: int, world: int) -> None:
    split = split_of(count)
    alone = list(eval_batches(split, part * world))
    assert torch.equal(torch.cat([labels for _, labels in alone]), split.labels)
    expected = (split.images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.allclose(torch.cat([images for images, _ in alone]), expected, atol=1e-6)
    ranks = [list(eval_batches(split, part * world, rank=rank, world=world)) for rank in range(world)]
    seen = sorted(int(label) for batches in ranks for _, labels in batches for label in labels)
    assert seen == list(range(count))
    assert all(len(labels) for batches in ranks for _, labels in batches)


def test_the_split_is_not_changed_and_moves_only_when_it_has_to() -> None:
    split = split_of(8)
    before = split.images.clone()
    for images, _ in Batches(split, 4, seed=0, pad=0).epoch(0):
        images.zero_()
    for images, _ in eval_batches(split, 4):
        images.zero_()
    assert torch.equal(split.images, before)
    assert split.to("cpu") is split
    assert split.to("meta").images.is_meta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size 0: has to be at least 1"),
        ({"batch_size": 9}, "batch size 9: the data set has only 8 images; choose 8 at most"),
        ({"batch_size": 7, "world": 2}, "batch size 7: not divisible among 2 processes; possible here: 6 or 8"),
        ({"batch_size": 1, "world": 2}, "batch size 1: not divisible among 2 processes; possible here: 2"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank 2: expected 0 to 1"),
        ({"batch_size": 4, "std": (1.0,)}, "mean (0.485, 0.456, 0.406) and std (1.0,): need one number per channel"),
    ],
)
def test_impossible_batches_are_refused(arguments: dict[str, object], message: str) -> None:
    size = arguments.pop("batch_size")
    with pytest.raises(UsageError) as caught:
        Batches(split_of(8), size, seed=0, **arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_normalising_is_the_formula() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = Normaliser("cpu", torch.float64, MEAN, STD)(images)
    for channel in range(3):
        expected = (torch.arange(256).double() / 255 - MEAN[channel]) / STD[channel]
        assert torch.allclose(found[0, channel].reshape(-1), expected, atol=1e-6)
