"""ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions.

https://arxiv.org/abs/2003.03488. Every sign gets a learned shift per channel (RSign) and every activation is an RPReLU.
ReActNet-A is MobileNet-V1 with dense 3×3 convolutions and a residual around every convolution; where channels double,
two 1×1 convolutions run side by side and are concatenated. AdamBNN (How Do Adam and Training Strategies Help BNNs
Optimization, https://arxiv.org/abs/2106.11309) trains the same network and stores kernels in 4-D.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli.binary_conv import SignConv2d
from repbnn_cli.layers import LearnableBias
from repbnn_cli.zoo.birealnet import BiRealNet, downsample

WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


class Stem(nn.Module):
    """Float 3×3 convolution of stride 2 and its BatchNorm; no activation, the first block's RSign follows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(self.conv1(x))
        return out


class Block(nn.Module):
    """RSign, binary 3×3, bn, + bypass, RPReLU; RSign, binary 1×1, bn, + bypass, RPReLU.

    (N, C, H, W) → (N, out_channels, H/stride, W/stride), out_channels C or 2C.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, flat: bool) -> None:
        super().__init__()
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(f"a ReActNet block keeps or doubles its {in_channels} channels, not {out_channels}")
        self.move11 = LearnableBias(in_channels)
        self.binary_3x3 = SignConv2d(in_channels, in_channels, 3, stride=stride, padding=1, flat=flat)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.move12 = LearnableBias(in_channels)
        self.prelu1 = nn.PReLU(in_channels)
        self.move13 = LearnableBias(in_channels)
        self.move21 = LearnableBias(in_channels)
        if in_channels == out_channels:
            self.binary_pw = SignConv2d(in_channels, in_channels, 1, flat=flat)
            self.bn2 = nn.BatchNorm2d(in_channels)
        else:
            self.binary_pw_down1 = SignConv2d(in_channels, in_channels, 1, flat=flat)
            self.binary_pw_down2 = SignConv2d(in_channels, in_channels, 1, flat=flat)
            self.bn2_1 = nn.BatchNorm2d(in_channels)
            self.bn2_2 = nn.BatchNorm2d(in_channels)
        self.move22 = LearnableBias(out_channels)
        self.prelu2 = nn.PReLU(out_channels)
        self.move23 = LearnableBias(out_channels)
        self.stride = stride
        self.widens = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        bypass = F.avg_pool2d(x, 2) if self.stride == 2 else x
        x = self.bn1(self.binary_3x3(self.move11(x))) + bypass
        x = self.move13(self.prelu1(self.move12(x)))
        shifted = self.move21(x)
        if self.widens:
            half1 = self.bn2_1(self.binary_pw_down1(shifted)) + x
            half2 = self.bn2_2(self.binary_pw_down2(shifted)) + x
            x = torch.cat((half1, half2), dim=1)
        else:
            x = self.bn2(self.binary_pw(shifted)) + x
        out: Tensor = self.move23(self.prelu2(self.move22(x)))
        return out


class ReActNetA(nn.Module):
    """(N, 3, 224, 224) → (N, num_classes) logits; flat as in SignConv2d."""

    def __init__(self, num_classes: int, *, flat: bool) -> None:
        super().__init__()
        self.feature = nn.ModuleList([Stem(WIDTHS[0])])
        for in_channels, channels in pairwise(WIDTHS):
            # Resolution halves wherever the width doubles, except right after the stem.
            stride = 2 if channels != in_channels and channels != 64 else 1
            self.feature.append(Block(in_channels, channels, stride, flat=flat))
        self.fc = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.feature:
            x = block(x)
        out: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


class ResNetBlock(nn.Module):
    """RSign, binary 3×3, bn, + bypass, RPReLU: Bi-Real Net's block with ReActNet's activations.

    (N, in_channels, H, W) → (N, channels, H/stride, W/stride).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.move0 = LearnableBias(in_channels)
        self.binary_conv = SignConv2d(in_channels, channels, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.move1 = LearnableBias(channels)
        self.prelu = nn.PReLU(channels)
        self.move2 = LearnableBias(channels)
        self.downsample = downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        bypass = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.binary_conv(self.move0(x))) + bypass
        out: Tensor = self.move2(self.prelu(self.move1(x)))
        return out


def reactnet_a(num_classes: int) -> nn.Module:
    """ReActNet-A as released with ReActNet: kernels stored flat, as `weights`."""
    return ReActNetA(num_classes, flat=True)


def adambnn_reactnet_a(num_classes: int) -> nn.Module:
    """ReActNet-A as released with AdamBNN: kernels stored in 4-D, as `weight`."""
    return ReActNetA(num_classes, flat=False)


def reactnet_resnet18(num_classes: int) -> nn.Module:
    """birealnet18 with RSign before each binary convolution and RPReLU after each residual."""
    return BiRealNet(num_classes, depths=(4, 4, 4, 4), block=ResNetBlock)
