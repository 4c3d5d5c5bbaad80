"""What the training commands do: finetune, calibrate, evaluate, data, recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from repbnn_cli import result, runs, seeds, views, writing
from repbnn_cli.commands import pupils, targets
from repbnn_cli.commands.pupils import Pupil
from repbnn_cli.data import Dataset, ImageFolders, data_folder
from repbnn_cli.data.download import download
from repbnn_cli.data.imagenet import Damages
from repbnn_cli.deploy import agreement
from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import choose
from repbnn_cli.logits import checked_logits
from repbnn_cli.rep_layers import RepMixin
from repbnn_cli.train import backends, compiled, engine, feeds, measure, memory, recipes
from repbnn_cli.train.inheritance import APART, LATENTS, Preparation, spreadable
from repbnn_cli.train.ranks import joined
from repbnn_cli.train.recipes import Recipe
from repbnn_cli.train.scalars import scalars
from repbnn_cli.views import kernel_views, run_views

_SHORT = 10  # a run of a tenth of its recipe's length, or less, is short


def finetune(
    target: str | None, *, data: str | None, recipe: str | None, epochs: int | None, sets: list[str], stages: list[str],
    seed: int, device: str, run_dir: str | None, resume: bool, distill: float | None, teacher: str | None,
    teacher_arch: str | None, teacher_model: str | None, calibrate: int | None, fit: int | None, spread: float | None,
    latents: float | None, origin: Mapping[str, Any], save_every: int, eval_batch: int, workers: int, cuda_graph: bool,
    backend: str, gradients: str, compile_mode: str, tensorboard: bool, output: str | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train a result, a trained checkpoint, or a zoo network from scratch, by a recipe. origin: see `pupils.load`."""
    targets.check_output(output, force=force)
    # What cannot run is said before anything is loaded.
    _check_latents(latents)
    backends.choose(pupils.device_of(device), backend, gradients)
    compiled.check_mode(compile_mode)
    pupils.check_once(sets, {"epochs": epochs, "distillation.weight": distill})
    pupils.check_run(target, run_dir, resume=resume)
    pupils.check_asked(data, recipe, sets, own=origin["model"] is not None)
    seeds.seed(seed)
    pupil = pupils.load(target, **origin)
    if pupil.packed is not None:
        raise UsageError(f"{target}: is a packed network, whose latent weights are gone; train the result it came from")
    if not pupil.inherited and (calibrate or fit or latents is not None):
        option = "--calibrate" if calibrate else "--fit" if fit else "--latents"
        raise UsageError(f"{option}: is for weights that `repbnn transform` inherited; {pupil.name} has none")
    calibrate, fit = 50 if calibrate is None else calibrate, Preparation.fit if fit is None else fit
    if output is not None and Path(output).suffix == ".safetensors" and pupil.opened is None:
        raise UsageError(f"-o {output}: a network that is no RepBNN is written by torch.save; name it .pth")
    weight = [f"distillation.weight={distill}"] if distill is not None else []
    chosen = _recipe(pupil, recipe, epochs=epochs, sets=[*sets, *weight], stages=stages, spread=bool(spread))
    lesson = pupils.teacher_of(pupil, chosen, file=teacher, arch=teacher_arch, model=teacher_model, distill=distill)
    folder = Path(run_dir) if run_dir else Path("runs") / f"{pupil.name}-{chosen.name}-seed{seed}"
    (runs.check_resumable if resume else runs.check_free)(folder)
    prepare = _spreading(pupil, spread) if spread and not pupil.inherited else None
    with ExitStack() as stack:
        ranks, place = stack.enter_context(joined(pupils.device_of(device)))
        memory.keep_freed(place)
        running = backends.choose(place, backend, gradients)
        backends.check(pupil.network, backend, gradients)
        views.say(*backends.lines(pupil.network, running, ranks))
        if pupil.inherited and (calibrate or fit or spread or latents is not None):
            prepare = _preparation(
                pupil, batches=calibrate, fit=fit, spread=spread, latents=latents, alone=ranks.size == 1
            )
        with ranks.first_before_others():
            dataset = pupils.dataset(data, pupil.origin)
        views.say(*run_views.stage_lines([(s.name, s.total, s.unit, s.kernels, s.hands_over) for s in chosen.stages]))
        lengths = {stage.name: stage.epochs for stage in chosen.stages}
        watcher = run_views.watcher(lengths) if ranks.first else None
        stack.enter_context(watcher or nullcontext())
        log = stack.enter_context(scalars(folder / "tensorboard")) if tensorboard and ranks.first else None
        outcome = engine.finetune(
            pupil.network, dataset, chosen, folder, seed=seed, device=place, resume=resume, teacher=lesson, ranks=ranks,
            prepare=prepare, package=pupil.package(),
            about=pupil.facts() | ({"spread": prepare.spread} if prepare and prepare.spread else {}),
            options=engine.Options(
                save_every=save_every, workers=workers, eval_batch=eval_batch, cuda_graph=cuda_graph,
                backend=running.name, gradients=gradients, compile=compile_mode,
                log_every=10 if place.type == "cpu" else 50, save_seconds=0 if place.type == "cpu" else 10,
            ),
            on_step=watcher.step if watcher else None,
            on_epoch=(lambda row: _each(row, watcher.epoch, log)) if watcher else None,
            on_note=views.say if ranks.first else None,
        )  # fmt: skip
    if ranks.first:
        _deliver(pupil, outcome, dataset, output, force=force, as_json=as_json)


def _recipe(
    pupil: Pupil, named: str | None, *, epochs: int | None, sets: list[str], stages: list[str], spread: bool
) -> Recipe:
    """The recipe named, else the network's default, which is then said; with what the command line changes."""
    chosen = recipes.load(named, pupil.origin.arch) if named else recipes.for_network(pupil.origin)
    if named is None:
        views.say(f"recipe {chosen.name}: {chosen.header.summary}")
    first = chosen.stages[0].name
    chosen = recipes.override(chosen, sets)
    if stages:
        chosen = recipes.with_stages(chosen, stages)
        begins = chosen.stages[0].name
        if pupil.fresh and begins != first:
            views.say(f"note: stage {begins} begins with fresh weights; the recipe hands it those of stage {first}")
    if epochs is None:
        return chosen
    stage = chosen.stages[0]
    rate_given = any(change.partition("=")[0].endswith("optimizer.lr") for change in sets)
    short = stage.unit == "epochs" and stage.total >= _SHORT * epochs and not pupil.trained
    learned = pupil.inherited or bool(pupil.prepared)  # fresh kernels may have been fitted to the source, too
    if short and pupil.beta is not None and not learned and not spread:
        views.say("tip: a RepBNN learns slowly from scratch at first; a short run gains from --spread 0.75")
    if short and learned and not rate_given:
        rate = stage.optimizer.lr
        views.say(
            f"tip: lr {rate:g} is made for {stage.total} {stage.unit} from scratch; a short run keeps more of what was "
            f"inherited with less, e.g. --set optimizer.lr={rate / 3:.1g}"
        )
    return recipes.with_epochs(chosen, epochs)


def _each(row: Mapping[str, Any], *receivers: Callable[[Mapping[str, Any]], None] | None) -> None:
    for receive in receivers:
        if receive is not None:
            receive(row)


def _deliver(
    pupil: Pupil, outcome: engine.Outcome, dataset: Dataset | ImageFolders, output: str | None, *, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """What a run reached, stage by stage, beside what is published, and where its networks are."""
    record = runs.read(outcome.run)
    if output is not None:
        payload = torch.load(outcome.best, weights_only=True)
        (result.save if pupil.opened else writing.save)(payload, output, force=force)
        views.say(*views.left_out_lines(output, payload))
    best = output or str(outcome.best)
    began = next((row["test_top1"] for row in record.rows if not row["epoch"]), 0.0)
    behind = [f"the run began with {began:.2f} %, which no epoch reached"] if began > outcome.best_top1 else []
    notes = [*dataset.notes, *outcome.notes, *behind, *run_views.distance_lines(record.reached)]
    if as_json:
        views.print_json({
            "top1": outcome.top1, "best_top1": outcome.best_top1, "best_epoch": outcome.best_epoch,
            "run": str(outcome.run), "best": best, "last": str(outcome.last), "notes": notes,
            "stages": [asdict(stage) for stage in record.reached],
        })  # fmt: skip
        return
    reached = f"top-1 {outcome.top1:.2f} %, best {outcome.best_top1:.2f} % (epoch {outcome.best_epoch})"
    views.console().print(f"{reached}\n{best}", soft_wrap=True)
    views.say(*(f"note: {n}" for n in notes),
              run_views.next_line(best, pupil.origin, rep=pupil.opened is not None))  # fmt: skip


def evaluate(
    target: str | None, *, data: str | None, recipe: str | None, device: str, backend: str, compile_mode: str,
    origin: Mapping[str, Any], as_json: bool,
) -> None:  # fmt: skip
    """Accuracy and loss on the test images, on fused kernels where a backend has them. origin: see `pupils.load`."""
    where = pupils.device_of(device)
    compiled.check_mode(compile_mode)
    memory.keep_freed(where)
    # int8 is not what auto means here: it rounds scaled sums once, torch many times, and published logits are torch's.
    chosen = choose(where) if backend == "auto" else backends.choose(where, backend)
    pupils.check_asked(data, recipe, own=origin["model"] is not None)
    pupil = pupils.load(target, **origin)
    if pupil.fresh:
        raise UsageError(f"{target}: a zoo name has no trained weights to evaluate; name a checkpoint or a result")
    if chosen.name == "int8":
        backends.check(pupil.network, backend)
    dataset = pupils.dataset(data, pupil.origin)
    if result.has_float_kernels(pupil.training):
        views.say(
            "note: was trained with float kernels so far; with its binary ones, measured here, it knows nothing yet"
        )
    pupil.network.to(where)
    fused = agreement.checked(*pupil.captured(), chosen) if chosen.name == "triton" else None
    views.say(*kernel_views.backend_lines(chosen, fused))
    if fused is not None:
        pupil = replace(pupil, network=fused.counting())
    with backends.evaluating_in_8_bits(pupil.network) if chosen.name == "int8" else nullcontext():
        found = _measured(pupil, pupils.recipe_of(pupil, recipe), dataset, where, compile_mode=compile_mode)
    if fused is not None:
        views.say(kernel_views.zero_line(fused))
    _show_evaluation(pupil.name, dataset, found, as_json=as_json, backend=kernel_views.plain_blocks(chosen, fused))


def calibrate(
    target: str | None, *, data: str | None, recipe: str | None, batches: int, fit: int, spread: float | None,
    latents: float | None, images: int | None, device: str, output: str | None, force: bool, model: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Fit a fresh result to its source, re-estimate its BatchNorm statistics on training images, and write it again."""
    _check_latents(latents)
    path = Path(targets.result_or_newest(target))
    place = Path(output) if output else _calibrated(path)
    writing.check_output(place, force=force)
    where = pupils.device_of(device)
    pupils.check_asked(data, recipe, own=model is not None)
    pupil = pupils.load(str(path), model=model)
    if pupil.opened is None:
        raise UsageError(f"{path}: is not a result of `repbnn transform`; only results are calibrated")
    if fit and not pupil.trained and not pupil.opened.payload["source_tensors"]:
        raise UsageError(f"{path}: holds no source network to fit to (--slim); --fit 0 does without")
    prepare = _preparation(pupil, batches=batches, fit=fit, spread=spread, latents=latents, images=images)
    dataset = pupils.dataset(data, pupil.origin)
    chosen = pupils.recipe_of(pupil, recipe)
    memory.keep_freed(where)
    networks = [pupil.network.to(where), *([prepare.plan.network.module.to(where)] if prepare.plan else [])]
    last = feeds.takes_channels_last(dataset, where, *networks)
    batch = min(chosen.header.batch, len(dataset.train))  # of a recipe for training, and nothing is trained here
    header = chosen.header.model_copy(update={"batch": batch})
    feed = feeds.open_feed(dataset, header, seed=0, device=where, channels_last=last, report=views.say)
    if not last:
        views.say(feeds.CONTIGUOUS)
    with torch.no_grad():  # what does not fit the data is said before minutes of fitting
        checked_logits(pupil.network.eval(), feed.example, len(dataset.classes))
    inherited = prepare(pupil.network, feed)
    found = _measured(pupil, chosen, dataset, where)
    tensors = {n: t.cpu() for n, t in pupil.network.state_dict().items()}
    earlier = pupil.training
    now = {"recipe_text": chosen.text, "data": dataset.name, "data_fingerprint": dataset.fingerprint}
    about = {
        **({**now, **earlier} if pupil.trained else {**earlier, **now}),  # what it was trained on stays
        "inherited": {**pupil.prepared, **inherited}, "top1": found.top1,
        "data_notes": list(dict.fromkeys((*earlier.get("data_notes", []), *dataset.notes))),
    }  # fmt: skip
    if pupil.trained:
        about |= {"measured": {"data": dataset.name, "recipe": chosen.name}, "kernels": "binary"}
    result.save(result.with_tensors(pupil.opened.payload, tensors, about), place, force=force)
    views.say(*views.left_out_lines(place, pupil.opened.payload))
    _show_evaluation(pupil.name, dataset, found, as_json=as_json)
    seen = inherited["calibrated_batches"]
    views.say((f"BatchNorm estimated anew on {seen} batches; " if seen else "") + f"wrote {place}")


def _check_latents(latents: float | None) -> None:
    if latents is not None and not 0 < latents < float("inf"):
        raise UsageError(f"--latents {latents:g}: expected a factor above 0, such as 0.5; 1 leaves the kernels")


def _spreading(pupil: Pupil, spread: float) -> Preparation:
    """`--spread`, and how much of the network it reaches. Raises UsageError where it has no place."""
    if pupil.beta is None or pupil.trained:
        raise UsageError(f"--spread: is for a RepBNN as `repbnn transform` made it, not {pupil.name}")
    assert isinstance(pupil.network, fx.GraphModule)
    convs = sum(isinstance(m, RepMixin) for m in pupil.network.modules())
    views.say(run_views.spread_line(spread, len(spreadable(pupil.network)), convs))
    return Preparation(0, spread=spread)


def _preparation(
    pupil: Pupil, *, batches: int, fit: int, spread: float | None, latents: float | None,
    images: int | None = None, alone: bool = True,
) -> Preparation:  # fmt: skip
    """What the weights of a result still have to go through, and why less than asked for; alone: in one process.

    spread, latents, images: None for a fit's own, where there is one. Raises UsageError where they are asked for
    without it.
    """
    assert pupil.opened is not None
    reason = None
    if pupil.trained:
        reason = "this network was trained since its transform"
    elif pupil.prepared.get("fit_steps"):
        reason = "this network was fitted before"
    elif not alone:
        reason = "several processes would each fit their own; `repbnn calibrate` first does it in one"
    elif not pupil.opened.payload["source_tensors"]:
        reason = "the file holds no source network (--slim)"
    elif pupil.opened.payload["source"]["sha256"] is None:
        reason = "its source has no trained weights"
    elif any(p.dtype == torch.float16 for p in pupil.network.parameters()):
        reason = "its weights are in float16, too coarse for the steps of a fit"
    asked = {"--spread": spread or None, "--latents": latents, "--images": images}
    option = next((name for name, value in asked.items() if value is not None), None)
    if option is not None and (reason is not None or not fit):
        why = reason or "--fit 0 leaves that out"
        raise UsageError(f"{option}: of inherited weights it is a part of the fit to the source network, but {why}")
    if fit and reason is not None:
        views.say(f"not fitted to the source network: {reason}")
    plan = pupil.opened.plan if fit and reason is None else None
    quantised = plan is not None and any(layer.activation_bits < 32 for layer in plan.layers.values())
    if spread and not quantised:
        raise UsageError("--spread: no layer of this network quantises what it takes, so it has no thresholds to part")
    width = (APART if quantised else 0.0) if spread is None else spread
    return Preparation(
        batches, plan, fit, images or Preparation.images, width, LATENTS if latents is None else latents,
        on_note=views.say, on_unit=lambda u: views.say(run_views.fitted_line(u.path, u.before, u.after)),
    )  # fmt: skip


def _calibrated(path: Path) -> Path:
    """NAME-calibrated.repbnn.pt for NAME.repbnn.pt, best-calibrated.pt for best.pt."""
    stem, dot, ending = path.name.partition(".repbnn")
    return path.with_name(f"{stem}-calibrated{dot}{ending}" if dot else f"{path.stem}-calibrated{path.suffix}")


def fetch_data(name: str, *, folder: str | None, url: str | None) -> None:
    """Download a data set, resuming and checking it."""
    with run_views.transfer(name) as progress:
        place = download(name, Path(folder) if folder else data_folder(), url=url, progress=progress)
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
    views.print_text(recipes.load(name).text)


def recipes_check(name: str) -> None:
    """Whether a recipe file is valid."""
    loaded = recipes.load(name)
    views.say(f"{name}: valid, {len(loaded.stages)} stage(s)")


def _measured(
    pupil: Pupil, recipe: Recipe, dataset: Dataset | ImageFolders, device: torch.device, *, compile_mode: str = "off"
) -> measure.Evaluation:
    network = pupil.network.to(device).eval()
    last = feeds.takes_channels_last(dataset, device, network)
    images = feeds.eval_images(dataset, recipe.header, device=device, channels_last=last, damages=Damages(views.say))
    if compile_mode == "off":
        return measure.evaluate(network, images(), classes=len(dataset.classes))
    forward = compiled.inference_of(network, compile_mode, next(iter(images()))[0], len(dataset.test))
    views.say(forward.note)
    return measure.evaluate(network, images(), forward=forward.call, classes=len(dataset.classes))


def _show_evaluation(
    name: str, dataset: Dataset | ImageFolders, found: measure.Evaluation, *, as_json: bool,
    backend: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    if as_json:
        views.print_json({"network": name, "data": dataset.name, "top1": found.top1, "top5": found.top5,
                          "loss": found.loss, "images": found.images, "notes": list(dataset.notes)}
                         | ({"backend": backend} if backend else {}))  # fmt: skip
        return
    views.console().print(
        f"{name} on {dataset.name}: top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f}, "
        f"{found.images:,} images",
        soft_wrap=True,
    )
