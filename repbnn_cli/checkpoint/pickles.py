"""What a pickle from somebody else may build here, and which classes it asks for; no code from a file is run.

PyTorch's weights-only unpickler builds tensors, containers and plain values. Training scripts also store NumPy
scalars (``best_prec1``), ``argparse.Namespace`` (``args``) and paths beside the weights. For these the unpickler is
handed the stand-ins below, under the original names: they hold numbers and text, and neither NumPy's nor pathlib's
own reconstruction code is reached. Everything else stays refused.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch


class DtypeStandIn:
    """``numpy.dtype`` as pickled: a code such as ``f8`` and a byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        order = order.decode("ascii") if isinstance(order, bytes) else str(order)
        self.order = order if order in ("<", ">") else "="

    def numpy(self) -> np.dtype[Any] | None:
        """NumPy's own for numbers and text; None for objects and records, which only NumPy could rebuild."""
        return np.dtype(self.order + self.code) if re.fullmatch(r"[biufcSU]\d{1,4}", self.code) else None


class ArrayStandIn:
    """``numpy.ndarray`` as pickled; ``value`` is the array of numbers or text, or empty for any other content."""

    value: np.ndarray[Any, Any]

    def __init__(self, *_: Any) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        plain = dtype.numpy()
        if plain is not None:
            self.value = np.frombuffer(_bytes(data), dtype=plain).reshape(shape, order="F" if fortran else "C")


class NamespaceStandIn:
    """``argparse.Namespace`` as pickled: the arguments as a dictionary in ``values``."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.values = dict(state)


def _bytes(data: Any) -> bytes:
    # Python 2 wrote byte strings as text.
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _scalar(dtype: DtypeStandIn, data: Any) -> Any:
    plain = dtype.numpy()
    return ArrayStandIn() if plain is None else np.frombuffer(_bytes(data), dtype=plain, count=1)[0].item()


def _array(*_: Any) -> ArrayStandIn:
    return ArrayStandIn()


def _path(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    if texts and texts[0] in ("/", "\\"):
        texts[0] = ""
    return "/".join(texts)


_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
# torch.serialization.safe_globals() takes (what to call, the name in the file).
STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (DtypeStandIn, "numpy.dtype"),
    (ArrayStandIn, "numpy.ndarray"),
    (NamespaceStandIn, "argparse.Namespace"),
    *((_scalar, f"{core}.multiarray.scalar") for core in ("numpy.core", "numpy._core")),
    *((_array, f"{core}.multiarray._reconstruct") for core in ("numpy.core", "numpy._core")),
    *((_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in _PATHS),
]

_HARMLESS = {
    "collections.OrderedDict",
    "collections.Counter",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch._tensor._rebuild_from_type_v2",
    "torch._tensor.Tensor",
    "torch.Tensor",
    "torch.Size",
    "torch.device",
    "torch.storage.TypedStorage",
    "torch.storage.UntypedStorage",
    "_codecs.encode",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex")),
    *(name for entry in STAND_INS if isinstance(entry, tuple) for name in entry[1:] if isinstance(name, str)),
}


def foreign_globals(stream: IO[bytes], pickles: int = 1) -> list[str]:
    """Dotted names of the functions and classes that the next ``pickles`` pickles in ``stream`` ask for, sorted.

    Left out are those which the weights-only loader builds itself. The stream is read instruction by instruction
    (``pickletools``), nothing is imported; a damaged pickle gives the names up to the damage.
    """
    names: set[str] = set()
    for _ in range(pickles):
        try:
            _collect(stream, names)
        except Exception:
            break  # pickletools raises many types on damaged input; what was found until there still counts
    return sorted(name for name in names if not _builds_itself(name))


def _collect(stream: IO[bytes], names: set[str]) -> None:
    texts: list[str] = []  # the strings pushed so far: STACK_GLOBAL takes the last two
    memo: dict[int, str] = {}
    memoized = 0
    text_on_top = False
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "MEMOIZE" or opcode.name.endswith("PUT"):
            if text_on_top:
                memo[memoized if argument is None else int(argument)] = texts[-1]
            memoized += 1
            continue
        text_on_top = "UNICODE" in opcode.name or "STRING" in opcode.name
        if text_on_top:
            texts.append(str(argument))
        elif opcode.name in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(texts[-2:]) or "a name built at load time")
        elif opcode.name.endswith("GET") and int(argument or 0) in memo:
            texts.append(memo[int(argument or 0)])


def _builds_itself(name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    if module in ("torch", "torch.cuda"):
        known = isinstance(getattr(torch, leaf, None), (torch.dtype, torch.qscheme))
        return known or leaf.endswith(("Storage", "Tensor")) or leaf in ("Size", "device")
    return name in _HARMLESS or (module == "torch._utils" and leaf.startswith("_rebuild_"))
