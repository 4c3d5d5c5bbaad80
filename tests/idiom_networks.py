"""What the idiom tests share: binary layers written as research code writes them, and one call that does it all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repbnn_cli import graph, rules, surgery, verify
from repbnn_cli.errors import RepbnnError
from repbnn_cli.graph.interception import interceptable
from repbnn_cli.plan import Plan


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x < 0, -1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1)


class SignAndScale(torch.autograd.Function):
    """Two results from one function, the second a mean over the channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(x < 0, -1.0, 1.0), x.abs().mean(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        return grad


class Conv(nn.Conv2d):
    """Binarises both operands inside."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(Sign.apply(x), Sign.apply(self.weight), self.bias)


def conv(into: int = 8, out: int = 8, **kwargs: Any) -> Conv:
    return Conv(into, out, 3, padding=1, bias=False, **kwargs)


class Net(nn.Module):
    """Stem, `body` between 8 channels and `width`, classifier."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.build()
        self.fc = nn.Linear(self.width, 5)

    def build(self) -> None:
        raise TypeError

    def body(self, x: Tensor) -> Tensor:
        raise TypeError

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.body(self.bn0(self.stem(x))).mean((2, 3)))


def generic(model: nn.Module) -> nn.Module:
    """Every tensor gets values that tell its entries apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.3
                tensor.add_(noise.abs() if "var" in name else noise)
    return model.eval()


def transformed(kind: type[nn.Module], rule_text: str = "", *, shape: Any = (3, 8, 8), beta: int = 2) -> Plan:
    """The plan, after the certificate passed with gradients."""
    torch.manual_seed(0)
    with interceptable():
        model = generic(kind())
    rule_set = rules.loads(f"extends: reptran\n{rule_text}").with_options(beta=beta)
    network = graph.capture(model, shape, leaf=leaves(rule_set))
    plan = surgery.plan(network, rule_set)
    certificate = verify.verify(model, plan, surgery.apply(plan), gradients=True)
    assert certificate.passed, [(c.name, c.summary) for c in certificate.checks if not c.passed]
    return plan


def leaves(rule_set: rules.RuleSet) -> Callable[[str, nn.Module], bool | None]:
    def leaf(path: str, module: nn.Module) -> bool | None:
        rule = rule_set.declare(path, (type(module).__name__,)) if rule_set.modules else None
        return None if rule is None or (rule.leaf is None and rule.role is None) else rule.leaf is not False

    return leaf


def refusal(kind: type[nn.Module], rule_text: str = "", **kwargs: Any) -> str:
    with pytest.raises(RepbnnError) as caught:
        transformed(kind, rule_text, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
