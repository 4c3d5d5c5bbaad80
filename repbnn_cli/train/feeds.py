"""What a run eats: the training batches and the test batches of a data set, as its recipe wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from repbnn_cli.data import Batches, Dataset, FolderBatches, ImageFolders, eval_batches, eval_folder_batches
from repbnn_cli.data.batches import Source
from repbnn_cli.data.image_crops import Augmentation
from repbnn_cli.data.imagenet import Damages, warn
from repbnn_cli.data.sharding import batches_in
from repbnn_cli.errors import DataError, UsageError
from repbnn_cli.restoring import unchanged
from repbnn_cli.train.recipe_models import RecipeFile

Images = Callable[[], Iterable[tuple[Tensor, Tensor]]]

# What the recipes' names mean; jitter is IR-Net's, lighting that of Bi-Real Net, ReActNet and AdamBNN.
FOLDERS = {
    "imagenet": Augmentation(lighting=0.0),
    "imagenet-lighting": Augmentation(lighting=0.1),
    "imagenet-jitter": Augmentation(lighting=0.0, jitter=(0.2, 0.2, 0.2, 0.1)),
}
MEMORY = ("none", "cifar")


@dataclass(frozen=True)
class Feed:
    """train: batches by epoch and position; test: starts over at every call; example: two test images, normalised."""

    train: Source
    test: Images
    example: Tensor


def open_feed(
    dataset: Dataset | ImageFolders,
    recipe: RecipeFile,
    *,
    seed: int,
    device: torch.device,
    channels_last: bool = True,
    eval_batch: int = 500,
    workers: int = 2,
    rank: int = 0,
    world: int = 1,
    report: Callable[[str], None] | None = None,
) -> Feed:
    """The feed of a run, or of one rank of it. report: hears of damaged image files, else they are Python warnings.

    Raises UsageError for an augmentation that is not for the data set, and for a batch too large or not divisible;
    DataError where neither of the first test images can be read.
    """
    damages = Damages(report or warn)
    known = FOLDERS if isinstance(dataset, ImageFolders) else MEMORY
    if recipe.augmentation not in known:
        raise UsageError(
            f"augmentation {recipe.augmentation}: is not for {dataset.name}; expected one of {', '.join(known)} (--set "
            "augmentation=...), or another recipe"
        )
    if batches_in(len(dataset.train), recipe.batch, drop_last=True) == 0:
        count = len(dataset.train)
        raise UsageError(f"batch {recipe.batch}: {dataset.name} has only {count} training images; --set batch={count}")
    look = _look(dataset, recipe, device, channels_last=channels_last)
    place: dict[str, Any] = {"rank": rank, "world": world}
    test = eval_images(
        dataset,
        recipe,
        device=device,
        channels_last=channels_last,
        batch=eval_batch,
        workers=workers,
        damages=damages,
        **place,
    )
    if isinstance(dataset, ImageFolders):
        how = FOLDERS[recipe.augmentation]
        folders = FolderBatches(
            dataset.train, recipe.batch, seed=seed, augmentation=how, workers=workers, damages=damages, **place, **look
        )
        few = replace(dataset.test, names=dataset.test.names[:2], labels=dataset.test.labels[:2])
        example = next(eval_folder_batches(few, 2, workers=0, damages=damages, **look), None)
        if example is None:
            raise DataError(f"{few.folder}: the first test images, {few.path(0)} and the one after it, cannot be read; "
                            "copy the data set again")  # fmt: skip
        return Feed(folders, test, example[0])
    changed = recipe.augmentation == "cifar"
    train = Batches(dataset.train, recipe.batch, seed=seed, pad=4 if changed else 0, flip=changed, **place, **look)
    return Feed(train, test, next(iter(eval_batches(dataset.test, 2, **look)))[0])


def _look(
    dataset: Dataset | ImageFolders, recipe: RecipeFile, device: torch.device, *, channels_last: bool
) -> dict[str, Any]:
    """How images are normalised and laid out; grey ones by the mean of the recipe's numbers for red, green and blue."""
    mean, std = (values if dataset.channels == 3 else (fmean(values),) for values in (recipe.mean, recipe.std))
    look: dict[str, Any] = {"mean": mean, "std": std, "device": device, "channels_last": channels_last}
    return look | ({"channels": dataset.channels} if isinstance(dataset, ImageFolders) else {})


CONTIGUOUS = (
    "images stay contiguous in memory, which is slower: a `.view()` in the network's code takes no channels_last"
)


def takes_channels_last(dataset: Dataset | ImageFolders, device: torch.device, *networks: nn.Module) -> bool:
    """Whether networks on the device run on images of the data set in channels_last: `x.view(len(x), -1)` in a forward
    wants them contiguous. Other errors are not asked for here."""
    size = (224, 224) if isinstance(dataset, ImageFolders) else dataset.test.images.shape[2:]
    images = torch.zeros((2, dataset.channels, *size), device=device).contiguous(memory_format=torch.channels_last)
    for network in networks:
        for training in (False, True):
            with unchanged(network), torch.no_grad():
                try:
                    network.train(training)(images)
                except Exception as error:
                    if "view size is not compatible" in str(error):
                        return False
    return True


def eval_images(
    dataset: Dataset | ImageFolders,
    recipe: RecipeFile,
    *,
    device: torch.device,
    channels_last: bool = True,
    batch: int = 500,
    workers: int = 2,
    rank: int = 0,
    world: int = 1,
    damages: Damages | None = None,
) -> Images:
    """Batches of the test split in order, normalised as the recipe says; each call starts over."""
    damages = damages or Damages()  # one for all passes, so that each image is told of once
    batch = -(-batch // world) * world  # how images are grouped changes no result
    look = _look(dataset, recipe, device, channels_last=channels_last) | {"rank": rank, "world": world}
    if isinstance(dataset, ImageFolders):
        folder = dataset.test
        return lambda: eval_folder_batches(folder, batch, workers=workers, damages=damages, **look)
    split = dataset.test.to(device)
    return lambda: eval_batches(split, batch, **look)
