"""From bytes to Python objects: which kind of file it is, loading it safely, and saying why it cannot be loaded."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch

from repbnn_cli.checkpoint.pickles import STAND_INS, foreign_globals
from repbnn_cli.errors import CheckpointError
from repbnn_cli.wording import nearest_file, some

TORCH, TORCH_LEGACY, SAFETENSORS = "torch", "torch-legacy", "safetensors"

# The integer every torch.save file of the legacy format begins with, as pickled.
_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19."
# A legacy file is a row of pickles: this integer, the protocol, system information, the object itself.
_LEGACY_PICKLES = 4
# How a file begins, what it then is, and what to do about it.
_LOOKS_LIKE = (
    (b"\xff\xd8\xff", "a JPEG image", "give the checkpoint itself"),
    (b"\x89PNG", "a PNG image", "give the checkpoint itself"),
    (b"GIF8", "a GIF image", "give the checkpoint itself"),
    (b"RIFF", "a RIFF file (WebP, WAV)", "give the checkpoint itself"),
    (b"%PDF", "a PDF document", "give the checkpoint itself"),
    (b"\x1f\x8b", "gzip-compressed", "unpack it first"),
    (b"BZh", "bzip2-compressed", "unpack it first"),
    (b"\xfd7zXZ", "xz-compressed", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it first"),
    (b"Rar!", "a RAR archive", "unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras)", "export a PyTorch state dict"),
    (b"\x93NUMPY", "a NumPy array", "save a PyTorch state dict"),
    (b"GGUF", "a GGUF model", "export a PyTorch state dict"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run: git lfs pull"),
    (b"\x7fELF", "a program", "give the checkpoint itself"),
)
_ADVICE = ("Weights only load failed", "In PyTorch 2.6", "Please file", "Check the documentation", "(1)", "(2)")
_EXPECTED = "expected a torch.save file, .safetensors, or a repbnn result"
_LISTED = 12


def kind_of(path: Path) -> str:
    """``torch``, ``torch-legacy`` or ``safetensors``, from the file's first bytes; CheckpointError for all else."""
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; give the checkpoint file in it{_checkpoints_in(path)}")
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is a pipe or device; copy its content to a file and give that")
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(512)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file{nearest_file(path)}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
    if not head:
        raise CheckpointError(f"{path}: is empty (0 bytes); copy or download it again")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_kind(path)
    # Before pickles: a header's length may begin with any byte, theirs too.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 1 << 40:
        if 8 + length > size:
            raise CheckpointError(f"{path}: a truncated safetensors file; copy or download it again")
        return SAFETENSORS
    if head.startswith(b"\x80") and _LEGACY_MAGIC in head[:40]:
        return TORCH_LEGACY
    if head.startswith(b"\x80"):
        raise _plain_pickle(path)
    raise _not_a_checkpoint(path, head)


def content_of(path: Path, kind: str, *, unsafe: bool) -> tuple[Any, dict[str, str]]:
    """The object in the file, and the text that a safetensors file carries beside its tensors."""
    if kind == SAFETENSORS:
        return _safetensors(path)
    if unsafe:
        return _unpickled_as_python(path, kind), {}
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return _torch_load(path, kind, weights_only=True), {}
    except Exception as error:  # a damaged pickle raises anything
        raise _refused(path, kind, error) from None


def _torch_load(path: Path, kind: str, *, weights_only: bool) -> Any:
    with warnings.catch_warnings(), path.open("rb") as stream:
        warnings.simplefilter("ignore")
        if kind == TORCH and _can_be_mapped(path):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        return torch.load(stream, map_location="cpu", weights_only=weights_only)


def _can_be_mapped(path: Path) -> bool:
    # torch.load goes by the name before it looks at the content; and an archive that somebody packed anew holds
    # compressed data, which cannot be used where it lies.
    if path.suffix == ".safetensors":
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _unpickled_as_python(path: Path, kind: str) -> Any:
    try:
        with _importable_from(Path.cwd()), contextlib.redirect_stdout(sys.stderr):
            return _torch_load(path, kind, weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: needs the code that it was pickled with ({_line(error)}); run repbnn in the folder of that code, "
            "or put the folder on PYTHONPATH"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be unpickled ({type(error).__name__}: {_line(error)})") from error


@contextlib.contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
            for name in opened.offset_keys() if hasattr(opened, "offset_keys") else opened.keys():
                tensor = opened.get_tensor(name)
                # Newer versions give views into one mapping of the whole file; each tensor is to stand alone.
                alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
                tensors[name] = tensor if alone else tensor.clone()
            texts = dict(opened.metadata() or {})
    except Exception as error:
        raise CheckpointError(
            f"{path}: a damaged or truncated safetensors file ({_line(error)}); copy or download it again"
        ) from None
    texts.pop("format", None)
    return tensors, texts


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise CheckpointError(
            f"{path}: a truncated or damaged torch file (the zip directory at its end is missing); copy it again"
        ) from None
    if any(name.endswith("/data.pkl") for name in names):
        return TORCH
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(f"{path}: looks like a NumPy .npz archive; save a PyTorch state dict with torch.save")
    raise CheckpointError(f"{path}: looks like a zip archive without a torch checkpoint; {_EXPECTED}")


def _refused(path: Path, kind: str, error: Exception) -> CheckpointError:
    """Why the weights-only loader gave up: foreign classes, TorchScript, another pickle protocol, or damage."""
    if isinstance(error, UnicodeEncodeError):
        return CheckpointError(f"{path}: its name is not UTF-8, and PyTorch opens no such file; rename it")
    foreign, protocol, script = _asked_for(path, kind)
    if script:
        return CheckpointError(
            f"{path}: a TorchScript archive, which holds code; save model.state_dict() where it was made, or, "
            "if you trust its source, load it with --unsafe-load"
        )
    if foreign:
        shown = some([name for name in foreign if not name.startswith("torch.nn.")] or foreign, _LISTED)
        return CheckpointError(
            f"{path}: asks for code that is not weights: {shown}; nothing of it was run. Save model.state_dict() where "
            "it was made, or, if you trust its source, load it with --unsafe-load"
        )
    if protocol > 2:
        return CheckpointError(
            f"{path}: written with pickle protocol {protocol}, which the safe loader does not read; save it with "
            "torch.save's own protocol, or, if you trust its source, load it with --unsafe-load"
        )
    return CheckpointError(f"{path}: a truncated or damaged torch file ({_line(error)}); copy or download it again")


def _asked_for(path: Path, kind: str) -> tuple[list[str], int, bool]:
    """The foreign globals in the file's pickle, its protocol, and whether the file is a TorchScript archive."""
    try:
        if kind == TORCH_LEGACY:
            with path.open("rb") as stream:
                protocol = stream.read(2)[1]
                stream.seek(0)
                return foreign_globals(stream, _LEGACY_PICKLES), protocol, False
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            script = any(name.endswith("/constants.pkl") for name in names)
            with archive.open(next(name for name in names if name.endswith("/data.pkl"))) as stream:
                protocol = stream.read(2)[1]
                stream.seek(0)
                return foreign_globals(stream), protocol, script
    except Exception:
        return [], 0, False  # too damaged to say more


def _plain_pickle(path: Path) -> CheckpointError:
    with path.open("rb") as stream:
        foreign = foreign_globals(stream)
    asks = f" that asks for {', '.join(foreign[:_LISTED])}" if foreign else ""
    return CheckpointError(
        f"{path}: a plain Python pickle{asks}, not written by torch.save; nothing of it was run. "
        "Save the state dict with torch.save"
    )


def _not_a_checkpoint(path: Path, head: bytes) -> CheckpointError:
    for start, what, to_do in _LOOKS_LIKE:
        if head.startswith(start):
            return CheckpointError(f"{path}: looks like {what}; {to_do}")
    if head[257:262] == b"ustar":
        return CheckpointError(f"{path}: looks like a tar archive; unpack it and give the checkpoint in it")
    if not head.strip(b"\0"):
        return CheckpointError(f"{path}: begins with zero bytes only (an interrupted copy?); copy or download it again")
    start_lower = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start_lower.startswith((b"<!doctype", b"<html", b"<?xml")):
        return CheckpointError(f"{path}: looks like a web page (HTML or XML); download the file itself, not its page")
    with contextlib.suppress(UnicodeDecodeError):
        text = head[:40].decode("ascii")
        if text.replace("\n", " ").replace("\t", " ").replace("\r", " ").isprintable():
            return CheckpointError(f"{path}: looks like text ({text.split(chr(10))[0]!r}); {_EXPECTED}")
    return CheckpointError(f"{path}: not a checkpoint (it begins with {head[:8].hex(' ')}); {_EXPECTED}")


def _checkpoints_in(folder: Path) -> str:
    suffixes = (".pt", ".pth", ".th", ".tar", ".ckpt", ".safetensors")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(suffixes))
    return f", e.g. {folder / names[0]}" if names else ""


def _line(error: BaseException) -> str:
    """The line of an exception's text that says what happened, in at most 160 characters."""
    lines = [line.strip() for line in str(error).splitlines()]
    # torch wraps the cause of a weights-only failure in advice on how to switch the protection off.
    if lines and lines[0].startswith("Weights only load failed"):
        lines = [line for line in lines if line and not line.startswith(_ADVICE)][-1:]
    text = next((line for line in lines if line), type(error).__name__).removeprefix("WeightsUnpickler error: ")
    return text if len(text) <= 160 else text[:157] + "..."
