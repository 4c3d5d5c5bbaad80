"""Modules whose kernel is given as it is applied, ±1 times a scale per filter, instead of computed from a latent one.

The class changes, not the structure: a module keeps its binarisation of the input, its learned scales, its gate and its
repeat, and everything that asks what it is gets the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.binary_conv import BinaryConv2d
from repbnn_cli.deploy.zeros import inputs_like
from repbnn_cli.errors import UsageError
from repbnn_cli.graph import Network
from repbnn_cli.graph.probe import applying
from repbnn_cli.graph.static import evaluate, roots, static_nodes
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.rep_layers import mixed
from repbnn_cli.restoring import unchanged
from repbnn_cli.verify.lockstep import tensors_of


class GivenKernel:
    """Mixed into one of our binary convolutions: `binary_weight` is the given kernel."""

    given_kernel: Tensor

    def binary_weight(self) -> Tensor:
        return self.given_kernel


class SubstitutedKernel:
    """Mixed into anybody's module: every convolution in its forward applies the given kernel."""

    given_kernel: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with applying(self.given_kernel):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@torch.no_grad()
def scale_behind(network: Network, path: str, kernel: str, signs: Tensor, magnitude: Tensor) -> Tensor | None:
    """What a module multiplies its convolution of `signs` by, (O,): its latent kernel's mean |w| per filter, XNOR-Net's
    α written behind the convolution. None where it does nothing of the kind, as a trial shows.

    Raises UsageError where it takes something else from its latent kernel beside the convolution.
    """
    module: nn.Module = fetch(network.module, path)
    latent: Tensor = fetch(module, kernel)
    if latent.numel() != signs.numel():
        return None
    kept = latent.detach().clone()
    generator = torch.Generator(device=latent.device).manual_seed(0)
    given = inputs_like(network, path, lambda x: x.normal_(generator=generator))

    def output(held: Tensor) -> list[Tensor]:
        """With `held` for the latent kernel, whatever its convolution makes of it: that takes the signs."""
        latent.copy_(held)
        try:
            with unchanged(module), applying(signs):
                return tensors_of(module(*given))
        finally:
            latent.copy_(kept)

    return _scale(output, kept, signs, magnitude, f"{path}.{kernel}")


@torch.no_grad()
def scale_beside(network: Network, latent: str, calls: Set[str], signs: Tensor, magnitude: Tensor) -> Tensor | None:
    """The same for a kernel that a forward makes of the tensor `latent` and hands to the convolutions `calls`.

    magnitude: of each filter as applied, (O,). None where ±1 times that can stand for the latent kernel.
    """
    module, own = network.module, fetch(network.module, latent).detach()
    static = static_nodes(network.graph)

    def given(node: fx.Node, user: fx.Node) -> bool:
        return user.op == "call_module" and user.target in calls and user.args[1] is node

    used = [n for n in static if any(user not in static and not given(n, user) for user in n.users)]
    used = [n for n in used if any(str(root.target) == latent for root in roots(n))]
    return _scale(lambda held: [evaluate(module, n, {latent: held}) for n in used], own, signs, magnitude, latent)


def _scale(
    computed: Callable[[Tensor], list[Tensor]], own: Tensor, signs: Tensor, magnitude: Tensor, what: str
) -> Tensor | None:
    """The mean |w| of each filter where ±1 times it can stand for the latent kernel `own`, None where ±1 times
    `magnitude` can. computed: what comes, beside the convolution, of a tensor in the latent kernel's place."""
    expected = computed(own)
    mean = own.abs().reshape(len(signs), -1).mean(1) if len(own) in (len(signs), own.numel()) else magnitude
    for scale in (magnitude.to(own), mean):
        if _alike(expected, computed(as_stored(signs.to(own) * scale.view(-1, *[1] * (signs.ndim - 1)), own.shape))):
            return mean if scale is mean else None
    raise UsageError(
        f"{what}: the forward takes more from it than its signs and the mean |w| of each filter; it has no packed "
        "form, keep a scale in a tensor of its own"
    )


def as_stored(kernel: Tensor, shape: torch.Size) -> Tensor:
    """(O, I, ...) in the layout of a latent tensor: flat, or (I, O)."""
    turned = kernel.ndim == 2 and kernel.shape != shape and kernel.T.shape == shape
    return kernel.T.contiguous() if turned else kernel.reshape(shape)


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(some, others, strict=True)
    )


def give_kernel(module: nn.Module, kernel: Tensor) -> None:
    """Makes a module apply `kernel`, (O, I/groups, ...), from now on; its latent kernel is no longer read."""
    cls: type = type(module)
    mixin: type = GivenKernel if isinstance(module, BinaryConv2d) else SubstitutedKernel
    module.register_buffer("given_kernel", kernel, persistent=False)
    module.__class__ = mixed("Packed", mixin, cls)
