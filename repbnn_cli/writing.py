"""Atomic writing: checkpoints, safetensors and text; killed at any moment, the old file or the new one is there.

Everything goes to a temporary file in the target's folder, is flushed to the disk, and takes the target's name in one
step. Nothing is overwritten without ``force``. The same content gives the same bytes under any file name.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repbnn_cli.errors import RepbnnError, UsageError

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DISK_FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is used up"}
_TOO_LARGE = {errno.EFBIG: "the file is larger than this system allows"}


def save(payload: Mapping[str, Any], path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write nested dictionaries and lists of tensors and plain values as a ``torch.save`` file, atomically.

    Tensors are stored contiguous, on the CPU, without gradient flags, in their own dtype; one that is a part of a
    larger storage brings only its part. Text, numbers, None, lists, tuples and dictionaries (with text or integer keys)
    are plain; anything else is refused, so that the file always loads with ``weights_only=True`` (bytes do not).

    Raises UsageError when the path cannot be written or exists without ``force``; RepbnnError on a full disk; TypeError
    naming the entry when the payload holds anything else.
    """
    canonical = _Canonical().value(dict(payload), "payload")
    with _replacing(path, force) as stream:
        # A stream, not a path: torch.save would put the file's name into the archive and thereby into its bytes.
        torch.save(canonical, stream)


def save_safetensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: str | os.PathLike[str],
    *,
    force: bool = False,
) -> None:
    """Write tensors and text as a .safetensors file, atomically and without a second copy of them in memory.

    Written here (a length, a JSON header, the raw little-endian data) because the library collects all bytes before it
    writes and does not keep the order of the metadata, so its files differ from run to run. Raises as ``save`` does.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {name: _text(metadata[name], name) for name in sorted(metadata)}
    # The widest dtype first, as the library does it: every tensor is then aligned to its own element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _SAFETENSORS_DTYPES or tensor.layout != torch.strided or name == "__metadata__":
            raise TypeError(f"{name}: a {tensor.dtype} tensor ({tensor.layout}) has no place in a safetensors file")
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(path, force) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(_raw(tensors[name]))


def atomic_write_text(path: str | os.PathLike[str], text: str, *, force: bool = False) -> None:
    """Write ``text`` as UTF-8 with the line ends it has, atomically; raises as ``save`` does."""
    with _replacing(path, force) as stream:
        stream.write(text.encode())


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes, *, force: bool = False) -> None:
    """Write ``data`` atomically; raises as ``save`` does."""
    with _replacing(path, force) as stream:
        stream.write(data)


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """The file that ``path`` stands for (links followed), once it is clear that it may be written.

    To be called before long work, so that a typing error in ``-o`` costs nothing. A device or pipe (``/dev/stdout``)
    needs no ``force``: nothing of it is lost. Raises UsageError.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode if target.exists() else None
    except OSError as error:
        raise _explained(path, error) from None
    if mode is not None and stat.S_ISDIR(mode):
        raise UsageError(f"{path}: is a folder; give the name of a file in it")
    if mode is not None and stat.S_ISREG(mode) and not force:
        raise _exists(path)
    if not target.parent.exists():
        raise UsageError(f"{path}: the folder {Path(path).parent} does not exist; create it first")
    if not target.parent.is_dir():
        raise UsageError(f"{path}: {Path(path).parent} is not a folder; choose another place")
    if mode is None and not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: the folder {Path(path).parent} is not writable; choose another place")
    return target


class _Stream(io.BufferedWriter):
    """Remembers a failed write: torch.save reports it only as an internal error of its archive writer."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str], force: bool) -> Iterator[_Stream]:
    target = check_output(path, force=force)
    if target.exists() and not target.is_file():
        with _explaining(path), _Stream(io.FileIO(target, "wb")) as stream, _first_failure(stream):
            yield stream
        return
    temporary = target.with_name(f".{secrets.token_hex(6)}.repbnn.tmp")
    with _explaining(path):
        try:
            # Created with the rights any new file gets here; the tempfile module would make it private.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            with _Stream(io.FileIO(descriptor, "wb")) as stream, _first_failure(stream):
                yield stream
                stream.flush()
                os.fsync(descriptor)
            _publish(temporary, target, path, force)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)


def _publish(temporary: Path, target: Path, path: str | os.PathLike[str], force: bool) -> None:
    if force and target.exists():
        os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
    if not force:
        # A link, unlike a rename, never takes the place of a file that appeared in the meantime.
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise _exists(path) from None
        except OSError:
            pass  # a file system without hard links
        else:
            temporary.unlink()
            return
    os.replace(temporary, target)


def _sync_folder(folder: Path) -> None:
    # The new name is on the disk only when the folder is; not every system can open or sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _first_failure(stream: _Stream) -> Iterator[None]:
    try:
        yield
    except Exception:
        if stream.failed is not None:
            failed = stream.failed
            # Closing would try to write what is still in the buffer once more.
            with contextlib.suppress(OSError):
                stream.raw.close()
            raise failed from None
        raise


@contextlib.contextmanager
def _explaining(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explained(path, error) from error


def _explained(path: str | os.PathLike[str], error: OSError) -> RepbnnError:
    full = _DISK_FULL.get(error.errno or 0) or _TOO_LARGE.get(error.errno or 0)
    if full:
        return RepbnnError(f"{path}: {full}, nothing was written; free some space or choose another place")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"{path}: cannot be written here ({error.strerror}); choose another place")
    if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ENOENT, errno.ELOOP):
        return UsageError(f"{path}: is not a usable file name ({error.strerror}); choose another place")
    return RepbnnError(f"{path}: writing failed ({error.strerror or error}), nothing was written; choose another place")


def _exists(path: str | os.PathLike[str]) -> UsageError:
    return UsageError(f"{path}: exists already; give another name, or --force to overwrite it")


class _Canonical:
    """Rebuilds a payload so that equal payloads give equal bytes.

    A pickle refers back to text it has already written when it meets the very same object again, so two runs whose
    equal strings are once one object and once two would differ; here equal text always is one object.
    """

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def value(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._seen.setdefault(str(value), str(value))
        if isinstance(value, int | float):
            # NumPy's float64 is a float; written as it is it would need NumPy to be read.
            return int(value) if isinstance(value, int) else float(value)
        if isinstance(value, Tensor):
            return _owned(value, where)
        if isinstance(value, Mapping):
            return {self._key(key, where): self.value(item, f"{where}[{key!r}]") for key, item in value.items()}
        if type(value) in (list, tuple):
            items = [self.value(item, f"{where}[{index}]") for index, item in enumerate(value)]
            return items if type(value) is list else tuple(items)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{where} is a {kind}; only tensors and plain values can be saved")

    def _key(self, key: Any, where: str) -> Any:
        if not isinstance(key, str | int):
            raise TypeError(f"{where} has the key {key!r}; only text and integers can be keys")
        return self.value(key, where)


def _owned(tensor: Tensor, where: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"{where} is a tensor without plain data ({tensor.layout}, {tensor.device})")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().as_subclass(Tensor)
    if plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
        plain = plain.clone()  # a view: its whole base would be written
    return plain


def _raw(tensor: Tensor) -> Any:
    if sys.byteorder != "little":
        raise RepbnnError("safetensors files can be written on little-endian machines only; use the default format")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"metadata[{name!r}] is a {type(value).__name__}; safetensors holds text only")
    return value
