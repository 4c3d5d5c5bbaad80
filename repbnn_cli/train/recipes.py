"""Recipes: how a network is trained, from YAML files that are validated, overridden and resolved to one plain text.

A file's settings at the top hold for every stage; a stage's own go before them, key by key. A resolved recipe has
every key written out in every stage, and loads again as the same recipe.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from repbnn_cli.errors import RulesError, UsageError
from repbnn_cli.rules import rule_files
from repbnn_cli.rules.yaml_marks import (
    Document,
    Location,
    Problem,
    complain,
    nearest,
    printable,
    read,
    text_of,
    validate,
)
from repbnn_cli.train.recipe_models import RecipeFile, Settings

if TYPE_CHECKING:
    from repbnn_cli.source import Origin

ONLY_STAGE = "train"
_HEADER = {name for name in RecipeFile.model_fields if name not in Settings.model_fields} - {"name", "stages"}
_ONLY_FOR = {
    "momentum": ("sgd",),
    "nesterov": ("sgd",),
    "betas": ("adam",),
    "milestones": ("step",),
    "factor": ("step",),
}
_LENGTHS = ("epochs", "iterations")
_LONGEST_WARMUP = 0.1  # of a run that was made shorter than its recipe


class Stage(Settings):
    """One stage with all its settings."""

    name: str

    @property
    def unit(self) -> str:
        """What the schedule counts: epochs or iterations."""
        return "epochs" if self.epochs is not None else "iterations"

    @property
    def total(self) -> int:
        """Length in that unit."""
        return self.epochs if self.epochs is not None else self.iterations

    def length(self, batches: int) -> int:
        """Length in epochs of so many batches; one in iterations ends within its last epoch."""
        return self.epochs if self.epochs is not None else math.ceil(self.iterations / batches)

    def stated(self, arch: str | None, *, rep: bool) -> tuple[float, str] | None:
        """The published top-1 in percent after this stage, and its table; rep: of the RepBNN that the papers have."""
        found = self.published.get(arch or "")
        if found is None:
            return None
        value = found.rep if rep else found.raw
        return None if value is None else (value, found.table)


@dataclass(frozen=True)
class Recipe:
    """A valid recipe. text: the resolved recipe, deterministic, which loads as this recipe again."""

    name: str
    header: RecipeFile
    stages: tuple[Stage, ...]
    text: str
    document: Document = field(repr=False, compare=False)


# ---------------------------------------------------------------------------------------------------------------------
# Finding and loading


def names() -> dict[str, str]:
    """Name → summary of the recipes that come with repbnn."""
    return {name: load(name).header.summary for name in _shipped()}


def load(name_or_path: str, arch: str | None = None) -> Recipe:
    """A shipped recipe by its bare name, else the file at a path. Raises RulesError, one line per problem.

    With a network of the zoo, the start of a name is enough where one of its completions lists the network:
    `irnet-cifar10` for irnet_vgg_small is irnet-cifar10-vgg.
    """
    files = _shipped()
    if name_or_path in files:
        return loads(files[name_or_path].read_text("utf-8"), f"rules/recipes/{name_or_path}.yaml")
    for name in files:
        if arch is not None and name.startswith(f"{name_or_path}-") and arch in (found := load(name)).header.networks:
            return found
    known = f"expected a path or one of {', '.join(files)}{nearest(Path(name_or_path).stem, files)}"
    text = text_of(name_or_path, printable(name_or_path), "recipe", known)
    return loads(text, os.path.normpath(name_or_path))


def loads(text: str, file: str) -> Recipe:
    """The recipe in a text; file: how messages call it."""
    if all(not line.strip() or line.lstrip().startswith("#") for line in text.splitlines()):
        raise RulesError(f"{printable(file)}:1: is empty; expected a recipe, for an example: repbnn recipes show")
    return _build(read(text, file))


def for_network(origin: Origin) -> Recipe:
    """The default recipe: the one that lists the network of the zoo (its Rep network included), else `own-network`."""
    for name in _shipped():
        recipe = load(name)
        if origin.arch is not None and origin.arch in recipe.header.networks:
            return recipe
    return load("own-network")


def _shipped() -> dict[str, Traversable]:
    return rule_files.shipped("recipes")


# ---------------------------------------------------------------------------------------------------------------------
# Changing


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """`--set key.key=value`, values in YAML. A setting named without its stage goes to every stage.

    Raises RulesError that names the assignment, with the nearest key for one that does not exist.
    """
    value: dict[str, Any] = copy.deepcopy(dict(recipe.document.value))
    for assignment in assignments:
        keys, change = _assignment(assignment)
        if keys[0] == "name":
            raise RulesError("--set name: a recipe is named by its file; copy that, and give the copy to --recipe")
        for stage in value.get("stages", {}) if keys[0] in Settings.model_fields else ():
            # One length takes the place of another, in whichever unit.
            for name in _LENGTHS if keys[0] in _LENGTHS else ():
                value["stages"][stage].pop(name, None)
            _remove(value["stages"][stage], keys)
        value = _merged(value, change)
    known = [stage.name for stage in recipe.stages]
    for name in value.get("stages", {}):
        if name not in known:
            expected = f"expected one of {', '.join(known)}{nearest(name, known)}"
            raise RulesError(f"--set stages.{name}: {recipe.name} has no such stage; {expected}")
    return _build(replace(recipe.document, value=value), name=recipe.name)


def with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """Every stage so many epochs long. Milestones move in proportion; a warm-up stays as it is, up to a tenth."""
    if epochs < 1:
        raise UsageError(f"epochs {epochs}: expected 1 or more")
    value = _plain(recipe)
    for stage in recipe.stages:
        ratio = epochs / stage.total
        warmup = stage.schedule.warmup * (ratio if stage.unit == "iterations" else 1)
        if epochs < stage.total or stage.unit == "iterations":
            warmup = min(warmup, epochs * _LONGEST_WARMUP)
        changed = value["stages"][stage.name]
        changed.pop("iterations", None)
        changed["epochs"] = epochs
        changed["schedule"]["warmup"] = warmup
        if stage.schedule.name == "step":
            changed["schedule"]["milestones"] = [m * ratio for m in stage.schedule.milestones]
    return _rebuilt(recipe, value)


def with_stages(recipe: Recipe, chosen: Sequence[str]) -> Recipe:
    """Only the named stages, in the recipe's order; the network that comes in has to be at that point."""
    known = [stage.name for stage in recipe.stages]
    for name in chosen:
        if name not in known:
            raise UsageError(f"stage {name}: {recipe.name} has {', '.join(known)}{nearest(name, known)}")
    value = _plain(recipe)
    value["stages"] = {name: settings for name, settings in value["stages"].items() if name in chosen}
    return _rebuilt(recipe, value)


def check_data(recipe: Recipe, data: str) -> None:
    """Raises UsageError when the recipe is for other data than the data set called `data`."""
    if data not in recipe.header.data:
        fits = ", ".join(recipe.header.data)
        raise UsageError(
            f"recipe {recipe.name}: is for {fits}, not for {data}; choose another recipe, or --set data={data}"
        )


def _assignment(text: str) -> tuple[list[str], dict[str, Any]]:
    key, equals, written = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(part.replace("_", "").replace("-", "").isalnum() for part in keys):
        raise RulesError(f"--set {printable(text)}: expected KEY=VALUE, for example optimizer.lr=0.05")
    source = f"--set {text}"
    nested = "".join(f"{{{part}: " for part in keys) + written + "}" * len(keys)
    document = read(nested, source)
    try:
        validate(document, RecipeFile)
    except RulesError as error:
        raise RulesError(str(error).replace(f"{document.file}:1 ", f"{document.file}: ")) from None
    return keys, dict(document.value)


def _remove(value: Any, keys: list[str]) -> None:
    for key in keys[:-1]:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, dict):
        value.pop(keys[-1], None)


# ---------------------------------------------------------------------------------------------------------------------
# Putting together


def _build(document: Document, name: str | None = None) -> Recipe:
    header = validate(document, RecipeFile)
    problems = [document.problem((), f"has no {key}") for key in ("batch", "data") if getattr(header, key) is None]
    stages = []
    shared = {key: value for key, value in document.value.items() if key in Settings.model_fields}
    written: Mapping[str, Any] = document.value.get("stages") or {ONLY_STAGE: {}}  # type: ignore[assignment]
    for stage_name, own in written.items():
        stage = Stage.model_validate({**_merged(shared, own), "name": stage_name})
        problems += _check(document, stage)
        stages.append(stage)
    if problems:
        complain(problems)
    found = name or header.name or Path(document.file).stem
    recipe = Recipe(found, header, tuple(stages), "", document)
    text = yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    return replace(recipe, text=text)


def _rebuilt(recipe: Recipe, value: dict[str, Any]) -> Recipe:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return _build(read(text, recipe.document.file), name=recipe.name)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as plain values, every setting written in its stage."""
    header = recipe.header.model_dump(mode="json", by_alias=True, include=_HEADER)
    stages = {stage.name: _tidy(stage.model_dump(mode="json", exclude={"name"})) for stage in recipe.stages}
    return {"schema": header.pop("schema"), "name": recipe.name, **_tidy(header), "stages": stages}


def _tidy(value: dict[str, Any]) -> dict[str, Any]:
    """Without what was never written and what has no effect, which could not be read back."""
    kept = {}
    for key, entry in value.items():
        if entry in (None, "", {}) or value.get("name") not in _ONLY_FOR.get(key, (value.get("name"),)):
            continue
        kept[key] = _tidy(entry) if isinstance(entry, dict) else entry
    return kept


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping. A length in the other unit takes the place of the base's."""
    result = dict(base)
    if {*_LENGTHS} & set(over):
        result = {k: v for k, v in result.items() if k not in _LENGTHS}
    for key, value in over.items():
        inner = result.get(key)
        result[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result


def _check(document: Document, stage: Stage) -> list[Problem]:
    """What only the whole of a stage can show."""

    def problem(*at: str, text: str) -> Problem:
        own: Location = ("stages", stage.name, *at)
        place = own if own in document.lines else at
        return document.problem(place if place in document.lines else document.known(own), text)

    found = []
    if (stage.epochs is None) == (stage.iterations is None):
        found.append(problem("epochs", text=f"stage {stage.name} needs a length: epochs or iterations, one of them"))
        return found
    optimizer, schedule = stage.optimizer, stage.schedule
    if optimizer.name is None or optimizer.lr is None:
        found.append(problem("optimizer", text=f"stage {stage.name} needs optimizer.name (sgd, adam) and optimizer.lr"))
    if optimizer.nesterov and not optimizer.momentum:
        found.append(problem("optimizer", "nesterov", text="needs a momentum above 0"))
    if schedule.name is None:
        found.append(problem("schedule", text=f"stage {stage.name} needs schedule.name (cosine, linear, step)"))
    for part, settings in (("optimizer", optimizer), ("schedule", schedule)):
        for key in settings.model_fields_set & set(_ONLY_FOR):
            if settings.name is not None and settings.name not in _ONLY_FOR[key]:
                text = f"has no effect with {settings.name}, only with {_ONLY_FOR[key][0]}; leave it out"
                found.append(problem(part, key, text=text))
    marks = schedule.milestones
    if schedule.name == "step" and (not marks or list(marks) != sorted(set(marks)) or marks[-1] >= stage.total):
        text = f"found {list(marks)}; step wants rising positions below {stage.total} {stage.unit}"
        found.append(problem("schedule", "milestones", text=text))
    if schedule.warmup >= stage.total:
        text = f"found {schedule.warmup:g}; expected less than the stage's {stage.total} {stage.unit}"
        found.append(problem("schedule", "warmup", text=text))
    return found
