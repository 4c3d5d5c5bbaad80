"""A run on disk: its folder, lock, fingerprint, states to resume from, and metrics that never run ahead of a state.

    RUN/recipe.yaml          the resolved recipe
    RUN/environment.json     versions, hardware, command, seed, data set and its notes, the network that was trained,
                             and each stage with its length and published accuracy: what `runs.read` needs
    RUN/run.json             the fingerprint: what has to be the same for a state to be resumed
    RUN/metrics.jsonl, .csv  one row per epoch; the same bytes however often the run was interrupted
    RUN/timing.jsonl         seconds and images per second of each epoch, which no two runs share
    RUN/checkpoints/state-STAGE-EPOCH-BATCH.pt    everything that a run continues from; the last few are kept
    RUN/checkpoints/best.pt, last.pt              the network, to be used

A state is written after the metrics that led to it and knows how long their files were, so that resuming cuts off what
a killed run wrote after its last state. Everything but the metrics is written atomically.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repbnn_cli import paper, zoo
from repbnn_cli.errors import CheckpointError, RepbnnError, UsageError
from repbnn_cli.runs import (
    ENVIRONMENT,
    METRICS,
    RECIPE,
    RECORD,
    TABLE,
    TIMING,
    check_free,
    check_resumable,
    json_object,
    states,
)
from repbnn_cli.train.recipes import Recipe
from repbnn_cli.writing import atomic_write_text, save

FORMAT, VERSION = "repbnn-run", 3
COLUMNS = (
    "stage", "epoch", "step", "lr", "t", "k", "tau", "loss", "train_top1", "test_loss", "test_top1", "test_top5",
    "best_top1", "flips", "dead",
)  # fmt: skip


class Position(NamedTuple):
    """Where a run stands: the next batch of an epoch of a stage, all counted from 0."""

    stage: int
    epoch: int
    batch: int


class Run:
    """A run's folder, held by this process alone while it is open (`with Run(path) as run`).

    keep: states that stay. resume: it is a run's already, and goes on.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2, resume: bool = False) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.keep = max(keep, 1)
        self.resume = resume
        self._lock: int | None = None

    def __enter__(self) -> Run:
        if self.resume:
            check_resumable(self.path)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot be a run's folder ({error.strerror}); choose another place"
            ) from None
        if not _lock(self._lock):
            os.close(self._lock)
            raise UsageError(f"{self.path}: another run is writing here; wait for it, or give another folder")
        for folder in (self.path, self.checkpoints):
            for torn in folder.glob(".*.repbnn.tmp"):  # a file that a killed run was in the middle of
                torn.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        os.close(self._lock)  # gives the lock back, as the end of the process would

    # -- beginning ----------------------------------------------------------------------------------------------------

    def begin(self, fingerprint: Mapping[str, Any], recipe: str, environment: Mapping[str, Any]) -> None:
        """Claims the folder for a run, or checks that the run in it is this one. Raises UsageError."""
        record = self.path / RECORD
        if not self.resume:
            check_free(self.path)
            atomic_write_text(self.path / RECIPE, recipe, force=True)
            atomic_write_text(self.path / ENVIRONMENT, _json(environment, indent=2), force=True)
            atomic_write_text(record, _json(fingerprint, indent=2))  # last: from here on there is a run to resume
            return
        # The weights that a run began with are in its state; the caller's only count when there is none yet.
        _check(json_object(self.path / RECORD), fingerprint, record, [key for key in fingerprint if key != "weights"])
        # But what is said of them in results has to be true of those that the run began with.
        known = json_object(self.path / ENVIRONMENT).get("network")
        _check(known or {}, environment["network"], self.path / ENVIRONMENT, ["sha256"])

    def withdraw(self) -> None:
        """Gives the folder up again, for a run that failed before its first state."""
        if not self.states():
            for name in (RECORD, ENVIRONMENT, RECIPE, METRICS, TABLE, TIMING):
                (self.path / name).unlink(missing_ok=True)

    # -- states -------------------------------------------------------------------------------------------------------

    def save(self, position: Position, state: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> Path:
        """Writes a state, atomically, and then removes all but the last few."""
        target = self._state(position)
        lengths = {name: _size(self.path / name) for name in (METRICS, TABLE, TIMING)}
        record = {"format": FORMAT, "version": VERSION, "position": list(position), "fingerprint": dict(fingerprint)}
        save({**record, "lengths": lengths, **state}, target, force=True)
        for old in self.states()[: -self.keep]:
            old.unlink(missing_ok=True)
        return target

    def states(self) -> list[Path]:
        """The states that there are, the oldest first."""
        return [file for _, file in states(self.path)]

    def latest(self, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
        """The last state, after the metrics were cut to what it knows; None when the run had not saved one yet."""
        found = self.states()
        if not found:
            _check(json_object(self.path / RECORD), fingerprint, self.path / RECORD, list(fingerprint))
            self._cut(dict.fromkeys((METRICS, TABLE, TIMING), 0))
            return None
        path = found[-1]
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {damaged} in it is another one")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes of any kind: whatever reading them raises
            first_line = " ".join(str(error).split())[:120] or type(error).__name__
            raise CheckpointError(
                f"{path}: cannot be read ({first_line}); remove it to resume from the one before"
            ) from None
        if not isinstance(state, dict) or (state.get("format"), state.get("version")) != (FORMAT, VERSION):
            raise CheckpointError(f"{path}: is not a state of this version's runs; remove it, or start anew")
        _check(state["fingerprint"], json_object(self.path / RECORD), path, list(fingerprint))
        self._cut(state["lengths"])
        return state

    def _state(self, position: Position) -> Path:
        return self.checkpoints / f"state-{position.stage}-{position.epoch:04d}-{position.batch:06d}.pt"

    def _cut(self, lengths: Mapping[str, int]) -> None:
        for name, length in lengths.items():
            path = self.path / name
            if _size(path) < length:
                raise CheckpointError(
                    f"{path}: is shorter than the state to resume from says; it was changed: start anew"
                )
            if path.exists():
                os.truncate(path, length)

    # -- results ------------------------------------------------------------------------------------------------------

    def publish(self, name: str, payload: Mapping[str, Any]) -> Path:
        """Writes checkpoints/NAME atomically."""
        target = self.checkpoints / name
        save(payload, target, force=True)
        return target

    def record(self, row: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Appends an epoch to the metrics. In the table, mappings of layers become their means."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        if _size(self.path / TABLE) == 0:
            table.writerow(COLUMNS)
        table.writerow([_mean(row.get(key, "")) for key in COLUMNS])
        self._append(METRICS, _json(row))
        self._append(TABLE, text.getvalue())
        self._append(TIMING, _json(timing))

    def _append(self, name: str, text: str) -> None:
        try:
            with (self.path / name).open("ab") as stream:
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise RepbnnError(
                f"{self.path / name}: writing failed ({error.strerror}); earlier states are intact, resume from them"
            ) from error


def record_of(recipe: Recipe, network: Mapping[str, Any], data: str, batches: int) -> dict[str, Any]:
    """What environment.json says of the run itself, for `runs.read`; network: see `engine.finetune`'s about.

    A published accuracy is one on the data set that the network was made for, and of a source network or the RepBNN
    of the papers (β = 2, the whole last layer, their rules, copies that start alike); beside others it says nothing.
    """
    stages = []
    arch, beta = network.get("arch"), network.get("beta")
    if beta is not None:
        setting = paper.setting(beta, network.get("last_layer", "all"), network.get("rules", "reptran"))
        arch = arch if setting == "β = 2" and not network.get("spread") else None
    if arch is None or not paper.same_data(zoo.ARCHS[arch].data, data):
        arch = None
    for stage in recipe.stages:
        stated = stage.stated(arch, rep=beta is not None)
        value, table = stated or (None, None)
        stages.append({"name": stage.name, "epochs": stage.length(batches), "published": value, "table": table})
    return {"recipe": recipe.name, "network": dict(network), "stages": stages}


def structure_of(network: nn.Module) -> str:
    """sha256 over names, shapes and dtypes of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    return digest.hexdigest()


def weights_of(network: nn.Module) -> str:
    """sha256 over names and values of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _check(stored: Mapping[str, Any], expected: Mapping[str, Any], where: Path, keys: list[str]) -> None:
    differ = [key for key in keys if stored.get(key) != expected.get(key)]
    if differ:
        shown = "; ".join(_difference(key, stored.get(key), expected.get(key)) for key in differ)
        raise UsageError(f"{where}: belongs to another run ({shown}); give the same arguments, or another folder")


def _lock(descriptor: int) -> bool:
    """Takes the lock of an open file, until it is closed or the process ends; False when another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows, whose own locks keep others from reading the file's first byte, which nobody does
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _json(value: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent) + "\n"


def _mean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sum(value.values()) / len(value) if value else ""
    return "" if value is None else value


def _difference(key: str, was: Any, now: Any) -> str:
    """In words; of a recipe the lines that differ."""
    if isinstance(was, str) and isinstance(now, str) and "\n" in was + now:
        old, new = ([line.strip() for line in text.splitlines()] for text in (was, now))
        pairs = (", ".join(line for line in some if line not in other) for some, other in ((old, new), (new, old)))
        was, now = (text or "without it" for text in pairs)
        return f"{key} was {was[:100]}, is {now[:100]}"
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        others = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        return "; ".join(_difference(f"{key}.{name}", was.get(name), now.get(name)) for name in others)
    return f"{key} was {_short(was)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12] + "…"
