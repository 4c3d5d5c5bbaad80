"""Rows of benchmarks/kernels.py for rep_batch_norm: norms of four networks in training, raw (β = 1) and Rep (β = 2).

One call is forward and backward: BatchNorm of a convolution's output over its copies, + residual, Hardtanh, and the
signs for the next layer. Sides: our operator, which gives signs as bits; the same in torch's operations, statistics on
the distinct channels as well, eagerly and by torch.compile, which give signs as ±1. All in bf16 channels_last. Kept is
what the forward saves for the backward, the convolution's output included, which nobody else needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from fused_rows import HALF, LAYERS
from kernel_timing import COMPILED, Call, Row, compiled
from torch import Tensor

from repbnn_cli.kernels import reference
from repbnn_cli.kernels.packing import unpack_activations
from repbnn_cli.kernels.rep_batch_norm import rep_batch_norm

FASTER, LESS_KEPT = 1.3, 4.0  # targets over torch.compile
Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # x, weight, bias, residual


def shapes() -> list[tuple[str, int, int]]:
    """(network, channels, height = width) of the distinct outputs of 3×3 convolutions, as the raw network has them."""
    found = [(m.network, m.out_channels, m.size // m.stride) for m in LAYERS if m.kernel == 3]
    return list(dict.fromkeys(found))


def operands(channels: int, size: int, beta: int, batch: int, device: torch.device) -> Operands:
    """Fresh random tensors, all to be differentiated; x holds integers, as a binary convolution gives them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    x = (normal(batch, channels // beta, size, size) * 20).round().to(HALF)
    residual = normal(batch, channels * beta, size, size).to(HALF)
    laid = [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, residual)]
    weight, bias = (normal(channels * beta).requires_grad_() for _ in range(2))
    return laid[0], weight, bias, laid[1]


def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    made = rep_batch_norm(x, weight, bias, residual, clamp=True, signs=True)
    assert made.signs is not None
    return made.values, made.signs


def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """What RepBatchNorm2d and a network around it compute, in the dtype of x."""
    repeats = len(weight) // x.shape[1]
    normal = F.batch_norm(x, None, None, training=True)
    repeated = normal if repeats == 1 else torch.cat([normal] * repeats, 1)  # keeps channels_last
    scale, shift = weight.to(x.dtype).view(-1, 1, 1), bias.to(x.dtype).view(-1, 1, 1)
    out = F.hardtanh(repeated * scale + shift + residual)
    return out, torch.where(out.detach() >= 0, 1.0, -1.0).to(x.dtype)


Unit = Callable[..., tuple[Tensor, Tensor]]


def step(unit: Unit, given: Operands, gradient: Tensor) -> Call:
    """Forward and backward."""

    def call() -> object:
        values, signs = unit(*given)
        return values, signs, torch.autograd.grad(values, given, gradient)

    return call


def kept(unit: Unit, given: Operands) -> int:
    """Bytes that the forward saves for the backward, each storage once, scales and shifts apart."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.numel() > given[1].numel() or not tensor.is_floating_point():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        unit(*given)
    return sum(storages.values())


def rows(batch: int, device: torch.device, check_on: int | None = None) -> Iterator[Row]:
    """All shapes at β = 1 and 2; check_on: images at most this large for the check (an interpreter is slow)."""
    units: dict[str, Unit] = {"norm": ours, "eager bf16": plain, COMPILED: compiled(plain)}
    for beta in (1, 2):
        for network, channels, size in shapes():
            yield _row(f"{network} norm {channels} {size}² β={beta}", units, (channels, size, beta), batch, device,
                       check_on)  # fmt: skip


def _row(
    name: str, units: dict[str, Unit], shape: tuple[int, int, int], batch: int, device: torch.device,
    check_on: int | None,
) -> Row:  # fmt: skip
    channels, size, beta = shape
    small, few = (size, batch) if check_on is None else (min(size, check_on), 2)

    def timed(unit: Unit) -> Call:
        given = operands(channels, size, beta, batch, device)
        return step(unit, given, torch.randn_like(given[3]))

    def counted(unit: Unit) -> int:
        return kept(unit, operands(channels, small, beta, few, device))

    return Row(
        name,
        moved(channels, size, beta, batch),
        {name: partial(timed, unit) for name, unit in units.items()},
        lambda: check(channels, small, beta, device),
        faster=FASTER,
        kept={name: partial(counted, unit) for name, unit in units.items()},
        less_kept=LESS_KEPT,
    )


def moved(channels: int, size: int, beta: int, batch: int) -> int:
    """Bytes of the operator. Forward: x twice, residual, values, signs and mask. Backward: x, gradient and mask twice,
    the gradients of x and residual once."""
    pixels = batch * size**2
    x, values = (HALF.itemsize * pixels * count for count in (channels // beta, channels * beta))
    bits = 4 * pixels * -(-channels * beta // 32)
    return (2 * x + 2 * values + 2 * bits) + 2 * (x + values + bits) + x + values


def check(channels: int, size: int, beta: int, device: torch.device, batch: int = 2) -> None:
    """Values, signs and all gradients against the plain composition in float64, bf16 rounding apart."""
    given = operands(channels, size, beta, batch, device)
    exact = tuple(t.detach().double().requires_grad_() for t in given)
    values, signs = ours(*given)
    clear = reference.rep_batch_norm(*exact)  # without the clamp, whose edge a rounding may cross
    plain, eps = clear.clamp(-1, 1), torch.finfo(HALF).eps
    assert ((values - plain).abs() <= 2 * eps).all(), "values differ from float64 by more than bf16 rounding"
    bits = unpack_activations(signs, channels * beta) > 0
    assert torch.equal(bits, values >= 0), "signs are not those of the values"
    inside = ((clear.abs() - 1).abs() > 2 * eps * (1 + clear.abs())).to(HALF)
    gradient = torch.randn_like(given[3]) * inside  # nothing where the clamp is in doubt
    mine = torch.autograd.grad(values, given, gradient)
    theirs = torch.autograd.grad(F.hardtanh(clear), exact, gradient.double())
    for name, one, other in zip(("x", "weight", "bias", "residual"), mine, theirs, strict=True):
        error, largest = (one - other).abs().max(), other.abs().max()
        assert error <= 2 * eps * largest, f"gradient of {name} differs from float64 by {error:.2g} of {largest:.2g}"
