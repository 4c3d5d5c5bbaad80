"""The authors' Rep-AdamBNN network as a person writes it by hand: β = 2, no tool, no channel maps.

Written from the description (RepBNN, arXiv 2207.09049, sections 3 and 4): every width doubled, binary kernels of half
as many outputs, `repeat(1, 4, 1, 1)` behind each convolution, the first layer repeated after its BatchNorm, and sums
channel by channel. Names are the source network's; the state dict tells which blocks double.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def forward(state: Mapping[str, Tensor], x: Tensor, beta: int = 2) -> Tensor:
    """Logits in eval mode."""

    def norm(name: str, y: Tensor) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias)

    def rep_conv(name: str, y: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        scale = weight.abs().mean(3, keepdim=True).mean(2, keepdim=True).mean(1, keepdim=True)
        clipped = weight.clamp(-1, 1)
        kernel = scale * weight.sign() - clipped + clipped
        y = F.conv2d(y.sign(), kernel, stride=stride, padding=weight.shape[2] // 2)
        return y.repeat(1, beta * beta, 1, 1)

    def activation(name: str, number: int, y: Tensor) -> Tensor:
        y = F.prelu(y + state[f"{name}.move{number}2.bias"], state[f"{name}.prelu{number}.weight"])
        return y + state[f"{name}.move{number}3.bias"]

    x = norm("feature.0.bn1", F.conv2d(x, state["feature.0.conv1.weight"], stride=2, padding=1))
    x = x.repeat(1, beta, 1, 1)
    for i, stride in enumerate(STRIDES, start=1):
        name = f"feature.{i}"
        y = norm(f"{name}.bn1", rep_conv(f"{name}.binary_3x3", x + state[f"{name}.move11.bias"], stride))
        y = activation(name, 1, y + (F.avg_pool2d(x, 2) if stride == 2 else x))
        shifted = y + state[f"{name}.move21.bias"]
        if f"{name}.binary_pw.weight" in state:
            z = norm(f"{name}.bn2", rep_conv(f"{name}.binary_pw", shifted)) + y
        else:
            halves = [norm(f"{name}.bn2_{n}", rep_conv(f"{name}.binary_pw_down{n}", shifted)) + y for n in (1, 2)]
            z = torch.cat(halves, 1)
        x = activation(name, 2, z)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
