"""Recipes: what the shipped files say, overrides, resolved text, and the wording of every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repbnn_cli import paper, zoo
from repbnn_cli.errors import RulesError, UsageError
from repbnn_cli.source import Origin
from repbnn_cli.train import recipe_models, recipes, state

# systems.md's table: recipe → optimiser, lr, schedule, decay of kernels and of others, batch, length, binarization.
TABLE = {
    "irnet-cifar10-resnet20": ("sgd", 0.1, "cosine", 1e-4, 1e-4, 128, 400, "ede"),
    "irnet-cifar10-vgg": ("sgd", 0.007, "cosine", 1e-4, 1e-4, 128, 300, "ede"),
    "rbnn-cifar10": ("sgd", 0.1, "cosine", 1e-4, 1e-4, 256, 1000, "rbnn"),
    "recu-cifar10": ("sgd", 0.1, "cosine", 5e-4, 5e-4, 256, 600, "recu"),
    "recu-imagenet": ("sgd", 0.1, "cosine", 1e-4, 1e-4, 512, 200, "recu"),
    "rbnn-imagenet": ("sgd", 0.1, "cosine", 1e-4, 1e-4, 512, 150, "rbnn"),
    "irnet-imagenet": ("sgd", 0.8, "step", 1e-4, 1e-4, 64, 62500, "ede"),
    "bireal-imagenet": ("adam", 1e-3, "linear", 0, 0, 512, 256, "none"),
}
TWO_STAGES = {
    "fracbnn-cifar10": (1e-3, ("linear", "step"), (1e-5, 1e-5), 128, 250),
    "fracbnn-imagenet": (5e-4, ("linear", "linear"), (1e-5, 1e-5), 256, 120),
    "reactnet-imagenet": (1.25e-3, ("linear", "linear"), (1e-5, 0), 256, 128),
    "adambnn-imagenet": (1.25e-3, ("linear", "linear"), (5e-6, 0), 256, 256),
}


def origin(arch: str | None, model: str | None = None) -> Origin:
    return Origin(arch, model, {}, None, ((3, 32, 32),))


# ---------------------------------------------------------------------------------------------------------------------
# Shipped files


def test_there_is_one_file_per_row_of_the_table_and_one_for_other_networks() -> None:
    listed = recipes.names()
    assert set(listed) == {*TABLE, *TWO_STAGES, "own-network"}
    assert all(listed.values())


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_of_one_stage_is_the_published_one(name: str) -> None:
    recipe = recipes.load(name)
    (stage,) = recipe.stages
    decay = stage.optimizer.weight_decay
    said = (stage.optimizer.name, stage.optimizer.lr, stage.schedule.name, decay.kernels, decay.others,
            recipe.header.batch, stage.total, recipe.header.binarization)  # fmt: skip
    assert said == TABLE[name]
    assert stage.kernels == "binary"
    assert stage.optimizer.momentum == 0.9
    assert stage.schedule.warmup == {"irnet-imagenet": 2500}.get(name, 5 if name[:2] in ("rb", "re") else 0)


@pytest.mark.parametrize("name", TWO_STAGES)
def test_a_recipe_of_two_stages_trains_float_kernels_first(name: str) -> None:
    recipe = recipes.load(name)
    lr, schedules, decay, batch, epochs = TWO_STAGES[name]
    first, second = recipe.stages
    assert (first.kernels, second.kernels) == ("float", "binary")
    assert (first.schedule.name, second.schedule.name) == schedules
    assert (first.optimizer.weight_decay.kernels, first.optimizer.weight_decay.others) == decay
    assert (second.optimizer.weight_decay.kernels, second.optimizer.weight_decay.others) == (0, 0)
    assert {(s.optimizer.name, s.optimizer.lr, s.epochs) for s in recipe.stages} == {("adam", lr, epochs)}
    assert recipe.header.batch == batch
    assert "every tensor" in first.hands_over
    weight = 0.0 if name == "fracbnn-cifar10" else 1.0
    assert {s.distillation.weight for s in recipe.stages} == {weight}


def test_what_stands_apart_in_the_table() -> None:
    assert recipes.load("bireal-imagenet").stages[0].label_smoothing == 0.1
    frac = recipes.load("fracbnn-cifar10")
    assert frac.stages[1].schedule.milestones == (100, 150, 200)
    assert {(s.gates.weight, s.gates.target) for s in frac.stages} == {(5e-6, 0.0)}
    assert frac.header.mean == (0, 0, 0)
    assert frac.header.std == (1, 1, 1)
    irnet = recipes.load("irnet-imagenet").stages[0]
    assert irnet.unit == "iterations"
    assert irnet.schedule.milestones == (18750, 37500, 56250)
    assert irnet.optimizer.nesterov


def test_every_network_of_the_zoo_has_one_default_recipe_for_its_data() -> None:
    for arch in zoo.ARCHS.values():
        recipe = recipes.for_network(origin(arch.name))
        assert sum(arch.name in recipes.load(name).header.networks for name in recipes.names()) == 1
        assert ("imagenet" in recipe.header.data) == (arch.data == "ImageNet")
    assert recipes.for_network(origin(None, "net.py:make")).name == "own-network"


def test_the_published_accuracies_are_those_of_the_paper() -> None:
    for arch in zoo.ARCHS.values():
        stated = recipes.for_network(origin(arch.name)).stages[-1].published.get(arch.name)
        expected = paper.accuracy(arch)
        assert (stated is None) == (expected is None), arch.name
        if stated is not None and expected is not None:
            assert (stated.raw, stated.rep) == (expected.raw, expected.rep)
            assert stated.table == f"RepBNN, {expected.table}"


def test_what_is_published_is_for_networks_like_the_papers() -> None:
    stage = recipes.load("irnet-cifar10-resnet20").stages[-1]
    assert stage.stated("irnet_resnet20", rep=True) == (87.6, "RepBNN, Table 7")
    assert stage.stated("irnet_resnet20", rep=False) == (86.5, "RepBNN, Table 7")
    assert stage.stated(None, rep=True) is None


@pytest.mark.parametrize(
    ("changed", "published"),
    [
        ({}, 87.6),
        ({"beta": None}, 86.5),
        ({"beta": 4}, None),
        ({"last_layer": "1_over_beta"}, None),
        ({"rules": "bn-before-repeat"}, None),
        ({"rules": "mine"}, None),
        ({"rules": "reptran-released"}, 87.6),
        ({"spread": 0.75}, None),
        ({"arch": None}, None),
    ],
)
def test_a_run_stands_beside_what_is_published_for_its_network(
    changed: dict[str, Any], published: float | None
) -> None:
    network = {"arch": "irnet_resnet20", "beta": 2, "last_layer": "all", "rules": "reptran", "spread": 0.0} | changed
    record = state.record_of(recipes.load("irnet-cifar10-resnet20"), network, "cifar10", 390)
    assert [stage["published"] for stage in record["stages"]] == [published]


# ---------------------------------------------------------------------------------------------------------------------
# Resolving and overriding


@pytest.mark.parametrize("name", [*TABLE, *TWO_STAGES])
def test_the_resolved_text_loads_as_the_same_recipe(name: str) -> None:
    recipe = recipes.load(name)
    again = recipes.loads(recipe.text, "run/recipe.yaml")
    assert again.text == recipe.text
    assert again.stages == recipe.stages
    assert again.name == recipe.name


def test_an_override_goes_to_every_stage_or_to_the_named_one() -> None:
    recipe = recipes.load("fracbnn-cifar10")
    changed = recipes.override(recipe, ["optimizer.lr=0.05", "stages.kernels.ema=0.9", "batch=64"])
    assert [s.optimizer.lr for s in changed.stages] == [0.05, 0.05]
    assert [s.ema for s in changed.stages] == [0, 0.9]
    assert changed.header.batch == 64
    assert [s.optimizer.lr for s in recipe.stages] == [1e-3, 1e-3]
    resolved = recipes.override(recipes.loads(recipe.text, "recipe.yaml"), ["optimizer.lr=1e-4"])
    assert [s.optimizer.lr for s in resolved.stages] == [1e-4, 1e-4]
    assert recipes.override(recipe, ["iterations=500", "schedule={name: linear}"]).stages[0].unit == "iterations"
    text = recipe.text.replace("epochs", "iterations")
    short = recipes.override(recipes.loads(text, "r.yaml"), ["epochs=3", "schedule={name: linear}"])
    assert [stage.epochs for stage in short.stages] == [3, 3]


def test_a_shorter_run_keeps_its_proportions() -> None:
    frac = recipes.with_epochs(recipes.load("fracbnn-cifar10"), 25)
    assert [s.epochs for s in frac.stages] == [25, 25]
    assert frac.stages[1].schedule.milestones == (10, 15, 20)
    assert recipes.with_epochs(recipes.load("rbnn-cifar10"), 60).stages[0].schedule.warmup == 5
    assert recipes.with_epochs(recipes.load("rbnn-cifar10"), 20).stages[0].schedule.warmup == 2
    by_iteration = recipes.with_epochs(recipes.load("irnet-imagenet"), 100).stages[0]
    assert (by_iteration.epochs, by_iteration.schedule.warmup) == (100, 4)
    assert by_iteration.schedule.milestones == (30, 60, 90)
    with pytest.raises(UsageError, match=r"^epochs 0: expected 1 or more$"):
        recipes.with_epochs(frac, 0)


def test_stages_can_be_chosen() -> None:
    frac = recipes.load("fracbnn-cifar10")
    assert [s.name for s in recipes.with_stages(frac, ["kernels"]).stages] == ["kernels"]
    with pytest.raises(UsageError, match=r"^stage kernel: fracbnn-cifar10 has activations, kernels; nearest: kernels$"):
        recipes.with_stages(frac, ["kernel"])


def test_the_start_of_a_name_is_enough_with_a_network() -> None:
    assert recipes.load("irnet-cifar10", "irnet_vgg_small").name == "irnet-cifar10-vgg"
    assert recipes.load("irnet-cifar10", "irnet_resnet18").name == "irnet-cifar10-resnet20"
    with pytest.raises(RulesError, match=r"^irnet-cifar10: no such recipe; expected a path or one of "):
        recipes.load("irnet-cifar10", "recu_resnet18")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

GOOD = "data: cifar10\nbatch: 8\nepochs: 4\noptimizer: {name: sgd, lr: 1e-1}\nschedule: {name: cosine}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.yaml:1: is empty; expected a recipe, for an example: repbnn recipes show"),
        (GOOD.replace("lr: 1e-1", "lr: 0"), "mine.yaml:4 optimizer.lr: found 0; expected a number above 0"),
        (GOOD.replace("lr:", "rate:"), "mine.yaml:4 optimizer.rate: unknown key 'rate'; expected one of name, lr, "),
        (
            GOOD.replace("sgd", "sdg"),
            "mine.yaml:4 optimizer.name: unknown value 'sdg'; expected one of sgd, adam; near",
        ),
        (GOOD.replace("epochs: 4", "epochs: 0"), "mine.yaml:3 epochs: found 0; expected at least 1"),
        (GOOD + "augmentaton: cifar\n", "mine.yaml:6 augmentaton: unknown key 'augmentaton'; expected one of epochs"),
        (GOOD.replace("batch: 8\n", ""), "mine.yaml:1: has no batch"),
        (GOOD.replace("epochs: 4\n", ""), "mine.yaml:1: stage train needs a length: epochs or iterations, one of them"),
        (
            GOOD.replace("name: sgd, ", ""),
            "mine.yaml:4 optimizer: stage train needs optimizer.name (sgd, adam) and opt",
        ),
        (GOOD.replace("name: cosine", "warmup: 1"), "mine.yaml:5 schedule: stage train needs schedule.name (cosine, "),
        (
            GOOD.replace("sgd, ", "adam, momentum: 0.9, "),
            "mine.yaml:4 optimizer.momentum: has no effect with adam, only with sgd; leave it out",
        ),
        (
            GOOD.replace("cosine", "step, milestones: [3, 2]"),
            "mine.yaml:5 schedule.milestones: found [3.0, 2.0]; step wants rising positions below 4 epochs",
        ),
        (
            GOOD.replace("cosine", "cosine, warmup: 9"),
            "mine.yaml:5 schedule.warmup: found 9; expected less than the stage's 4 epochs",
        ),
        (
            GOOD + "stages:\n  a: {}\n  b: {schedule: {warmup: 4}}\n",
            "mine.yaml:8 stages.b.schedule.warmup: found 4; expected less than the stage's 4 epochs",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_file_line_and_key(text: str, message: str) -> None:
    with pytest.raises(RulesError) as caught:
        recipes.loads(text, "mine.yaml")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.lrr=0.05", "--set optimizer.lrr=0.05: optimizer.lrr: unknown key 'lrr'; expected one of name, lr"),
        ("optimizer.lr=fast", "--set optimizer.lr=fast: optimizer.lr: found 'fast'; "),
        ("mean=[0.5]", "--set mean=[0.5]: mean: found a list of 1; expected 3 values"),
        ("mean=[1,1,1,1]", "--set mean=[1,1,1,1]: mean: found a list of 4; expected 3 values"),
        ("stages.kernels.optimizer.betas=[1]", "--set stages.kernels.optimizer.betas=[1]: "),
        ("data=[]", "--set data=[]: data: found an empty list; expected at least one value"),
        ("optimizer.lr", "--set optimizer.lr: expected KEY=VALUE, for example optimizer.lr=0.05"),
        ("batch=8}, a: {", "--set batch=8}, a: {:1: not valid YAML"),
        (
            "stages.kernel.ema=0.9",
            "--set stages.kernel: fracbnn-cifar10 has no such stage; expected one of activations,",
        ),
        (
            "epochs=120",
            "rules/recipes/fracbnn-cifar10.yaml:19 stages.kernels.schedule.milestones: found [100.0, 150.0, ",
        ),
    ],
)
def test_a_wrong_override_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(RulesError) as caught:
        recipes.override(recipes.load("fracbnn-cifar10"), [assignment])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RulesError, match=r"^recu-cifar: no such recipe; .*nearest: recu-cifar10, "):
        recipes.load("recu-cifar")
    with pytest.raises(RulesError, match=r"cannot be read \(Is a directory\); expected a path or one of "):
        recipes.load(str(tmp_path))
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RulesError, match=r"is not UTF-8 text \(byte 0\); expected a YAML recipe$"):
        recipes.load(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text(GOOD)
    assert recipes.load(str(tmp_path / "b.yaml")).name == "b"


def test_a_recipe_for_other_data_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        recipes.check_data(recipes.load("recu-cifar10"), "imagenet")
    assert str(caught.value) == (
        "recipe recu-cifar10: is for cifar10, cifar100, digits, not for imagenet; choose another recipe, "
        "or --set data=imagenet"
    )


def test_the_reference_names_every_key() -> None:
    text = (Path(__file__).resolve().parent.parent / "rules" / "recipes" / "README.md").read_text("utf-8")
    models = (recipe_models.RecipeFile, recipe_models.Optimizer, recipe_models.Schedule)
    for key in (info.alias or name for model in models for name, info in model.model_fields.items()):
        assert f"`{key}" in text or f".{key}`" in text, key
    for name in recipes.names():
        assert f"`{name}`" in text
