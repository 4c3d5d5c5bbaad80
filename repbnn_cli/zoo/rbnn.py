"""RBNN: Rotated Binary Neural Network.

https://arxiv.org/abs/2009.13055. Kernels are rotated towards the corners of the hypercube before sign, activations are
standardised per sample, and a learned scale multiplies each output channel (RBNNConv2d).
"""

from __future__ import annotations

from torch import nn

from repbnn_cli.binary_conv import RBNNConv2d
from repbnn_cli.layers import ChannelPad
from repbnn_cli.zoo.cifar_resnet import CifarResNet, resnet18
from repbnn_cli.zoo.imagenet_resnet import ImageNetResNet
from repbnn_cli.zoo.vgg_small import VGGSmall


def rbnn_resnet20(num_classes: int) -> nn.Module:
    """ResNet-20 with one residual per block and option-A shortcuts."""
    return CifarResNet(num_classes, conv=RBNNConv2d, shortcut=ChannelPad, residual_per_conv=False)


def rbnn_resnet20_bireal(num_classes: int) -> nn.Module:
    """ResNet-20 with a residual around every convolution."""
    return CifarResNet(num_classes, conv=RBNNConv2d, shortcut=ChannelPad)


def rbnn_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 for 32×32 inputs; shortcuts are binary 1×1 convolutions with BatchNorm."""
    return resnet18(num_classes, conv=RBNNConv2d, shortcut=_binary_shortcut)


def rbnn_vgg_small(num_classes: int) -> nn.Module:
    """VGG-small for 32×32 inputs."""
    return VGGSmall(num_classes, conv=RBNNConv2d)


def rbnn_imagenet_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 for 224×224 inputs with a residual around every convolution."""
    return ImageNetResNet(num_classes, conv=RBNNConv2d, depths=(2, 2, 2, 2), unused_bn3=True)


def rbnn_imagenet_resnet34(num_classes: int) -> nn.Module:
    """ResNet-34 for 224×224 inputs with a residual around every convolution."""
    return ImageNetResNet(num_classes, conv=RBNNConv2d, depths=(3, 4, 6, 3), unused_bn3=True)


def _binary_shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    return nn.Sequential(RBNNConv2d(in_channels, channels, 1, stride=stride), nn.BatchNorm2d(channels))
