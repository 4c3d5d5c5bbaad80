"""Pictures from the user's disk as the input of a network: found, decoded, cut to size, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repbnn_cli.errors import DataError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff")


def find(places: Sequence[str], most: int) -> list[Path]:
    """The images named, and those in the folders named, below them too, sorted; the first `most` of them.

    Raises UsageError for a place that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for place in places:
        path = Path(place)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise UsageError(f"--images {place}: holds no image; expected {', '.join(SUFFIXES)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"--images {place}: no such file or folder; name images, or a folder of them")
    return found[:most]


def load(paths: Sequence[Path], shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, C, H, W), normalised with mean and std; shape: (C, H, W) with C 3 or 1.

    Each is resized until its shorter side fits and cut in the middle. Raises DataError naming a file that is no image.
    """
    channels, height, width = shape
    pixels = np.stack([_pixels(path, "RGB" if channels == 3 else "L", height, width) for path in paths])
    images = torch.from_numpy(pixels).float().div(255).reshape(len(paths), height, width, channels).permute(0, 3, 1, 2)
    centre, spread = (torch.tensor(v[:channels], dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
    return (images - centre) / spread


def _pixels(path: Path, mode: str, height: int, width: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            scale = min(image.width / width, image.height / height)
            left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
            box = (left, top, left + width * scale, top + height * scale)
            eight_bits = _in_8_bits(image).convert(mode)
            return np.asarray(eight_bits.resize((width, height), Image.Resampling.BILINEAR, box=box))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded as an image ({error}); leave it out of --images") from None


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits in 8, which `convert` would cut off at 255 instead; others as they are."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
