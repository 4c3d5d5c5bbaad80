"""Which network a state dict is of: names and shapes decide, and what is said when they do not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repbnn_cli import zoo
from repbnn_cli.checkpoint import PREFIXES, Checkpoint, load
from repbnn_cli.checkpoint import identify as identify_module
from repbnn_cli.checkpoint.identify import Match, Signature, compare, identify, name_hash, prefixes_to_try, resolve
from repbnn_cli.errors import CheckpointError, UsageError

SAMPLE = Path(__file__).parent.parent / "checkpoints" / "irnet_resnet20_cifar10.pth"

SIGNATURES: dict[str, Signature] = {
    "plain_net": {"conv1.weight": (4, 3, 3, 3), "bn1.weight": (4,), "fc.weight": (10, 4), "fc.bias": (10,)},
    "alpha_net": {"conv1.weight": (4, 3, 3, 3), "conv1.alpha": (4, 1, 1), "fc.weight": (10, 4), "fc.bias": (10,)},
    "alpha_net_bireal": {
        "conv1.weight": (4, 3, 3, 3),
        "conv1.alpha": (4, 1, 1),
        "fc.weight": (10, 4),
        "fc.bias": (10,),
    },
    "model_net": {"model.0.weight": (2, 2), "model.1.weight": (2, 2), "model.bn.num_batches_tracked": ()},
    "deep_net": {"fc1.weight": (8, 4), "fc1.bias": (8,), "fc2.weight": (10, 8), "fc2.bias": (10,)},
}


def tensors_of(signature: Signature) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in signature.items()}


def made(tensors: dict[str, torch.Tensor], path: str = "model.pth", **rest: object) -> Checkpoint:
    return Checkpoint(path=Path(path), sha256="", size_bytes=0, format="torch", tensors=tensors, **rest)  # type: ignore[arg-type]


# -- matching ---------------------------------------------------------------------------------------------------------


def test_exact_fits_come_first() -> None:
    matches = identify(tensors_of(SIGNATURES["alpha_net"]), SIGNATURES)
    assert [match.arch for match in matches[:3]] == ["alpha_net", "alpha_net_bireal", "plain_net"]
    assert [match.exact for match in matches] == [True, True, False, False, False]
    assert matches[0] == Match("alpha_net", compare({}, {}), 1.0)
    assert (matches[2].missing, matches[2].unexpected) == (("bn1.weight",), ("conv1.alpha",))
    assert matches[2].score == pytest.approx(3 / 5)


def test_another_number_of_classes() -> None:
    tensors = tensors_of(SIGNATURES["plain_net"])
    tensors["fc.weight"], tensors["fc.bias"] = torch.zeros(100, 4), torch.zeros(100)
    best = identify(tensors, SIGNATURES)[0]
    assert (best.arch, best.num_classes, best.exact) == ("plain_net", 100, True)
    tensors["fc.bias"] = torch.zeros(99)
    assert not identify(tensors, SIGNATURES)[0].exact


def test_a_wider_hidden_layer_is_not_a_classifier() -> None:
    tensors = tensors_of(SIGNATURES["deep_net"])
    tensors.update({"fc1.weight": torch.zeros(16, 4), "fc1.bias": torch.zeros(16), "fc2.weight": torch.zeros(10, 16)})
    assert not identify(tensors, SIGNATURES)[0].exact


def test_absent_counters_and_ignored_names() -> None:
    tensors = {"model.0.weight": torch.zeros(2, 2), "model.1.weight": torch.zeros(2, 2)}
    found = resolve(made(tensors), signatures=SIGNATURES)
    assert found.tensors["model.bn.num_batches_tracked"].dtype == torch.int64
    assert found.notes == ("1 batch counters (num_batches_tracked) are not in the file and start at 0",)
    tensors["placeholder"] = torch.zeros(3)
    best = identify(tensors, SIGNATURES, ignores=lambda name: name == "placeholder")[0]
    assert best.exact


def test_prefixes_to_try() -> None:
    assert list(prefixes_to_try("")) == [""]
    assert list(prefixes_to_try("module.model.net.")) == ["", "net.", "model.net.", "module.model.net."]


@given(
    st.sampled_from(sorted(SIGNATURES)),
    st.lists(st.sampled_from(PREFIXES), max_size=3),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_prefixes_and_order_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory, arch: str, parts: list[str], random: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pt"
    names = list(SIGNATURES[arch])
    random.shuffle(names)  # type: ignore[attr-defined]
    torch.save({"state_dict": {"".join(parts) + n: torch.zeros(SIGNATURES[arch][n]) for n in names}}, path)
    found = resolve(load(path), signatures=SIGNATURES)
    assert found.arch == arch.removesuffix("_bireal")
    assert {name: tuple(t.shape) for name, t in found.tensors.items()} == SIGNATURES[arch]
    assert list(found.tensors) == list(SIGNATURES[arch])


# -- deciding between equals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "metadata", "arch", "reason"),
    [
        ("model_best.pth", {}, "alpha_net", "alpha_net is the first of them"),
        ("runs/alpha_net/best.pth", {}, "alpha_net", "alpha_net is the first of them"),
        ("alpha_bireal.pth", {}, "alpha_net_bireal", "the file name (alpha_bireal.pth) says alpha_net_bireal"),
        ("Bi-Real-Net.pth", {}, "alpha_net_bireal", "the file name (Bi-Real-Net.pth) says alpha_net_bireal"),
        ("bireal/best.pth", {}, "alpha_net_bireal", "the folder name (bireal) says alpha_net_bireal"),
        ("x.pth", {"arch": "net_bireal"}, "alpha_net_bireal", "its entry arch (net_bireal) says alpha_net_bireal"),
        ("x.pth", {"args": {"model": "bireal"}}, "alpha_net_bireal", "its entry model (bireal) says alpha_net_bireal"),
    ],
)
def test_where_two_fit(path: str, metadata: dict[str, object], arch: str, reason: str) -> None:
    checkpoint = made(tensors_of(SIGNATURES["alpha_net"]), path, metadata=metadata)
    found = resolve(checkpoint, signatures=SIGNATURES)
    assert found.arch == arch
    assert found.reason == f"alpha_net and alpha_net_bireal share names and shapes; {reason}; --arch overrides"
    assert found.alternatives == tuple({"alpha_net", "alpha_net_bireal"} - {arch})


def test_arch_overrides() -> None:
    checkpoint = made(tensors_of(SIGNATURES["alpha_net"]), "alpha.pth")
    found = resolve(checkpoint, "alpha_net_bireal", signatures=SIGNATURES)
    assert (found.arch, found.reason, found.num_classes) == ("alpha_net_bireal", "named by --arch", None)


# -- nothing fits -----------------------------------------------------------------------------------------------------


def test_the_nearest_network_is_shown() -> None:
    tensors = tensors_of(SIGNATURES["plain_net"])
    del tensors["bn1.weight"]
    tensors["conv1.weight"] = torch.zeros(4, 1, 3, 3)
    tensors.update({f"extra.{index}": torch.zeros(1) for index in range(5)})
    with pytest.raises(CheckpointError) as caught:
        resolve(made(tensors, "a.pth"), signatures=SIGNATURES)
    assert str(caught.value) == (
        "a.pth: its 8 tensors fit no known network; nearest is plain_net (22% agree): 1 missing (bn1.weight), "
        "5 unexpected (extra.0 and 4 more), 1 mis-shaped (conv1.weight (4, 1, 3, 3), expected (4, 3, 3, 3)); "
        "give its code with --model file.py:callable (of transform, profile, evaluate, ...)"
    )
    assert caught.value.__notes__ == [
        "1 missing (bn1.weight)",
        "5 unexpected (extra.0, extra.1, extra.2 and 2 more)",
        "1 mis-shaped (conv1.weight (4, 1, 3, 3), expected (4, 3, 3, 3))",
    ]


def test_what_is_far_from_every_network_names_none() -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(made({"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}, "a.pth"), signatures=SIGNATURES)
    assert str(caught.value).startswith("a.pth: its 2 tensors fit no known network; give its code with --model file.py")
    assert not hasattr(caught.value, "__notes__")


def test_a_network_beside_other_tensors_is_found() -> None:
    own = {f"net.{name}": tensor for name, tensor in tensors_of(SIGNATURES["plain_net"]).items()}
    found = resolve(made({**own, "acc.total": torch.zeros(1)}), signatures=SIGNATURES)
    assert (found.arch, set(found.tensors)) == ("plain_net", set(SIGNATURES["plain_net"]))
    assert found.left_out == "took the tensors under net, left out acc.total"
    twice = {**own, **{name.replace("net.", "teacher.", 1): tensor for name, tensor in own.items()}}
    with pytest.raises(
        CheckpointError, match=r"more than once, under net, teacher; choose with --key, e\.g\. --key net"
    ):
        resolve(made(twice), signatures=SIGNATURES)


def test_a_named_network_that_does_not_fit() -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(made(tensors_of(SIGNATURES["plain_net"]), "a.pth"), "alpha_net", signatures=SIGNATURES)
    assert str(caught.value) == (
        "a.pth: does not fit --arch alpha_net: 1 missing (conv1.alpha), 1 unexpected (bn1.weight); "
        "leave --arch out to find the network, or give its code with --model file.py:callable (of transform, profile, "
        "evaluate, ...)"
    )


def test_a_network_that_nobody_knows() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(made({}), "alfa_net", signatures=SIGNATURES)
    assert str(caught.value) == (
        "--arch alfa_net: unknown network; nearest: alpha_net, plain_net; `repbnn zoo` lists all"
    )


# -- the zoo ----------------------------------------------------------------------------------------------------------


def test_the_sample_is_found() -> None:
    found = resolve(load(SAMPLE))
    assert (found.arch, found.num_classes, found.alternatives) == ("irnet_resnet20", None, ())
    assert found.reason == "names and shapes of its 121 tensors fit irnet_resnet20 and no other network"
    zoo.build(found.arch).load_state_dict(found.tensors)


@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_every_network_is_found_among_all(arch: str) -> None:
    signature = zoo.signature(arch)
    equals = [other for other in zoo.ARCHS if dict(zoo.signature(other)) == dict(signature)]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in signature.items()}
    found = resolve(made(tensors))
    assert {found.arch, *found.alternatives} == set(equals)
    assert found.arch == equals[0]
    assert list(found.tensors) == list(signature)
    assert resolve(made(tensors), arch).arch == arch
    fitting = [
        match.arch for match in identify(tensors, {name: zoo.signature(name) for name in zoo.ARCHS}) if match.exact
    ]
    assert fitting == equals


@pytest.mark.parametrize("arch", [name for name, arch in zoo.ARCHS.items() if arch.ignored])
def test_what_a_network_does_not_need_is_left_out(arch: str) -> None:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in zoo.signature(arch).items()}
    extra = sorted(zoo.ARCHS[arch].ignored)
    if zoo.ARCHS[arch].ignored_prefix:
        extra.append(f"{zoo.ARCHS[arch].ignored_prefix}conv1.weight")
    tensors.update({name: torch.empty(77, device="meta") for name in extra})
    for found in (resolve(made(tensors)), resolve(made(tensors), arch)):
        assert found.arch == arch
        assert found.notes == (f"left out {', '.join(extra)}: the network does not need them",)
        assert list(found.tensors) == list(zoo.signature(arch))


def test_the_table_of_names_is_up_to_date() -> None:
    table = {arch: name_hash(zoo.signature(arch)) for arch in zoo.ARCHS}
    lines = "\n".join(f'    "{arch}": 0x{value:08X},' for arch, value in table.items())
    assert dict(identify_module._NAME_HASHES) == table, f"replace the table in identify.py by\n{lines}"


def test_only_networks_with_the_same_names_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    signature = zoo.signature
    monkeypatch.setattr(zoo, "signature", lambda arch: built.append(arch) or signature(arch))  # type: ignore[func-returns-value]
    resolve(load(SAMPLE))
    assert set(built) == {"irnet_resnet20"}


def test_comparing_is_quick() -> None:
    signatures = {f"net{index}": {f"l{n}.weight{index}": (n,) for n in range(400)} for index in range(30)}
    tensors = tensors_of(signatures["net29"])
    start = time.perf_counter()
    assert identify(tensors, signatures)[0].arch == "net29"
    assert time.perf_counter() - start < 0.5
