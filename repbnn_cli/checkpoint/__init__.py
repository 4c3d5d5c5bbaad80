"""Files with networks in them: `checkpoint.load(path)` reads every common form and runs no code from a file.

`reading` goes from bytes to objects, `pickles` says what a pickle may build, `identify`
which network a state dict belongs to.
"""

from repbnn_cli.checkpoint.loading import (
    CONTAINERS,
    FORMAT,
    PACKED,
    PREFIXES,
    VERSION,
    Accuracy,
    Checkpoint,
    check_finite,
    left_out,
    load,
    under,
)

__all__ = [
    "CONTAINERS",
    "FORMAT",
    "PACKED",
    "PREFIXES",
    "VERSION",
    "Accuracy",
    "Checkpoint",
    "check_finite",
    "left_out",
    "load",
    "under",
]
