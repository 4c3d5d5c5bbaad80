"""What a report says of how a Rep network was prepared for training: how near it came to its source, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from repbnn_cli.number_text import exact
from repbnn_cli.report import charts
from repbnn_cli.report.document import Block, Code, Figures, Folded, Paragraph, Table


def inherited(training: Mapping[str, Any]) -> Iterator[Block]:
    """training: what a result says of itself; the `fit` in it maps paths to the shares missed before and after."""
    prepared = training.get("inherited", {})
    spread, fit = prepared.get("spread"), prepared.get("fit")
    if spread and not fit:
        yield Paragraph(f"BatchNorm shifts of the copies started apart, from {-spread:g} to {spread:g} (--spread).")
    if not fit:
        return
    yield Paragraph(
        f"Fitted to the source network before any training: {prepared['fit_steps']} steps per convolution on "
        f"{exact(prepared['fit_images'])} training images, without labels. What is missed is the mean squared distance "
        "of the values behind a convolution to the source's, over their variance."
        + (f" The replicas of a channel aimed from {-spread:g} to {spread:g} standard deviations of it beside the "
           "source's values (--spread), and the distance is to that." if spread else "")
        + (f" Latent kernels whose signs alone count were then scaled by {prepared['latents']:g} (--latents)."
           if "latents" in prepared else "")
    )  # fmt: skip
    curves = [
        charts.Line(name, tuple((float(i), 100 * values[side]) for i, values in enumerate(fit.values(), 1)), style)
        for side, (name, style) in enumerate((("kernels as transformed", charts.BEFORE), ("fitted", charts.AFTER)))
    ]
    across, unit = "convolution, in order of the forward", "% of the variance"
    yield Figures([charts.lines("fit", "Missed of the source", curves, across=across, unit=unit, low=0)])
    rows = [(Code(path), f"{100 * before:.2f}", f"{100 * after:.2f}") for path, (before, after) in fit.items()]
    table = Table(("layer", "kernels as transformed %", "fitted %"), rows, left=1, sortable=True)
    yield Folded("Missed of the source, layer by layer", [table])
