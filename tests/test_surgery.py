"""What a transform makes of a network: values carried over, what is kept, what rules change, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import released_network
import torch
from golden_fill import example_input, fill
from merged_reference import assert_identical, both
from networks import BinaryConv, Body, Residual, conv, images, planned, randomize, rule_set, transformed
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import graph, surgery, verify, zoo
from repbnn_cli.binary_conv import SignConv2d
from repbnn_cli.errors import SurgeryError
from repbnn_cli.inherit import Kernel, Members
from repbnn_cli.rep_layers import RepBatchNorm1d, RepBatchNorm2d, RepConv2d, RepMixin


def residual(**options: Any) -> Residual:
    torch.manual_seed(0)
    return randomize(Residual(**options))  # type: ignore[return-value]


def checked(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """The transform of `model`, verified by the tool and by the second implementation."""
    plan, rep = transformed(model, *args, **options)
    certificate = verify.verify(model, plan, rep, gradients=True)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    actual, expected, _ = both(model, rep, images(dtype=torch.float64))
    assert_identical(actual, expected)
    return rep


# ---------------------------------------------------------------------------------------------------------------------
# How kernels are filled


def test_fold_table() -> None:
    """Convolution channel o serves o, o + O/β, ...: channel j of the stream is convolution channel j mod O/β."""
    assert Members(8, 2, "fold").table().tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert Members(8, 4, "fold").table().tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert Members(8, 2, "reshape").table().tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert Members(8, 2, "fold", groups=2).table().tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize("beta", [2, 4, 8])
def test_fold_gives_each_channel_the_sum_of_the_filters_that_share_it(beta: int) -> None:
    model = residual()
    rep = transformed(model, beta=beta)[1]
    for name in ("conv1", "conv2", "shortcut"):
        source, own = model.get_submodule(name).weight, rep.get_submodule(name).weight
        out, into = source.shape[:2]
        assert tuple(own.shape[:2]) == (out // beta, into * beta)
        for o in range(out // beta):
            for b in range(beta):  # input replica b of channel i is column b·I + i
                assert torch.equal(own[o, b * into : (b + 1) * into], source[o + b * (out // beta)])


@pytest.mark.parametrize("beta", [2, 4])
def test_reshape_is_the_literal_reshape(beta: int) -> None:
    model = residual()
    rep = transformed(model, beta=beta, inherit="reshape")[1]
    for name in ("conv1", "conv2", "shortcut"):
        source, own = model.get_submodule(name).weight, rep.get_submodule(name).weight
        assert torch.equal(own, source.reshape(source.shape[0] // beta, source.shape[1] * beta, *source.shape[2:]))


def new(seed: int = 1) -> Residual:
    torch.manual_seed(seed)
    return Residual().eval()


def test_none_starts_as_a_new_source_does_and_always_the_same() -> None:
    """Whatever was trained; kernels at the scale of their own fan-in, as torch's initialisation draws them."""
    fresh = new().state_dict()
    one = surgery.apply(planned(residual(), inherit="none"), fresh=fresh)
    plan = planned(new(seed=5), inherit="none")
    before = torch.get_rng_state()
    two = surgery.apply(plan, fresh=fresh)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(one.stem.weight, fresh["stem.weight"])  # is not resized
    for name in ("conv1", "shortcut", "fc"):
        own, source = one.get_submodule(name).weight.detach(), fresh[f"{name}.weight"]
        growth = own[0].numel() / source[0].numel()
        bound = own[0].numel() ** -0.5
        assert bound / 2 < float(own.abs().max()) <= bound
        drawn, whole = own.flatten() * growth**0.5, source.flatten().repeat(own.numel() // source.numel())
        torch.testing.assert_close(drawn.sort().values, whole.sort().values)
        assert not torch.allclose(drawn, whole)  # shuffled
    other = surgery.apply(planned(residual(), inherit="none"), fresh=fresh, seed=1)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    equal = Body(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), conv(8, 8), nn.BatchNorm2d(8)))
    with torch.no_grad():
        equal.body[2].weight.copy_(equal.body[0].weight)
    first, _, second, _ = transformed(equal, inherit="none")[1].body.children()
    assert not torch.equal(first.weight, second.weight)
    for norm in (one.bn, one.bn1):
        assert norm.weight.eq(1).all()
        assert norm.bias.eq(0).all()
        assert norm.running_mean.eq(0).all()
        assert norm.running_var.eq(1).all()
    assert one.act.weight.eq(0.25).all()


@pytest.mark.parametrize("kind", [nn.Conv2d, BinaryConv])
def test_none_starts_the_copies_of_a_depthwise_filter_alike(kind: type[nn.Conv2d]) -> None:
    model = randomize(Body(nn.Sequential(kind(8, 8, 3, groups=8), nn.BatchNorm2d(8), conv(8, 8), nn.BatchNorm2d(8))))
    plan, rep = transformed(model, inherit="none")
    own, source = rep.get_submodule("body.0").weight.detach(), model.body[0].weight.detach()
    assert torch.equal(own[:8], own[8:])
    assert not torch.equal(own[:8], source)  # shuffled
    assert torch.equal(own[:8].flatten().sort().values, source.flatten().sort().values)
    assert verify.verify(model, plan, rep, gradients=True).passed
    with torch.no_grad():
        own[3] = own[4]
    failed = [c.values["failed"] for c in verify.verify(model, plan, rep, gradients=True).checks if not c.passed]
    assert failed == [["body.0"]]


def test_none_keeps_the_initialisation_that_the_source_chose() -> None:
    """Kaiming-normal kernels, a residual that starts at 0."""
    fresh = new()
    nn.init.kaiming_normal_(fresh.conv1.weight)
    nn.init.zeros_(fresh.bn1.weight)
    rep = transformed(fresh, inherit="none")[1]
    expected = nn.init.kaiming_normal_(torch.empty_like(rep.conv1.weight)).std()
    assert float(rep.conv1.weight.detach().std() / expected) == pytest.approx(1, abs=0.1)
    assert rep.bn1.weight.eq(0).all()


def test_near_zero_latent_kernels_start_at_one_scale_whatever_their_size() -> None:
    """As ReActNet starts them."""
    torch.manual_seed(0)
    fresh = zoo.build("reactnet_resnet18").eval()
    rep = transformed(fresh, (3, 32, 32), inherit="none")[1]
    for path, module in fresh.named_modules():
        if isinstance(module, SignConv2d):
            own = rep.get_submodule(path).weight.detach().abs()
            assert 0.9e-3 < float(own.max()) <= 1e-3, path


def test_kernel_recipe_by_hand() -> None:
    """[A A B B] on the input: A is channel 0, B channel 1."""
    source = torch.arange(8.0).view(4, 2)[:, :, None]
    recipe = Kernel((4, 2, 1), Members(4, 2, "fold"), column=(0, 0, 1, 1), replica=(0, 1, 0, 1))
    assert recipe(source)[:, :, 0].tolist() == [[0.0, 4.0, 1.0, 5.0], [2.0, 6.0, 3.0, 7.0]]
    assert recipe.made(source, recipe(source))
    assert not recipe.made(source, recipe(source).flip(1))


@pytest.mark.parametrize("inherit", ["fold", "reshape"])
def test_tensors_on_a_convolutions_own_output_become_means(inherit: str) -> None:
    torch.manual_seed(0)
    model = randomize(zoo.build("recu_resnet20"))
    rep = transformed(model, (3, 16, 16), inherit=inherit)[1]
    source, own = model.layer1[1].conv1.alpha, rep.layer1.get_submodule("1").conv1.alpha
    pairs = source.view(2, 8, 1, 1) if inherit == "fold" else source.view(8, 2, 1, 1).transpose(0, 1)
    assert torch.allclose(own, (pairs[0] + pairs[1]) / 2)


def test_bias_of_a_convolution_becomes_a_mean_and_per_channel_values_are_tiled() -> None:
    model = randomize(Body(nn.Sequential(conv(8, 8, bias=True), nn.BatchNorm2d(8), nn.PReLU(8))))
    rep = checked(model)
    layer, norm, prelu = rep.body.children()
    source, source_norm, source_prelu = model.body
    assert torch.allclose(layer.bias, (source.bias[:4] + source.bias[4:]) / 2)
    for name, tensor in source_norm.state_dict().items():
        expected = tensor if tensor.ndim == 0 else tensor.repeat(2)
        assert torch.equal(norm.state_dict()[name], expected)
    assert torch.equal(prelu.weight, source_prelu.weight.repeat(2))
    assert isinstance(norm, RepBatchNorm2d)
    assert (norm.repeats, norm.num_features, norm.beta) == (4, 16, 2)


def test_last_layer_in_its_three_ways() -> None:
    model = residual()
    weight = model.fc.weight.detach()
    ways = {share: transformed(model, last_layer=share)[1] for share in ("all", "1_over_beta", "1_over_beta2")}
    assert torch.equal(ways["all"].fc.weight, torch.cat([weight, weight], 1) / 2)
    assert torch.equal(ways["1_over_beta"].fc.weight, weight)
    assert torch.equal(ways["1_over_beta2"].fc.weight, weight[:, :8] + weight[:, 8:])
    for rep in ways.values():
        assert torch.equal(rep.fc.bias, model.fc.bias)
        assert rep.fc.in_features == rep.fc.weight.shape[1]
        assert rep.fc.out_features == 5


def test_where_the_batch_norm_repeats_and_where_it_does_not() -> None:
    rep = transformed(residual())[1]
    assert isinstance(rep.conv1, RepMixin)
    assert isinstance(rep.shortcut, RepConv2d)
    assert (rep.conv1.rep_repeats, rep.bn1.repeats) == (1, 4)
    assert (rep.bn.repeats, type(rep.stem)) == (2, nn.Conv2d)  # the first layer: β copies, right before its BatchNorm
    late = transformed(residual(), rule="bn-before-repeat")[1]
    assert (late.bn1.num_features, type(late.bn1)) == (4, nn.BatchNorm2d)
    without = transformed(randomize(Body(nn.Sequential(conv(8, 8), nn.Hardtanh(), conv(8, 8)))))[1]
    assert [m.rep_repeats for m in without.body.children() if isinstance(m, RepMixin)] == [1, 1]
    assert any(type(m).__name__ == "Repeat" for m in without.modules())


def test_batch_norm_of_a_linear_layer() -> None:
    class Dense(Body):
        def forward(self, x: Tensor) -> Tensor:
            x = F.adaptive_avg_pool2d(self.bn(self.stem(x)), 1).flatten(1)
            return self.fc(self.body(x))

    model = randomize(Dense(nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Hardtanh())))
    rep = checked(model)
    assert isinstance(next(iter(rep.body.children())), RepMixin)
    assert isinstance(list(rep.body.children())[1], RepBatchNorm1d)


# ---------------------------------------------------------------------------------------------------------------------
# The released network


def test_released_rules_give_the_released_names_shapes_and_parameters() -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "rep_adambnn_reactnet_a.json").read_text())
    model = zoo.build("adambnn_reactnet_a").eval()
    rep = surgery.apply(surgery.plan(graph.capture(model, (3, 64, 64), shapes_only=True), rule_set("reptran-released")))
    found = [(n, [list(t.shape), str(t.dtype).removeprefix("torch.")]) for n, t in rep.state_dict().items()]
    assert found == list(golden["tensors"].items())
    assert [n for n, p in rep.named_parameters() if p.requires_grad] == golden["param_names"]
    assert sum(p.numel() for p in rep.parameters()) == golden["parameters"]


def test_released_rules_compute_what_the_hand_written_network_computes() -> None:
    model = zoo.build("adambnn_reactnet_a").eval()
    rep = surgery.apply(surgery.plan(graph.capture(model, (3, 64, 64), shapes_only=True), rule_set("reptran-released")))
    rep.load_state_dict(fill(rep.state_dict()))
    rep.double()
    x = example_input((2, 3, 64, 64), unit_range=False).double()
    with torch.no_grad():
        assert_identical(rep(x), released_network.forward(rep.state_dict(), x))


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


def test_the_input_network_is_untouched_bit_for_bit() -> None:
    model = residual().train()
    model.bn1.eval()
    state = copy.deepcopy(model.state_dict())
    pointers = [t.data_ptr() for t in model.state_dict().values()]
    attributes = {p: set(vars(m)) for p, m in model.named_modules()}
    modes, classes = [m.training for m in model.modules()], [type(m) for m in model.modules()]
    random = torch.get_rng_state()
    plan, rep = transformed(model)
    verify.verify(model, plan, rep, gradients=True)
    with torch.no_grad():
        for p in rep.parameters():
            p.add_(1)
    rep.train()
    rep(images())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes
    assert {p: set(vars(m)) for p, m in model.named_modules()} == attributes
    assert [t.data_ptr() for t in model.state_dict().values()] == pointers
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = residual().to(dtype)
    plan, rep = transformed(model)
    for tensor in rep.state_dict().values():
        assert tensor.dtype in (dtype, torch.int64)
    with torch.no_grad():
        assert rep(images(dtype=dtype)).dtype == dtype
    certificate = verify.verify(model, plan, rep, gradients=False)
    assert [c.summary for c in certificate.checks if not c.passed] == []


def test_requires_grad_and_modes_are_kept() -> None:
    model = residual().train()
    for name in ("stem", "bn1"):
        model.get_submodule(name).eval().requires_grad_(False)
    model.conv2.weight.requires_grad_(False)
    rep = transformed(model)[1]
    source, own = dict(model.named_modules()), dict(rep.named_modules())
    assert all(own[p].training == m.training for p, m in source.items())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n for n, p in rep.named_parameters() if not p.requires_grad} == frozen
    assert [n for n, _ in rep.named_parameters()] == [n for n, _ in model.named_parameters()]
    rep(images()).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in rep.parameters())


def test_what_is_never_called_is_kept_as_it_is() -> None:
    class Spare(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))
            self.loose = nn.Parameter(torch.randn(8))

    model = randomize(Spare())
    rep = checked(model)
    for name in ("never.0.weight", "never.1.running_mean", "loose"):
        assert torch.equal(rep.state_dict()[name], model.state_dict()[name])
        assert rep.state_dict()[name].data_ptr() != model.state_dict()[name].data_ptr()
    assert list(rep.state_dict()) == list(model.state_dict())


def test_a_module_used_twice_is_changed_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(8, 8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(self.norm(self.conv(x)) + x)) + x

    rep = checked(randomize(Body(Twice())))
    assert rep.body.conv.weight.shape == (4, 16, 3, 3)
    assert rep.body.norm.num_features == 16


def test_a_module_used_on_different_channels_is_refused() -> None:
    class Different(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.conv(torch.cat([y[:, :4], x[:, 4:]], 1))

    model = Body(Different())
    try:
        checked(randomize(model))
    except SurgeryError as error:
        assert "body.conv: is called twice" in str(error)  # noqa: PT017


def test_tied_kernels_stay_tied_and_apart_from_the_source() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = conv(8, 8), conv(8, 8), nn.BatchNorm2d(8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.b(self.norm(self.a(x)))) + x

    model = randomize(Body(Tied()))
    rep = checked(model)
    assert rep.body.a.weight is rep.body.b.weight
    plan = planned(model)
    state = {name: tensor.clone() for name, tensor in rep.state_dict().items()}
    assert (again := surgery.apply(plan, state=state)).body.a.weight is again.body.b.weight
    state["body.b.weight"].neg_()  # a file in which they are no longer the same
    apart = surgery.apply(plan, state=state)
    assert torch.equal(apart.body.b.weight, state["body.b.weight"])
    assert torch.equal(apart.body.a.weight, state["body.a.weight"])


def test_a_tensor_tied_to_one_that_is_not_changed_is_no_longer_the_sources() -> None:
    class Shared(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.spare = conv(8, 8)
            self.spare.weight = self.conv1.weight

    model = randomize(Shared())
    rep = transformed(model)[1]
    assert torch.equal(rep.spare.weight, model.spare.weight)
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in rep.state_dict().values()}


def test_hooks_and_attributes_of_convolutions_survive() -> None:
    model = residual()
    seen: list[tuple[int, ...]] = []
    model.conv1.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    model.conv1.epoch = 7
    rep = transformed(model)[1]
    seen.clear()
    rep(images())
    assert seen == [(2, 4, 8, 8)]
    assert rep.conv1.epoch == 7


def test_beta_1_changes_nothing_whatever_the_rules_say() -> None:
    model = residual()
    plan, rep = transformed(model, beta=1, last_layer="1_over_beta2", inherit="none")
    assert plan.edits == ()
    assert plan.rows() == []
    for (name, a), b in zip(model.state_dict().items(), rep.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        assert a.data_ptr() != b.data_ptr()
    assert verify.verify(model, plan, rep, gradients=True).passed


def test_training_a_rep_network_moves_its_copies_apart() -> None:
    """Each copy has scales of its own: that is what the method is for."""
    rep = transformed(residual())[1].train()
    optimiser = torch.optim.SGD(rep.parameters(), 0.1)
    for step in range(3):
        optimiser.zero_grad()
        F.cross_entropy(rep(images(8, seed=step)), torch.arange(8) % 5).backward()
        optimiser.step()
    rep.eval()
    weight = rep.bn1.weight.detach()
    assert not torch.equal(weight[:8], weight[8:])


class Skipped(Residual):
    """A second convolution on a branch that the example input does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.norm = conv(16, 16), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e6:
            x = self.norm(self.again(x))
        return super().forward(x)


def test_layers_that_the_example_input_does_not_reach_are_named() -> None:
    plan = planned(randomize(Skipped()))
    assert [note for note in plan.notes if "never called" in note] == [
        "again: never called on the example input, so kept as it is and counted nowhere; a branch that other inputs "
        "take into it would meet layers of another size"
    ]
    assert not any("never called" in note for note in planned(randomize(Residual())).notes)
