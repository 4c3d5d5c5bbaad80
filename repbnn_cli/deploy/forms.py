"""What a binary convolution computes in evaluation, found by running it: sign(x), ±1 kernel, scale and bias per filter.

    module(x)[:, r·O + o] = scale[o] · conv(sign(x), kernel)[o] + bias[o]      r = 0 … repeats − 1

The same for our kinds and for anybody's, because nothing here looks at a class: the module is run on a random input,
the convolution that it runs is watched (`ConvCalls`), and its output is compared with this formula. What does not fit
it (2-bit inputs, gates, groups, kernels with exact zeros) gets a reason instead.

Shape letters: N samples; I, O input and output channels; kh, kw kernel; H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repbnn_cli.graph.probe import ConvCall, ConvCalls, applying, spread_of_scaled
from repbnn_cli.restoring import unchanged

Pair = tuple[int, int]
_TOLERANCE = 1e-5  # of the largest value; float32 rounding over one layer stays a decade below
_SIGN = 1e-5  # what an estimator written as `s.detach() - x.detach() + x` leaves of the sign s


@dataclass(frozen=True)
class BinaryForm:
    """kernel: (O, I, kh, kw) of ±1; scale, bias: (O,) float64; repeats: how often the output's channels are repeated.

    centred: whether x minus its mean per sample is what is binarised (RBNN), not x. A filter of zeros has scale 0.
    """

    kernel: Tensor
    scale: Tensor
    bias: Tensor
    repeats: int
    stride: Pair
    padding: Pair
    centred: bool


def binary_form(module: nn.Module, in_channels: int) -> BinaryForm | str:
    """The form of a convolution in eval mode, or in half a sentence why it has none."""
    with unchanged(module), torch.no_grad():
        calls = _Watched(module, in_channels)
        reason = calls.obstacle()
        if reason is not None:
            return reason
        signs = kernel_signs(calls.call.kernel)
        if isinstance(signs, str):
            return signs
        return calls.form(*signs)


def kernel_signs(kernel: Tensor) -> tuple[Tensor, Tensor] | str:
    """(±1 like the kernel, magnitude per filter (O,) float64) of a kernel as applied; a reason where it has none.

    Zeros have no bit: a filter of zeros has magnitude 0, so its bits do not matter; single zeros are refused.
    """
    filters = kernel.detach().reshape(len(kernel), -1)
    largest = filters.abs().amax(1, keepdim=True)
    if zeros := int(((filters == 0) & (largest > 0)).sum()):
        return f"{zeros} of its {filters.numel()} weights have sign 0, which no bit can hold"
    if bool(((filters.abs() - largest).abs() > spread_of_scaled(kernel.dtype) * largest).any()):
        return "its kernel does not have one magnitude per filter"
    # The mean: magnitudes within a filter may differ in the last bit (see binarize.scaled_sign).
    return torch.where(kernel >= 0, 1.0, -1.0), filters.double().abs().mean(1)


def kernel_zeros(kernel: Tensor) -> int:
    """Weights with sign 0 in filters that are not all zeros: what `kernel_signs` refuses."""
    filters = kernel.detach().reshape(len(kernel), -1)
    return int(((filters == 0) & filters.any(1, keepdim=True)).sum())


class _Watched:
    """A module run once on a random input, with the convolution that it ran."""

    def __init__(self, module: nn.Module, in_channels: int) -> None:
        like = next(iter(module.parameters()), torch.zeros(()))
        self.module, self.x = module, of_all_sizes((2, in_channels, 8, 8)).to(like.device)
        self.calls, self.output, self.failure = self._run()

    def _run(self, kernel: Tensor | None = None) -> tuple[list[ConvCall], Tensor, str | None]:
        with ConvCalls() if kernel is None else applying(kernel) as seen:
            try:
                output = self.module(self.x)
            except Exception as error:  # a forward with more arguments, or made for one image size
                return [], self.x, f"it does not run by itself ({type(error).__name__})"
        return seen.calls, output, None

    @property
    def call(self) -> ConvCall:
        return self.calls[0]

    def obstacle(self) -> str | None:
        """What keeps it from being a plain convolution of signs."""
        if self.failure:
            return self.failure
        if len(self.calls) != 1:
            return f"it runs {len(self.calls)} convolutions (a gate, or a mixture)"
        call = self.call
        if call.kind != "conv2d" or call.groups != 1:
            return f"it is a {call.kind}" + (f" in {call.groups} groups" if call.groups > 1 else "")
        if _pair(call.arguments.get("dilation", 1)) != (1, 1) or isinstance(call.arguments.get("padding", 0), str):
            return "it has dilation, or padding given by name"
        if call.input.shape != self.x.shape:
            return "it changes the size of its input first"
        if not isinstance(self.output, Tensor) or self.output.ndim != 4:
            return "it gives more than one tensor"
        if self._centred() is None:
            return "its input is not the sign of the activations (2-bit, or shifted inside)"
        return None

    def _centred(self) -> bool | None:
        """Whether sign(x − mean of the sample) is convolved; False for sign(x), None for anything else."""
        for centred, x in ((False, self.x), (True, centre(self.x))):
            if torch.allclose(self.call.input, x.sign(), rtol=0, atol=_SIGN):
                return centred
        return None

    def form(self, kernel: Tensor, magnitude: Tensor) -> BinaryForm | str:
        """The affine map from convolution to output, read off kernels for which the convolution gives 0 and ±1."""
        filters = len(kernel)
        if self.output.shape[1] % filters or self.output.shape[2:] != self.call.output.shape[2:]:
            return "its output has other channels or pixels than its convolution"
        inner = _inner_pixel(self.call)
        if inner is None:
            return "the centre of its kernel is over no pixel of an 8x8 image but padding"
        row, column = inner
        repeats = self.output.shape[1] // filters
        blank = torch.zeros_like(self.call.kernel)
        nothing, output, _ = self._run(blank)
        bias = output[0, :filters, row, column].double()
        blank[:, 0, kernel.shape[2] // 2, kernel.shape[3] // 2] = 1.0
        calls, output, _ = self._run(blank)
        at = (calls[0].output - nothing[0].output)[0, 0, row, column]  # ±1
        after = (output[0, :filters, row, column].double() - bias) / at.double()
        options = self.call.arguments
        form = BinaryForm(
            kernel,
            magnitude * after,
            bias,
            repeats,
            _pair(options.get("stride", 1)),
            _pair(options.get("padding", 0)),
            bool(self._centred()),
        )
        signs = torch.nn.functional.conv2d(self.call.input, kernel, None, form.stride, form.padding).double()
        expected = (signs * form.scale.view(-1, 1, 1) + bias.view(-1, 1, 1)).repeat(1, repeats, 1, 1)
        if not bool((expected - self.output).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-30)):
            return "more than a scale and a bias per filter follow its convolution inside"
        return form


def _inner_pixel(call: ConvCall) -> Pair | None:
    """An output pixel at which the centre of the kernel lies over the image, the first one; None if there is none."""
    found = []
    strides, paddings = _pair(call.arguments.get("stride", 1)), _pair(call.arguments.get("padding", 0))
    for size, outputs, kernel, stride, padding in zip(
        call.input.shape[2:], call.output.shape[2:], call.kernel.shape[2:], strides, paddings, strict=True
    ):
        at = (i for i in range(outputs) if 0 <= i * stride - padding + kernel // 2 < size)
        found.append(next(at, None))
    row, column = found
    return None if row is None or column is None else (row, column)


def of_all_sizes(shape: tuple[int, ...]) -> Tensor:
    """Random numbers of both signs and of eleven decades, float32: a threshold or a bound shows at some size.

    No exact zeros: what the sign of 0 is, is no question here.
    """
    generator = torch.Generator().manual_seed(0)
    signed = torch.randn(shape, generator=generator)
    return signed * 10 ** (torch.rand(shape, generator=generator) * 10 - 6)


def centre(x: Tensor) -> Tensor:
    """x (N, C, H, W) minus its mean per sample."""
    return x - x.mean((1, 2, 3), keepdim=True)


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
