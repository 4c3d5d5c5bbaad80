"""Networks that write their forward as research code does; each survives only if the capture gets one thing right.

IDIOMS: name → a function that builds the network; it takes (N, 3, 8, 8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from networks import BinaryConv, Sign, conv
from torch import Tensor, nn
from torch.nn import functional as F


class _Idiom(nn.Module):
    """Stem and classifier around `body`; `channels` is what body gives."""

    channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv = conv(8, 8)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(self.channels, 4)
        self.setup()

    def setup(self) -> None:
        pass

    def body(self, x: Tensor) -> Tensor:
        raise TypeError

    def forward(self, x: Tensor) -> Any:
        x = self.body(self.bn(self.stem(x)))
        return self.fc(x.mean((2, 3)) if x.dim() == 4 else x)


class FunctionInForward(_Idiom):
    """A custom autograd.Function called by the network itself, on an activation and on a weight."""

    def setup(self) -> None:
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.5)

    def body(self, x: Tensor) -> Tensor:
        return F.conv2d(Sign.apply(x), Sign.apply(self.weight), padding=1) + x


class BoundApply(_Idiom):
    """`SomeFunction.apply` bound in __init__: out of sight of anything that patches it later."""

    def setup(self) -> None:
        self.sign = Sign.apply

    def body(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(self.sign(x * 1.5)))


class Aliasing(_Idiom):
    """`r = x; x += y`: r is the sum, too."""

    def body(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv(x))
        x = x * 0.5
        r = x
        x += y
        return torch.cat([x[:, :4], r[:, 4:]], 1) * 2


class InPlace(_Idiom):
    """In-place functions, methods and operators on what others still look at."""

    def setup(self) -> None:
        self.relu = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(x))
        y = x.view(x.size(0), -1)
        x.mul_(2)
        x -= 0.25
        self.relu(x)
        return F.hardtanh(x + 0.1, 0.2, 0.9, inplace=True) + y.view_as(x)


class ItemAssignment(_Idiom):
    def body(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :4] = x[:, 4:]
        out[:, 4:, ::2] = -x[:, :4, ::2]
        return self.bn1(self.conv(out)) + out


class DataAssignment(_Idiom):
    """`x.data = v`: the value changes, the gradient does not know."""

    def body(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.data = torch.sign(x).data
        return self.bn1(self.conv(x)) * y


class ClampedScales(_Idiom):
    """A loop over the BatchNorms that clamps their scales, at every forward."""

    def body(self, x: Tensor) -> Tensor:
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.data.clamp_(min=0.01, max=0.8)
        return self.bn1(self.conv(x)) + x


class NumpyNumbers(_Idiom):
    """NumPy integers and floats in shapes, strides and factors."""

    def setup(self) -> None:
        self.half = np.int64(4)
        self.scale = np.float32(0.5)
        self.stride = np.array([2, 2])[0]

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, self.half :], x[:, : self.half]], 1) * self.scale
        return F.avg_pool2d(self.bn1(self.conv(x)), int(self.stride)) + x[:, :, :: self.stride, :: self.stride]


class ShapeArithmetic(_Idiom):
    """Sizes in Python arithmetic, `math`-like rounding, loops, asserts and branches."""

    def body(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        assert h == w, "square images"
        assert x.size(1) % 2 == 0
        groups = round(c / 4)
        total = x.new_zeros(n, c, h, w)
        for i in range(c // groups):
            if i % 2 == 0:
                total = total + x * (i + 1) / float(h * w)
        y = x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.bn1(self.conv(y)) + total


class InstanceChecks(_Idiom):
    """isinstance(x, Tensor), torch.is_tensor, len, unpacking and `in`."""

    def body(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        assert torch.is_tensor(x)
        assert len(x.shape) == 4
        first, second = torch.chunk(x, 2, dim=1)
        parts = x.split(4, 1)
        assert len(parts) == 2
        x = torch.cat([second, first, *parts], 1)[:, :8]
        return self.bn1(self.conv(x))


class Lengths(_Idiom):
    """The batch and its channels by `len`, in views and as numbers."""

    def body(self, x: Tensor) -> Tensor:
        y = x.view(len(x), 2, -1, *x.shape[2:]).flip(1).reshape(len(x), len(x[0]), *x.shape[2:])
        return self.bn1(self.conv(y)) + x.new_ones(len(x), 1, 1, 1) / len(x)


class TrainingFlag(_Idiom):
    """`self.training` handed to a function: the graph has to follow train() and eval()."""

    def body(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.3, training=self.training)
        return self.bn1(self.conv(x)) + F.dropout2d(x, 0.2, self.training)


class NestedTrainingFlag(_Idiom):
    def setup(self) -> None:
        self.inner = nn.Sequential(_DropBlock(), _DropBlock())

    def body(self, x: Tensor) -> Tensor:
        return self.inner(self.bn1(self.conv(x)))


class _DropBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.conv = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(self.conv(x)), 0.5, self.training) + x


class BlockWithScale(_Idiom):
    """A block that owns one scale beside its children: kept whole, its binary convolution would disappear."""

    def setup(self) -> None:
        self.block = _ScaledBlock()

    def body(self, x: Tensor) -> Tensor:
        return self.block(x)


class _ScaledBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.conv = conv(8, 8)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.scale + x


class ConstantsInForward(_Idiom):
    """Tensors made in forward, with and without a size that comes from the input."""

    def body(self, x: Tensor) -> Tensor:
        ramp = torch.arange(x.size(3), dtype=x.dtype).view(1, 1, 1, -1)
        fixed = torch.tensor([1.0, -1.0] * 4).view(1, 8, 1, 1)
        blank = torch.zeros(x.size(0), 8, 1, 1, dtype=x.dtype)
        return self.bn1(self.conv(x * ramp * fixed.to(x.dtype) + blank))


class CountingBuffer(_Idiom):
    """A buffer that every forward updates, and that decides what the next one gives."""

    def setup(self) -> None:
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(1, 8, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3), keepdim=True))
        return self.bn1(self.conv(x - self.mean)) * self.calls


class Reused(_Idiom):
    """One module called twice."""

    def body(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(self.bn1(self.conv(x)) + x))


class Tied(_Idiom):
    """Two layers with one kernel."""

    def setup(self) -> None:
        self.other = conv(8, 8)
        self.other.weight = self.conv.weight

    def body(self, x: Tensor) -> Tensor:
        return self.bn1(self.other(self.conv(x)))


class Unused(_Idiom):
    """Modules that are never called and parameters that are never read, between those that are."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.register_module("nothing", None)
        self.last = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.arange(5))
        self.register_buffer("scratch", torch.arange(2), persistent=False)

    def body(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(x))


class LoopOverModules(_Idiom):
    def setup(self) -> None:
        self.convs = nn.ModuleList(conv(8, 8) for _ in range(3))
        self.norms = nn.ModuleDict({str(i): nn.BatchNorm2d(8) for i in range(3)})

    def body(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.convs):
            x = self.norms[str(i)](layer(x)) + x
        return x


class KeywordsAndMethods(_Idiom):
    """Keyword arguments, chained methods, dtype conversions, comparisons as masks."""

    def body(self, x: Tensor) -> Tensor:
        mask = (x.detach() > 0).type_as(x)
        x = torch.clamp(input=x, min=-1, max=1).mul(mask) + x.masked_fill(mask == 0, 0.5)
        return self.bn1(self.conv(x)).permute(0, 2, 3, 1).permute(0, 3, 1, 2).contiguous()


class FrozenBranch(_Idiom):
    """A decision on a tensor's value: frozen, and said so."""

    def body(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e-6:
            x = x * 2
        return self.bn1(self.conv(x))


class TupleOutput(_Idiom):
    def body(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(x))

    def forward(self, x: Tensor) -> Any:
        features = self.body(self.bn(self.stem(x)))
        return self.fc(features.mean((2, 3))), (features, [features.sum()])


class DictOutput(TupleOutput):
    def forward(self, x: Tensor) -> Any:
        logits, (features, _) = super().forward(x)
        return {"logits": logits, "features": features, "size": 4}


class OverwrittenWeight(_Idiom):
    """A plain convolution whose weight a latent copy overwrites before each call."""

    def setup(self) -> None:
        self.latent = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.plain = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def body(self, x: Tensor) -> Tensor:
        self.plain.weight.data = self.latent.sign().data
        return self.bn1(self.plain(Sign.apply(x)))


class WeightFromParameter(_Idiom):
    """The network calls F.conv2d on a child's weight."""

    def setup(self) -> None:
        self.child = BinaryConv(8, 8, 3, padding=1, bias=False)

    def body(self, x: Tensor) -> Tensor:
        return self.bn1(F.conv2d(Sign.apply(x), Sign.apply(self.child.weight), padding=1))


IDIOMS: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, _Idiom) and cls is not _Idiom
}
