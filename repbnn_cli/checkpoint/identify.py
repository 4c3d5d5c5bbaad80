"""Which network a state dict belongs to, from the names and shapes of its tensors alone."""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from repbnn_cli import zoo
from repbnn_cli.checkpoint.loading import PREFIXES, Checkpoint, left_out, under
from repbnn_cli.errors import CheckpointError, UsageError
from repbnn_cli.wording import some

Shape = tuple[int, ...]
Signature = Mapping[str, Shape]
Ignores = Callable[[str], bool]

_NEAR = 0.2  # the share of agreeing tensors from which on the nearest network is shown
# A counter that PyTorch before 0.4.1 did not save and that inference does not need.
_COUNTER = ".num_batches_tracked"
# Under these keys training scripts store what they call the network.
_ARCH_KEYS = ("arch", "model", "net", "network", "model_name", "architecture")

# CRC-32 of each network's sorted names (those that may be absent left out). Building all networks takes ten times as
# long as the rest of identification, so only those whose names agree are built. A stale entry costs time, or hides
# that another network fits as well; a test recomputes the table.
# fmt: off
_NAME_HASHES: Mapping[str, int] = {
    "irnet_resnet20": 0x306B33C0, "recu_resnet20": 0x4E447ED5, "rbnn_resnet20": 0x55E77759,
    "rbnn_resnet20_bireal": 0x55E77759, "irnet_resnet18": 0x9C8F3820, "rbnn_resnet18": 0x91A27B99,
    "recu_resnet18": 0x011CC6D0, "irnet_vgg_small": 0xEFB7FCA5, "rbnn_vgg_small": 0x1C7618B8,
    "recu_vgg_small": 0x7AA798E0, "fracbnn_resnet20": 0x1497195C, "fracbnn_resnet20_1bit": 0x217BDDD8,
    "resnet20": 0x5A3F5AAB, "resnet20_bireal": 0x5A3F5AAB, "birealnet18": 0x4121D4E9, "birealnet34": 0x5D28E80D,
    "irnet_imagenet_resnet18": 0xF2D9F008, "irnet_imagenet_resnet34": 0x8F1726CB, "rbnn_imagenet_resnet18": 0xF0D34B90,
    "rbnn_imagenet_resnet34": 0xF0A37763, "recu_imagenet_resnet18": 0xB649842E, "recu_imagenet_resnet34": 0xA365A4BF,
    "reactnet_a": 0xC0E10198, "adambnn_reactnet_a": 0x2A81C5E6, "reactnet_resnet18": 0xEB966DA5,
    "fracbnn_imagenet": 0xD0618D3A,
}
# fmt: on


class MisShaped(NamedTuple):
    """A tensor whose name is right and whose shape is not."""

    name: str
    shape: Shape
    expected: Shape

    def __str__(self) -> str:
        return f"{self.name} {self.shape}, expected {self.expected}"


@dataclass(frozen=True)
class Difference:
    """What separates a state dict from the one that a network has."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mis_shaped: tuple[MisShaped, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mis_shaped)

    @property
    def count(self) -> int:
        """Number of tensors that disagree."""
        return len(self.missing) + len(self.unexpected) + len(self.mis_shaped)

    def lines(self, shown: int = 3) -> list[str]:
        """One line per kind of disagreement: how many, and the first ``shown`` of them."""
        groups: list[tuple[str, Sequence[object]]] = [
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("mis-shaped", self.mis_shaped),
        ]
        lines = []
        for kind, items in groups:
            if items:
                separator = "; " if kind == "mis-shaped" else ", "
                lines.append(f"{len(items)} {kind} ({some(items, shown, separator)})")
        return lines


@dataclass(frozen=True)
class Match:
    """How well a state dict fits one network.

    ``score`` is the share of agreeing tensors among all names of both sides. ``num_classes`` is set when everything
    fits but the classifier, which has that many outputs instead of the network's own number. ``prefix`` has to be put
    before the names that were compared: a wrapper's prefix that turned out to be the network's own.
    """

    arch: str
    difference: Difference
    score: float
    num_classes: int | None = None
    prefix: str = ""

    @property
    def exact(self) -> bool:
        """Every tensor is there with its shape, but for a classifier of another size."""
        return not self.difference

    @property
    def missing(self) -> tuple[str, ...]:
        return self.difference.missing

    @property
    def unexpected(self) -> tuple[str, ...]:
        return self.difference.unexpected

    @property
    def mis_shaped(self) -> tuple[MisShaped, ...]:
        return self.difference.mis_shaped


@dataclass(frozen=True, eq=False)
class Identified:
    """The network that a checkpoint belongs to.

    ``tensors`` have the network's names, in its order, and load strictly; what the network ignores is left out, and
    listed in ``notes``; ``left_out`` says what lay beside it under other names. ``num_classes`` is None when it is the
    network's own number. ``alternatives`` fit as well; ``reason`` says in one sentence why it is this one.
    """

    arch: str
    num_classes: int | None
    reason: str
    alternatives: tuple[str, ...]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    left_out: str = ""


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Names → shapes."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def nothing(name: str) -> bool:
    """Ignores no tensor."""
    return False


def compare(got: Signature, expected: Signature, ignores: Ignores = nothing) -> Difference:
    """Missing, unexpected and mis-shaped names; what ``ignores`` holds for and absent batch counters do not count."""
    wrong = [MisShaped(n, got[n], shape) for n, shape in expected.items() if n in got and got[n] != shape]
    return Difference(
        tuple(n for n in expected if n not in got and not n.endswith(_COUNTER) and not ignores(n)),
        tuple(n for n in got if n not in expected and not ignores(n)),
        tuple(item for item in wrong if not ignores(item.name)),
    )


def prefixes_to_try(prefix: str) -> Iterator[str]:
    """What may have to be put back before the names, given what was taken off: nothing, then ever more of it."""
    yield ""
    parts = []
    while prefix:
        part = next((p for p in PREFIXES if prefix.startswith(p)), prefix)
        parts.append(part)
        prefix = prefix.removeprefix(part)
    for start in range(len(parts) - 1, -1, -1):
        yield "".join(parts[start:])


def starts_within(got: Signature, expected: Signature, ignores: Ignores = nothing) -> list[str]:
    """What names begin with where all lies that a network expects and nothing else: other tensors may lie beside it."""
    name = next((n for n in expected if not n.endswith(_COUNTER) and not ignores(n)), None)
    starts = [n.removesuffix(name) for n in got if name is not None and n.endswith(f".{name}")]
    found = []
    for start in starts:
        within = {n.removeprefix(start): shape for n, shape in got.items() if n.startswith(start)}
        difference = compare(within, expected, ignores)
        if not difference or other_classes(difference) is not None:
            found.append(start)
    return found


def narrowed(checkpoint: Checkpoint, starts: Iterable[str]) -> Checkpoint:
    """The checkpoint with the tensors alone whose names begin with the one start; CheckpointError for several."""
    several = sorted({start.removesuffix(".") for start in starts})
    if len(several) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: the network's tensors lie there more than once, under {some(several, 6)}; choose "
            f"with --key, e.g. --key {several[0]}"
        )
    start = f"{several[0]}."
    notes = (*checkpoint.notes, left_out(checkpoint.tensors, start))
    tensors = under(checkpoint.tensors, start)
    return replace(checkpoint, tensors=tensors, prefix=checkpoint.prefix + start, notes=notes)


def identify(
    tensors: Mapping[str, Tensor],
    signatures: Mapping[str, Signature] | None = None,
    *,
    prefix: str = "",
    ignores: Ignores = nothing,
) -> list[Match]:
    """How well ``tensors`` fit each network, best first; exact fits lead, in the order of the registry.

    ``signatures`` (name → names and shapes) and ``ignores`` replace the zoo's. When networks of the zoo have exactly
    these names, only they are compared. ``prefix`` is what was taken off the names: a network may need it.
    """
    got = shapes_of(tensors)
    archs = list(signatures) if signatures is not None else _plausible(got, prefix)
    matches = []
    for arch in archs:
        expected = zoo.signature(arch) if signatures is None else signatures[arch]
        skips = zoo.ARCHS[arch].ignores if signatures is None else ignores
        tried = [_match(arch, got, expected, skips, p) for p in prefixes_to_try(prefix)]
        matches.append(max(tried, key=lambda match: match.score))  # the first of equals: nothing put back
    # sorted() is stable: among equals the registry's order stays.
    return sorted(matches, key=lambda match: (not match.exact, match.num_classes is not None, -match.score))


def resolve(
    checkpoint: Checkpoint, arch: str | None = None, signatures: Mapping[str, Signature] | None = None
) -> Identified:
    """The network that ``checkpoint`` belongs to, and its tensors under that network's names.

    Where several fit, what the file says of itself (metadata, then file name, then folder name) decides, else the order
    of ``repbnn zoo``; ``arch`` overrides both. Raises UsageError for an unknown ``arch``, and CheckpointError when
    nothing fits: one line with the nearest network; its notes (PEP 678) list the disagreeing tensors, one kind a line.
    """
    known = list(zoo.ARCHS if signatures is None else signatures)
    if arch is not None and arch not in known:
        near = difflib.get_close_matches(arch, known, n=3) or known
        raise UsageError(f"--arch {arch}: unknown network; nearest: {', '.join(near[:3])}; `repbnn zoo` lists all")
    ignores: Ignores = nothing
    if arch is not None and signatures is None:
        signatures, ignores = {arch: zoo.signature(arch)}, zoo.ARCHS[arch].ignores
    matches = identify(checkpoint.tensors, signatures, prefix=checkpoint.prefix, ignores=ignores)
    if matches and not matches[0].exact:
        got, starts = shapes_of(checkpoint.tensors), list[str]()
        for name in [arch] if arch is not None else known:
            expected = zoo.signature(name) if signatures is None else signatures[name]
            starts += starts_within(got, expected, zoo.ARCHS[name].ignores if signatures is None else ignores)
        if starts:
            within = resolve(narrowed(checkpoint, starts), arch, signatures)
            return replace(within, left_out=left_out(checkpoint.tensors, starts[0]))
    if arch is not None:
        chosen = next(match for match in matches if match.arch == arch)
        if not chosen.exact:
            raise _no_fit(checkpoint, chosen, given=True)
        return _identified(checkpoint, chosen, "named by --arch", (), signatures)
    if not matches or not matches[0].exact:
        raise _no_fit(checkpoint, matches[0] if matches else None, given=False)
    fitting = [match for match in matches if match.exact]
    chosen, reason = _decide(checkpoint, fitting)
    others = tuple(match.arch for match in fitting if match is not chosen)
    return _identified(checkpoint, chosen, reason, others, signatures)


def name_hash(names: Iterable[str]) -> int:
    """CRC-32 of the sorted names, without those that a checkpoint may lack or have too much."""
    optional = [arch.ignores for arch in zoo.ARCHS.values() if arch.ignored or arch.ignored_prefix]
    needed = sorted(n for n in names if not n.endswith(_COUNTER) and not any(ignores(n) for ignores in optional))
    return zlib.crc32("\n".join(needed).encode())


def _plausible(got: Signature, prefix: str) -> list[str]:
    hashes = {name_hash(put_back + name for name in got) for put_back in prefixes_to_try(prefix)}
    unlisted = [arch for arch in zoo.ARCHS if arch not in _NAME_HASHES]
    same_names = [arch for arch in zoo.ARCHS if _NAME_HASHES.get(arch) in hashes]
    return [arch for arch in zoo.ARCHS if arch in unlisted or arch in same_names] if same_names else list(zoo.ARCHS)


def _match(arch: str, got: Signature, expected: Signature, ignores: Ignores, prefix: str) -> Match:
    named = {prefix + name: shape for name, shape in got.items()} if prefix else got
    difference = compare(named, expected, ignores)
    agreeing = len(named.keys() & expected.keys()) - len(difference.mis_shaped)
    num_classes = other_classes(difference)
    if num_classes is not None:
        return Match(arch, Difference(), 1.0, num_classes, prefix)
    score = 1.0 if not difference else agreeing / max(agreeing + difference.count, 1)
    return Match(arch, difference, score, None, prefix)


def other_classes(difference: Difference) -> int | None:
    """The number of outputs when only one linear layer disagrees, and only in that number.

    A hidden layer cannot be mistaken for the classifier: with other outputs the layer after it would disagree as well.
    """
    wrong = difference.mis_shaped
    if difference.missing or difference.unexpected or not wrong:
        return None
    modules = {item.name.rpartition(".")[0] for item in wrong}
    outputs = {item.shape[:1] for item in wrong}
    widths_agree = all(item.shape[1:] == item.expected[1:] and item.shape for item in wrong)
    if len(modules) == 1 and len(outputs) == 1 and widths_agree and max(len(item.shape) for item in wrong) == 2:
        return wrong[0].shape[0]
    return None


def _decide(checkpoint: Checkpoint, fitting: Sequence[Match]) -> tuple[Match, str]:
    total = len(checkpoint.tensors)
    if len(fitting) == 1:
        size = f", with {fitting[0].num_classes} classes" if fitting[0].num_classes is not None else ""
        return fitting[0], f"names and shapes of its {total} tensors fit {fitting[0].arch} and no other network{size}"
    names = " and ".join(match.arch for match in fitting)
    common = set.intersection(*(set(match.arch.split("_")) for match in fitting))
    for source, text in _hints(checkpoint):
        squeezed = re.sub("[^a-z0-9]", "", text.lower())
        found = [sum(part in squeezed for part in set(match.arch.split("_")) - common) for match in fitting]
        if found.count(max(found)) == 1:
            chosen = fitting[found.index(max(found))]
            return chosen, f"{names} share names and shapes; {source} ({text}) says {chosen.arch}; --arch overrides"
    return fitting[0], f"{names} share names and shapes; {fitting[0].arch} is the first of them; --arch overrides"


def _hints(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    metadata = checkpoint.metadata
    for level in (metadata, *(value for value in metadata.values() if isinstance(value, dict))):
        for key in _ARCH_KEYS:
            if isinstance(level.get(key), str):
                yield f"its entry {key}", level[key]
    yield "the file name", checkpoint.path.name
    yield "the folder name", checkpoint.path.absolute().parent.name


def _identified(
    checkpoint: Checkpoint,
    match: Match,
    reason: str,
    alternatives: tuple[str, ...],
    signatures: Mapping[str, Signature] | None,
) -> Identified:
    expected = zoo.signature(match.arch) if signatures is None else signatures[match.arch]
    ignores: Ignores = zoo.ARCHS[match.arch].ignores if match.arch in zoo.ARCHS else nothing
    tensors, notes, counters = {}, [], 0
    for name, shape in expected.items():
        held = None if ignores(name) else checkpoint.tensors.get(name.removeprefix(match.prefix))
        if held is not None:
            tensors[name] = held
        elif name.endswith(_COUNTER):
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
            counters += 1
    left = [name for name in checkpoint.tensors if match.prefix + name not in tensors]
    if left:
        notes.append(f"left out {some(left)}: the network does not need them")
    if counters:
        notes.append(f"{counters} batch counters (num_batches_tracked) are not in the file and start at 0")
    return Identified(match.arch, match.num_classes, reason, alternatives, tensors, tuple(notes))


def _no_fit(checkpoint: Checkpoint, nearest: Match | None, *, given: bool) -> CheckpointError:
    path, total = checkpoint.path, len(checkpoint.tensors)
    own_code = "give its code with --model file.py:callable (of transform, profile, evaluate, ...)"
    if nearest is None:
        return CheckpointError(f"{path}: there is no network to compare its {total} tensors with; {own_code}")
    if not given and nearest.score < _NEAR:  # some other network: what it lacks says nothing
        return CheckpointError(f"{path}: its {total} tensors fit no known network; {own_code}")
    brief = ", ".join(nearest.difference.lines(shown=1))
    if given:
        text = (
            f"{path}: does not fit --arch {nearest.arch}: {brief}; leave --arch out to find the network, or {own_code}"
        )
    else:
        text = (
            f"{path}: its {total} tensors fit no known network; nearest is {nearest.arch} "
            f"({nearest.score:.0%} agree): {brief}; {own_code}"
        )
    error = CheckpointError(text)
    for line in nearest.difference.lines():
        error.add_note(line)
    return error
