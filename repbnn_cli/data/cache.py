"""Decoded data sets on the disk: written once, atomically, and mapped into memory afterwards."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import safetensors

from repbnn_cli.data.splits import Dataset, Split
from repbnn_cli.errors import RepbnnError
from repbnn_cli.writing import save_safetensors

# Part of every file name: raise it when the content of a cache entry for the same source changes.
_FORMAT = 1


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/repbnn``, by default ``~/.cache/repbnn``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules ask to ignore relative paths.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "repbnn"


def cached(name: str, key: str, build: Callable[[], Dataset], *, folder: Path | None = None) -> Dataset:
    """The data set ``name`` made from the source with this content key: from the cache, or built and then stored there.

    The tensors of a cached set are views into a private mapping of the file: loading takes milliseconds, pages come
    in as they are used. A cache that cannot be written is no error: the set gets a note and is built again next time.
    A damaged entry is built anew.
    """
    path = (folder or cache_folder()) / f"{name}-{key[:24]}.v{_FORMAT}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    built = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(built, path)
    except (OSError, RepbnnError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return replace(built, notes=(*built.notes, f"not cached, will be decoded again next time ({reason})"))
    return built


def _write(dataset: Dataset, path: Path) -> None:
    tensors = {
        "train.images": dataset.train.images,
        "train.labels": dataset.train.labels,
        "test.images": dataset.test.images,
        "test.labels": dataset.test.labels,
    }
    about = {
        "name": dataset.name,
        "classes": list(dataset.classes),
        "fingerprint": dataset.fingerprint,
        "source": dataset.source,
        "notes": list(dataset.notes),
    }
    save_safetensors(tensors, {"repbnn": json.dumps(about)}, path, force=True)


def _read(path: Path) -> Dataset | None:
    if not path.is_file():
        return None
    with contextlib.suppress(safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AssertionError):
        with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
            about = json.loads((opened.metadata() or {})["repbnn"])
            train, test = (
                Split(opened.get_tensor(f"{name}.images"), opened.get_tensor(f"{name}.labels"))
                for name in ("train", "test")
            )
        return Dataset(
            name=about["name"],
            train=train,
            test=test,
            classes=tuple(about["classes"]),
            fingerprint=about["fingerprint"],
            source=about["source"],
            notes=tuple(about["notes"]),
        )
    return None
