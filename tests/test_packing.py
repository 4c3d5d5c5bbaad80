"""The layout of packed bits bit by bit, the popcount identity against a convolution, and the choice of a backend."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repbnn_cli import kernels
from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import packing, reference

CHANNELS = [1, 16, 31, 33, 96]


def some(*shape: int, seed: int = 0, zeros: float = 0.1) -> Tensor:
    """Normal values, a tenth of them exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * (torch.rand(*shape, generator=generator) >= zeros)


@pytest.mark.parametrize("channels", [1, 16, 31, 32, 33, 96])
def test_bit_i_of_word_l_is_channel_32l_plus_i(channels: int) -> None:
    x = some(2, channels, 5, 7, seed=channels)
    words = packing.pack_activations(x)
    assert words.dtype == torch.int32
    assert words.shape == (2, 5, 7, packing.word_count(channels))
    for n, y, col in [(0, 0, 0), (1, 4, 6), (1, 2, 3)]:
        values = x[n, :, y, col].tolist()
        for j, word in enumerate(words[n, y, col].tolist()):
            bits = [i for i, value in enumerate(values[32 * j : 32 * j + 32]) if value >= 0]
            assert word & 0xFFFFFFFF == sum(1 << i for i in bits)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_unpacking_gives_the_signs_whatever_the_memory_format(memory: torch.memory_format, dtype: torch.dtype) -> None:
    x = some(2, 33, 3, 4).to(dtype).contiguous(memory_format=memory)
    assert torch.equal(packing.unpack_activations(packing.pack_activations(x), 33, dtype), reference.binarize(x))
    assert torch.equal(packing.unpack_kernel(packing.pack_kernel(x), 33, dtype), reference.binarize(x))


def test_special_values_and_the_count_of_zeros() -> None:
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1e-45]).view(1, 6, 1, 1)
    assert packing.pack_activations(x).item() == 0b001011
    assert packing.count_zeros(x) == 2


@given(st.integers(-(2**31), 2**31 - 1))
def test_popcount(word: int) -> None:
    assert packing.popcount(torch.tensor([word], dtype=torch.int32)) == (word & 0xFFFFFFFF).bit_count()


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding"),
    [*itertools.product(CHANNELS, [(3, 3), (1, 1)], [(1, 1), (2, 2)], [(0, 0), (1, 1)]), (33, (5, 3), (2, 1), (2, 0))],
)
def test_popcount_identity_equals_the_convolution(
    channels: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    x, w = some(2, channels, 5, 7), some(3, channels, *kernel, seed=1)
    sums = reference.binary_conv2d_packed(
        packing.pack_activations(x), packing.pack_kernel(w), channels, stride, padding
    )
    plain = F.conv2d(torch.where(x >= 0, 1.0, -1.0), torch.where(w >= 0, 1.0, -1.0), stride=stride, padding=padding)
    assert torch.equal(sums.float(), plain)
    assert torch.equal(reference.binary_conv2d(x, w, stride, padding), plain)


def test_a_half_precision_result_is_the_exact_sum_rounded_once() -> None:
    x, w = torch.ones(1, 299, 1, 1, dtype=torch.bfloat16), torch.ones(1, 299, 1, 1)
    assert reference.binary_conv2d(x, w).item() == torch.tensor(299.0).bfloat16().item() == 300


def test_auto_is_torch_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = kernels.choose(torch.device("cpu"))
    assert chosen.name == "torch"
    assert "device 'cpu' is no GPU" in chosen.why
    assert str(kernels.choose(torch.device("cpu"), "torch")) == "torch (asked for)"


def test_forcing_triton_where_it_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_triton_version", lambda: "3.9.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match=r"--backend triton: device 'cpu' is no GPU; expected --device cuda"):
        kernels.choose(torch.device("cpu"), "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.choose(torch.device("cpu"), "triton").why == "asked for; interpreted on the CPU"
    monkeypatch.setattr(kernels, "_triton_version", lambda: "3.2.0")
    with pytest.raises(UsageError, match=r"Triton 3\.2\.0 is too old; expected 3\.6 or newer"):
        kernels.choose(torch.device("cpu"), "triton")
    monkeypatch.setattr(kernels, "_triton_version", lambda: None)
    with pytest.raises(UsageError, match="Triton is not installed; pip install"):
        kernels.choose(torch.device("cpu"), "triton")
    with pytest.raises(UsageError, match="unknown value 'cuda'; expected one of auto, torch, triton"):
        kernels.choose(torch.device("cpu"), "cuda")


def test_importing_the_package_imports_no_triton() -> None:
    script = "import sys, repbnn_cli.kernels.packing, repbnn_cli.kernels.reference; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
