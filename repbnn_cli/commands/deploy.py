"""`repbnn export packed`, `profile --latency`, and which kernels a command runs on."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import nn

from repbnn_cli import graph, profiler, result, views, writing
from repbnn_cli import zoo as registry
from repbnn_cli.commands import pupils, targets
from repbnn_cli.commands.targets import Examined
from repbnn_cli.deploy import agreement, latency, packed
from repbnn_cli.deploy.fuse import Fused
from repbnn_cli.deploy.zeros import applied_kernel
from repbnn_cli.errors import UsageError, VerificationError
from repbnn_cli.kernels import Backend, choose
from repbnn_cli.views import kernel_views

_CHECKED_IMAGES = 4


def export_packed(
    target: str | None, *, output: str | None, zeros_as_plus: bool, force: bool, as_json: bool, **origin: Any
) -> None:
    """Writes a network as a packed file, once it was read back and computes the same."""
    path = targets.result_or_newest(target)
    if targets.is_zoo_name(path):
        raise UsageError(f"{path}: a zoo name has no trained weights to export; name a checkpoint or a result")
    found = targets.examined(path, **origin)
    if found.packed is not None:
        raise UsageError(f"{path}: is a packed network already; export the result that it came from")
    place = Path(output) if output else Path(path).with_name(Path(path).name.split(".")[0] + ".packed")
    writing.check_output(place, force=force)
    made = packed.pack(
        found.network, found.layers, found.origin, rules=found.opened.plan.rules if found.opened else None,
        about=_about(found), zeros_as_plus=zeros_as_plus,
    )  # fmt: skip
    predicted = profiler.profile(found.network, found.layers).totals.packed
    again = packed.build(made, place, origin.get("model"))
    same = _computes_the_same(found, again)
    header = packed.save(made, place, force=force)
    facts = {"file": str(place), "bytes": header + made.data_bytes, "header": header, "data": made.data_bytes,
             "predicted": predicted, "zeros_made_plus": made.zeros, "read_back": str(same)}  # fmt: skip
    if as_json:
        views.print_json(facts)
        return
    views.console().print(views.facts(kernel_views.packed_facts(facts)))
    views.say(f"next: repbnn evaluate {shlex.quote(str(place))}{views.own_code(found.origin.model)}{_data(found)}")


def _data(found: Examined) -> str:
    """`--data` for what a network is evaluated on: that of its training, else that it is made for."""
    made = result.training_of(found.opened.payload) if found.opened else {}
    trained = str(made.get("measured", made).get("data", ""))
    arch = registry.ARCHS[found.origin.arch].data if found.origin.arch else ""
    if not trained and arch == "CIFAR-10":
        return ""
    name = trained or {"ImageNet": "imagenet"}.get(arch, "folder")
    return f" --data {name}" if name == "digits" else f" --data {name}:DIR"


def timings(
    target: str | None, *, batch: str, device: str, backend: str, others: Sequence[str], output: str | None,
    force: bool, as_json: bool, **origin: Any,
) -> None:  # fmt: skip
    """Latency of a network, or of both sides of a result, fused as well where a backend for that was chosen.

    others: whether options of the other profile were given.
    """
    if others:
        raise UsageError(
            f"{', '.join(others)}: --latency measures time and knows --batch, --device, --backend, --json and --output "
            "only"
        )
    targets.check_output(output, force=force)
    batches = _batches(batch)
    place = pupils.device_of(device)
    chosen = choose(place, backend)
    path = targets.result_or_newest(target)
    found = targets.examined(path, values=True, **origin)
    networks, fused = _candidates(found, chosen, place)
    measured = latency.measure(networks, found.input_shapes, batches, place)
    machine = _machine(place)
    if as_json:
        text = views.json_text(
            {"target": path, **machine, "backend": str(chosen)}
            | {"blocks": {name: kernel_views.plain_blocks(chosen, f) for name, f in fused.items()}}
            | {"timings": kernel_views.plain_timings(measured)}
        )
    else:
        width = views.console().width
        text = views.rendered(kernel_views.timing_table(measured), width)
        notes = "\n".join(kernel_views.timing_notes(machine, chosen, fused, measured))
        text += "\n" + views.rendered(Text(notes), width)
    targets.deliver(text, output, force=force)


def _candidates(
    found: Examined, backend: Backend, device: torch.device
) -> tuple[dict[str, nn.Module], dict[str, Fused]]:
    """Name → network to time: before and after of a result, plain and, where the backend has kernels, fused."""
    sides = {"network": (found.network, found.layers)}
    if found.opened is not None:
        if not found.opened.payload["source_tensors"]:
            views.say("note: the result was made with --slim; its source network has no trained weights to time")
        before = found.opened.network
        sides = {"before": (before, dict(found.opened.plan.layers)), "after": (found.network, found.layers)}
    networks: dict[str, nn.Module] = {}
    fused: dict[str, Fused] = {}
    for name, (network, layers) in sides.items():
        networks[name] = network.module.to(device)
        if backend.name != "torch":
            made = fused[f"{name}, fused"] = agreement.checked(network, layers, backend)
            networks[f"{name}, fused"] = made.module
    return networks, fused


def _computes_the_same(found: Examined, again: packed.Opened) -> agreement.ModuleAgreement:
    """The packed network beside the one it was made from, zeros of kernels made +1 in both, on random images; a
    VerificationError where they differ."""
    shapes = [(_CHECKED_IMAGES, *shape) for shape in found.input_shapes]
    images = graph.random_inputs(found.network.module, shapes, seed=0)
    kernels = {path: packed.zeros_made_plus(applied_kernel(found.network, path))
               for path, kernel in again.header["kernels"].items() if kernel["zeros"]}  # fmt: skip
    same = agreement.compare_modules(found.network, again.network, images, kernels, again.header["unstored"])
    if not same.holds:
        raise VerificationError(f"{found.target}: read back, the packed network computes something else ({same})")
    return same


def _about(found: Examined) -> dict[str, Any]:
    """What a packed file says of where it comes from, and how its images are to be prepared."""
    training = result.training_of(found.opened.payload) if found.opened else {}
    recipe = training.get("recipe_text") or (found.file.metadata.get("recipe_text") if found.file else None)
    sha256 = found.opened.payload["sha256"] if found.opened else found.file.sha256 if found.file else None
    stated = found.file.accuracy._asdict() if found.file and found.file.accuracy else None
    said = {key: training[key] for key in ("recipe", "data", "measured") if key in training}
    return {"file": {"name": Path(found.target).name, "sha256": sha256, "accuracy": stated},
            "training": said | {"top1": result.top1_of(training), "recipe_text": recipe}}  # fmt: skip


def _batches(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--batch {text}: expected batch sizes, e.g. 1,8,128")
    return sizes


def _machine(device: torch.device) -> dict[str, Any]:
    """What a time means nothing without."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "hardware": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
