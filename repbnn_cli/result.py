"""A transformed network on disk: what is in the file, and how it becomes an nn.Module again.

The file is a dictionary of tensors and plain values that loads with `weights_only=True`:

    format, version       "repbnn", 1
    tensors               the Rep network's state dict
    source                how the source network is built (zoo name, or file.py:callable with its arguments), input
                          shape, and the file it came from: name, SHA-256, size, stated accuracy, metadata
    rules                 the resolved rule text, with the options that were in force
    options               beta, inherit, last_layer
    plan                  one row per changed module
    certificate           one row per check
    source_tensors        the source's state dict (empty with --slim)
    provenance            tool and library versions
    training              once the Rep network was trained: its accuracy `top1`, recipe, data set, seed, epochs

The graph is not stored: it is made again from source and rules, which is exact and keeps code out of the file.
"""

from __future__ import annotations

import copy
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import repbnn_cli
from repbnn_cli import checkpoint, source, surgery, writing
from repbnn_cli.checkpoint.identify import compare, shapes_of
from repbnn_cli.checkpoint.tied import assign
from repbnn_cli.errors import CheckpointError, UsageError
from repbnn_cli.graph import KeptGraphModule, Network
from repbnn_cli.graph.interception import interceptable
from repbnn_cli.plan import Plan
from repbnn_cli.rules import loads
from repbnn_cli.source import Origin, Source
from repbnn_cli.user_code import user_model
from repbnn_cli.user_code.cpu_only import running
from repbnn_cli.verify import Certificate

ModelSource = str | nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class Result:
    """A file opened: source network (captured, with weights if the file has them) and Rep network."""

    path: Path
    payload: Mapping[str, Any]
    origin: Origin
    network: Network
    plan: Plan
    module: KeptGraphModule


def payload_of(src: Source, plan: Plan, rep: nn.Module, certificate: Certificate, *, slim: bool) -> dict[str, Any]:
    """Everything a result file holds, as tensors and plain values."""
    file = src.file
    accuracy = file.accuracy if file else None
    return {
        "format": checkpoint.FORMAT,
        "version": checkpoint.VERSION,
        "tensors": rep.state_dict(),
        "source": {
            **src.origin.as_plain(),
            "file": file.path.name if file else None,
            "sha256": file.sha256 if file else None,
            "size_bytes": file.size_bytes if file else None,
            "accuracy": {"top1": accuracy.percent, "key": accuracy.key} if accuracy else None,
            "metadata": file.metadata if file else {},
        },
        "rules": plan.rules.text,
        "rules_name": plan.rules.name,
        "options": {
            "beta": plan.rules.options.beta,
            "inherit": plan.rules.options.inherit,
            "last_layer": plan.rules.options.last_layer,
        },
        "plan": [row.as_plain() for row in plan.rows()],
        "notes": list(plan.notes) + list(plan.network.notes),
        "certificate": certificate.as_plain(),
        "source_tensors": {} if slim else src.model.state_dict(),
        "provenance": {
            "repbnn": repbnn_cli.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def save(payload: Mapping[str, Any], path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes a result atomically: `.safetensors` holds tensors and the plain values as JSON, all else torch.save."""
    if Path(path).suffix != ".safetensors":
        writing.save(payload, path, force=force)
        return
    plain = {k: v for k, v in payload.items() if k not in ("tensors", "source_tensors")}
    # The network's tensors under their own names, so that any safetensors reader finds the state dict it expects.
    metadata = {"repbnn": json.dumps(plain, sort_keys=True, ensure_ascii=False)}
    writing.save_safetensors(payload["tensors"], metadata, path, force=force)


def with_tensors(payload: Mapping[str, Any], tensors: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The payload of a result whose Rep network was trained further: its new tensors, and `training`, facts about that.

    about: plain values; `top1`, in percent, is the network's accuracy. The certificate stays that of the transform.
    """
    kept = {key: value for key, value in payload.items() if key != "sha256"}  # of the file that it was read from
    return {**kept, "tensors": dict(tensors), "training": dict(about)}


def training_of(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a result, or a network packed from one, says of its training; empty where there was none."""
    found: Mapping[str, Any] = payload.get("training", {})
    return found


def has_float_kernels(training: Mapping[str, Any]) -> bool:
    """Whether the training ended in a stage of float kernels, so that its accuracy is not the binary network's."""
    return training.get("kernels") == "float"


def top1_of(training: Mapping[str, Any]) -> float | None:
    """The binary network's accuracy in percent, None where it was never measured."""
    value = training.get("top1")
    return float(value) if isinstance(value, int | float) and not has_float_kernels(training) else None


def read_payload(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The payload of a result file; CheckpointError for any other file."""
    file = checkpoint.load(path)
    payload = payload_in(file)
    if payload is None and checkpoint.PACKED in file.metadata:
        raise CheckpointError(f"{path}: is a packed network; `repbnn_cli.load_packed` opens it")
    if payload is None:
        raise CheckpointError(f"{path}: is not a result of `repbnn transform`; run it first, or use `repbnn inspect`")
    return payload


def payload_in(file: checkpoint.Checkpoint) -> dict[str, Any] | None:
    """The payload of a file that was read, or None where it is no result."""
    stored = file.metadata.get("repbnn") if file.format == "safetensors" else None
    if isinstance(stored, str):
        return {**json.loads(stored), "tensors": file.tensors, "source_tensors": {}, "sha256": file.sha256}
    return None if file.payload is None else {**file.payload, "sha256": file.sha256}


def open_result(path: str | os.PathLike[str], model: ModelSource | None = None) -> Result:
    """Builds source and Rep network of a result file; `model` builds a source network that is not in the zoo."""
    return _opened(path, read_payload(path), model)


def of_file(file: checkpoint.Checkpoint, model: ModelSource | None = None) -> Result | None:
    """`open_result` of a file that was read, or None where it is no result."""
    payload = payload_in(file)
    return None if payload is None else _opened(file.path, payload, model)


def _opened(path: str | os.PathLike[str], payload: dict[str, Any], model: ModelSource | None) -> Result:
    origin = Origin.from_plain(payload["source"])
    network_module = source_model(Path(path), origin, model)
    if payload["source_tensors"]:
        _give_source_tensors(network_module, payload["source_tensors"], path, origin)
    rules = loads(payload["rules"], name=f"rules stored in {Path(path).name}")
    network = source.capture(network_module, origin, rules)
    try:
        with running(network_module):
            plan = surgery.plan(network, rules)
            module = surgery.apply(plan, state=payload["tensors"])
    except RuntimeError as error:  # load_state_dict: the stored tensors do not fit what the rules make now
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: its tensors do not fit the network that its rules make ({first})") from error
    return Result(Path(path), payload, origin, network, plan, module.eval())


def _give_source_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str], origin: Origin
) -> None:
    try:
        assign(module, tensors)
    except RuntimeError as error:
        made = f"it was made with --model {origin.model}" if origin.model else "make it again with `repbnn transform`"
        difference = compare(shapes_of(tensors), shapes_of(module.state_dict()))
        raise user_model.does_not_fit(difference, path, made) from error


def load(path: str | os.PathLike[str], model: ModelSource | None = None) -> nn.Module:
    """The Rep network of a result file, with its weights, in eval mode.

    model: needed when the source network is the user's own: the module itself, a function that builds it, or
        "file.py:callable". A file never causes code to run that the caller did not name.
    """
    return open_result(path, model).module


def newest(folder: str | os.PathLike[str] = "checkpoints") -> Path:
    """The result written last in `folder`; UsageError when there is none."""
    found = [p for pattern in ("*.repbnn.pt", "*.repbnn.safetensors") for p in Path(folder).glob(pattern)]
    if not found:
        raise UsageError(
            f"{folder}/: holds no result (*.repbnn.pt); run `repbnn transform CHECKPOINT` first, or name a file"
        )
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.name))


def source_model(path: Path, origin: Origin, model: ModelSource | None) -> nn.Module:
    """The source network of a file, without its weights; the user's own needs `model`, which names its code."""
    if origin.arch is not None:
        if model is not None:
            raise UsageError(f"{path}: is of {origin.arch}, a network of the zoo, which no other code builds; "
                             "leave the model out")  # fmt: skip
        return source.from_origin(origin)
    if model is None:
        raise UsageError(
            f"{path}: its source network is built by your code; name it again: --model {origin.model} "
            f'(in Python: load(path, model="{origin.model}"))'
        )
    if isinstance(model, str):
        return source.build_user_model(model, dict(origin.model_args)).eval()
    if isinstance(model, nn.Module):
        return copy.deepcopy(model).eval()  # it gets other weights
    with interceptable():
        return model().eval()
