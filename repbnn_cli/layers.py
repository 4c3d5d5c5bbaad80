"""Owns the small layers of the networks that are not convolutions: shifts, RPReLU, channel padding, the encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnableBias(nn.Module):
    """x + bias per channel, bias of shape (1, C, 1, 1): the shift of RSign and of RPReLU.

    RSign is this layer followed by the sign that a binary convolution applies to its input.
    Source: ReActNet, Liu et al., arXiv 2003.03488, section 4.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias

    def extra_repr(self) -> str:
        return f"{self.bias.shape[1]}"


class RPReLU(nn.Module):
    """PReLU with a learned shift before and after it, per channel: prelu(x + shift_x) + shift_y.

    Source: ReActNet, Liu et al., arXiv 2003.03488, section 4.2; the parameter names are FracBNN's.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_x = LearnableBias(channels)
        self.shift_y = LearnableBias(channels)
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shift_y(self.prelu(self.shift_x(x)))
        return out


class ChannelPad(nn.Module):
    """Bypass without weights that widens by zeros: as many on both sides of the channel axis.

    (N, in_channels, H, W) → (N, out_channels, H/stride, W/stride), every stride-th pixel.
    Source: option A of ResNet, He et al., arXiv 1512.03385, section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))

    def extra_repr(self) -> str:
        return f"{self.padding}, stride={self.stride}"


class ChannelDuplicate(nn.Module):
    """Bypass without weights that doubles the channels: (N, C, H, W) → (N, 2C, H, W), cat(x, x).

    Source: FracBNN, Zhang et al., arXiv 2012.12206, section 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), dim=1)


class ThermometerEncoder(nn.Module):
    """Unary code of 8-bit pixels: (N, C, H, W) in [0, 1] → (N, C·levels, H, W) of ±1.

    A pixel is rounded to one of levels + 1 steps, s = round(255·x / resolution) with resolution = 256 / levels; plane i
    of its channel is +1 where s > i, else −1. No gradient reaches the input.
    Source: FracBNN, Zhang et al., arXiv 2012.12206, section 3.
    """

    def __init__(self, levels: int = 32) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.round(x * (255 * self.levels / 256)).unsqueeze(2)
        # 0 … levels − 1, made on the fly: a buffer would need a name in the state dict or be lost in a meta build, and
        # torch.arange cannot be captured with the dtype of x.
        planes = (x.new_ones(self.levels).cumsum(0) - 1).view(1, 1, -1, 1, 1)
        return ((steps > planes).to(x.dtype) * 2 - 1).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"
