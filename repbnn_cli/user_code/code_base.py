"""Finds modules of a user's code base that its files import from a folder above them.

The scripts of a code base run from its root, so `models/resnet.py` says `from modules import ...` although the module
lies one folder up. Such names are looked for upwards from the file, only after every ordinary place has failed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

# How far up a code base is searched; its own root ends the search earlier.
_LEVELS = 5
_ROOT_MARKS = (".git", ".hg", "setup.py", "pyproject.toml")


class AboveFinder(MetaPathFinder):
    """Top-level modules from the folders above `file`, the nearest first. `used`: the folders that had one."""

    def __init__(self, file: Path) -> None:
        self._folders = folders_above(file)
        self.used: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or "." in fullname:
            return None
        for folder in self._folders:
            spec = PathFinder.find_spec(fullname, [folder])
            # A folder without __init__.py counts only where it holds Python files: "data" may be anything.
            if spec is not None and (spec.origin is not None or _holds_python(Path(folder) / fullname)):
                self.used.append(folder)
                if folder not in sys.path:  # what is imported from there later finds its neighbours, too
                    sys.path.append(folder)
                return spec
        return None


def folders_above(file: Path) -> list[str]:
    """The folders above the one that `file` is in, up to the root of its code base."""
    found: list[str] = []
    below, home = file.parent, Path.home()
    for folder in list(file.parents)[1 : _LEVELS + 1]:
        if any((below / mark).exists() for mark in _ROOT_MARKS) or folder in (home, folder.parent):
            break
        found.append(str(folder))
        below = folder
    return found


@contextlib.contextmanager
def findable(file: Path | None) -> Iterator[list[str]]:
    """While active, what `file` imports is found in the folders above it; gives the list of those that were used."""
    if file is None:
        yield []
        return
    finder = AboveFinder(file)
    sys.meta_path.append(finder)
    try:
        yield finder.used
    finally:
        sys.meta_path.remove(finder)


def _holds_python(folder: Path) -> bool:
    return next(folder.glob("*.py"), None) is not None or next(folder.glob("*/*.py"), None) is not None
