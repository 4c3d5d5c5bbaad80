"""The merged-kernel identity of `shared/reptran.md`, written a second time: whole networks, by values alone.

Neither plan nor `verify` is used. The Rep network runs once and the inputs of its RepConvs are kept. Then the SOURCE
network runs, each of those convolutions replaced by one that applies, to the same binarised input, the real kernel

    M[c] = Σ over input replicas b of K[c mod O/β, inputs of replica b]

Which source channel an input of K stands for is found by looking: it has the same values.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repbnn_cli.binary_conv import BinaryConv2d, GatedConv2d, RBNNConv2d, ReCUConv2d
from repbnn_cli.rep_layers import RepMixin

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear, BinaryConv2d)


def both(
    source: nn.Module, rep: nn.Module, x: Tensor, *, fresh: bool = False, train: bool = False
) -> tuple[Tensor, Tensor, dict[str, list[int]]]:
    """(Rep logits, reference logits, module path → source channel of each of its inputs), all in float64.

    fresh: the Rep network did not inherit; what it did not resize is then taken over from it.
    train: with batch statistics, as in a first training step.
    """
    source, rep = (copy.deepcopy(network).double().train(train) for network in (source, rep))
    x = x.double()
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        own = dict(rep.named_modules())
        layers = {p: (m, own[p]) for p, m in source.named_modules() if isinstance(m, LAYERS)}
        changed = {p for p, (m, r) in layers.items() if isinstance(r, RepMixin) or _inputs(r) != _inputs(m)}
        hooks = [own[p].register_forward_pre_hook(_keeper(seen, p)) for p in layers]
        actual = rep(x)
        for hook in hooks:
            hook.remove()
        changed = {p for p in changed if p in seen} | {list(seen)[-1]}  # way 2 leaves the last layer's size
        if fresh:
            _take_over(source, rep)
        _normalise_as(source, rep)
        merged = {}
        for path in changed:
            module, repeating = layers[path]
            kind = Merged if isinstance(repeating, RepMixin) else Last
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and kind is Last:
                continue  # a tiled depthwise convolution
            merged[path] = kind(module, repeating, seen[path])
            _put(source, path, merged[path])
        expected = source(x)
    return actual, expected, {p: m.index for p, m in merged.items()}


def assert_identical(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    assert scale > 0
    assert float((actual - expected).abs().max() / scale) < 1e-9


class Merged(nn.Module):
    """A source convolution or linear layer with the kernel M; only stride, padding and groups are the source's."""

    def __init__(self, source: nn.Module, rep: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__()
        self.source, self.rep, self.inputs = [source], [rep], inputs
        self.index: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        source, rep = self.source[0], self.rep[0]
        groups = getattr(source, "groups", 1)
        blocks = zip(self.inputs.pop(0).chunk(groups, 1), x.chunk(groups, 1), strict=True)
        found = [source_channels(mine, theirs) for mine, theirs in blocks]  # a group takes its own channels only
        self.index = [group * (x.shape[1] // groups) + c for group, part in enumerate(found) for c in part]
        kernel = rep.binary_weight() if hasattr(rep, "binary_weight") else rep.weight
        signs = source.binarize_input(x) if hasattr(source, "binarize_input") else x
        out = _outputs(source)
        rows = shared_rows(out, len(kernel), groups)
        merged = merge(kernel, self.index, x.shape[1], groups)[rows]

        def of_channel(values: Tensor) -> Tensor:  # (O/β, 1, 1) or (1, O/β, 1, 1) → one per source channel
            return values.flatten()[rows].view(-1, *[1] * (x.ndim - 2))

        if isinstance(source, nn.Linear):
            return F.linear(signs, merged, None if rep.bias is None else rep.bias[rows])
        convolve = F.conv1d if isinstance(source, nn.Conv1d) else F.conv2d

        def run(values: Tensor) -> Tensor:
            return convolve(values, merged, None, source.stride, source.padding, groups=groups)

        if isinstance(source, GatedConv2d):
            coarse = run(signs.sign()) * 2 / 3
            refined = torch.sigmoid(5 * (coarse - of_channel(rep.threshold))) > 0.5
            return torch.where(refined, run(signs), coarse)
        result = run(signs)
        if isinstance(source, RBNNConv2d | ReCUConv2d):
            result = result * of_channel(rep.alpha)
        if getattr(rep, "bias", None) is not None:
            result = result + of_channel(rep.bias)
        return result


class Last(nn.Module):
    """A last layer. Where its inputs stand for every source channel it must act as the source's own one does; where
    they do not (way 3), each weight goes to the source channel that its input stands for."""

    def __init__(self, source: nn.Module, rep: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__()
        self.source, self.rep, self.inputs = [source], [rep], inputs
        self.index: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        source, rep = self.source[0], self.rep[0]
        self.index = source_channels(self.inputs.pop(0), x)
        if set(self.index) == set(range(x.shape[1])):
            return source(x)
        weight = merge(rep.weight, self.index, x.shape[1], 1)
        return F.linear(x, weight, rep.bias) if weight.ndim == 2 else F.conv2d(x, weight, rep.bias)


def source_channels(expanded: Tensor, x: Tensor) -> list[int]:
    """For each channel of `expanded` the channel of `x` with its values; of several equal ones the plain tile's."""
    channels = x.shape[1]
    direction = torch.randn(x[:, 0].numel(), generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    mine, theirs = (t.transpose(0, 1).flatten(1) @ direction for t in (expanded, x))
    nearest = (mine[:, None] - theirs[None, :]).abs().argmin(1)
    plain = torch.arange(len(mine)) % channels
    scale = x.abs().max() + 1e-300
    fits = (expanded - x[:, plain]).abs().transpose(0, 1).flatten(1).amax(1) <= 1e-9 * scale
    index = torch.where(fits, plain, nearest)
    assert float((expanded - x[:, index]).abs().max() / scale) < 1e-9, (
        "an expanded channel stands for no source channel"
    )
    return index.tolist()


def merge(kernel: Tensor, index: list[int], channels: int, groups: int) -> Tensor:
    """Σ over replicas: columns of `kernel` (O, J/groups, ...) that stand for the same source channel, added up."""
    per, rows, width = channels // groups, len(kernel) // groups, len(index) // groups
    merged = []
    for group in range(groups):
        own = torch.tensor(index[group * width : (group + 1) * width]) - group * per
        block = kernel[group * rows : (group + 1) * rows]
        merged.append(block.new_zeros(rows, per, *block.shape[2:]).index_add_(1, own, block))
    return torch.cat(merged)


def shared_rows(out: int, rows: int, groups: int) -> list[int]:
    """The row of K that gives source channel c: c mod O/β, within each group's own block of channels."""
    block, short = out // groups, rows // groups
    return [(c // block) * short + (c % block) % short for c in range(out)]


def _keeper(seen: dict[str, list[Tensor]], path: str):
    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(path, []).append(args[0].clone())

    return keep


def _inputs(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def _outputs(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _normalise_as(source: nn.Module, rep: nn.Module) -> None:
    """A BatchNorm before the repeat has O/β channels: each source channel gets what its shared one has."""
    for path, module in source.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        other = rep.get_submodule(path)
        short, size = other.num_features, module.num_features
        if short >= size:
            continue
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(module, name).copy_(getattr(other, name).repeat(size // short))


def _take_over(source: nn.Module, rep: nn.Module) -> None:
    """Fresh values: tensors of unchanged size as they are, per-channel ones (all alike) as many as fit."""
    own = dict(rep.named_parameters()) | dict(rep.named_buffers())
    for name, tensor in (*source.named_parameters(), *source.named_buffers()):
        if tensor.shape == own[name].shape:
            tensor.copy_(own[name])
        elif tensor.ndim == 1 or (tensor.ndim == 4 and tensor.shape[0] == 1):
            flat = own[name].flatten()
            assert bool((flat == flat[0]).all()) or flat.numel() < tensor.numel(), name
            tensor.fill_(float(flat[0]))
