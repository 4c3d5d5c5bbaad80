"""Forms in which public code bases write their blocks: transformed and verified like any other, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from idiom_networks import Conv, Net, Sign, generic, leaves, refusal, transformed
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import graph, rules
from repbnn_cli.channels import Folded
from repbnn_cli.layers import RPReLU

# ---------------------------------------------------------------------------------------------------------------------
# Binary layers as papers describe them


class Layered(Net):
    """`layer`, its BatchNorm and a bypass."""

    def make(self) -> nn.Module:
        raise TypeError

    def build(self) -> None:
        self.layer, self.bn = self.make(), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.layer(x)) + x


class BasesInOneKernel(Layered):
    """(M, O, I, k, k): M binary bases, each with a scale, summed into one kernel."""

    def make(self) -> nn.Module:
        class Bases(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(1, 8, 8, 3, 3))

            def forward(self, x: Tensor) -> Tensor:
                w = self.weight - self.weight.mean((2, 3, 4), keepdim=True)
                return F.conv2d(
                    Sign.apply(x), (Sign.apply(w) * w.abs().mean((2, 3, 4), keepdim=True)).sum(0), padding=1
                )

        return Bases()


class ScaleByPosition(Layered):
    """XNOR-Net: the output times K, the input's mean magnitude around each position, and times α per filter."""

    def make(self) -> nn.Module:
        class XnorConv(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                box = torch.full((1, 1, 3, 3), 1 / 9, dtype=x.dtype)
                k = F.conv2d(x.abs().mean(1, keepdim=True), box, padding=1)
                alpha = self.weight.abs().mean((1, 2, 3), keepdim=True)
                return F.conv2d(Sign.apply(x), Sign.apply(self.weight) * alpha, padding=1) * k

        return XnorConv(8, 8, 3, bias=False)


class ScaleOfTheLayer(Layered):
    """One scale for all filters, DoReFa's."""

    def make(self) -> nn.Module:
        class LayerScale(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                w = self.weight
                return self._conv_forward(Sign.apply(x), Sign.apply(w / w.abs().mean()) * w.abs().mean().detach(), None)

        return LayerScale(8, 8, 3, padding=1, bias=False)


class Grouped(Layered):
    def make(self) -> nn.Module:
        return Conv(8, 8, 3, padding=1, groups=2, bias=False)


class Depthwise(Layered):
    def build(self) -> None:
        self.layer, self.bn = Conv(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.bn2 = Conv(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        x = self.bn(self.layer(x)) + x
        return self.bn2(self.point(x)) + x


class Parametrised(Layered):
    """The sign is a parametrisation of the weight."""

    def make(self) -> nn.Module:
        class Binary(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return Sign.apply(weight)

        layer = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        nn.utils.parametrize.register_parametrization(layer, "weight", Binary())
        return nn.Sequential(nn.Hardtanh(), layer)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(Sign.apply(x), Sign.apply(self.weight), self.bias)


class BinaryLinear(Net):
    def build(self) -> None:
        self.hidden, self.bn = Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.hidden(self.bn0(self.stem(x)).mean((2, 3)))))


LAYERS = {
    BasesInOneKernel: "binary_conv", ScaleByPosition: "binary_conv", ScaleOfTheLayer: "binary_conv",
    Grouped: "binary_conv", Depthwise: "depthwise_conv", Parametrised: "binary_conv", BinaryLinear: "binary_linear",
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("beta", [2, 4])
def test_binary_layers(kind: type[nn.Module], beta: int) -> None:
    plan = transformed(kind, beta=beta)
    path = {Parametrised: "layer.1", BinaryLinear: "hidden", ScaleByPosition: "layer.conv2d_call_1"}.get(kind, "layer")
    assert plan.layers[path].role == LAYERS[kind]
    assert plan.layers[path].weight_bits == 1
    assert plan.edits


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and networks


class Improvement(Net):
    """MeliusNet: a dense block concatenates 8 channels, an improvement block adds to those alone."""

    width = 16

    def build(self) -> None:
        self.bn1, self.dense = nn.BatchNorm2d(8), Conv(8, 8, 3, padding=1, bias=False)
        self.bn2, self.improve = nn.BatchNorm2d(16), Conv(16, 8, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(16)

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat((x, self.dense(self.bn1(x))), 1)
        residual = self.improve(self.bn2(x))
        x = torch.cat((x[:, :8], x[:, 8:] + residual), 1)
        return F.relu(self.last(x))


class Branches(Net):
    """The sum of three branches, and of every second one in training as in eval mode."""

    def build(self) -> None:
        self.branches = nn.ModuleList(
            nn.Sequential(Conv(8, 8, k, padding=k // 2, bias=False), nn.BatchNorm2d(8)) for k in (1, 3, 5)
        )

    def body(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches) + x + sum(b(x) for b in self.branches[::2])


class Halves(Net):
    """ShuffleNet: half of the channels are left alone, then shuffled."""

    def build(self) -> None:
        self.conv, self.bn = Conv(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = Conv(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        half = x.size(1) // 2
        left, right = x[:, :half], x[:, half:]
        x = torch.cat([left, self.bn(self.conv(right))], 1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.bn2(self.conv2(x)) + x


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Lambdas(Net):
    """Functions kept in modules, a bypass that pads channels, a flatten inside the Sequential."""

    def build(self) -> None:
        self.conv, self.bn = Conv(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0))
        self.head = nn.Sequential(Lambda(F.hardtanh), nn.AvgPool2d(4), Lambda(lambda x: x.view(x.size(0), -1)))
        self.classify = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        return self.classify(self.head(self.bn(self.conv(x)) + self.shortcut(x)))


class BypassByShape(Net):
    """The bypass is chosen, and its channels are doubled, by comparing shapes."""

    width = 16

    def build(self) -> None:
        self.convs = nn.ModuleList(
            [Conv(8, 8, 3, padding=1, bias=False), Conv(8, 16, 3, stride=2, padding=1, bias=False)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(16)])

    def body(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convs, self.norms, strict=True):
            y = norm(convolution(x))
            if y.shape[-1] != x.shape[-1]:
                x = F.avg_pool2d(x, 2)
            while x.size(1) < y.size(1):
                x = torch.cat([x, x], 1)
            x = x + y
        return x


@dataclass
class Output:
    logits: Tensor
    features: tuple[Tensor, Tensor]


class DataclassOutput(Net):
    def build(self) -> None:
        self.conv, self.bn = Conv(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.side = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        x = self.bn0(self.stem(x))
        y = (self.bn(self.conv(x)) + x).mean((2, 3))
        return Output(logits=self.fc(y), features=(self.side(y), self.side(y) * 2))


@pytest.mark.parametrize("kind", [Improvement, Branches, Halves, Lambdas, BypassByShape, DataclassOutput])
@pytest.mark.parametrize("beta", [2, 4])
def test_networks(kind: type[nn.Module], beta: int) -> None:
    plan = transformed(kind, beta=beta)
    binary = [path for path, layer in plan.layers.items() if layer.binary]
    assert binary
    assert {e.path for e in plan.edits if e.action == "rep_conv"} >= set(binary)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks that hold kernels themselves


class KernelsBesidePlainNorms(Net):
    """A block of two convolutions owns their kernels; its BatchNorms have no parameters."""

    def build(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn0, self.bn1 = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, affine=False)
                self.conv0 = nn.Parameter(torch.randn(8, 8, 3, 3))
                self.conv1 = nn.Parameter(torch.randn(8, 8, 3, 3))

            def forward(self, x: Tensor) -> Tensor:
                h = F.conv2d(F.relu(self.bn0(x)), Sign.apply(self.conv0), padding=1)
                return x + F.conv2d(F.relu(self.bn1(h)), Sign.apply(self.conv1), padding=1)

        self.block = Block()

    def body(self, x: Tensor) -> Tensor:
        return self.block(x)


class TwoKernels(nn.Module):
    """A block without children that owns a 3×3 and a 1×1 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(8, 8, 1, 1))


class KernelsOfSeveralLayers(Net):
    """A block without children owns a 3×3 and a 1×1 kernel."""

    def build(self) -> None:
        class Block(TwoKernels):
            def forward(self, x: Tensor) -> Tensor:
                h = F.conv2d(Sign.apply(x), Sign.apply(self.wide), padding=1)
                return F.conv2d(Sign.apply(h), Sign.apply(self.narrow)) + x

        self.block, self.bn = Block(), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.block(x))


class KernelBesideLayers(Net):
    """A block owns a kernel, a threshold and a scale, has an RPReLU, and adds its input."""

    def build(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
                self.move, self.scale = nn.Parameter(torch.randn(1, 8, 1, 1)), nn.Parameter(torch.rand(1, 8, 1, 1))
                self.activation = RPReLU(8)

            def forward(self, x: Tensor) -> Tensor:
                y = F.conv2d(Sign.apply(x + self.move), Sign.apply(self.weight), padding=1) * self.scale
                return self.activation(y) + x

        self.conv, self.block = Conv(8, 8, 1), Block()

    def body(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x))


@pytest.mark.parametrize("beta", [2, 4])
def test_a_block_of_a_kernel_and_other_layers_is_traced_into(beta: int) -> None:
    plan = transformed(KernelBesideLayers, beta=beta)
    changed = {e.path: e.action for e in plan.edits}
    assert changed["block.conv2d_call"] == "rep_conv"
    assert {"block.move", "block.scale", "block.activation.prelu"} <= set(changed), changed


@pytest.mark.parametrize("kind", [KernelsBesidePlainNorms, KernelsOfSeveralLayers])
@pytest.mark.parametrize("beta", [2, 4])
def test_each_kernel_of_a_block_becomes_a_rep_conv(kind: type[nn.Module], beta: int) -> None:
    plan = transformed(kind, beta=beta)
    assert [e.path for e in plan.edits if e.action == "rep_conv"] == ["block.conv2d_call", "block.conv2d_call_1"]
    assert all(plan.layers[p].role == "binary_conv" for p in ("block.conv2d_call", "block.conv2d_call_1"))


def test_opening_a_block_is_said_and_leaves_the_users_module_alone() -> None:
    model = generic(KernelsOfSeveralLayers())
    network = graph.capture(model, (3, 8, 8))
    assert "with block traced into, which may be more than one whole layer" in network.attempts[1]
    assert network.module.get_submodule("block.conv2d_call") is not None
    assert list(model.block.children()) == []  # type: ignore[union-attr, operator]


def test_a_rule_file_has_the_last_word_on_opening_a_block() -> None:
    rule_set = rules.loads("extends: reptran\nmodules: [{match: {type: Block}, leaf: true}]")
    network = graph.capture(generic(KernelsOfSeveralLayers()), (3, 8, 8), leaf=leaves(rule_set))
    assert len(network.attempts) == 1
    assert any(n.op == "call_module" and n.target == "block" for n in network.graph.nodes)


def test_a_block_that_is_opened_by_a_rule_file_is_left_alone_too() -> None:
    model = generic(KernelsBesidePlainNorms())
    rule_set = rules.loads("extends: reptran\nmodules: [{match: {type: Block}, leaf: false}]")
    graph.capture(model, (3, 8, 8), leaf=leaves(rule_set))
    assert [n for n, _ in model.block.named_children()] == ["bn0", "bn1"]  # type: ignore[union-attr, operator]


class UncalledFallback(Net):
    """What cannot be opened stays whole, and the attempt is said."""

    def build(self) -> None:
        class Block(TwoKernels):
            def forward(self, x: Tensor) -> Tensor:
                h = F.conv2d(torch.from_numpy(x.detach().numpy()), self.wide, padding=1)
                return F.conv2d(h, self.narrow) + x

        self.conv, self.block = Conv(8, 8, 1), Block()

    def body(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x))


def test_a_block_that_cannot_be_opened_stays_whole() -> None:
    network = graph.capture(generic(UncalledFallback()), (3, 8, 8))
    assert "cannot be captured" in network.attempts[1]
    assert any(n.op == "call_module" and n.target == "block" for n in network.graph.nodes)


class MixedForEachSample(Net):
    """Conditional convolution: each sample has its own kernel."""

    def build(self) -> None:
        self.experts, self.router = nn.Parameter(torch.randn(4, 8, 8, 3, 3)), nn.Linear(8, 4)

    def body(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernel = torch.einsum("ne,eoikl->noikl", self.router(x.mean((2, 3))).softmax(1), self.experts)
        y = F.conv2d(Sign.apply(x).view(1, n * c, h, w), Sign.apply(kernel).flatten(0, 1), padding=1, groups=n)
        return y.view(n, c, h, w) + x


def test_a_kernel_for_each_sample_is_refused_by_name() -> None:
    message = refusal(MixedForEachSample)
    assert "conv2d applies a kernel that is computed from the input" in message
    assert "test_idiom_forms.py:" in message


class Tracked(Net):
    """The features of one part of an image are the kernel for all of it, depthwise or whole."""

    whole = viewed = False

    def build(self) -> None:
        self.conv, self.bn = Conv(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)) + x
        n, c, h, w = x.shape
        template = x[:, :, 1:4, 1:4]
        if self.whole:
            found = F.conv2d(x.reshape(1, n * c, h, w), template, padding=1, groups=n)
            return found.view(n, 1, h, w).expand(n, c, h, w)
        if self.viewed:
            images, kernel = x.view(1, n * c, h, w), template.contiguous().view(n * c, 1, 3, 3)
        else:
            images, kernel = x.reshape(1, n * c, h, w), template.reshape(n * c, 1, 3, 3)
        return F.conv2d(images, kernel, padding=1, groups=n * c).view(n, c, h, w)


class TrackedWhole(Tracked):
    whole = True


class TrackedByViews(Tracked):
    viewed = True


@pytest.mark.parametrize("make", [Tracked, TrackedByViews, TrackedWhole])
def test_a_kernel_made_of_another_image_is_carried_by_the_rule_that_its_refusal_names(make: type[Net]) -> None:
    rule = re.search("rule file: `(.*)`", refusal(make))
    assert rule is not None
    plan = transformed(make, rule[1])
    assert {edit.action for edit in plan.edits} >= {"rep_conv", "first_replica"}


class FloatUntilTold(Net):
    """Written for a training loop that binarises the weights before each forward."""

    def build(self) -> None:
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


def test_where_nothing_is_binary_it_is_said_and_what_to_declare() -> None:
    note = "no layer is binary with these weights"
    assert [n[: len(note)] for n in transformed(FloatUntilTold).notes] == [note]
    plan = transformed(FloatUntilTold, "modules: [{match: {path: conv}, role: binary_conv}]")
    assert plan.layers["conv"].binary
    assert plan.notes == []


# ---------------------------------------------------------------------------------------------------------------------
# Modules with one value per channel that look at all channels


class ChannelNorm(nn.Module):
    """SSD's L2Norm: each position's channels have length one, times a learned scale per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.view(1, -1, 1, 1) * x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


class NormOfTheChannels(Net):
    def build(self) -> None:
        self.conv, self.bn, self.norm = Conv(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), ChannelNorm()

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.bn(self.conv(x)) + x)


class WholeBatchNorm(ChannelNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.view(1, -1, 1, 1) * x / x.norm()


class NormOfTheBatch(NormOfTheChannels):
    def build(self) -> None:
        super().build()
        self.norm = WholeBatchNorm()


@pytest.mark.parametrize("beta", [2, 4])
def test_a_norm_over_channels_is_applied_to_each_replica(beta: int) -> None:
    plan = transformed(NormOfTheChannels, beta=beta)
    assert plan.layers["norm"].per_replica
    assert [e.action for e in plan.edits if e.path == "norm"] == ["per_replica"]


def test_a_norm_over_the_batch_is_refused_by_name() -> None:
    message = refusal(NormOfTheBatch)
    assert "(norm) node norm: its input is expanded, and it has no known role: WholeBatchNorm mixes" in message
    assert "{type: WholeBatchNorm}, leaf: false}]`), or declare what it is (`modules:`)" in message


# ---------------------------------------------------------------------------------------------------------------------
# Straight-through estimators written as `x.data = f(x.data)`


class DataReplaced(Net):
    """The gradient of hardtanh, the value of sign; the bypass reads the tensor before and after."""

    def build(self) -> None:
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        before = x * 0.5
        x = F.hardtanh(x)
        x.data = torch.where(x.data < 0, -1.0, 1.0)
        y = self.bn(self.conv(x)) + x + before
        z = F.hardtanh(self.conv2(y))
        z.data = z.data.sign()
        return self.bn2(z) + y


class DataOfCompact(Net):
    """What is replaced is a convolution's output, before the BatchNorm that repeats it."""

    def build(self) -> None:
        self.conv, self.bn = Conv(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = Conv(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        twice = y * 2
        y.data = torch.sign(y.data)
        return self.bn2(self.conv2(self.bn(y))) + twice


@pytest.mark.parametrize("kind", [DataReplaced, DataOfCompact])
@pytest.mark.parametrize("beta", [2, 4])
def test_data_replaced_by_a_function_of_it(kind: type[nn.Module], beta: int) -> None:
    plan = transformed(kind, beta=beta)
    assert sum(e.action == "rep_conv" for e in plan.edits) == 2


NUMBERS_FOR_TENSORS = {
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "pow": lambda x: torch.pow(x, 2) + torch.pow(x.abs() + 1, exponent=0.5),
    "remainder": lambda x: torch.remainder(x, 0.3) + torch.float_power(x, 2.0).float(),
    "xlogy": lambda x: torch.xlogy(x.abs(), 2.0),
    "full_like": lambda x: x * torch.full_like(x, 2.0) + torch.where(x > 0, 1.0, x),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2) + torch.clamp(x, max=0.7),
    "isinstance": lambda x: x + 1 if isinstance(x, Tensor) and isinstance(x, (int, Tensor)) else x - 1,
    "union": lambda x: x + 1 if isinstance(x, int | Tensor) and not isinstance(x, int | float) else x - 1,
    # Defined on a part of all numbers.
    "log1p": lambda x: torch.log1p(x.abs()),
    "asin": lambda x: torch.asin(x.clamp(-0.9, 0.9)) + torch.log2(x.abs() + 1),
    "acosh": lambda x: torch.acosh(x.abs() + 1.5) + torch.logit(x.sigmoid()),
    # Branches along an axis of their own.
    "stack, sum": lambda x: torch.stack([x, 2 * x, x.abs()], 0).sum(0),
    "stack, mean": lambda x: torch.stack([x, 2 * x, x.abs()]).mean(dim=0) + torch.stack([x, -x], dim=0).amax(0),
    "stack, max": lambda x: torch.stack([x, 2 * x, x.abs()], dim=0).max(0)[0],
}


@pytest.mark.parametrize("name", NUMBERS_FOR_TENSORS)
def test_functions_of_torch_between_two_layers(name: str) -> None:
    """Numbers where torch's C++ code takes tensors, too; and what has no value for some numbers."""

    class Between(Net):
        def build(self) -> None:
            self.conv1, self.conv2 = Conv(8, 8, 1), Conv(8, 8, 1)

        def body(self, x: Tensor) -> Tensor:
            return self.conv2(NUMBERS_FOR_TENSORS[name](self.conv1(x)))

    plan = transformed(Between)
    assert [e.path for e in plan.edits if e.action == "rep_conv"] == ["conv1", "conv2"]


@pytest.mark.parametrize("mixes", [lambda x: torch.log1p(x.abs()).mean(1, keepdim=True) + x, lambda x: x.cumsum(1)])
def test_what_mixes_channels_is_not_taken_for_a_function_of_one(mixes: Callable[[Tensor], Tensor]) -> None:
    class Mixing(Net):
        def build(self) -> None:
            self.conv = Conv(8, 8, 1)

        def body(self, x: Tensor) -> Tensor:
            return mixes(self.conv(x))

    plan = transformed(Mixing)  # and its certificate passes: each replica by itself
    step = plan.steps["cumsum" if "cumsum" in plan.steps else "mean"]
    assert isinstance(step.state, Folded), step


class StepPerFilter(nn.Module):
    """A learned step for each filter (LSQ)."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)
        self.register_buffer("ready", torch.zeros(1))
        self.ready: Tensor

    def forward(self, w: Tensor) -> Tensor:
        return Sign.apply(w / self.step) * self.step


class InitialisedByItsFirstKernel(StepPerFilter):
    """It cannot be traced into: whether it writes depends on what it wrote."""

    def forward(self, w: Tensor) -> Tensor:
        if self.training and self.ready < 100:
            self.step.data.copy_(w.detach().abs().mean().expand_as(self.step))
            self.ready.fill_(1000)
        return super().forward(w)


def quantised(kind: type[StepPerFilter]) -> type[Net]:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.quantiser = nn.Conv2d(8, 8, 3, padding=1, bias=False), kind()

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(Sign.apply(x), self.quantiser(self.conv.weight), padding=1)

    class Quantised(Net):
        def build(self) -> None:
            self.block = Block()
            self.bn = nn.BatchNorm2d(8)

        def body(self, x: Tensor) -> Tensor:
            return self.bn(self.block(x))

    return Quantised


def test_a_module_that_quantises_kernels_is_traced_into_for_its_parameters() -> None:
    found = {e.path: (e.before, e.after) for e in transformed(quantised(StepPerFilter)).edits}
    assert found["block.quantiser.step"] == ("(8, 1, 1, 1)", "(4, 1, 1, 1)")


def test_the_rule_for_a_quantiser_that_cannot_be_traced_into_names_path_and_kernel() -> None:
    rule = "modules: [{match: {path: block}, role: binary_conv, kernel: conv.weight}]"
    assert f"(rule file: `{rule}`; `type:` and its class for all alike)" in refusal(
        quantised(InitialisedByItsFirstKernel)
    )
    transformed(quantised(InitialisedByItsFirstKernel), rule)


def test_a_layer_of_torch_that_makes_a_kernel_stays_one_layer() -> None:
    class Made(Net):
        def build(self) -> None:
            self.made_from, self.maker = nn.Parameter(torch.randn(8, 4)), nn.Linear(4, 8 * 9)

        def body(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.maker(self.made_from).view(8, 8, 3, 3), padding=1)

    network = graph.capture(generic(Made()), (3, 8, 8))
    assert len(network.attempts) == 1
    assert any(n.op == "call_module" and n.target == "maker" for n in network.graph.nodes)
