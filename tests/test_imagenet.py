"""ImageNet-style folders: crops, colours, determinism, damaged images; on small images made here."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from data_examples import picture, write_files
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repbnn_cli.data.batches import MEAN, STD
from repbnn_cli.data.image_crops import Augmentation, centre_pixels, crop_box, training_pixels
from repbnn_cli.data.imagenet import Damages, FolderBatches, ImageFolders, eval_folder_batches, open_folders
from repbnn_cli.errors import DataError, UsageError

SMALL = Augmentation(size=16)
PLAIN = Augmentation(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, lighting=0.0)


def files(count: int = 5) -> dict[str, bytes]:
    return {
        f"{split}/n{label:08}/x_{number}.JPEG": picture(10 * label + number, (40 + number, 34 + label), "JPEG")
        for split in ("train", "val")
        for label in (2, 1)
        for number in range(count)
    }


@pytest.fixture
def folders(tmp_path: Path) -> ImageFolders:
    return open_folders(write_files(tmp_path / "imagenet", files()))


# -- listing ----------------------------------------------------------------------------------------------------------


def test_folders_are_listed_in_alphabetical_order(folders: ImageFolders) -> None:
    assert folders.classes == ("n00000001", "n00000002")
    assert folders.train.labels.tolist() == folders.test.labels.tolist() == [0] * 5 + [1] * 5
    assert folders.train.path(6).relative_to(folders.source) == Path("train/n00000002/x_1.JPEG")
    assert (len(folders.train), len(folders.fingerprint), folders.name) == (10, 64, "imagenet")


def test_the_fingerprint_depends_on_names_and_sizes(tmp_path: Path, folders: ImageFolders) -> None:
    same = open_folders(write_files(tmp_path / "again", files()))
    more = open_folders(write_files(tmp_path / "more", files(6)))
    assert same.fingerprint == folders.fingerprint != more.fingerprint


def test_names_may_hold_anything(tmp_path: Path) -> None:
    content = picture(1)
    names = {f"{split}/ü b/{name}": content for split in ("train", "test") for name in ("é.png", "a b.PNG")}
    found = open_folders(write_files(tmp_path / "d", names | {"train/ü b/.hidden.png": b"", "train/ü b/x.txt": b""}))
    assert [found.test.path(index).name for index in range(2)] == ["a b.PNG", "é.png"]
    assert found.test.path(1).read_bytes() == content


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("", "{}: no such folder; expected a folder with train/CLASS/*.jpg and val/CLASS/*.jpg"),
        ("val/", "{}: no folder val in it; expected train/CLASS/*.jpg and val/CLASS/*.jpg"),
        ("train/", "{}: no folder train in it; expected train/CLASS/*.jpg and val/CLASS/*.jpg"),
        ("val/n00000002", "{}/val: no images of n00000002, train/ has; add them, or remove both"),
        ("train/n00000002", "{}/train: no images of n00000002, val/ has; add them, or remove both"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, remove: str, message: str) -> None:
    kept = {name: content for name, content in files().items() if not name.startswith(remove)}
    folder = write_files(tmp_path / "d", kept)
    with pytest.raises(DataError) as caught:
        open_folders(folder)
    assert str(caught.value) == message.format(folder)


def test_unsorted_validation_images_and_empty_folders_are_explained(tmp_path: Path) -> None:
    flat = {name.replace("val/n", "val/"): content for name, content in files().items()}
    flat = {name if name.startswith("train") else f"val/{index}.JPEG": flat[name] for index, name in enumerate(flat)}
    with pytest.raises(DataError, match=r"its images have to be sorted into one folder per class"):
        open_folders(write_files(tmp_path / "d", flat))
    with pytest.raises(DataError, match=r"train: no images in it; expected one folder per class"):
        open_folders(write_files(tmp_path / "e", {"train/x/readme": b"", "val/x/1.png": b""}))


# -- one image --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_crop_boxes_lie_inside_and_keep_area_and_ratio(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = crop_box(width, height, Augmentation(), random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 100 and 3 / 4 <= width / height <= 4 / 3:
        assert 0.075 < (right - left) * (bottom - top) / (width * height) <= 1
        assert 0.72 < (right - left) / (bottom - top) < 1.39


def test_crop_boxes_are_spread_as_the_recipe_says() -> None:
    draw = random.Random(0)
    boxes = np.array([crop_box(500, 500, Augmentation(), draw) for _ in range(4000)], dtype=float)
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert 0.08 - 0.01 < (widths * heights / 250000).min() < 0.1
    assert abs(np.log(widths / heights).mean()) < 0.02
    assert (np.log(widths / heights) > 0).mean() == pytest.approx(0.5, abs=0.03)
    free = 500 - widths > 0
    assert (boxes[free, 0] / (500 - widths[free])).mean() == pytest.approx(0.5, abs=0.03)


def test_an_image_too_narrow_for_any_crop_gives_its_centre() -> None:
    assert crop_box(1000, 10, Augmentation(scale=(1.0, 1.0)), random.Random(0)) == (493, 0, 506, 10)
    assert crop_box(10, 1000, Augmentation(scale=(1.0, 1.0)), random.Random(0)) == (0, 493, 10, 506)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (517, 389), (64, 48), (2000, 900), (31, 977)])
def test_test_images_are_resized_and_cut_as_in_two_steps(size: tuple[int, int]) -> None:
    image = Image.open(io.BytesIO(picture(1, size)))
    shorter = min(size)
    resized = image.resize((256 * size[0] // shorter, 256 * size[1] // shorter), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    found = centre_pixels(image)
    assert found.shape == (224, 224, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_training_images_are_the_resized_crop() -> None:
    image = Image.open(io.BytesIO(picture(1, (90, 70))))
    how = Augmentation(size=24, flip=False, lighting=0.0)
    for seed in range(10):
        box = crop_box(90, 70, how, random.Random(seed))
        expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR, box=box))
        assert np.array_equal(training_pixels(image, how, random.Random(seed)), expected)


def test_draft_mode_decodes_less_and_hardly_changes_the_result() -> None:
    content = picture(1, (1024, 768), "JPEG")
    how = Augmentation(size=64, flip=False, lighting=0.0)
    for seed in range(5):
        drafted = Image.open(io.BytesIO(content))
        found = training_pixels(drafted, how, random.Random(seed))
        assert drafted.width < 1024
        full = Image.open(io.BytesIO(content))
        full.load()
        expected = training_pixels(full, how, random.Random(seed))
        assert np.abs(found.astype(int) - expected).mean() < 1.5


def test_half_of_the_images_are_mirrored() -> None:
    image = Image.open(io.BytesIO(picture(1)))
    how = Augmentation(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), lighting=0.0)
    plain = training_pixels(image, PLAIN, random.Random(0))
    found = [training_pixels(image, how, random.Random(seed)) for seed in range(200)]
    mirrored = sum(np.array_equal(one, plain[:, ::-1]) for one in found)
    assert mirrored + sum(np.array_equal(one, plain) for one in found) == 200
    assert 75 < mirrored < 125


def test_lighting_shifts_colours_along_their_principal_components() -> None:
    image = Image.new("RGB", (20, 20), (128, 128, 128))
    how = Augmentation(size=4, lighting=0.1)
    shifts = np.array(
        [training_pixels(image, how, random.Random(seed))[0, 0].astype(int) - 128 for seed in range(3000)]
    )
    # Covariance of V·diag(σ·λ)·α: the grey direction carries nearly all of it, σ·λ₁ = 5.5 grey levels.
    values, vectors = np.linalg.eigh(np.cov(shifts.T))
    assert math.sqrt(values[2]) == pytest.approx(5.55, rel=0.08)
    assert np.abs(vectors[:, 2]) == pytest.approx([0.5675, 0.5808, 0.5836], abs=0.02)
    assert np.abs(shifts.mean(axis=0)).max() < 0.4


def test_colour_jitter_moves_each_quantity_within_its_range() -> None:
    image = Image.new("RGB", (20, 20), (100, 120, 140))
    base = {"size": 4, "flip": False, "lighting": 0.0}
    for place, ranges in enumerate([(0.2, 0, 0, 0), (0, 0.2, 0, 0), (0, 0, 0.2, 0), (0, 0, 0, 0.1), (0, 0, 0, 0)]):
        how = Augmentation(jitter=ranges, **base)  # type: ignore[arg-type]
        found = np.array([training_pixels(image, how, random.Random(seed))[0, 0] for seed in range(60)]).astype(int)
        match place:
            case 0:
                ratios = found[:, 0] / 100
                assert 0.79 < ratios.min() < 0.85 < 1.15 < ratios.max() < 1.21
            case 1:  # contrast of a plain image: towards its own grey value
                assert np.abs(found - [100, 120, 140]).max() <= 0.2 * 22 + 1
                assert np.ptp(found[:, 0]) > 2
            case 2:
                spread = found[:, 2] - found[:, 0]
                assert 31 <= spread.min() < 35 < 45 < spread.max() <= 49
            case 3:
                assert np.ptp(found[:, 1]) > 10
                assert np.abs(found.max(axis=1) - 140).max() <= 3  # the value of HSV stays
            case _:
                assert (found == [100, 120, 140]).all()


# -- batches ----------------------------------------------------------------------------------------------------------


def test_batches_are_the_normalised_images(folders: ImageFolders) -> None:
    source = FolderBatches(folders.train, 4, seed=3, augmentation=PLAIN, drop_last=False, workers=0)
    assert len(source) == 3
    for images, labels in source.epoch(0):
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(images, labels, strict=True):
            levels = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
            plain = [
                training_pixels(Image.open(folders.train.path(index)), PLAIN, random.Random(0)).transpose(2, 0, 1)
                for index in np.flatnonzero(folders.train.labels == int(label))
            ]
            assert min(np.abs(levels.numpy() - one).max() for one in plain) < 1e-3


def test_workers_seeds_epochs_and_positions(folders: ImageFolders) -> None:
    def run(epoch: int, start: int = 0, **options: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        settings = {"seed": 1, "workers": 0} | options
        return list(
            FolderBatches(folders.train, 4, augmentation=SMALL, drop_last=False, **settings).epoch(epoch, start)
        )

    base = run(2)
    for again, start in ((run(2), 0), (run(2, workers=2), 0), (run(2, start=1), 1), (run(2, start=2, workers=1), 2)):
        for (images, labels), (images_again, labels_again) in zip(base[start:], again, strict=True):
            assert torch.equal(images, images_again)
            assert torch.equal(labels, labels_again)
    assert not torch.equal(base[0][0], run(3)[0][0])
    assert not torch.equal(base[0][0], run(2, seed=2)[0][0])
    ranks = [run(2, rank=rank, world=2) for rank in range(2)]
    for (images, labels), *parts in zip(base, *ranks, strict=True):
        assert torch.equal(images, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))


def test_an_image_is_seen_differently_in_every_epoch(tmp_path: Path) -> None:
    folders = open_folders(write_files(tmp_path / "d", {f"{split}/c/1.png": picture(1) for split in ("train", "val")}))
    source = FolderBatches(folders.train, 1, seed=0, augmentation=SMALL, workers=0)
    seen = [next(source.epoch(epoch))[0] for epoch in range(4)]
    assert not any(torch.equal(seen[one], seen[two]) for one in range(4) for two in range(one))


def test_every_image_once_per_epoch(tmp_path: Path) -> None:
    solid = {f"{split}/c/{value}.png": _solid(value) for split in ("train", "val") for value in range(0, 250, 20)}
    folders = open_folders(write_files(tmp_path / "d", solid))
    source = FolderBatches(
        folders.train, 3, seed=0, augmentation=PLAIN, drop_last=False, workers=0, mean=(0,) * 3, std=(1,) * 3
    )
    seen = torch.cat([images[:, 0, 0, 0] for images, _ in source.epoch(4)])
    assert sorted((seen * 255).round().int().tolist()) == list(range(0, 250, 20))


def _solid(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (value,) * 3).save(stream, "PNG")
    return stream.getvalue()


def test_evaluation_is_in_order_and_shared_among_ranks(folders: ImageFolders) -> None:
    options = {"size": 14, "resize": 16, "workers": 0}
    alone = list(eval_folder_batches(folders.test, 4, **options))  # type: ignore[arg-type]
    assert torch.cat([labels for _, labels in alone]).tolist() == folders.test.labels.tolist()
    expected = centre_pixels(Image.open(folders.test.path(0)), 14, 16).transpose(2, 0, 1) / 255
    expected = (expected - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    assert np.allclose(alone[0][0][0].numpy(), expected, atol=1e-5)
    ranks = [list(eval_folder_batches(folders.test, 4, rank=r, world=2, **options)) for r in range(2)]  # type: ignore[arg-type]
    for (images, _), *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(images, torch.cat([part[0] for part in parts]))
    with pytest.raises(UsageError, match=r"cannot cut 20 pixels out of 16"):
        next(eval_folder_batches(folders.test, 4, size=20, resize=16))


# -- damaged images ---------------------------------------------------------------------------------------------------


def damage(folders: ImageFolders, split: str, count: int) -> list[Path]:
    paths = sorted(Path(folders.source, split).rglob("*.JPEG"))[:count]
    for number, path in enumerate(paths):
        content = path.read_bytes()
        path.write_bytes([content[: len(content) // 2], b"", b"text"][number % 3])
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_training_images_are_named_once_and_replaced(folders: ImageFolders, workers: int) -> None:
    paths = damage(folders, "train", 3)
    said: list[str] = []
    source = FolderBatches(folders.train, 5, seed=0, augmentation=SMALL, workers=workers, damages=Damages(said.append))
    sizes = [len(labels) for epoch in range(2) for _, labels in source.epoch(epoch)]
    assert sizes == [5] * 4
    assert len(said) == 3
    for path in paths:
        assert sum(line.startswith(f"{path}: damaged image (") for line in said) == 1
    assert all("skipped (" in line and "of at most 10); copy it again" in line for line in said)


def test_damaged_test_images_are_left_out(folders: ImageFolders) -> None:
    damage(folders, "val", 2)
    said: list[str] = []
    found = list(eval_folder_batches(folders.test, 4, size=14, resize=16, workers=0, damages=Damages(said.append)))
    assert [len(labels) for _, labels in found] == [2, 4, 2]
    assert len(said) == 2


def test_more_damaged_images_than_allowed_end_the_run(folders: ImageFolders) -> None:
    paths = damage(folders, "val", 3)
    said: list[str] = []
    with pytest.raises(DataError) as caught:
        list(eval_folder_batches(folders.test, 4, size=14, resize=16, workers=0, damages=Damages(said.append, 2)))
    assert len(said) == 2
    assert str(caught.value).startswith(f"{paths[2]}: damaged image (")
    assert str(caught.value).endswith("and 2 were skipped before it; copy the data set again")


def test_without_a_function_to_tell_a_damaged_image_is_a_warning(folders: ImageFolders) -> None:
    (path,) = damage(folders, "train", 1)
    with pytest.warns(UserWarning, match=str(path)):
        list(FolderBatches(folders.train, 5, seed=0, augmentation=SMALL, workers=0).epoch(0))


def test_a_training_set_of_damaged_images_ends_the_run(folders: ImageFolders) -> None:
    damage(folders, "train", 10)
    source = FolderBatches(folders.train, 5, seed=0, augmentation=SMALL, workers=0, damages=Damages(lambda _: None, 4))
    with pytest.raises(DataError, match=r"4 were skipped before it"):
        list(source.epoch(0))
