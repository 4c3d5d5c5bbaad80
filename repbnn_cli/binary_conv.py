"""Owns the binary convolutions: a common protocol, and one class per way of binarising kernel and input.

Every kind convolves binarize_input(x) with binary_weight() by one F.conv2d (the gated kind by two); what follows, a
learned scale or a gate, works on convolution outputs. Shapes: O output channels, I input channels, (kh, kw) kernel.
Where `signs_convolved_by` says so, something faster convolves signs in the place of F.conv2d.

t and k of the sign estimators are schedule state, not weights: 0-dim CPU tensors held as plain attributes. Buffers
would be lost where a network is built on the meta device and filled with load_state_dict(assign=True), and Python
floats could not be changed under a compiled or captured forward. A schedule writes them in place (`conv.t.fill_(v)`);
0-dim CPU tensors combine with tensors on any device and in any dtype. They start at the end of the schedule, t = 10
and k = 1, which is where a trained network left off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repbnn_cli.binarize import (
    FILTER,
    approx_sign,
    ede_sign,
    gate_step,
    rbnn_sign,
    sample_deviation,
    scaled_sign,
    standardised_sign,
    ste_sign,
    uniform_quantize,
)

Pair = tuple[int, int]
ConvolveSigns = Callable[[Tensor, Tensor, Pair, Pair], Tensor]
"""(signs, kernel, stride, padding) → F.conv2d(signs, kernel, None, stride, padding), with its gradients for both.

signs: (N, I, H, W), ±1, or 0 where an activation is exactly 0. kernel: (O, I, kh, kw), ±1 times one scale per filter
(almost one: see scaled_sign on its last bits; learned ones may be negative), or 0 where a latent weight is exactly 0.
"""


class BinaryConv2d(nn.Module):
    """Protocol and common part of the binary convolutions; no bias, no dilation, one group.

    A kind defines binarize_input and binary_weight, and output_scale where it has one. Its tensors are named by
    kernel_name, out_channel_tensors (one value per output channel) and in_channel_tensors (one per input channel); all
    other tensors are its own business and are re-created by resize. starts_by_fan_in: whether a new latent kernel is
    the smaller, the more inputs a filter has.
    """

    kernel_name: str = "weight"
    out_channel_tensors: ClassVar[tuple[str, ...]] = ()
    in_channel_tensors: ClassVar[tuple[str, ...]] = ()
    weight_bits: ClassVar[int] = 1
    activation_bits: ClassVar[int] = 1
    groups: ClassVar[int] = 1
    conv_signs: ConvolveSigns | None = None
    starts_by_fan_in: ClassVar[bool] = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.weight = nn.Parameter(torch.empty(self.kernel_shape))
        self._start_kernel(self.weight)
        self._add_tensors()

    def _add_tensors(self) -> None:
        """What a kind has beside its kernel: tensors, and the state of a schedule."""

    def _start_kernel(self, kernel: Tensor) -> None:
        nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """(O, I, kh, kw)."""
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def latent_kernel(self) -> Tensor:
        """The real-valued kernel whose sign is used, viewed as (O, I, kh, kw)."""
        kernel: Tensor = getattr(self, self.kernel_name)
        return kernel.reshape(self.kernel_shape)

    def binary_weight(self) -> Tensor:
        """The kernel that the convolution applies, (O, I, kh, kw): ±1 times the scale that belongs to it."""
        raise TypeError(f"{type(self).__name__} does not define binary_weight")

    def binarize_input(self, x: Tensor) -> Tensor:
        """The activations that the convolution sees, same shape as x."""
        raise TypeError(f"{type(self).__name__} does not define binarize_input")

    def output_scale(self) -> Tensor | None:
        """What the convolution's output is multiplied by, (O, 1, 1)."""
        return None

    def scaled(self, kernel: Tensor) -> Tensor:
        """The kernel (O, I, kh, kw) times what the output is multiplied by."""
        scale = self.output_scale()
        return kernel if scale is None else kernel * scale[:, None]

    def resize(self, in_channels: int, out_channels: int) -> None:
        """Take over new channel numbers; the caller replaces the kernel and the per-channel tensors.

        A kind that has further tensors whose size follows from these numbers re-creates them here.
        """
        self.in_channels = in_channels
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        signs, kernel, scale = self.binarize_input(x), self.binary_weight(), self.output_scale()
        if scale is not None and self.conv_signs is None:
            return self.convolve_signs(signs, kernel) * scale
        # Sums of signs are exact there, so the same number comes out, and the scale's gradient is a sum over a kernel
        # instead of one over all outputs.
        return self.convolve_signs(signs, self.scaled(kernel))

    def convolve_signs(self, signs: Tensor, kernel: Tensor) -> Tensor:
        """The convolution of what `ConvolveSigns` takes."""
        if self.conv_signs is not None:
            return self.conv_signs(signs, kernel, self.stride, self.padding)
        return F.conv2d(signs, kernel, None, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )


class IRConv2d(BinaryConv2d):
    """IR-Net: kernel standardised per filter, power-of-two scale, error decay estimator for both signs.

    ŵ = (w − mean)/std per filter; kernel sign(ŵ)·2^round(log2 mean|ŵ|), the scale without gradient; input sign(x).
    Source: IR-Net, Qin et al., arXiv 1909.10788, sections 3.2 (Libra) and 3.3 (EDE).
    """

    def _add_tensors(self) -> None:
        self.t, self.k = _schedule_end()

    def binary_weight(self) -> Tensor:
        standard = standardised(self.latent_kernel())
        magnitude = standard.detach().abs().mean(FILTER, keepdim=True)
        return ede_sign(standard, self.t, self.k) * torch.exp2(torch.log2(magnitude).round())

    def binarize_input(self, x: Tensor) -> Tensor:
        return ede_sign(x, self.t, self.k)


class RBNNConv2d(BinaryConv2d):
    """RBNN: kernel rotated towards its sign, learned angle per filter and learned scale per output channel.

    X = (w − mean)/std per filter, as (O, n1, n2) with n1·n2 = I·kh·kw; rotated = R1ᵀ·X·R2;
    kernel sign(X + |sin θ|·(rotated − X)); input sign of the activations standardised per sample; output times alpha.
    R1 (n1, n1) and R2 (n2, n2) are orthogonal buffers that rotate_ re-estimates at the start of an epoch.
    Source: RBNN, Lin et al., arXiv 2009.13055, section 3.
    """

    out_channel_tensors: ClassVar[tuple[str, ...]] = ("alpha", "rotate")
    R1: Tensor
    R2: Tensor

    def _add_tensors(self) -> None:
        self.alpha = nn.Parameter(torch.empty(self.out_channels, 1, 1))
        self.rotate = nn.Parameter(torch.empty(self.out_channels, 1, 1, 1))
        nn.init.uniform_(self.alpha)
        nn.init.constant_(self.rotate, math.pi / 2)
        n1, n2 = self._rotation_sizes()
        self.register_buffer("R1", _random_rotation(n1))
        self.register_buffer("R2", _random_rotation(n2))
        self.t, self.k = _schedule_end()

    def _rotation_sizes(self) -> tuple[int, int]:
        """n1·n2 = I·kh·kw, n1 the largest divisor that is at most the square root."""
        n = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        n1 = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
        return n1, n // n1

    def resize(self, in_channels: int, out_channels: int) -> None:
        """See BinaryConv2d.resize. R1 and R2 become identities of the new size; call rotate_ once the kernel is in."""
        super().resize(in_channels, out_channels)
        n1, n2 = self._rotation_sizes()
        # Identity, not random: the same transform has to give the same bytes.
        self.R1 = torch.eye(n1, dtype=self.R1.dtype, device=self.R1.device)
        self.R2 = torch.eye(n2, dtype=self.R2.dtype, device=self.R2.device)

    def rotate_(self, alternations: int = 3) -> None:
        """Re-estimate R1 and R2 in place from the current kernel, see `rotate`."""
        rotate([self], alternations)

    def turned_kernel(self) -> Tensor:
        """X + |sin θ|·(rotated − X), (O, I, kh, kw): what the sign is taken of."""
        standard = standardised(self.latent_kernel())
        grid = standard.reshape(self.out_channels, *self._rotation_sizes())
        rotated = (self.R1.t() @ grid @ self.R2).reshape(standard.shape)
        return standard + self.rotate.sin().abs() * (rotated - standard)

    def binary_weight(self) -> Tensor:
        return rbnn_sign(self.turned_kernel(), self.t, self.k)

    def binarize_input(self, x: Tensor) -> Tensor:
        return standardised_sign(x, self.t.clamp_min(1))

    def output_scale(self) -> Tensor:
        return self.alpha


@torch.no_grad()
def rotate(convs: Sequence[RBNNConv2d], alternations: int = 3) -> None:
    """Re-estimates R1 and R2 of RBNN convolutions in place from their current kernels.

    Each alternation takes B = sign(R1ᵀ·X·R2), then the orthogonal R1, then R2, that maximise Σ_o tr(B_oᵀ·R1ᵀ·X_o·R2):
    two orthogonal Procrustes problems, each solved by one SVD; for layers of one shape all of them at once.
    Letters: L layers, O filters, (n, m) a filter's kernel as a matrix, R1 (n, n), R2 (m, m).
    """
    groups: dict[tuple[int, int, int], list[RBNNConv2d]] = {}
    for conv in convs:
        groups.setdefault((conv.out_channels, len(conv.R1), len(conv.R2)), []).append(conv)
    for shape, members in groups.items():
        x = torch.stack([standardised(conv.latent_kernel()).reshape(shape) for conv in members])  # (L, O, n, m)
        r1 = torch.stack([conv.R1 for conv in members])
        r2 = torch.stack([conv.R2 for conv in members])
        for _ in range(alternations):
            signs = (r1.mT.unsqueeze(1) @ x @ r2.unsqueeze(1)).sign()
            r1 = _nearest_rotations((x @ r2.unsqueeze(1) @ signs.mT).sum(1))
            r2 = _nearest_rotations((x.mT @ r1.unsqueeze(1) @ signs).sum(1))
        for conv, first, second in zip(members, r1, r2, strict=True):
            conv.R1.copy_(first)
            conv.R2.copy_(second)


class ReCUConv2d(BinaryConv2d):
    """ReCU: kernel standardised and clamped at a quantile before its sign, learned scale per output channel.

    ŵ = 2√2·(w − mean)/std per filter; kernel sign(clamp(ŵ, ±Q_τ)) with Q_τ = −E|ŵ|·ln(2 − 2τ) over the whole kernel
    and identity gradient through sign; input sign with the piecewise polynomial gradient, in training of x divided by
    its standard deviation per sample (which changes gradients, never signs); output times alpha.
    τ is the buffer tau (0-dim), 0.85 rising to 0.99 over training.
    Source: ReCU, Xu et al., arXiv 2103.12369, section 3.
    """

    out_channel_tensors: ClassVar[tuple[str, ...]] = ("alpha",)
    tau: Tensor

    def _add_tensors(self) -> None:
        self.alpha = nn.Parameter(torch.empty(self.out_channels, 1, 1))
        self.register_buffer("tau", torch.tensor(0.85))
        nn.init.uniform_(self.alpha)

    def binary_weight(self) -> Tensor:
        standard = standardised(self.latent_kernel()) * (2 * math.sqrt(2))
        with torch.no_grad():
            quantile = -standard.abs().mean() * torch.log(2 - 2 * self.tau)
        return ste_sign(standard.clamp(-quantile, quantile), math.inf)

    def binarize_input(self, x: Tensor) -> Tensor:
        return approx_sign(x / sample_deviation(x) if self.training else x)

    def output_scale(self) -> Tensor:
        return self.alpha


class SignConv2d(BinaryConv2d):
    """Bi-Real Net, ReActNet, AdamBNN: kernel sign(w)·mean|w| per filter, input sign with the polynomial gradient.

    The scale has no gradient; the kernel's gradient passes where |w| ≤ 1. With flat=True the kernel is stored as
    `weights`, (O·I·kh·kw, 1), as Bi-Real Net and ReActNet publish it, else as `weight`, (O, I, kh, kw).
    Source: Bi-Real Net, Liu et al., arXiv 1808.00278, section 3.3.
    """

    starts_by_fan_in = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        *,
        flat: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        if flat:
            self.kernel_name = "weights"
            self.weights = nn.Parameter(self.weight.detach().view(-1, 1))
            del self.weight

    def _start_kernel(self, kernel: Tensor) -> None:
        # Close to 0, as the authors start: Adam's steps of about lr can then flip any sign early in training.
        nn.init.uniform_(kernel, -1e-3, 1e-3)

    def binary_weight(self) -> Tensor:
        kernel = self.latent_kernel()
        # One axis after the other, as the authors do: see scaled_sign on why the last bit matters.
        scale = kernel.detach().abs().mean(3, keepdim=True).mean(2, keepdim=True).mean(1, keepdim=True)
        return scaled_sign(kernel, scale)

    def binarize_input(self, x: Tensor) -> Tensor:
        return approx_sign(x)


class FracConv2d(BinaryConv2d):
    """FracBNN's 1-bit convolution: kernel sign(w), input sign(x), gradient 1 on [−1.3, 1.3] for both.

    Source: FracBNN, Zhang et al., arXiv 2012.12206, section 3.
    """

    def binary_weight(self) -> Tensor:
        return ste_sign(self.latent_kernel(), 1.3)

    def binarize_input(self, x: Tensor) -> Tensor:
        return ste_sign(x, 1.3)


class GatedConv2d(FracConv2d):
    """FracBNN's precision gate: a 1-bit convolution, refined to 2-bit activations where its output is large.

    Activations are quantised to {−1, −1/3, 1/3, 1}. coarse = conv(most significant bit · 2/3); where
    sigmoid(5·(coarse − threshold)) > 0.5 the output is the convolution of the 2-bit activations instead.
    threshold is learned, (1, O, 1, 1); the gate's gradient is that of the sigmoid, where the gate is open.
    Source: FracBNN, Zhang et al., arXiv 2012.12206, section 3; precision gating, arXiv 2002.07136.
    """

    out_channel_tensors: ClassVar[tuple[str, ...]] = ("threshold",)
    activation_bits: ClassVar[int] = 2

    def _add_tensors(self) -> None:
        self.threshold = nn.Parameter(torch.empty(1, self.out_channels, 1, 1))
        nn.init.constant_(self.threshold, -1.0)

    def binarize_input(self, x: Tensor) -> Tensor:
        return uniform_quantize(x, 2)

    def forward(self, x: Tensor) -> Tensor:
        full_bits, kernel = self.binarize_input(x), self.binary_weight()
        # Times 2/3 after the convolution: a sum of ±1 is exact, and the gate compares its output with a threshold.
        top_bit = ste_sign(full_bits)
        coarse = self.convolve_signs(top_bit, kernel) * 2 / 3
        full = F.conv2d(full_bits, kernel, None, stride=self.stride, padding=self.padding)
        gate = gate_step(torch.sigmoid(5 * (coarse - self.threshold)) - 0.5)
        return gate * full + (1 - gate) * coarse


@contextmanager
def signs_convolved_by(network: nn.Module, conv_signs: ConvolveSigns | None) -> Iterator[None]:
    """Meanwhile the binary convolutions of `network` call conv_signs; None is F.conv2d."""
    before = [(m, m.conv_signs) for m in network.modules() if isinstance(m, BinaryConv2d)]
    for conv, _ in before:
        conv.conv_signs = conv_signs
    try:
        yield
    finally:
        for conv, earlier in before:
            conv.conv_signs = earlier


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _schedule_end() -> tuple[Tensor, Tensor]:
    """t and k at the end of their schedule; on the CPU even while a network is being built on another device."""
    return torch.tensor(10.0, device="cpu"), torch.tensor(1.0, device="cpu")


def standardised(kernel: Tensor) -> Tensor:
    """(w − mean)/std per filter of a kernel (O, I, kh, kw), std with Bessel's correction; a constant filter gives 0."""
    centred = kernel - kernel.mean(FILTER, keepdim=True)
    return centred / centred.std(FILTER, keepdim=True).clamp_min(1e-12)


def _random_rotation(size: int) -> Tensor:
    """An orthogonal (size, size) matrix; on the meta device, where drawing one takes a second of imports, any."""
    rotation = torch.empty(size, size)
    return rotation if rotation.is_meta else nn.init.orthogonal_(rotation)


def _nearest_rotations(matrices: Tensor) -> Tensor:
    """For each matrix of (L, n, n) the orthogonal R that maximises tr(Rᵀ·matrix): U·Vᵀ of its SVD."""
    u, _, vh = torch.linalg.svd(matrices)
    rotations: Tensor = u @ vh
    return rotations
