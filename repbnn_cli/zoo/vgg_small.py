"""Owns the VGG-small skeleton for CIFAR-10 that IR-Net, RBNN and ReCU share.

VGG-small as of LQ-Nets, https://arxiv.org/abs/1807.10029: a float 3×3 stem to 128 channels, five binary 3×3
convolutions to 128, 256, 256, 512, 512 with max-pooling after the first, third and fifth, one classifier, no residuals.
Pooling stands before the BatchNorm.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli.zoo.cifar_resnet import Conv


class VGGSmall(nn.Module):
    """(N, 3, 32, 32) → (N, num_classes) logits; conv makes the binary convolutions."""

    def __init__(self, num_classes: int, *, conv: Conv) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 128, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(128)
        self.conv1 = conv(128, 128, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(128)
        self.conv2 = conv(128, 256, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(256)
        self.conv3 = conv(256, 256, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(256)
        self.conv4 = conv(256, 512, 3, padding=1)
        self.bn4 = nn.BatchNorm2d(512)
        self.conv5 = conv(512, 512, 3, padding=1)
        self.bn5 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn0(self.conv0(x)))
        x = F.hardtanh(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        x = F.hardtanh(self.bn2(self.conv2(x)))
        x = F.hardtanh(self.bn3(F.max_pool2d(self.conv3(x), 2)))
        x = F.hardtanh(self.bn4(self.conv4(x)))
        x = F.hardtanh(self.bn5(F.max_pool2d(self.conv5(x), 2)))
        out: Tensor = self.fc(x.flatten(1))
        return out
