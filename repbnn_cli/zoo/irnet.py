"""IR-Net: Forward and Backward Information Retention for Accurate Binary Neural Networks.

https://arxiv.org/abs/1909.10788. Kernels are standardised before sign and scaled by a power of two, both signs learn
through the error decay estimator (IRConv2d).
"""

from __future__ import annotations

from torch import nn

from repbnn_cli.binary_conv import IRConv2d
from repbnn_cli.layers import ChannelPad
from repbnn_cli.zoo.cifar_resnet import CifarResNet, resnet18
from repbnn_cli.zoo.imagenet_resnet import ImageNetResNet
from repbnn_cli.zoo.vgg_small import VGGSmall


def irnet_resnet20(num_classes: int) -> nn.Module:
    """ResNet-20 with a residual around every convolution and option-A shortcuts."""
    return CifarResNet(num_classes, conv=IRConv2d, shortcut=ChannelPad)


def irnet_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 for 32×32 inputs; shortcuts are float 1×1 convolutions with BatchNorm; ends in LogSoftmax."""
    return resnet18(num_classes, conv=IRConv2d, shortcut=_float_shortcut, log_softmax=True)


def irnet_vgg_small(num_classes: int) -> nn.Module:
    """VGG-small for 32×32 inputs."""
    return VGGSmall(num_classes, conv=IRConv2d)


def irnet_imagenet_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 for 224×224 inputs with a residual around every convolution."""
    return ImageNetResNet(num_classes, conv=IRConv2d, depths=(2, 2, 2, 2), unused_bn3=True, log_softmax=True)


def irnet_imagenet_resnet34(num_classes: int) -> nn.Module:
    """ResNet-34 for 224×224 inputs with a residual around every convolution."""
    return ImageNetResNet(num_classes, conv=IRConv2d, depths=(3, 4, 6, 3), unused_bn3=True, log_softmax=True)


def _float_shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))
