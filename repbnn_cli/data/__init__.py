"""Data sets by name, `data.open_data("cifar10:DIR")`, and their batches on the device; no original file is written to.

`sets` finds them and checks what it found; `cifar_files`, `images` and `imagenet` read one form each, from the files of
`archives`. What is decoded is kept by `cache`; `download` fetches the official archives.
"""

from repbnn_cli.data.batches import Batches, eval_batches
from repbnn_cli.data.imagenet import FolderBatches, ImageFolders, eval_folder_batches
from repbnn_cli.data.sets import check_spec, check_there, data_folder, find, load, open_data
from repbnn_cli.data.splits import Dataset, Split

__all__ = [
    "Batches",
    "Dataset",
    "FolderBatches",
    "ImageFolders",
    "Split",
    "check_spec",
    "check_there",
    "data_folder",
    "eval_batches",
    "eval_folder_batches",
    "find",
    "load",
    "open_data",
]
