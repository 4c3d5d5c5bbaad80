"""A transformed network on disk: what comes back is what went in, and nothing else runs on the way."""

from __future__ import annotations

import copy
import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from idioms import IDIOMS
from networks import Residual, images, randomize, rule_set
from torch import nn

import repbnn_cli
from repbnn_cli import checkpoint, result, source, surgery, verify, zoo
from repbnn_cli.errors import CheckpointError, UsageError
from repbnn_cli.source import Origin, Source

SAMPLE = Path(__file__).parents[1] / "checkpoints" / "irnet_resnet20_cifar10.pth"


def transformed(src: Source, **options: Any) -> tuple[dict[str, Any], nn.Module]:
    """Payload and Rep network, as the command makes them."""
    rules = rule_set(options.pop("rules", "reptran"), **{k: v for k, v in options.items() if k != "slim"})
    plan = surgery.plan(source.capture(src.model, src.origin, rules), rules)
    rep = surgery.apply(plan)
    certificate = verify.verify(src.model, plan, rep, gradients=False)
    assert certificate.passed
    return result.payload_of(src, plan, rep, certificate, slim=options.get("slim", False)), rep.eval()


def zoo_source(name: str, dtype: torch.dtype = torch.float32, size: int = 16) -> Source:
    torch.manual_seed(0)
    model = randomize(zoo.build(name)).to(dtype)
    return Source(model, Origin(name, None, {}, 10, ((3, size, size),)))


def assert_same_network(loaded: nn.Module, rep: nn.Module, x: torch.Tensor) -> None:
    assert not loaded.training
    assert list(loaded.state_dict()) == list(rep.state_dict())
    for (name, a), b in zip(loaded.state_dict().items(), rep.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(loaded(x), rep(x))
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("suffix", [".repbnn.pt", ".repbnn.safetensors"])
@pytest.mark.parametrize("slim", [False, True])
@pytest.mark.parametrize("name", ["irnet_resnet20", "rbnn_resnet20", "fracbnn_resnet20"])
def test_round_trip(tmp_path: Path, name: str, slim: bool, suffix: str) -> None:
    src = zoo_source(name)
    payload, rep = transformed(src, slim=slim)
    path = tmp_path / f"net{suffix}"
    result.save(payload, path)
    assert_same_network(repbnn_cli.load(path), rep, images(3, 16))
    opened = result.open_result(path)
    assert opened.origin == src.origin
    assert opened.payload["options"] == {"beta": 2, "inherit": "fold", "last_layer": "all"}
    assert [r.as_plain() for r in opened.plan.rows()] == [
        {**row, "where": again.where} for row, again in zip(payload["plan"], opened.plan.rows(), strict=True)
    ]
    if not slim and suffix.endswith(".pt"):
        with torch.no_grad():
            assert torch.equal(opened.network.module.eval()(images(2, 16)), src.model(images(2, 16)))
        certificate = verify.verify(src.model, opened.plan, opened.module, gradients=False)
        assert certificate.passed


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 1},
        {"beta": 4, "inherit": "reshape"},
        {"inherit": "none", "last_layer": "1_over_beta2"},
        {"last_layer": "1_over_beta"},
        {"rules": "bn-before-repeat"},
        {"rules": "reptran-released"},
    ],
    ids=str,
)
def test_round_trip_under_every_option(tmp_path: Path, options: dict[str, Any]) -> None:
    payload, rep = transformed(zoo_source("recu_resnet20"), **options)
    result.save(payload, tmp_path / "net.repbnn.pt")
    assert_same_network(result.load(tmp_path / "net.repbnn.pt"), rep, images(3, 16))


@pytest.mark.parametrize("slim", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_round_trip_in_other_precisions(tmp_path: Path, dtype: torch.dtype, slim: bool) -> None:
    payload, rep = transformed(zoo_source("irnet_resnet20", dtype), slim=slim)
    result.save(payload, tmp_path / "net.repbnn.pt")
    assert_same_network(result.load(tmp_path / "net.repbnn.pt"), rep, images(2, 16, dtype=dtype))


def test_the_sample_checkpoint_from_file_to_file(tmp_path: Path) -> None:
    src = source.from_checkpoint(str(SAMPLE))
    assert src.origin.name == "irnet_resnet20"
    payload, rep = transformed(src)
    path = tmp_path / "sample.repbnn.pt"
    result.save(payload, path)
    assert_same_network(repbnn_cli.load(path), rep, images(2, 32))
    stored = torch.load(path, weights_only=True)
    assert stored["source"]["file"] == SAMPLE.name
    assert len(stored["source"]["sha256"]) == 64
    assert stored["source"]["size_bytes"] == SAMPLE.stat().st_size
    assert (stored["format"], stored["version"]) == ("repbnn", 1)
    assert stored["rules"].startswith("schema: 1")
    assert all(c["passed"] for c in stored["certificate"])
    assert json.dumps({k: v for k, v in stored.items() if k not in ("tensors", "source_tensors")})
    assert set(stored["source_tensors"]) == set(src.model.state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_same_transform_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"{i}.repbnn{suffix}" for i in range(3)]
    src = source.from_checkpoint(str(SAMPLE))
    payload, _ = transformed(src)
    result.save(payload, files[0])
    result.save(payload, files[1])
    torch.manual_seed(7)
    again, _ = transformed(source.from_checkpoint(str(SAMPLE)))
    result.save(again, files[2])
    first = files[0].read_bytes()
    assert files[1].read_bytes() == first
    assert files[2].read_bytes() == first


def test_slim_leaves_out_the_source_tensors(tmp_path: Path) -> None:
    src = source.from_checkpoint(str(SAMPLE))
    whole, slim = (transformed(src, slim=slim)[0] for slim in (False, True))
    assert slim["source_tensors"] == {}
    for name, payload in (("whole", whole), ("slim", slim)):
        result.save(payload, tmp_path / f"{name}.repbnn.pt")
    assert (tmp_path / "slim.repbnn.pt").stat().st_size < 0.6 * (tmp_path / "whole.repbnn.pt").stat().st_size


def test_safetensors_holds_the_plain_state_dict(tmp_path: Path) -> None:
    payload, rep = transformed(zoo_source("irnet_resnet20"))
    path = tmp_path / "net.repbnn.safetensors"
    result.save(payload, path)
    tensors = safetensors.torch.load_file(path)
    assert set(tensors) == set(rep.state_dict())
    assert torch.equal(tensors["conv1.weight"], rep.conv1.weight)
    with safetensors.safe_open(path, "pt") as opened:
        plain = json.loads(opened.metadata()["repbnn"])
    assert plain["options"]["beta"] == 2
    assert "tensors" not in plain


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    payload, _ = transformed(zoo_source("irnet_resnet20"))
    path = tmp_path / "net.repbnn.pt"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="--force"):
        result.save(payload, path)
    assert path.read_bytes() == b"mine"
    result.save(payload, path, force=True)
    assert isinstance(result.load(path), nn.Module)


# ---------------------------------------------------------------------------------------------------------------------
# The user's own network

CODE = textwrap.dedent("""
    import torch
    from torch import nn

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sign()

        @staticmethod
        def backward(ctx, g):
            return g * (ctx.saved_tensors[0].abs() <= 1)

    class Net(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
            self.sign = Sign.apply
            self.conv, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
            self.fc = nn.Linear(width, 4)

        def forward(self, x):
            x = self.bn(self.stem(x))
            x = self.bn1(self.conv(self.sign(x))) + x
            return self.fc(x.mean((2, 3)))
""")


def user_source(tmp_path: Path) -> Source:
    (tmp_path / "mynet.py").write_text(CODE)
    spec = f"{tmp_path / 'mynet.py'}:Net"
    torch.manual_seed(0)
    model = randomize(source.build_user_model(spec, {"width": 16}))
    return Source(model, Origin(None, spec, {"width": 16}, None, ((3, 8, 8),)))


def test_a_users_network_has_to_be_named_again(tmp_path: Path) -> None:
    src = user_source(tmp_path)
    payload, rep = transformed(src)
    path = tmp_path / "mine.repbnn.pt"
    result.save(payload, path)
    with pytest.raises(UsageError) as caught:
        result.load(path)
    assert "name it again: --model" in str(caught.value)
    assert str(src.origin.model) in str(caught.value)
    assert_same_network(result.load(path, model=src.origin.model), rep, images())


def test_another_network_than_it_was_made_of_is_refused(tmp_path: Path) -> None:
    payload, _ = transformed(user_source(tmp_path))
    result.save(payload, tmp_path / "mine.repbnn.pt")
    with pytest.raises(CheckpointError) as caught:
        result.load(tmp_path / "mine.repbnn.pt", model=Residual)
    said = r"mine\.repbnn\.pt: does not fit the model: .* missing \(.*; it was made with --model .*mynet\.py:Net$"
    assert re.search(said, str(caught.value))
    assert len(str(caught.value)) < 400
    assert caught.value.__notes__  # what is missing, one kind a line


def test_no_code_runs_that_the_caller_did_not_name(tmp_path: Path) -> None:
    src = user_source(tmp_path)
    payload, _ = transformed(src)
    path, trap = tmp_path / "mine.repbnn.pt", tmp_path / "ran"
    result.save(payload, path)
    (tmp_path / "mynet.py").write_text(f"open({str(trap)!r}, 'w')\n" + CODE)
    with pytest.raises(UsageError):
        result.load(path)
    assert not trap.exists()


@pytest.mark.parametrize("form", ["instance", "function"])
def test_a_users_network_as_a_module_or_a_function(tmp_path: Path, form: str) -> None:
    src = user_source(tmp_path)
    payload, rep = transformed(src)
    path = tmp_path / "mine.repbnn.pt"
    result.save(payload, path)

    def build() -> nn.Module:
        return source.build_user_model(str(src.origin.model), {"width": 16})

    given: Any = build() if form == "instance" else build
    before = copy.deepcopy(given.state_dict()) if form == "instance" else {}
    assert_same_network(result.load(path, model=given), rep, images())
    for name, tensor in before.items():  # what was handed in is the caller's
        assert torch.equal(given.state_dict()[name], tensor)
    if form == "instance":
        assert given.training


def test_a_users_network_learns_after_loading(tmp_path: Path) -> None:
    """Its straight-through gradients come back, too."""
    build: Callable[[], nn.Module] = IDIOMS["BoundApply"]
    torch.manual_seed(0)
    src = Source(randomize(build()), Origin(None, "idioms.py:BoundApply", {}, None, ((3, 8, 8),)))
    payload, rep = transformed(src)
    result.save(payload, tmp_path / "mine.repbnn.pt")
    loaded = result.load(tmp_path / "mine.repbnn.pt", model=build)
    assert_same_network(loaded, rep, images())
    for network in (loaded, rep):
        network.train()
        network(images()).square().sum().backward()
    for (name, p), q in zip(loaded.named_parameters(), rep.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), name
    assert float(rep.stem.weight.grad.abs().max()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Files that are none, or do not fit


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Residual().state_dict()}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="is not a result of `repbnn transform`"):
        result.load(tmp_path / "plain.pt")
    with pytest.raises(CheckpointError):
        result.load(tmp_path / "missing.pt")
    assert result.of_file(checkpoint.load(tmp_path / "plain.pt"), None) is None
    payload, _ = transformed(zoo_source("irnet_resnet20"))
    result.save(payload, tmp_path / "net.repbnn.pt")
    assert result.of_file(checkpoint.load(tmp_path / "net.repbnn.pt"), None) is not None


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    payload, _ = transformed(zoo_source("irnet_resnet20"))
    tensors = dict(payload["tensors"])
    tensors["linear.weight"] = torch.zeros(10, 3)
    result.save({**payload, "tensors": tensors}, tmp_path / "shape.repbnn.pt")
    del tensors["linear.weight"]
    result.save({**payload, "tensors": tensors}, tmp_path / "missing.repbnn.pt")
    for name in ("shape", "missing"):
        with pytest.raises(
            CheckpointError, match=r"do not fit the network that its rules make.*linear\.weight"
        ) as caught:
            result.load(tmp_path / f"{name}.repbnn.pt")
        assert "\n" not in str(caught.value)


def test_a_result_is_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    payload, _ = transformed(zoo_source("irnet_resnet20"))
    torch.save({**payload, "notes": [Trap()]}, tmp_path / "trap.repbnn.pt")
    with pytest.raises(CheckpointError):
        result.load(tmp_path / "trap.repbnn.pt")
    assert not (tmp_path / "ran").exists()


def test_newest_result(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no result"):
        result.newest(tmp_path)
    payload, _ = transformed(zoo_source("irnet_resnet20"))
    for i, name in enumerate(("b.repbnn.pt", "a.repbnn.safetensors", "c.pt")):
        result.save(payload, tmp_path / name)
        os.utime(tmp_path / name, ns=(i, i))
    assert result.newest(tmp_path).name == "a.repbnn.safetensors"
