"""Owns the CIFAR-10 ResNet skeleton that IR-Net, RBNN, ReCU and the full-precision ResNet-20 share.

Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2: a 3×3 stem and 3 stages 16/32/64 of 3
blocks (ResNet-20), or 4 stages 64 to 512 of 2 blocks (ResNet-18). What the binary networks change: convolutions are
binary but for the stem, Hardtanh replaces ReLU, a BatchNorm1d stands before the classifier, and the residual may span
one convolution (Bi-Real structure) instead of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli.binary_conv import BinaryConv2d

Conv = Callable[..., nn.Module]  # (in_channels, out_channels, kernel_size, stride=, padding=)
Shortcut = Callable[[int, int, int], nn.Module]  # (in_channels, out_channels, stride)


class BasicBlock(nn.Module):
    """conv1-bn1 and conv2-bn2 with one residual around each (residual_per_conv) or one around both.

    (N, in_channels, H, W) → (N, channels, H/stride, W/stride).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        *,
        conv: Conv,
        shortcut: Shortcut,
        residual_per_conv: bool,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride=1, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else shortcut(in_channels, channels, stride)
        self.residual_per_conv = residual_per_conv
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        bypass = self.shortcut(x)
        out = self.bn1(self.conv1(x))
        if self.residual_per_conv:
            out = out + bypass
        out = self.activation(out)
        if self.residual_per_conv:
            bypass = out
        out = self.bn2(self.conv2(out)) + bypass
        return self.activation(out)


class CifarResNet(nn.Module):
    """Stem, stages of BasicBlock, global average, BatchNorm1d `bn2`, `linear`.

    widths and depth: channels of each stage and blocks per stage. stem_activation: whether the activation follows the
    stem too. norm_before_linear: whether there is a `bn2`. linear_first only orders the state dict as the authors' of
    ResNet-18, `linear` before `bn2`. log_softmax ends the network in log-probabilities.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        conv: Conv,
        shortcut: Shortcut,
        widths: Sequence[int] = (16, 32, 64),
        depth: int = 3,
        residual_per_conv: bool = True,
        activation: Callable[[Tensor], Tensor] = F.hardtanh,
        stem_activation: bool = True,
        norm_before_linear: bool = True,
        linear_first: bool = False,
        log_softmax: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        in_channels = widths[0]
        for stage, width in enumerate(widths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(
                    BasicBlock(
                        in_channels,
                        width,
                        stride,
                        conv=conv,
                        shortcut=shortcut,
                        residual_per_conv=residual_per_conv,
                        activation=activation,
                    )
                )
                in_channels = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(widths)
        if linear_first:
            self.linear = nn.Linear(in_channels, num_classes)
        self.bn2 = nn.BatchNorm1d(in_channels) if norm_before_linear else nn.Identity()
        if not linear_first:
            self.linear = nn.Linear(in_channels, num_classes)
        self.stem_activation = activation if stem_activation else None
        self.log_softmax = log_softmax
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        if self.stem_activation is not None:
            x = self.stem_activation(x)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        x = self.linear(self.bn2(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return F.log_softmax(x, dim=1) if self.log_softmax else x


def initialise(network: nn.Module) -> None:
    """Kaiming-normal kernels, as these networks are published.

    Binary kernels are standardised before use, so their scale sets the effective learning rate, nothing else.
    """
    for module in network.modules():
        # Not on the meta device, where drawing normals imports PyTorch's decompositions: more than a second.
        if isinstance(module, nn.Conv2d | nn.Linear | BinaryConv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight)


def resnet18(num_classes: int, *, conv: Conv, shortcut: Shortcut, log_softmax: bool = False) -> CifarResNet:
    """ResNet-18 for 32×32 inputs: 4 stages of 2 blocks, one residual per block, no activation after the stem."""
    return CifarResNet(
        num_classes,
        conv=conv,
        shortcut=shortcut,
        widths=(64, 128, 256, 512),
        depth=2,
        residual_per_conv=False,
        stem_activation=False,
        linear_first=True,
        log_softmax=log_softmax,
    )
