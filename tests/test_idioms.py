"""Convolutions of research code, called as functions or foreign modules, each transformed and verified, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from idiom_networks import Conv, Net, Sign, conv, generic, refusal, transformed
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import graph, rules, surgery, verify
from repbnn_cli.inherit import layout

# ---------------------------------------------------------------------------------------------------------------------
# Convolutions called as functions


class FunctionalConv(Net):
    """The block owns the kernel and calls F.conv2d itself."""

    def build(self) -> None:
        self.weight, self.bn = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(Sign.apply(x), Sign.apply(self.weight), padding=1)) + x


class ScaledKernel(Net):
    """Kernel from a latent tensor, its mean and a learned scale per filter, as (O,); the bias is real."""

    def build(self) -> None:
        self.weight, self.bn = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.BatchNorm2d(8)
        self.alpha, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def body(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = Sign.apply(w) * self.alpha.view(self.alpha.size(0), 1, 1, 1)
        return self.bn(F.conv2d(Sign.apply(x), w, self.bias, padding=1)) + x


class KernelOfAChild(Net):
    """The convolution's module only stores; the block computes."""

    def build(self) -> None:
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        w = Sign.apply(self.conv.weight)
        return self.bn(F.conv2d(Sign.apply(x), w, stride=self.conv.stride, padding=self.conv.padding)) + x


class FunctionalLinear(Net):
    def build(self) -> None:
        self.hidden, self.bn = nn.Parameter(torch.randn(8, 8)), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).mean((2, 3))
        return self.fc(self.bn(F.linear(Sign.apply(x), Sign.apply(self.hidden))))


class GateInsideConv(Net):
    """A convolution that owns the layers of a gate on its input, and parameters that training alone moves."""

    def build(self) -> None:
        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight, self.alpha = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.zeros(8))
                self.gate = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.Sigmoid())
                self.t = torch.tensor([0.5])

            def forward(self, x: Tensor) -> Tensor:
                n, c, _, _ = x.shape
                x = x * self.gate(F.adaptive_avg_pool2d(x, 1).view(n, c)).view(n, c, 1, 1) * self.t
                w = self.weight + 1e-3 * torch.sigmoid(self.alpha.view(self.alpha.size(0), 1, 1, 1))
                return F.conv2d(Sign.apply(x), Sign.apply(w), padding=1)

        self.conv, self.bn = Gated(), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


class ConvBnInOne(Net):
    """One module owns a kernel and a BatchNorm: the repeat goes between them."""

    def build(self) -> None:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight, self.bn = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.BatchNorm2d(8)

            def forward(self, x: Tensor) -> Tensor:
                return self.bn(F.conv2d(Sign.apply(x), Sign.apply(self.weight), padding=1))

        self.both = Both()

    def body(self, x: Tensor) -> Tensor:
        return self.both(x) + x


class FunctionalClassifier(Net):
    def build(self) -> None:
        self.conv, self.bn, self.head = conv(), nn.BatchNorm2d(8), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        return F.linear((self.bn(self.conv(x)) + x).mean((2, 3)), self.head)


FUNCTIONAL = [FunctionalConv, ScaledKernel, KernelOfAChild, FunctionalLinear, GateInsideConv, ConvBnInOne]


@pytest.mark.parametrize("kind", [*FUNCTIONAL, FunctionalClassifier])
@pytest.mark.parametrize("beta", [2, 4])
def test_convolutions_called_as_functions(kind: type[nn.Module], beta: int) -> None:
    plan = transformed(kind, beta=beta)
    narrow = ["conv.gate.0"] if kind is GateInsideConv and beta == 4 else []
    assert [e.path for e in plan.edits if e.action == "per_replica"] == narrow


@pytest.mark.parametrize("kind", FUNCTIONAL)
def test_a_called_convolution_becomes_a_rep_conv_with_its_own_bits(kind: type[nn.Module]) -> None:
    plan = transformed(kind)
    called = [e for e in plan.edits if e.layout is not None]
    assert [e.action for e in called] == ["rep_conv"]
    assert plan.layers[called[0].path].weight_bits == 1


def test_names_of_the_state_dict_do_not_change_for_called_convolutions() -> None:
    torch.manual_seed(0)
    model = generic(GateInsideConv())
    plan = surgery.plan(graph.capture(model, (3, 8, 8)), rules.load("reptran"))
    assert list(surgery.apply(plan).state_dict()) == list(model.state_dict())


def test_way_3_of_the_last_layer_for_a_called_one() -> None:
    transformed(FunctionalClassifier, "options: {last_layer: 1_over_beta2}")


class MixedKernels(Net):
    """Expert kernels, mixed anew for each forward from the input: no parameter is the kernel."""

    def build(self) -> None:
        self.experts, self.route = nn.Parameter(torch.randn(4, 8, 8, 3, 3)), nn.Linear(8, 4)
        self.bn = nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        mix = torch.softmax(self.route(x.mean((2, 3))), 1).mean(0)
        return self.bn(F.conv2d(Sign.apply(x), Sign.apply(torch.einsum("e,eoikl->oikl", mix, self.experts)), padding=1))


class FixedView(Net):
    """A size written down as a number does not follow the parameters."""

    def build(self) -> None:
        self.weight, self.bn = nn.Parameter(torch.randn(8 * 8 * 9, 1)), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(Sign.apply(x), Sign.apply(self.weight.view(8, 8, 3, 3)), padding=1))


class OutputsLast(Net):
    """As TensorFlow keeps kernels."""

    def build(self) -> None:
        self.kernel, self.bn = nn.Parameter(torch.randn(3, 3, 8, 8)), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(Sign.apply(x), Sign.apply(self.kernel).permute(3, 2, 0, 1), padding=1))


class OutputsLastInside(Net):
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(Sign.apply(x), Sign.apply(self.kernel).permute(3, 2, 0, 1), padding=1)

    def build(self) -> None:
        self.conv, self.bn = self.Conv(), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (OutputsLast, ["test_idioms.py:", "cannot tell the axes of kernel (3, 3, 8, 8)", "store it in that order"]),
        (
            OutputsLastInside,
            ["test_idioms.py:", "(conv)", "holds no tensor of the kernel (8, 8, 3, 3) that it applies"],
        ),
        (MixedKernels, ["test_idioms.py:", "mixes channels in a way that is not known"]),
        (
            FixedView,
            ["test_idioms.py:", "conv2d_call", "how to compute a kernel (4, 16, 3, 3)", "keep the module"],
        ),
    ],
)
def test_kernels_that_cannot_be_resized_are_refused_with_place(kind: type[nn.Module], says: list[str]) -> None:
    message = refusal(kind)
    assert all(text in message for text in says), message


# ---------------------------------------------------------------------------------------------------------------------
# Foreign convolutions and the tensors beside their kernels


def with_conv(make: Callable[[], nn.Module]) -> type[nn.Module]:
    class OneConv(Net):
        def build(self) -> None:
            self.conv, self.bn = make(), nn.BatchNorm2d(8)

        def body(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + x

    return OneConv


def beside(extra: Callable[[nn.Module], None], forward: Callable[[Any, Tensor], Tensor]) -> type[nn.Module]:
    class Extra(Conv):
        def __init__(self) -> None:
            super().__init__(8, 8, 3, padding=1, bias=False)
            extra(self)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return with_conv(Extra)


def scale(*shape: int) -> Callable[[Any], None]:
    return lambda m: setattr(m, "scale", nn.Parameter(torch.ones(shape)))


def after(m: Any, x: Tensor) -> Tensor:
    return Conv.forward(m, x) * m.scale


def before(m: Any, x: Tensor) -> Tensor:
    return Conv.forward(m, x + m.scale)


def on_kernel(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(Sign.apply(x), Sign.apply(m.weight) * m.scale, padding=1)


def nowhere(m: Any, x: Tensor) -> Tensor:
    return Conv.forward(m, x) + (0 * m.scale.sum() if m.training else 0)


BESIDE = {
    "scale (O,1,1) after": (scale(8, 1, 1), after, {"scale": 0}, {}),
    "scale (1,O,1,1) after": (scale(1, 8, 1, 1), after, {"scale": 1}, {}),
    "scale (O,1,1,1) on the kernel": (scale(8, 1, 1, 1), on_kernel, {"scale": 0}, {}),
    "threshold (1,I,1,1) before": (scale(1, 8, 1, 1), before, {}, {"scale": 1}),
    "scale (1,I,1,1) on the kernel": (scale(1, 8, 1, 1), on_kernel, {}, {"scale": 1}),
    "rows (1,1,H,1) as many as channels": (scale(1, 1, 8, 1), after, {}, {}),
    "one per layer": (scale(1), after, {}, {}),
    "used in training only": (scale(8, 1, 1, 1), nowhere, {"scale": 0}, {}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_tensor_beside_the_kernel_is_told_by_what_it_does(name: str) -> None:
    extra, forward, out, into = BESIDE[name]
    plan = transformed(beside(extra, forward))
    assert (plan.layers["conv"].out_tensors, plan.layers["conv"].in_tensors) == (out, into)


def test_a_tensor_that_cannot_be_told_is_refused_and_a_rule_file_helps() -> None:
    kind = beside(scale(8), nowhere)
    assert (
        "has the tensor scale (8,), whose channel axis cannot be told; trace into it (rule file: `modules: "
        "[{match: {type: Extra}, leaf: false}]`), or declare it (`per_channel:`)"
    ) in refusal(kind)
    declared = (
        "{match: {type: Extra}, role: binary_conv, kernel: weight, per_channel: {scale: {channels: out, axis: 0}}}"
    )
    transformed(kind, f"modules: [{declared}]")


class CachedNumbers(nn.Module):
    """Keeps sizes and a fan-in as plain numbers, and its kernel flat."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.count = (8, 8, 3, 3), 8 * 8 * 9
        self.weights = nn.Parameter(torch.randn(self.count, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(Sign.apply(x), Sign.apply(self.weights.view(self.shape)), padding=1)


class LatentCopy(nn.Module):
    """A latent kernel, written into a child convolution at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.latent, self.conv = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data = Sign.apply(self.latent).data
        return self.conv(Sign.apply(x))


class Twice(Conv):
    """Two convolutions by one kernel: the signs of x, and what they leave over."""

    def forward(self, x: Tensor) -> Tensor:
        one = Sign.apply(x)
        w = Sign.apply(self.weight)
        return F.conv2d(one, w, padding=1) + 0.5 * F.conv2d(Sign.apply(x - one), w, padding=1)


class TwoLevels(Conv):
    """Two-valued kernel that is not a sign: centre and distance per filter."""

    def forward(self, x: Tensor) -> Tensor:
        centre = self.weight.mean((1, 2, 3), keepdim=True)
        w = Sign.apply(self.weight - centre) * self.weight.std((1, 2, 3), keepdim=True) + centre
        return F.conv2d(Sign.apply(x), w, padding=1)


class ModeInside(Conv):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x / x.std((1, 2, 3), keepdim=True)
        return Conv.forward(self, x)


@pytest.mark.parametrize("make", [CachedNumbers, LatentCopy, lambda: Twice(8, 8, 3), lambda: TwoLevels(8, 8, 3),
                                  lambda: ModeInside(8, 8, 3, padding=1, bias=False),
                                  lambda: nn.utils.parametrizations.weight_norm(conv()),
                                  lambda: Conv(8, 8, 3, padding=1)])  # fmt: skip
def test_foreign_convolutions(make: Callable[[], nn.Module]) -> None:
    transformed(with_conv(make))


class TableOfSizes(Conv):
    """A matrix whose size follows from the kernel's: there is nothing to resize it by."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=1, bias=False)
        self.register_buffer("turn", torch.eye(72))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(Sign.apply(x), Sign.apply((self.weight.flatten(1) @ self.turn).view_as(self.weight)), padding=1)


def test_a_module_that_does_not_run_resized_is_refused_with_its_path() -> None:
    message = refusal(with_conv(TableOfSizes))
    assert "conv: TableOfSizes does not run with its resized tensors" in message


class StoredSigns(nn.Conv2d):
    """Keeps its signs beside the real kernel, in a layout of its own, and writes them in training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        signs = (self.weight.detach() > 0).float().view(len(self.weight), 1, -1)
        self.signs = nn.Parameter(signs, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        real = self.weight - self.weight.detach()
        if self.training:
            self.signs.data = (self.weight.detach().view(len(self.weight), 1, -1) > 0).float()
        return F.conv2d(Sign.apply(x), real + self.signs.view_as(self.weight) * 2 - 1, None, padding=1)


class KeepsSigns(Net):
    def build(self) -> None:
        self.conv, self.bn = StoredSigns(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


def test_a_second_copy_of_a_kernel_in_another_layout() -> None:
    torch.manual_seed(0)
    model = KeepsSigns().eval()
    rule_set = rules.load("reptran")
    plan = surgery.plan(graph.capture(model, (3, 8, 8)), rule_set)
    layer = plan.layers["conv"]
    assert (layer.role, layer.kernel, layer.same_tensors) == ("binary_conv", "weight", ("signs",))
    rep = surgery.apply(plan)
    signs, weight = rep.get_submodule("conv").signs, rep.get_submodule("conv").weight
    assert tuple(signs.shape) == (4, 1, 16 * 9)
    assert torch.equal(signs.view_as(weight) > 0.5, weight > 0)
    assert verify.verify(model, plan, rep, gradients=True).passed


@pytest.mark.parametrize(
    ("stored", "becomes"),
    [
        ((8, 4, 3, 3), (4, 8, 3, 3)),
        ((288, 1), (288, 1)),
        ((8, 1, 36), (4, 1, 72)),
        ((8, 36), (4, 72)),
        ((1, 32, 9), (1, 32, 9)),
        ((4, 8, 3, 3), None),
        ((9, 32), None),
        ((8, 4, 3), None),
    ],
)
def test_layouts_of_a_kernel(stored: tuple[int, ...], becomes: tuple[int, ...] | None) -> None:
    assert layout(stored, (8, 4, 3, 3), (4, 8, 3, 3)) == becomes
