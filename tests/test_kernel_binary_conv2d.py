"""binary_conv2d in Triton against the reference, forward and gradient separately, and as a citizen of torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emitted_code import compiled
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import packing, reference

pytest.importorskip("triton")

from repbnn_cli.kernels import sign_packing
from repbnn_cli.kernels.binary_conv2d import (
    FVCORE_HANDLES,
    _binary_conv2d,
    _sign_conv2d,
    binary_conv2d,
    sign_conv2d,
    tile,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS = [1, 16, 31, 33, 96]
MEMORY = [torch.contiguous_format, torch.channels_last]


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, a tenth of them exactly 0 and some exactly ±1, the edges of the straight-through window."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    dice = torch.rand(*shape, generator=generator)
    return torch.where(dice < 0.1, 0.0, torch.where(dice < 0.2, values.sign(), values)).to(DEVICE, dtype)


def clipped_sign(x: Tensor, window: float) -> Tensor:
    """±1 with gradient 1[|x| ≤ window], made of torch's own operations."""
    passing = x if window == math.inf else x.clamp(-window, window)
    return (reference.binarize(x) - passing).detach() + passing


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("channels", CHANNELS)
def test_packing_equals_its_reference(channels: int, memory: torch.memory_format) -> None:
    x = some(2, channels, 5, 7).contiguous(memory_format=memory)
    signs, mask = sign_packing.pack_signs(x, 1.0, True)
    assert torch.equal(signs, packing.pack_activations(x))
    assert torch.equal(mask, packing.pack_activations(torch.where(x.abs() <= 1, 1.0, -1.0)))
    assert torch.equal(sign_packing.unpack_signs(signs, channels, torch.bfloat16), reference.binarize(x).bfloat16())
    assert torch.equal(sign_packing.apply_mask(x, mask), torch.where(x.abs() <= 1, x, 0))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1)), ((1, 1), (1, 1), (0, 0)), ((1, 1), (2, 2), (0, 0))],
)
@pytest.mark.parametrize("channels", CHANNELS)
def test_forward_equals_the_reference_bit_for_bit(
    channels: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    memory = MEMORY[channels % 2]
    x, weight = some(1, channels, 5, 7).contiguous(memory_format=memory), some(channels + 2, channels, *kernel, seed=1)
    out = binary_conv2d(x, weight, stride, padding)
    assert torch.equal(out, reference.binary_conv2d(x, weight, stride, padding))
    assert out.is_contiguous(memory_format=memory)


def test_more_pixels_and_filters_than_one_program_takes() -> None:
    x, weight = some(3, 40, 6, 5), some(130, 40, 3, 3, seed=1)
    assert torch.equal(binary_conv2d(x, weight, (1, 1), (1, 1)), reference.binary_conv2d(x, weight, (1, 1), (1, 1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_uneven_kernels_and_views(dtype: torch.dtype) -> None:
    x, weight = some(2, 35, 8, 7, dtype=dtype)[:, 1:-1, :, ::2], some(3, 33, 2, 3, seed=1)
    out = binary_conv2d(x, weight, (2, 1), (0, 2))
    assert out.dtype == dtype
    assert torch.equal(out, reference.binary_conv2d(x, weight, (2, 1), (0, 2)))


@pytest.mark.parametrize(("x_window", "weight_window"), [(1.0, 1.0), (1.3, math.inf), (math.inf, 1.0)])
@pytest.mark.parametrize("channels", CHANNELS)
def test_gradient_equals_the_plain_composition(x_window: float, weight_window: float, channels: int) -> None:
    x = some(2, channels, 5, 7).contiguous(memory_format=MEMORY[channels % 2])
    weight = some(4, channels, 3, 3, seed=1)
    gradient = some(2, 4, 3, 4, seed=2).round()  # integers: every order of summation gives the same
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    binary_conv2d(ours[0], ours[1], (2, 2), (1, 1), x_window=x_window, weight_window=weight_window).backward(gradient)
    plain = [x.double().requires_grad_(), weight.double().requires_grad_()]
    signs = clipped_sign(plain[0], x_window), clipped_sign(plain[1], weight_window)
    F.conv2d(*signs, stride=(2, 2), padding=(1, 1)).backward(gradient.double())
    for mine, other in zip(ours, plain, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad.float())


def signs_and_kernel(channels: int, filters: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """±1 without zeros, and a kernel of another magnitude, a power of two, in each filter."""
    signs = reference.binarize(some(2, channels, 5, 7, dtype=dtype))
    scale = 2.0 ** (torch.arange(filters, device=DEVICE) % 5 - 2).to(dtype)
    return signs, reference.binarize(some(filters, channels, size, size, seed=1, dtype=dtype)) * scale.view(-1, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("size", "stride", "padding"), [(3, (2, 2), (1, 1)), (1, (1, 1), (0, 0)), (3, (1, 2), (0, 1))])
@pytest.mark.parametrize("channels", CHANNELS)
def test_scaled_signs_equal_the_plain_convolution_bit_for_bit(
    channels: int, size: int, stride: tuple[int, int], padding: tuple[int, int], dtype: torch.dtype
) -> None:
    signs, kernel = signs_and_kernel(channels, channels + 2, size, dtype)
    memory = MEMORY[channels % 2]
    out = sign_conv2d(signs.contiguous(memory_format=memory), kernel, stride, padding)
    assert torch.equal(out, F.conv2d(signs.double(), kernel.double(), None, stride, padding).to(dtype))
    assert out.is_contiguous(memory_format=memory)


def test_a_scale_that_is_no_power_of_two_is_applied_once_to_the_exact_sum() -> None:
    signs, kernel = signs_and_kernel(33, 5, 3, torch.float32)
    scale = torch.rand(5, 1, 1, 1, generator=torch.Generator().manual_seed(2)).to(DEVICE) + 0.1
    sums = reference.binary_conv2d(signs, kernel, (1, 1), (1, 1))
    assert torch.equal(sign_conv2d(signs, kernel.sign() * scale, (1, 1), (1, 1)), sums * scale.view(1, 5, 1, 1))
    assert sign_conv2d(signs, kernel * float("nan"), (1, 1), (1, 1)).isnan().all()


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_gradient_of_scaled_signs_is_that_of_the_plain_convolution(stride: tuple[int, int], channels: int) -> None:
    given = signs_and_kernel(channels, 4, 3, torch.float64)
    given = given[0].contiguous(memory_format=MEMORY[channels % 2]), given[1]
    ours, plain = [[t.clone().requires_grad_() for t in given] for _ in range(2)]
    out, other = sign_conv2d(*ours, stride, (1, 1)), F.conv2d(*plain, None, stride, (1, 1))
    gradient = some(*other.shape, seed=2, dtype=torch.float64).round()  # integers: every order of summation agrees
    out.backward(gradient)
    other.backward(gradient)
    assert torch.equal(ours[0].grad, plain[0].grad)
    assert torch.equal(ours[1].grad, plain[1].grad)


def test_of_scaled_signs_one_bit_each_is_kept() -> None:
    signs, kernel = (t.requires_grad_() for t in signs_and_kernel(64, 64, 3, torch.float32))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sign_conv2d(signs, kernel, (1, 1), (1, 1))
    held = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() != kernel.data_ptr())
    assert held == signs.numel() // 8


def test_given_sign_bits_are_used_instead_of_x() -> None:
    x, weight = some(1, 33, 5, 7).requires_grad_(), some(4, 33, 1, 1, seed=1)
    flipped = packing.pack_activations(-x.detach() - 1e-3)
    out = binary_conv2d(x, weight, x_window=math.inf, x_signs=flipped)
    assert torch.equal(out, reference.binary_conv2d(-x.detach() - 1e-3, weight))
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, reference.binarize(weight).sum(0).view(1, 33, 1, 1).expand_as(x))


def test_saved_for_backward_are_bits() -> None:
    x, weight = some(2, 64, 6, 6).requires_grad_(), some(64, 64, 3, 3, seed=1).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        binary_conv2d(x, weight, (1, 1), (1, 1))
    held = sum(t.numel() * t.element_size() for t in saved)
    assert held == 2 * (x.numel() + weight.numel()) // 8  # signs and masks, of 32 bits each in float32


def test_is_a_well_behaved_operator() -> None:
    x, weight = some(2, 3, 5, 7).requires_grad_(), some(4, 3, 3, 3, seed=1).requires_grad_()
    torch.library.opcheck(_binary_conv2d, (x, weight, [1, 1], [1, 1], 1.0, math.inf, None))
    signs, mask = sign_packing.pack_signs(x.detach(), 1.0, True)
    torch.library.opcheck(_sign_conv2d, (x, weight, [2, 1], [1, 0]))
    torch.library.opcheck(sign_packing.pack_signs, (x.detach(), math.inf, True))
    torch.library.opcheck(sign_packing.unpack_signs, (signs, 3, torch.float32))
    torch.library.opcheck(sign_packing.apply_mask, (x.detach(), mask))


def with_windows(x: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(binary_conv2d(x * 2, weight, (1, 1), (1, 1)))


def with_own_estimators(x: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(sign_conv2d(clipped_sign(x, 1.3), clipped_sign(weight, math.inf) * 0.5, (1, 1), (1, 1)))


@pytest.mark.parametrize("unit", [with_windows, with_own_estimators])
def test_compiled_equals_eager_without_graph_breaks(unit: Callable[[Tensor, Tensor], Tensor]) -> None:
    results = []
    for function in (unit, torch.compile(unit, fullgraph=True, backend="aot_eager")):
        x, weight = some(2, 16, 5, 7).requires_grad_(), some(4, 16, 3, 3, seed=1).requires_grad_()
        out = function(x, weight)
        out.sum().backward()
        results.append((out, x.grad, weight.grad))
    for eager, fast in zip(*results, strict=True):
        assert eager is not None
        assert torch.equal(eager, fast)


class OneConvolution(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(some(8, 16, 3, 3, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, (1, 1), (1, 1))


@pytest.mark.parametrize("function", [binary_conv2d, sign_conv2d])
def test_counters_count_the_multiply_accumulates(function: Callable[..., Tensor]) -> None:
    module, x = OneConvolution(function).to(DEVICE), some(2, 16, 5, 7)
    macs = 2 * 5 * 7 * 8 * 16 * 3 * 3
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(x)
    assert counter.get_total_flops() == 2 * macs
    analysis = FlopCountAnalysis(module, x).set_op_handle(**FVCORE_HANDLES)
    assert analysis.total() == macs
    assert not analysis.unsupported_ops()


def test_emitted_code_uses_tensor_cores_and_spills_nothing() -> None:
    sizes = "pixels channels filters height width out_image out_width out_n out_c out_p"
    signature = {"words_ptr": "*i32", "kernel_ptr": "*i32", "scale_ptr": "*fp32", "out_ptr": "*bf16"} | dict.fromkeys(
        sizes.split(), "i32"
    )
    shape = {"WORDS": 2, "KH": 3, "KW": 3, "SY": 1, "SX": 1, "PY": 1, "PX": 1}
    convolutions = []
    for filters, scaled in ((16, True), (64, True), (128, True), (128, False)):
        block = tile(filters)
        warps = block.pop("num_warps")
        constants = shape | block | {"SCALED": scaled}
        made = {"kernel": "binary_conv2d:_convolve", "signature": signature, "warps": warps, "constants": constants}
        convolutions.append(made)
    strides = "pixels channels image stride_n stride_c stride_p"
    packing = {
        "kernel": "sign_packing:_pack",
        "signature": {"x_ptr": "*bf16", "signs_ptr": "*i32", "mask_ptr": "*i32", "window": "fp32"}
        | dict.fromkeys(strides.split(), "i32"),
        "constants": {"SIGNS": True, "MASK": True, "BLOCK": sign_packing.BLOCK},
    }
    *made, packed = compiled([*convolutions, packing])
    assert packed["spills"] == 0
    for result in made:
        assert result["spills"] == 0
        assert "k32.s32.s8.s8" in result["ptx"]
        assert result["registers"] <= 170


@pytest.mark.parametrize(
    ("x", "weight", "signs", "message"),
    [
        ((2, 32, 5, 5), (4, 64, 3, 3), None, r"found \(2, 32, 5, 5\) and a kernel of \(4, 64, 3, 3\)"),
        ((1, 32, 2, 2), (4, 32, 3, 3), None, r"found a kernel of \(3, 3\) for images of \(2, 2\)"),
        ((2, 64, 5, 5), (4, 64, 3, 3), (2, 3, 3, 2), r"x_signs of shape \(2, 3, 3, 2\); expected \(2, 5, 5, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_memory_is_read(
    x: tuple[int, ...], weight: tuple[int, ...], signs: tuple[int, ...] | None, message: str
) -> None:
    given = None if signs is None else torch.zeros(signs, dtype=torch.int32, device=DEVICE)
    with pytest.raises(UsageError, match=message):
        binary_conv2d(some(*x), some(*weight), x_signs=given)
    if signs is None:
        with pytest.raises(UsageError, match=message):
            sign_conv2d(some(*x), some(*weight), (1, 1), (0, 0))
