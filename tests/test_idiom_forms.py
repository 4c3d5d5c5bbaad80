"""Forms in which public code bases write their blocks: transformed and verified like any other, or refused."""

from __future__ import annotations

import pytest
import torch
from idiom_networks import Conv, Net, Sign, generic, leaves, transformed
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli import graph, rules

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


class KernelsOfSeveralLayers(Net):
    """A block without children owns a 3×3 and a 1×1 kernel."""

    def build(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.wide, self.narrow = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(8, 8, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                h = F.conv2d(Sign.apply(x), Sign.apply(self.wide), padding=1)
                return F.conv2d(Sign.apply(h), Sign.apply(self.narrow)) + x

        self.block, self.bn = Block(), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.bn(self.block(x))


@pytest.mark.parametrize("kind", [KernelsBesidePlainNorms, KernelsOfSeveralLayers])
@pytest.mark.parametrize("beta", [2, 4])
def test_each_kernel_of_a_block_becomes_a_rep_conv(kind: type[nn.Module], beta: int) -> None:
    plan = transformed(kind, beta=beta)
    assert [e.path for e in plan.edits if e.action == "rep_conv"] == ["block.conv2d_call", "block.conv2d_call_1"]
    assert all(plan.layers[p].role == "binary_conv" for p in ("block.conv2d_call", "block.conv2d_call_1"))


def test_opening_a_block_is_said_and_leaves_the_users_module_alone() -> None:
    model = generic(KernelsOfSeveralLayers())
    network = graph.capture(model, (3, 8, 8))
    assert "with block traced into, whose convolutions are of different shapes" in network.attempts[1]
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
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.wide, self.narrow = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(8, 8, 1, 1))

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
