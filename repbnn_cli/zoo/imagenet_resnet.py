"""Owns the ImageNet ResNet skeleton that IR-Net, RBNN and ReCU share.

Deep Residual Learning for Image Recognition, arXiv 1512.03385, basic blocks. What the binary networks change: 3×3
convolutions are binary, Hardtanh replaces ReLU, a residual spans every convolution, and a BatchNorm1d stands before the
classifier.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli.zoo.cifar_resnet import Conv

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """conv1-bn1 + bypass, Hardtanh, conv2-bn2 + x, Hardtanh; the bypass is a float 1×1 convolution where shapes change.

    (N, in_channels, H, W) → (N, channels, H/stride, W/stride).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, conv: Conv) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride=1, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        bypass = x if self.downsample is None else self.downsample(x)
        x = F.hardtanh(self.bn1(self.conv1(x)) + bypass)
        return F.hardtanh(self.bn2(self.conv2(x)) + x)


class ImageNetResNet(nn.Module):
    """(N, 3, 224, 224) → (N, num_classes) logits.

    depths: blocks per stage. unused_bn3: hold a BatchNorm1d `bn3` that no forward calls; the published checkpoints of
    IR-Net and RBNN have its tensors. log_softmax ends the network in log-probabilities.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        conv: Conv,
        depths: Sequence[int],
        unused_bn3: bool = False,
        log_softmax: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        in_channels = WIDTHS[0]
        for stage, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(BasicBlock(in_channels, width, stride, conv=conv))
                in_channels = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn2 = nn.BatchNorm1d(in_channels)
        self.fc = nn.Linear(in_channels, num_classes)
        if unused_bn3:
            self.bn3 = nn.BatchNorm1d(num_classes)
        self.log_softmax = log_softmax

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.hardtanh(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        for stage in range(len(WIDTHS)):
            x = getattr(self, f"layer{stage + 1}")(x)
        x = self.fc(self.bn2(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return F.log_softmax(x, dim=1) if self.log_softmax else x
