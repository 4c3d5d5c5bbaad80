"""Small networks for tests, with values that make a wrong channel visible, and how to run one and compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import graph, rules, surgery
from repbnn_cli.plan import Plan

# ---------------------------------------------------------------------------------------------------------------------
# Layers as other people write them


class Sign(torch.autograd.Function):
    """Sign whose gradient passes where |x| ≤ 1: lost when a tracer runs the forward on a proxy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1)


class PlusSign(torch.autograd.Function):
    """±1, +1 for 0; the gradient passes everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def signs(x: Tensor) -> Tensor:
    return PlusSign.apply(x)


class BConv(nn.Conv2d):
    """A binary 3×3 convolution without scales."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(signs(x), signs(self.weight), None, 1, 1)


class BinaryConv(nn.Conv2d):
    """A Conv2d subclass that binarises both operands inside and scales by mean|w| per filter."""

    def binarize_input(self, x: Tensor) -> Tensor:
        return Sign.apply(x)

    def binary_weight(self) -> Tensor:
        return Sign.apply(self.weight) * self.weight.detach().abs().mean((1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            self.binarize_input(x),
            self.binary_weight(),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


def conv(into: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> BinaryConv:
    return BinaryConv(into, out, kernel, stride, kernel // 2, groups=groups, bias=bias)


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks


class Residual(nn.Module):
    """Stem, two residual blocks (the second widens by a float 1×1 shortcut), average, classifier."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv1 = conv(width, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, 2 * width, stride=2)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.act = nn.PReLU(2 * width)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn(self.stem(x)))
        x = self.bn1(self.conv1(x)) + x
        x = self.act(self.bn2(self.conv2(x)) + self.bn3(self.shortcut(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Body(nn.Module):
    """Stem and classifier around `body`, which takes `width` channels and gives `out`."""

    def __init__(self, body: nn.Module, width: int = 8, out: int | None = None, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.body = body
        self.fc = nn.Linear(out or width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.bn(self.stem(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


# ---------------------------------------------------------------------------------------------------------------------
# Running them


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every channel different from its neighbours: fresh BatchNorms would hide a wrong channel map. Eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator) * (high - low) + low).to(like.dtype)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                ranges = {
                    "weight": (0.5, 1.5),
                    "bias": (-0.5, 0.5),
                    "running_mean": (-0.5, 0.5),
                    "running_var": (0.5, 2),
                }
                for name, (low, high) in ranges.items():
                    tensor = getattr(module, name)
                    if tensor is not None:
                        tensor.copy_(uniform(tensor, low, high))
            elif isinstance(module, nn.PReLU):
                module.weight.copy_(uniform(module.weight, 0.1, 0.6))
        for name, tensor in model.named_parameters():
            if name.endswith(("alpha", "threshold")):
                tensor.copy_(uniform(tensor, 0.05, 0.3))
            elif tensor.ndim == 4 and tensor.shape[0] == 1 and tensor.shape[2:] == (1, 1):  # shifts
                tensor.copy_(uniform(tensor, -0.3, 0.3))
    return model.eval()


def images(
    batch: int = 2, size: int = 8, channels: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rule_set(name: str = "reptran", **options: Any) -> rules.RuleSet:
    return rules.load(name).with_options(**options)


def written(text: str, **options: Any) -> rules.RuleSet:
    """Rules from text, indented as in a test."""
    return rules.loads(text, name="mine.yaml").with_options(**options)


def planned(
    model: nn.Module, shape: tuple[int, ...] = (3, 8, 8), rule: rules.RuleSet | str = "reptran", **options: Any
) -> Plan:
    chosen = rules.load(rule) if isinstance(rule, str) else rule

    def leaf(path: str, module: nn.Module) -> bool | None:
        declared = chosen.declare(path, tuple(c.__name__ for c in type(module).__mro__)) if chosen.modules else None
        return None if declared is None else declared.leaf is not False

    ours = type(model).__module__.startswith("repbnn_cli.zoo.")  # captured as the tool captures them
    network = graph.capture(model, shape, leaf=leaf, shapes_only=ours)
    return surgery.plan(network, chosen.with_options(**options))


def transformed(
    model: nn.Module, shape: tuple[int, ...] = (3, 8, 8), rule: rules.RuleSet | str = "reptran", **options: Any
) -> tuple[Plan, nn.Module]:
    plan = planned(model, shape, rule, **options)
    return plan, surgery.apply(plan)


def outcome(
    model: nn.Module, call: Callable[..., Any], inputs: tuple[Any, ...], *, train: bool
) -> tuple[list[Tensor], dict[str, Tensor | None], dict[str, Tensor]]:
    """Outputs, gradient of each of `model`'s parameters, and buffers afterwards, of `call`; `model` is as before."""
    saved = copy.deepcopy(model.state_dict())
    modes = {m: m.training for m in model.modules()}
    extra = [m for m in call.modules() if m not in modes] if isinstance(call, nn.Module) else []
    for m in (*modes, *extra):
        m.training = train
    model.zero_grad()
    torch.manual_seed(3)
    outputs = tensors(call(*(x.detach().clone() for x in inputs)))
    loss = sum(
        (o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs if o.requires_grad
    )
    loss.backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    model.zero_grad()
    for m, training in modes.items():
        m.training = training
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(saved[name])
    return [o.detach().clone() for o in outputs], grads, buffers


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, tuple | list) else []


def assert_same_outcome(model: nn.Module, call: Callable[..., Any], *inputs: Any, train: bool) -> None:
    """`call` computes and learns exactly what `model` does: the same operations in the same order, to the last bit."""
    expected = outcome(model, model, inputs, train=train)
    got = outcome(model, call, inputs, train=train)
    assert len(got[0]) == len(expected[0])
    for a, b in zip(got[0], expected[0], strict=True):
        assert torch.equal(a, b)
    assert any(g is not None and bool(g.abs().max() > 0) for g in expected[1].values())
    for part in (1, 2):
        for name, value in expected[part].items():
            other = got[part][name]
            assert (other is None) == (value is None), name
            assert value is None or torch.equal(other, value), name
