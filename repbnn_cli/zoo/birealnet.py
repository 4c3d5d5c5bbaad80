"""Bi-Real Net: Enhancing the Performance of 1-bit CNNs with Improved Representational Capability.

https://arxiv.org/abs/1808.00278. A ResNet whose blocks hold one binary 3×3 convolution each, with a residual around
it, and no activation but sign: twice as many blocks as ResNet. The downsampling bypass pools, then a float 1×1
convolution widens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli.binary_conv import SignConv2d

WIDTHS = (64, 128, 256, 512)


class BiRealBlock(nn.Module):
    """binary conv, bn, + bypass: (N, in_channels, H, W) → (N, channels, H/stride, W/stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.binary_conv = SignConv2d(in_channels, channels, 3, stride=stride, padding=1, flat=True)
        self.bn1 = nn.BatchNorm2d(channels)
        self.downsample = downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        bypass = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.bn1(self.binary_conv(x)) + bypass
        return out


class BiRealNet(nn.Module):
    """(N, 3, 224, 224) → (N, num_classes) logits.

    depths: blocks (single convolutions) per stage; block makes one from in_channels, channels, stride.
    """

    def __init__(self, num_classes: int, *, depths: Sequence[int], block: Callable[[int, int, int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        in_channels = WIDTHS[0]
        for stage, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
            blocks = []
            for index in range(depth):
                blocks.append(block(in_channels, width, 2 if stage > 0 and index == 0 else 1))
                in_channels = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn1(self.conv1(x)), 3, stride=2, padding=1)
        for stage in range(len(WIDTHS)):
            x = getattr(self, f"layer{stage + 1}")(x)
        out: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


def downsample(in_channels: int, channels: int, stride: int) -> nn.Module | None:
    """The bypass where shapes change: AvgPool, float 1×1 convolution, BatchNorm; None where they do not."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(
        nn.AvgPool2d(stride), nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
    )


def birealnet18(num_classes: int) -> nn.Module:
    """18 layers: 4 single-convolution blocks per stage."""
    return BiRealNet(num_classes, depths=(4, 4, 4, 4), block=BiRealBlock)


def birealnet34(num_classes: int) -> nn.Module:
    """34 layers: 6, 8, 12 and 6 single-convolution blocks."""
    return BiRealNet(num_classes, depths=(6, 8, 12, 6), block=BiRealBlock)
