"""The training loop: it learns, it resumes to the last bit, it stops in order, and its parts are their formulas."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_examples
from networks import transformed
from PIL import Image
from torch import Tensor
from train_examples import TEXT, Tiny, recipe, run, tiny, toy

from repbnn_cli import checkpoint, data, result, rules, source, surgery, writing, zoo
from repbnn_cli.binary_conv import BinaryConv2d, GatedConv2d, RBNNConv2d, ReCUConv2d
from repbnn_cli.errors import DataError, DivergedError, RepbnnError, StoppedError, UsageError
from repbnn_cli.runs import Progress
from repbnn_cli.train import engine, feeds, guards, health, recipes, state
from repbnn_cli.train.inheritance import Preparation
from repbnn_cli.train.reconstruct import Fitted
from repbnn_cli.train.state import Position, Run
from repbnn_cli.verify import Certificate

STATE = ("recipe.yaml", "metrics.jsonl", "metrics.csv")
CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "irnet_resnet20_cifar10.pth"


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, other: Path) -> None:
    for name in STATE:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("best.pt", "last.pt"):
        assert (folder / "checkpoints" / name).read_bytes() == (other / "checkpoints" / name).read_bytes(), name


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def test_a_network_of_the_zoo_learns_and_writes_its_run(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = zoo.build("irnet_resnet20")
    bars = toy(train=160, test=50, classes=10, size=16)
    said: list[Any] = []
    made = recipe("batch=32", "epochs=5", "augmentation=none", "schedule.warmup=0")
    outcome = engine.finetune(network, bars, made, tmp_path / "run", on_epoch=said.append)
    found = rows(tmp_path / "run")
    assert [row["epoch"] for row in found] == [1, 2, 3, 4, 5]
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]
    assert outcome.best_top1 > 40  # chance is 10
    assert outcome.best_top1 == max(row["test_top1"] for row in found)
    assert outcome.top1 == found[-1]["test_top1"]
    assert [row["lr"] for row in found] == pytest.approx([0.025 * (1 + math.cos(math.pi * e / 5)) for e in range(5)])
    assert [row["t"] for row in found] == pytest.approx([10 ** (-3 + 4 * e / 5) for e in range(5)])
    assert set(found[0]["flips"]) == set(found[0]["dead"]) == set(health.binary_convs(network))
    assert all(0 < share < 1 for share in found[0]["flips"].values())
    assert said[0]["images_per_s"] > 0
    assert "images_per_s" not in found[0]
    header, *table = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert header == ",".join(state.COLUMNS)
    assert len(table) == 5
    file = checkpoint.load(outcome.best)
    assert file.accuracy is not None
    assert file.accuracy.percent == outcome.best_top1
    assert not network.training
    loaded = checkpoint.load(outcome.last).tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network.state_dict().items())
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert recipes.load(str(tmp_path / "run" / "recipe.yaml")).text == made.text


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / name, seed=seed)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a")[0]["loss"] != rows(tmp_path / "c")[0]["loss"]


def test_two_stages_hand_over_and_length_may_be_in_iterations(tmp_path: Path) -> None:
    network = tiny(conv=GatedConv2d)
    made = recipes.override(recipes.load("fracbnn-cifar10"), ["batch=16", "iterations=6", "schedule={name: linear}"])
    plain, kernels = network.conv.binary_weight(), []

    def look(progress: Progress) -> None:
        kernels.append((progress.stage, network.conv.binary_weight().detach().unique().numel()))

    engine.finetune(network, toy(), made, tmp_path / "run", on_step=look, options=engine.Options(log_every=1))
    assert plain.unique().numel() == 2
    assert [stage for stage, _ in kernels] == ["activations"] * 6 + ["kernels"] * 6
    assert all(count > 100 for stage, count in kernels if stage == "activations")
    assert all(count == 2 for stage, count in kernels if stage == "kernels")
    assert [(row["stage"], row["epoch"], row["step"]) for row in rows(tmp_path / "run")] == [
        ("activations", 1, 4), ("activations", 2, 6), ("kernels", 1, 10), ("kernels", 2, 12),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_a_run_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    script = [sys.executable, train_examples.__file__]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    whole = subprocess.run([*script, str(tmp_path / "whole")], env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    draw, kills = random.Random(5), 0
    for attempt in range(12):
        resume = ["resume"] if (tmp_path / "killed" / "run.json").exists() else []
        process = subprocess.Popen(
            [*script, str(tmp_path / "killed"), *resume], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if attempt < 3:
            for _ in range(draw.randint(1, 4)):
                process.stdout.readline()
            time.sleep(draw.uniform(0, 0.02))
            process.kill()
        process.stdout.read()
        process.stdout.close()
        if process.wait() == 0:
            break
        kills += 1
    assert kills == 3
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_resume(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run(tmp_path / "whole")
    before = signal.getsignal(number)

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.batch) == (2, 3):
            os.kill(os.getpid(), number)

    with pytest.raises(StoppedError) as caught:
        run(tmp_path / "run", on_step=stop, options=engine.Options(log_every=1))
    assert caught.value.exit_code == code
    place = tmp_path / "run" / "checkpoints" / "state-0-0001-000003.pt"
    assert str(caught.value) == (
        f"stopped by {number.name} after step 7; saved {place}; the same command with --resume continues"
    )
    assert signal.getsignal(number) is before
    outcome = run(tmp_path / "run", network=tiny(seed=9), resume=True)  # the weights come from the state
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert [row["epoch"] for row in outcome.rows] == [2, 3]


def test_a_length_in_iterations_resumes_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    change = "iterations=12"
    run(tmp_path / "whole", change)

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.batch) == (1, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="after step 4"):
        run(tmp_path / "run", change, on_step=stop, options=engine.Options(log_every=1))
    run(tmp_path / "run", change, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert rows(tmp_path / "run")[0]["lr"] > 0


def test_signs_that_do_not_move_are_no_flips_in_either_stage(tmp_path: Path) -> None:
    still = recipes.loads(TEXT.replace("lr: 0.05", "lr: 1e-12") + "stages: {a: {kernels: float}, b: {}}", "still.yaml")
    engine.finetune(tiny(), toy(), recipes.override(still, ["epochs=1", "schedule.warmup=0"]), tmp_path / "run")
    assert [row["flips"] for row in rows(tmp_path / "run")] == [{"conv": 0.0}, {"conv": 0.0}]


@pytest.mark.parametrize("kind", [RBNNConv2d, ReCUConv2d])
def test_method_schedules_and_rotations_resume_exactly(tmp_path: Path, kind: type[BinaryConv2d]) -> None:
    name = "rbnn" if kind is RBNNConv2d else "recu"
    changes = (f"binarization={name}", "optimizer={name: adam, lr: 1e-3}")
    run(tmp_path / "whole", *changes, network=tiny(conv=kind))

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.batch) == (2, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        run(tmp_path / "run", *changes, network=tiny(conv=kind), on_step=stop, options=engine.Options(log_every=1))
    run(tmp_path / "run", *changes, network=tiny(conv=kind), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_full_disk_leaves_earlier_states_and_the_run_goes_on_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    calls = 0

    def full(payload: Any, path: Path, *, force: bool = False) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # state, best and state of epoch 1, best and state of epoch 2
            raise RepbnnError(f"{path}: no space left on the device, nothing was written")
        writing.save(payload, path, force=force)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save", full)
        with pytest.raises(RepbnnError, match="no space left"):
            run(tmp_path / "run")
    assert [p.name for p in Run(tmp_path / "run").states()] == ["state-0-0000-000000.pt", "state-0-0001-000000.pt"]
    run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_only_the_last_states_stay(tmp_path: Path) -> None:
    run(tmp_path / "run", options=engine.Options(keep=3, save_every=1))
    kept = [path.name for path in Run(tmp_path / "run").states()]
    assert kept == ["state-0-0002-000002.pt", "state-0-0002-000003.pt", "state-1-0000-000000.pt"]
    outcome = run(tmp_path / "run", resume=True, options=engine.Options(keep=3))
    assert outcome.rows == ()
    assert outcome.best_top1 == rows(tmp_path / "run")[-1]["best_top1"]


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with Run(tmp_path / "run"), pytest.raises(UsageError) as caught:
        run(tmp_path / "run")
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: another run is writing here; wait for it, or give another folder"
    )
    run(tmp_path / "run", "epochs=2")
    with pytest.raises(UsageError, match=r"run: holds a run already; --resume continues it, or give another folder$"):
        run(tmp_path / "run", "epochs=2")
    with pytest.raises(UsageError, match=r"none: holds no run to resume; start one without --resume$"):
        run(tmp_path / "none", resume=True)


def test_another_runs_state_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", "epochs=2")
    for changed, what in (
        ({"seed": 1}, r"seed was 0, is 1"),
        ({"dataset": toy(train=48)}, r"data was \w{12}…, is \w{12}…"),
        ({"network": tiny(conv=GatedConv2d)}, r"network was \w{12}…, is \w{12}…"),
    ):
        with pytest.raises(UsageError, match=rf"run\.json: belongs to another run \({what}.*; give the same arguments"):
            run(tmp_path / "run", "epochs=2", resume=True, **changed)
    with pytest.raises(UsageError, match=r"belongs to another run \(recipe was "):
        run(tmp_path / "run", "epochs=2", "optimizer.lr=0.2", resume=True)
    run(tmp_path / "other", "epochs=2", network=tiny(seed=4))
    for path in Run(tmp_path / "run").states():
        path.unlink()
    for path in Run(tmp_path / "other").states():
        shutil.copy(path, tmp_path / "run" / "checkpoints")
    with pytest.raises(UsageError, match=r"state-1-0000-000000\.pt: belongs to another run \(weights was "):
        run(tmp_path / "run", "epochs=2", resume=True)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping on NaN, and arguments that do not fit


def test_nan_stops_the_run_names_the_layer_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    network = tiny()

    def poison(progress: Progress) -> None:
        if (progress.epoch, progress.batch) == (2, 1):
            network.bn2.weight.data[0] = math.inf

    with pytest.raises(DivergedError) as caught:
        run(tmp_path / "run", network=network, on_step=poison, options=engine.Options(log_every=1))
    kept = tmp_path / "run" / "checkpoints" / "state-0-0001-000000.pt"
    assert str(caught.value) == (
        f"stage train, epoch 2, step 6: the loss is not finite; first in bn2.weight; the last good state is {kept}; "
        "try a lower optimizer.lr"
    )
    stored = torch.load(kept, weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.values())


def test_the_layer_whose_output_is_not_finite_is_named() -> None:
    network = tiny()
    network.stem.weight.data.fill_(3e38)
    assert health.finite(network)
    assert health.first_not_finite(network, torch.ones(2, 3, 8, 8)) == "the output of stem (Conv2d)"
    assert not health.finite(network)  # by now its BatchNorm has seen that output


def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
        (
            {"network": tiny(classes=7)},
            (),
            "the network has 7 outputs, the data set 4 classes; choose the data set that",
        ),
        (
            {},
            ("distillation.weight=0.5",),
            "recipe toy: stage train distils from the source network; name it with --te",
        ),
        (
            {"network": zoo.build("resnet20", 4)},
            ("kernels=float",),
            "recipe toy: stage train trains float kernels firs",
        ),
        (
            {},
            ("data=cifar10",),
            "recipe toy: is for cifar10, not for digits; choose another recipe, or --set data=digi",
        ),
        ({}, ("batch=65",), "batch 65: digits has only 64 training images; --set batch=64"),
        (
            {},
            ("augmentation=imagenet",),
            "augmentation imagenet: is not for digits; expected one of none, cifar (--set",
        ),
    ]
    for arguments, changes, message in cases:
        with pytest.raises(UsageError) as caught:
            run(tmp_path / "run", *changes, **arguments)
        assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Rep networks, other data, options


def made_result(path: Path) -> result.Result:
    src = source.from_checkpoint(str(CHECKPOINT))
    plan = surgery.plan(source.capture(src.model, src.origin), rules.load("reptran"))
    result.save(result.payload_of(src, plan, surgery.apply(plan), Certificate(()), slim=False), path)
    return result.open_result(path)


def trained_on(opened: result.Result, folder: Path, **more: Any) -> engine.Outcome:
    """An epoch of a Rep network on a few images of noise."""
    made = recipes.override(recipes.for_network(opened.origin), ["batch=16", "data=digits", "optimizer.lr=0.01"])
    return engine.finetune(
        opened.module, toy(train=32, test=16, classes=10, size=32), recipes.with_epochs(made, 1), folder, **more,
        package=lambda tensors, about: result.with_tensors(opened.payload, tensors, about),
    )  # fmt: skip


def test_a_rep_network_is_calibrated_trained_and_saved_as_a_result_again(tmp_path: Path) -> None:
    opened = made_result(tmp_path / "rep.repbnn.pt")
    teacher = source.from_checkpoint(str(CHECKPOINT)).model
    outcome = trained_on(opened, tmp_path / "run", prepare=Preparation(2), teacher=teacher)
    assert [(row["epoch"], row["step"]) for row in outcome.rows] == [(0, 0), (1, 2)]
    assert outcome.notes == ()
    trained = result.open_result(outcome.last)
    assert trained.payload["training"]["top1"] == outcome.top1
    assert trained.payload["training"]["recipe"] == "irnet-cifar10-resnet20"
    assert trained.payload["training"]["inherited"] == {"calibrated_batches": 2}
    assert trained.payload["source"]["accuracy"] == opened.payload["source"]["accuracy"]
    for name, tensor in opened.module.state_dict().items():
        assert torch.equal(trained.module.state_dict()[name], tensor)


def test_a_run_stopped_while_it_fits_inherited_weights_begins_again(tmp_path: Path) -> None:
    """And ends with the bits of one that nobody stopped; what the fit came to is in its networks."""
    first, second = (made_result(tmp_path / f"{name}.repbnn.pt") for name in ("first", "second"))
    steps = {"fit": 2, "images": 16}
    whole = trained_on(first, tmp_path / "whole", prepare=Preparation(1, first.plan, **steps))

    def stop(unit: Fitted) -> None:
        if unit.path == "layer1.1.conv2":
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = Preparation(1, second.plan, **steps, on_unit=stop)
    with pytest.raises(StoppedError, match=r"^stopped by SIGTERM before the first step; with --resume the command"):
        trained_on(second, tmp_path / "stopped", prepare=stopped)
    again = made_result(tmp_path / "again.repbnn.pt")
    resumed = trained_on(again, tmp_path / "stopped", prepare=Preparation(1, again.plan, **steps), resume=True)
    assert resumed.rows == whole.rows
    about = result.open_result(resumed.last).payload["training"]
    assert about == result.open_result(whole.last).payload["training"]
    assert (about["inherited"]["fit_steps"], about["inherited"]["fit_images"]) == (2, 16)
    assert len(about["inherited"]["fit"]) == 19
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor), name


def test_a_run_that_fails_in_its_preparation_leaves_the_folder_free(tmp_path: Path) -> None:
    opened = made_result(tmp_path / "rep.repbnn.pt")
    with pytest.raises(UsageError, match="takes two images at a time"):
        trained_on(opened, tmp_path / "run", prepare=Preparation(1, opened.plan, fit=1, images=1))
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"lock", "checkpoints"}
    assert trained_on(opened, tmp_path / "run", prepare=Preparation(1)).rows[-1]["epoch"] == 1


class Counting(Tiny):
    """Its own code counts forwards of training in a buffer that state dicts leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return super().forward(x) * (1 + self.seen / 10)


def test_buffers_that_state_dicts_leave_out_are_resumed_too(tmp_path: Path) -> None:
    def counting(seed: int) -> Counting:
        torch.manual_seed(seed)
        return Counting()

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.batch) == (2, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    whole = run(tmp_path / "whole", network=counting(0))
    with pytest.raises(StoppedError):
        run(tmp_path / "run", network=counting(0), on_step=stop, options=engine.Options(log_every=1))
    resumed = run(tmp_path / "run", network=counting(3), resume=True, options=engine.Options(log_every=1))
    assert resumed.rows == whole.rows[1:]


def test_a_float_stage_says_so_in_its_networks(tmp_path: Path) -> None:
    """What is measured before the first step is measured with float kernels, too."""
    still = recipes.loads(TEXT.replace("lr: 0.05", "lr: 1e-12") + "stages: {a: {kernels: float}}", "still.yaml")
    outcome = engine.finetune(tiny(), toy(), still, tmp_path / "run", prepare=Preparation(4))
    before, *_, after = outcome.rows
    assert before["epoch"] == 0
    assert before["test_loss"] == pytest.approx(after["test_loss"], rel=0.2)
    assert torch.load(outcome.best, weights_only=True)["kernels"] == "float"


def test_images_in_folders_are_a_feed_too(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for part, count in (("train", 6), ("val", 3)):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (40, 48, 3), generator=draw).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / part / label / f"{index}.png")
    text = train_examples.TEXT.replace("augmentation: cifar", "augmentation: imagenet-lighting")
    made = recipes.override(recipes.loads(text, "toy.yaml"), ["data=imagenet", "batch=4", "epochs=2"])
    folders, options = data.open_data(f"imagenet:{tmp_path}"), engine.Options(workers=0)
    outcome = engine.finetune(tiny(classes=2), folders, made, tmp_path / "run", options=options)
    assert [row["step"] for row in outcome.rows] == [3, 6]

    def stop(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    again = {"options": engine.Options(workers=0, log_every=1)}
    with pytest.raises(StoppedError, match="after step 1"):
        engine.finetune(tiny(classes=2), folders, made, tmp_path / "again", on_step=stop, **again)
    engine.finetune(tiny(classes=2), folders, made, tmp_path / "again", resume=True, **again)
    assert_same_run(tmp_path / "run", tmp_path / "again")


def test_a_network_of_one_channel_gets_grey_images_from_folders_and_from_memory(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for number, label in enumerate("ab"):
            (tmp_path / part / label).mkdir(parents=True)
            for index in range(2):
                pixels = np.full((40, 40), 60 * number + 20 * index, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{index}.png")
    changes = ["augmentation=none", "batch=2", "mean=[0.1, 0.2, 0.3]", "std=[0.5, 0.5, 0.5]"]
    for kind in ("folder", "imagenet"):
        wanted = [*changes, f"data={kind}", *(["augmentation=imagenet"] if kind == "imagenet" else [])]
        header = recipes.override(recipe(), wanted).header
        colours = data.open_data(f"{kind}:{tmp_path}")
        found, plain = (
            feeds.open_feed(which, header, seed=0, device=torch.device("cpu"), workers=0)
            for which in (colours.in_grey(), colours)
        )
        images, labels = (torch.cat(parts) for parts in zip(*found.test(), strict=True))
        size = 40 if kind == "folder" else 224
        assert images.shape == (4, 1, size, size)
        values = torch.tensor([0.0, 20, 60, 80]) / 255
        assert torch.allclose(images[:, 0, 0, 0], (values - 0.2) / 0.5, atol=1e-6)  # by the mean of the three means
        assert labels.tolist() == [0, 0, 1, 1]
        assert next(iter(found.train.epoch(0)))[0].shape == (2, 1, size, size)
        assert found.example.shape[1] == 1
        assert plain.example.shape[1] == 3


def test_images_that_cannot_be_read_are_named_to_whoever_listens(tmp_path: Path) -> None:
    for name, content in {"train/a/0.png": b"", "train/b/0.png": b"", "val/a/0.png": b"", "val/b/0.png": b""}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    header = recipes.override(recipe(), ["data=imagenet", "augmentation=imagenet", "batch=2"]).header
    said: list[str] = []
    with pytest.raises(DataError, match=r"the first test images, .*0\.png and the one after it, cannot be read"):
        feeds.open_feed(data.open_data(f"imagenet:{tmp_path}"), header, seed=0, device=torch.device("cpu"),
                        report=said.append)  # fmt: skip
    assert [line.split(": damaged image")[0].split("/val/")[1] for line in said] == ["a/0.png", "b/0.png"]


def test_positions_name_states_in_their_order(tmp_path: Path) -> None:
    with Run(tmp_path) as folder:
        for position in (Position(0, 9, 0), Position(0, 10, 5), Position(1, 0, 0)):
            folder.keep = 3
            folder.save(position, {}, {})
        assert [p.name for p in folder.states()] == [
            "state-0-0009-000000.pt", "state-0-0010-000005.pt", "state-1-0000-000000.pt",
        ]  # fmt: skip


def test_rep_networks_learn_with_their_binary_kind_untouched(tmp_path: Path) -> None:
    _, rep = transformed(zoo.build("recu_resnet20", 4).eval(), (3, 16, 16))
    outcome = run(
        tmp_path / "run", "binarization=recu", "epochs=1", "schedule.warmup=0", network=rep, dataset=toy(32, 8, 4, 16)
    )
    assert outcome.rows[0]["tau"] == pytest.approx(0.85)
    assert len(outcome.rows[0]["flips"]) == 18


def test_half_precision_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^stem.weight: is in float16, in which training loses the small steps"):
        run(tmp_path / "run", network=tiny().half())
    assert not (tmp_path / "run").exists()


class TwoHeads(Tiny):
    """A second head in training, whose loss is the training script's."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return [logits, logits * 2] if self.training else logits


def test_outputs_that_nothing_is_learned_from_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    torch.manual_seed(0)
    network = TwoHeads()
    before = {name: tensor.clone() for name, tensor in network.bn1.named_buffers()}
    text = "in training the network returns 2 tensors; the loss is that of the first"
    assert str(guards.check(network, None, recipe(), torch.randn(2, 3, 8, 8), 4)).startswith(text)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.bn1.named_buffers())
    run(tmp_path / "run", "epochs=2", network=network, on_note=said.append)
    assert any(note.startswith(text) for note in said)
    assert guards.check(tiny(), None, recipe(), torch.randn(2, 3, 8, 8), 4) is None
