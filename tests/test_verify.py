"""The certificate fails, and says where, as soon as one thing is wrong; a right transform passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import BConv, BinaryConv, Body, Residual, Sign, images, planned, randomize, transformed, written
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import surgery, zoo
from repbnn_cli.inherit import Columns, Kernel, Tile
from repbnn_cli.plan import ModuleEdit, Plan, Step
from repbnn_cli.verify import Certificate, Check, verify

NAMES = [
    "captured = source",
    "captured learns as source",
    "weights carried over",
    "output shapes",
    "convolution cost unchanged",
    "merged-kernel identity",
]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Residual())


def failed(certificate: Certificate) -> dict[str, Check]:
    assert not certificate.passed
    return {c.name: c for c in certificate.checks if not c.passed}


def test_a_right_transform_passes_every_check(model: nn.Module) -> None:
    plan, rep = transformed(model)
    certificate = verify(model, plan, rep, gradients=True)
    assert certificate.passed
    assert [c.name for c in certificate.checks] == NAMES
    plain = json.loads(json.dumps(certificate.as_plain(), allow_nan=False))
    assert [c["passed"] for c in plain] == [True] * len(NAMES)
    identity = certificate.checks[-1]
    assert identity.values["tensors"] > 10
    assert identity.values["max_relative"] < 1e-5
    assert "4 kernels" in identity.summary
    cost = certificate.checks[-2].values
    assert cost["weights"][0] == cost["weights"][1] == 8 * 8 * 9 + 16 * 8 * 9 + 16 * 8
    assert cost["macs"][0] == cost["macs"][1] == 8 * 8 * 9 * 64 + 16 * 8 * 9 * 16 + 16 * 8 * 16


# ---------------------------------------------------------------------------------------------------------------------
# A wrong plan


def changed(plan: Plan, path: str, **fields: object) -> Plan:
    return replace(plan, edits=tuple(replace(e, **fields) if e.path == path else e for e in plan.edits))


def edit_of(plan: Plan, path: str) -> ModuleEdit:
    return next(e for e in plan.edits if e.path == path)


def swapped(values: tuple[int, ...], i: int = 0, j: int = 1) -> tuple[int, ...]:
    listed = list(values)
    listed[i], listed[j] = listed[j], listed[i]
    return tuple(listed)


def test_one_wrong_column_of_a_kernel(model: nn.Module) -> None:
    plan = planned(model)
    ((name, kernel),) = edit_of(plan, "conv2").tensors
    assert isinstance(kernel, Kernel)
    wrong = changed(plan, "conv2", tensors=((name, replace(kernel, column=swapped(kernel.column))),))
    found = failed(verify(model, wrong, surgery.apply(wrong), gradients=False))
    assert list(found) == ["merged-kernel identity"]
    assert found["merged-kernel identity"].values["failed"] == ["conv2"]
    assert found["merged-kernel identity"].values["worst"] == "conv2"
    assert "fails at conv2" in found["merged-kernel identity"].summary


@pytest.mark.parametrize("tensor", ["weight", "bias", "running_mean", "running_var"])
def test_one_wrong_channel_of_a_batch_norm(model: nn.Module, tensor: str) -> None:
    plan = planned(model)
    tensors = tuple(
        (n, replace(r, index=swapped(r.index)) if n == tensor and isinstance(r, Tile) else r)
        for n, r in edit_of(plan, "bn1").tensors
    )
    wrong = changed(plan, "bn1", tensors=tensors)
    found = failed(verify(model, wrong, surgery.apply(wrong), gradients=False))
    assert found["merged-kernel identity"].values["failed"] == ["bn1"]


def test_one_wrong_channel_of_a_prelu(model: nn.Module) -> None:
    plan = planned(model)
    ((name, recipe),) = edit_of(plan, "act").tensors
    assert isinstance(recipe, Tile)
    wrong = changed(plan, "act", tensors=((name, replace(recipe, index=swapped(recipe.index, 3, 30))),))
    found = failed(verify(model, wrong, surgery.apply(wrong), gradients=False))
    assert found["merged-kernel identity"].values["failed"] == ["act"]


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.5001])
def test_a_wrong_scale_of_the_classifier(model: nn.Module, scale: float) -> None:
    plan = planned(model)
    ((name, recipe),) = edit_of(plan, "fc").tensors
    assert isinstance(recipe, Columns)
    wrong = changed(plan, "fc", tensors=((name, replace(recipe, scale=scale)),))
    found = failed(verify(model, wrong, surgery.apply(wrong), gradients=False))
    assert found["merged-kernel identity"].values["failed"] == ["fc"]


def test_wrong_inputs_of_the_classifier(model: nn.Module) -> None:
    plan = planned(model, last_layer="1_over_beta")
    ((name, recipe),) = edit_of(plan, "fc").tensors
    assert isinstance(recipe, Columns)
    wrong = changed(plan, "fc", tensors=((name, replace(recipe, groups=recipe.groups[::-1])),))
    found = failed(verify(model, wrong, surgery.apply(wrong), gradients=False))
    assert found["merged-kernel identity"].values["failed"] == ["fc"]


def test_a_wrong_channel_map(model: nn.Module) -> None:
    plan = planned(model)
    steps = dict(plan.steps)
    state = steps["add"].state
    steps["add"] = Step(steps["add"].node, replace(state, index=swapped(state.index)))
    found = failed(verify(model, replace(plan, steps=steps), surgery.apply(plan), gradients=False))
    assert found["merged-kernel identity"].values["failed"][0] == ":add"


# ---------------------------------------------------------------------------------------------------------------------
# A wrong network


def broken(rep: nn.Module, how: str) -> str:
    """Breaks `rep` in one place and returns where."""
    with torch.no_grad():
        if how == "permuted columns":
            rep.conv2.weight.copy_(rep.conv2.weight.flip(1))
            return "conv2.weight"
        if how == "one weight":
            rep.conv1.weight[0, 0, 0, 0] *= -1
            return "conv1.weight"
        if how == "statistics":
            rep.bn2.running_var[5] *= 2
            return "bn2.running_var"
        if how == "classifier":
            rep.fc.weight.mul_(2)
            return "fc.weight"
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["permuted columns", "one weight", "statistics", "classifier"])
def test_values_that_are_not_the_planned_ones(model: nn.Module, how: str) -> None:
    plan, rep = transformed(model)
    place = broken(rep, how)
    found = failed(verify(model, plan, rep, gradients=False))
    assert found["weights carried over"].values["failed"] == [place]
    assert place in found["weights carried over"].summary


def test_a_batch_norm_that_was_not_tiled(model: nn.Module) -> None:
    plan, rep = transformed(model)
    rep.act = nn.PReLU(16)
    found = failed(verify(model, plan, rep, gradients=False))
    assert found["weights carried over"].values["failed"] == ["act.weight"]
    assert found["merged-kernel identity"].values["failed"] == ["act"]
    assert "does not run at act (RuntimeError" in found["merged-kernel identity"].summary
    plan, rep = transformed(model)
    rep.bn1 = model.bn1  # gives 8 channels, to be added to 16
    found = failed(verify(model, plan, rep, gradients=False))
    assert "bn1" in found["merged-kernel identity"].summary


@pytest.mark.parametrize(
    ("change", "worst"),
    [
        (lambda rep: setattr(rep.conv2, "stride", (1, 1)), "conv2"),
        (lambda rep: setattr(rep.conv1, "padding", (0, 0)), "conv1"),
        (lambda rep: setattr(rep.bn1, "eps", 0.5), "bn1"),
        (lambda rep: setattr(rep.bn1, "repeats", 2), "bn1"),
        (lambda rep: setattr(rep.shortcut, "rep_repeats", 2), "shortcut"),
    ],
    ids=["stride", "padding", "eps", "repeats of a BatchNorm", "repeats of a RepConv"],
)
def test_a_wrong_number_of_a_module(model: nn.Module, change: Callable[[nn.Module], None], worst: str) -> None:
    plan, rep = transformed(model)
    change(rep)
    found = failed(verify(model, plan, rep, gradients=False))
    assert worst in found["merged-kernel identity"].summary
    assert found["merged-kernel identity"].values["failed"][0] == worst


def test_a_stride_also_costs(model: nn.Module) -> None:
    plan, rep = transformed(model)
    rep.conv2.stride = (1, 1)
    found = failed(verify(model, plan, rep, gradients=False))
    assert "convolution cost unchanged" in found or "does not run" in found["merged-kernel identity"].summary
    assert json.dumps([c.values for c in found.values()], allow_nan=False)


class OneByOne(nn.Module):
    """Loops over its samples, which a graph holds for as many as it was captured with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3), BConv(8, 8, 3, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x[i] - x[i].mean() for i in range(x.shape[0])])
        return self.fc(self.conv(self.stem(x)).mean((2, 3)))


def test_a_graph_that_holds_for_one_size_of_batches() -> None:
    model = OneByOne().eval()
    plan = planned(model)
    check = verify(model, plan, surgery.apply(plan), gradients=True).checks[0]
    assert not check.passed
    assert check.summary.startswith("holds for batches of 2 only: ")


def test_a_graph_that_is_not_the_source(model: nn.Module) -> None:
    plan, rep = transformed(model)
    node = next(n for n in plan.network.graph.nodes if n.name == "add")
    node.target = torch.sub
    plan.network.module.recompile()
    found = failed(verify(model, plan, rep, gradients=True))
    assert "captured = source" in found
    assert "captured learns as source" in found
    assert "merged-kernel identity" in found
    assert "captured = source" in failed(verify(model, plan, rep, gradients=False))


def test_a_graph_that_learns_something_else() -> None:
    class Hidden(BinaryConv):
        pass

    class Straight(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Sign.apply(x) * 0.5 + x

    model = randomize(Body(nn.Sequential(Hidden(8, 8, 3, padding=1), nn.BatchNorm2d(8), Straight())))
    plan, rep = transformed(model)
    assert verify(model, plan, rep, gradients=True).passed
    node = next(n for n in plan.network.graph.nodes if "body.2" in str(n.target))
    with plan.network.graph.inserting_after(node):
        detached = plan.network.graph.call_method("detach", (node,))
    detached.meta = dict(node.meta)
    node.replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)
    plan.network.module.recompile()
    expected, got = model(images()), plan.network.module(images())
    assert torch.equal(expected, got)
    found = failed(verify(model, plan, rep, gradients=True))
    assert "captured learns as source" in found
    assert "gradients compared" in found["captured learns as source"].summary


def test_nan_is_never_a_pass(model: nn.Module) -> None:
    plan, rep = transformed(model)
    with torch.no_grad():
        rep.bn1.weight[0] = float("nan")
    found = failed(verify(model, plan, rep, gradients=False))
    assert found["merged-kernel identity"].values["failed"] == ["bn1"]
    assert json.dumps([c.values for c in found.values()], allow_nan=False)


# ---------------------------------------------------------------------------------------------------------------------
# What verifying leaves behind


def test_verify_leaves_everything_as_it_was(model: nn.Module) -> None:
    model.train()
    model.bn2.eval()
    plan, rep = transformed(model)
    networks = (model, plan.network.module, rep)
    modes = [[m.training for m in n.modules()] for n in networks]
    states = [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]
    attributes = [{p: set(vars(m)) for p, m in n.named_modules()} for n in networks]
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    random = torch.get_rng_state()
    for gradients in (False, True):
        assert verify(model, plan, rep, gradients=gradients).passed
        assert [[m.training for m in n.modules()] for n in networks] == modes
        assert [{p: set(vars(m)) for p, m in n.named_modules()} for n in networks] == attributes
        for network, state in zip(networks, states, strict=True):
            assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert model.stem.weight.grad is None


def test_several_samples_and_one(model: nn.Module) -> None:
    plan, rep = transformed(model)
    for batch in (1, 5):
        assert verify(model, plan, rep, gradients=False, batch=batch).passed


@pytest.mark.parametrize("name", ["irnet_resnet20", "rbnn_resnet20", "fracbnn_resnet20", "recu_resnet20"])
def test_one_wrong_channel_deep_in_a_network_of_the_zoo(name: str) -> None:
    """Located although everything behind it differs, too."""
    torch.manual_seed(0)
    model = randomize(zoo.build(name))
    plan = planned(model, (3, 16, 16))
    path = "layer2.1.bn1"
    tensors = tuple(
        (n, replace(r, index=swapped(r.index))) for n, r in edit_of(plan, path).tensors if isinstance(r, Tile)
    )
    wrong = changed(plan, path, tensors=tensors)
    found = failed(verify(model, wrong, surgery.apply(wrong), gradients=False))
    assert found["merged-kernel identity"].values["failed"] == [path]
    scaled = changed(plan, "linear", tensors=tuple(
        (n, replace(r, scale=1.0)) for n, r in edit_of(plan, "linear").tensors if isinstance(r, Columns)
    ))  # fmt: skip
    found = failed(verify(model, scaled, surgery.apply(scaled), gradients=False))
    assert found["merged-kernel identity"].values["failed"] == ["linear"]


def test_unobservable_kernels_are_named() -> None:
    """A layer that convolves behind torch's back cannot be merged; the certificate says so."""

    class Unfolded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensordot(x, self.weight.sign().flatten(1), dims=([1], [1])).permute(0, 3, 1, 2)

    rules = written("extends: reptran\nmodules:\n  - {match: {type: Unfolded}, role: binary_conv}\n")
    model = randomize(Body(nn.Sequential(Unfolded(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))))
    plan, rep = transformed(model, rule=rules)
    certificate = verify(model, plan, rep, gradients=True)
    assert "kernel not observable: body.0" in certificate.checks[-1].summary
    assert certificate.checks[-1].values["unseen"] == ["body.0"]
    assert certificate.passed


class Cancelling(nn.Module):
    """Each filter adds as many -1 as +1, all alike but for rounding: only rounding is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(3, 8, 3), AllAlike(8, 8, 3, bias=False), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = Sign.apply(self.first(x))[:, :4]
        return self.last(self.conv(torch.cat([x, -x], 1)))


class AllAlike(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.abs().mean() * torch.ones_like(self.weight) + 1e-9 * self.weight)


@pytest.mark.parametrize("wrong", [False, True])
def test_rounding_where_all_terms_cancel_is_no_failure(wrong: bool) -> None:
    torch.manual_seed(0)
    model = randomize(Cancelling())
    plan, rep = transformed(model)
    assert plan.layers["conv"].role == "binary_conv"
    if wrong:  # an error of the size of the terms is seen all the same
        rep.get_submodule("last").weight.data[0, 0] *= 1.02
        rep.get_submodule("conv").weight.data[0, 0] += 1e6
    assert verify(model, plan, rep, gradients=True).passed is not wrong


class Drawn(Residual):
    """Binarises at random, in eval mode as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


def test_a_network_that_draws_in_eval_mode_is_told_so() -> None:
    model = randomize(Drawn())
    certificate = verify(model, *transformed(model), gradients=True)
    assert failed(certificate)["merged-kernel identity"].summary.endswith(
        "the network draws random numbers in eval mode: make it deterministic there"
    )


# ---------------------------------------------------------------------------------------------------------------------
# A fresh start: what no rule resizes is the new network's, not the trained one's


class Untouched(nn.Module):
    """Tensors that no rule resizes, and two that the network's own forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.act, self.last = BinaryConv(8, 8, 3), nn.PReLU(), nn.Linear(8, 5)
        self.norm = nn.BatchNorm1d(5)
        self.shift, self.scale = nn.Parameter(torch.zeros(1, 8, 1, 1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.bn(self.stem(x))) - self.shift) * self.scale
        return self.norm(self.last(x.mean((2, 3))))


def started_afresh() -> tuple[nn.Module, Plan, nn.Module]:
    torch.manual_seed(0)
    fresh, trained = Untouched(), randomize(Untouched())
    with torch.no_grad():
        for parameter in (trained.act.weight, trained.shift, trained.scale):
            parameter.add_(torch.rand_like(parameter))
    plan = planned(trained, inherit="none")
    return trained, plan, surgery.apply(plan, fresh=fresh.state_dict())


@pytest.mark.parametrize("gradients", [False, True])
def test_a_fresh_start_of_a_trained_network_passes(gradients: bool) -> None:
    trained, plan, rep = started_afresh()
    own = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    assert rep.get_parameter("act.weight").eq(0.25).all()
    assert rep.get_parameter("shift").eq(0).all()
    certificate = verify(trained, plan, rep, gradients=gradients)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    assert all(torch.equal(tensor, own[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda rep: rep.shift.data[0, 3].fill_(1.0), ":sub"),
        (lambda rep: setattr(rep.stem, "padding", (0, 0)), "stem"),
        (lambda rep: setattr(rep.norm, "eps", 0.5), "norm"),
        (lambda rep: rep.bn.running_var[5].mul_(2), "bn"),
    ],
    ids=["one copy of a parameter", "another padding", "another eps", "one copy of a BatchNorm"],
)
def test_a_fresh_start_with_one_thing_wrong(change: Callable[[nn.Module], None], place: str) -> None:
    trained, plan, rep = started_afresh()
    change(rep)
    found = failed(verify(trained, plan, rep, gradients=False))
    assert found["merged-kernel identity"].values["failed"] == [place]
