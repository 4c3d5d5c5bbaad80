"""An experiment file: networks × variants × seeds as cells, each an ordinary run; pure values, no torch.

    name: table-3
    summary: β = 2, 4, 8
    table: Table 3                       # of the paper: whose figures stand beside ours
    networks: [irnet_resnet20, recu_resnet20]
    variants:
      raw: {}                            # the source network
      beta-4: {beta: 4, setting: "β = 4"}
    epochs: 40                           # of every cell; the recipe's where it is left out
    seeds: [0, 1, 2]

A network of one's own is its checkpoint and what the commands have to be told of it:

    networks:
      - {checkpoint: net.pth, model: "net.py:make", input_size: 3x32x32}

A variant that names none of beta, rules, inherit and last_layer is the source network itself; all others are RepBNNs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from repbnn_cli import paper
from repbnn_cli.errors import RulesError
from repbnn_cli.rules.rule_models import Factor, Inherit, Share, Text
from repbnn_cli.rules.yaml_marks import Problem, complain, nearest, printable, read, text_of, validate

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
TRANSFORM = ("beta", "rules", "inherit", "last_layer")


def _not_empty(value: tuple[object, ...]) -> tuple[object, ...]:
    if not value:
        raise ValueError("expected at least one")
    return value


class Network(BaseModel):
    """A network to train: a zoo name or a checkpoint, and what the file does not say itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    checkpoint: Text = Field(description="Zoo name (trained from scratch) or checkpoint (trained further).")
    name: Name | None = Field(None, description="What to call it, where one checkpoint stands for several networks.")
    arch: Text | None = Field(None, description="Zoo name of what the checkpoint holds, where several fit.")
    model: Text | None = Field(None, description="Your own network, file.py:callable or module:callable.")
    model_args: dict[str, Any] | None = Field(None, description="Its arguments.")
    input_size: Text | None = Field(None, description="Input without batch, e.g. 3x32x32.")
    key: Text | None = Field(None, description="Key of the state dict in the file.")

    @property
    def origin(self) -> dict[str, Any]:
        """What is said of it, by the names of the commands' options."""
        said = self.model_dump(exclude={"checkpoint", "name"}, exclude_none=True)
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items()}


def _named(value: object) -> object:
    """A name alone is that of the checkpoint."""
    return tuple({"checkpoint": v} if isinstance(v, str) else v for v in value) if isinstance(value, tuple) else value


class Variant(BaseModel):
    """What is done to each network before and while it is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    beta: Factor | None = Field(None, description="β of the transform.")
    rules: Text | None = Field(None, description="Rule file or shipped name.")
    inherit: Inherit | None = Field(None, description="How trained kernels are carried over.")
    last_layer: Share | None = Field(None, description="Share of its inputs that the last layer takes.")
    distill: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Weight of learning from the source network.")
    fit: Annotated[int, Field(ge=0)] | None = Field(None, description="Steps per convolution that first fit it.")
    spread: Annotated[float, Field(ge=0)] | None = Field(None, description="How far its copies start apart, ±.")
    latents: Annotated[float, Field(gt=0)] | None = Field(None, description="Factor on fitted latent kernels.")
    set: tuple[Text, ...] = Field((), description="Overrides of the recipe, KEY=VALUE.")
    table: Text | None = Field(None, description="The paper's table, where it is not the file's.")
    setting: Text | None = Field(None, description="The paper's row, by its setting, e.g. β = 4.")

    @property
    def transforms(self) -> bool:
        return any(getattr(self, key) is not None for key in TRANSFORM)


class ExperimentFile(BaseModel):
    """One experiment file as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_: Literal[1] = Field(1, alias="schema", description="Version of this language.")
    name: Name = Field(description="Of the experiment, and of its folder runs/NAME.")
    summary: Text = Field(description="One line.")
    table: Text | None = Field(None, description="Table of the paper whose figures stand beside ours, e.g. Table 3.")
    data: Text = Field("cifar10", description="Data set, as for --data.")
    networks: Annotated[tuple[Network, ...], BeforeValidator(_named), AfterValidator(_not_empty)] = Field(
        description="Zoo names (trained from scratch), checkpoints (trained further), or one's own networks."
    )
    variants: dict[Name, Variant] = Field(description="Name → what is done; one without a transform is the source.")
    recipe: Text | None = Field(None, description="Recipe of all cells; each network's own where it is left out.")
    epochs: Annotated[int, Field(ge=1, le=10**6)] | None = Field(None, description="Of every cell.")
    seeds: Annotated[tuple[Seed, ...], AfterValidator(_not_empty)] = Field((0,), description="One run for each.")


@dataclass(frozen=True)
class Cell:
    """One run of an experiment. network: its key in `Experiment.networks`; name: its folder within the experiment's."""

    network: str
    variant_name: str
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{Path(self.network).name.split('.')[0]}-{self.variant_name}-seed{self.seed}"

    @property
    def result_name(self) -> str:
        """The transformed network that the run starts from; fresh values depend on the seed."""
        return f"{self.name}.repbnn.pt"


@dataclass(frozen=True)
class Experiment:
    """text: the file's; cells: in order of networks, variants, seeds."""

    file: ExperimentFile
    text: str

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def tables(self) -> tuple[str, ...]:
        """The paper's tables whose figures stand beside ours."""
        return tuple(dict.fromkeys(filter(None, map(self.table_of, self.file.variants))))

    @property
    def networks(self) -> dict[str, Network]:
        """By their names, else as their checkpoints are named."""
        return {network.name or network.checkpoint: network for network in self.file.networks}

    @property
    def files(self) -> tuple[str, ...]:
        """Checkpoints, code, recipe and rule files that it names, as far as they are there."""
        code = [network.model.rpartition(":")[0] for network in self.file.networks if network.model]
        rules = [variant.rules for variant in self.file.variants.values()]
        named = [*(network.checkpoint for network in self.file.networks), *code, self.file.recipe, *rules]
        return tuple(dict.fromkeys(name for name in named if name and Path(name).is_file()))

    def table_of(self, variant: str) -> str | None:
        return self.file.variants[variant].table or self.file.table

    @property
    def cells(self) -> tuple[Cell, ...]:
        made = self.file
        return tuple(
            Cell(network.name or network.checkpoint, name, variant, seed)
            for network in made.networks
            for name, variant in made.variants.items()
            for seed in made.seeds
        )


def load(path: str) -> Experiment:
    """Reads and checks a file. Raises RulesError, one line per problem with file, line and key."""
    return loads(text_of(path, printable(path), "experiment file", "see experiments/ for examples"), path)


def loads(text: str, name: str) -> Experiment:
    """The experiment in a text; name: how messages call it."""
    if not text.strip():
        raise RulesError(f"{printable(name)}:1: is empty; expected an experiment; see experiments/ for examples")
    document = read(text, name)
    made = validate(document, ExperimentFile)
    problems: list[Problem] = []
    if not made.variants:
        problems.append(document.problem(("variants",), "expected at least one"))
    experiment = Experiment(made, text)
    tables = paper.settings()
    named: list[tuple[tuple[str, ...], str | None]] = [(("table",), made.table)]
    named += [(("variants", key, "table"), variant.table) for key, variant in made.variants.items()]
    for at, table in named:
        if table is not None and table not in tables:
            known = f"expected one of {', '.join(tables)}{nearest(table, tables)}"
            problems.append(document.problem(at, f"the paper has no accuracies in {table!r}; {known}"))
    for key, variant in made.variants.items():
        table = experiment.table_of(key)
        if variant.setting is not None and table in tables and variant.setting not in tables[table]:
            known = f"expected one of {', '.join(filter(None, tables[table])) or 'none: leave it out'}"
            at = ("variants", key, "setting")
            problems.append(document.problem(at, f"{table} has no such row: {variant.setting!r}; {known}"))
    names = [cell.name for cell in experiment.cells]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        problems.append(document.problem(("networks",), f"two cells would be called {twice[0]}; expected other names"))
    if problems:
        complain(problems)
    return experiment
