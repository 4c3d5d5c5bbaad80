"""`repbnn report`: everything about one transform, about training runs, or about a sweep, for people to read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repbnn_cli import anatomy, checkpoint, paper, result, runs, views, writing
from repbnn_cli import report as room
from repbnn_cli import zoo as registry
from repbnn_cli.anatomy import image_files, tensor_stats
from repbnn_cli.commands import costs, targets
from repbnn_cli.errors import UsageError
from repbnn_cli.profiler import shapes
from repbnn_cli.runs import RunRecord, sweeps
from repbnn_cli.train import recipes
from repbnn_cli.user_code.cpu_only import running
from repbnn_cli.wording import counted

_MOST_IMAGES, _SHOWN_IMAGES, _NOISE = 16, 3, 4


@dataclass(frozen=True)
class _Inputs:
    """What the networks are run on. real: the images among it, for feature maps; said: where it comes from; mean, std:
    what made the pixels of an image the values that the network takes."""

    tensors: tuple[Tensor, ...]
    real: Tensor | None
    said: str
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    def as_seen(self, image: Tensor) -> Tensor:
        """An image of `real`, (C, H, W), as pixels again."""
        mean, std = (torch.tensor(v[: len(image)]).view(-1, 1, 1) for v in (self.mean, self.std))
        return image * std + mean


def report(
    target: str | None, others: Sequence[str], *, html: bool, markdown: bool, as_json: bool, output: str | None,
    plots: str | None, run_folders: Sequence[str], images: Sequence[str], layer: str | None, timestamp: bool,
    model: str | None, sweep: str | None, force: bool,
) -> None:  # fmt: skip
    """A page, Markdown with its drawings, or JSON."""
    if html + markdown + as_json > 1:
        raise UsageError("--html, --markdown and --json: give one of them")
    if plots is not None and (html or as_json):
        raise UsageError("--plots: is for --markdown; a page has its drawings inside")
    if layer is not None and not images:
        raise UsageError("--layer: is for feature maps; give --images as well")
    targets.check_output(output, force=force)
    folder = None if html or as_json else _plots_folder(output, plots)
    if sweep is not None:
        others_given = {"--runs": run_folders, "--images": images, "--timestamp": timestamp, "--model": model}
        document, plain = _of_sweep(sweep, {target or "": target, **others_given})
    else:
        document, plain = _of_result(target, others, run_folders, images, layer, model, timestamp=timestamp)
    if as_json:
        targets.deliver(views.json_text(plain), output, force=force)
    elif html:
        targets.deliver(room.page(document), output, force=force)
    else:
        link = _write_plots(document, folder, output, force=force) if folder else None
        targets.deliver(room.markdown(document, link), output, force=force)


def _of_sweep(folder: str, beside: Mapping[str, object]) -> tuple[room.Document, dict[str, Any]]:
    """The report of a sweep, finished or not. beside: what was given and belongs to other reports."""
    for name, value in beside.items():
        if value:
            raise UsageError(f"{name}: --sweep {folder} is a report of its own; give one of them")
    read = sweeps.read(folder)
    return room.sweep_document(read), room.sweep_as_dict(read)


def _of_result(
    target: str | None, others: Sequence[str], run_folders: Sequence[str], images: Sequence[str], layer: str | None,
    model: str | None, *, timestamp: bool,
) -> tuple[room.Document, dict[str, Any]]:  # fmt: skip
    """The report of a result with its runs, or of runs alone."""
    opened, records = _subject(target, run_folders, model)
    if opened is None:
        beside = {"--images": images, "--layer": layer, "--timestamp": timestamp, "--model": model}
        if unplaced := [*others, *(name for name, value in beside.items() if value)]:
            raise UsageError(f"{unplaced[0]}: a report of runs alone, without a RepBNN, has no place for it")
        title = records[0].path.name if len(records) == 1 else f"{len(records)} training runs"
        return room.runs_document(records, title), {"runs": room.runs_as_list(records)}
    given = _given(opened, records, timestamp=timestamp, evidence=_evidence(opened, others, images, layer, model))
    made = room.build(given)
    return room.document(made), room.as_dict(made)


def _subject(
    target: str | None, run_folders: Sequence[str], model: str | None
) -> tuple[result.Result | None, list[RunRecord]]:
    """The result to report on (None for runs of source networks alone), and the runs that belong to it."""
    records = [runs.read(found) for folder in run_folders for found in _runs_in(Path(folder))]
    if target is not None and Path(target).is_dir():
        own = [runs.read(found) for found in _runs_in(Path(target))]
        files = map(checkpoint.load, _checkpoints(own[0].path) if len(own) == 1 else ())
        opened = next((found for f in files if (found := result.of_file(f, model)) is not None), None)
        return opened, _distinct([*own, *records])
    path = targets.result_or_newest(target)
    home = runs.folder_of(path)
    return result.open_result(path, model), _distinct(([runs.read(home)] if home else []) + records)


def _runs_in(folder: Path) -> list[Path]:
    """A run's own folder, or the runs in a folder of runs."""
    inside = sorted(p.parent for p in folder.glob(f"*/{runs.RECORD}"))
    return inside if inside and not runs.is_run(folder) else [folder]


def _checkpoints(folder: Path) -> list[Path]:
    return [f for name in ("best.pt", "last.pt") if (f := folder / "checkpoints" / name).is_file()]


def _distinct(records: Sequence[RunRecord]) -> list[RunRecord]:
    return list({os.path.realpath(r.path): r for r in records}.values())


def _given(
    opened: result.Result, records: Sequence[RunRecord], *, timestamp: bool, evidence: room.Evidence
) -> room.ReportInput:
    payload, origin = opened.payload, opened.origin
    accuracy = payload["source"]["accuracy"] or {}
    options = payload["options"]
    arch = registry.ARCHS.get(origin.arch) if origin.arch else None
    return room.ReportInput(
        title=f"{origin.name}, β = {options['beta']}",
        rules_name=payload["rules_name"],
        rules_text=payload["rules"],
        options=options,
        plan=payload["plan"],
        certificate=payload["certificate"],
        costs=costs.comparison(opened),
        arch=origin.name,
        network=f"{arch.method} {arch.network}, {arch.data}" if arch else None,
        source_file=payload["source"]["file"],
        source_sha256=payload["source"]["sha256"],
        source_bytes=payload["source"]["size_bytes"],
        result_file=opened.path.name,
        result_sha256=payload["sha256"],
        accuracy=accuracy.get("top1"),
        accuracy_key=accuracy.get("key"),
        published=paper.accuracies(arch) if arch else (),
        published_costs=paper.costs(arch, options["beta"], options["last_layer"]) if arch else (),
        notes=payload["notes"],
        environment=payload["provenance"],
        timestamp=datetime.now(UTC).isoformat(timespec="seconds") if timestamp else None,
        data=arch.data if arch else None,
        training=result.training_of(payload),
        runs=records,
        evidence=evidence,
    )


def _evidence(
    opened: result.Result, others: Sequence[str], places: Sequence[str], layer: str | None, model: str | None
) -> room.Evidence:
    """What a look at both networks shows; without the source's weights only the Rep network is looked at."""
    network, rep_layers = shapes.rep_network(opened.plan, opened.module)
    source, layers = opened.network.module, opened.plan.layers
    weighted = bool(opened.payload["source_tensors"])
    standings = _standings(others, opened, model)
    inputs = _inputs(opened, places)
    if inputs.real is not None and not weighted:
        raise UsageError(
            f"{opened.path}: holds no weights of its source network (--slim), so there are no feature maps to compare; "
            "leave --images out, or transform without --slim"
        )
    with running(source):
        sides = [(opened.module, rep_layers)] + ([(source, layers)] if weighted else [])
        seen = [tensor_stats.activations(module, known, *inputs.tensors) for module, known in sides]
        maps: tuple[tensor_stats.FeatureMaps, ...] = ()
        if inputs.real is not None:
            shown = inputs.real[:_SHOWN_IMAGES]
            maps = tensor_stats.feature_maps(opened.plan, opened.module, shown, layer)
            maps = tuple(replace(m, image=inputs.as_seen(m.image)) for m in maps)
    return room.Evidence(
        blocks=anatomy.blocks(opened.plan, network),
        weights=(
            tensor_stats.weights(source, layers) if weighted else (),
            tensor_stats.weights(opened.module, rep_layers),
        ),
        activations=(seen[1] if weighted else (), seen[0]),
        images=inputs.said,
        maps=maps,
        others=standings,
    )


def _inputs(opened: result.Result, places: Sequence[str]) -> _Inputs:
    """The user's images, prepared as for the network's training; noise where there are none."""
    shape_list = opened.origin.input_shape
    if not places:
        generator = torch.Generator().manual_seed(0)
        noise = tuple(torch.randn(_NOISE, *shape, generator=generator) for shape in shape_list)
        return _Inputs(noise, None, f"{_NOISE} inputs of normal noise (--images shows what real ones give)")
    if len(shape_list) != 1 or len(shape_list[0]) != 3 or shape_list[0][0] not in (1, 3):
        expected = ", ".join(str(s) for s in shape_list)
        raise UsageError(f"--images: this network takes {expected}; expected one input of 1 or 3 channels")
    paths = image_files.find(places, _MOST_IMAGES)
    trained_by = result.training_of(opened.payload).get("recipe_text")
    recipe = recipes.loads(trained_by, "its recipe") if trained_by else recipes.for_network(opened.origin)
    images = image_files.load(paths, shape_list[0], recipe.header.mean, recipe.header.std)
    said = f"{len(paths)} image{'s' if len(paths) > 1 else ''}, mean and deviation as in the recipe {recipe.name}"
    return _Inputs((images,), images, said, recipe.header.mean, recipe.header.std)


def _standings(others: Sequence[str], opened: result.Result, model: str | None) -> list[room.Standing]:
    """Further networks of the landscape; one that is for another data set is left out, and that is said."""
    found = []
    data = _data(opened.origin.arch)
    for other in others:
        looked, _ = targets.examined_beside(other, [model] if model else [])
        if data and (theirs := _data(looked.origin.arch)) not in (data, None):
            views.say(f"note: {other} is for {theirs}, not {data}: left out of the landscape")
            continue
        entry = costs.entry(looked)
        found.append(room.Standing(Path(other).name, "yours", entry.totals.ops_without_bn, entry.accuracy))
    return found


def _data(arch: str | None) -> str | None:
    return registry.ARCHS[arch].data if arch is not None and arch in registry.ARCHS else None


def _plots_folder(output: str | None, plots: str | None) -> Path | None:
    """Where drawings go, None where nobody says; before any work. Raises UsageError where it cannot be made."""
    if plots is not None:
        folder = Path(plots)
    elif output is not None and _is_plain(output):
        folder = Path(output).with_name(f"{Path(output).stem}-plots")
    else:
        return None
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is no folder, as drawings want it; --plots names another")
    if not folder.exists():
        writing.check_output(folder)
    return folder


def _write_plots(document: room.Document, folder: Path, output: str | None, *, force: bool) -> str | None:
    """Writes the drawings; the folder as the Markdown has to link to it, or None where there are none."""
    drawings = document.plots()
    if not drawings:
        return None
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be made a folder for the drawings ({error.strerror}); --plots names another"
        ) from None
    files = {folder / room.file_name(d): d for d in drawings}
    for file in files:
        writing.check_output(file, force=force)
    for file, drawing in files.items():
        data = drawing.png if isinstance(drawing, room.Picture) else drawing.file().encode()
        writing.atomic_write_bytes(file, data, force=force)
    views.say(f"wrote {counted(len(files), 'drawing')} into {folder}/")
    start = Path(output).parent if output is not None else Path(".")
    return Path(os.path.relpath(folder, start)).as_posix()


def _is_plain(output: str) -> bool:
    """A file, not a device or pipe, beside which nothing can be put."""
    return not Path(output).exists() or Path(output).is_file()
