"""What the training commands do: finetune, calibrate, evaluate, data, recipes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repbnn_cli import checkpoint, result, source, views
from repbnn_cli import zoo as registry
from repbnn_cli.errors import UsageError
from repbnn_cli.runs import Progress
from repbnn_cli.source import Origin
from repbnn_cli.train import engine, feeds, measure, recipes
from repbnn_cli.train.data import Dataset, ImageFolders, data_folder, open_data
from repbnn_cli.train.download import download
from repbnn_cli.train.recipes import Recipe


@dataclass(frozen=True)
class Pupil:
    """A network to train or measure. opened: the result file it came from; name: for folders and messages.

    trained_by: the text of the recipe that its weights come from, where the file holds it. target: as it was named;
    sha256: of that file; source_top1: what the source checkpoint states, in percent.
    """

    name: str
    network: nn.Module
    origin: Origin
    opened: result.Result | None = None
    trained_by: str | None = None
    target: str | None = None
    sha256: str | None = None
    source_top1: float | None = None

    @property
    def beta(self) -> int | None:
        return self.opened.payload["options"]["beta"] if self.opened else None

    @property
    def inherited(self) -> bool:
        """Whether weights were carried over by a transform, so that BatchNorm statistics do not fit them."""
        return self.opened is not None and self.opened.payload["options"]["inherit"] != "none"

    def facts(self) -> dict[str, Any]:
        """What a run's record says of it: `engine.finetune`'s about."""
        return {"name": self.name, "arch": self.origin.arch, "model": self.origin.model, "beta": self.beta,
                "target": self.target, "sha256": self.sha256, "source_top1": self.source_top1}  # fmt: skip


def finetune(
    target: str | None, *, data: str | None, recipe: str | None, epochs: int | None, sets: list[str], seed: int,
    device: str, run_dir: str | None, resume: bool, distill: float, calibrate: int, arch: str | None, model: str | None,
    save_every: int, workers: int, as_json: bool,
) -> None:  # fmt: skip
    """Train a result, a trained checkpoint, or a zoo network from scratch, by a recipe."""
    torch.manual_seed(seed)
    pupil = _pupil(target, arch=arch, model=model)
    chosen = recipes.load(recipe, pupil.origin.arch) if recipe else recipes.for_network(pupil.origin)
    if recipe is None:
        views.say(f"recipe {chosen.name}: {chosen.header.summary}")
    if distill:
        if pupil.opened is None or not pupil.opened.payload["source_tensors"]:
            raise UsageError("--distill: the teacher is the source network in a result file (one not made with --slim)")
        sets = [*sets, f"distillation.weight={distill}"]
    chosen = recipes.override(chosen, sets)
    dataset = _data(data, pupil.origin)
    folder = Path(run_dir) if run_dir else Path("runs") / f"{pupil.name}-{chosen.name}-seed{seed}"
    opened = pupil.opened
    outcome = engine.finetune(
        pupil.network, dataset, chosen, folder, epochs=epochs, seed=seed, device=device, resume=resume,
        teacher=opened.network.module if opened and distill else None,
        calibrate=calibrate if pupil.inherited else 0,
        options=engine.Options(save_every=save_every, workers=workers),
        package=(lambda tensors, about: result.with_tensors(opened.payload, tensors, about)) if opened else None,
        about=pupil.facts(), on_step=_progress(), on_epoch=_epoch_line,
    )  # fmt: skip
    distance = recipes.distance(chosen.stages[-1], pupil.origin.arch, pupil.beta, outcome.best_top1)
    notes = [*dataset.notes, *outcome.notes, *([distance] if distance else [])]
    if as_json:
        views.print_json({"top1": outcome.top1, "best_top1": outcome.best_top1, "best_epoch": outcome.best_epoch,
                          "run": str(outcome.run), "best": str(outcome.best), "last": str(outcome.last),
                          "notes": notes})  # fmt: skip
        return
    views.console().print(
        f"top-1 {outcome.top1:.2f} %, best {outcome.best_top1:.2f} % (epoch {outcome.best_epoch})\n{outcome.best}"
    )
    views.say(*(f"note: {n}" for n in notes))


def evaluate(
    target: str | None,
    *,
    data: str | None,
    recipe: str | None,
    device: str,
    arch: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Accuracy and loss on the test images."""
    pupil = _pupil(target, arch=arch, model=model)
    if pupil.opened is None and target in registry.ARCHS:
        raise UsageError(f"{target}: a zoo name has no trained weights to evaluate; name a checkpoint or a result")
    dataset = _data(data, pupil.origin)
    found = _measured(pupil, _recipe(pupil, recipe), dataset, device)
    _show_evaluation(pupil.name, dataset, found, as_json=as_json)


def calibrate(
    target: str | None, *, data: str | None, recipe: str | None, batches: int, device: str, output: str | None,
    force: bool, model: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Re-estimate the BatchNorm statistics of a result on training images, and write it again."""
    path = Path(target) if target else result.newest()
    place = Path(output) if output else path.with_name(path.name.replace(".repbnn", "-calibrated.repbnn"))
    if place == path and not force:
        raise UsageError(f"{path}: would be replaced; give --force, or another file with -o")
    checkpoint.check_output(place, force=force)
    pupil = _pupil(str(path), arch=None, model=model)
    if pupil.opened is None:
        raise UsageError(f"{path}: is not a result of `repbnn transform`; only results are calibrated")
    dataset = _data(data, pupil.origin)
    chosen = _recipe(pupil, recipe)
    feed = feeds.open_feed(dataset, chosen.header, seed=0, device=torch.device(device))
    pupil.network.to(device)
    used = measure.calibrate(pupil.network, feed.train.epoch(0), batches)
    found = _measured(pupil, chosen, dataset, device)
    tensors = {n: t.cpu() for n, t in pupil.network.state_dict().items()}
    about = {"calibrated_batches": used, "data": dataset.name, "data_fingerprint": dataset.fingerprint,
             "data_notes": list(dataset.notes), "top1": found.top1}  # fmt: skip
    result.save(result.with_tensors(pupil.opened.payload, tensors, about), place, force=force)
    _show_evaluation(pupil.name, dataset, found, as_json=as_json)
    views.say(f"BatchNorm estimated anew on {used} batches; wrote {place}")


def fetch_data(name: str, *, folder: str | None, url: str | None) -> None:
    """Download a data set, resuming and checking it."""
    place = download(name, Path(folder) if folder else data_folder(), url=url)
    views.say(f"{name}: in {place}; use it with --data {name}:{place}")


def recipes_list(*, as_json: bool) -> None:
    """The shipped recipes with their summaries."""
    found = recipes.names()
    if as_json:
        views.print_json([{"name": n, "summary": s} for n, s in found.items()])
        return
    made = views.table("recipe", "summary")
    for name, summary in found.items():
        made.add_row(name, summary)
    views.console().print(made)


def recipes_show(name: str) -> None:
    """A recipe, resolved."""
    print(recipes.load(name).text, end="")


def recipes_check(name: str) -> None:
    """Whether a recipe file is valid."""
    loaded = recipes.load(name)
    views.say(f"{name}: valid, {len(loaded.stages)} stage(s)")


def _pupil(target: str | None, *, arch: str | None, model: str | None) -> Pupil:
    if target is None:
        target = str(result.newest())
        views.say(f"newest result: {target}")
    path = Path(target)
    if not path.exists():
        if target not in registry.ARCHS:
            registry.build(target)  # says which names are near
        origin = Origin(target, None, {}, None, (registry.ARCHS[target].input_shape,))
        return Pupil(target, registry.build(target), origin, target=target)
    name = path.name.split(".")[0]
    if result.is_result(path):
        opened = result.open_result(path, model)
        payload = opened.payload
        stated = (payload["source"]["accuracy"] or {}).get("top1")
        return Pupil(name, opened.module, opened.origin, opened, payload.get("training", {}).get("recipe_text"),
                     target, payload["sha256"], stated)  # fmt: skip
    src = source.from_checkpoint(target, arch=arch, model=model)
    trained_by = src.file.metadata.get("recipe_text") if src.file else None
    known = src.file.accuracy if src.file else None
    return Pupil(name, src.model, src.origin, trained_by=trained_by if isinstance(trained_by, str) else None,
                 target=target, sha256=src.file.sha256 if src.file else None,
                 source_top1=known.percent if known else None)  # fmt: skip


def _data(spec: str | None, origin: Origin) -> Dataset | ImageFolders:
    """The data named, else CIFAR-10 where the network is made for it."""
    if spec is None and origin.arch and registry.ARCHS[origin.arch].data == "CIFAR-10":
        spec = "cifar10"
    if spec is None:
        raise UsageError("--data: name the data, e.g. cifar10:DIR, cifar100:DIR, imagenet:DIR, folder:DIR or digits")
    found = open_data(spec)
    views.say(*(f"note: {n}" for n in found.notes))
    return found


def _recipe(pupil: Pupil, named: str | None) -> Recipe:
    """Whose preprocessing to measure with: the recipe named, else the one it was trained by, else its default."""
    if named is not None:
        return recipes.load(named, pupil.origin.arch)
    if pupil.trained_by is not None:
        return recipes.loads(pupil.trained_by, f"{pupil.name}'s recipe")
    return recipes.for_network(pupil.origin)


def _measured(pupil: Pupil, recipe: Recipe, dataset: Dataset | ImageFolders, device: str) -> measure.Evaluation:
    header = recipe.header
    if isinstance(dataset, Dataset):
        header = header.model_copy(update={"augmentation": "none"})
    images = feeds.eval_images(dataset, header, device=torch.device(device))
    return measure.evaluate(pupil.network.to(device), images())


def _show_evaluation(name: str, dataset: Dataset | ImageFolders, found: measure.Evaluation, *, as_json: bool) -> None:
    if as_json:
        views.print_json({"network": name, "data": dataset.name, "top1": found.top1, "top5": found.top5,
                          "loss": found.loss, "images": found.images, "notes": list(dataset.notes)})  # fmt: skip
        return
    views.console().print(
        f"{name} on {dataset.name}: top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f}, "
        f"{found.images:,} images"
    )


def _progress() -> Callable[[Progress], None] | None:
    """One line that rewrites itself on a terminal; elsewhere the epochs' lines are enough."""
    if not sys.stderr.isatty():
        return None

    def show(p: Progress) -> None:
        seconds = round((p.batches - p.batch) * elapsed() / max(1, p.batch))
        where = f"{p.stage} epoch {p.epoch}/{p.epochs} batch {p.batch}/{p.batches}"
        state = f"loss {p.loss:.3f}  top-1 {p.top1:.1f} %  {p.images_per_s:.0f} images/s  epoch ends in {seconds} s"
        print(f"\r{where}  {state}  ", end="", file=sys.stderr, flush=True)
        if p.batch == p.batches:
            started[0] = time.perf_counter()

    started = [time.perf_counter()]

    def elapsed() -> float:
        return time.perf_counter() - started[0]

    return show


def _epoch_line(row: Mapping[str, Any]) -> None:
    shown = ("stage", "epoch", "train_loss", "train_top1", "test_top1", "lr", "images_per_s")
    parts = [f"{k} {row[k]:.4g}" if isinstance(row[k], float) else f"{k} {row[k]}" for k in shown if k in row]
    views.say(("\r" if sys.stderr.isatty() else "") + "  ".join(parts))
