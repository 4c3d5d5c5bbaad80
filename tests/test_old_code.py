"""Code bases as they are found: functions of the old kind, imports from the root, modules made in a forward."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from idiom_networks import Net, generic, transformed
from torch import Tensor, nn

from repbnn_cli.errors import CaptureError
from repbnn_cli.user_code.code_base import folders_above
from repbnn_cli.user_code.cpu_only import running
from repbnn_cli.user_code.legacy import legacy_functions
from repbnn_cli.user_code.user_model import build


class OldSign(torch.autograd.Function):
    """Written for torch before 1.3: `self` is the context, the call is one of an instance."""

    limit = 1.0

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        self.save_for_backward(x)
        return torch.where(x < 0, -1.0, 1.0), x.abs().mean(1, keepdim=True)

    def backward(self, grad: Tensor, grad_mean: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = self.saved_tensors
        return self.inside(x) * grad

    def inside(self, x: Tensor) -> Tensor:
        return (x.abs() < self.limit).to(x.dtype)


class OldScale(torch.autograd.Function):
    """Keeps what its constructor was given."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * self.factor

    def backward(self, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * self.factor


def test_a_function_of_the_old_kind_computes_and_differentiates() -> None:
    x = torch.tensor([[-2.0, 0.5, 0.0, 3.0]], requires_grad=True)
    with legacy_functions():
        signs, mean = OldSign()(x)
        (gradient,) = torch.autograd.grad((OldScale(3.0)(signs) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), x)
    assert signs.tolist() == [[-1.0, 1.0, 1.0, 1.0]]
    assert mean.item() == pytest.approx(5.5 / 4)
    assert gradient.tolist() == [[0.0, 6.0, 9.0, 0.0]]


def test_two_instances_do_not_share_their_numbers() -> None:
    x = torch.ones(2, requires_grad=True)
    with legacy_functions():
        one, other = OldScale(2.0)(x), OldScale(5.0)(x)
        assert torch.autograd.grad(one.sum(), x)[0].tolist() == [2.0, 2.0]
        assert torch.autograd.grad(other.sum(), x)[0].tolist() == [5.0, 5.0]


def test_outside_torch_refuses_them_as_ever() -> None:
    before = torch.autograd.Function.__call__
    with pytest.raises(RuntimeError, match="Legacy autograd function"):
        OldScale(2.0)(torch.ones(1))
    with legacy_functions(), legacy_functions():
        assert torch.autograd.Function.__call__ is not before
    assert torch.autograd.Function.__call__ is before


class NewSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()


def test_a_function_of_the_new_kind_is_not_called_by_its_instance() -> None:
    with legacy_functions(), pytest.raises(RuntimeError, match=r"NewSign has a static forward; call NewSign\.apply"):
        NewSign()(torch.ones(1))


class OldConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, OldSign()(self.weight)[0], None)


class OldNetwork(Net):
    """XNOR-Net's first ports to torch."""

    def build(self) -> None:
        self.conv, self.bn = OldConv(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        signs, _ = OldSign()(x)
        return OldScale(0.5)(self.bn(self.conv(signs))) + x


class ModuleInForward(Net):
    """`nn.Sigmoid()(x)`, with a parameter of the block beside it."""

    def build(self) -> None:
        self.conv, self.bn = OldConv(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.gate = nn.Parameter(torch.tensor([0.3]))

    def body(self, x: Tensor) -> Tensor:
        gate = nn.Sigmoid()(self.gate)
        return nn.Hardtanh(inplace=False)(gate * self.bn(self.conv(x)) + (1 - gate) * x)


@pytest.mark.parametrize("kind", [OldNetwork, ModuleInForward])
@pytest.mark.parametrize("beta", [2, 4])
def test_networks_in_old_code(kind: type[nn.Module], beta: int) -> None:
    with legacy_functions():
        plan = transformed(kind, beta=beta)
        assert plan.layers["conv"].role == "binary_conv"
        generic(kind())(torch.randn(2, 3, 8, 8)).sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Imports


@pytest.fixture
def code_base(tmp_path: Path) -> Iterator[Path]:
    """ROOT/models/cifar/net.py imports `blocks`, a package in ROOT, which imports `sizes`, a file beside it in ROOT."""
    root = tmp_path / "root"
    files = {
        "models/cifar/net.py": "from blocks.layers import layer\ndef make():\n    return layer()\n",
        "blocks/__init__.py": "",
        "blocks/layers.py": "from torch import nn\nimport sizes\ndef layer():\n    return nn.Linear(sizes.N, 2)\n",
        "sizes.py": "N = 7\n",
        "data/readme.txt": "",
        "setup.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    modules, path, finders = set(sys.modules), list(sys.path), list(sys.meta_path)
    yield root
    assert (sys.path, sys.meta_path) == (path, finders)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_modules_in_the_root_of_a_code_base_are_found(code_base: Path) -> None:
    assert build(f"{code_base}/models/cifar/net.py:make").in_features == 7


def test_two_code_bases_do_not_mix(code_base: Path, tmp_path: Path) -> None:
    build(f"{code_base}/models/cifar/net.py:make")
    other = tmp_path / "other"
    (other / "models").mkdir(parents=True)
    (other / "models/net.py").write_text(
        "import sizes\nfrom torch import nn\ndef make():\n    return nn.Linear(sizes.N, 1)\n"
    )
    (other / "sizes.py").write_text("N = 5\n")
    assert build(f"{other}/models/net.py:make").in_features == 5


def test_the_root_of_the_code_base_ends_the_search(code_base: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("")
    (code_base / "models/cifar/net.py").write_text("import outside\n")
    with pytest.raises(CaptureError, match="needs the module outside"):
        build(f"{code_base}/models/cifar/net.py:make")
    assert folders_above(code_base / "models/cifar/net.py") == [str(code_base / "models"), str(code_base)]


def test_a_folder_without_python_is_no_package(code_base: Path) -> None:
    (code_base / "models/cifar/net.py").write_text("import data\n")
    with pytest.raises(CaptureError, match="needs the module data"):
        build(f"{code_base}/models/cifar/net.py:make")


# ---------------------------------------------------------------------------------------------------------------------
# Names that have been dropped


def test_names_of_earlier_years_are_there_while_the_code_runs(tmp_path: Path) -> None:
    file = tmp_path / "old_net.py"
    file.write_text(
        "import collections\nimport numpy as np\nfrom torch import nn\nfrom torch._six import container_abcs\n"
        "class Net(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        assert isinstance([], collections.Iterable) and isinstance({}, container_abcs.Mapping)\n"
        "        return super().forward(x) * np.float(2)\n"
        "def make():\n    return Net(np.int(3.5), 2)\n"
    )
    model = build(f"{file}:make")
    x = torch.ones(1, 3)
    with running(model):
        assert torch.equal(model(x), nn.Linear.forward(model, x) * 2)  # type: ignore[arg-type]
    assert not hasattr(collections, "Iterable")
    assert not {"int", "float"} & set(vars(np))
    assert "torch._six" not in sys.modules
