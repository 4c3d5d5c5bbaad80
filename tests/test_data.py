"""Data sets by name: images, archives and the cache give the right pixels; what is incomplete is named."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_examples import (
    LAYOUT,
    image_files,
    official_files,
    packed,
    picture,
    pixels_of,
    refusal,
    shrink,
    write_files,
)
from PIL import Image

from repbnn_cli import writing
from repbnn_cli.data import Dataset, ImageFolders, cache, load, open_data
from repbnn_cli.data import sets as data
from repbnn_cli.data.archives import archive_entries
from repbnn_cli.data.cifar_files import CIFAR10_CLASSES
from repbnn_cli.data.images import Place, place_of
from repbnn_cli.data.splits import fingerprint_of, split_of
from repbnn_cli.errors import DataError, UsageError

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.xz"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def test_the_fingerprint_depends_on_pixels_labels_and_split() -> None:
    images, labels = np.arange(48, dtype=np.uint8).reshape(4, 3, 2, 2), np.arange(4)
    one, two = split_of(images, labels), split_of(images + 1, labels)
    others = [split_of(images, labels[::-1]), split_of(images.reshape(4, 3, 4, 1), labels)]
    pairs = [(one, one), (one, two), (two, one), *((one, other) for other in others)]
    assert len({fingerprint_of(*pair) for pair in pairs}) == len(pairs)
    assert fingerprint_of(one, two) == fingerprint_of(split_of(images.copy(), labels.astype(np.int32)), two)


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["d", "d.tar", "d.tar.gz", "d.tar.xz", "d.zip"])
@pytest.mark.parametrize("root", ["", "a/b/"])
def test_images_give_their_pixels_from_a_folder_and_every_archive(tmp_path: Path, name: str, root: str) -> None:
    files = image_files()
    inside = {root + path: content for path, content in reversed(files.items())}  # the order says nothing
    path = tmp_path / name
    if path.suffix:
        packed(path, inside)
    else:
        path = write_files(path, inside) / root
    found = load(f"cifar10:{path}")
    assert found.classes == CIFAR10_CLASSES
    assert found.train.labels.tolist() == [label for label in range(10) for _ in range(10)]
    assert found.test.labels.tolist() == [label for label in range(10) for _ in range(2)]
    expected = [pixels_of(content) for path, content in sorted(files.items()) if path.startswith("train/")]
    assert np.array_equal(found.train.images.numpy(), np.stack(expected))
    assert found.notes == ()


@pytest.mark.usefixtures("small")
def test_jpeg_images_are_said_to_be_lossy(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "d", image_files(".jpg"))
    assert load(f"cifar10:{folder}").notes == (
        "JPEG copy: 120 images went through lossy compression, not the original pixels",
    )


def test_a_folder_may_have_any_classes_and_sizes_and_val_for_test(tmp_path: Path) -> None:
    files = {
        f"{split}/{label}/{mode}{'.PNG' if mode == 'L' else '.png'}": picture(1, (20, 12), mode=mode)
        for split in ("train", "val")
        for label in ("b", "a", "ü")
        for mode in ("RGB", "L", "RGBA", "P")
    }
    files |= {"train/a/._x.png": b"", "train/readme": b"", "train/a/list.txt": b"", "val/x": b"", "other/a/x.png": b""}
    found = load(f"folder:{write_files(tmp_path / 'd', files)}")
    assert found.name == "folder"
    assert found.classes == ("a", "b", "ü")
    assert found.train.images.shape == found.test.images.shape == (12, 3, 12, 20)
    assert found.notes == ("1 files that are no images of a class were left out, e.g. train/a/list.txt",)


def test_paths_of_images() -> None:
    assert place_of("train/cat/1.png") == Place("", "train", "cat", "1.png")
    assert place_of("./train/cat/1.png") == Place("", "train", "cat", "1.png")
    assert place_of("x/y/test/cat/1.png") == Place("x/y", "test", "cat", "1.png")
    assert str(place_of("x/y/test/cat/1.png")) == "x/y/test/cat/1.png"
    for name in ("1.png", "train/1.png", "other/cat/1.png", "train/cat/more/1.png", "__MACOSX/train/cat/1.png"):
        assert place_of(name) is None


def _edited(change: str) -> dict[str, bytes]:
    files = image_files()
    match change:
        case "class":
            return {name: content for name, content in files.items() if "/cat/" not in name and "/dog/" not in name}
        case "unknown":
            return {name.replace("/cat/", "/lion/"): content for name, content in files.items()}
        case "image":
            return {name: content for name, content in files.items() if name != "train/cat/0003.png"}
        case "split":
            return {name: content for name, content in files.items() if name.startswith("train")}
        case "one-sided":
            return {name: content for name, content in files.items() if not name.startswith("test/cat/")}
        case "damaged":
            return files | {"train/cat/0003.png": files["train/cat/0003.png"][:60]}
        case "text":
            return files | {"train/cat/0003.png": b"hello"}
        case "size":
            return files | {"train/cat/0003.png": picture(1, (30, 32))}
        case _:
            return {name: picture(1, (16, 16)) for name in files}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("packing", ["", ".tar.gz", ".zip"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("class", "not CIFAR-10: no images of cat, dog, or run: repbnn data cifar10; a part of it, or anything else"),
        ("unknown", "not CIFAR-10: no images of cat; unknown classes lion, or run"),
        ("image", "CIFAR-10 is incomplete: train has cat 9, expected 10 images of each class"),
        ("split", "images in train only; expected train/CLASS/*.png|jpg and test/CLASS/*.png|jpg"),
        ("one-sided", "test/ has no images of cat, train/ has; add them, or remove both"),
        ("damaged", "train/cat/0003.png cannot be decoded ("),
        ("text", "train/cat/0003.png cannot be decoded (no image of a known format); copy it again"),
        ("size", "train/cat/0003.png is 30x32 pixels, most are 32x32; bring all to one size"),
        ("all sizes", "not CIFAR-10: images of 16x16 pixels, expected 32x32"),
    ],
)
def test_what_is_wrong_with_images_is_named(tmp_path: Path, packing: str, change: str, message: str) -> None:
    path = tmp_path / f"d{packing}"
    files = _edited(change)
    write_files(path, files) if not packing else packed(path, files)
    said = refusal(f"cifar10:{path}")
    assert said.startswith(f"{path}: ")
    assert message in said


def test_images_twice_or_in_several_places_are_refused(tmp_path: Path) -> None:
    files = image_files(train=1)
    both = files | {f"copy/{name}": content for name, content in files.items()}
    assert "images in several places (, copy)" in refusal(f"folder:{packed(tmp_path / 'a.zip', both)}")
    twice = packed(tmp_path / "b.zip", files)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("train/cat/0000.png", files["train/cat/0000.png"])
    assert "train/cat/0000.png is there 2 times" in refusal(f"folder:{twice}")


# -- archives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".zip"])
@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_truncated_archives_are_refused(tmp_path: Path, kind: str, kept: float) -> None:
    noise = np.random.default_rng(0)
    path = packed(tmp_path / f"a{kind}", {f"train/a/{number}.png": noise.bytes(20000) for number in range(4)})
    os.truncate(path, int(20000 * 4 * kept))
    assert f"{path}: not an archive, or a truncated or damaged one" in refusal(f"folder:{path}")


def test_an_archive_cut_between_two_files_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", {f"train/a/{number}.png": bytes(512) for number in range(4)})
    os.truncate(path, 2 * 1024)
    assert f"{path}: not an archive, or a truncated or damaged one (the end of the" in refusal(f"folder:{path}")


def test_things_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"hello" * 1000)
    assert f"{path}: not an archive" in refusal(f"cifar10:{path}")
    path.write_bytes(b"")
    assert f"{path}: not an archive" in refusal(f"cifar10:{path}")
    empty = packed(tmp_path / "b.zip", {"readme.txt": b""})
    assert refusal(f"cifar10:{empty}") == (
        f"{empty}: no CIFAR-10 in it; expected cifar-10-batches-py, cifar-10-batches-bin, images as "
        "train/CLASS/*.png|jpg and test/CLASS/*.png|jpg, or run: repbnn data cifar10"
    )


def test_nothing_of_an_archive_is_unpacked_and_links_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../outside.png", "/outside.png", "train/a/1.png"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("train/a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert [entry.name for entry in archive_entries(path)] == ["../outside.png", "/outside.png", "train/a/1.png"]
    assert [file.name for file in tmp_path.rglob("*")] == ["a.tar"]


# -- cache ------------------------------------------------------------------------------------------------------------


def _entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "xdg" / "repbnn").glob("*"))


@pytest.mark.usefixtures("small")
def test_an_archive_is_decoded_once_whatever_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = packed(tmp_path / "a.tar.xz", image_files())
    before = load(f"cifar10:{first}")
    (entry,) = _entries(tmp_path)
    moved = first.rename(tmp_path / "b.tar.xz")
    os.utime(moved, (1, 1))
    monkeypatch.setattr(data, "archive_entries", None)  # reading it again would fail
    after = load(f"cifar10:{moved}")
    assert dataclasses.replace(after, train=before.train, test=before.test, source=str(first)) == before
    assert torch.equal(after.train.images, before.train.images)
    assert torch.equal(after.test.labels, before.test.labels)
    assert after.train.images.is_contiguous()
    assert entry.name.startswith("cifar10-")


@pytest.mark.usefixtures("small")
def test_a_changed_archive_or_folder_is_decoded_anew(tmp_path: Path) -> None:
    files = image_files()
    archive = packed(tmp_path / "a.zip", files)
    folder = write_files(tmp_path / "d", files)
    old = [load(f"cifar10:{path}") for path in (archive, folder)]
    files["train/cat/0003.png"] = picture(99)
    packed(archive, files)
    write_files(tmp_path / "d", files)
    new = [load(f"cifar10:{path}") for path in (archive, folder)]
    assert old[0].fingerprint == old[1].fingerprint != new[0].fingerprint == new[1].fingerprint


@pytest.mark.usefixtures("small")
def test_a_damaged_cache_entry_is_replaced(tmp_path: Path) -> None:
    archive = packed(tmp_path / "a.zip", image_files())
    before = load(f"cifar10:{archive}").fingerprint
    (entry,) = _entries(tmp_path)
    good = entry.read_bytes()
    for bad in (b"", good[:1000], b"x" * len(good), b"\x08\0\0\0\0\0\0\0{}      "):
        entry.write_bytes(bad)
        assert load(f"cifar10:{archive}").fingerprint == before
        assert entry.read_bytes() == good


@pytest.mark.usefixtures("small")
def test_a_cache_that_cannot_be_written_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed(tmp_path / "a.zip", image_files())
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert load(f"cifar10:{archive}", cache=blocked / "deep").notes[-1].startswith("not cached, will be decoded again")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    found = load(f"cifar10:{archive}")
    assert found.notes[-1].startswith("not cached, will be decoded again next time (")
    assert "no space left" in found.notes[-1]
    assert _entries(tmp_path) == []  # nothing half-written stays


def test_the_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.cache_folder() == tmp_path / "xdg" / "repbnn"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "repbnn"


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_a_name_without_a_path_is_sought_in_the_usual_places(tmp_path: Path) -> None:
    package = LAYOUT["cifar10", "python"]
    said = refusal("cifar10")
    assert said.startswith(f"cifar10: not found in {data.data_folder()}, data or the current folder (as cifar-10-batch")
    assert "run: repbnn data cifar10, or say where it is with --data cifar10[:FOLDER-or-ARCHIVE]" in said
    inside = {f"{package.folder}/{name}": content for name, content in official_files(package).items()}
    write_files(tmp_path / "data", inside)
    here = load("cifar10")
    assert here.source == f"data/{package.folder}"
    data.data_folder().mkdir(parents=True)
    archive = packed(data.data_folder() / package.archive, inside)
    downloaded = load("cifar10")
    assert downloaded.source == str(archive)
    assert load(f"cifar10:{data.data_folder()}").fingerprint == downloaded.fingerprint == here.fingerprint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifra10:x", "--data cifra10:x: unknown data set; expected one of cifar10[:FOLDER-or-ARCHIVE], "),
        ("cifra10:x", "did you mean cifar10[:FOLDER-or-ARCHIVE]?"),
        ("folder", "--data folder: needs a path; expected folder:FOLDER-or-ARCHIVE"),
        ("imagenet:", "--data imagenet:: needs a path; expected imagenet:FOLDER"),
        ("digits:x", "--data digits:x: digits come with scikit-learn and take no path; expected digits"),
        ("imagenet:x", "imagenet:x: is read batch by batch and cannot be loaded into memory"),
    ],
)
def test_wrong_names_are_usage_errors(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(spec)
    assert message in str(caught.value)


def test_paths_that_do_not_exist_or_hold_nothing_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "x"
    assert refusal(f"cifar10:{missing}") == (
        f"{missing}: no such file or folder; check the path, or run: repbnn data cifar10"
    )
    assert refusal(f"folder:{missing}") == f"{missing}: no such file or folder; check the path"
    missing.mkdir()
    assert refusal(f"cifar100:{missing}").startswith(f"{missing}: no CIFAR-100 in it; expected cifar-100-python, ")
    assert refusal(f"folder:{missing}") == (
        f"{missing}: no images in it; expected images as train/CLASS/*.png|jpg and test/CLASS/*.png|jpg"
    )
    (part := missing / "train" / "cat").mkdir(parents=True)
    assert refusal(f"folder:{part.parent}").endswith(f"; did you mean folder:{missing}?")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "d", image_files(train=1))
    link = folder / "train" / "cat" / "0009.png"
    link.symlink_to("nowhere")
    assert refusal(f"folder:{folder}") == (
        f"{link}: cannot be read (No such file or directory); check the file and its rights"
    )
    with pytest.raises(DataError, match=rf"{link}: cannot be read"):
        open_data(f"imagenet:{folder}")


def test_open_data_gives_folders_for_imagenet_and_memory_for_the_rest(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "d", image_files(train=1))
    assert isinstance(open_data(f"imagenet:{folder}"), ImageFolders)
    assert isinstance(open_data(f"folder:{folder}"), Dataset)


# -- digits -----------------------------------------------------------------------------------------------------------


def test_digits_have_a_fixed_split_and_the_size_of_cifar() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn: pip install 'repbnn[digits]'")
    found = load("digits")
    assert (len(found.train), len(found.test), found.classes) == (1442, 355, tuple("0123456789"))
    assert found.train.images.shape[1:] == (3, 32, 32)
    original = datasets.load_digits()
    assert int(found.train.images.max()) == 255
    small = found.test.images[:, 0, ::4, ::4].numpy() * (16 / 255)
    zeros = found.test.labels == 0
    assert np.allclose(small[zeros], original.images[original.target == 0][4::5], atol=0.04)
    counts = torch.bincount(found.test.labels)
    assert counts.tolist() == [count // 5 for count in np.bincount(original.target)]
    assert torch.equal(found.train.images[:, 0], found.train.images[:, 2])
    assert load("digits").fingerprint == found.fingerprint


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert refusal("digits") == (
        "digits: come with scikit-learn, which is not installed; run: pip install 'repbnn[digits]'"
    )


def test_digits_from_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sklearn.datasets")
    pixels = np.arange(50 * 64).reshape(50, 64) % 17.0
    module.load_digits = lambda return_X_y: (pixels, np.arange(50) % 10)  # type: ignore[attr-defined]  # noqa: N803
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    found = load("digits")
    assert found.train.labels.tolist() == [*range(10)] * 4
    assert found.test.labels.tolist() == [*range(10)]
    assert found.test.images[0, 1, ::4, ::4].reshape(-1).tolist() == [round(v * 255 / 16) for v in pixels[40]]
    assert torch.equal(found.train.images[:, :, 1::4, 3::4], found.train.images[:, :, ::4, ::4])


# -- the real thing ---------------------------------------------------------------------------------------------------


def test_the_beginning_of_the_real_archive() -> None:
    """The first images only: all 60 000 take about ten seconds."""
    if not REAL.is_file():
        pytest.skip(f"{REAL.name} is not here (../shared/data)")
    for number, entry in enumerate(archive_entries(REAL)):
        assert place_of(entry.name) == Place("", "train", "airplane", f"{number:04}.jpg")
        assert Image.open(io.BytesIO(entry.read())).size == (32, 32)
        if number == 200:
            break
