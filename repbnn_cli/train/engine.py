"""The training loop: stages of a recipe, epochs, steps, states. Plain PyTorch, to be read from top to bottom.

Between two epochs the host reads nothing from the device but, every `log_every` steps, three sums. On the CPU, where
reading costs nothing, the loss is looked at in every step. On a GPU a whole step is one CUDA graph, and so is a batch
of the evaluation. BatchNorm sees one part of a batch at a time when gradients are accumulated, and the shares of all
processes together. A run killed at any moment and resumed ends with the bits of one that was never interrupted, on the
same CPU with as many threads: everything random is a function of the seed and the position, or is in the state.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repbnn_cli import seeds
from repbnn_cli.data import Dataset, ImageFolders
from repbnn_cli.errors import DivergedError, StoppedError, UsageError
from repbnn_cli.logits import logits_of
from repbnn_cli.runs import Progress
from repbnn_cli.train import backends, compiled, guards, health, measure, memory, recipes, state
from repbnn_cli.train.captured import Captured
from repbnn_cli.train.feeds import CONTIGUOUS, Feed, open_feed, takes_channels_last
from repbnn_cli.train.guards import Signals
from repbnn_cli.train.inheritance import Preparation
from repbnn_cli.train.norms import synchronised
from repbnn_cli.train.ranks import Ranks
from repbnn_cli.train.recipes import Recipe, Stage
from repbnn_cli.train.schedules import Binarization, LearningRate, learning_rate
from repbnn_cli.train.state import Position, Run
from repbnn_cli.train.steps import Step, averaged, copy_into, not_persistent, optimizer_for, put_back, restore

Forward = Callable[[Tensor], object]
Taken = Callable[[Tensor, Tensor], object]
Package = Callable[[dict[str, Tensor], dict[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Options:
    """How a run is computed and recorded; nothing of the method.

    compile: "auto", "on" or "off", see `compiled`. cuda_graph: on a GPU, record a step once and replay it (with several
    processes steps are never recorded). log_every: steps between progress reports, and between looks at the loss on a
    GPU. save_every: steps between states within an epoch, 0 for none; save_seconds: an epoch that ends sooner after the
    last state gets none, unless it is a stage's last or the best so far; keep: states that stay. workers: processes
    that decode images from folders. backend: torch, int8 or triton; gradients: exact or bf16; see backends.py.
    """

    channels_last: bool = True
    compile: str = "off"
    cuda_graph: bool = True
    eval_batch: int = 500
    log_every: int = 50
    save_every: int = 0
    save_seconds: float = 0.0
    keep: int = 2
    workers: int = 2
    backend: str = "torch"
    gradients: str = "exact"


@dataclass(frozen=True)
class Outcome:
    """What a run reached in its last stage. rows: of this process, as in metrics.jsonl; notes: for the user."""

    top1: float
    best_top1: float
    best_epoch: int
    run: Path
    best: Path
    last: Path
    rows: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


def finetune(
    network: nn.Module,
    dataset: Dataset | ImageFolders,
    recipe: Recipe,
    run_dir: str | Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: bool = False,
    teacher: nn.Module | None = None,
    prepare: Preparation | None = None,
    options: Options | None = None,
    package: Package | None = None,
    about: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    on_step: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Outcome:
    """Trains `network` in place by a recipe, from the weights it has, and writes the run's folder.

    resume: continue the run in run_dir; all arguments have to be those of its beginning. teacher: the network to
    distil from. prepare: what the weights go through before the first step; the accuracy after that, where they are
    inherited ones, is epoch 0 of the metrics.
    package: makes the payload of best.pt and last.pt from tensors and facts about them; default: the two side by side.
    about: what the run's record says of the network, plain values: name, arch, beta, target, sha256, source_top1.
    ranks: the processes that train together, each with the same arguments; rank 0 alone writes.

    Raises UsageError (arguments that do not fit each other, another run in run_dir), DivergedError,
    MemoryExceededError, and StoppedError after a signal to stop, once the state is saved.
    """
    options, device, ranks = options or Options(), torch.device(device), ranks or Ranks()
    recipes.check_data(recipe, dataset.name)
    networks = [part.to(device) for part in (network, teacher) if part is not None]
    sources = [prepare.plan.network.module.to(device)] if prepare is not None and prepare.plan is not None else []
    if options.channels_last and not takes_channels_last(dataset, device, *networks, *sources):
        options = replace(options, channels_last=False)
        if on_note is not None:
            on_note(CONTIGUOUS)
    feed = open_feed(dataset, recipe.header, seed=seed, device=device, channels_last=options.channels_last,
                     eval_batch=options.eval_batch, workers=options.workers, rank=ranks.rank,
                     world=ranks.size, report=on_note)  # fmt: skip
    for part in networks if options.channels_last else ():
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    outputs = guards.check(network, teacher, recipe, feed.example, len(dataset.classes))
    if outputs and on_note is not None:
        on_note(outputs)
    fingerprint = {
        "data": dataset.fingerprint,
        "recipe": recipe.text,
        "network": state.structure_of(network),
        "weights": state.weights_of(network),
        "teacher": None if teacher is None else state.weights_of(teacher),
        "seed": seed,
        "prepare": None if prepare is None else prepare.key(),
        "processes": ranks.size,
        **{name: getattr(options, name) for name in ("channels_last", "backend", "gradients")},
    }
    environment = {**guards.environment(dataset, device), "seed": seed, "options": asdict(options),
                   **state.record_of(recipe, about or {}, dataset.name, len(feed.train))}  # fmt: skip
    with ExitStack() as stack:
        run = Run(run_dir, keep=options.keep, resume=resume)
        ranks.on_first(lambda: stack.enter_context(run))
        stack.enter_context(seeds.kept([device] if device.type == "cuda" else []))
        stack.enter_context(synchronised(network, ranks))
        stack.enter_context(backends.running_on(network, options.backend, ranks, options.gradients))
        forward = compiled.forward_of(network, options.compile, feed, recipe, ranks.size)
        fingerprint["compiled"] = forward.compiled
        if on_note is not None:
            on_note(forward.note)
        signals = stack.enter_context(Signals(patient=ranks.size > 1))
        ranks.on_first(lambda: run.begin(fingerprint, recipe.text, environment))
        seeds.seed(seed + ranks.rank)
        facts = {"recipe": recipe.name, "recipe_text": recipe.text, "seed": seed, "data": dataset.name,
                 "data_fingerprint": dataset.fingerprint, "data_notes": list(dataset.notes)}  # fmt: skip
        trainer = _Trainer(network, forward.call, recipe, feed, run, fingerprint, options, device, ranks, signals,
                           teacher, package or (lambda tensors, about: {"state_dict": tensors, **about}), facts,
                           on_step, on_epoch)  # fmt: skip
        stored = ranks.on_first(lambda: run.latest(fingerprint)) if resume else None
        if stored is None:
            try:
                trainer.begin(prepare)
            except (UsageError, DivergedError):  # with other arguments it is another run
                ranks.on_first(run.withdraw)
                raise
        else:
            trainer.restore(stored)
        return trainer.train()


class _Trainer:
    """The run in memory. `at` is the position of the next step; what `save` writes is what `restore` reads."""

    def __init__(
        self, network: nn.Module, forward: Forward, recipe: Recipe, feed: Feed, run: Run,
        fingerprint: Mapping[str, Any], options: Options, device: torch.device, ranks: Ranks, signals: Signals,
        teacher: nn.Module | None, package: Package, facts: Mapping[str, Any],
        on_step: Callable[[Progress], None] | None, on_epoch: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:  # fmt: skip
        self.network, self.forward, self.recipe, self.feed, self.run = network, forward, recipe, feed, run
        self.fingerprint, self.options, self.device = fingerprint, options, device
        self.ranks, self.signals = ranks, signals
        self.teacher, self.package, self.facts = teacher, package, facts
        self.on_step, self.on_epoch = on_step, on_epoch
        self.captures = options.cuda_graph and device.type == "cuda" and ranks.size == 1
        self.convs = health.binary_convs(network)
        self.binarization = Binarization(recipe.header.binarization, network, device)
        self.lr = LearningRate(device)
        self.at, self.step = Position(0, 0, 0), 0
        self.saved_at = 0.0
        # loss · images, correct, images of the epoch so far, of this rank: on the device.
        self.totals = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.signs: dict[str, Tensor] = {}
        self.ema: dict[str, Tensor] = {}
        self.best: dict[str, Any] = {"top1": -1.0, "epoch": 0}
        self.last_top1 = math.nan
        self.optimizer_state: dict[Any, Any] = {}
        self.rows: list[Mapping[str, Any]] = []
        self.inherited: dict[str, Any] = {}

    # -- beginning and resuming ---------------------------------------------------------------------------------------

    def begin(self, prepare: Preparation | None) -> None:
        if prepare is not None:
            self.inherited = prepare(self.network, self.feed, self._stop_early)
        if prepare is not None and not prepare.fresh:
            with health.float_kernels(self.network, active=self.recipe.stages[0].kernels == "float"):
                result = self._evaluate(self.network)
            self.last_top1 = result.top1
            row = {"stage": self.recipe.stages[0].name, "epoch": 0, "step": 0, "test_loss": result.loss,
                   "test_top1": result.top1, "test_top5": result.top5}  # fmt: skip
            self._record(row, {})
        self.save()

    def restore(self, stored: Mapping[str, Any]) -> None:
        self.network.load_state_dict(stored["state_dict"])
        put_back(self.network, stored["buffers"])
        self.at, self.step = Position(*stored["position"]), stored["step"]
        self.signs = {path: sign.to(self.device) for path, sign in stored["signs"].items()}
        self.ema = {name: tensor.to(self.device) for name, tensor in stored["ema"].items()}
        self.totals.copy_(stored["totals"][self.ranks.rank])
        self.inherited = dict(stored["inherited"])
        self.best, self.last_top1 = dict(stored["best"]), stored["last_top1"]
        self.optimizer_state = stored["optimizer"]
        # Copies: a generator reads the storage behind a view from its beginning.
        torch.set_rng_state(stored["rng"][self.ranks.rank].clone())
        seeds.set_states(stored["rng_others"][self.ranks.rank])
        if self.device.type == "cuda" and stored["rng_device"] is not None:
            torch.cuda.set_rng_state(stored["rng_device"][self.ranks.rank].clone(), self.device)

    def save(self) -> Path:
        """Writes the state of this position; one that is not finite never takes a good one's place."""
        if not health.finite(self.network):
            raise self._diverged("weights are", self.feed.example)
        gather, cuda = self.ranks.gather, self.device.type == "cuda"
        each = {
            "totals": gather(self.totals),
            "rng": gather(torch.get_rng_state()),
            "rng_others": gather(seeds.states()),
            "rng_device": gather(torch.cuda.get_rng_state(self.device)) if cuda else None,
        }
        self.saved_at = time.perf_counter()
        content = {
            "state_dict": self.network.state_dict(), "optimizer": self.optimizer_state, "ema": self.ema,
            "signs": self.signs, "step": self.step, "best": self.best, "last_top1": self.last_top1,
            "inherited": self.inherited, "buffers": not_persistent(self.network), **each,
        }  # fmt: skip
        return self.ranks.on_first(lambda: self.run.save(self.at, content, self.fingerprint))

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        for index in range(self.at.stage, len(self.recipe.stages)):
            self._stage(self.recipe.stages[index])
        self._load_average()
        self.network.eval()
        last = self._publish("last.pt", self.last_top1, self.best["last_epoch"])
        best, top1, epoch = self.run.checkpoints / "best.pt", self.best["top1"], self.best["epoch"]
        notes = self.binarization.notes() + backends.notes(self.network, self.feed.example, self.options.backend)
        return Outcome(self.last_top1, top1, epoch, self.run.path, best, last, tuple(self.rows), tuple(notes))

    def _stage(self, stage: Stage) -> None:
        epochs = stage.length(len(self.feed.train))
        optimizer = optimizer_for(self.network, stage, self.lr.value)
        if self.optimizer_state:
            restore(optimizer, self.optimizer_state, self.lr.value)
        if stage.ema and not self.ema:
            self.ema = {name: tensor.detach().clone() for name, tensor in averaged(self.network).items()}
        watch = self._watch if self.device.type == "cpu" else None
        step = Step(self.network, stage, optimizer, self.totals, forward=self.forward, teacher=self.teacher,
                    ema=self.ema, ranks=self.ranks, watch=watch)  # fmt: skip
        taken = Captured(step) if self.captures else step
        tested = Captured(lambda images: logits_of(self.network(images))) if self.captures else self.network
        with health.float_kernels(self.network, active=stage.kernels == "float"):
            if (self.at.epoch, self.at.batch) == (0, 0):  # those of the kernels that this stage applies
                self.signs = health.signs(self.convs)
            for epoch in range(self.at.epoch, epochs):
                self._epoch(stage, step, taken, epoch, epochs)
                following = (self.at.stage, epoch + 1, 0) if epoch + 1 < epochs else (self.at.stage + 1, 0, 0)
                self._finish_epoch(stage, optimizer, tested, epoch, Position(*following))

    def _epoch(self, stage: Stage, step: Step, taken: Taken, epoch: int, epochs: int) -> None:
        """All steps from `at` to the end of the epoch; taken: the step, or its recording."""
        self.values = self.binarization.set(epoch, epochs)
        if self.at.batch == 0:
            self.totals.zero_()
            self.binarization.rotate()
        self.network.train()
        batches = self._batches(stage, epoch)
        earlier = sum(s.length(len(self.feed.train)) for s in self.recipe.stages[: self.at.stage])
        self.began, self.images = time.perf_counter(), 0
        if stage.unit == "epochs":
            self._set_lr(stage, epoch)
        elif self.at.batch:  # of the step before: there may be none to come
            self._set_lr(stage, epoch * len(self.feed.train) + self.at.batch - 1)
        for images, labels in self.feed.train.epoch(earlier + epoch, self.at.batch):
            if self.at.batch >= batches:  # a length in iterations ends within an epoch
                break
            if stage.unit == "iterations":
                self._set_lr(stage, epoch * len(self.feed.train) + self.at.batch)
            self._step(step, taken, images, labels)
            self.at = self.at._replace(batch=self.at.batch + 1)
            self.images += len(labels) * self.ranks.size
            if self.at.batch % self.options.log_every == 0 or self.at.batch == batches:
                self._look(Progress(stage.name, epoch + 1, epochs, self.at.batch, batches, 0, 0, 0))
            asked = bool(self.options.save_every) and self.at.batch % self.options.save_every == 0
            received = self._received()
            if received or (asked and self.at.batch < batches):
                self.optimizer_state = step.optimizer.state_dict()["state"]
                saved = self.save()
                if received:
                    raise self._stopped(received, saved)

    def _step(self, step: Step, taken: Taken, images: Tensor, labels: Tensor) -> None:
        if not memory.fits(lambda: taken(images, labels)):
            batch, accumulate = self.recipe.header.batch, step.stage.accumulate
            step.watch = None
            raise memory.step_too_large(step, images, labels, batch, accumulate, self.ranks.size, self._kept())
        self.step += 1

    def _look(self, where: Progress) -> None:
        """Reads the sums from the device: for whoever watches, and for NaN."""
        if self.on_step is None and self.device.type == "cpu" and self.ranks.size == 1:
            return
        loss, correct, count = self.ranks.sum(self.totals).tolist()
        if not math.isfinite(loss):
            raise self._diverged("the loss is", self.feed.example)
        if self.on_step is not None:
            rate = self.images / (time.perf_counter() - self.began)
            self.on_step(replace(where, loss=loss / count, top1=100 * correct / count, images_per_s=rate))

    def _finish_epoch(
        self, stage: Stage, optimizer: torch.optim.Optimizer, tested: Forward, epoch: int, following: Position
    ) -> None:
        """Metrics, best network, and the state of the next position, in this order."""
        loss, correct, count = self.ranks.sum(self.totals).tolist()
        seconds = time.perf_counter() - self.began
        if not math.isfinite(loss) or not health.finite(self.network):
            raise self._diverged("the loss or a weight is", self.feed.example)
        signs = health.signs(self.convs)
        with self._average():
            result = self._evaluate(tested)
        better = self.at.stage != self.best.get("stage") or result.top1 > self.best["top1"]
        if better:
            self.best = {"top1": result.top1, "epoch": epoch + 1, "stage": self.at.stage}
            with self._average():
                self._publish("best.pt", result.top1, epoch + 1)
        self.best["last_epoch"], self.last_top1 = epoch + 1, result.top1
        row = {
            "stage": stage.name, "epoch": epoch + 1, "step": self.step, "lr": self.lr.current, **self.values,
            "loss": loss / count, "train_top1": 100 * correct / count, "test_loss": result.loss,
            "test_top1": result.top1, "test_top5": result.top5, "best_top1": self.best["top1"],
            "flips": health.flips(self.signs, signs), "dead": health.dead(self.convs),
        }  # fmt: skip
        rate = self.images / seconds if self.images else None
        self._record(row, {"stage": stage.name, "epoch": epoch + 1, "seconds": seconds, "images_per_s": rate})
        self.at, self.signs = following, signs
        if following.epoch == 0:  # the next stage starts its optimiser and its average anew
            self._load_average()
            self.ema, self.optimizer_state = {}, {}
        else:
            self.optimizer_state = optimizer.state_dict()["state"]
        received = self._received()
        # A better network is in best.pt by now, and a state that knows of it has to follow.
        due = better or following.epoch == 0 or time.perf_counter() - self.saved_at >= self.options.save_seconds
        if received or self.ranks.largest(due):
            saved = self.save()
            if received:
                raise self._stopped(received, saved)

    def _evaluate(self, forward: Forward) -> measure.Evaluation:
        found: list[measure.Evaluation] = []

        def measured() -> None:
            found.append(measure.evaluate(self.network, self.feed.test(), forward=forward, ranks=self.ranks))

        if memory.fits(measured):
            return found[0]
        raise memory.evaluation_too_large(self.network, next(iter(self.feed.test()))[0], self._kept())

    # -- parts --------------------------------------------------------------------------------------------------------

    def _batches(self, stage: Stage, epoch: int) -> int:
        batches = len(self.feed.train)
        return batches if stage.unit == "epochs" else min(batches, stage.iterations - epoch * batches)

    def _set_lr(self, stage: Stage, position: int) -> None:
        made = stage.schedule
        self.lr.set(learning_rate(made.name, position, stage.total, lr=stage.optimizer.lr, warmup=made.warmup,
                                  milestones=made.milestones, factor=made.factor))  # fmt: skip

    @contextmanager
    def _average(self) -> Iterator[None]:
        """Meanwhile the network has its averaged weights, where the stage keeps an average."""
        kept = {name: tensor.detach().clone() for name, tensor in averaged(self.network).items()} if self.ema else {}
        self._load_average()
        try:
            yield
        finally:
            copy_into(self.network, kept)

    def _load_average(self) -> None:
        copy_into(self.network, self.ema)

    def _publish(self, name: str, top1: float, epoch: int) -> Path:
        stage = self._present
        about = {
            **self.facts, "inherited": self.inherited, "top1": top1, "epoch": epoch,
            "epochs": stage.length(len(self.feed.train)), "stage": stage.name, "kernels": stage.kernels,
        }  # fmt: skip
        return self.ranks.on_first(lambda: self.run.publish(name, self.package(self.network.state_dict(), about)))

    def _record(self, row: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        self.ranks.on_first(lambda: self.run.record(row, timing))
        self.rows.append(row)
        if self.on_epoch is not None:
            self.on_epoch({**row, **{k: v for k, v in timing.items() if k not in row}})

    @property
    def _present(self) -> Stage:
        return self.recipe.stages[min(self.at.stage, len(self.recipe.stages) - 1)]

    # -- stopping -----------------------------------------------------------------------------------------------------

    def _received(self) -> int:
        """The signal that asks this run, or any rank of it, to stop, or 0. Several GPUs ask each other now and then."""
        if self.ranks.size > 1 and self.device.type == "cuda" and self.at.batch % self.options.log_every:
            return 0
        return self.ranks.largest(self.signals.received)

    def _stopped(self, number: int, saved: Path) -> StoppedError:
        where = f"after step {self.step}; saved {saved}; the same command with --resume continues"
        return StoppedError(f"stopped by {signal.Signals(number).name} {where}", number)

    def _stop_early(self) -> None:
        if number := self._received():
            where = "before the first step; with --resume the command begins"
            raise StoppedError(f"stopped by {signal.Signals(number).name} {where}", number)

    def _watch(self, loss: Tensor, images: Tensor) -> None:
        if self.ranks.largest(not torch.isfinite(loss)):
            raise self._diverged("the loss is", images)

    def _diverged(self, what: str, images: Tensor) -> DivergedError:
        layer = health.first_not_finite(self.network, images) or "the loss alone (is a teacher's output finite?)"
        where = f"stage {self._present.name}, epoch {self.at.epoch + 1}, step {self.step + 1}"
        return DivergedError(f"{where}: {what} not finite; first in {layer}; {self._kept()}; try a lower optimizer.lr")

    def _kept(self) -> str:
        states = self.run.states()
        return f"the last good state is {states[-1]}" if states else "nothing was saved yet"
