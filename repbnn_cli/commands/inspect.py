"""`repbnn inspect`: what is in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from repbnn_cli import checkpoint, result, views
from repbnn_cli.checkpoint import identify
from repbnn_cli.commands import targets
from repbnn_cli.deploy import packed, zeros
from repbnn_cli.errors import CheckpointError
from repbnn_cli.report import trained
from repbnn_cli.source import Origin
from repbnn_cli.views import kernel_views


def inspect(path: str, *, arch: str | None, key: str | None, unsafe: bool, as_json: bool) -> None:
    """What is in a file, and which network it belongs to; exit code 3 when it fits none."""
    file = checkpoint.load(path, key=key, unsafe=unsafe)
    if packed.is_packed(file):
        header = packed.read(file.path).header
        targets.check_agrees(f"{path} is a packed network", Origin.from_plain(header["source"]), arch=arch, key=key)
        _inspect_packed(file, header, as_json=as_json)
        return
    stored = result.payload_in(file)
    if stored is not None:
        targets.check_agrees(f"{path} is a result", Origin.from_plain(stored["source"]), arch=arch, key=key)
    found: identify.Identified | None = None
    problem: CheckpointError | None = None
    if stored is None:
        try:
            found = identify.resolve(file, arch)
        except CheckpointError as error:
            problem = error
    try:
        counted = _zeros(file, stored, found, key=key, unsafe=unsafe)
    except CheckpointError as error:  # weights that are not finite have no signs
        problem, counted = problem or error, zeros.in_tensors(file.tensors)
    accuracy = file.accuracy
    values = {
        "file": str(file.path),
        "sha256": file.sha256,
        "bytes": file.size_bytes,
        "format": file.format,
        "state dict under": file.container or None,
        "prefix taken off": file.prefix or None,
        "tensors": len(file.tensors),
        "values": sum(t.numel() for t in file.tensors.values()),
        "dtypes": file.dtypes,
        "stated accuracy": {"top1": accuracy.percent, "key": accuracy.key} if accuracy else None,
        "metadata": {} if stored else file.metadata,
        "notes": [*file.notes, *([found.left_out] if found and found.left_out else [])],
        "network": found.arch if found else (stored or {}).get("source", {}).get("arch"),
        "classes": found.num_classes if found else None,
        "because": found.reason if found else None,
        "fits as well": list(found.alternatives) if found else [],
        "result of transform": {
            k: stored[k] for k in ("options", "rules_name", "certificate", "source", "training") if k in stored
        }
        if stored
        else None,
        "kernel zeros": kernel_views.plain_zeros(counted),
    }
    if as_json:
        views.print_json(values | {"problem": str(problem) if problem else None})
    else:
        views.console().print(views.facts(_readable(values)))
    if problem is not None:
        raise problem


def _zeros(
    file: checkpoint.Checkpoint, stored: dict[str, Any] | None, found: identify.Identified | None, **given: Any
) -> zeros.Zeros:
    """Weights with sign 0: of the network's kernels as applied where it is one of the zoo, else of stored tensors."""
    if found is not None:
        examined = targets.examined(str(file.path), arch=found.arch, **given)
    elif stored is not None and stored["source"]["arch"] is not None:
        examined = targets.examined(str(file.path), **given)
    else:  # the user's own code is not run for a look at a file
        return zeros.in_tensors(file.tensors)
    return zeros.in_kernels(examined.network, examined.layers)


def _inspect_packed(file: checkpoint.Checkpoint, header: Mapping[str, Any], *, as_json: bool) -> None:
    values = {"file": str(file.path), "sha256": file.sha256, "bytes": file.size_bytes, "format": "packed network",
              "version": header["version"], "network": header["source"]["arch"] or header["source"]["model"],
              "options": header["options"], "exported from": header.get("file"), "kernels": len(header["kernels"]),
              "norms": len(header["norms"]), "data": "as its SHA-256 says"}  # fmt: skip
    if as_json:
        views.print_json(values | {"kernel_shapes": {p: k["shape"] for p, k in header["kernels"].items()}})
    else:
        views.console().print(views.facts(_readable(values)))


# A SHA-256 behind the longest label is one line of 80 columns.
_LABELS = {"state dict under": "state dict in", "prefix taken off": "without prefix", "stated accuracy": "states"}


def _readable(values: dict[str, Any]) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        label = _LABELS.get(name, name)
        if name == "result of transform" and value:
            options = value["options"]
            passed = all(c["passed"] for c in value["certificate"])
            yield (
                "transformed", f"β = {options['beta']}, rules {value['rules_name']}, inherit {options['inherit']}, "
                f"last layer {options['last_layer']}",
            )  # fmt: skip
            file, digest = value["source"]["file"], value["source"]["sha256"]
            yield "source", f"{file} (sha256 {digest[:12]}…)" if digest else "a network of the zoo with fresh weights"
            yield "certificate", "passed" if passed else "FAILED"
            yield from _trained(result.training_of(value))
        elif name == "kernel zeros":
            yield label, kernel_views.zeros_text(value)
        elif isinstance(value, dict) and value:
            yield label, ", ".join(f"{k} {_short(v)}" for k, v in value.items())
        elif isinstance(value, dict | list) and not value:
            yield label, None
        elif isinstance(value, list):
            yield label, "; ".join(map(str, value))
        elif isinstance(value, int):
            yield label, f"{value:,}"
        else:
            yield label, value


def _trained(training: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """What became of the result since its transform."""
    if training.get("top1") is not None:
        fit = "; fitted to its source first" if training.get("inherited", {}).get("fit_steps") else ""
        yield "accuracy", f"{trained.measured(training, training['top1'])}{fit}"
    yield "about the data", "; ".join(training.get("data_notes", []))


def _short(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    lines = str(value).count("\n")
    return f"({lines + 1} lines, whole with --json)" if lines else str(value)
