"""Random binary networks, described by plain values: blocks of every kind that the transform has to carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from networks import BinaryConv, Sign
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli.binary_conv import FracConv2d, IRConv2d, RBNNConv2d, ReCUConv2d, SignConv2d

CONVS: dict[str, Callable[..., nn.Module]] = {
    "foreign": lambda i, o, k, s: BinaryConv(i, o, k, s, k // 2, bias=False),
    "foreign with bias": lambda i, o, k, s: BinaryConv(i, o, k, s, k // 2),
    "IR-Net": lambda i, o, k, s: IRConv2d(i, o, k, s, k // 2),
    "ReCU": lambda i, o, k, s: ReCUConv2d(i, o, k, s, k // 2),
    "RBNN": lambda i, o, k, s: RBNNConv2d(i, o, k, s, k // 2),
    "Frac": lambda i, o, k, s: FracConv2d(i, o, k, s, k // 2),
    "flat": lambda i, o, k, s: SignConv2d(i, o, k, s, k // 2, flat=True),
    "float": lambda i, o, k, s: nn.Conv2d(i, o, k, s, k // 2, bias=False),
    "product": lambda i, o, k, s: PatchesConv(i, o, k, s),
    "transposed": lambda i, o, k, s: nn.Sequential(nn.MaxPool2d(s), nn.ConvTranspose2d(i, o, k, 1, k // 2)),
}
SHORTCUTS = ("convolution", "pool and pad", "slice and pad", "pool and double")
OTHER_WORDS = {"product", "transposed"}
HEADS = ("average", "flatten", "view", "view(-1, C)", "1x1", "product", "transposed")


class PatchesConv(nn.Module):
    """A binary convolution as im2col and a product."""

    def __init__(self, into: int, out: int, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.weight = nn.Parameter(torch.randn(out, into * size * size))

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(Sign.apply(x), self.size, padding=self.size // 2, stride=self.stride)
        height, width = (-(-n // self.stride) for n in x.shape[2:])
        return (Sign.apply(self.weight) @ patches).view(x.shape[0], -1, height, width)


@dataclass(frozen=True)
class Block:
    kind: str
    conv: str
    activation: str
    branches: int = 2
    shortcut: str = "convolution"


@dataclass(frozen=True)
class Spec:
    width: int
    blocks: tuple[Block, ...]
    head: str
    stem_norm: bool

    @property
    def in_other_words(self) -> bool:
        """Whether some of its layers are no ordinary convolution or linear module."""
        return bool(OTHER_WORDS & {self.head, *(b.conv for b in self.blocks)})


class Stage(nn.Module):
    """One block: (N, C, H, W) → (N, out, H', W')."""

    def __init__(self, spec: Block, channels: int, size: int) -> None:
        super().__init__()
        self.spec, self.out, self.size = spec, channels, size
        make = CONVS[spec.conv]
        pieces = [channels]
        if spec.kind == "down":
            self.out, self.size = 2 * channels, size // 2
            pieces = [2 * channels]
        elif spec.kind == "cat":
            pieces = [8 * max(1, channels // 16)] * spec.branches  # so that β = 4 divides whatever comes next
            self.out = sum(pieces)
        elif spec.kind == "dense":
            pieces = [8]
            self.out = channels + 8
        elif spec.kind == "split":
            pieces = [channels // 2]
        into = channels // 2 if spec.kind == "split" else channels
        stride = 2 if spec.kind == "down" else 1
        if spec.kind == "grouped":
            self.convs = nn.ModuleList([BinaryConv(channels, channels, 3, 1, 1, groups=2, bias=False)])
        else:
            kernels = [3, 1, 3]
            self.convs = nn.ModuleList(make(into, out, k, stride) for out, k in zip(pieces, kernels, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for out in pieces)
        self.act = nn.PReLU(self.out) if spec.activation == "prelu" else nn.Hardtanh()
        if spec.kind == "down" and spec.shortcut == "convolution":
            self.shortcut = nn.Sequential(nn.Conv2d(channels, self.out, 1, 2, bias=False), nn.BatchNorm2d(self.out))
        if spec.kind == "gate":
            self.squeeze, self.excite = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.activation == "none":
            return self.body(x)
        return self.act(self.body(x))

    def body(self, x: Tensor) -> Tensor:
        kind = self.spec.kind
        if kind == "split":
            left, right = x.chunk(2, dim=1)
            y = torch.cat([self.norms[0](self.convs[0](left)), right], 1)
            n, c, h, w = y.shape
            return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        branches = [norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True)]
        if kind == "cat":
            return torch.cat(branches, dim=1)
        if kind == "dense":
            return torch.cat([x, *branches], 1)
        y = branches[0]
        if kind == "down":
            return y + self.bypass(x)
        if kind == "gate":
            scale = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
            return y * scale + x
        if kind == "grouped":
            return F.channel_shuffle(y, 2) + x
        return y if kind == "plain" else y + x

    def bypass(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        if self.spec.shortcut == "convolution":
            return self.shortcut(x)
        if self.spec.shortcut == "slice and pad":
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, c // 2, c - c // 2), "constant", 0)
        x = F.avg_pool2d(x, 2)
        if self.spec.shortcut == "pool and pad":
            return F.pad(x, (0, 0, 0, 0, c // 2, c - c // 2))
        return torch.cat((x, x), dim=1)


class Network(nn.Module):
    def __init__(self, spec: Spec, size: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.spec = spec
        self.stem = nn.Conv2d(3, spec.width, 3, padding=1, bias=not spec.stem_norm)
        self.norm = nn.BatchNorm2d(spec.width) if spec.stem_norm else nn.Identity()
        channels, stages = spec.width, []
        for block in spec.blocks:
            stage = Stage(block, channels, size)
            channels, size = stage.out, stage.size
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.channels, self.size = channels, size
        features = channels * size * size if spec.head in ("flatten", "view") else channels
        self.fc = nn.Conv2d(channels, classes, 1) if spec.head == "1x1" else nn.Linear(features, classes)
        if spec.head == "transposed":
            self.fc = nn.ConvTranspose2d(channels, classes, 2, 2)
        if spec.head == "product":
            self.fc, self.matrix = nn.Identity(), nn.Parameter(torch.randn(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.norm(self.stem(x)))
        head = self.spec.head
        if head == "product":
            return x.mean((2, 3)) @ self.matrix
        if head in ("1x1", "transposed"):
            return F.adaptive_avg_pool2d(self.fc(x), 1).flatten(1)
        if head == "flatten":
            return self.fc(torch.flatten(x, 1))
        if head == "view":
            return self.fc(x.view(-1, self.channels * self.size * self.size))
        x = F.avg_pool2d(x, self.size)
        return self.fc(x.view(-1, self.channels) if head == "view(-1, C)" else x.mean((2, 3)))


def blocks(kinds: tuple[str, ...], convs: list[str]) -> st.SearchStrategy[Block]:
    return st.builds(
        Block,
        kind=st.sampled_from(kinds),
        conv=st.sampled_from(convs),
        activation=st.sampled_from(("hardtanh", "prelu", "none")),
        branches=st.integers(2, 3),
        shortcut=st.sampled_from(SHORTCUTS),
    )


def specs(*kinds: str, ordinary: bool = False) -> st.SearchStrategy[Spec]:
    """Networks of one to four blocks of these kinds, with at most two that halve the image.

    ordinary: of convolution and linear modules alone.
    """
    convs, heads = ([n for n in names if not ordinary or n not in OTHER_WORDS] for names in (CONVS, HEADS))
    sequences = st.lists(blocks(kinds, convs), min_size=1, max_size=4)
    few = sequences.filter(lambda chosen: sum(b.kind == "down" for b in chosen) <= 2)
    return st.builds(
        Spec,
        width=st.sampled_from((8, 16)),
        blocks=few.map(tuple),
        head=st.sampled_from(heads),
        stem_norm=st.booleans(),
    )
