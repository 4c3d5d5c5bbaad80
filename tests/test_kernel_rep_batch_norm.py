"""rep_batch_norm in Triton against the plain composition in float64, outputs and gradients apart."""

from __future__ import annotations

import pytest
import torch
from emitted_code import compiled
from torch import Tensor, nn

from repbnn_cli.errors import UsageError
from repbnn_cli.kernels import packing, reference
from repbnn_cli.rep_layers import RepBatchNorm2d

pytest.importorskip("triton")

from repbnn_cli.kernels.rep_batch_norm import BLOCK, _rep_batch_norm, rep_batch_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEMORY = [torch.contiguous_format, torch.channels_last]
Inputs = list[Tensor | None]


def inputs(
    channels: int, repeats: int, *, batch: int = 2, residual: bool = True, dtype: torch.dtype = torch.float64,
    memory: torch.memory_format = torch.contiguous_format,
) -> Inputs:  # fmt: skip
    """x as a binary convolution gives it (integers, far from centred), scales of both signs, shifts, a residual."""
    generator = torch.Generator().manual_seed(channels + repeats)
    outputs = channels * repeats
    x = (torch.randn(batch, channels, 5, 7, generator=generator) * 20 + 300).round()
    made = [x.contiguous(memory_format=memory), torch.randn(outputs, generator=generator),
            torch.randn(outputs, generator=generator) / 2,
            torch.randn(batch, outputs, 5, 7, generator=generator) if residual else None]  # fmt: skip
    return [None if t is None else t.to(DEVICE, dtype).requires_grad_() for t in made]


def copies(tensors: Inputs, dtype: torch.dtype) -> Inputs:
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("repeats", [1, 4, 16])
@pytest.mark.parametrize("channels", [1, 16, 31, 33, 96])
def test_values_equal_the_plain_composition(channels: int, repeats: int) -> None:
    given = inputs(channels, repeats, batch=1 + channels % 2, memory=MEMORY[channels % 2])
    for residual, clamp in ((given[3], True), (None, False)):
        made = rep_batch_norm(*given[:3], residual, clamp=clamp, signs=True)
        plain = reference.rep_batch_norm(*given[:3], residual, clamp=clamp)
        torch.testing.assert_close(made.values, plain, rtol=1e-9, atol=1e-9)
        assert made.values.is_contiguous(memory_format=MEMORY[channels % 2])
        assert torch.equal(made.signs, packing.pack_activations(made.values))
        torch.testing.assert_close(made.mean, given[0].mean((0, 2, 3)))
        torch.testing.assert_close(made.var, given[0].var((0, 2, 3), unbiased=False))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("channels", "repeats", "residual", "clamp"), [
    (1, 4, True, True), (33, 1, True, True), (31, 4, False, True), (16, 4, True, False), (12, 16, False, False),
    (96, 4, True, True),
])  # fmt: skip
def test_gradients_equal_the_plain_composition(
    channels: int, repeats: int, residual: bool, clamp: bool, memory: torch.memory_format
) -> None:
    given = inputs(channels, repeats, residual=residual, memory=memory)
    other = copies(given, torch.float64)
    made, plain = rep_batch_norm(*given, clamp=clamp).values, reference.rep_batch_norm(*other, clamp=clamp)
    gradient = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).to(plain)
    made.backward(gradient)
    plain.backward(gradient)
    for mine, theirs in zip(given, other, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_is_as_near_to_float64_as_its_digits_allow(dtype: torch.dtype, tolerance: float) -> None:
    given = inputs(20, 4, dtype=dtype)
    other = copies(given, torch.float64)
    made, plain = rep_batch_norm(*given).values, reference.rep_batch_norm(*other)
    assert made.dtype == dtype
    torch.testing.assert_close(made.double(), plain, rtol=tolerance, atol=tolerance)
    gradient = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).to(plain).to(dtype)
    made.backward(gradient)
    plain.backward(gradient.double())
    for mine, theirs in zip(given, other, strict=True):
        assert mine.grad.dtype == dtype
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=tolerance * scale)


def test_several_slabs_and_a_large_mean_lose_no_digits() -> None:
    x = (torch.arange(11 * 8 * 9, dtype=torch.float32).view(11, 1, 8, 9) % 7 + 18_000).to(DEVICE)
    made = rep_batch_norm(x, torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE))
    exact = x.double()
    assert x.numel() > 10 * BLOCK
    torch.testing.assert_close(made.var.double(), exact.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)
    torch.testing.assert_close(made.mean.double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)


def test_equals_the_layer_that_it_stands_for() -> None:
    layer = RepBatchNorm2d(24, repeats=4).to(DEVICE).double()
    nn.init.normal_(layer.weight)
    x = inputs(6, 4, residual=False)[0].detach()
    torch.testing.assert_close(rep_batch_norm(x, layer.weight, layer.bias).values, layer(x), rtol=1e-9, atol=1e-9)


def test_nothing_passes_where_the_clamp_is_reached_and_nan_is_not_hidden() -> None:
    x = torch.tensor([-1.0, 1.0], device=DEVICE).view(2, 1, 1, 1)
    weight, bias = torch.tensor([0.0], device=DEVICE), torch.tensor([0.0], device=DEVICE)
    residual = torch.tensor([1.0, 0.5], device=DEVICE).view(2, 1, 1, 1).requires_grad_()
    rep_batch_norm(x, weight, bias, residual, clamp=True).values.sum().backward()
    assert residual.grad.flatten().tolist() == [0.0, 1.0]
    assert rep_batch_norm(x * float("nan"), weight, bias, clamp=True).values.isnan().all()


def test_saved_for_backward_is_a_quarter_of_the_plain_composition() -> None:
    given = inputs(32, 4, dtype=torch.float32)

    def held(function: object) -> int:
        saved: dict[int, Tensor] = {}
        keep = lambda t: saved.setdefault(t.data_ptr(), t)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            function(*given, clamp=True)  # type: ignore[operator]
        return sum(t.numel() * t.element_size() for t in saved.values())

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, clamp: bool) -> Tensor:
        layer = RepBatchNorm2d(128, repeats=4).to(x)
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        return nn.functional.hardtanh(layer(x) + residual)

    assert held(rep_batch_norm) * 4 <= held(plain)


def test_is_a_well_behaved_operator() -> None:
    x, weight, bias, residual = inputs(3, 4, dtype=torch.float32)
    torch.library.opcheck(_rep_batch_norm, (x, weight, bias, residual, 1e-5, True, True))
    torch.library.opcheck(_rep_batch_norm, (x, weight, bias, None, 1e-5, False, False))


def test_compiled_equals_eager_without_graph_breaks() -> None:
    def unit(*given: Tensor) -> Tensor:
        return rep_batch_norm(*given, clamp=True).values * 2

    results = []
    for function in (unit, torch.compile(unit, fullgraph=True, backend="aot_eager")):
        given = inputs(5, 4, dtype=torch.float32)
        out = function(*given)
        out.sum().backward()
        results.append([out, *(t.grad for t in given)])
    for eager, fast in zip(*results, strict=True):
        assert torch.equal(eager, fast)


def test_wrong_shapes_are_named() -> None:
    x, weight, bias, residual = inputs(3, 4)
    with pytest.raises(UsageError, match="10 scales for 3 channels; expected a multiple"):
        rep_batch_norm(x, weight[:10], bias[:10])
    with pytest.raises(UsageError, match=r"residual of shape \(2, 3, 5, 7\); expected \(2, 12, 5, 7\)"):
        rep_batch_norm(x, weight, bias, residual[:, :3])


def test_emitted_code_spills_nothing() -> None:
    def case(kernel: str, pointers: str, numbers: str, **constants: object) -> dict[str, object]:
        types = {"signs": "*i32", "mask": "*i32"}
        wide = ("x", "residual", "y", "gradient", "dx", "dresidual")
        signature = {f"{p}_ptr": types.get(p, "*bf16" if p in wide else "*fp32") for p in pointers.split()}
        signature |= {n: "fp32" if n == "eps" else "i32" for n in numbers.split()}
        return {"kernel": f"rep_batch_norm:{kernel}", "signature": signature, "constants": constants | {"BLOCK": BLOCK}}

    sizes, flags = "pixels channels outputs words image eps", {"CLAMP": True, "LAST": True}
    made = compiled([
        case("_statistics", "x means squares", "pixels channels image per_slab", LAST=True),
        case("_normalise", "x weight bias residual mean var y signs mask", sizes, RESIDUAL=True, SIGNS=True, **flags),
        case("_sum_gradients", "gradient x mean var mask bias_sums weight_sums", f"{sizes} per_slab", **flags),
        case("_input_gradient", "gradient x weight mean var mask a b dx dresidual", sizes,
             REPEATS=4, RESIDUAL=True, **flags),
    ])  # fmt: skip
    assert [result["spills"] for result in made] == [0] * 4
    assert max(result["registers"] for result in made) <= 80


def test_scales_and_shifts_need_not_be_dense() -> None:
    x, weight, bias, _ = inputs(16, 4, residual=False)
    pairs = torch.stack([weight, bias], 1).detach()
    strided = [pairs[:, 0].requires_grad_(), pairs[:, 1].requires_grad_()]
    found = rep_batch_norm(x, *strided)
    expected = rep_batch_norm(x, weight, bias)
    assert torch.equal(found.values, expected.values)
    gradients = [torch.autograd.grad(r.values.square().sum(), (x, *s))
                 for r, s in ((found, strided), (expected, (weight, bias)))]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
