"""Downloading, against servers on this machine: whole, resumed, wrong, refused, out of reach."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from repbnn_cli.data import download as room
from repbnn_cli.data.download import PACKAGES, download
from repbnn_cli.errors import DataError, UsageError

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
NAME = "cifar-10-python.tar.gz"


class Server(ThreadingHTTPServer):
    """Serves CONTENT; what goes wrong is set by the test."""

    content: bytes = CONTENT
    ranges: bool = True
    length: bool = True
    cuts: ClassVar[list[int]] = []  # bytes after which the next answers break off
    codes: ClassVar[list[int]] = []  # what the next answers are instead
    asked: ClassVar[list[str | None]] = []
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away is part of the tests

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{NAME}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers["Range"]
        server.asked.append(wanted)
        if server.codes:
            self.send_error(server.codes.pop(0))
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0  # type: ignore[index]
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        body = server.content[start:]
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server(("127.0.0.1", 0), Handler)
    running.cuts, running.codes, running.asked = [], [], []  # type: ignore[misc]
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def get(server: Server, folder: Path, **options: Any) -> Path:
    return download("cifar10", folder, **{"url": server.url, "md5": MD5, "pause": 0.0, "timeout": 5.0} | options)


def test_the_official_places_and_checksums() -> None:
    assert PACKAGES["cifar10"].url == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert PACKAGES["cifar100"].url == "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    assert all(re.fullmatch("[0-9a-f]{32}", package.md5) for package in PACKAGES.values())


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    steps: list[tuple[int, int | None]] = []
    path = get(server, tmp_path / "new" / "folder", progress=lambda *step: steps.append(step))
    assert path == tmp_path / "new" / "folder" / NAME
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == [NAME]
    assert steps[-1] == (len(CONTENT), len(CONTENT))
    assert steps == sorted(steps)
    assert get(server, path.parent) == path
    assert server.asked == [None]


def test_a_damaged_file_from_before_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(CONTENT[:-1])
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_transfer_that_breaks_off_is_continued_in_the_same_call(server: Server, tmp_path: Path) -> None:
    server.cuts += [100_000, 50_000, 0]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]


def test_a_transfer_that_keeps_breaking_off_is_continued_by_the_next_call(server: Server, tmp_path: Path) -> None:
    server.cuts += [100_000]
    with pytest.raises(DataError) as caught:
        get(server, tmp_path, attempts=1)
    assert str(caught.value) == (
        f"{server.url}: stopped after 100000 of 300000 bytes (the connection was closed early); run it again to "
        "continue there"
    )
    assert caught.value.exit_code == 3
    assert [file.name for file in tmp_path.iterdir()] == [NAME + ".part"]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-"]
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_an_interrupt_leaves_what_came_so_far(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done > 100_000:
            raise KeyboardInterrupt

    monkeypatch.setattr(room, "_BLOCK", 10_000)
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path, progress=interrupt)
    kept = (tmp_path / f"{NAME}.part").stat().st_size
    assert 100_000 < kept < len(CONTENT)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[1] == f"bytes={kept}-"


def test_a_server_that_cannot_continue_sends_everything_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts += [100_000]
    steps: list[tuple[int, int | None]] = []
    assert get(server, tmp_path, progress=lambda *step: steps.append(step)).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-"]
    assert steps[-1] == (len(CONTENT), len(CONTENT))


def test_a_server_that_gives_no_length(server: Server, tmp_path: Path) -> None:
    server.length = False
    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("length", [len(CONTENT), len(CONTENT) + 10])
def test_a_part_that_is_whole_or_too_long(server: Server, tmp_path: Path, length: int) -> None:
    (tmp_path / f"{NAME}.part").write_bytes((CONTENT + b"x" * 10)[:length])
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == (1 if length == len(CONTENT) else 2)


@pytest.mark.parametrize("part", [None, b"of another file"])
def test_wrong_content_is_removed_and_said(server: Server, tmp_path: Path, part: bytes | None) -> None:
    if part:
        (tmp_path / f"{NAME}.part").write_bytes(part)
    else:
        server.content = CONTENT[::-1]
    with pytest.raises(DataError) as caught:
        get(server, tmp_path)
    assert re.fullmatch(
        rf"{server.url}: MD5 [0-9a-f]{{32}}, expected {MD5}; the file was removed. Try again, or give another --url",
        str(caught.value),
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_page_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.codes += [404]
    with pytest.raises(DataError, match=r"the server answers 404 Not Found; check the address, or give another --url"):
        get(server, tmp_path)
    assert len(server.asked) == 1


def test_a_server_that_is_busy_for_a_moment(server: Server, tmp_path: Path) -> None:
    server.codes += [503, 429]
    assert get(server, tmp_path).read_bytes() == CONTENT
    server.codes += [503] * 9
    with pytest.raises(DataError, match=r"cannot be downloaded \(the server answers 503 Service Unavailable\)"):
        get(server, tmp_path / "b", attempts=2)
    assert len(server.codes) == 7


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
    with pytest.raises(DataError) as caught:
        download("cifar10", tmp_path, url=url, attempts=2, pause=0.0)
    said = str(caught.value)
    assert said.startswith(
        f"{url}: cannot be downloaded ([Errno 111] Connection refused); check the connection, or fetch"
    )
    assert f"put it into {tmp_path} and run the same command again" in said
    assert "\n" not in said


def test_a_server_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(DataError, match=r"cannot be downloaded \(.*timed out\)"):
            download("cifar10", tmp_path, url=url, attempts=1, timeout=0.1)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"imagenet: nothing to download under this name; expected one of cifar10, "):
        download("imagenet", tmp_path)
    for url in ("file:///etc/passwd", "ftp://example.org/x", "x"):
        with pytest.raises(UsageError, match=r"not a web address; expected http://... or https://..."):
            download("cifar10", tmp_path, url=url)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match=r"cannot be written \(.*\); choose another folder"):
        download("cifar10", blocked / "x", url="http://127.0.0.1:9/x")


def test_a_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room.os, "fsync", full)
    with pytest.raises(DataError, match=r"the disk is full; free some space and run it again to continue"):
        get(server, tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert get(server, tmp_path).read_bytes() == CONTENT
