"""A data set that a network learns in seconds, a binary network that steps in milliseconds, and recipes for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli.binary_conv import BinaryConv2d, IRConv2d
from repbnn_cli.data.splits import Dataset, Split, fingerprint_of
from repbnn_cli.train import engine, recipes
from repbnn_cli.train.recipes import Recipe

TEXT = """
data: [digits]
augmentation: cifar
batch: 16
epochs: 3
binarization: ede
optimizer: {name: sgd, lr: 0.05, weight_decay: {kernels: 1e-4, others: 1e-4}}
schedule: {name: cosine, warmup: 1}
"""


def split(count: int, classes: int, size: int, seed: int) -> Split:
    """Noise with a bright bar whose place and colour tell the class."""
    labels = torch.arange(count) % classes
    images = torch.randint(0, 60, (count, 3, size, size), generator=torch.Generator().manual_seed(seed))
    height = size // 4
    for image, label in zip(images, labels.tolist(), strict=True):
        row = label // 3 * height
        image[label % 3, row : row + height] += 180
    return Split(images.to(torch.uint8), labels)


def toy(train: int = 64, test: int = 32, classes: int = 4, size: int = 8) -> Dataset:
    parts = split(train, classes, size, 1), split(test, classes, size, 2)
    return Dataset("digits", *parts, tuple("abcdefghij")[:classes], fingerprint_of(*parts))


class Tiny(nn.Module):
    """Stem, one binary convolution with a residual around it, dropout (so that random numbers count), classifier."""

    def __init__(self, conv: type[BinaryConv2d] = IRConv2d, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv = conv(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x))
        x = self.bn2(self.conv(x)) + x
        return self.fc(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def tiny(seed: int = 0, conv: type[BinaryConv2d] = IRConv2d, classes: int = 4) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(conv, classes)


def recipe(*changes: str, text: str = TEXT) -> Recipe:
    return recipes.override(recipes.loads(text, "toy.yaml"), changes)


def run(folder: Path, *changes: str, network: nn.Module | None = None, **arguments: Any) -> engine.Outcome:
    """A short run of the tiny network, or of `network`."""
    made = {"dataset": toy(), "recipe": recipe(*changes)} | arguments
    return engine.finetune(network or tiny(), made.pop("dataset"), made.pop("recipe"), folder, **made)


OWN_NETWORK = """
from torch import nn

from repbnn_cli.binary_conv import IRConv2d

def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), IRConv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )
"""


def own_network() -> nn.Module:
    """A small network as a user has it; OWN_NETWORK is its file."""
    space: dict[str, Any] = {}
    exec(OWN_NETWORK, space)
    made: nn.Module = space["make"]()
    return made


def main() -> None:
    """`python train_examples.py FOLDER [resume]`: a run that says each step and can be killed at any moment."""
    torch.set_num_threads(1)
    run(
        Path(sys.argv[1]),
        "ema=0.9",
        "accumulate=2",
        "distillation.weight=0.5",
        teacher=tiny(seed=7),
        resume="resume" in sys.argv,
        options=engine.Options(log_every=1, save_every=2),
        on_step=lambda progress: print(progress.epoch, progress.batch, flush=True),
    )


if __name__ == "__main__":
    main()
