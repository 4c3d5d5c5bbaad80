"""Reading checkpoints: what people have, what is not one, and what would like to run code."""

from __future__ import annotations

import argparse
import pathlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_examples import refusal, same, state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from repbnn_cli import checkpoint
from repbnn_cli.checkpoint import PREFIXES, check_finite, load
from repbnn_cli.errors import CheckpointError

SAMPLE = Path(__file__).parent.parent / "checkpoints" / "irnet_resnet20_cifar10.pth"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 3)


# -- the sample ------------------------------------------------------------------------------------------------------


def test_the_sample() -> None:
    ckpt = load(SAMPLE)
    assert (ckpt.format, ckpt.container, ckpt.prefix, ckpt.notes) == ("torch", "state_dict", "module.", ())
    assert len(ckpt.tensors) == 121
    assert next(iter(ckpt.tensors)) == "conv1.weight"
    assert ckpt.metadata == {"epoch": 14, "best_prec1": 62.35}
    assert ckpt.accuracy == (62.35, "best_prec1")
    assert ckpt.dtypes == {"float32": 101, "int64": 20}
    assert ckpt.sha256 == "d70f334b4387c6f15133dcefb1d55f10f12528f417376b2307b77130d5b484d2"
    assert ckpt.size_bytes == SAMPLE.stat().st_size
    assert ckpt.payload is None
    check_finite(ckpt.tensors, SAMPLE)


def test_zip_files_are_mapped_and_writing_to_them_stays_private(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(state(), path)
    before = path.read_bytes()
    tensor = load(path).tensors["conv1.weight"]
    assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
    tensor.add_(1)
    assert path.read_bytes() == before


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.th", "a.tar", "a.pth.tar", "a.ckpt", "a", "a.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_formats_under_any_name(tmp_path: Path, name: str, legacy: bool) -> None:
    path = tmp_path / name
    torch.save({"state_dict": state()}, path, _use_new_zipfile_serialization=not legacy)
    ckpt = load(path)
    assert ckpt.format == ("torch-legacy" if legacy else "torch")
    same(ckpt.tensors, state())


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    half = {"module.w": torch.ones(3, dtype=torch.bfloat16), "module.b": torch.tensor(2)}
    save_file(half, path, metadata={"format": "pt", "best_acc1": "71.5", "arch": "resnet20"})
    ckpt = load(path)
    assert (ckpt.format, ckpt.prefix, ckpt.container) == ("safetensors", "module.", "")
    assert ckpt.metadata == {"best_acc1": "71.5", "arch": "resnet20"}
    assert ckpt.accuracy == (71.5, "best_acc1")
    assert set(ckpt.tensors) == {"w", "b"}
    assert ckpt.tensors["w"].dtype == torch.bfloat16
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in ckpt.tensors.values())


@pytest.mark.parametrize("container", checkpoint.CONTAINERS)
def test_containers(tmp_path: Path, container: str) -> None:
    path = tmp_path / "a.pt"
    torch.save({"epoch": 3, container: state("module.")}, path)
    ckpt = load(path)
    assert ckpt.container == container
    assert ckpt.metadata == {"epoch": 3}
    same(ckpt.tensors, state())


def test_nested_containers_and_metadata_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"epoch": 9, "model": {"epoch": 8, "best_acc": 0.5, "state_dict": state()}}, path)
    ckpt = load(path)
    assert ckpt.container == "model.state_dict"
    assert ckpt.metadata == {"epoch": 9, "best_acc": 0.5}
    assert ckpt.accuracy == (50.0, "best_acc")


def test_documented_order_and_key(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    averaged = {name: tensor + 1 for name, tensor in state().items()}
    torch.save({"ema": {"module": averaged}, "model": state(), "other": averaged}, path)
    ckpt = load(path)
    assert ckpt.container == "model"
    assert "also found ema.module; choose it with --key ema.module" in ckpt.notes
    assert any(note.startswith("ignored other:") for note in ckpt.notes)
    for key in ("ema.module", "ema"):  # the one network in it
        assert torch.equal(load(path, key=key).tensors["bn1.weight"], torch.full((2,), 2.0))
        assert load(path, key=key).container == "ema.module"
    assert load(path, key="other").container == "other"
    assert "nothing is not in the file; possible here: model, ema.module, other" in refusal(path, key="nothing")


def test_a_key_may_be_what_the_names_begin_with(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {**state("net.model."), "train_acc.tp": torch.zeros(1)}, "epoch": 3}, path)
    for key in ("net", "state_dict.net", "net.model"):
        ckpt = load(path, key=key)
        same(ckpt.tensors, state())
        assert (ckpt.container, ckpt.prefix, ckpt.metadata) == ("state_dict", "net.model.", {"epoch": 3})
        assert f"took the tensors under {key.removeprefix('state_dict.')}, left out train_acc.tp" in ckpt.notes
    assert "nett is not in the file; possible here: state_dict, net, train_acc" in refusal(path, key="nett")
    torch.save(state("encoder."), path)
    same(load(path, key="encoder").tensors, state())


def test_a_name_of_the_authors_own(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"binary_net": state(), "losses": {"a": torch.tensor(1.0)}, "step": 1}, path)
    assert load(path).container == "binary_net"
    torch.save({"generator": state(), "critic": state()}, path)
    assert "2 entries could be the network (generator, critic); choose with --key" in refusal(path)


def test_a_bare_state_dict_and_odd_entries(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(OrderedDict(state(), extra=[1, 2], version=3), path)
    ckpt = load(path)
    same(ckpt.tensors, state())
    assert ckpt.metadata == {"extra": [1, 2], "version": 3}
    torch.save({"state_dict": {**state(), "layer._extra_state": {"scale": 2}}}, path)
    assert "ignored state_dict[layer._extra_state]: a dictionary of 1 × int" in load(path).notes


def test_optimizer_state_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    net = Net()
    adam = torch.optim.Adam(net.parameters())
    net.conv1.weight.sum().backward()
    adam.step()
    torch.save({"state_dict": net.state_dict(), "optimizer": adam.state_dict(), "adam": adam.state_dict()}, path)
    ckpt = load(path)
    assert "ignored optimizer: optimizer state" in ckpt.notes
    assert "ignored adam: optimizer state" in ckpt.notes
    assert ckpt.metadata == {}
    assert not any(tensor.requires_grad for tensor in ckpt.tensors.values())


def test_parameters_come_detached(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": nn.Parameter(torch.ones(2)), "b": torch.ones(2, requires_grad=True)}, path)
    tensors = load(path).tensors.values()
    assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in tensors)


# -- prefixes ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(PREFIXES), max_size=4))
@settings(max_examples=30, deadline=None)
def test_any_stack_of_prefixes_comes_off(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "prefix.pt"
    torch.save({"state_dict": state("".join(parts))}, path)
    ckpt = load(path)
    assert ckpt.prefix == "".join(parts)
    same(ckpt.tensors, state())


def test_a_prefix_that_not_all_share_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    tensors = {"img_mean": torch.ones(3), "model.0.weight": torch.ones(2, 2), "fc.bias": torch.ones(1)}
    torch.save(tensors, path)
    assert load(path).prefix == ""
    same(load(path).tensors, tensors)
    torch.save({"model.": torch.ones(1)}, path)
    assert list(load(path).tensors) == ["model."]


def test_compiled_submodules_and_averaged_models(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a._orig_mod.weight": torch.ones(1), "b.weight": torch.ones(1)}, path)
    ckpt = load(path)
    assert list(ckpt.tensors) == ["a.weight", "b.weight"]
    assert ckpt.notes == ("_orig_mod (torch.compile) taken out of 1 names",)
    torch.save({"n_averaged": torch.tensor(3), **state("module.")}, path)
    ckpt = load(path)
    assert ckpt.prefix == "module."
    same(ckpt.tensors, state())


# -- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"best_prec1": 62.35}, (62.35, "best_prec1")),
        ({"best_prec1": torch.tensor(62.5)}, (62.5, "best_prec1")),
        ({"best_top1_acc": torch.tensor([70.5], dtype=torch.float64)}, (70.5, "best_top1_acc")),
        ({"best_acc": np.float64(91.25)}, (91.25, "best_acc")),
        ({"best_acc": np.float32(0.75)}, (75.0, "best_acc")),
        ({"acc": 0.5, "best_acc1": 61}, (61.0, "best_acc1")),
        ({"best_prec1": 0, "acc": 12.5}, (12.5, "acc")),
        ({"Best_Acc": 50.0}, (50.0, "Best_Acc")),
        ({"best_prec1": float("nan")}, None),
        ({"best_prec1": 900.0}, None),
        ({"best_prec1": True}, None),
        ({"best_prec1": "unknown"}, None),
        ({"epoch": 3}, None),
    ],
)
def test_accuracy(tmp_path: Path, metadata: dict[str, object], expected: object) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state_dict": state(), **metadata}, path)
    assert load(path).accuracy == expected


def test_harmless_objects_beside_the_weights_become_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    arguments = argparse.Namespace(arch="resnet20", lr=0.1, steps=[1, 2], out=pathlib.PurePosixPath("/data/run"))
    beside = {
        "args": arguments,
        "best": np.int64(5),
        "flag": np.bool_(True),
        "big_endian": np.array(2.5, dtype=">f4")[()],
        "one": np.array([1.5]),
        "rng": np.arange(6.0).reshape(2, 3),
        "none": None,
    }
    torch.save({"state_dict": state(), **beside}, path)
    expected = {
        "args": {"arch": "resnet20", "lr": 0.1, "steps": [1, 2], "out": "/data/run"},
        "best": 5,
        "flag": True,
        "big_endian": 2.5,
        "one": 1.5,
        "none": None,
    }
    ckpt = load(path)
    assert ckpt.metadata == expected
    assert ckpt.notes == ("ignored rng: a NumPy array",)
    assert all(type(value) in (dict, int, bool, float, type(None)) for value in ckpt.metadata.values())
    trusted = load(path, unsafe=True)
    assert {**trusted.metadata, "args": {}} == {**expected, "args": {}}


def test_numpy_objects_are_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    objects = {"best": np.array([{"a": 1}], dtype=object), "day": np.datetime64("2024-01-01")}
    torch.save({"state_dict": state(), **objects}, path)
    ckpt = load(path)
    assert ckpt.metadata == {}
    assert ckpt.notes == ("ignored best: a NumPy array", "ignored day: a NumPy array")


# -- values -----------------------------------------------------------------------------------------------------------


def test_half_precision_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2).half(), "b": torch.ones(2).half(), "c": torch.ones(2).bfloat16()}, path)
    ckpt = load(path)
    assert ckpt.dtypes == {"float16": 2, "bfloat16": 1}
    check_finite(ckpt.tensors)


def test_check_finite() -> None:
    tensors = {name: torch.ones(4) for name in "abcdef"}
    tensors["huge"] = torch.full((4,), 3e38)
    tensors["half"] = torch.full((400,), 60000.0, dtype=torch.float16)
    tensors["count"] = torch.tensor(3)
    check_finite(tensors)
    for name in "bcde":
        tensors[name][1] = float("nan")
    tensors["b"][0] = float("inf")
    with pytest.raises(CheckpointError) as caught:
        check_finite(tensors, "x.pt")
    assert str(caught.value) == (
        "x.pt: NaN or infinity in b (2 of 4 values), c (1 of 4 values), d (1 of 4 values) and 1 more tensors; "
        "the training diverged or the file is damaged, take an earlier one"
    )


def test_infinities_that_cancel_are_seen() -> None:
    with pytest.raises(CheckpointError, match=r"^NaN or infinity in w \(2 of 2 values\)"):
        check_finite({"w": torch.tensor([float("inf"), float("-inf")])})
