"""RepConv, RepBconv and the BatchNorm that follows a repeat (RepBNN, arXiv 2207.09049, section 3).

Shape letters: O, I output and input channels of the source convolution; b = β; k the kernel's spatial size.

A RepConv has the kernel (O/b, I·b, k, k): as many weights and multiply-accumulates as (O, I, k, k). Its output is
repeated b² times along the channels: result channel j is convolution channel j mod (O/b), O·b channels in all.
Where a BatchNorm follows, the repeat is left to it (`rep_repeats == 1` on the convolution, `repeats == b²` on the
BatchNorm), so that in training the repeated tensor never exists before it is normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli.errors import UsageError


def repeat_channels(x: Tensor, repeats: int, groups: int = 1) -> Tensor:
    """(N, C, ...) → (N, C·repeats, ...): channel j of the result is channel j mod C of x.

    With groups the repeat is within each of `groups` blocks of channels: grouped convolutions keep their groups.
    """
    if repeats == 1:
        return x
    at = _channel_axis(x)
    blocks = x.movedim(1, at).unflatten(at, (groups, -1)).unsqueeze(at + 1)
    return _repeated(blocks, at + 1, repeats).flatten(at, at + 2).movedim(at, 1)


def _channel_axis(x: Tensor) -> int:
    """Where a tensor (N, C, ...) has its channels in memory: what is done to them there keeps channels_last."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return 3 if last else 1


def _repeated(x: Tensor, axis: int, repeats: int) -> Tensor:
    """A view with `repeats` in the place of the 1 at `axis`."""
    return x.expand(*x.shape[:axis], repeats, *x.shape[axis + 1 :])


class RepMixin:
    """What makes a convolution or linear layer a repeating one: β, and how often it repeats its output itself.

    The names are ones that no layer has: somebody's convolution may have a parameter `beta`.
    """

    rep_beta: int
    rep_repeats: int
    rep_groups: int = 1

    def forward(self, *operands: Any, **options: Any) -> Tensor:
        compact = super().forward(*operands, **options)  # type: ignore[misc]
        return repeat_channels(compact, self.rep_repeats, self.rep_groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.rep_beta}, repeats={self.rep_repeats}"  # type: ignore[misc]


class RepConv2d(RepMixin, nn.Conv2d):
    """Full-precision RepConv: (N, I·b, H, W) → (N, O·b, H', W') at the cost of an I → O convolution.

    Arguments are those of the nn.Conv2d it replaces (I and O channels), and `beta`, which has to divide O.
    """

    def __init__(self, in_channels: int, out_channels: int, *args: Any, beta: int = 2, **kwargs: Any) -> None:
        groups = args[4] if len(args) > 4 else kwargs.get("groups", 1)
        if out_channels // groups % beta:
            of_groups = f" of each of its {groups} groups" if groups > 1 else ""
            raise UsageError(
                f"RepConv2d: beta {beta} does not divide {out_channels // groups} output channels{of_groups}"
            )
        super().__init__(in_channels * beta, out_channels // beta, *args, **kwargs)
        self.rep_beta, self.rep_repeats, self.rep_groups = beta, beta * beta, groups


class RepBconv2d(RepMixin):
    """Marks a binary RepConv. Mixed into the class of the binary convolution it came from, whose binarisation,
    gradient estimator and tensor names it keeps: see `make_rep`."""


class RepLinear(RepMixin, nn.Linear):
    """A hidden linear layer as a RepConv: (N, I·b) → (N, O·b) at the cost of an I → O layer.

    Arguments are those of the nn.Linear it replaces, and `beta`, which has to divide O.
    """

    def __init__(self, in_features: int, out_features: int, *args: Any, beta: int = 2, **kwargs: Any) -> None:
        if out_features % beta:
            raise UsageError(f"RepLinear: beta {beta} does not divide {out_features} output channels")
        super().__init__(in_features * beta, out_features // beta, *args, **kwargs)
        self.rep_beta, self.rep_repeats = beta, beta * beta


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: RepConv2d, nn.Linear: RepLinear}


@cache
def mixed(prefix: str, mixin: type, cls: type) -> type[nn.Module]:
    """The class `cls` with a mixin before it, once for each: modules become of it by `module.__class__ = ...`."""
    return type(f"{prefix}{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})


def make_rep(module: nn.Module, beta: int, repeats: int, *, binary: bool, groups: int = 1) -> nn.Module:
    """Turns a convolution or linear layer, already resized to (O/b, I·b), into its repeating form, in place.

    Only the class changes: tensors, names, hooks and attributes stay. isinstance(module, RepBconv2d) holds for every
    binary one, isinstance(module, RepMixin) for all.
    """
    cls: type = type(module)
    mixin: type = RepBconv2d if binary else RepMixin
    module.__class__ = _PLAIN[cls] if not binary and cls in _PLAIN else mixed("Rep", mixin, cls)
    module.rep_beta, module.rep_repeats, module.rep_groups = beta, repeats, groups  # type: ignore[assignment]
    return module


class Repeat(nn.Module):
    """The repeat as a layer of its own, where no BatchNorm takes it over."""

    def __init__(self, repeats: int, groups: int = 1) -> None:
        super().__init__()
        self.repeats, self.groups = repeats, groups

    def forward(self, x: Tensor) -> Tensor:
        return repeat_channels(x, self.repeats, self.groups)

    def extra_repr(self) -> str:
        return f"repeats={self.repeats}" + (f", groups={self.groups}" if self.groups > 1 else "")


ByBatch = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
"""(x, weight, bias, eps) → (values, mean, biased variance): BatchNorm in training over a repeat.

x: (N, C, H, W); weight, bias: (R·C,); values: (N, R·C, H, W); the statistics of the batch: (C,).
"""


class _RepBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over a tensor repeated `repeats` times, computed on its distinct channels.

    Takes (N, C, ...) and gives (N, C·repeats, ...), equal in outputs, batch statistics and running statistics to a
    BatchNorm with C·repeats channels over `repeat_channels(x, repeats)`; weight, bias and running statistics have
    the C·repeats entries (and names) of that BatchNorm. In training mean, variance and x̂ are computed once per
    distinct channel: the copies would only compute the same numbers again (RepBNN, section 4.4).
    beta: the expansion factor; repeats is b² after a RepConv (the default) and b after a first layer.
    by_batch: what normalises, repeats, scales and shifts in training instead of torch's operations; see `ByBatch`.
    """

    by_batch: ByBatch | None = None

    def __init__(self, num_features: int, repeats: int = 1, beta: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.repeats = repeats
        self.beta = math.isqrt(repeats) if beta is None else beta

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        if not self.training and self.running_mean is not None and self.running_var is not None:
            # Copies may have running statistics of their own (a transform tiles those of the source network), and the
            # sign that follows decides on the last bit of a plain BatchNorm: so it is one, over the repeated tensor.
            return super().forward(repeat_channels(x, self.repeats))
        if self.by_batch is not None and self.weight is not None and x.dim() == 4:
            return self._by_batch(self.by_batch, x)
        normalised = self._normalise(x)
        at = _channel_axis(normalised)
        out = normalised.movedim(1, at).unsqueeze(at)
        if self.weight is not None:
            copies = (self.repeats, x.shape[1], *[1] * (out.dim() - at - 2))
            out = torch.addcmul(self.bias.view(copies), out, self.weight.view(copies))
        return _repeated(out, at, self.repeats).flatten(at, at + 1).movedim(at, 1)

    def _by_batch(self, by_batch: ByBatch, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(f"BatchNorm in training: input {tuple(x.shape)}; expected 2 or more values per channel")
        values, mean, var = by_batch(x, self.weight, self.bias, self.eps)
        self._track(mean, var * (count / (count - 1)))
        return values

    def _normalise(self, x: Tensor) -> Tensor:
        """x̂ by batch statistics, (N, C, ...); updates the running statistics of all copies."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return F.batch_norm(x, None, None, training=True, eps=self.eps)
        c = x.shape[1]
        dtype, device = self.running_mean.dtype, self.running_mean.device
        mean, var = torch.zeros(c, dtype=dtype, device=device), torch.ones(c, dtype=dtype, device=device)
        normalised = F.batch_norm(x, mean, var, training=True, momentum=1.0, eps=self.eps)
        self._track(mean, var)
        return normalised

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics of all copies towards those of a batch, (C,), var unbiased."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.view(self.repeats, -1).lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.view(self.repeats, -1).lerp_(var.to(self.running_var.dtype), momentum)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, repeats={self.repeats}"  # type: ignore[no-untyped-call]


class RepBatchNorm1d(_RepBatchNorm, nn.BatchNorm1d):
    """See _RepBatchNorm; input (N, C) or (N, C, L)."""


class RepBatchNorm2d(_RepBatchNorm, nn.BatchNorm2d):
    """See _RepBatchNorm; input (N, C, H, W)."""


REP_BATCH_NORMS: dict[type[nn.Module], type[_RepBatchNorm]] = {
    nn.BatchNorm1d: RepBatchNorm1d,
    nn.BatchNorm2d: RepBatchNorm2d,
}


def is_batch_norm(module: nn.Module | None) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    """Whether a module computes what torch's BatchNorm does, and nothing of its own beside it, as a subclass may."""
    known = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward, _RepBatchNorm.forward)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).forward in known


class RepLayerNorm(nn.LayerNorm):
    """LayerNorm of each replica by itself, with scales and shifts of its own.

    Takes and gives (N·β·W, ..., C), replicas as samples; weight and bias have β·C entries, replica after replica.
    """

    rep_beta: int

    def forward(self, x: Tensor, samples: int | None = None) -> Tensor:
        out = replicas_of(F.layer_norm(x, self.normalized_shape, eps=self.eps), self.rep_beta, samples)
        own = (self.rep_beta, *[1] * (x.ndim - 1), -1)
        out = out * self.weight.view(own)
        if self.bias is not None:
            out = out + self.bias.view(own)
        return out.flatten(0, 2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.rep_beta}"


class ChannelSelect(nn.Module):
    """x[:, index]: the inputs that a last layer takes (ways 2 and 3), or a reordering of replicas.

    index: the channels taken, along axis 1 (`axis`, for operands without a batch). A plain prefix is a slice and copies
    nothing.
    """

    index: Tensor

    def __init__(self, index: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("index", index, persistent=False)
        self.prefix = bool(torch.equal(index, torch.arange(len(index))))

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, 0, len(self.index)) if self.prefix else x.index_select(self.axis, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} channels"


# Replicas as samples. W rows of axis 0 belong to each sample (windows of an image, say): 1 if `samples`, N, is None.


def fold(x: Tensor, beta: int, samples: int | None = None) -> Tensor:
    """(N·W, β·C, ...) in replicas of C → (N·β·W, C, ...): an operation without parameters then sees the source's
    shape."""
    if samples is not None:
        by_sample: Tensor = _rows(x, samples).unflatten(2, (beta, -1))
        return by_sample.movedim(2, 1).flatten(0, 2)
    if _channel_axis(x) == 1:
        return x.reshape(x.shape[0] * beta, x.shape[1] // beta, *x.shape[2:])
    replicas: Tensor = x.movedim(1, 3).unflatten(3, (beta, -1)).movedim(3, 1)
    return replicas.flatten(0, 1).movedim(3, 1)


def unfold(x: Tensor, beta: int, samples: int | None = None) -> Tensor:
    """(N·β·W, C, ...) → (N·W, β·C, ...), the reverse of `fold`."""
    if samples is not None:
        return replicas_of(x, beta, samples).movedim(1, 2).flatten(2, 3).flatten(0, 1)
    if _channel_axis(x) == 1:
        return x.reshape(x.shape[0] // beta, beta * x.shape[1], *x.shape[2:])
    replicas: Tensor = x.movedim(1, 3).unflatten(0, (-1, beta)).movedim(1, 3)
    return replicas.flatten(3, 4).movedim(3, 1)


def fold_last(x: Tensor, beta: int, samples: int | None = None) -> Tensor:
    """(N·W, ..., β·C) → (N·β·W, ..., C): `fold` where channels come last."""
    replicas: Tensor = _rows(x, samples).unflatten(-1, (beta, -1))
    return replicas.movedim(-2, 1).flatten(0, 2)


def unfold_last(x: Tensor, beta: int, samples: int | None = None) -> Tensor:
    """(N·β·W, ..., C) → (N·W, ..., β·C), the reverse of `fold_last`."""
    return replicas_of(x, beta, samples).movedim(1, -2).flatten(-2).flatten(0, 1)


def repeat_last(x: Tensor, beta: int, samples: int | None = None) -> Tensor:
    """(N·W, ..., O/β) → (N·β·W, ..., O): a RepConv's output over the last axis, repeated β² times and folded."""
    return repeat_batch(torch.cat([x] * beta, -1), beta, samples)


def replicas_of(x: Tensor, beta: int, samples: int | None = None) -> Tensor:
    """(N·β·W, ...) → (N, β, W, ...)."""
    replicas: Tensor = _rows(x, None if samples is None else samples * beta).unflatten(0, (-1, beta))
    return replicas


def _rows(x: Tensor, samples: int | None) -> Tensor:
    """(N·W, ...) → (N, W, ...)."""
    rows: Tensor = x.unflatten(0, (-1, 1) if samples is None else (samples, -1))
    return rows


def first_replica(x: Tensor, beta: int) -> Tensor:
    """(N·β, C, ...) → (N, C, ...): one replica of a folded tensor."""
    return x[::beta]


def mean_of_replicas(x: Tensor, beta: int) -> Tensor:
    """(N·β, ...) → (N, ...): what the replicas of a folded tensor have in the mean; of whole numbers, what one has."""
    return x.unflatten(0, (-1, beta)).mean(1) if x.is_floating_point() else first_replica(x, beta)


def repeat_batch(x: Tensor, beta: int, samples: int | None = None) -> Tensor:
    """(N·W, ...) → (N·β·W, ...): each sample β times, beside the replicas of a folded tensor."""
    if samples is None:
        return x.repeat_interleave(beta, 0)
    return _rows(x, samples).repeat_interleave(beta, 0).flatten(0, 1)


def add_channels(x: Tensor, beta: int) -> Tensor:
    """(N, C, ...) → (N, β·C, ...): an unexpanded tensor beside an expanded one."""
    return repeat_channels(x, beta)
