"""The certificate of layers that multiply by a scale of their kernel behind the convolution, as XNOR-Net does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import Body, Sign, randomize, transformed
from test_verify import changed, edit_of, failed, swapped
from torch import Tensor, fx, nn
from torch.nn import functional as F

from repbnn_cli import surgery
from repbnn_cli.errors import SurgeryError
from repbnn_cli.inherit import Kernel
from repbnn_cli.verify import verify


class ScaledAfter(nn.Conv2d):
    """As XNOR-Net writes it: signs are convolved, and mean |W| of each filter multiplies the result."""

    factor = 1.0
    form: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        signs = F.conv2d(Sign.apply(x), Sign.apply(self.weight), None, self.stride, self.padding, 1, self.groups)
        return signs * self.form(self.weight.abs()) * self.factor


class ScaledLine(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(Sign.apply(x), Sign.apply(self.weight)) * self.weight.abs().mean((1, 2)).view(1, -1, 1)


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(Sign.apply(x), Sign.apply(self.weight), self.bias) * self.weight.abs().mean(1)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda w: w.mean((1, 2, 3)).view(1, -1, 1, 1),
    "None": lambda w: w.mean((1, 2, 3))[None, :, None, None],
    "transpose": lambda w: w.mean((1, 2, 3), keepdim=True).transpose(0, 1),
    "detach": lambda w: w.detach().mean((1, 2, 3)).reshape(-1, 1, 1),
    "norm": lambda w: (w.flatten(1).norm(1, dim=1) / w[0].nelement()).view(-1, 1, 1),
}


def scaled_after(form: str = "view", groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = [ScaledAfter(8, 16, 3, padding=1, groups=groups), ScaledAfter(16, 16, 3, groups=groups)]
    for layer in layers:
        layer.form = FORMS[form]
    return randomize(Body(nn.Sequential(layers[0], nn.BatchNorm2d(16), layers[1], nn.BatchNorm2d(16)), out=16))


@pytest.mark.parametrize("inherit", ["fold", "reshape", "none"])
@pytest.mark.parametrize("beta", [2, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_scale_of_the_kernel_behind_the_convolution(inherit: str, beta: int, groups: int) -> None:
    """The Rep layer's scale is that of its own filters: of filter c mod O/β for source channel c."""
    model = scaled_after(groups=groups)
    certificate = verify(model, *transformed(model, beta=beta, inherit=inherit), gradients=True)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    assert certificate.checks[0].values["max_abs"] == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_such_a_scale(form: str) -> None:
    model = scaled_after(form)
    assert verify(model, *transformed(model), gradients=False).passed


def test_such_a_scale_in_one_dimension_and_of_linear_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.bn = nn.Conv1d(3, 8, 3), ScaledLine(8, 8, 3), nn.BatchNorm1d(8)
            self.hidden, self.last = ScaledLinear(8, 8), ScaledLinear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.hidden(self.bn(self.conv(self.stem(x))).mean(2)))

    model = randomize(Net())
    for share in ("all", "1_over_beta", "1_over_beta2"):
        plan, rep = transformed(model, (3, 16), last_layer=share)
        assert verify(model, plan, rep, gradients=True).passed, share


def test_such_a_scale_with_one_thing_wrong() -> None:
    model = scaled_after()
    plan, rep = transformed(model)
    rep.get_submodule("body.2").factor = 1.01
    assert failed(verify(model, plan, rep, gradients=False))["merged-kernel identity"].values["failed"] == ["body.2"]
    rep.get_submodule("body.2").factor = 1.0
    rep.get_submodule("body.2").form = lambda w: FORMS["view"](w).flip(1)
    assert failed(verify(model, plan, rep, gradients=False))["merged-kernel identity"].values["failed"] == ["body.2"]
    ((name, kernel),) = edit_of(plan, "body.0").tensors[:1]
    assert isinstance(kernel, Kernel)
    rest = edit_of(plan, "body.0").tensors[1:]
    wrong = changed(plan, "body.0", tensors=((name, replace(kernel, column=swapped(kernel.column))), *rest))
    found = failed(verify(model, wrong, surgery.apply(wrong), gradients=False))
    assert found["merged-kernel identity"].values["failed"] == ["body.0"]


class Xnor(nn.Conv2d):
    """With XNOR-Net's input scale, too: a box filter over the mean of |x|, by a convolution of its own."""

    def forward(self, x: Tensor) -> Tensor:
        box = torch.ones(1, 1, 3, 3, device=x.device, dtype=x.dtype) / 9
        scale = F.conv2d(x.abs().mean(1, keepdim=True), box, stride=self.stride, padding=self.padding)
        signs = F.conv2d(Sign.apply(x), Sign.apply(self.weight), None, self.stride, self.padding)
        return signs * self.alpha() * scale

    def alpha(self) -> Tensor:
        return self.weight.abs().mean((1, 2, 3)).view(1, -1, 1, 1)


class Written(Xnor):
    def alpha(self) -> Tensor:
        return self.weight.abs().mean((1, 2, 3)).view(1, 8, 1, 1)


def xnor(kind: type[Xnor]) -> nn.Module:
    torch.manual_seed(0)
    layers = [kind(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), kind(8, 8, 3, bias=False)]
    return randomize(Body(nn.Sequential(*layers, nn.BatchNorm2d(8))))


@pytest.mark.parametrize("inherit", ["fold", "reshape", "none"])
@pytest.mark.parametrize("beta", [2, 4])
def test_scales_of_kernel_and_input_in_a_forward_that_is_traced_into(inherit: str, beta: int) -> None:
    model = xnor(Xnor)
    plan, rep = transformed(model, beta=beta, inherit=inherit)
    certificate = verify(model, plan, rep, gradients=True)
    assert [c.summary for c in certificate.checks if not c.passed] == []
    assert rep.get_parameter("body.0.weight").shape == (8 // beta, 8 * beta, 3, 3)
    with torch.no_grad():
        rep.get_submodule("body.1").weight[3] *= 1.1
    assert failed(verify(model, plan, rep, gradients=True))["merged-kernel identity"].values["failed"] == ["body.1"]


def test_such_a_scale_of_other_filters_is_found() -> None:
    model = xnor(Xnor)
    plan, rep = transformed(model)
    assert isinstance(rep, fx.GraphModule)
    node = next(n for n in rep.graph.nodes if n.target == "view" and n.meta["path"] == "body.0")
    with rep.graph.inserting_after(node):
        flipped = rep.graph.call_method("flip", (node, 1))
    flipped.meta = dict(node.meta)
    node.replace_all_uses_with(flipped, delete_user_cb=lambda user: user is not flipped)
    found = failed(verify(model, plan, rep, gradients=True))
    assert found["merged-kernel identity"].values["failed"][0].startswith("body.0:mul")


def test_a_scale_with_its_size_written_down_is_refused() -> None:
    """The message says which parameter, where, and what to do."""
    expected = (
        r"\(body\.0\) node mul: takes a number per channel from body\.0\.weight, .*; multiply .* write no size down"
    )
    with pytest.raises(SurgeryError, match=expected):
        transformed(xnor(Written))


def test_a_scale_of_the_kernel_of_a_layer_that_stays_whole() -> None:
    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            conv, norm = self.body
            y = conv(Sign.apply(self.bn(self.stem(x)))) * conv.weight.abs().mean((1, 2, 3)).view(1, -1, 1, 1)
            return self.fc(norm(y).mean((2, 3)))

    model = randomize(Net(nn.Sequential(Signs(8, 8, 3, bias=False), nn.BatchNorm2d(8))))
    for inherit in ("fold", "none"):
        plan, rep = transformed(model, inherit=inherit)
        assert verify(model, plan, rep, gradients=True).passed
        assert verify(model, plan, rep, gradients=False).passed


class Signs(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, Sign.apply(self.weight))


class CountsItsInputs(nn.Conv2d):
    """Divides by numbers that it keeps; the one that torch's class keeps is larger in the Rep layer."""

    def __init__(self) -> None:
        super().__init__(8, 16, 3, padding=1, bias=False)
        self.outputs = 16

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().sum((1, 2, 3)) / (self.in_channels * 9 + self.outputs)
        return F.conv2d(Sign.apply(x), Sign.apply(self.weight), None, 1, 1) * scale.view(1, -1, 1, 1)


@pytest.mark.parametrize("beta", [2, 4])
def test_a_layer_may_divide_by_its_number_of_inputs(beta: int) -> None:
    torch.manual_seed(0)
    model = randomize(Body(nn.Sequential(CountsItsInputs(), nn.BatchNorm2d(16)), out=16))
    plan, rep = transformed(model, beta=beta)
    assert verify(model, plan, rep, gradients=True).passed
    assert model.get_submodule("body.0").in_channels == 8
    rep.get_submodule("body.0").in_channels = 8  # a number that was forgotten is a wrong scale
    assert failed(verify(model, plan, rep, gradients=True)).keys() == {"merged-kernel identity"}
