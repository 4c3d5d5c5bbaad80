"""Packed blocks on the torch backend against a float64 composition, and what a block refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from block_examples import Case, check, example
from hypothesis import given
from hypothesis import strategies as st

from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import Backend, packing
from repbnn_cli.kernels.blocks import PackedBlock, run
from repbnn_cli.rep_layers import RepBatchNorm2d

TORCH = Backend("torch", "asked for")
cases = st.builds(
    Case,
    in_channels=st.sampled_from([1, 16, 31, 33, 96]),
    filters=st.sampled_from([1, 8, 16, 31, 33]),
    beta=st.sampled_from([1, 2, 4]),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    image=st.sampled_from([(5, 7), (1, 1), (2, 6)]),
    batch=st.sampled_from([1, 2]),
    activation=st.sampled_from(["none", "hardtanh", "rprelu"]),
    residual=st.booleans(),
    sign_shift=st.booleans(),
)


@given(cases)
def test_torch_backend_equals_the_float64_composition(case: Case) -> None:
    made = example(case)
    values, signs = run(made.block, made.x, made.residual, backend=TORCH)
    check(made, values, signs)
    assert values.is_contiguous(memory_format=torch.channels_last)
    packed_values, packed_signs = run(made.block, packing.pack_activations(made.x), made.residual, backend=TORCH)
    assert torch.equal(packed_values, values)
    assert torch.equal(packed_signs, signs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_signs_are_those_of_the_values_as_stored(dtype: torch.dtype) -> None:
    made = example(Case(33, 16, beta=2, sign_shift=True), residual_dtype=dtype)
    values, signs = run(made.block, made.x, made.residual, backend=TORCH, dtype=dtype)
    assert values.dtype == dtype
    check(made, values, signs, tolerance=torch.finfo(dtype).eps)
    assert run(made.block, made.x, made.residual, backend=TORCH, values=False, dtype=dtype)[0] is None
    assert run(made.block, made.x, made.residual, backend=TORCH, signs=False, dtype=dtype)[1] is None


@given(cases, st.integers(0, 2))
def test_border_sums_are_the_convolution_of_an_image_of_ones(case: Case, padding: int) -> None:
    case = replace(case, padding=padding)
    if min(case.image) + 2 * padding < case.kernel:
        return
    made = example(case)
    kernel = torch.where(made.weight >= 0, 1.0, -1.0)
    sums = F.conv2d(torch.ones(1, case.in_channels, *case.image), kernel, stride=case.stride, padding=padding)
    per_side = padding + 1
    for y in range(sums.shape[2]):
        for x in range(sums.shape[3]):
            top, left = (max(0, padding - case.stride * i) for i in (y, x))
            bottom, right = (
                max(0, case.stride * i - padding + case.kernel - size)
                for i, size in zip((y, x), case.image, strict=True)
            )
            row = ((top * per_side + bottom) * per_side + left) * per_side + right
            assert torch.equal(made.block.border_sums[row].float(), sums[0, :, y, x])


def test_a_block_is_a_rep_network_s_convolution_and_batchnorm() -> None:
    """The scale and shift that blocks.py's formula gives, against the RepBatchNorm2d they stand for."""
    made = example(Case(33, 8, beta=2, residual=False))
    norm = RepBatchNorm2d(32, repeats=4).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    block = replace(made.block, scale=scale.detach(), shift=(norm.bias - norm.running_mean * scale).detach())
    sums = F.conv2d(torch.where(made.x >= 0, 1.0, -1.0), torch.where(made.weight >= 0, 1.0, -1.0), padding=1)
    values, _ = run(block, made.x, backend=TORCH)
    torch.testing.assert_close(values, norm(sums).detach(), rtol=1e-5, atol=1e-4)


def test_what_a_block_refuses() -> None:
    made = example(Case(33, 8, beta=2))
    block = made.block
    with pytest.raises(UsageError, match=r"scale: \(8,\) float32; expected \(32,\) float32, for 8 filters repeated 4"):
        replace(block, scale=torch.ones(8))
    with pytest.raises(UsageError, match="packed_weight: 2 words per tap; 96 input channels need 3"):
        replace(block, in_channels=96)
    with pytest.raises(
        UsageError, match=r"packed_weight: \(8, 33, 3, 3\) float32; expected \(O, kh, kw, words\) int32"
    ):
        replace(block, packed_weight=made.weight)
    with pytest.raises(UsageError, match="rprelu: goes with activation 'rprelu' and no other, here 'none'"):
        replace(block, rprelu=torch.ones(3, 32))
    with pytest.raises(UsageError, match="activation: unknown value 'relu'; expected none, hardtanh, rprelu"):
        replace(block, activation="relu")
    with pytest.raises(UsageError, match=r"input: \(2, 32, 5, 7\) float32; expected packed \(N, H, W, 2\) int32, or"):
        run(block, made.x[:, :32], made.residual, backend=TORCH)
    with pytest.raises(UsageError, match="residual: none given to a block that wants one"):
        run(block, made.x, backend=TORCH)
    with pytest.raises(UsageError, match=r"residual: \(2, 32, 5, 6\) float32; expected \(2, 32, 5, 7\)"):
        run(block, made.x, made.residual[..., :6], backend=TORCH)
    with pytest.raises(UsageError, match="values of float64: expected one of float32, float16, bfloat16"):
        run(block, made.x, made.residual, backend=TORCH, dtype=torch.float64)
    with pytest.raises(UsageError, match="residual: on meta; expected cpu, where the block is"):
        run(block, made.x, made.residual.to("meta"), backend=TORCH)
    with pytest.raises(UsageError, match="ringed: only packed input can have its padding around it already"):
        run(block, made.x, made.residual, backend=TORCH, ringed=True)
    with pytest.raises(UsageError, match="an input of 1×2 pixels with padding"):
        replace(block, padding=(0, 0)).output_size(1, 2)


def test_an_empty_batch_gives_empty_results() -> None:
    made = example(Case(33, 8, beta=2))
    values, signs = run(made.block, made.x[:0], made.residual[:0], backend=TORCH)
    assert values.shape == (0, 32, 5, 7)
    assert signs.shape == (0, 5, 7, 1)


def test_a_block_moves_as_a_whole() -> None:
    block = example(Case(33, 8, activation="rprelu", sign_shift=True)).block
    moved = block.to(torch.device("meta"))
    assert isinstance(moved, PackedBlock)
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
