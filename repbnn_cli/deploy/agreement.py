"""Two forms of one network compared on the same images: do they predict the same?

Both add up the same integers, but scales and shifts are rounded differently (about 1e-7 of a value), and a value that
close to zero may get the other sign; an exact zero, sign 0 in torch, has +1 in packed bits. (Zeros are less rare than
they look: behind hardtanh many values are exactly ±1, and one BatchNorm output of exactly ∓1 then meets all of them.)
One flipped sign of thousands changes logits visibly in some networks, and says nothing about a kernel. So agreement is
stated in two parts, per image:

* the first signs that differ (in the order of the network) belong to values within `NEAR_ZERO` of zero, relative to the
  largest value of their tensor: rounding, and nothing else, flipped them;
* images without any such sign have logits within `TOLERANCE` of each other, relative to the largest logit.

Of a form with the very modules of the network, its packed file read back, more can be said: each module beside its
namesake on the same inputs, so that a sign that rounding flipped in one counts against no other (`compare_modules`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from repbnn_cli.deploy.forms import centre
from repbnn_cli.deploy.fuse import Fused, FusedBlock, fuse
from repbnn_cli.errors import VerificationError
from repbnn_cli.graph import Network, random_inputs
from repbnn_cli.graph.probe import applying
from repbnn_cli.graph.tracer import execute
from repbnn_cli.kernels import Backend
from repbnn_cli.kernels.packing import unpack_activations
from repbnn_cli.kernels.reference import binarize
from repbnn_cli.logits import logits_of
from repbnn_cli.recognize import Layer
from repbnn_cli.verify.lockstep import largest, tensors_of
from repbnn_cli.wording import counted

TOLERANCE = 1e-4
NEAR_ZERO = 1e-4
_CHECKED_IMAGES = 4
_TINY = 1e-30


@dataclass(frozen=True)
class Agreement:
    """images in all; flipped: of these, images with a sign that rounding flipped, or an exact zero, somewhere.

    largest_flip: the largest |value| / max |value| among the first differing signs; logits: the largest |Δ| / max
    |logit| over images without flips; same_class: images with the same first class, flipped ones included.
    """

    images: int
    flipped: int
    largest_flip: float
    logits: float
    same_class: int

    @property
    def holds(self) -> bool:
        return self.largest_flip <= NEAR_ZERO and self.logits <= TOLERANCE

    def __str__(self) -> str:
        same = f"{self.same_class} of {self.images} images in the same class"
        flips = f"{self.flipped} with signs that rounding decides (values within {self.largest_flip:.0e} of zero)"
        return (
            f"{same}; logits differ by {self.logits:.1e} of the largest; {flips if self.flipped else 'no sign differs'}"
        )


@dataclass(frozen=True)
class ModuleAgreement:
    """modules: compared; largest: |Δ| / max |output| of the one that differs most, `where`."""

    modules: int
    largest: float
    where: str

    @property
    def holds(self) -> bool:
        return self.largest <= TOLERANCE

    def __str__(self) -> str:
        at = f" (at {self.where})" if self.largest else ""
        return (
            f"{counted(self.modules, 'module')}, each on the same inputs: largest relative |Δ| = {self.largest:.1e}{at}"
        )


@torch.no_grad()
def compare_modules(
    plain: Network, again: Network, inputs: Sequence[Tensor], kernels: Mapping[str, Tensor] | None = None,
    unlike: Collection[str] = (),
) -> ModuleAgreement:  # fmt: skip
    """Each module, and each parameter that a forward uses, of one network beside the other's, with the first's inputs.

    Both have the same graph. inputs: one tensor with batch for each of the network's. kernels: module path → a kernel
    that its convolutions apply in `plain` instead of its own. unlike: parameters that need not be alike.
    """
    waiting = iter(inputs)
    values: dict[fx.Node, Any] = {}
    compared, worst, where = 0, 0.0, ""
    for node in plain.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(waiting)
        elif node.op != "output":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op not in ("call_module", "get_attr") or (node.op == "get_attr" and node.target in unlike):
                values[node] = execute(plain.module, node, args, kwargs)
                continue
            # The other's first, on copies: a module may write to what it is given.
            given = execute(again.module, node, *tree_map(_copied, (args, kwargs)))
            kernel = (kernels or {}).get(str(node.target))
            with nullcontext() if kernel is None else applying(kernel):
                values[node] = execute(plain.module, node, args, kwargs)
            difference = _relative(values[node], given)
            compared += 1
            if not math.isnan(worst) and not difference <= worst:
                worst, where = difference, str(node.target)
    return ModuleAgreement(compared, worst, where)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _relative(expected: Any, given: Any) -> float:
    pairs = list(zip(tensors_of(expected), tensors_of(given), strict=True))
    return largest(float((a - b).abs().max() / a.abs().max().clamp_min(_TINY)) for a, b in pairs if a.numel())


@torch.no_grad()
def compare(plain: Network, fused: Fused, batches: Iterable[Tensor]) -> Agreement:
    """The network as it is beside its fused form, image by image. Both on one device and in eval mode."""
    parts = [_compare(plain, fused, images) for images in batches]
    return Agreement(
        sum(p.images for p in parts),
        sum(p.flipped for p in parts),
        largest(p.largest_flip for p in parts),
        largest(p.logits for p in parts),
        sum(p.same_class for p in parts),
    )


def checked(plain: Network, layers: Mapping[str, Layer], backend: Backend) -> Fused:
    """The network with its blocks fused, once it computes on random images what the network itself does.

    Raises VerificationError where it does not.
    """
    fused = fuse(plain, layers, backend)
    shapes = [(_CHECKED_IMAGES, *shape[1:]) for shape in plain.example]
    if fused.blocks and len(shapes) == 1:
        (images,) = random_inputs(plain.module, shapes, seed=0)
        found = compare(plain, fused, [images])
        if not found.holds:
            raise VerificationError(f"the network on fused kernels computes something else ({found}); --backend torch "
                                    "runs it as it is")  # fmt: skip
    return fused


def _compare(plain: Network, fused: Fused, images: Tensor) -> Agreement:
    before, after = _Inputs(), _Inputs()
    with before.of(plain.module.get_submodule(b.path) for b in fused.blocks), after.of(fused.blocks):
        expected, given = (logits_of(n(images)).flatten(1) for n in (plain.module, fused.module))
    blocks = {(id(plain.module.get_submodule(b.path)), b.call): b for b in fused.blocks}
    clean = torch.ones(len(images), dtype=torch.bool, device=images.device)
    flips: list[float] = []
    for call, x in before.seen.items():  # in the order of the network, which is not that of the blocks
        if call not in blocks:
            continue
        block = blocks[call]
        x, seen = centre(x) if block.centred else x, after.seen[id(block), 0]
        signs = unpack_activations(seen, x.shape[1]) if seen.dtype == torch.int32 else _signs(seen, block)
        differ = x.sign() != signs  # an exact 0 among them: packed bits have no sign 0
        wrong = (x.abs() * differ).reshape(len(images), -1)  # an image is β samples where copies are convolved alone
        first = differ.reshape(len(images), -1).any(1) & clean  # what differs further down follows from the first
        if bool(first.any()):
            flips.append(float(wrong[first].max() / x.abs().max().clamp_min(_TINY)))
            clean &= ~first
    difference = (expected - given).abs()[clean]
    return Agreement(
        len(images),
        int((~clean).sum()),
        largest(flips),
        float(difference.max() / expected.abs().max().clamp_min(_TINY)) if len(difference) else 0.0,
        int((expected.argmax(1) == given.argmax(1)).sum()),
    )


def _signs(x: Tensor, block: FusedBlock) -> Tensor:
    return binarize(centre(x) if block.centred else x)


class _Inputs:
    """seen: (a module's id, how many calls of it there were before) → its first argument, in the order of the calls."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def of(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        calls: Counter[int] = Counter()

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.seen[id(module), calls[id(module)]] = args[0].clone()  # somebody may write to it later
            calls[id(module)] += 1

        unique = {id(m): m for m in modules}  # a module called twice is watched once
        hooks = [m.register_forward_pre_hook(keep) for m in unique.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
