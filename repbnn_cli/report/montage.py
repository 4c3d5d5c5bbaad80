"""Feature maps as one picture: a column per channel, the source's map on top and its copies below."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from torch import Tensor

from repbnn_cli.anatomy.tensor_stats import FeatureMaps
from repbnn_cli.report.document import Picture

_PANEL, _GAP, _PAPER = 72, 6, 255


def montage(maps: FeatureMaps, number: int, total: int) -> Picture:
    """The input on the left; then source channels 0, 1, ... each with its copies."""
    copies = max(len(c) for c in maps.copies.values())
    columns = 1 + len(maps.source)
    width, height = columns * (_PANEL + _GAP) + _GAP, (1 + copies) * (_PANEL + _GAP) + _GAP
    sheet = np.full((height, width, 3), _PAPER, np.uint8)
    _place(sheet, 0, 0, _scaled(maps.image))
    for column, (channel, source) in enumerate(maps.source.items(), 1):
        _place(sheet, 0, column, _scaled(source.unsqueeze(0)))
        for row, copy in enumerate(maps.copies[channel], 1):
            _place(sheet, row, column, _scaled(copy.unsqueeze(0)))
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "PNG", optimize=True)
    which = f" of image {number + 1}" if total > 1 else ""
    shape = "×".join(map(str, next(iter(maps.source.values())).shape))
    description = (
        f"Feature maps{which} at {maps.path}, {shape}. Top row: the image, then channels "
        f"{', '.join(map(str, maps.source))} of the source network; below each its {copies} copies in the Rep network."
    )
    return Picture(f"maps-{number + 1}", f"{maps.path}{which}", description, width, height, stream.getvalue())


def _place(sheet: np.ndarray, row: int, column: int, panel: np.ndarray) -> None:
    top, left = (_GAP + i * (_PANEL + _GAP) for i in (row, column))
    sheet[top : top + _PANEL, left : left + _PANEL] = panel


def _scaled(image: Tensor) -> np.ndarray:
    """(C, H, W) of any values as (PANEL, PANEL, 3) pixels, smallest black and largest white; no smoothing."""
    low, high = image.min(), image.max()
    pixels = ((image - low) / (high - low).clamp_min(1e-12) * 255).round().byte().permute(1, 2, 0).numpy()
    pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3]
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((_PANEL, _PANEL), Image.Resampling.NEAREST))
