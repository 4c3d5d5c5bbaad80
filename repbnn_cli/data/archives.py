"""Files in an archive or a folder, one after the other, read into memory: nothing is ever unpacked to the disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from repbnn_cli.errors import DataError

_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    RuntimeError,
    NotImplementedError,
)
# Nothing that is read here comes near it: the largest official file has 154 MB. A compressed bomb does.
_LARGEST = 1 << 30


class Entry(NamedTuple):
    """One file: its name with forward slashes, and a function that reads it (call it before the next entry)."""

    name: str
    read: Callable[[], bytes]


def archive_entries(path: Path) -> Iterator[Entry]:
    """The regular files of a .tar, .tar.gz, .tar.xz, .tar.bz2 or .zip, in stored order, in one pass.

    Raises DataError when the file is no such archive, truncated, damaged or encrypted.
    """
    with _explaining(path):
        yield from _zip_entries(path) if zipfile.is_zipfile(path) else _tar_entries(path)


def folder_entries(folder: Path, subfolders: tuple[str, ...]) -> Iterator[Entry]:
    """The files below ``folder/NAME`` for each of ``subfolders`` that exists, sorted, named relative to ``folder``."""
    for name in subfolders:
        for parent, folders, files in os.walk(folder / name):
            folders.sort()
            for file in sorted(files):
                path = Path(parent, file)
                yield Entry(path.relative_to(folder).as_posix(), path.read_bytes)


def content_key(path: Path, subfolders: tuple[str, ...] = ()) -> str:
    """What a cache entry made from ``path`` is filed under.

    An archive: sha256 of its bytes, so a renamed or touched copy is the same archive. A folder: sha256 over name, size
    and modification time of every file in the subfolders (its bytes would take as long to read as to decode).
    """
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for name in subfolders:
        for parent, folders, files in os.walk(path / name):
            folders.sort()
            for file in sorted(files):
                status = os.stat(os.path.join(parent, file))
                line = f"{os.path.relpath(parent, path)}/{file}\0{status.st_size}\0{status.st_mtime_ns}\n"
                digest.update(os.fsencode(line))
    return digest.hexdigest()


def _tar_entries(path: Path) -> Iterator[Entry]:
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            if not member.isreg():
                continue

            def read(member: tarfile.TarInfo = member) -> bytes:
                _check_size(path, member.name, member.size)
                with _explaining(path):
                    stream = archive.extractfile(member)
                    assert stream is not None  # only folders and links have none
                    content = stream.read()
                    if len(content) != member.size:
                        raise EOFError("the archive ends inside a file")
                    return content

            yield Entry(member.name, read)
        # Cut between two files, an uncompressed archive reads as a shorter one: it has to end in a block of zeros. (Cut
        # compressed ones are noticed while they are decompressed.)
        if isinstance(archive.fileobj, io.BufferedReader):
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("the end of the archive is missing")


def _zip_entries(path: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue

            def read(info: zipfile.ZipInfo = info) -> bytes:
                _check_size(path, info.filename, info.file_size)
                with _explaining(path):
                    return archive.read(info)

            yield Entry(info.filename, read)


def _check_size(path: Path, name: str, size: int) -> None:
    if size > _LARGEST:
        raise DataError(f"{path}: {name} unpacks to {size} bytes, more than any data file; use another archive")


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    # The reading of an entry runs outside of the generator that found it, so both are wrapped.
    try:
        yield
    except OSError as error:
        if error.errno is None:  # gzip.BadGzipFile is an OSError without a number
            raise _damaged(path, error) from None
        raise unreadable(path, error) from None
    except _DAMAGE as error:
        raise _damaged(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file of ``path`` that the system does not let us read."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path
    return DataError(f"{where}: cannot be read ({error.strerror or error}); check the file and its rights")


def _damaged(path: Path, error: Exception) -> DataError:
    what = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return DataError(f"{path}: not an archive, or a truncated or damaged one ({what}); copy or download it again")
