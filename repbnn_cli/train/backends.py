"""Which kernels a network trains on: hands those of a backend to the layers that can take them.

| backend | runs |
| --- | --- |
| torch | everything as the layers say |
| int8 | on a CPU: the forward of every binary convolution of repbnn's own kinds in 8-bit integers, exactly |
| | forward and backward of the BatchNorms that stand over a repeat of few channels by matrix products |
| triton | the same convolutions on packed bits, and forward and backward of all BatchNorms that stand over a repeat |

The gradients of these convolutions are real-valued and stay with the vendor library; so do the user's own binary
convolutions, the plain BatchNorms and the 2-bit part of a gated convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli import kernels
from repbnn_cli.binary_conv import BinaryConv2d, Pair, signs_convolved_by
from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import Backend, int8_conv2d, matmul_batch_norm
from repbnn_cli.rep_layers import ByBatch, RepBatchNorm2d
from repbnn_cli.train.ranks import Ranks
from repbnn_cli.wording import counted

NAMES = (*kernels.BACKENDS, "int8")
GRADIENTS = {"exact": torch.float32, "bf16": torch.bfloat16}


def choose(device: torch.device, requested: str = "auto", gradients: str = "exact") -> Backend:
    """As kernels.choose, with int8: what `auto` means on a CPU where PyTorch has it. gradients: a key of GRADIENTS.

    Raises UsageError for what cannot run.
    """
    if gradients not in GRADIENTS:
        raise UsageError(f"--gradients: unknown value '{gradients}'; expected one of {', '.join(GRADIENTS)}")
    chosen = _choose(device, requested)
    if gradients != "exact" and chosen.name != "int8":
        raise UsageError(
            f"--gradients {gradients}: is part of backend int8, and this run has backend {chosen.name}; leave it out"
        )
    return chosen


def _choose(device: torch.device, requested: str) -> Backend:
    if requested not in NAMES:
        raise UsageError(f"--backend: unknown value '{requested}'; expected one of {', '.join(NAMES)}")
    if requested not in ("auto", "int8"):
        return kernels.choose(device, requested)
    if device.type == "cpu" and int8_conv2d.available():
        return Backend("int8", "asked for" if requested == "int8" else "exact, and the fastest on a CPU")
    if requested == "auto":
        return kernels.choose(device)
    missing = "this PyTorch lacks it on this computer" if device.type == "cpu" else f"device '{device.type}' is no CPU"
    raise UsageError(f"--backend int8: {missing}; --backend torch runs everywhere")


@contextmanager
def running_on(network: nn.Module, backend: str, ranks: Ranks, gradients: str = "exact") -> Iterator[None]:
    """Meanwhile the layers of `network` that can run on the kernels of `backend` do."""
    if backend == "torch":
        yield
        return
    norms = repeating_norms(network, backend, ranks)
    convolve: Callable[..., Tensor]
    by_batch: ByBatch
    if backend == "int8":
        convolve = partial(int8_conv2d.sign_conv2d, gradients=GRADIENTS[gradients])
        by_batch = matmul_batch_norm.rep_batch_norm
    else:
        from repbnn_cli.kernels.binary_conv2d import sign_conv2d  # imports Triton

        convolve, by_batch = sign_conv2d, _by_triton
    for norm in norms:
        norm.by_batch = by_batch
    try:
        with signs_convolved_by(network, convolve):
            yield
    finally:
        for norm in norms:
            norm.by_batch = None


@contextmanager
def evaluating_in_8_bits(network: nn.Module) -> Iterator[None]:
    """For inference on a CPU: meanwhile the binary convolutions apply kernels that are binarised and laid out once."""
    with ExitStack() as stack:
        for conv in [m for m in network.modules() if isinstance(m, BinaryConv2d)]:
            kernel = conv.binary_weight().detach()
            stack.callback(conv.__dict__.pop, "binary_weight")
            conv.__dict__["binary_weight"] = partial(_same, kernel)
            convolve = stack.enter_context(int8_conv2d.held(conv.scaled(kernel), conv.stride, conv.padding))
            stack.enter_context(signs_convolved_by(conv, convolve))
        yield


def _same(kernel: Tensor) -> Tensor:
    return kernel


def repeating_norms(network: nn.Module, backend: str, ranks: Ranks) -> list[RepBatchNorm2d]:
    """The BatchNorms over a repeat that "int8" or "triton" computes.

    Of several processes none: they share their statistics. By matrix products those of few channels, in full precision.
    """
    norms = [m for m in network.modules() if isinstance(m, RepBatchNorm2d) and m.weight is not None]
    if ranks.size > 1:
        return []
    if backend == "triton":
        return norms
    return [
        norm
        for norm in norms
        if norm.repeats > 1
        and matmul_batch_norm.pays(norm.num_features // norm.repeats)
        and norm.weight.dtype in (torch.float32, torch.float64)
    ]


def lines(network: nn.Module, backend: Backend, ranks: Ranks) -> list[str]:
    """What the user is told: which backend trains and why, and what of the network."""
    if backend.name == "torch":
        return [f"backend {backend}"]
    convs, norms = _binary_convs(network), len(repeating_norms(network, backend.name, ranks))
    parts = [f"forward of {counted(convs, 'binary convolution')}"] if convs else []
    if norms:
        parts.append(f"{counted(norms, 'BatchNorm')} over a repeat" + " by matrix products" * (backend.name == "int8"))
    return [f"backend {backend}: {', '.join(parts)}" if parts else "backend torch"]


def check(network: nn.Module, requested: str, gradients: str = "exact") -> None:
    """A UsageError where kernels are asked for that nothing in the network runs on."""
    asked = f"--backend {requested}" if requested in ("int8", "triton") else ""
    asked = asked or (f"--gradients {gradients}" if gradients != "exact" else "")
    if asked and not _binary_convs(network):
        raise UsageError(
            f"{asked}: the network has no binary convolution of repbnn's own kinds (those of the "
            "networks in `repbnn zoo`), which alone run on these kernels; use --backend torch, with its exact gradients"
        )


def _binary_convs(network: nn.Module) -> int:
    return sum(isinstance(m, BinaryConv2d) for m in network.modules())


def notes(network: nn.Module, images: Tensor, backend: str) -> list[str]:
    """What exact zeros, seen on a few images, mean for training on packed bits; nothing where there are none."""
    if backend != "triton":  # the others know a 0
        return []
    found: list[Tensor] = []

    def count(signs: Tensor, kernel: Tensor, stride: Pair, padding: Pair) -> Tensor:
        found.append(torch.stack([(signs == 0).sum(), (kernel == 0).sum()]))
        return F.conv2d(signs, kernel, None, stride, padding)

    with torch.no_grad(), signs_convolved_by(network, count):
        network(images)
    activations, weights = torch.stack(found).sum(0).tolist()
    if not activations and not weights:
        return []
    return [f"in the last network {activations:,} activations of {len(images)} images and {weights:,} weights are "
            "exactly 0: +1 in packed bits, 0 in torch.sign"]  # fmt: skip


def _by_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from repbnn_cli.kernels.rep_batch_norm import rep_batch_norm

    made = rep_batch_norm(x, weight, bias, eps=eps)
    return made.values, made.mean, made.var
