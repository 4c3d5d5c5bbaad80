"""What happens to one ImageNet image: decoding no finer than needed, crop, colours, flip; resize and crop for testing.

An image is cut where it is decoded: the crop box is chosen from the header, libjpeg scales by 1/2, 1/4 or 1/8 on the
way (draft mode), and one resize takes the box out.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Principal components of the ImageNet training colours (Krizhevsky et al. 2012, section 4.1), for pixels in 0..255:
# standard deviations, and the components as columns.
_PCA_STD = np.array([55.4625, 4.7940, 1.1475], np.float32)
_PCA = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
    np.float32,
)
_FACTORS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; the defaults are Bi-Real Net's and ReActNet's.

    size: side of the result; scale, ratio: area of the crop as a share of the image, and its width over height, drawn
    log-uniformly; lighting: standard deviation of the PCA colour noise, 0 for none; jitter: ranges of brightness,
    contrast, saturation (factors in 1 ± r) and hue (shift in ± r turns), applied in random order; 0 for none.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    lighting: float = 0.1
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


def training_pixels(image: Image.Image, how: Augmentation, draw: random.Random) -> Pixels:
    """RandomResizedCrop, colour jitter, PCA lighting, flip of an opened image; uint8 (size, size, 3)."""
    width, height = image.size
    left, top, right, bottom = crop_box(width, height, how, draw)
    # Decode no finer than the crop needs: draft never goes below the size asked for.
    image.draft("RGB", (math.ceil(how.size * width / (right - left)), math.ceil(how.size * height / (bottom - top))))
    x, y = image.width / width, image.height / height
    image = _cut(image, (left * x, top * y, right * x, bottom * y), how.size)
    pixels = np.asarray(_jittered(image, how.jitter, draw))
    if how.lighting:
        noise = _PCA @ (_PCA_STD * np.array([draw.gauss(0.0, how.lighting) for _ in range(3)], np.float32))
        pixels = np.rint(np.clip(pixels + noise, 0, 255)).astype(np.uint8)
    return pixels[:, ::-1] if how.flip and draw.random() < 0.5 else pixels


def crop_box(width: int, height: int, how: Augmentation, draw: random.Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop; after ten draws that do not fit the largest allowed centre crop."""
    for _ in range(10):
        area = width * height * draw.uniform(*how.scale)
        ratio = math.exp(draw.uniform(math.log(how.ratio[0]), math.log(how.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * how.ratio[1])), min(height, round(width / how.ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_pixels(image: Image.Image, size: int = 224, resize: int = 256) -> Pixels:
    """The shorter side resized to ``resize``, then the centre ``size``: in one resize of the box that ends up there.

    No draft mode: a test result is not to depend on a shortcut.
    """
    width, height = image.size
    shorter = min(width, height)
    resized = resize * width // shorter, resize * height // shorter
    left, top = (round((side - size) / 2) for side in resized)
    x, y = width / resized[0], height / resized[1]
    return np.asarray(_cut(image, (left * x, top * y, (left + size) * x, (top + size) * y), size))


def _cut(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Image.Image:
    left, top, right, bottom = box
    # Rounding can put an edge a hair outside, which Pillow refuses.
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)


def _jittered(image: Image.Image, ranges: tuple[float, float, float, float], draw: random.Random) -> Image.Image:
    for kind in draw.sample(range(4), 4) if any(ranges) else ():
        if ranges[kind] and kind < len(_FACTORS):
            image = _FACTORS[kind](image).enhance(draw.uniform(max(0.0, 1 - ranges[kind]), 1 + ranges[kind]))
        elif ranges[kind]:
            image = _hue_shifted(image, draw.uniform(-ranges[kind], ranges[kind]))
    return image


def _hue_shifted(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.array(round(255 * turns) % 256, np.uint8)  # wraps around, as hue does
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")
