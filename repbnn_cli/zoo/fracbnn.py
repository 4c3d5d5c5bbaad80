"""FracBNN: Accurate and FPGA-Efficient Binary Neural Networks with Fractional Activations.

https://arxiv.org/abs/2012.12206. The first layer is binary too, behind a thermometer encoder; binary convolutions are
refined to 2-bit activations where a learned gate opens (GatedConv2d); every residual sum is followed by a BatchNorm.
Shortcuts have no weights: average pooling, then duplicated channels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli.binarize import uniform_quantize
from repbnn_cli.binary_conv import FracConv2d, GatedConv2d
from repbnn_cli.layers import ChannelDuplicate, RPReLU, ThermometerEncoder
from repbnn_cli.zoo.cifar_resnet import initialise

MOBILE_WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


class BasicBlock(nn.Module):
    """Twice: binarise, conv, bn, RPReLU, + bypass, bn.

    (N, in_channels, H, W) → (N, channels, H/stride, W/stride); channels double where stride is 2.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, conv: type[FracConv2d]) -> None:
        super().__init__()
        self.rprelu1 = RPReLU(channels)
        self.rprelu2 = RPReLU(channels)
        self.conv1 = conv(in_channels, channels, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride=1, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.bn3 = nn.BatchNorm2d(channels)
        self.bn4 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), ChannelDuplicate())

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn3(self.rprelu1(self.bn1(self.conv1(x))) + self.shortcut(x))
        out: Tensor = self.bn4(self.rprelu2(self.bn2(self.conv2(x))) + x)
        return out


class FracBNNResNet20(nn.Module):
    """(N, 3, 32, 32) in [0, 1] → (N, num_classes) logits; conv is the kind of the convolutions after the first."""

    def __init__(self, num_classes: int, *, conv: type[FracConv2d]) -> None:
        super().__init__()
        self.encoder = ThermometerEncoder()
        self.conv1 = FracConv2d(3 * self.encoder.levels, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, conv)
        self.layer2 = _stage(16, 32, 2, conv)
        self.layer3 = _stage(32, 64, 2, conv)
        self.linear = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(self.encoder(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


class MobileBlock(nn.Module):
    """ReActNet-A's block with gated convolutions, and 4-bit bypasses.

    Binarise, 3×3, bn, RPReLU, + pooled bypass, bn; binarise, 1×1, bn, RPReLU, + duplicated bypass, bn.
    (N, in_channels, H, W) → (N, channels, H/stride, W/stride), channels in_channels or twice that.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv3x3 = nn.Sequential(
            GatedConv2d(in_channels, in_channels, 3, stride=stride, padding=1), nn.BatchNorm2d(in_channels)
        )
        self.pointwise = nn.Sequential(GatedConv2d(in_channels, channels, 1), nn.BatchNorm2d(channels))
        self.rprelu1 = RPReLU(in_channels)
        self.rprelu2 = RPReLU(channels)
        self.shiftbn1 = nn.BatchNorm2d(in_channels)
        self.shiftbn2 = nn.BatchNorm2d(channels)
        self.shortcut1 = nn.Identity() if stride == 1 else nn.AvgPool2d(stride)
        self.shortcut2 = nn.Identity() if channels == in_channels else ChannelDuplicate()

    def forward(self, x: Tensor) -> Tensor:
        bypass = self.shortcut1(uniform_quantize(x, 4))
        x = self.shiftbn1(self.rprelu1(self.conv3x3(x)) + bypass)
        bypass = self.shortcut2(uniform_quantize(x, 4))
        out: Tensor = self.shiftbn2(self.rprelu2(self.pointwise(x)) + bypass)
        return out


class FracBNNImageNet(nn.Module):
    """(N, 3, 224, 224) normalised → (N, num_classes) logits; img_std and img_mean take images back to [0, 1] for the
    encoder."""

    img_mean: Tensor
    img_std: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("img_mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1))
        self.register_buffer("img_std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1))
        encoder = ThermometerEncoder()
        stem = FracConv2d(3 * encoder.levels, MOBILE_WIDTHS[0], 3, stride=2, padding=1)
        layers: list[nn.Module] = [nn.Sequential(stem, nn.BatchNorm2d(MOBILE_WIDTHS[0]))]
        for in_channels, channels in pairwise(MOBILE_WIDTHS):
            # Resolution halves wherever the width doubles, except right after the stem.
            stride = 2 if channels != in_channels and channels != 64 else 1
            layers.append(MobileBlock(in_channels, channels, stride))
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(MOBILE_WIDTHS[-1], num_classes)
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        features = self.model(self.encoder(x * self.img_std + self.img_mean))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits


def fracbnn_resnet20(num_classes: int) -> nn.Module:
    """ResNet-20 with precision gates."""
    return FracBNNResNet20(num_classes, conv=GatedConv2d)


def fracbnn_resnet20_1bit(num_classes: int) -> nn.Module:
    """fracbnn_resnet20 without gates, with 1-bit activations: "FracBNN (1 bit)" of RepBNN's Table 7."""
    return FracBNNResNet20(num_classes, conv=FracConv2d)


def fracbnn_imagenet(num_classes: int) -> nn.Module:
    """ReActNet-A's shape with precision gates."""
    return FracBNNImageNet(num_classes)


def _stage(in_channels: int, channels: int, stride: int, conv: type[FracConv2d]) -> nn.Sequential:
    """Three blocks, the first of which downsamples."""
    return nn.Sequential(
        BasicBlock(in_channels, channels, stride, conv=conv),
        BasicBlock(channels, channels, 1, conv=conv),
        BasicBlock(channels, channels, 1, conv=conv),
    )
