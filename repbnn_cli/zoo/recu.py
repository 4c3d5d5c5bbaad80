"""ReCU: Reviving the Dead Weights in Binary Neural Networks.

https://arxiv.org/abs/2103.12369. Kernels are clamped at a quantile before sign, so that weights far from zero can
still change it; a learned scale multiplies each output channel (ReCUConv2d). Shortcuts pool instead of slicing.
"""

from __future__ import annotations

from torch import nn

from repbnn_cli.binary_conv import ReCUConv2d
from repbnn_cli.layers import ChannelPad
from repbnn_cli.zoo.cifar_resnet import CifarResNet, resnet18
from repbnn_cli.zoo.imagenet_resnet import ImageNetResNet
from repbnn_cli.zoo.vgg_small import VGGSmall


def recu_resnet20(num_classes: int) -> nn.Module:
    """ResNet-20 with a residual around every convolution."""
    return CifarResNet(num_classes, conv=ReCUConv2d, shortcut=_pooled_shortcut)


def recu_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 for 32×32 inputs, one residual per block."""
    return resnet18(num_classes, conv=ReCUConv2d, shortcut=_pooled_shortcut)


def recu_vgg_small(num_classes: int) -> nn.Module:
    """VGG-small for 32×32 inputs."""
    return VGGSmall(num_classes, conv=ReCUConv2d)


def recu_imagenet_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 for 224×224 inputs with a residual around every convolution."""
    return ImageNetResNet(num_classes, conv=ReCUConv2d, depths=(2, 2, 2, 2))


def recu_imagenet_resnet34(num_classes: int) -> nn.Module:
    """ResNet-34 for 224×224 inputs with a residual around every convolution."""
    return ImageNetResNet(num_classes, conv=ReCUConv2d, depths=(3, 4, 6, 3))


def _pooled_shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(stride), ChannelPad(in_channels, channels))
