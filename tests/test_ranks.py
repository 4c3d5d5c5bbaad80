"""Two processes, started by torchrun, give what one process gives with the same global batch; they stop together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rank_examples
import torch
from torch import Tensor, nn
from torch.distributed import is_available

from repbnn_cli import runs
from repbnn_cli.errors import UsageError
from repbnn_cli.train.norms import synchronised
from repbnn_cli.train.ranks import Ranks, joined

pytestmark = pytest.mark.skipif(not is_available(), reason="this build of torch has no torch.distributed")


def torchrun(folder: Path, task: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, rank_examples.__file__, str(folder), task], env=environment, capture_output=True,
                          text=True, timeout=600)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """The folder of all runs of two processes, and what their ranks said, sorted."""
    folder = tmp_path_factory.mktemp("ranks")
    process = torchrun(folder, "all")
    assert process.returncode == 0, process.stderr
    return folder, sorted(line.split("|") for line in process.stdout.splitlines())


def test_statistics_of_a_batch_are_those_of_all_ranks(done: tuple[Path, list[list[str]]]) -> None:
    parts = [torch.load(done[0] / f"norms-{rank}.pt") for rank in range(2)]
    for name, whole in rank_examples.normalise(Ranks()).items():
        for key, expected in whole.items():
            of_samples = key in ("y", "x.grad")
            found = torch.cat([part[name][key] for part in parts]) if of_samples else parts[0][name][key]
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=f"{name}.{key}")
            assert of_samples or torch.equal(parts[0][name][key], parts[1][name][key])


def test_a_gradient_that_only_some_ranks_have_is_averaged_with_zeros(done: tuple[Path, list[list[str]]]) -> None:
    for rank in range(2):
        found = torch.load(done[0] / f"gradients-{rank}.pt")
        values = [None if g is None else set(g.flatten().tolist()) for g in found]
        assert values == [{0.5}, {10 / 2}, {21 / 2}, None]


class Gained(nn.BatchNorm2d):
    """More than a BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def test_statistics_in_code_of_ones_own_are_refused_in_several_processes() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), Gained(3))
    with (
        pytest.raises(UsageError, match=r"^1: Gained takes statistics of its batch by code of its own"),
        synchronised(network, Ranks(0, 2)),
    ):
        pass
    with synchronised(network, Ranks()):
        assert "forward" not in network[0].__dict__


def test_two_processes_train_as_one(done: tuple[Path, list[list[str]]], tmp_path: Path) -> None:
    rank_examples.train(Ranks(), tmp_path)
    one = torch.load(tmp_path / "weights-0.pt")
    two, other = (torch.load(done[0] / "run-2" / f"weights-{rank}.pt") for rank in range(2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
        assert torch.equal(two[name], other[name])
    rows = [runs.read(folder).rows for folder in (tmp_path, done[0] / "run-2")]
    for row, row_of_two in zip(*rows, strict=True):
        for key, value in row.items():
            expected = value if isinstance(value, str | dict) else pytest.approx(value, rel=1e-5)
            assert row_of_two[key] == expected, key


def test_a_signal_to_one_rank_stops_all_and_the_run_resumes_exactly(done: tuple[Path, list[list[str]]]) -> None:
    folder, said = done
    place = folder / "stopped" / "checkpoints" / "state-0-0001-000002.pt"
    message = f"stopped by SIGTERM after step 6; saved {place}; the same command with --resume continues"
    assert [line for line in said if line[0] == "signal"] == [["signal", str(rank), "143", message] for rank in (0, 1)]
    for name in ("metrics.jsonl", "checkpoints/best.pt", "checkpoints/last.pt", "weights-1.pt"):
        assert (folder / "whole" / name).read_bytes() == (folder / "stopped" / name).read_bytes()


def test_a_refusal_and_nan_stop_all_ranks_with_the_same_words(done: tuple[Path, list[list[str]]]) -> None:
    folder, said = done
    for what, code, message in (
        ("second", "2", f"{folder / 'stopped'}: holds a run already; --resume continues it, or give another folder"),
        ("nan", "4", "stage train, epoch 2, step 6: the loss is not finite; first in "),
    ):
        lines = [line for line in said if line[0] == what]
        assert [line[1:3] for line in lines] == [["0", code], ["1", code]]
        assert all(line[3].startswith(message) for line in lines)


def test_an_error_of_one_rank_ends_all(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "die")
    assert done.returncode == 1
    assert "a worker met something unexpected" in done.stderr


def test_alone_nothing_communicates() -> None:
    ranks, tensor = Ranks(), torch.arange(3.0)
    assert ranks.first
    assert ranks.sum(tensor) is tensor
    assert torch.equal(ranks.gather(tensor), tensor[None])
    assert ranks.largest(5) == 5
    assert ranks.on_first(lambda: 7) == 7
    with joined(torch.device("cpu")) as (found, device):
        assert (found.size, device.type) == (1, "cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError) as refused, joined(torch.device("cuda")):
        pass
    assert str(refused.value) == "rank 2 of this machine: there are only 2 GPUs; use --nproc-per-node 2"
