"""Downloads the official CIFAR archives: resumed where a transfer broke off, checked, and put in place in one step."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repbnn_cli.errors import DataError, UsageError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """An official archive: where it is, and the MD5 that https://www.cs.toronto.edu/~kriz/cifar.html gives for it."""

    url: str
    md5: str


PACKAGES = {
    "cifar10": Package("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": Package("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
}


def download(
    name: str,
    folder: Path,
    *,
    url: str | None = None,
    md5: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    attempts: int = 5,
    timeout: float = 30.0,
    pause: float = 1.0,
) -> Path:
    """The official archive of ``cifar10`` or ``cifar100`` in ``folder``, downloaded unless a whole one is there.

    ``url`` is another server that has the same file. The bytes go to ``NAME.part`` beside the target; a transfer that
    breaks off is continued there (HTTP Range), up to ``attempts`` times in a row without a new byte, and by the next
    call. The whole file's MD5 is compared with the official one (``md5`` replaces it) before it gets its name; a wrong
    one is removed. ``progress(bytes so far, bytes in all or None)`` is called as they come.

    Raises UsageError for an unknown name, another protocol or a folder that cannot be written, DataError for a
    server that cannot be reached or does not have the file, a transfer that keeps breaking off, and wrong content.
    """
    if name not in PACKAGES:
        raise UsageError(f"{name}: nothing to download under this name; expected one of {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    source, expected = url or package.url, md5 or package.md5
    if urllib.parse.urlsplit(source).scheme not in ("http", "https"):
        raise UsageError(f"{source}: not a web address; expected http://... or https://...")
    target = folder / package.url.rpartition("/")[2]
    partial = target.with_name(target.name + ".part")
    with _explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if target.is_file() and _md5(target) == expected:
            return target
        transfer = _Transfer(source, partial, progress, timeout)
        _fetch(transfer, attempts, pause)
        found = _md5(partial)
        if found != expected:
            partial.unlink()
            raise DataError(
                f"{source}: MD5 {found}, expected {expected}; the file was removed. Try again, or give another --url"
            )
        os.replace(partial, target)
    return target


def _fetch(transfer: _Transfer, attempts: int, pause: float) -> None:
    failures = 0
    while True:
        before = transfer.size()
        try:
            if transfer.run():
                return
            reason = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DataError(
                    f"{transfer.url}: the server answers {error.code} {error.reason}; check the address, or give "
                    "another --url"
                ) from None
            reason = f"the server answers {error.code} {error.reason}"
        except (http.client.HTTPException, TimeoutError, ConnectionError, urllib.error.URLError) as error:
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        failures = 1 if transfer.size() > before else failures + 1
        if failures >= attempts:
            raise transfer.given_up(reason)
        time.sleep(pause * 2 ** (failures - 1))


class _Transfer:
    """One file on its way: what is there already, how much it will be, and one request after the other."""

    def __init__(
        self, url: str, partial: Path, progress: Callable[[int, int | None], None] | None, timeout: float
    ) -> None:
        self.url, self._partial, self._progress, self._timeout = url, partial, progress, timeout
        self._total: int | None = None

    def size(self) -> int:
        """Bytes that are there."""
        return self._partial.stat().st_size if self._partial.exists() else 0

    def given_up(self, reason: str) -> DataError:
        have = self.size()
        if not have:
            return DataError(
                f"{self.url}: cannot be downloaded ({reason}); check the connection, or fetch the file in a browser, "
                f"put it into {self._partial.parent} and run the same command again"
            )
        total = f" of {self._total}" if self._total else ""
        return DataError(f"{self.url}: stopped after {have}{total} bytes ({reason}); run it again to continue there")

    def run(self) -> bool:
        """One request for the rest of the file; whether all of it is there now."""
        start = self.size()
        headers = {"User-Agent": "repbnn", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(self.url, headers=headers)
        try:
            response = urllib.request.urlopen(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
                raise
            # The server's file is not longer than what is here: all of it, or a rest of something else.
            if _total_of(error.headers) == start:
                return True
            self._partial.unlink()
            return False
        with response:
            return self._receive(response, start)

    def _receive(self, response: Any, start: int) -> bool:
        continued = response.status == http.client.PARTIAL_CONTENT and _start_of(response.headers) == start
        position = start if continued else 0
        length = response.headers.get("Content-Length")
        self._total = position + int(length) if length and length.isdigit() else None
        # A server without Range sends everything again: the file starts anew.
        with self._partial.open("ab" if continued else "wb") as stream:
            while block := _block(response):
                stream.write(block)
                position += len(block)
                if self._progress:
                    self._progress(position, self._total)
            stream.flush()
            os.fsync(stream.fileno())
        # Without a length only the checksum can tell.
        return self._total is None or position == self._total


def _block(response: Any) -> bytes:
    try:
        return bytes(response.read1(_BLOCK))
    except OSError as error:  # of the network, not of the disk (an SSL error is one, too)
        raise ConnectionError(str(error) or type(error).__name__) from None


def _start_of(headers: Any) -> int | None:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _total_of(headers: Any) -> int | None:
    match = re.match(r"bytes \*/(\d+)", headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _md5(path: Path) -> str:
    # Not against an attacker: it is the checksum that the authors publish.
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@contextlib.contextmanager
def _explaining(folder: Path) -> Any:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{folder}: the disk is full; free some space and run it again to continue") from None
        raise UsageError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from None
