"""Reads checkpoints of every common form without running code from them; also this tool's own format.

``load`` finds the state dict inside what a training script saved, takes wrapper prefixes off its names and keeps the
plain values beside it. Which network it is, is for ``identify``; how bytes become objects, for ``reading``; how files
are written, for ``writing``, whose functions are offered here as well.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from repbnn_cli.checkpoint import reading
from repbnn_cli.checkpoint.pickles import ArrayStandIn, NamespaceStandIn
from repbnn_cli.errors import CheckpointError
from repbnn_cli.wording import counted, some

FORMAT = "repbnn"
VERSION = 1
PACKED = "repbnn_packed"  # metadata of a packed network's file, see deploy/packed.py

# fmt: off
# Where training scripts put the state dict, in the order in which it is looked for. Averaged weights come last: the
# accuracy stored beside them is as a rule that of the plain ones.
CONTAINERS = (
    "state_dict", "model", "net", "model_state_dict", "model_state", "network", "net_state_dict", "network_state_dict",
    "weights", "params", "module", "backbone", "student",
    "ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "params_ema",
)
# What DataParallel, torch.compile and training frameworks put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "student.")
# Names of a best or last top-1 accuracy, in the order in which they are believed.
ACCURACY_KEYS = (
    "best_prec1", "best_top1_acc", "best_top1", "best_acc1", "best_acc", "best_accuracy", "best_test_acc",
    "best_val_acc", "best_prec", "prec1", "top1_acc", "top1", "acc1", "test_acc", "val_acc", "acc", "accuracy",
)
# fmt: on
_COUNTERS = ("total_ops", "total_params")  # buffers that thop registers where it counts
_DEEPEST = 4
_LONGEST = 64


class Accuracy(NamedTuple):
    """Top-1 accuracy in percent, and the key of the checkpoint's metadata that it was found under."""

    percent: float
    key: str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds.

    ``tensors`` are the state dict's, in file order, detached, in the file's dtypes, on the CPU; those of a torch zip
    file are mapped from it, not copied (writing to them does not reach the file). ``container`` is the key path of the
    state dict ("" when the file is one itself), ``prefix`` what was taken off every name. ``metadata`` holds the plain
    values beside it, ``notes`` what was ignored, ``payload`` the whole dictionary of a file in this tool's own format.
    ``others``: key paths of further state dicts in the file.
    """

    path: Path
    sha256: str
    size_bytes: int
    format: str
    tensors: dict[str, Tensor] = field(repr=False)
    container: str = ""
    prefix: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    payload: dict[str, Any] | None = field(default=None, repr=False)
    others: tuple[str, ...] = ()

    @cached_property
    def accuracy(self) -> Accuracy | None:
        """Top-1 in percent as the file states it; values up to 1 are fractions, 0 means never measured."""
        lowered = {key.lower(): key for key in self.metadata}
        for name in ACCURACY_KEYS:
            value = _number(self.metadata[lowered[name]]) if name in lowered else None
            if value is not None and 0 < value <= 100:
                return Accuracy(100 * value if value <= 1 else value, lowered[name])
        return None

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors of each dtype, e.g. ``{"float32": 101, "int64": 20}``, the most frequent first."""
        counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values())
        return dict(counts.most_common())


def load(path: str | os.PathLike[str], *, key: str | None = None, unsafe: bool = False) -> Checkpoint:
    """Read a checkpoint: torch (zip or legacy), safetensors, or this tool's own format.

    ``key`` names the entry that holds the state dict (dots go deeper) instead of the search through ``CONTAINERS``, or
    what the names of the network's tensors begin with, where others lie beside them.
    No code from the file is run, unless ``unsafe`` is given: then it is unpickled as Python does it, and a pickled
    module gives its ``state_dict()``. Raises CheckpointError, one line that begins with the path.
    """
    path = Path(path)
    kind = reading.kind_of(path)
    content, texts = reading.content_of(path, kind, unsafe=unsafe)
    payload = _own_payload(path, content)
    if payload is not None:
        kind, key = FORMAT, key or "tensors"
    found = _find(path, content, key)
    if payload is None and (counters := [n for n in found.tensors if n.rpartition(".")[2] in _COUNTERS]):
        rest = {name: tensor for name, tensor in found.tensors.items() if name not in counters}
        found = found._replace(tensors=rest, notes=[*found.notes, f"left out thop's counters ({some(counters)})"])
    without_data = [name for name, tensor in found.tensors.items() if tensor.is_meta]
    if without_data:
        raise CheckpointError(
            f"{path}: {counted(len(without_data), 'tensor')} without data ({some(without_data)}), it was saved from "
            "the meta device; save it after the weights were loaded"
        )
    tensors, prefix, notes = _unwrapped(found.tensors)
    prefix, notes = found.start + prefix, found.notes + notes
    if payload is not None:
        # The names in an own file are exactly those of its network, and nothing in it is there by chance.
        tensors, prefix, notes = found.tensors, "", []
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Checkpoint(
        path=path,
        sha256=sha256,
        size_bytes=path.stat().st_size,
        format=kind,
        tensors=tensors,
        container=found.container,
        prefix=prefix,
        metadata={**found.metadata, **texts},
        notes=tuple(notes),
        payload=payload,
        others=found.others,
    )


def check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike[str] | None = None) -> None:
    """Raise CheckpointError when a floating-point tensor holds NaN or infinity, naming the first ones."""
    bad = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if not bad:
        return
    counts = [int((~torch.isfinite(tensors[name].float())).sum()) for name in bad[:3]]
    shown = ", ".join(
        f"{name} ({count} of {tensors[name].numel()} values)" for name, count in zip(bad, counts, strict=False)
    )
    more = f" and {len(bad) - 3} more tensors" if bad[3:] else ""
    start = "" if path is None else f"{path}: "
    raise CheckpointError(
        f"{start}NaN or infinity in {shown}{more}; the training diverged or the file is damaged, take an earlier one"
    )


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        return True
    wide = tensor.float() if tensor.element_size() < 4 else tensor
    # One pass without a mask: NaN and infinity survive a sum. A finite sum may overflow, hence the second look.
    return bool(torch.isfinite(wide.sum())) or bool(torch.isfinite(wide).all())


class _Found(NamedTuple):
    tensors: dict[str, Tensor]
    container: str
    metadata: dict[str, Any]
    notes: list[str]
    start: str = ""  # of the tensors' names, where --key named it
    others: tuple[str, ...] = ()


def _own_payload(path: Path, content: Any) -> dict[str, Any] | None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"{path}: written by a newer repbnn (format version {version}, this one reads up to {VERSION}); "
            "update with: pip install --upgrade repbnn"
        )
    if version != VERSION or not isinstance(content.get("tensors"), dict):
        raise CheckpointError(
            f"{path}: says it is a repbnn result but has no valid version and tensors; make it again with transform"
        )
    return content


def _find(path: Path, content: Any, key: str | None) -> _Found:
    """The state dict in ``content`` and what stands beside it."""
    if isinstance(content, nn.Module):
        state = _state_of(content)
        if state is None:
            raise CheckpointError(f"{path}: a pickled {type(content).__qualname__} without any tensors")
        return _Found(state, "", {}, [f"a pickled {type(content).__qualname__}: its state_dict() was taken"])
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds {_described(content)}, not a dictionary of tensors; save model.state_dict() instead"
        )
    candidates = list(_candidates(content, ()))
    chosen, start = _entry(path, content, key, candidates) if key else (_choose(path, content, candidates), "")
    others = tuple(".".join(other) for other in candidates if other != chosen)
    value = _at(content, chosen)
    notes = [f"also found {other}; choose it with --key {other}" for other in others]
    if isinstance(value, nn.Module):
        notes.append(f"{'.'.join(chosen)} is a pickled {type(value).__qualname__}: its state_dict() was taken")
    elif chosen:
        notes += [
            f"ignored {'.'.join(chosen)}[{name}]: {_described(item)}"
            for name, item in value.items()
            if not isinstance(item, Tensor)
        ]
    metadata, ignored = _beside(content, chosen, candidates)
    state = _state_of(value) or {}
    if start:
        notes.append(left_out(state, start))
        state = under(state, start)
    return _Found(state, ".".join(chosen), metadata, notes + ignored, start, others)


def under(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``start``, without it."""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def left_out(tensors: Mapping[str, Tensor], start: str) -> str:
    """What ``under`` leaves out, as a note."""
    rest = [name for name in tensors if not name.startswith(start)]
    return f"took the tensors under {start.removesuffix('.')}, left out {some(rest) or 'none'}"


def _candidates(content: Mapping[Any, Any], at: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Key paths of the state dicts under the documented keys, in the documented order."""
    for name in CONTAINERS:
        value = content.get(name)
        if _state_of(value) is not None:
            yield (*at, name)
        elif isinstance(value, Mapping) and len(at) < _DEEPEST:
            yield from _candidates(value, (*at, name))


def _state_of(value: Any) -> dict[str, Tensor] | None:
    """The tensors of ``value`` when it is a state dict: text keys, and tensors for the most part."""
    entries = value.state_dict() if isinstance(value, nn.Module) else value
    if not isinstance(entries, Mapping):
        return None
    tensors = {name: item.detach() for name, item in entries.items() if isinstance(item, Tensor)}
    if 2 * len(tensors) <= len(entries) or not all(isinstance(name, str) for name in entries):
        return None
    return tensors


def _choose(path: Path, content: Mapping[Any, Any], candidates: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    if candidates:
        return candidates[0]
    if _state_of(content) is not None:
        return ()
    # Under a name of the author's own: taken when there is just one, asked for when there are several.
    named = _networks_in(content)
    if len(named) > 1:
        raise CheckpointError(
            f"{path}: {len(named)} entries could be the network ({some(named, 6)}); choose with --key"
        )
    if not named:
        raise CheckpointError(f"{path}: {_why_none(content)}; save model.state_dict() instead, or name its --key")
    return (named[0],)


def _networks_in(content: Mapping[Any, Any]) -> list[str]:
    # A dictionary of averages or losses is one of tensors, too, but none of these has more than one dimension.
    states = {str(name): _state_of(value) for name, value in content.items()}
    return [name for name, state in states.items() if state and any(tensor.dim() > 1 for tensor in state.values())]


def _entry(
    path: Path, content: Mapping[Any, Any], key: str, candidates: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], str]:
    """The key path that ``--key`` means, checked to hold a state dict, and what names begin with there ("": all)."""
    keys = (key,) if key in content else tuple(key.split("."))
    try:
        value = _at(content, keys)
    except (KeyError, TypeError):
        problem = "is not in the file"
    else:
        if _state_of(value) is not None:
            return keys, ""
        inside = _networks_in(value) if isinstance(value, Mapping) else []
        if len(inside) == 1:  # {"ema": {"decay": 0.999, "module": {...}}}
            return (*keys, inside[0]), ""
        problem = f"holds {_described(value)}, not a dictionary of tensors"
    starts = []
    for at in candidates or [()]:
        names = _state_of(_at(content, at)) or {}
        inner = key.removeprefix("".join(f"{part}." for part in at)) + "."
        if any(name.startswith(inner) for name in names):
            return at, inner
        tops = Counter(name.partition(".")[0] for name in names if "." in name)
        starts += [top for top, _ in tops.most_common(3)] if len(tops) < len(names) else []
    usable = list(dict.fromkeys([*(".".join(at) for at in candidates), *_networks_in(content), *starts]))
    hint = f"possible here: {some(usable, 6)}" if usable else "no entry of the file is a state dict"
    raise CheckpointError(f"{path}: {key} {problem}; {hint}")


def _at(content: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        content = content[key]
    return content


def _why_none(content: Mapping[Any, Any]) -> str:
    if not content:
        return "an empty dictionary"
    for name in CONTAINERS:
        value = content.get(name)
        if isinstance(value, Mapping):
            return f"{name} holds {_described(value)}" if value else f"{name} is empty"
    return f"holds no state dict but {_described(content)}"


def _beside(
    content: Mapping[Any, Any], chosen: tuple[str, ...], candidates: Sequence[tuple[str, ...]]
) -> tuple[dict[str, Any], list[str]]:
    """Plain values on the way down to the state dict, and a note for everything that is left out."""
    metadata: dict[str, Any] = {}
    notes: list[str] = []
    for depth in range(max(len(chosen), 1)):
        at = chosen[:depth]
        for name, value in _at(content, at).items():
            here = (*at, str(name))
            if not chosen and isinstance(value, Tensor):
                continue  # the state dict itself
            if here == chosen[: len(here)] or any(here == other[: len(here)] for other in candidates):
                continue
            plain = _plain(value)
            if isinstance(value, Mapping) and ("optim" in here[-1].lower() or {"state", "param_groups"} <= set(value)):
                notes.append(f"ignored {'.'.join(here)}: optimizer state")
            elif plain is not _NOT_PLAIN:
                metadata.setdefault(here[-1], plain)
            else:
                notes.append(f"ignored {'.'.join(here)}: {_described(value)}")
    return metadata, notes


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """``value`` as text, number, None, or a short list or dictionary of these; ``_NOT_PLAIN`` for anything else."""
    if isinstance(value, NamespaceStandIn):
        value = value.values
    elif isinstance(value, argparse.Namespace):
        value = vars(value)
    elif isinstance(value, ArrayStandIn):
        value = value.value
    if isinstance(value, Tensor | np.ndarray | np.generic):
        elements = value.numel() if isinstance(value, Tensor) else value.size
        if elements != 1 or getattr(value, "is_meta", False):
            return _NOT_PLAIN
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and len(value) <= _LONGEST:
        items = [_plain(item) for item in value]
        return _NOT_PLAIN if _NOT_PLAIN in items else items
    if isinstance(value, Mapping):
        entries = {str(name): _plain(item) for name, item in value.items()}
        kept = {name: item for name, item in entries.items() if item is not _NOT_PLAIN}
        return kept if len(kept) == len(entries) or 2 * len(kept) > len(entries) else _NOT_PLAIN
    return _NOT_PLAIN


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)  # safetensors holds text only
    except ValueError:
        return None


def _unwrapped(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str, list[str]]:
    """``tensors`` without what wrappers add to the names: the tensors, the common prefix taken off, notes."""
    notes = []
    if "n_averaged" in tensors and all(name.startswith("module.") for name in tensors if name != "n_averaged"):
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
        notes.append("ignored n_averaged: the counter of averaged weights (AveragedModel)")
    prefix = ""
    while True:
        start = next((p for p in PREFIXES if all(len(name) > len(p) and name.startswith(p) for name in tensors)), None)
        if start is None or not tensors:
            break
        prefix += start
        tensors = {name.removeprefix(start): tensor for name, tensor in tensors.items()}
    # Compiling a submodule leaves its mark within the names.
    plain = {name: ".".join(part for part in name.split(".") if part != "_orig_mod") for name in tensors}
    changed = [name for name in tensors if plain[name] != name]
    if changed and len(set(plain.values())) == len(plain):
        tensors = {plain[name]: tensor for name, tensor in tensors.items()}
        notes.append(f"_orig_mod (torch.compile) taken out of {len(changed)} names")
    return tensors, prefix, notes


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        kinds = Counter(_kind(item) for item in value.values())
        listed = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common(3))
        return f"a dictionary of {listed}" if value else "an empty dictionary"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return {"str": "text", "NoneType": "nothing"}.get(type(value).__name__, f"a {_kind(value)}")


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "dictionary"
    known = {"Tensor": "tensor", "Parameter": "tensor", "ArrayStandIn": "NumPy array", "ndarray": "NumPy array"}
    return known.get(type(value).__name__, type(value).__name__.removesuffix("StandIn"))
