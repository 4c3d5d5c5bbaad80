"""One exception class per cause; the command line turns them into one line of text and an exit code.

A message says what is wrong, where, what was expected and what to do next. Exit codes:
2 usage and rules, 3 what cannot be loaded or captured, 4 a failed check, 1 anything else.
"""

from __future__ import annotations


class RepbnnError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class UsageError(RepbnnError):
    """A wrong argument: an unknown network, a β that does not divide, an unwritable output."""

    exit_code = 2


class RulesError(UsageError):
    """A rule file that cannot be read, is not valid, or does not fit the network."""


class CheckpointError(RepbnnError):
    """A file that cannot be loaded as a checkpoint, or that fits no network."""

    exit_code = 3


class DataError(RepbnnError):
    """A data set that is missing, incomplete, damaged, or not what its name says; names files and how to get them."""

    exit_code = 3


class CaptureError(RepbnnError):
    """A network that cannot be captured as a graph; names file, line and construct."""

    exit_code = 3


class SurgeryError(RepbnnError):
    """A captured network that the rules cannot transform; names node, module path and source line."""

    exit_code = 3


class VerificationError(RepbnnError):
    """A check that failed: the transformed network is not what it has to be."""

    exit_code = 4


class GateError(RepbnnError):
    """A gate that the caller asked for (`--max-ops`, `--strict`) and that the network does not pass."""

    exit_code = 4


class DivergedError(RepbnnError):
    """Training that met NaN or infinity; names the layer, the step, and the last good state."""

    exit_code = 4


class MemoryExceededError(RepbnnError):
    """Training that does not fit into memory; says which batch size would, as measured, and the last good state."""


class StoppedError(RepbnnError):
    """Training stopped by a signal once its state was saved; the exit code is 128 + the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
        self.exit_code = 128 + signal
