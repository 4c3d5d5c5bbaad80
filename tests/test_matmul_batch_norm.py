"""BatchNorm of a repeated tensor by matrix products, against torch's own over `repeat`."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import transformed
from torch import Tensor, nn
from train_examples import tiny

from repbnn_cli.kernels import matmul_batch_norm, reference
from repbnn_cli.kernels.matmul_batch_norm import rep_batch_norm
from repbnn_cli.rep_layers import RepBatchNorm2d
from repbnn_cli.train import backends
from repbnn_cli.train.ranks import Ranks


def inputs(
    channels: int, repeats: int, batch: int, size: tuple[int, int], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x as a binary convolution gives it: integers, far from centred; scales of both signs; shifts."""
    draw = torch.Generator().manual_seed(channels * repeats)
    x = (torch.randn(batch, channels, *size, generator=draw) * 20 + 300).round()
    affine = [torch.randn(channels * repeats, generator=draw) for _ in range(2)]
    return [t.to(dtype).requires_grad_() for t in (x, *affine)]


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 9), repeats=st.sampled_from([1, 2, 4, 9, 16]), batch=st.integers(1, 3),
    size=st.tuples(st.integers(2, 5), st.integers(1, 5)), channels_last=st.booleans(),
)  # fmt: skip
def test_it_equals_the_batch_norm_of_the_repeated_tensor(
    channels: int, repeats: int, batch: int, size: tuple[int, int], channels_last: bool
) -> None:
    given = inputs(channels, repeats, batch, size)
    if channels_last:
        given[0] = given[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    other = [t.detach().clone().requires_grad_() for t in given]
    values, mean, var = rep_batch_norm(*given, 1e-5)
    plain = reference.rep_batch_norm(*other)
    torch.testing.assert_close(values, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, given[0].mean((0, 2, 3)))
    torch.testing.assert_close(var, given[0].var((0, 2, 3), unbiased=False))
    arriving = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1), dtype=plain.dtype)
    for found, true in zip(
        torch.autograd.grad(values, given, arriving), torch.autograd.grad(plain, other, arriving), strict=True
    ):
        torch.testing.assert_close(found, true, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_forward_may_write_into_what_it_gives(channels_last: bool) -> None:
    """`out += x`: autograd refuses that for a view that a function of its own made."""
    given = inputs(5, 4, 2, (3, 4))
    if channels_last:
        given[0] = given[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    other = [t.detach().clone().requires_grad_() for t in given]
    values, plain = rep_batch_norm(*given, 1e-5)[0], reference.rep_batch_norm(*other)
    values += 0.5
    torch.testing.assert_close(values.relu_(), (plain + 0.5).relu(), rtol=1e-9, atol=1e-9)
    for found, true in zip(
        torch.autograd.grad(values.square().sum(), given),
        torch.autograd.grad((plain + 0.5).relu().square().sum(), other), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, true, rtol=1e-7, atol=1e-8)


def test_float32_keeps_its_digits_beside_a_large_mean() -> None:
    given = inputs(3, 16, 4, (9, 7), torch.float32)
    with torch.no_grad():
        given[0] += 20_000
    other = [t.detach().double().requires_grad_() for t in given]
    values, plain = rep_batch_norm(*given, 1e-5)[0], reference.rep_batch_norm(*other)
    arriving = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    found = [values, *torch.autograd.grad(values, given, arriving)]
    true = [plain, *torch.autograd.grad(plain, other, arriving.double())]
    for own, wanted in zip(found, true, strict=True):
        assert own.dtype == torch.float32
        assert (own.double() - wanted).norm() / wanted.norm() < 2e-4  # a mean of 20 300 in float32 is 1e-3 off


def network(beta: int) -> nn.Module:
    made = transformed(tiny(), rule="reptran", beta=beta)[1].train().to(memory_format=torch.channels_last)
    for part in made.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, RepBatchNorm2d):
            nn.init.normal_(part.weight)
    return made


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_learns_the_same_and_keeps_the_same_statistics(compiled: bool) -> None:
    base = network(4).double()
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    states, gradients = [], []
    for norms in (True, False):
        made = copy.deepcopy(base)
        if norms:
            for part in made.modules():
                if isinstance(part, RepBatchNorm2d):
                    part.by_batch = rep_batch_norm
        forward = torch.compile(made, dynamic=False) if compiled else made
        forward(x).square().sum().backward()
        states.append(made.state_dict())
        gradients.append({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    for own, other in (states, gradients):
        assert own.keys() == other.keys()
        for name, tensor in own.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-8, atol=1e-10, msg=name)


def test_the_backend_takes_it_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiny() has 8 channels: at β = 4 its RepConv has 2, which no vector divides; its first layer has 8."""
    for capability, width in (("AVX512", 16), ("AVX2", 8), ("DEFAULT", 4)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert [c for c in range(1, 33) if not matmul_batch_norm.pays(c)] == list(range(width, 33, width))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    made = network(4)
    taken = {m.num_features // m.repeats for m in backends.repeating_norms(made, "int8", Ranks())}
    assert taken == {2}
    assert backends.repeating_norms(made.half(), "int8", Ranks()) == []
    made = network(4)
    assert backends.repeating_norms(made, "int8", Ranks(0, 2)) == []
    (norm,) = backends.repeating_norms(made, "int8", Ranks())
    with backends.running_on(made, "int8", Ranks()):
        assert norm.by_batch is rep_batch_norm
    assert norm.by_batch is None


def test_a_batch_of_one_value_is_refused_as_by_torch() -> None:
    norm = RepBatchNorm2d(8, repeats=4).train()
    norm.by_batch = rep_batch_norm
    with pytest.raises(ValueError, match="expected 2 or more values per channel"):
        norm(torch.zeros(1, 2, 1, 1))
