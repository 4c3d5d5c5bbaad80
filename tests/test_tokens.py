"""Networks whose channels come last, (N, T, C): binary transformers, mixers, ConvNeXt blocks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import BConv, images, planned, signs, transformed, written
from torch import Tensor, fx, nn

from repbnn_cli import profiler, rep_layers, surgery
from repbnn_cli.errors import SurgeryError
from repbnn_cli.explain import Explainer, Story
from repbnn_cli.plan import Plan
from repbnn_cli.profiler import shapes
from repbnn_cli.train import reconstruct
from repbnn_cli.verify import verify


class BinaryLinear(nn.Linear):
    """Thresholds for its inputs, a scale for each output."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        self.move, self.alpha = nn.Parameter(torch.randn(1, 1, into)), nn.Parameter(torch.rand(out) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(signs(x + self.move), signs(self.weight)) * self.alpha + self.bias


class RPReLU(nn.Module):
    """ReActNet's activation over the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.shift
        return torch.where(x > 0, x, x * self.slope)


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = BinaryLinear(channels, 3 * channels), BinaryLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        weights = (signs(q) @ signs(k).transpose(-2, -1)).div(3).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, channels))


class TransformerBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(channels), Attention(channels)
        self.norm2, self.fc1 = nn.LayerNorm(channels), BinaryLinear(channels, 2 * channels)
        self.act, self.fc2 = RPReLU(2 * channels), BinaryLinear(2 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.gamma * self.fc2(self.act(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """With a class token; `channels` of them and as many tokens as there are, where one is told from the other."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, channels, 2, 2), nn.Parameter(torch.randn(1, 1, channels))
        self.place = nn.Parameter(torch.randn(1, 17, channels))
        self.blocks = nn.Sequential(TransformerBlock(channels), TransformerBlock(channels))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


class Mean(Transformer):
    """Half as many channels as tokens (16), so that the hidden layers have as many; without a class token."""

    def __init__(self) -> None:
        super().__init__(8)
        self.place = nn.Parameter(torch.randn(1, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))


class Mixer(nn.Module):
    """Its first layer is a linear one, and some mix tokens."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(12, channels), nn.LayerNorm(channels)
        self.tokens, self.norm2 = BinaryLinear(16, 16), nn.LayerNorm(channels)
        self.channels, self.norm3 = BinaryLinear(channels, channels), nn.LayerNorm(channels, bias=False)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
        x = self.first(x)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm3(x + self.channels(self.norm2(x))))


class ChannelsLastBlock(nn.Module):
    """ConvNeXt's, with BatchNorm in the stem."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm, self.fc1 = nn.LayerNorm(channels), BinaryLinear(channels, 2 * channels)
        self.fc2, self.scale = BinaryLinear(2 * channels, channels), nn.Parameter(torch.rand(channels))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.fc2(F.gelu(self.fc1(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class Products(nn.Module):
    """Its linear layers are products; one number per token comes out."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, channels, 2, 2), nn.LayerNorm(channels)
        self.up, self.down = (nn.Parameter(torch.randn(channels, 2 * channels)) for _ in range(2))
        self.alpha, self.beta = nn.Parameter(torch.rand(2 * channels)), nn.Parameter(torch.rand(channels))
        self.head = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(2).permute(0, 2, 1)
        y = torch.tanh(signs(self.norm(x)) @ signs(self.up)) * self.alpha
        return self.head(x + torch.matmul(signs(y - 0.1), signs(self.down).t()) * self.beta).squeeze(-1)


NETWORKS = (Transformer, Mean, Mixer, ChannelsLastBlock, Products)


def made(network: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = network().eval()
    with torch.no_grad():
        for tensor in net.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn(tensor.shape))
    return net


def actions(plan: Plan) -> dict[str, str]:
    return {e.path: e.action for e in plan.edits}


@pytest.mark.parametrize("beta", [2, 4])
@pytest.mark.parametrize("last_layer", ["all", "1_over_beta", "1_over_beta2"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_certificate_of_layers_over_the_last_axis(network: type[nn.Module], last_layer: str, beta: int) -> None:
    net = made(network)
    plan = planned(net, beta=beta, last_layer=last_layer)
    certificate = verify(net, plan, surgery.apply(plan).eval(), gradients=True)
    assert certificate.passed, str(certificate)
    binary = {p for p, layer in plan.layers.items() if layer.role == "binary_linear"}
    assert {actions(plan)[p] for p in binary} == {"rep_conv"}
    weights, macs = (certificate.checks[-2].values[k] for k in ("weights", "macs"))
    assert weights[0] == weights[1] == sum(torch.Size(plan.layers[p].kernel_shape).numel() for p in binary)
    assert macs[0] == macs[1] > weights[0]


@pytest.mark.parametrize("beta", [2, 4])
@pytest.mark.parametrize("network", [Transformer, Mean, Mixer, ChannelsLastBlock])
def test_where_filters_are_alike_the_rep_network_is_the_source_with_larger_scales(
    network: type[nn.Module], beta: int
) -> None:
    """Each RepConv then sums β equal terms: the source's own code, in float64, does so with β times its scales."""
    net = made(network).double()
    with torch.no_grad():
        for layer in (m for m in net.modules() if isinstance(m, BinaryLinear)):
            for tensor in (layer.weight, layer.bias, layer.alpha):
                tensor.copy_(torch.cat([tensor[: len(tensor) // beta]] * beta))
    _, rep = transformed(net, beta=beta)
    expected = copy.deepcopy(net)
    with torch.no_grad():
        for layer in (m for m in expected.modules() if isinstance(m, BinaryLinear)):
            layer.alpha.mul_(beta)
    x = images(3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(rep.eval()(x), expected(x), rtol=1e-9, atol=1e-9)


def test_replicas_get_parameters_of_their_own() -> None:
    plan, rep = transformed(made(Transformer), beta=2)
    found = actions(plan)
    assert found["blocks.0.norm1"] == found["blocks.0.act"] == "per_channel"
    assert found["blocks.0.gamma"] == found["place"] == "parameter"
    assert found["blocks.0.attention.proj"] == "rep_conv"
    rep.train()
    rep(images(4)).square().sum().backward()
    for path in ("blocks.0.norm1.weight", "blocks.0.act.slope", "blocks.0.gamma"):
        first, second = rep.get_parameter(path).grad.chunk(2)
        assert not torch.allclose(first, second), path


@pytest.mark.parametrize("beta", [2, 3])
def test_layer_norm_of_each_replica_with_its_own_parameters(beta: int) -> None:
    norm = rep_layers.RepLayerNorm(5)
    norm.rep_beta = beta
    norm.weight, norm.bias = (nn.Parameter(torch.randn(beta * 5)) for _ in range(2))
    x = torch.randn(4 * beta, 7, 5)
    replicas = zip(x.unflatten(0, (4, beta)).unbind(1), norm.weight.chunk(beta), norm.bias.chunk(beta), strict=True)
    expected = torch.stack([F.layer_norm(r, (5,), w, b) for r, w, b in replicas], 1).flatten(0, 1)
    torch.testing.assert_close(norm(x), expected)
    assert f"beta={beta}" in str(norm)


@pytest.mark.parametrize("beta", [2, 3])
def test_replicas_of_windows(beta: int) -> None:
    """Windows (N·W, C, T) of images (N, C, W, T), folded as windows and as images."""
    image = torch.randn(5, beta * 4, 3, 7)
    windows = image.movedim(2, 1).flatten(0, 1)
    folded = rep_layers.fold(windows, beta, 5)
    assert torch.equal(folded, rep_layers.fold(image, beta).movedim(2, 1).flatten(0, 1))
    assert torch.equal(rep_layers.unfold(folded, beta, 5), windows)
    last = windows.movedim(1, -1)
    assert torch.equal(rep_layers.fold_last(last, beta, 5), folded.movedim(1, -1))
    assert torch.equal(rep_layers.unfold_last(folded.movedim(1, -1), beta, 5), last)
    assert torch.equal(
        rep_layers.repeat_batch(windows, beta, 5).view(5, beta, 3, -1)[:, 1].flatten(), windows.flatten()
    )


@pytest.mark.parametrize("rest", [(), (7,), (2, 3)])
def test_folding_channels_that_come_last(rest: tuple[int, ...]) -> None:
    x = torch.randn(3, *rest, 8)
    folded = rep_layers.fold_last(x, 2)
    assert torch.equal(folded[0::2], x[..., :4])
    assert torch.equal(folded[1::2], x[..., 4:])
    assert torch.equal(rep_layers.unfold_last(folded, 2), x)
    repeated = rep_layers.unfold_last(rep_layers.repeat_last(x, 2), 2)
    assert torch.equal(repeated, rep_layers.repeat_channels(x.movedim(-1, 1), 4).movedim(1, -1))


def test_what_products_of_activations_cost_is_said() -> None:
    net = made(Transformer)
    plan = planned(net, beta=2)
    (note,) = plan.notes
    assert "products of activations, 4 in all, are computed for each replica, at 2 times their cost" in note
    before = profiler.profile(plan.network, plan.layers).totals
    after = profiler.profile(*shapes.rep_network(plan, surgery.apply(plan))).totals
    product = 2 * 2 * 17 * 17 * 8  # of two heads in two blocks: signs by signs, and probabilities by values
    head, layers = 10 * 16, 2 * 17 * 16 * (48 + 16 + 32 + 32)
    assert (before.fc, after.fc) == (product + head, 2 * (product + head))
    assert (before.bops, after.bops) == (product + layers, 2 * product + layers)


def test_layers_over_the_last_axis_are_fitted_to_the_source() -> None:
    plan, rep = transformed(made(Transformer), beta=2)
    assert isinstance(rep, fx.GraphModule)
    found = reconstruct.reconstruct(plan, rep, [images(16, seed=s) for s in (1, 2)], steps=30)
    blocks = [f"blocks.{i}.{name}" for i in range(2) for name in ("attention.qkv", "attention.proj", "fc1", "fc2")]
    assert [unit.path for unit in found] == [*blocks, "head"]
    assert all(unit.after < unit.before for unit in found)


class Windows(Mixer):
    """Four windows of an image: samples and windows share the first axis, where each sample's lie together."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(2).transpose(1, 2).repeat(1, 1, 4))
        x = x.reshape(len(x) * 4, 16, 12)
        x = self.act(self.channels(self.norm2(x)).transpose(1, 2)).transpose(1, 2) * self.norm3.weight
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x.reshape(-1, 64, 12).mean(1))


@pytest.mark.parametrize("beta", [2, 4])
def test_windows_of_a_sample_are_its_rows(beta: int) -> None:
    net = made(Windows)
    plan, rep = transformed(net, beta=beta)
    certificate = verify(net, plan, rep.eval(), gradients=True)
    assert certificate.passed, str(certificate)
    found = actions(plan)
    assert (found["channels"], found["norm2"], found["norm3.weight"]) == ("rep_conv", "per_channel", "parameter")
    macs = next(c for c in certificate.checks if c.name == "convolution cost unchanged").values["macs"]
    assert macs == [4 * (16 * 12 * 12 + 12 * 16 * 16)] * 2


class SequenceFirst(Mixer):
    """(T, N, C), as torch's recurrent and attention layers take it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(2).transpose(1, 2).repeat(1, 1, 4)).transpose(0, 1)
        return self.head(self.channels(self.norm2(x)).transpose(0, 1).mean(1))


class SequenceFirstAtOnce(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(2).permute(2, 0, 1).repeat(1, 1, 4)).transpose(0, 1)
        return self.head(self.channels(self.norm2(x)).mean(1))


def test_where_the_batch_is_not_first_a_rule_applies_the_layer_to_each_replica() -> None:
    net = made(SequenceFirst)
    with pytest.raises(SurgeryError, match=r"channels is a linear layer over the last axis.*whose first is not the"):
        planned(net)
    tiled = written("extends: reptran\nrules:\n  mine: {part: backbone, match: {path: channels}, apply: tile}\n")
    plan = planned(net, rule=tiled)
    assert (actions(plan)["channels"], actions(plan)["norm2"]) == ("per_replica", "per_replica")
    assert verify(net, plan, surgery.apply(plan).eval(), gradients=True).passed


def test_a_first_layer_whose_batch_is_not_first_is_refused() -> None:
    with pytest.raises(SurgeryError, match=r"first is a linear layer over the last axis.*whose first is not the batch"):
        planned(made(SequenceFirstAtOnce))


class Shared(nn.Module):
    """Norms without parameters, so that nothing tells the replicas of a channel apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8, affine=False)
        self.conv, self.head = BConv(8, 8, 3, bias=False), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(self.norm(self.stem(x)))).mean((2, 3)))


def test_replicas_that_nothing_tells_apart_are_noted() -> None:
    (note,) = planned(made(Shared)).notes
    assert "the replicas of a channel stay alike" in note


def test_explain_of_a_layer_over_the_last_axis() -> None:
    plan, rep = transformed(made(Transformer), beta=2)
    story = Explainer(plan, rep).one("blocks.0.fc1")
    assert isinstance(story, Story)
    (given,) = story.inputs
    assert (given.before, given.after) == ((17, 16), (17, 32))
    assert "channel j of 32 stands for source channel j mod 16" in given.text


def test_a_declared_module_may_have_its_channels_last() -> None:
    declared = written(
        "extends: reptran\nmodules:\n  - match: {type: RPReLU}\n    role: per_channel\n"
        "    per_channel: {slope: {channels: in, axis: 0}, shift: {channels: in, axis: 0}}\n"
    )
    for network in (Transformer, Mean):
        net = made(network)
        plan = planned(net, rule=declared)
        assert actions(plan)["blocks.0.act"] == "per_channel"
        assert plan.layers["blocks.0.act"].evidence.startswith("declared at")
        assert verify(net, plan, surgery.apply(plan).eval(), gradients=True).passed


class TurningNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("channels", [12, 16])
def test_a_batch_norm_that_turns_its_input(channels: int) -> None:
    """Also where there are as many channels as tokens, 16."""

    class Normed(Mixer):
        def __init__(self) -> None:
            super().__init__(channels)
            self.norm1, self.norm2 = TurningNorm(channels), TurningNorm(channels)

    net = made(Normed)
    plan, rep = transformed(net)
    assert actions(plan)["norm1"] == actions(plan)["norm2"] == "batch_norm"
    assert plan.layers["norm1"].last_axis
    assert verify(net, plan, rep.eval(), gradients=True).passed
