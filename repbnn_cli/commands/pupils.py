"""What the training commands name: a network to train or measure, its teacher, its data, its recipe, a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repbnn_cli import result, runs, source, views
from repbnn_cli import zoo as registry
from repbnn_cli.commands import targets
from repbnn_cli.data import Dataset, ImageFolders, check_there, open_data
from repbnn_cli.deploy import packed
from repbnn_cli.errors import CheckpointError, UsageError
from repbnn_cli.graph import Network
from repbnn_cli.profiler import shapes
from repbnn_cli.recognize import Layer, recognize
from repbnn_cli.source import Origin
from repbnn_cli.train import engine, recipes
from repbnn_cli.train.recipes import Recipe

_NO_DATA = "--data: name the data, e.g. cifar10:DIR, cifar100:DIR, imagenet:DIR, folder:DIR or digits"


@dataclass(frozen=True)
class Pupil:
    """A network to train or measure. opened: the result file it came from; name: for folders and messages.

    trained_by: the text of the recipe that its weights come from, where the file holds it. target: as it was named;
    sha256: of that file; source_top1: what the source checkpoint states, in percent. packed: the
    packed file it came from, whose latent weights are gone.
    """

    name: str
    network: nn.Module
    origin: Origin
    opened: result.Result | None = None
    trained_by: str | None = None
    target: str | None = None
    sha256: str | None = None
    source_top1: float | None = None
    packed: packed.Opened | None = None

    def captured(self) -> tuple[Network, Mapping[str, Layer]]:
        """The network's graph with its layers: where blocks for fused kernels are found."""
        if self.packed is not None:
            return self.packed.network, self.packed.layers
        if self.opened is not None:
            return shapes.rep_network(self.opened.plan, self.opened.module)
        network = source.capture(self.network.eval(), self.origin)
        return network, recognize(network)

    @property
    def beta(self) -> int | None:
        return self.opened.payload["options"]["beta"] if self.opened else None

    @property
    def inherited(self) -> bool:
        """Whether weights were carried over by a transform, so that BatchNorm statistics do not fit them."""
        return self.opened is not None and self.opened.payload["options"]["inherit"] != "none"

    @property
    def training(self) -> Mapping[str, Any]:
        """What a result says of its training and preparation."""
        return result.training_of(self.opened.payload) if self.opened else {}

    @property
    def prepared(self) -> Mapping[str, Any]:
        """How the inherited weights were fitted to the source, where `calibrate` or a run's beginning has done so."""
        found: Mapping[str, Any] = self.training.get("inherited", {})
        return found

    @property
    def trained(self) -> bool:
        """Whether a result was trained since its transform."""
        return "recipe" in self.training

    @property
    def fresh(self) -> bool:
        """Whether its weights are those of a new network."""
        return self.target in registry.ARCHS and self.sha256 is None

    def package(self) -> engine.Package | None:
        """A trained Rep network is a result again, with rules, source and certificate; None for other networks."""
        opened = self.opened
        if opened is None:
            return None
        return lambda tensors, about: result.with_tensors(
            opened.payload, tensors, {**about, "inherited": {**self.prepared, **about["inherited"]}}
        )

    def facts(self) -> dict[str, Any]:
        """What a run's record says of it: `engine.finetune`'s about."""
        made = self.opened.payload if self.opened else None
        how = {} if made is None else {
            "beta": made["options"]["beta"], "last_layer": made["options"]["last_layer"], "rules": made["rules_name"],
            "spread": self.prepared.get("spread", 0.0),
        }  # fmt: skip
        return {"name": self.name, "arch": self.origin.arch, "model": self.origin.model, "beta": None, **how,
                "target": self.target, "sha256": self.sha256, "source_top1": self.source_top1}  # fmt: skip


def load(
    target: str | None, *, model: str | None = None, key: str | None = None, unsafe: bool = False,
    **said: str | None,
) -> Pupil:  # fmt: skip
    """The network of a result, a checkpoint, or the zoo (without trained weights); the newest result if not given.

    said: what else `source.from_file` takes.
    """
    target = targets.result_or_newest(target)
    read = targets.found(target, model=model, key=key, unsafe=unsafe, **said)
    name = _name(Path(target))
    if read.packed is not None:
        again = read.packed
        trained_by = result.training_of(again.header).get("recipe_text")
        return Pupil(name, again.network.module, again.origin, trained_by=trained_by, target=target, packed=again)
    if read.opened is not None:
        opened, payload = read.opened, read.opened.payload
        stated = (payload["source"]["accuracy"] or {}).get("top1")
        return Pupil(name, opened.module, opened.origin, opened, result.training_of(payload).get("recipe_text"),
                     target, payload["sha256"], stated)  # fmt: skip
    assert read.source is not None
    src = read.source
    if src.file is None:
        return Pupil(target, registry.build(target), src.origin, target=target)
    trained_by = src.file.metadata.get("recipe_text")
    return Pupil(name, src.model, src.origin, trained_by=trained_by if isinstance(trained_by, str) else None,
                 target=target, sha256=src.file.sha256,
                 source_top1=src.file.accuracy.percent if src.file.accuracy else None)  # fmt: skip


def check_once(sets: Sequence[str], options: Mapping[str, float | None]) -> None:
    """A UsageError for a key of the recipe that `--set`, of a stage too, and an option of its own both give."""
    for name, _, value_text in (change.partition("=") for change in sets):
        name = name.strip()
        key = name.split(".", 2)[-1] if name.startswith("stages.") else name
        key = "epochs" if key == "iterations" else key  # a length, too
        key = "distillation.weight" if key == "distillation" and "weight" in value_text else key
        if (value := options.get(key)) is not None:
            option = "--distill" if key == "distillation.weight" else f"--{key}"
            raise UsageError(f"{option} {value:g} and --set {name}=...: say the same twice; give one of them")


def check_asked(data: str | None, recipe: str | None, sets: Sequence[str] = (), *, own: bool) -> None:
    """What can be said of data and recipe before the network is loaded. own: it comes from code of the user's own."""
    if data is not None:
        check_there(data)
    elif own:
        raise UsageError(_NO_DATA)
    known = recipes.names()  # the start of a name is completed by the network
    if recipe is not None and (recipe in known or not any(name.startswith(f"{recipe}-") for name in known)):
        recipes.override(recipes.load(recipe), sets)


def check_run(target: str | None, run_dir: str | None, *, resume: bool) -> None:
    """A UsageError for a folder that does not fit: a run's in place of a network, one that is taken already."""
    if target is not None and runs.is_run(target):
        which = f", which {began} began" if (began := runs.begun_by(target)) else ""
        raise UsageError(
            f"{target}: is the folder of a run{which}; to continue it give the command that it began with, and --resume"
        )
    if run_dir is not None and not resume:
        runs.check_free(run_dir)
    if run_dir is not None and resume:
        runs.check_resumable(run_dir)
        if target is None and (began := runs.begun_by(run_dir)):
            raise UsageError(
                f"--resume: takes what the run began with; in {run_dir} that was {began}: give it again, with --resume"
            )


def dataset(spec: str | None, origin: Origin) -> Dataset | ImageFolders:
    """The data named, else CIFAR-10 where the network is made for it."""
    if spec is None and origin.arch and registry.ARCHS[origin.arch].data == "CIFAR-10":
        spec = "cifar10"
    if spec is None:
        raise UsageError(_NO_DATA)
    found = open_data(spec)
    views.say(*(f"note: {n}" for n in found.notes))
    if origin.input_shape[0][:-2] != (1,):
        return found
    views.say("the network takes one channel: images become grey (ITU-R 601)")
    return found.in_grey()


def recipe_of(pupil: Pupil, named: str | None) -> Recipe:
    """Whose preprocessing to measure with: the recipe named, else the one it was trained by, else its default."""
    if named is not None:
        return recipes.load(named, pupil.origin.arch)
    if pupil.trained_by is not None:
        return recipes.loads(pupil.trained_by, f"{pupil.name}'s recipe")
    return recipes.for_network(pupil.origin)


def teacher_of(
    pupil: Pupil, recipe: Recipe, *, file: str | None, arch: str | None, model: str | None, distill: float | None
) -> nn.Module | None:
    """The network to distil from: that of a file, else the source network in a result where `distill` asks for it."""
    if file is None:
        for option, value in (("--teacher-arch", arch), ("--teacher-model", model)):
            if value is not None:
                raise UsageError(f"{option} {value}: says what is in a teacher's file; name that with --teacher")
        if not distill:
            return None
        if pupil.opened is None or not pupil.opened.payload["source_tensors"]:
            raise UsageError(
                "--distill: the teacher is the source network in a result file (one not made with --slim), or what "
                "--teacher names"
            )
        if pupil.opened.payload["source"]["sha256"] is None:
            raise UsageError("--distill: the source network in this result has no trained weights; name a teacher that "
                             "has with --teacher")  # fmt: skip
        return pupil.opened.network.module
    if not any(stage.distillation.weight for stage in recipe.stages):
        raise UsageError(f"--teacher {file}: recipe {recipe.name} learns from no teacher; add --distill WEIGHT, 0 to 1")
    if not Path(file).is_file():
        raise UsageError(f"--teacher {file}: no such file; name a checkpoint with trained weights")
    try:
        return load(file, arch=arch, model=model).network
    except (CheckpointError, UsageError) as error:
        error.add_note("this is the teacher: --teacher-arch and --teacher-model say what is in its file")
        raise


def device_of(name: str) -> torch.device:
    """`--device`: auto is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = "expected auto, cpu or cuda (cuda:1 for the second GPU)"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: {expected}") from None
    if device.type == "cpu" and device.index:
        raise UsageError(f"--device {name}: there is one CPU; {expected}")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name}: nothing here was made for it; {expected}")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= there:
        seen = f"{there} GPU{'s' * (there > 1)}" if there else "no GPU"
        raise UsageError(f"--device {name}: PyTorch {torch.__version__} sees {seen} here; use --device cpu")
    return device


def _name(path: Path) -> str:
    """What to call the network of a file: best.pt of a run is called as the run is."""
    run = runs.folder_of(path)
    return path.name.split(".")[0] if run is None else run.name
