"""The fused block in Triton: both products against float64, the sums exactly, and the code emitted for an H100/H200.

Without a GPU the kernel runs in Triton's interpreter (conftest.py), where the binary tensor-core instruction is played
by `warp_mma`, written from the fragment tables of the PTX ISA: all that surrounds the instruction is the kernel's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from block_examples import Case, check, example, plain_sums
from emitted_code import compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from repbnn_cli import kernels
from repbnn_cli.kernels import packing
from repbnn_cli.kernels.blocks import PackedBlock, run

pytest.importorskip("triton")
from repbnn_cli.kernels import binary_mma, rep_bconv_fused
from repbnn_cli.kernels.rep_bconv_fused import Product, constants, launch, tile_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = kernels.choose(DEVICE, "triton")
TORCH = kernels.choose(DEVICE, "torch")
RPRELU, HARDTANH = {"activation": "rprelu", "sign_shift": True}, {"activation": "hardtanh"}
CASES = [
    Case(1, 1, batch=1, kernel=1),
    Case(1, 33, kernel=3, residual=False, **HARDTANH),
    Case(16, 8, beta=2, **RPRELU),
    Case(16, 32, beta=4, stride=2, image=(4, 4), **HARDTANH),
    Case(31, 31, beta=2, stride=2, batch=1),
    Case(33, 96, kernel=1, stride=2, **RPRELU),
    Case(96, 16, beta=1, residual=False, **RPRELU),
    Case(96, 64, beta=2, image=(3, 2), **HARDTANH),
    Case(192, 9, beta=4, batch=1, image=(2, 2), **RPRELU),
    Case(256, 96, kernel=3, batch=1, image=(1, 3)),
    Case(33, 8, kernel=5, image=(3, 3), **HARDTANH),
]


def lanes(tensor: Any) -> np.ndarray:
    """A tile of one int32 per thread, as (warps, 32) uint32."""
    return np.ascontiguousarray(tensor.handle.data).view(np.uint32).reshape(-1, 32)


def tile_like(tensor: Any, values: np.ndarray) -> Any:
    from triton.language.core import tensor as tile
    from triton.runtime.interpreter import TensorHandle

    return tile(TensorHandle(values.astype(np.int32).reshape(-1), tensor.handle.dtype), tensor.type)


def ones(words: np.ndarray) -> np.ndarray:
    """Ones in each uint32."""
    return np.unpackbits(np.ascontiguousarray(words)[..., None].view(np.uint8), axis=-1).sum(-1)


def warp_mma(*registers: Any) -> tuple[Any, ...]:
    """mma.m16n8k256 with and.popc: A, B and C put together from what each lane holds, as the PTX ISA's tables say."""
    a0, a1, a2, a3, b0, b1, *c = (lanes(r) for r in registers)
    warps, lane = len(a0), np.arange(32)
    group, member = lane // 4, lane % 4
    a, b = np.zeros((warps, 16, 8), np.uint32), np.zeros((warps, 8, 8), np.uint32)  # rows × words, columns × words
    for register, row, word in ((a0, 0, 0), (a1, 8, 0), (a2, 0, 4), (a3, 8, 4)):
        a[:, group + row, member + word] = register
    for register, word in ((b0, 0), (b1, 4)):
        b[:, group, member + word] = register
    products = ones(a[:, :, None] & b[:, None]).sum(3).astype(np.uint32)  # (warps, 16, 8)
    places = [(group, 2 * member), (group, 2 * member + 1), (group + 8, 2 * member), (group + 8, 2 * member + 1)]
    return tuple(
        tile_like(registers[0], held + products[:, row, column]) for held, (row, column) in zip(c, places, strict=True)
    )


@pytest.fixture(scope="module", autouse=True)
def _instruction() -> Iterator[None]:
    """Plays the inline assembly where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setattr(binary_mma, "_mma", warp_mma)
            patch.setattr(binary_mma, "_ones", lambda word: tile_like(word, ones(lanes(word))))
        yield


def fused(block: PackedBlock, x: torch.Tensor, residual: torch.Tensor | None, product: Product, **more: Any) -> Any:
    options = {"values": True, "signs": True, "dtype": torch.float32, **more}
    return launch(block, packing.pack_activations(x), residual, product=product, **options)


@pytest.mark.parametrize("product", ["int8", "binary"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_equals_the_float64_composition(case: Case, product: Product) -> None:
    made = example(case).to(DEVICE)
    values, signs = fused(made.block, made.x, made.residual, product)
    assert values.is_contiguous(memory_format=torch.channels_last)
    check(made, values, signs)


@pytest.mark.parametrize("product", ["int8", "binary"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_before_the_affine_are_exact(case: Case, product: Product) -> None:
    made = example(replace(case, residual=False, activation="none", sign_shift=False)).to(DEVICE)
    one, zero = torch.ones(made.block.channels, device=DEVICE), torch.zeros(made.block.channels, device=DEVICE)
    values, _ = fused(replace(made.block, scale=one, shift=zero), made.x, None, product, signs=False)
    assert torch.equal(values.double(), plain_sums(made).repeat(1, made.block.repeats, 1, 1))


@settings(max_examples=10, deadline=None)
@given(
    st.builds(
        Case,
        in_channels=st.integers(1, 100),
        filters=st.integers(1, 33),
        beta=st.sampled_from([1, 2]),
        kernel=st.sampled_from([1, 2, 3]),
        stride=st.sampled_from([1, 2, 3]),
        image=st.tuples(st.integers(3, 6), st.integers(3, 6)),
        batch=st.just(1),
        activation=st.sampled_from(["none", "hardtanh", "rprelu"]),
        residual=st.booleans(),
        sign_shift=st.booleans(),
        padding=st.integers(0, 2),
    ),
    st.sampled_from(["int8", "binary"]),
)
def test_any_shape(case: Case, product: Product) -> None:
    made = example(case).to(DEVICE)
    check(made, *fused(made.block, made.x, made.residual, product))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_residual_and_values(dtype: torch.dtype) -> None:
    made = example(Case(33, 16, beta=2, **RPRELU), residual_dtype=dtype).to(DEVICE)
    values, signs = fused(made.block, made.x, made.residual, "int8", dtype=dtype)
    assert values.dtype == dtype
    check(made, values, signs, tolerance=torch.finfo(dtype).eps)
    alone = fused(made.block, made.x, made.residual, "int8", dtype=dtype, values=False)
    assert alone[0] is None
    assert torch.equal(alone[1], signs)
    assert fused(made.block, made.x, made.residual, "int8", dtype=dtype, signs=False)[1] is None


def test_an_empty_batch_gives_empty_results() -> None:
    made = example(Case(33, 8, beta=2)).to(DEVICE)
    values, signs = run(made.block, made.x[:0], made.residual[:0], backend=TRITON)
    assert values.shape == (0, 32, 5, 7)
    assert signs.shape == (0, 5, 7, 1)


def test_signs_with_a_ring_feed_the_next_block() -> None:
    first, second = (example(case).to(DEVICE) for case in (Case(33, 16, beta=2), Case(64, 8, beta=2, **HARDTANH)))
    results = []
    for backend in (TRITON, TORCH):
        _, plain = run(first.block, first.x, first.residual, backend=backend)
        _, ringed = run(first.block, first.x, first.residual, backend=backend, signs_ring=(1, 1))
        assert torch.equal(ringed, torch.nn.functional.pad(plain, (0, 0, 1, 1, 1, 1)))
        values, signs = run(second.block, ringed, second.residual, backend=backend, ringed=True)
        unringed_values, unringed_signs = run(second.block, plain, second.residual, backend=backend)
        assert torch.equal(values, unringed_values)
        assert torch.equal(signs, unringed_signs)
        results.append(values)
    torch.testing.assert_close(*results)


def emitted(case: Case, product: Product) -> dict[str, Any]:
    """A case for emitted_code: the arguments as `launch` would give them on a GPU, in bfloat16."""
    block = example(case).block
    tile = tile_for(block)
    absent = {f"{name}_ptr": None for name in ("rprelu", "sign_shift") if getattr(block, name) is None}
    bits = ("words_ptr", "kernel_ptr", "border_ptr", "signs_ptr")
    half, full = ("residual_ptr", "values_ptr"), ("scale_ptr", "shift_ptr", "rprelu_ptr", "sign_shift_ptr")
    pointers = dict.fromkeys(bits, "*i32") | dict.fromkeys(half, "*bf16") | dict.fromkeys(full, "*fp32")
    sizes = [name for name in rep_bconv_fused._block.arg_names if name.islower() and name not in pointers]
    return {
        "kernel": "rep_bconv_fused:_block",
        "signature": pointers | dict.fromkeys(sizes, "i32"),
        "constants": constants(block, tile, product, torch.bfloat16) | {"STORED": "tl.bfloat16"} | absent,
        "warps": tile.warps,
        "divisible": ["channels", *(p for p in pointers if p not in absent)],
    }


def test_sizes_of_one_which_triton_makes_constants_compile() -> None:
    """A launch turns arguments equal to 1 into compile-time constants, which the interpreter does not."""
    for_one = emitted(Case(1, 1, batch=1, kernel=1, image=(1, 1)), "binary")
    pointers = {name: kind for name, kind in for_one["signature"].items() if kind.startswith("*")}
    sizes = dict.fromkeys(set(for_one["signature"]) - set(pointers), 1)
    (made,) = compiled([for_one | {"signature": pointers, "constants": for_one["constants"] | sizes, "divisible": []}])
    assert "and.popc" in made["ptx"]


def test_code_for_an_h100_has_the_instruction_its_layout_and_no_spills() -> None:
    shapes = [Case(32, 8, beta=2, **HARDTANH), Case(128, 32, beta=2, **RPRELU), Case(512, 64, beta=2, **RPRELU)]
    wanted = [emitted(case, "binary") for case in shapes] + [emitted(shapes[1], "int8")]
    *binary, int8 = compiled(wanted)
    for result in binary:
        lines = result["ttgir"].splitlines()
        assert "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc" in result["ptx"]
        assert result["spills"] == 0
        assert result["registers"] <= 170  # three programs of 128 threads share the 65536 of a multiprocessor
        # One element per thread, in order, on what the instruction takes: else it would not be a warp's fragment.
        assembly = [line for line in lines if "elementwise_inline_asm" in line and "mma" in line]
        layouts = {name for line in assembly for name in _layouts(line)}
        assert len(layouts) == 1
        name = layouts.pop()
        (definition,) = (line for line in lines if line.startswith(f"{name} ="))
        assert "sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]" in definition
        products = [number for number, line in enumerate(lines) if "mma.sync" in line]
        loop = lines[max(n for n in range(products[0]) if "scf.for" in lines[n]) : products[-1]]
        assert not [line for line in loop if "convert_layout" in line]  # nor do operands move between threads
    assert "and.popc" not in int8["ptx"]
    assert "s32.s8.s8" in int8["ptx"] or "s32.u8.s8" in int8["ptx"]
    assert int8["spills"] == 0


def _layouts(line: str) -> list[str]:
    return [part.split(">")[0] for part in line.split("tensor<128xi32, ")[1:]]
