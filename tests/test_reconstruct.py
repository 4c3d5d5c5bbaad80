"""Fitting a Rep network to its source: it comes nearer, layer by layer, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import Residual, Sign, conv, randomize, transformed
from torch import Tensor, fx, nn
from torch.nn import functional as F
from train_examples import tiny

import repbnn_cli
from repbnn_cli import binary_conv, rep_layers, zoo
from repbnn_cli.channels import Folded, Tiled, plain
from repbnn_cli.cli import run
from repbnn_cli.errors import DivergedError, UsageError
from repbnn_cli.plan import Plan
from repbnn_cli.train import measure, reconstruct
from repbnn_cli.train.measure import estimating

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "irnet_resnet20_cifar10.pth"
KINDS = ["FracConv2d", "GatedConv2d", "IRConv2d", "RBNNConv2d", "ReCUConv2d", "SignConv2d"]


def batches(count: int = 3, size: int = 16, seed: int = 7) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 8, 8, generator=draw) for _ in range(count)]


def distance(plan: Plan, rep: nn.Module, given: list[Tensor]) -> float:
    """Mean squared difference of the outputs, over the variance of the source's."""
    with torch.no_grad():
        ours, theirs = (torch.cat([net(x) for x in given]) for net in (rep.eval(), plan.network.module.eval()))
    return float((ours - theirs).square().mean() / theirs.var(correction=0))


def made(model: nn.Module, **options: object) -> tuple[Plan, fx.GraphModule]:
    plan, rep = transformed(randomize(model), **options)
    assert isinstance(rep, fx.GraphModule)
    return plan, rep


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_comes_nearer_to_the_source(kind: str) -> None:
    """On images that it was fitted to, and on others; the start is the same network with its statistics estimated."""
    plan, rep = made(tiny(conv=getattr(binary_conv, kind)))
    started = copy.deepcopy(rep)
    given, other = batches(4, 32), batches(2, 32, seed=8)
    reconstruct.reconstruct(plan, started, given, steps=0)
    found = reconstruct.reconstruct(plan, rep, given, steps=60)
    assert [unit.path for unit in found] == ["conv", "fc"]
    assert all(unit.after <= unit.before for unit in found)
    assert found[0].after < 0.95 * found[0].before
    assert distance(plan, rep, given) < distance(plan, started, given)
    assert distance(plan, rep, other) < distance(plan, started, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.5, 0.3])
def test_latent_kernels_are_scaled_where_their_signs_alone_count(kind: str, factor: float) -> None:
    """The outputs stay, those in training, too."""
    signs_alone = kind != "SignConv2d"  # whose scale is mean|w|
    plan, rep = made(tiny(conv=getattr(binary_conv, kind)))
    scaled, given = copy.deepcopy(rep), batches(3, 16)
    reconstruct.reconstruct(plan, rep, given, steps=5)
    found = reconstruct.reconstruct(plan, scaled, given, steps=5, latents=factor)
    assert {unit.path: unit.scaled for unit in found} == {"conv": signs_alone, "fc": False}
    before, after = rep.state_dict(), scaled.state_dict()
    kernel = "conv.weight"
    assert torch.equal(after[kernel], before[kernel] * (factor if signs_alone else 1))
    assert [n for n in before if n != kernel and not torch.allclose(before[n], after[n], atol=1e-5)] == []
    for mode in (False, True):
        outputs = []
        for network in (rep, scaled):
            torch.manual_seed(0)  # of a dropout
            outputs.append(network.train(mode)(given[0]))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_foreign_layers_with_a_residual_are_fitted_up_to_where_their_part_ends() -> None:
    plan, rep = made(Residual())
    found = reconstruct.reconstruct(plan, rep, batches(), steps=30)
    assert [unit.path for unit in found] == ["conv1", "conv2", "shortcut", "fc"]
    assert [unit.path for unit in found if unit.after < unit.before][:3] == ["conv1", "conv2", "shortcut"]
    assert found[-1].after < found[-1].before


def values_at(network: fx.GraphModule, name: str, given: list[Tensor]) -> Tensor:
    """What the node of that name gives, over all images."""
    (output,) = network.graph.find_nodes(op="output")
    part = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in network.graph.nodes:
        if node is not output:
            copied[node] = part.node_copy(node, lambda n: copied[n])
            if node.name == name:
                part.output(copied[node])
                break
    with torch.no_grad():
        return torch.cat([fx.GraphModule(network, part)(x) for x in given])


class Padded(Residual):
    """The second block widens by zeros, which come to every replica among the samples."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn(self.stem(x)))
        x = self.bn2(self.conv2(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1) + x.amax((2, 3)))


@pytest.mark.parametrize("kind", [Residual, Padded])
def test_the_targets_of_replicas_may_be_apart(kind: type[nn.Module]) -> None:
    """In the mean, one replica half a standard deviation below the source's values and one above."""
    model, given = randomize(kind()), batches(4, 32)
    with estimating([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]), torch.no_grad():
        for x in given:
            model(x)
    for spread in (0.0, 0.5):
        plan, rep = transformed(model)
        assert isinstance(rep, fx.GraphModule)
        reconstruct.reconstruct(plan, rep, given, steps=0, spread=spread)
        step = plan.steps["add"]
        source = plan.network.module
        assert isinstance(source, fx.GraphModule)
        theirs, ours = values_at(source, "add", given), values_at(rep, step.node, given)
        assert isinstance(step.state, Folded if kind is Padded else Tiled)
        state = step.state if isinstance(step.state, Tiled) else plain(theirs.shape[1], 2)
        if isinstance(step.state, Folded):
            ours = rep_layers.unfold(ours, 2)
        theirs = theirs[:, list(state.index)]
        off = (ours - theirs).mean((0, 2, 3)) / theirs.std((0, 2, 3))
        for replica, side in enumerate((-spread, spread)):
            channels = [c for c, q in enumerate(state.replica) if q == replica]
            torch.testing.assert_close(off[channels], torch.full((len(channels),), side), rtol=0, atol=0.1)


class Shared(Residual):
    """One activation with slopes in both places."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(F.hardtanh(self.bn(self.stem(x))))))
        return self.fc(F.adaptive_avg_pool2d(self.act(self.bn4(self.conv4(x))), 1).flatten(1))


def test_what_two_parts_share_is_fitted_to_neither() -> None:
    model = Shared()
    model.conv4, model.bn4, model.act = conv(8, 8), nn.BatchNorm2d(8), nn.PReLU(8)
    model.fc = nn.Linear(8, 5)
    plan, rep = made(model)
    slopes = rep.get_parameter("act.weight").clone()
    units = reconstruct.reconstruct(plan, rep, batches(), steps=10)
    assert [unit.path for unit in units] == ["conv1", "conv4", "fc"]
    assert torch.equal(rep.get_parameter("act.weight"), slopes)
    assert not torch.equal(rep.get_parameter("bn4.weight"), torch.ones(16))


class Whole(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(Sign.apply(x), scaled(self.weight), None, self.stride, self.padding)


def scaled(weight: Tensor) -> Tensor:
    return Sign.apply(weight) * weight.abs().mean((1, 2, 3), keepdim=True)


class Called(Residual):
    """The same, in a forward that is traced into: the layers are calls, and their kernels are computed in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn(self.stem(x)))
        x = self.bn1(F.conv2d(Sign.apply(x), scaled(self.conv1.weight), padding=1)) + x
        y = F.conv2d(Sign.apply(x), scaled(self.conv2.weight), stride=2, padding=1)
        x = self.act(self.bn2(y) + self.bn3(self.shortcut(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_layers_that_a_forward_calls_as_functions_are_fitted_as_modules_are() -> None:
    found = []
    for kind in (Residual, Called):
        torch.manual_seed(0)
        model = kind()
        model.conv1, model.conv2 = Whole(8, 8, 3, padding=1), Whole(8, 16, 3, 2, padding=1)
        plan, rep = made(model)
        units = reconstruct.reconstruct(plan, rep, batches(), steps=20, spread=0.5)
        found.append([(unit.before, unit.after) for unit in units])
        assert len(units) == 4
        state = rep.state_dict()
        found.append([state[name] for name in ("conv1.weight", "conv2.weight", "bn2.bias", "fc.weight")])
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])


class CalledTwice(Residual):
    """One kernel in two places."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn(self.stem(x)))
        x = self.bn1(F.conv2d(Sign.apply(x), scaled(self.conv1.weight), padding=1)) + x
        x = self.bn4(F.conv2d(Sign.apply(x), scaled(self.conv1.weight), padding=1)) + x
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_kernel_that_two_calls_share_is_fitted_to_neither() -> None:
    model = CalledTwice()
    model.bn4, model.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)
    plan, rep = made(model)
    before = rep.get_parameter("conv1.weight").clone()
    left: dict[str, str] = {}
    units = reconstruct.reconstruct(plan, rep, batches(), steps=10, on_left=left.__setitem__)
    assert len(units) == 3
    assert torch.equal(rep.get_parameter("conv1.weight"), before)
    why = "fitted but for the kernel, which is frozen, or used elsewhere, too"
    assert left == {"conv2d_call": why, "conv2d_call_1": why}


def test_a_kernel_that_two_layers_share_is_fitted_to_neither() -> None:
    class Tied(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(self.conv1(F.hardtanh(self.bn(self.stem(x)))))
            return self.fc(F.adaptive_avg_pool2d(self.bn4(self.conv4(x)), 1).flatten(1))

    model = Tied()
    model.conv4, model.bn4, model.fc = conv(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 5)
    model.conv4.weight = model.conv1.weight
    plan, rep = made(model)
    before = rep.get_parameter("conv1.weight").clone()
    assert len(reconstruct.reconstruct(plan, rep, batches(), steps=10)) == 3
    assert rep.get_parameter("conv4.weight") is rep.get_parameter("conv1.weight")
    assert torch.equal(rep.get_parameter("conv1.weight"), before)


def test_what_is_left_is_said_with_its_reason() -> None:
    model = Residual()
    model.conv2.weight.requires_grad_(False)
    for parameter in (*model.bn2.parameters(), *model.act.parameters()):
        parameter.requires_grad_(False)
    plan, rep = made(model)
    left: dict[str, str] = {}
    units = reconstruct.reconstruct(plan, rep, batches(), steps=1, on_left=left.__setitem__)
    assert left == {"conv2": "frozen, or used elsewhere, too"}
    assert [unit.path for unit in units] == ["conv1", "shortcut", "fc"]


def test_targets_are_not_apart_where_replicas_share_their_shifts() -> None:
    """A BatchNorm before the repeat: fitted up to the sum behind it, and to the same bits as without."""
    model, found = randomize(Residual()), []
    for spread in (0.0, 0.5):
        plan, rep = transformed(model, rule="bn-before-repeat")
        assert isinstance(rep, fx.GraphModule)
        units = reconstruct.reconstruct(plan, rep, batches(), steps=30, spread=spread)
        assert [unit.path for unit in units] == ["conv1", "conv2", "shortcut", "fc"]
        assert all(unit.after < unit.before for unit in units)
        found.append(rep.state_dict())
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_a_fit_that_is_not_finite_is_an_error() -> None:
    plan, rep = made(tiny())
    given = batches()
    given[0][0, 0, 0, 0] = torch.inf
    with pytest.raises(DivergedError, match=r"^conv: fitting it to the source network gives nan; --fit 0 does without"):
        reconstruct.reconstruct(plan, rep, given, steps=1)


def test_with_one_replica_there_is_nothing_to_make_up_for() -> None:
    """β = 1 is the source: no layer is fitted, and once the BatchNorms have the statistics of the same images nothing
    is missed."""
    model = randomize(tiny())
    given = batches()
    model.train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            part.reset_running_stats()
    model.drop.p = 0.0
    with torch.no_grad():
        for batch in given:
            model(batch)
    plan, rep = transformed(model, beta=1)
    assert reconstruct.reconstruct(plan, rep, given, steps=5, spread=0.5) == []
    assert distance(plan, rep, given) < 1e-4


def test_everything_but_the_rep_networks_tensors_is_as_before() -> None:
    plan, rep = made(tiny())
    source = copy.deepcopy(plan.network.module.state_dict())
    rep.get_parameter("conv.weight").requires_grad_(False)
    attributes = {
        name: (m.training, getattr(m, "momentum", None), *(float(getattr(m, n)) for n in ("t", "k") if hasattr(m, n)))
        for name, m in rep.eval().named_modules()
    }
    random = torch.get_rng_state()
    reconstruct.reconstruct(plan, rep, batches(), steps=3)
    assert torch.equal(torch.get_rng_state(), random)
    for name, m in rep.named_modules():
        now = (m.training, getattr(m, "momentum", None), *(float(getattr(m, n)) for n in ("t", "k") if hasattr(m, n)))
        assert now == attributes[name], name
    assert not rep.get_parameter("conv.weight").requires_grad
    assert all(p.grad is None for p in rep.parameters())
    assert all(torch.equal(tensor, source[name]) for name, tensor in plan.network.module.state_dict().items())


def test_what_is_frozen_is_not_fitted() -> None:
    class Kept(Residual):
        """Keeps one of its BatchNorms in eval mode."""

        def train(self, mode: bool = True) -> Kept:
            super().train(mode)
            self.bn1.eval()
            return self

    model = Kept()
    model.conv2.weight.requires_grad_(False)
    model.bn2.bias.requires_grad_(False)
    plan, rep = made(model)
    before = copy.deepcopy(rep.state_dict())
    reconstruct.reconstruct(plan, rep, batches(), steps=5, spread=0.5)
    measure.calibrate(rep, [(x, torch.zeros(len(x))) for x in batches()], 3)
    moved = {name for name, tensor in rep.state_dict().items() if not torch.equal(tensor, before[name])}
    frozen = {"conv2.weight", "bn2.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"}
    assert not moved & frozen
    assert moved >= {"conv1.weight", "bn1.weight", "bn2.weight", "bn2.running_mean"}


def test_the_same_images_and_seed_give_the_same_bits() -> None:
    plan, rep = made(tiny())
    again = copy.deepcopy(rep)
    for network in (rep, again):
        reconstruct.reconstruct(plan, network, batches(), steps=5)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in rep.state_dict().items())


def test_statistics_are_those_of_what_arrives_at_each_batch_norm() -> None:
    plan, rep = made(Residual())
    given = batches()
    reconstruct.reconstruct(plan, rep, given, steps=5)
    arrived: dict[str, list[Tensor]] = {}
    norms = {name: m for name, m in rep.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda _, inputs, __, name=name: arrived.setdefault(name, []).append(inputs[0]))
    with torch.no_grad():
        for batch in given:
            rep(batch)
    assert len(norms) == 4
    for name, norm in norms.items():
        mean = torch.stack([x.mean((0, 2, 3)) for x in arrived[name]]).mean(0)
        var = torch.stack([x.var((0, 2, 3)) for x in arrived[name]]).mean(0)
        copies = len(norm.running_mean) // len(mean)
        torch.testing.assert_close(norm.running_mean, mean.repeat(copies), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, var.repeat(copies), rtol=1e-4, atol=1e-5)


class OwnNorm(nn.Module):
    """BatchNorm as research code writes it; by hand, and with numbers of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            with torch.no_grad():
                self.running_mean.mul_(0.5).add_(mean, alpha=0.5)
                self.running_var.mul_(0.5).add_(var, alpha=0.5)
        turned = (1, -1, 1, 1)
        x = (x - mean.view(turned)) / (var.view(turned) + 1e-5).sqrt()
        return x * self.gamma.view(turned) + self.beta.view(turned)


def test_a_normalisation_of_the_users_own_is_fitted_and_its_statistics_follow() -> None:
    model = tiny()
    model.bn2 = OwnNorm(8)
    plan, rep = transformed(model)
    assert isinstance(rep, fx.GraphModule)
    given = batches()
    (unit, _) = reconstruct.reconstruct(plan, rep, given, steps=60)
    assert unit.after < unit.before
    norm = rep.get_submodule("bn2")
    assert not torch.equal(norm.get_parameter("gamma"), torch.ones(16))
    assert measure.calibrate(rep, [(given[0], torch.zeros(16))] * 40, 40) == 40
    arrived: list[Tensor] = []
    norm.register_forward_hook(lambda _, inputs, __: arrived.append(inputs[0]))
    with torch.no_grad():
        rep.eval()(given[0])
    (x,) = arrived
    assert not norm.training
    torch.testing.assert_close(norm.get_buffer("running_mean"), x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.get_buffer("running_var"), x.var((0, 2, 3)))


def test_no_more_images_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest value of the plan's network: 8 channels × 8 × 8, twice with β = 2, in float32, six at a time."""
    plan, _ = made(Residual())
    epoch = [(batch, torch.zeros(len(batch))) for batch in batches(5, 10)]
    assert [len(b) for b in reconstruct.batches_for(plan, iter(epoch), 30)] == [10, 10, 10]
    assert [len(b) for b in reconstruct.batches_for(plan, iter(epoch), 25)] == [10, 10]  # all of one size
    assert [len(b) for b in reconstruct.batches_for(plan, iter(epoch), 4)] == [4]
    monkeypatch.setattr(reconstruct, "MEMORY", 20 * 6 * 4 * 2 * 8 * 8 * 8)
    assert [len(b) for b in reconstruct.batches_for(plan, iter(epoch), 1000)] == [10, 10]


def test_a_fit_to_one_image_at_a_time_is_refused() -> None:
    plan, _ = made(tiny())
    with pytest.raises(UsageError, match=r"^--fit: takes two images at a time at least"):
        reconstruct.batches_for(plan, ((x, torch.zeros(1)) for x in batches(size=1)), 64)


@pytest.mark.parametrize("arch", ["fracbnn_resnet20", "reactnet_resnet18", "recu_resnet20"])
def test_networks_of_the_zoo_have_every_binary_convolution_fitted(arch: str) -> None:
    torch.manual_seed(0)
    shape = (3, 32, 32)
    plan, rep = made(zoo.build(arch), shape=shape)
    given = [torch.rand(4, *shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = {unit.path for unit in reconstruct.reconstruct(plan, rep, given, steps=0)}
    binary = {e.path for e in plan.edits if e.action == "rep_conv"}
    assert binary <= found
    assert len(binary) > 15


def test_nothing_is_fitted_to_a_source_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    monkeypatch.chdir(tmp_path)
    assert run(["transform", "irnet_resnet20", "-o", "rep.repbnn.pt"]) == 0
    assert run(["calibrate", "rep.repbnn.pt", "--data", "digits", "--batches", "1"]) == 0
    assert "not fitted to the source network: its source has no trained weights" in capsys.readouterr().err


def test_calibrate_fits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    monkeypatch.chdir(tmp_path)
    Path("ckpt.pth").write_bytes(CHECKPOINT.read_bytes())
    assert run(["transform", "ckpt.pth", "-o", "rep.repbnn.pt"]) == 0
    assert run(["transform", "ckpt.pth", "-o", "slim.repbnn.pt", "--slim"]) == 0
    quick = ["--data", "digits", "--batches", "2", "--images", "16"]
    capsys.readouterr()
    assert run(["calibrate", "rep.repbnn.pt", *quick, "--fit", "1", "--json"]) == 0
    shown = capsys.readouterr().err
    assert "fitting to the source network: 1 steps per convolution, 16 training images" in shown
    assert "layer3.2.conv2: misses " in shown
    training = torch.load("rep-calibrated.repbnn.pt", weights_only=True)["training"]
    inherited = training["inherited"]
    assert len(inherited["fit"]) == 19
    assert (inherited["fit_steps"], inherited["fit_images"]) == (1, 16)
    before, after = (repbnn_cli.load(p).state_dict() for p in ("rep.repbnn.pt", "rep-calibrated.repbnn.pt"))
    assert not torch.equal(before["layer2.0.conv1.weight"], after["layer2.0.conv1.weight"])
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert run(["report", "rep-calibrated.repbnn.pt", "--markdown", "-o", "R.md"]) == 0
    before, after = inherited["fit"]["layer2.0.conv1"]
    assert f"| `layer2.0.conv1` | {100 * before:.2f} | {100 * after:.2f} |" in Path("R.md").read_text()
    assert run(["calibrate", "slim.repbnn.pt", *quick]) == 2
    assert "slim.repbnn.pt: holds no source network to fit to (--slim); --fit 0 does without" in capsys.readouterr().err
    assert run(["calibrate", "slim.repbnn.pt", *quick[:-2], "--fit", "0"]) == 0


class Pooled(nn.Module):
    """A VGG's order: convolution, pooling, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1, self.pool = conv(8, 8), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.conv2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn(self.stem(x)))
        x = F.hardtanh(self.bn1(self.pool(self.conv1(x))))
        x = F.hardtanh(self.bn2(F.max_pool2d(self.conv2(x), 2)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_a_pooling_before_the_batch_norm_belongs_to_the_part(spread: float) -> None:
    plan, rep = made(Pooled())
    left: list[str] = []
    units = reconstruct.reconstruct(
        plan, rep, batches(4, 32), steps=60, spread=spread, on_left=lambda path, why: left.append(path)
    )
    assert ([unit.path for unit in units], left) == (["conv1", "conv2", "fc"], [])
    assert all(unit.after < unit.before for unit in units[:2])
    one, other = rep.get_parameter("bn2.bias").chunk(2)
    assert torch.equal(one, other) != bool(spread)


def test_the_last_pooling_is_behind_its_part() -> None:
    plan, rep = made(Residual())
    units = reconstruct.Units(plan, rep, batches()[0], lambda path, why: None)
    (last,) = [node for node in units.waiting if node.target == "conv2"]
    unit = units.of(last)
    assert unit is not None
    assert not any(units.pools(node) for node in unit.nodes)


class Summed(nn.Module):
    """A sum with the stream, in place or not; the convolution's input is what the sum is written to."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8), conv(8, 8), nn.BatchNorm2d(8)
        self.fc, self.in_place = nn.Linear(8, 5), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn(self.stem(x)))
        y = self.bn1(self.conv1(x))
        if self.in_place:
            x += y
            x = x.clamp_(-1, 1)
        else:
            x = (x + y).clamp(-1, 1)
        x = F.hardtanh(self.bn2(self.conv2(x)) + x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Standard(nn.Module):
    """A ResNet's block as torchvision writes it: `out += identity` and ReLUs in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1, self.relu = conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(in_place)
        self.conv2, self.bn2, self.fc, self.in_place = conv(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 5), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            y = norm(convolution(x))
            if self.in_place:
                y += x
            else:
                y = y + x
            x = self.relu(y)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("kind", [Summed, Standard])
def test_writes_into_the_stream_are_fitted_as_sums_are(kind: Callable[[bool], nn.Module]) -> None:
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        plan, rep = made(kind(in_place))
        given = batches()
        kept = [x.clone() for x in given]
        found.append(reconstruct.reconstruct(plan, rep, given, steps=10))
        assert all(map(torch.equal, given, kept))
    assert found[0] == found[1]
    assert [unit.path for unit in found[0]] == ["conv1", "conv2", "fc"]


class Scaled(nn.Module):
    """What a convolution's part ends in is scaled by a number."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.stem, self.bn, self.by = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), by
        self.conv, self.bn1, self.fc = conv(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn(self.stem(x)))
        x = (self.bn1(self.conv(x)) + x) * self.by
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("by", [8.0, 0.125, -2.0])
def test_how_near_a_part_comes_does_not_depend_on_its_scale(by: float) -> None:
    found = []
    for scale in (1.0, by):
        torch.manual_seed(0)
        plan, rep = made(Scaled(scale))
        unit, _ = reconstruct.reconstruct(plan, rep, batches(), steps=10, spread=0.5)
        found.append((unit.before, unit.after))
    assert found[1] == pytest.approx(found[0], rel=0.02)


class Cut(nn.Module):
    """Thresholds, by its own code, in a way that no gradient passes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.high = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).float() * self.high


def test_a_part_whose_shifts_get_no_gradient_is_fitted_without_moving_them() -> None:
    class Cutting(Scaled):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.cut = Cut(8)

        def forward(self, x: Tensor) -> Tensor:
            x = F.hardtanh(self.bn(self.stem(x)))
            return self.fc(F.adaptive_avg_pool2d(self.cut(self.bn1(self.conv(x))), 1).flatten(1))

    plan, rep = made(Cutting())
    units = reconstruct.reconstruct(plan, rep, batches(), steps=5, spread=0.5)
    assert [unit.path for unit in units] == ["conv", "fc"]


def test_a_shift_moves_by_the_slope_of_what_is_not_clipped() -> None:
    slopes = torch.tensor([[0.0, 1.0, 1.0], [0.0, -2.0, -1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]]).T[..., None, None]
    assert reconstruct._shift_per_miss([slopes[:1], slopes[1:]]).tolist() == [1.0, -0.5, 0.0, 0.0]
    assert reconstruct._shift_per_miss([slopes, None]) == 0.0


def test_a_part_never_ends_farther_away_than_it_began() -> None:
    for steps in (1, 2, 5):
        plan, rep = made(Residual())
        given = batches()
        units = reconstruct.reconstruct(plan, rep, given, steps=steps)
        assert all(unit.after <= unit.before for unit in units)
        (last,) = [unit for unit in units if unit.path == "fc"]
        assert distance(plan, rep, given[:3]) == pytest.approx(last.after, rel=0.05)


class Gated(nn.Module):
    """A gate of two small convolutions, of which the first is repeated behind its activation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.bn1, self.fc = conv(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn(self.stem(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc(F.adaptive_avg_pool2d(self.bn1(self.conv(x)) * gate, 1).flatten(1))


def test_a_gate_is_fitted_up_to_where_its_channels_are_repeated() -> None:
    plan, rep = made(Gated())
    left: dict[str, str] = {}
    units = reconstruct.reconstruct(plan, rep, batches(), steps=60, spread=0.5, on_left=left.__setitem__)
    assert left == {}
    found = {unit.path: unit for unit in units}
    assert set(found) == {"squeeze", "excite", "conv", "fc"}
    assert found["squeeze"].after < found["squeeze"].before
    assert found["excite"].after <= found["excite"].before
