"""A compiled training step: when a run gets one, that it computes the same, and resumes to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_engine import assert_same_run, rows
from torch import nn
from torch._inductor.utils import run_and_get_code
from train_examples import recipe, run, tiny, toy

from repbnn_cli.errors import StoppedError, UsageError
from repbnn_cli.train import compiled, engine, feeds

CPU = torch.device("cpu")


def forward_of(network: nn.Module, mode: str, *changes: str, processes: int = 1, size: int = 8) -> compiled.Forward:
    made = recipe(*changes)
    feed = feeds.open_feed(toy(size=size), made.header, seed=0, device=CPU)
    return compiled.forward_of(network, mode, feed, made, processes)


@pytest.mark.parametrize(
    ("mode", "changes", "processes", "note"),
    [
        ("off", (), 1, "asked for"),
        ("auto", (), 1, "the run is too short to repay it; --compile on does it all the same"),
        ("auto", ("epochs=1000000",), 2, compiled.TALK),
    ],
)
def test_what_keeps_a_run_from_being_compiled_is_said(
    mode: str, changes: tuple[str, ...], processes: int, note: str
) -> None:
    network = tiny()
    found = forward_of(network, mode, *changes, processes=processes)
    assert (found.call, found.compiled) == (network, False)
    assert found.note == f"training step not compiled: {note}"


def test_modes_that_do_not_exist_and_several_processes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--compile: unknown value 'yes'; expected one of auto, on, off"):
        forward_of(tiny(), "yes")
    with pytest.raises(
        UsageError, match=r"--compile on: BatchNorms of several processes talk .*; expected one process"
    ):
        forward_of(tiny(), "on", processes=2)


def test_a_machine_without_a_compiler_trains_as_it_did_and_says_the_reason() -> None:
    """64 images of 8 × 8 in so many epochs are beyond the threshold, so that auto tries."""
    network = tiny().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random = torch.get_rng_state()
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}):
        found = forward_of(network, "auto", "epochs=1000000")
        with pytest.raises(UsageError, match=r"cannot be compiled here: .*; --compile off does without"):
            forward_of(network, "on")
    assert (found.call, found.compiled) == (network, False)
    assert found.note.startswith("training step not compiled: ")
    assert "ompiler" in found.note
    assert "\n" not in found.note
    assert not network.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_compiled_run_learns_what_an_eager_one_does_and_is_resumed_to_the_last_bit(tmp_path: Path) -> None:
    """t and k change every epoch: a compiled step that had frozen them would not follow the eager run's losses."""
    options = engine.Options(compile="on")
    said: list[str] = []
    run(tmp_path / "eager", "augmentation=none")
    run(tmp_path / "whole", "augmentation=none", options=options, on_note=said.append)
    assert said == ["training step compiled by torch.compile"]
    # Dropout draws other numbers when compiled; everything else is the same to rounding.
    eager, whole = (rows(tmp_path / name) for name in ("eager", "whole"))
    assert [row["lr"] for row in eager] == [row["lr"] for row in whole]
    assert all(abs(a["loss"] - b["loss"]) < 0.1 for a, b in zip(eager, whole, strict=True))

    def stop(row: Any) -> None:
        if row["epoch"] == 2:
            raise StoppedError("in a test", 15)

    with pytest.raises(StoppedError):
        run(tmp_path / "parts", "augmentation=none", options=options, on_epoch=stop)
    run(tmp_path / "parts", "augmentation=none", options=options, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UsageError, match=r"compiled was True, is False"):
        run(tmp_path / "parts", "augmentation=none", resume=True)


def test_compiled_gradients_are_the_eager_ones_in_float64() -> None:
    """Of every parameter, at two values of the schedule, so that a stale one would show."""
    network = tiny().double()
    network.drop.p = 0.0
    images, labels = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 4
    call = torch.compile(network, dynamic=False)
    for t, k in ((0.05, 20.0), (3.0, 1.0)):
        network.conv.t.fill_(t)
        network.conv.k.fill_(k)
        found = []
        for forward in (network, call):
            network.zero_grad()
            F.cross_entropy(forward(images), labels).backward()
            found.append({name: p.grad.clone() for name, p in network.named_parameters()})
        eager, other = found
        for name, gradient in eager.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_an_evaluation_is_compiled_for_batches_of_one_size() -> None:
    network = tiny().eval()
    images = torch.randn(6, 3, 8, 8)
    found = compiled.inference_of(network, "on", images, 6)
    assert found.note == "network compiled by torch.compile"
    with torch.no_grad():
        torch.testing.assert_close(found.call(images), network(images))
        assert torch.equal(found.call(images[:5]), network(images[:5]))
    assert not network.training
    too_few = compiled.inference_of(network, "auto", images, 6)
    assert too_few.note == "network not compiled: the run is too short to repay it; --compile on does it all the same"


def test_hardtanhs_mask_is_no_boolean_on_a_cpu_and_its_gradient_the_same() -> None:
    """At the bounds, too, where the gradient is 0; behind a product the mask alone is kept for the backward."""
    unit = torch.eye(64)
    x = torch.cat([torch.linspace(-1, 3, 4094), torch.tensor([0.5, 2.0])]).view(64, 64).requires_grad_()

    def gradient(forward: Any) -> torch.Tensor:
        (found,) = torch.autograd.grad(forward(x).sum(), x)
        return found

    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.hardtanh(x @ unit, 0.5, 2.0)

    torch._dynamo.reset()
    with compiled.float_masks():
        found, code = run_and_get_code(gradient, torch.compile(forward, dynamic=False))
    assert torch.equal(found, gradient(forward))
    assert not any("bool*" in part for part in code), "a mask of booleans is kept"
