"""The networks against what their original code computes: names, shapes, trainable parameters, logits."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_fill import example_input, fill
from torch import Tensor, nn

from repbnn_cli import zoo
from repbnn_cli.errors import UsageError
from repbnn_cli.layers import ThermometerEncoder

GOLDEN = Path(__file__).parent / "golden"
# The authors' hand-written Rep network is made by surgery, from rules; it is no network of the zoo.
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json") if not path.stem.startswith("rep_"))
WITHOUT_GOLDEN = {"fracbnn_resnet20_1bit", "resnet20", "resnet20_bireal"}
NEVER_CALLED = ("bn3.weight", "bn3.bias")  # in the ImageNet checkpoints of IR-Net and RBNN


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def filled(name: str) -> nn.Module:
    network = zoo.build(name)
    network.load_state_dict(fill(network.state_dict()))
    return network.eval()


def small_input(name: str) -> Tensor:
    """Two samples; ImageNet networks take any size, and 64 × 64 is enough to run every layer."""
    size = min(zoo.ARCHS[name].input_shape[1], 64)
    return example_input((2, 3, size, size), unit_range=zoo.ARCHS[name].unit_range)


def test_every_network_has_golden_logits() -> None:
    assert set(zoo.ARCHS) == set(NAMES) | WITHOUT_GOLDEN


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_the_published_one(name: str) -> None:
    expected = [
        (key, tuple(shape), dtype)
        for key, (shape, dtype) in golden(name)["tensors"].items()
        if not zoo.ARCHS[name].ignores(key)
    ]
    with torch.device("meta"):
        network = zoo.build(name)
    state = network.state_dict().items()
    assert [(key, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in state] == expected
    assert dict(zoo.signature(name)) == {key: shape for key, shape, _ in expected}
    assert [key for key, p in network.named_parameters() if p.requires_grad] == golden(name)["param_names"]
    assert sum(p.numel() for p in network.parameters()) == golden(name)["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_golden_ones(name: str) -> None:
    """max |Δ| ≤ 1e-4 × the largest |logit|, for each sample in one of three orders of summation.

    An activation within rounding error of zero has the sign that the order of summation gives it, one such sign
    changes logits by per cents, and the order depends on the processor: on one with AVX-512 the first attempt
    matches every network. Whatever the processor, a wrong operation matches in none of the three.
    """
    record = golden(name)
    network = filled(name)
    x = example_input(record["input_shape"], unit_range=record["unit_range"])
    expected = torch.tensor(record["logits"])
    tolerance = 1e-4 * expected.abs().max()
    matched = torch.zeros(len(x), dtype=torch.bool)
    for attempt in (_plain, _without_onednn, _in_float64):
        with torch.no_grad():
            logits = attempt(network, x)
        assert list(logits.shape) == record["logits_shape"]
        matched |= ((logits[:, :10] - expected).abs() <= tolerance).all(dim=1)
        if matched.all():
            return
    pytest.fail(f"{name}: samples that match no golden logits: {(~matched).nonzero().flatten().tolist()}")


def _plain(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)


def _without_onednn(network: nn.Module, x: Tensor) -> Tensor:
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        return network(x)


def _in_float64(network: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(network).double()(x.double())


@pytest.mark.parametrize("name", zoo.ARCHS)
def test_meta_build_takes_a_state_dict_and_eval_changes_nothing(name: str) -> None:
    network = zoo.build(name).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.device("meta"):
        restored = zoo.build(name)
    restored.load_state_dict(network.state_dict(), assign=True)
    x = small_input(name)
    with torch.no_grad():
        expected = network(x)
        network.train()
        network.eval()
        assert torch.equal(network(x), expected)
        assert torch.equal(restored.eval()(x), expected)
        assert network(x[:1]).shape == expected[:1].shape
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", zoo.ARCHS)
def test_every_trainable_parameter_learns(name: str) -> None:
    network = zoo.build(name)
    network(small_input(name)).square().mean().backward()
    without = [key for key, p in network.named_parameters() if p.grad is None]
    assert [key for key in without if key not in NEVER_CALLED] == []
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [name for name in zoo.ARCHS if zoo.ARCHS[name].data == "CIFAR-10"])
def test_runs_in_float64_with_other_classes(name: str) -> None:
    network = zoo.build(name, num_classes=7).double()
    logits = network(small_input(name).double())
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float64


def test_unknown_network_names_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"^unknown network 'irnet_resnet21'; nearest: irnet_resnet20, .*'repbnn zoo'$"
    ):
        zoo.build("irnet_resnet21")
    with pytest.raises(UsageError, match=r"^unknown network '§'; see 'repbnn zoo'$"):
        zoo.build("§")


def test_thermometer_code_of_every_8_bit_value() -> None:
    values = torch.arange(256)
    code = ThermometerEncoder()((values / 255).view(1, 1, 16, 16))
    assert code.shape == (1, 32, 16, 16)
    assert set(code.unique().tolist()) == {-1.0, 1.0}
    lit = (code > 0).sum(dim=1).flatten()
    assert (lit.diff() >= 0).all()
    assert torch.equal(lit.float(), torch.round(values / 255 * 255 / 8))
    # A thermometer: no plane is lit above one that is not.
    assert (code.diff(dim=1) <= 0).all()
