"""Full-precision ResNet-20 for CIFAR-10, plain and in Bi-Real structure.

Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385, section 4.2. The second network puts a
residual around every convolution, as Bi-Real Net does: RepBNN (https://arxiv.org/abs/2207.09049), section 5.2 and
Table 6, repeats both to show that the structure, not 1-bit weights, is what RepConv needs. Names are those of
irnet_resnet20; there is no BatchNorm before the classifier.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from repbnn_cli.layers import ChannelPad
from repbnn_cli.zoo.cifar_resnet import CifarResNet


def resnet20(num_classes: int) -> nn.Module:
    """ResNet-20, option-A shortcuts, one residual per two convolutions."""
    return _resnet20(num_classes, residual_per_conv=False)


def resnet20_bireal(num_classes: int) -> nn.Module:
    """ResNet-20, option-A shortcuts, a residual around every convolution."""
    return _resnet20(num_classes, residual_per_conv=True)


def _resnet20(num_classes: int, *, residual_per_conv: bool) -> nn.Module:
    return CifarResNet(
        num_classes,
        conv=_conv,
        shortcut=ChannelPad,
        residual_per_conv=residual_per_conv,
        activation=F.relu,
        norm_before_linear=False,
    )


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=False)
