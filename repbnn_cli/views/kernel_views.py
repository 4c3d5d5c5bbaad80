"""Text about kernels: which blocks of a network run fused, which do not and why, and how long a batch takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from repbnn_cli.deploy.fuse import Fused
from repbnn_cli.deploy.latency import Timing
from repbnn_cli.deploy.match import Matches
from repbnn_cli.deploy.zeros import Zeros
from repbnn_cli.kernels import Backend
from repbnn_cli.views.networks import table
from repbnn_cli.wording import some


def backend_lines(backend: Backend, fused: Fused | None) -> list[str]:
    """Which backend runs and why; with fused blocks, which those are."""
    what = f"backend {backend}"
    return [what] if fused is None else [what, *block_lines(fused.matches)]


def block_lines(matches: Matches) -> Iterator[str]:
    """One line per form of block, and one per reason for none; paths are listed up to three."""
    total = len(matches.matched) + len(matches.missed)
    yield f"blocks: {len(matches.matched)} of {total} binary convolutions run fused with what follows them"
    for parts, members in _grouped((" + ".join(m.parts), m.path) for m in matches.matched).items():
        yield f"  {len(members)} × {parts}{_behind(matches, parts)}"
    for reason, members in _grouped((m.reason, m.path) for m in matches.missed).items():
        yield f"  {len(members)} as before, {reason}: {some(members)}"


def zero_line(fused: Fused) -> str:
    """What exact zeros among the activations mean for the result."""
    zeros = sum(block.zeros for block in fused.blocks)
    if not zeros:
        return "no activation was exactly 0, so no sign was a matter of convention"
    return f"{zeros:,} activations were exactly 0: +1 in packed bits, 0 in torch.sign"


def plain_blocks(backend: Backend, fused: Fused | None) -> dict[str, Any]:
    """The same for JSON."""
    values: dict[str, Any] = {"name": backend.name, "why": backend.why}
    if fused is None:
        return values | {"fused": [], "not_fused": []}
    matches = fused.matches
    return values | {
        "fused": [{"path": m.path, "parts": list(m.parts), "then": m.then} for m in matches.matched],
        "not_fused": [{"path": m.path, "reason": m.reason} for m in matches.missed],
    }


def _behind(matches: Matches, parts: str) -> str:
    """What stands between a lone convolution and its BatchNorm."""
    found = Counter(m.then for m in matches.matched if " + ".join(m.parts) == parts and m.then)
    return f" alone ({', '.join(found)} follows)" if found else ""


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, member in pairs:
        groups.setdefault(key, []).append(member)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Latency


def timing_table(timings: Sequence[Timing]) -> Table:
    """One line per batch size and network."""
    made = table("batch", "network", "median ms", "IQR", "images/s", "ratio", right=_NUMBERS)
    first: dict[int, Timing] = {}
    for timing in timings:
        base = first.setdefault(timing.batch, timing)
        made.add_row(
            str(timing.batch) if timing is base else "",
            timing.name,
            f"{1e3 * timing.median:.3f}",
            f"{1e3 * timing.iqr:.3f}",
            f"{timing.images_per_s:,.0f}" if timing.images_per_s >= 10 else f"{timing.images_per_s:.2g}",
            f"{timing.median / base.median:.2f}",
        )
    return made


_NUMBERS = ("batch", "median ms", "IQR", "images/s", "ratio")


def timing_notes(
    machine: Mapping[str, Any], backend: Backend, fused: Mapping[str, Fused], timings: Sequence[Timing]
) -> list[str]:
    """What was measured where, on which kernels."""
    spread = ", ".join(str(n) for n in sorted({len(t.seconds) for t in timings}))
    lines = [
        f"{machine['hardware']} ({machine['device']}), {machine['threads']} CPU threads, torch {machine['torch']}.",
        f"Medians of {spread} rounds in which the networks take turns; ratio: to the first line.",
        f"backend {backend}" + ("" if fused else ": no block is fused, binary convolutions run as F.conv2d of ±1"),
    ]
    for name, found in fused.items():
        lines += [f"{name}:", *block_lines(found.matches)]
    return lines


def plain_timings(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """All of it for JSON, the single rounds included."""
    return [
        {"network": t.name, "batch": t.batch, "median_ms": 1e3 * t.median, "iqr_ms": 1e3 * t.iqr,
         "images_per_s": t.images_per_s, "forwards_per_round": t.inner, "rounds_ms": [1e3 * s for s in t.seconds]}
        for t in timings
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The packed file


def packed_facts(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and value."""
    yield "file", facts["file"]
    yield "bytes", f"{facts['bytes']:,} = header {facts['header']:,} + data {facts['data']:,}"
    agree = "as" if facts["data"] == facts["predicted"] else "NOT as"
    yield "data", f"{agree} `repbnn profile` predicts (Packed: {facts['predicted']:,})"
    if facts["zeros_made_plus"]:
        yield "zeros", f"{facts['zeros_made_plus']:,} weights with sign 0 became +1"
    yield "read back", facts["read_back"]


# ---------------------------------------------------------------------------------------------------------------------
# Weights with sign 0


def plain_zeros(zeros: Zeros) -> dict[str, Any]:
    """For JSON."""
    return {"zeros": zeros.total, "weights": zeros.weights, "as_applied": zeros.applied, "layers": dict(zeros.layers),
            "worst": [list(item) for item in zeros.worst()]}  # fmt: skip


def zeros_text(plain: Mapping[str, Any]) -> str | None:
    """How many there are, where, and what they mean; None for a file without kernels."""
    if not plain["weights"]:
        return None
    of = "weights in binary kernels have sign 0" if plain["as_applied"] else "values of 4-D tensors are stored as 0"
    start = f"{plain['zeros']:,} of {plain['weights']:,} {of}"
    if not plain["zeros"]:
        return start
    worst = ", ".join(f"{path} {number:,}" for path, number in plain["worst"])
    more = len(plain["layers"]) - len(plain["worst"])
    meaning = "torch.sign(0) is 0, packed bits hold +1" if plain["as_applied"] else "sign(0) would be 0, in bits +1"
    return f"{start} ({worst}{f' and {more} more' if more else ''}); {meaning}"
