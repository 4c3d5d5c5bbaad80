"""RepConv, RepLinear and the shared BatchNorm against the plain torch composition that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import BinaryConv
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli.binary_conv import IRConv2d
from repbnn_cli.errors import UsageError
from repbnn_cli.rep_layers import (
    ChannelSelect,
    RepBatchNorm1d,
    RepBatchNorm2d,
    RepBconv2d,
    RepConv2d,
    Repeat,
    RepLinear,
    RepMixin,
    add_channels,
    fold,
    make_rep,
    repeat_batch,
    repeat_channels,
    unfold,
)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions


@pytest.mark.parametrize("beta", [1, 2, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_rep_conv_is_a_convolution_and_a_repeat(beta: int, bias: bool) -> None:
    layer = RepConv2d(3, 8, 3, stride=2, padding=1, bias=bias, beta=beta).double()
    plain = nn.Conv2d(3, 8, 3)
    assert tuple(layer.weight.shape) == (8 // beta, 3 * beta, 3, 3)
    assert layer.weight.numel() == plain.weight.numel()
    x = noise(2, 3 * beta, 7, 5)
    compact = F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1)
    out = layer(x)
    assert tuple(out.shape) == (2, 8 * beta, 4, 3)
    for j in range(8 * beta):
        assert torch.equal(out[:, j], compact[:, j % (8 // beta)])
    assert torch.equal(out, compact.repeat(1, beta * beta, 1, 1))  # as the paper has it


def test_grouped_repeat_stays_within_each_group() -> None:
    groups, beta, out = 2, 2, 8
    layer = RepConv2d(4, out, 1, groups=groups, beta=beta).double()
    x = noise(2, 4 * beta, 3, 3)
    compact = F.conv2d(x, layer.weight, layer.bias, groups=groups)
    short, block = out // beta // groups, out * beta // groups
    result = layer(x)
    assert tuple(result.shape) == (2, out * beta, 3, 3)
    for group in range(groups):
        for j in range(block):
            assert torch.equal(result[:, group * block + j], compact[:, group * short + j % short])


def test_rep_linear_is_a_linear_layer_and_a_repeat() -> None:
    layer = RepLinear(6, 4, beta=2).double()
    assert tuple(layer.weight.shape) == (2, 12)
    x = noise(3, 12)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias).repeat(1, 4))


def test_beta_has_to_divide() -> None:
    with pytest.raises(UsageError, match=r"^RepConv2d: beta 4 does not divide 6 output channels$"):
        RepConv2d(3, 6, 3, beta=4)
    with pytest.raises(
        UsageError, match=r"^RepConv2d: beta 4 does not divide 2 output channels of each of its 4 groups$"
    ):
        RepConv2d(4, 8, 1, groups=4, beta=4)
    with pytest.raises(UsageError, match=r"^RepLinear: beta 3 does not divide 4 output channels$"):
        RepLinear(6, 4, beta=3)


@pytest.mark.parametrize(
    ("module", "cls", "binary"),
    [
        (nn.Conv2d(8, 2, 3), RepConv2d, False),
        (nn.Linear(8, 2), RepLinear, False),
        (BinaryConv(8, 2, 3), RepBconv2d, True),
        (IRConv2d(8, 2, 3), RepBconv2d, True),
        (nn.Conv1d(8, 2, 3), RepMixin, False),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_make_rep_changes_only_the_class(module: nn.Module, cls: type, binary: bool) -> None:
    before, was = module.state_dict(), type(module)
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    module.note = "kept"
    x = torch.randn({nn.Linear: (2, 8), nn.Conv1d: (2, 8, 5)}.get(was, (2, 8, 5, 5)))
    compact = module(x)
    rep = make_rep(module, 2, 4, binary=binary)
    assert rep is module
    assert isinstance(rep, cls)
    assert isinstance(rep, was)
    assert isinstance(rep, RepBconv2d) == binary
    assert type(rep) is type(make_rep(was(8, 2, *([3] if was is not nn.Linear else [])), 2, 1, binary=binary))
    assert (rep.rep_beta, rep.rep_repeats, rep.note) == (2, 4, "kept")
    assert list(rep.state_dict()) == list(before)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(rep.state_dict().values(), before.values(), strict=True))
    assert torch.equal(rep(x), torch.cat([compact] * 4, 1))
    assert len(calls) == 2
    assert "beta=2, repeats=4" in repr(rep)


def test_where_a_batch_norm_repeats_the_convolution_does_not() -> None:
    layer = make_rep(nn.Conv2d(4, 2, 1), 2, 1, binary=False)
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias))


# ---------------------------------------------------------------------------------------------------------------------
# BatchNorm with shared normalisation

KINDS = [
    pytest.param(RepBatchNorm2d, nn.BatchNorm2d, (4, 3, 3, 2), id="2d"),
    pytest.param(RepBatchNorm1d, nn.BatchNorm1d, (5, 3), id="1d"),
    pytest.param(RepBatchNorm1d, nn.BatchNorm1d, (4, 3, 6), id="1d-length"),
]


def pair(
    rep_type: Any, plain_type: Any, repeats: int, dtype: torch.dtype, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """A shared-normalisation BatchNorm and the plain one over the repeated tensor, with the same values."""
    channels = 3 * repeats
    rep, plain = rep_type(channels, repeats, **options).to(dtype), plain_type(channels, **options).to(dtype)
    assert list(rep.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for i, p in enumerate(plain.parameters()):
            p.copy_(noise(channels, seed=10 + i, dtype=dtype))
    rep.load_state_dict(plain.state_dict())
    return rep, plain


@pytest.mark.parametrize(("rep_type", "plain_type", "shape"), KINDS)
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_rep_batch_norm_is_batch_norm_over_the_repeated_tensor(
    rep_type: Any, plain_type: Any, shape: tuple[int, ...], momentum: float | None, affine: bool, track: bool
) -> None:
    repeats = 4
    options = {"momentum": momentum, "affine": affine, "track_running_stats": track, "eps": 1e-3}
    rep, plain = pair(rep_type, plain_type, repeats, torch.float64, **options)
    for step in range(3):
        x = (noise(*shape, seed=step) * 3 + step).requires_grad_()
        y = x.detach().clone().requires_grad_()
        weights = noise(shape[0], 3 * repeats, *shape[2:], seed=99)
        a, b = rep(x), plain(torch.cat([y] * repeats, 1))
        (a * weights).sum().backward()
        (b * weights).sum().backward()
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-10)
        for p, q in zip(rep.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-11)
        for (name, p), q in zip(rep.state_dict().items(), plain.state_dict().values(), strict=True):
            assert p.dtype == q.dtype
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("rep_type", "plain_type", "shape"), KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_rep_batch_norm_in_eval_mode_has_running_statistics_per_copy(
    rep_type: Any, plain_type: Any, shape: tuple[int, ...], affine: bool
) -> None:
    rep, plain = pair(rep_type, plain_type, 4, torch.float64, affine=affine)
    with torch.no_grad():  # a transform tiles the source's statistics, which need not agree between copies
        plain.running_mean.copy_(noise(12, seed=5))
        plain.running_var.copy_(noise(12, seed=6).abs() + 0.1)
    rep.load_state_dict(plain.state_dict())
    rep.eval()
    plain.eval()
    x = noise(*shape).requires_grad_()
    y = x.detach().clone().requires_grad_()
    a, b = rep(x), plain(torch.cat([y] * 4, 1))
    assert torch.equal(a, b)  # a sign follows
    weights = noise(*a.shape, seed=9)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-11)
    assert torch.equal(rep.running_mean, plain.running_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rep_batch_norm_in_other_precisions(dtype: torch.dtype) -> None:
    rep, plain = pair(RepBatchNorm2d, nn.BatchNorm2d, 4, dtype)
    x = noise(4, 3, 5, 5, dtype=dtype)
    a, b = rep(x), plain(torch.cat([x] * 4, 1))
    assert a.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_rep_batch_norm_without_repeats_is_batch_norm() -> None:
    rep, plain = pair(RepBatchNorm2d, nn.BatchNorm2d, 1, torch.float64)
    x = noise(2, 3, 4, 4)
    torch.testing.assert_close(rep(x), plain(x), rtol=1e-12, atol=1e-12)


def test_rep_batch_norm_refuses_what_batch_norm_refuses() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        RepBatchNorm2d(12, 4)(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        RepBatchNorm1d(12, 4)(torch.zeros(1, 3))


def test_in_training_the_repeated_tensor_exists_only_once_it_is_normalised() -> None:
    rep = RepBatchNorm2d(64, 4).train()
    size = 2 * 64 * 9 * 9 * 4
    made: set[int] = set()

    class Storages(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= size:
                made.add(result.untyped_storage().data_ptr())
            return result

    with Storages(), torch.no_grad():
        out = rep(torch.randn(2, 16, 9, 9))
    assert made == {out.untyped_storage().data_ptr()}


# ---------------------------------------------------------------------------------------------------------------------
# Helpers of the graph


def test_fold_puts_replicas_beside_each_other_as_samples() -> None:
    n, beta, c = 2, 3, 4
    x = noise(n, beta * c, 5)
    folded = fold(x, beta)
    assert tuple(folded.shape) == (n * beta, c, 5)
    for i in range(n):
        for b in range(beta):
            assert torch.equal(folded[i * beta + b], x[i, b * c : (b + 1) * c])
    assert torch.equal(unfold(folded, beta), x)


def test_fold_keeps_channels_last() -> None:
    x = noise(2, 12, 5, 4).contiguous(memory_format=torch.channels_last)
    folded = fold(x, 3)
    assert torch.equal(folded, fold(x.contiguous(), 3))
    assert folded.is_contiguous(memory_format=torch.channels_last)
    again = unfold(folded, 3)
    assert torch.equal(again, x)
    assert again.is_contiguous(memory_format=torch.channels_last)


def test_repeat_batch_stands_beside_a_folded_tensor() -> None:
    x, beta = noise(2, 3, 4), 2
    assert torch.equal(fold(torch.cat([x] * beta, 1), beta), repeat_batch(x, beta))


def test_add_channels_and_repeat() -> None:
    x = noise(2, 3, 4)
    assert torch.equal(add_channels(x, 2), torch.cat([x, x], 1))
    assert torch.equal(Repeat(4)(x), torch.cat([x] * 4, 1))
    assert repeat_channels(x, 1) is x
    grouped = Repeat(2, groups=3)(x)
    assert [grouped[0, j].tolist() for j in range(6)] == [x[0, j // 2].tolist() for j in range(6)]


def test_repeat_sums_the_gradients_of_its_copies() -> None:
    x = noise(2, 3, 2).requires_grad_()
    weights = noise(2, 12, 2, seed=1)
    (repeat_channels(x, 4) * weights).sum().backward()
    assert torch.allclose(x.grad, weights.view(2, 4, 3, 2).sum(1))


def test_channel_select_slices_a_prefix_and_keeps_no_state() -> None:
    x = noise(2, 6, 3)
    prefix, other = ChannelSelect(torch.arange(4)), ChannelSelect(torch.tensor([5, 0, 0]))
    assert prefix(x).data_ptr() == x.data_ptr()
    assert torch.equal(prefix(x), x[:, :4])
    assert torch.equal(other(x), x[:, [5, 0, 0]])
    assert not prefix.state_dict()
    assert torch.equal(other.half()(x.half()), x.half()[:, [5, 0, 0]])
