"""How a binary network learns: flipped signs, dead latent weights, and where values stopped being finite.

A latent weight is dead where its sign gets no gradient, so that only weight decay can still move it. Per kind:

| kind | dead |
| --- | --- |
| SignConv2d | abs(w) > 1: the straight-through window |
| FracConv2d, GatedConv2d | abs(w) > 1.3: likewise |
| RBNNConv2d | abs(w') ≥ √2/t: the estimator's triangle has ended; w' is the rotated kernel |
| ReCUConv2d | abs(ŵ) > Q_τ: clamped; ŵ is the standardised kernel |
| IRConv2d | 1 − tanh²(t·ŵ) < 0.01: the estimator never quite reaches 0, so less than a hundredth of its peak |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from repbnn_cli.binary_conv import (
    BinaryConv2d,
    FracConv2d,
    IRConv2d,
    RBNNConv2d,
    ReCUConv2d,
    SignConv2d,
    signs_convolved_by,
    standardised,
)


def binary_convs(network: nn.Module) -> dict[str, BinaryConv2d]:
    """Dotted path → binary convolution, RepBconv2d included."""
    return {path: m for path, m in network.named_modules() if isinstance(m, BinaryConv2d)}


@torch.no_grad()
def signs(convs: Mapping[str, BinaryConv2d]) -> dict[str, Tensor]:
    """The signs that each convolution applies, as bool tensors (O, I, kh, kw): whether positive."""
    return {path: conv.binary_weight() > 0 for path, conv in convs.items()}


@torch.no_grad()
def flips(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of each layer's signs that changed; one transfer from the device for all layers."""
    if not after:
        return {}
    shares = torch.stack([(after[path] != before[path]).float().mean() for path in after])
    return dict(zip(after, shares.tolist(), strict=True))


@torch.no_grad()
def dead(convs: Mapping[str, BinaryConv2d]) -> dict[str, float]:
    """Share of each layer's latent weights that are dead, by the table above; other kinds are left out."""
    shares = {path: share for path, conv in convs.items() if (share := _dead_share(conv)) is not None}
    return dict(zip(shares, torch.stack([*shares.values()]).tolist(), strict=True)) if shares else {}


def _dead_share(conv: BinaryConv2d) -> Tensor | None:
    kernel = conv.latent_kernel()
    if isinstance(conv, SignConv2d):
        return (kernel.abs() > 1).float().mean()
    if isinstance(conv, FracConv2d):
        return (kernel.abs() > 1.3).float().mean()
    standard = standardised(kernel)
    if isinstance(conv, ReCUConv2d):
        scaled = standard.abs() * (2 * math.sqrt(2))
        return (scaled > -scaled.mean() * torch.log(2 - 2 * conv.tau)).float().mean()
    if isinstance(conv, RBNNConv2d):
        return (conv.turned_kernel().abs() * conv.t >= math.sqrt(2)).float().mean()
    if isinstance(conv, IRConv2d):
        return (1 - torch.tanh(conv.t * standard) ** 2 < 0.01).float().mean()
    return None


@contextmanager
def float_kernels(network: nn.Module, *, active: bool = True) -> Iterator[None]:
    """Meanwhile every binary convolution applies its latent kernel as it is; activations stay binary."""
    if not active:
        yield
        return
    convs = list(binary_convs(network).values())
    for conv in convs:
        # On the instance, where it goes before the class's method and is no part of the state dict.
        conv.__dict__["binary_weight"] = conv.latent_kernel
    try:
        with signs_convolved_by(network, None):  # a latent kernel has no signs to convolve
            yield
    finally:
        for conv in convs:
            del conv.__dict__["binary_weight"]


def finite(network: nn.Module) -> bool:
    """Whether all floating-point parameters and buffers are finite; one transfer from the device."""
    # NaN and infinity survive a sum, and a product with 0 turns both into NaN.
    sums = [t.detach().float().mul(0).sum() for t in network.state_dict().values() if t.is_floating_point()]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def first_not_finite(network: nn.Module, images: Tensor) -> str | None:
    """The first layer, in the order of the forward, with NaN or infinity in its own tensors or its output.

    Runs the network once; None when everything is finite.
    """
    found: list[str] = []

    def look(path: str, module: nn.Module, output: object) -> None:
        if found:
            return
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                found.append(f"{path}.{name}" if path else name)
                return
        if isinstance(output, Tensor) and output.is_floating_point() and not torch.isfinite(output).all():
            found.append(f"the output of {path or 'the network'} ({type(module).__name__})")

    with ExitStack() as stack, torch.no_grad():
        for path, module in network.named_modules():
            hook = module.register_forward_hook(lambda m, _inputs, output, path=path: look(path, m, output))
            stack.callback(hook.remove)
        network(images)
    return found[0] if found else None
