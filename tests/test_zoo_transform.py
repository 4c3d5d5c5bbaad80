"""Every network of the zoo, transformed: β = 1 changes nothing, β > 1 is what the merged-kernel identity says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden_fill import example_input
from merged_reference import assert_identical, both
from networks import outcome, planned, randomize
from torch import Tensor, nn

from repbnn_cli import surgery, verify, zoo
from repbnn_cli.rep_layers import ChannelSelect, RepBconv2d, Repeat, RepMixin

FLOAT = {"resnet20", "resnet20_bireal"}
TWO_BRANCHES = {"reactnet_a", "adambnn_reactnet_a"}


def network(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(zoo.build(name), seed).to(dtype)


def size(name: str) -> int:
    """Small images; VGG-small needs its 32, and one network of each ImageNet family gets what leaves its last
    convolutions more than one position."""
    if zoo.ARCHS[name].data == "CIFAR-10":
        return 32 if "vgg" in name else 16
    return 64 if name in ("irnet_imagenet_resnet18", "birealnet18", "adambnn_reactnet_a") else 32


def rules_for(name: str) -> str:
    return "full-precision" if name in FLOAT else "reptran"


def example(name: str, batch: int = 2) -> Tensor:
    return example_input((batch, 3, size(name), size(name)), unit_range=zoo.ARCHS[name].unit_range)


def same(a: Any, b: Any) -> None:
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", zoo.ARCHS)
def test_beta_1_is_the_identity_in_outputs_and_gradients(name: str) -> None:
    model = network(name)
    plan = planned(model, (3, size(name), size(name)), rules_for(name), beta=1)
    assert plan.edits == ()
    rep = surgery.apply(plan)
    assert list(rep.state_dict()) == list(model.state_dict())
    x = example(name)
    for train in (True, False) if "34" not in name else (True,):
        (outs, grads, buffers), (rep_outs, rep_grads, rep_buffers) = (
            outcome(m, m, (x,), train=train) for m in (model, rep)
        )
        same(outs, rep_outs)
        same(buffers.values(), rep_buffers.values())
        assert list(grads) == list(rep_grads)
        for key, grad in grads.items():
            assert (grad is None) == (rep_grads[key] is None)
            assert grad is None or torch.equal(grad, rep_grads[key])
        assert sum(g is not None and bool(g.abs().max() > 0) for g in grads.values()) > 0.9 * len(grads)


@pytest.mark.parametrize("name", zoo.ARCHS)
def test_beta_2(name: str) -> None:
    """Certificate, shapes, costs, names, and the merged-kernel identity of the whole network in float64."""
    model = network(name)
    state = {key: (t, t.data_ptr(), t.clone()) for key, t in model.state_dict().items()}
    plan = planned(model, (3, size(name), size(name)), rules_for(name))
    rep = surgery.apply(plan)
    x = example(name, 1)
    certificate = verify.verify(model, plan, rep, gradients=False, batch=1)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    for key, (_, pointer, values) in state.items():
        assert model.state_dict()[key].data_ptr() == pointer
        assert torch.equal(model.state_dict()[key], values)
    check_shapes(model, rep)
    if "34" in name or name == "reactnet_a":  # more of what ResNet-18 has; the network of adambnn_reactnet_a
        return
    actual, expected, index = both(model, rep, x)
    assert_identical(actual, expected)
    check_channel_maps(name, index)


def check_shapes(model: nn.Module, rep: nn.Module, beta: int = 2) -> None:
    """RepTran, section 4, read off the tensors."""
    source, own = dict(model.named_modules()), dict(rep.named_modules())
    assert list(rep.state_dict()) == list(model.state_dict())
    repeating = 0
    for path, module in source.items():
        other = own[path]
        if isinstance(other, RepMixin):
            repeating += 1
            before, after = (m.weights if hasattr(m, "weights") else m.weight for m in (module, other))
            assert before.numel() == after.numel()
            assert before.ndim == after.ndim
            assert (other.out_channels, other.in_channels) == (module.out_channels // beta, module.in_channels * beta)
            assert (other.stride, other.padding, other.kernel_size) == (
                module.stride,
                module.padding,
                module.kernel_size,
            )
            assert isinstance(other, RepBconv2d) == (not isinstance(module, nn.Conv2d))
            if hasattr(module, "alpha"):
                assert tuple(other.alpha.shape) == (module.out_channels // beta, 1, 1)
            if hasattr(module, "R1"):
                assert other.R1.shape[0] * other.R2.shape[0] == module.in_channels * beta * module.kernel_size[0] ** 2
                for rotation in (other.R1, other.R2):
                    assert torch.allclose(rotation @ rotation.t(), torch.eye(len(rotation)), atol=1e-4)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.PReLU) and not path.endswith("bn3"):
            assert other.weight.numel() == beta * module.weight.numel()
    assert repeating > 4
    heads = [m for m in source.values() if isinstance(m, nn.Linear)]
    assert len(heads) == 1
    (path,) = (p for p, m in source.items() if isinstance(m, nn.Linear))
    assert tuple(own[path].weight.shape) == (heads[0].out_features, beta * heads[0].in_features)


def check_channel_maps(name: str, index: dict[str, list[int]]) -> None:
    """Every source channel β times; plain tiles, except where two branches are concatenated: [A A B B]."""
    for path, channels in index.items():
        count = max(channels) + 1
        if path in ("fc", "linear") and "vgg" in name:  # channels × 4 × 4 positions
            assert channels == [*range(count), *range(count)]
        elif name in TWO_BRANCHES:
            assert sorted(channels) == sorted([*range(count)] * 2)
        else:
            assert channels == [j % count for j in range(2 * count)], path


@pytest.mark.parametrize("name", [n for n, a in zoo.ARCHS.items() if a.network.startswith("ResNet-20")])
@pytest.mark.parametrize("beta", [4, 8])
def test_larger_beta(name: str, beta: int) -> None:
    model = network(name)
    plan = planned(model, (3, 16, 16), rules_for(name), beta=beta)
    rep = surgery.apply(plan)
    certificate = verify.verify(model, plan, rep, gradients=False, batch=1)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    check_shapes(model, rep, beta)
    actual, expected, index = both(model, rep, example(name, 1))
    assert_identical(actual, expected)
    for path, channels in index.items():
        count = max(channels) + 1
        assert channels == [*range(count)] * beta, path


def test_concatenations_cost_one_reordering_each() -> None:
    """Behind a widening block of ReActNet the replicas lie as [A A B B]; the next sum brings them back, for good."""
    model = network("adambnn_reactnet_a")
    plan = planned(model, (3, 32, 32))
    assert [type(m) for m in plan.added.values()] == [ChannelSelect] * 5
    released = planned(model, (3, 32, 32), "reptran-released")
    assert [type(m) for m in released.added.values()] == [Repeat]
    (note,) = released.notes
    assert "28 sums" in note
    assert "align: position" in note
    certificate = verify.verify(model, released, surgery.apply(released), gradients=False, batch=1)
    assert certificate.passed
    assert certificate.checks[-1].values["by_position"] == 28


KINDS = {
    "irnet_resnet20": "IR-Net",
    "rbnn_resnet20_bireal": "RBNN",
    "recu_resnet20": "ReCU",
    "fracbnn_resnet20": "gated",
    "resnet20_bireal": "float",
}
WAYS = ("all", "1_over_beta", "1_over_beta2")


@pytest.mark.parametrize("name", KINDS, ids=KINDS.values())
@pytest.mark.parametrize("inherit", ["fold", "reshape", "none"])
@pytest.mark.parametrize("last_layer", WAYS)
def test_every_way_of_inheriting_and_every_last_layer(name: str, inherit: str, last_layer: str) -> None:
    model = network(name)
    plan = planned(model, (3, 16, 16), rules_for(name), inherit=inherit, last_layer=last_layer)
    fresh = inherit == "none"
    rep = surgery.apply(plan, fresh=zoo.build(name).state_dict() if fresh else None)
    certificate = verify.verify(model, plan, rep, gradients=False, batch=1)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    if fresh and last_layer == "all":
        head = rep.linear.weight
        assert not torch.equal(head[:, :64], head[:, 64:])  # fresh values, nothing tiled
        return
    if fresh and name == "fracbnn_resnet20":
        # Fresh shifts are 0, so that activations lie on the steps of the quantiser, where rounding decides.
        return
    actual, expected, _ = both(model, rep, example(name, 1), fresh=fresh)
    assert_identical(actual, expected)


@pytest.mark.parametrize("name", ["irnet_resnet20", "recu_resnet20", "rbnn_resnet20"])
@pytest.mark.parametrize("inherit", ["fold", "reshape"])
def test_batch_norm_before_the_repeat(name: str, inherit: str) -> None:
    model = network(name)
    plan = planned(model, (3, 16, 16), "bn-before-repeat", inherit=inherit)
    rep = surgery.apply(plan)
    certificate = verify.verify(model, plan, rep, gradients=False, batch=1)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    assert rep.layer1.get_submodule("0").bn1.weight.shape == (8,)
    assert rep.bn1.weight.shape == (32,)  # the first layer is no RepConv
    actual, expected, _ = both(model, rep, example(name, 1))
    assert_identical(actual, expected)


@pytest.mark.parametrize("last_layer", WAYS[1:])
@pytest.mark.parametrize("name", ["irnet_vgg_small", "adambnn_reactnet_a"])
def test_last_layers_behind_a_flatten_and_a_concatenation(name: str, last_layer: str) -> None:
    model = network(name)
    plan = planned(model, (3, 32, 32), last_layer=last_layer)
    rep = surgery.apply(plan)
    actual, expected, index = both(model, rep, example_input((1, 3, 32, 32), unit_range=False))
    assert_identical(actual, expected)
    taken = index["fc"]
    source = model.fc.in_features
    assert len(set(taken)) == len(taken) == (source if last_layer == "1_over_beta" else source // 2)


@pytest.mark.parametrize("name", [*KINDS, "rbnn_resnet20"])
@pytest.mark.parametrize("rule", ["reptran", "bn-before-repeat"])
def test_the_identity_holds_in_training_mode(name: str, rule: str) -> None:
    """The copies have the same batch statistics, too."""
    model = network(name)
    rep = surgery.apply(planned(model, (3, 16, 16), rule))
    actual, expected, _ = both(model, rep, example(name, 4), train=True)
    assert_identical(actual, expected)


def test_transform_in_float64_stays_in_float64() -> None:
    model = network("irnet_resnet20", torch.float64)
    plan = planned(model, (3, 16, 16))
    rep = surgery.apply(plan)
    assert {t.dtype for t in rep.state_dict().values()} == {torch.float64, torch.int64}
    certificate = verify.verify(model, plan, rep, gradients=True)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    actual, expected, _ = both(model, rep, example("irnet_resnet20"))
    assert_identical(actual, expected)


def test_certificate_of_foreign_and_own_networks_compares_gradients() -> None:
    model = network("irnet_resnet20")
    plan = planned(model, (3, 16, 16))
    rep = surgery.apply(plan)
    names = [c.name for c in verify.verify(model, plan, rep, gradients=True).checks]
    assert names[:2] == ["captured = source", "captured learns as source"]
    modes = [m.training for m in plan.network.module.modules()]
    assert not any(modes)
    assert not any(m.training for m in rep.modules())
    assert not any(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["fracbnn_resnet20", "rbnn_resnet20", "reactnet_resnet18"])
def test_nothing_trained_is_left_without_inheriting(name: str) -> None:
    """Two trainings of the same network give the same fresh Rep network."""
    shape = (3, size(name), size(name))
    torch.manual_seed(3)
    fresh = zoo.build(name).state_dict()
    plans = [planned(network(name, seed=seed), shape, inherit="none") for seed in (1, 2)]
    made = [surgery.apply(plan, fresh=fresh) for plan in plans]
    for (key, a), b in zip(made[0].state_dict().items(), made[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_rep_network_copies_are_independent() -> None:
    plan = planned(network("irnet_resnet20"), (3, 16, 16))
    one, two = surgery.apply(plan), surgery.apply(plan)
    same(one.state_dict().values(), two.state_dict().values())
    assert not {t.data_ptr() for t in one.state_dict().values()} & {t.data_ptr() for t in two.state_dict().values()}
    copied = copy.deepcopy(one)
    x = example("irnet_resnet20")
    with torch.no_grad():
        expected = one(x)
        for p in one.parameters():
            p.zero_()
        assert torch.equal(copied(x), expected)
