"""How many operations a call takes: one table per sort of thing, all of it arithmetic on shapes.

Every handler takes a `Call` and gives a `Count` for ONE input of the network. What is in none of the tables is unknown:
`count` gives None and the profiler lists it. Convention: 1 MAC = 1 operation, biases are not counted.

Shape letters: N batch, O and I output and input channels, k the kernel's spatial sizes, b = β.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn

from repbnn_cli.binary_conv import BinaryConv2d, FracConv2d, GatedConv2d, RBNNConv2d
from repbnn_cli.channels import operator_name
from repbnn_cli.graph.functional import ConvolutionCall
from repbnn_cli.graph.interception import FunctionCall
from repbnn_cli.graph.probe import ConvFacts
from repbnn_cli.layers import ChannelDuplicate, ChannelPad, LearnableBias, ThermometerEncoder
from repbnn_cli.recognize import CONVOLUTIONS, Layer
from repbnn_cli.rep_layers import ChannelSelect, RepBatchNorm1d, RepBatchNorm2d, Repeat

Kind = Literal["fc", "conv", "bn", "bconv", "other"]

# Operands of more bits are float to the machine: 1-bit weights with float activations are FLOPs.
MOST_BINARY_BITS = 8


@dataclass(frozen=True)
class Count:
    """Operations of one call. flops: float operations; bops: MACs × weight bits × activation bits; other: elementwise.

    The bit widths are those of the operands of a convolution or linear layer, None for everything else.
    """

    kind: Kind = "other"
    macs: int = 0
    flops: int = 0
    bops: int = 0
    other: int = 0
    weight_bits: int | None = None
    activation_bits: int | None = None

    @property
    def costs(self) -> bool:
        return bool(self.macs or self.flops or self.bops or self.other)


@dataclass(frozen=True)
class Call:
    """A node of the graph with what a handler wants to know of it."""

    node: fx.Node
    batch: int
    module: nn.Module | None = None
    layer: Layer | None = None

    @property
    def name(self) -> str:
        return name_of(self.node)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that go in, in order; also those in lists and tuples."""
        return [t for n in self.node.all_input_nodes for t in _tensors(n.meta["value"])]

    @property
    def output(self) -> Tensor:
        return _tensors(self.node.meta["value"])[0]

    @property
    def size_in(self) -> int:
        """Elements of the first tensor that goes in, per input of the network."""
        return self.inputs[0].numel() // self.batch

    @property
    def size_out(self) -> int:
        return sum(t.numel() for t in _tensors(self.node.meta["value"])) // self.batch

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument's value, computed sizes included."""
        args, kwargs = self.node.args, self.node.kwargs
        given = kwargs[name] if name in kwargs else (args[position] if len(args) > position else default)
        return fx.map_arg(given, lambda n: n.meta["value"])


Handler = Callable[[Call], Count]


def name_of(node: fx.Node) -> str:
    """What the tables call a function: the bare name of torch's, "repbnn.NAME" for ours, else with its module."""
    name, target = operator_name(node), node.target
    if isinstance(target, FunctionCall):  # a user's may be called like one of ours
        name = f"{target.__module__}.{name}"
    if not name.startswith("repbnn_cli."):
        return name
    parts = name.split(".")
    return "repbnn." + ".".join(parts[-2:] if parts[-1] == "apply" else parts[-1:])


def count(call: Call) -> Count | None:
    """The operations of one call per input of the network; None where no table knows it."""
    handler = FUNCTIONS.get(call.name) if call.module is None else MODULES.get(type(call.module)) or _by_role(call)
    if handler is not None:
        return handler(call)
    # A function or module of the user's own that was seen to binarise its input: a sign each.
    return Count(other=call.size_out) if call.node.meta.get("binarises") else None


def is_free_function(name: str) -> bool:
    return name in FREE_FUNCTIONS


def _by_role(call: Call) -> Handler | None:
    layer = call.layer
    if layer is None:
        return None
    if layer.role in CONVOLUTIONS:
        return convolution
    if layer.role in ("unknown", "weightless"):  # such a module may still convolve in a way that was seen
        return _seen_convolutions if call.node.meta.get("convs") else None
    return {"batch_norm": batch_norm, "per_channel": _per_channel}.get(layer.role)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions and products


def convolution(call: Call) -> Count:
    """Output positions × kernel elements MACs (of a transposed convolution input positions); a repeat of the output is
    a copy and costs none.

    Positions come from the convolution itself where it was seen to run, else from the module's output.
    """
    layer = call.layer
    assert layer is not None
    kernel = math.prod(layer.kernel_shape)
    seen: list[ConvFacts] = call.node.meta.get("convs", [])
    if seen and not isinstance(call.module, BinaryConv2d):
        positions = sum(c.positions for c in seen) // call.batch
        outputs = seen[-1].outputs // call.batch
    else:
        channels = call.output.shape[-1 if layer.role.endswith("linear") else 1]
        positions = call.size_out // channels * layer.convolutions
        outputs = call.size_out // channels * layer.out_channels
    kind: Kind = "fc" if layer.role.endswith("linear") else "conv"
    around = _around(call, outputs)
    return _of_macs(positions * kernel, kind, layer.weight_bits, layer.activation_bits, around)


def _of_macs(macs: int, kind: Kind, weight_bits: int, activation_bits: int, other: int = 0) -> Count:
    """A count in the precision of the widest operand: binary when both are of few bits, else float."""
    if max(weight_bits, activation_bits) <= MOST_BINARY_BITS:
        bops = macs * weight_bits * activation_bits
        return Count("bconv", macs, 0, bops, other, weight_bits, activation_bits)
    return Count(kind, macs, macs, 0, other, weight_bits, activation_bits)


# Elementwise work of our binary convolutions: per input element, per convolution output element.
# Everyone: sign. RBNN: mean, centring, variance and division before it. Scale per filter, where the kind has one;
# a gate instead: threshold and choice.
_AROUND: Mapping[type, tuple[int, int]] = {
    BinaryConv2d: (1, 1),
    RBNNConv2d: (5, 1),
    FracConv2d: (1, 0),
    GatedConv2d: (1, 2),
}


def _around(call: Call, outputs: int) -> int:
    layer = call.layer
    assert layer is not None
    if isinstance(call.module, BinaryConv2d):
        before, after = next(_AROUND[c] for c in type(call.module).__mro__ if c in _AROUND)
        return before * call.size_in + after * outputs
    if type(call.module).__module__.startswith("torch.nn.") or isinstance(call.module, ConvolutionCall):
        return 0  # whatever binarises its operands is in the graph, and counted there
    scales = sum(name.rpartition(".")[2] != "bias" for name in layer.out_tensors)
    signs = layer.activation_bits <= MOST_BINARY_BITS
    return signs * call.size_in + scales * outputs


def _seen_convolutions(call: Call) -> Count:
    """A module of an unknown role: the convolutions that it was seen to run, each by its own kernel."""
    seen: list[ConvFacts] = call.node.meta["convs"]
    macs = sum(c.positions // call.batch * math.prod(c.kernel_shape) for c in seen)
    kind: Kind = "fc" if all(c.kind == "linear" for c in seen) else "conv"
    return _of_macs(macs, kind, max(c.weight_bits for c in seen), max(c.activation_bits for c in seen))


def _transposed(call: Call) -> Count:
    """Every input position meets the kernel (I, O/groups, k...) once."""
    module: Any = call.module
    kernel = module.weight if module is not None else call.argument(1, "weight")
    return _of_macs(call.size_in // kernel.shape[0] * kernel.numel(), "conv", 32, 32)


def _functional_convolution(call: Call) -> Count:
    kernel: Tensor = call.argument(1, "weight")
    return _of_macs(call.size_out // kernel.shape[0] * kernel.numel(), "conv", 32, 32)


def _product(call: Call) -> Count:
    """Matrix products and F.linear: output elements × the length of the summed axis. Binary where both factors were
    seen to be, as in the attention of binary transformers."""
    position, name = {"addmm": (1, "mat1"), "baddbmm": (1, "batch1"), "addmv": (1, "mat")}.get(call.name, (0, "input"))
    operand: Tensor = call.argument(position, name)
    return _of_macs(call.size_out * operand.shape[-1], "fc", *call.node.meta.get("bits", (32, 32)))


def _attention(call: Call) -> Count:
    """softmax(Q·Kᵀ)·V, Q (..., L, E), K (..., S, E), V (..., S, D): L·S·(E + D) MACs per head, 3·L·S for softmax."""
    query, key, value = (call.argument(i, n) for i, n in enumerate(("query", "key", "value")))
    scores = query.shape[:-1].numel() * key.shape[-2] // call.batch
    macs = scores * (query.shape[-1] + value.shape[-1])
    return Count("fc", macs, macs, 0, 3 * scores, 32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation


def batch_norm(call: Call) -> Count:
    """2 per output element: normalise and scale.

    After a repeat the normalisation of the copies is shared: C/β distinct channels are normalised for β·C scaled ones
    (section 4.4), so that the cost becomes (1/(2β) + β/2) × that of C channels. The paper's Table 1 counts the
    BatchNorm behind the first layer in the same way, although all C channels are distinct there.
    """
    elements = call.size_out
    beta = call.module.beta if isinstance(call.module, RepBatchNorm1d | RepBatchNorm2d) else 1
    return Count("bn", flops=elements + elements // (beta * beta))


def _statistics_norm(call: Call) -> Count:
    """Layer, group and instance norms compute their statistics at inference: mean, variance, normalise, scale."""
    return Count(other=4 * call.size_out)


# ---------------------------------------------------------------------------------------------------------------------
# Elementwise work, in operations that OPs do not hold


def per_output(operations: int) -> Handler:
    return lambda call: Count(other=operations * call.size_out)


def per_input(operations: int) -> Handler:
    return lambda call: Count(other=operations * call.size_in)


def _per_channel(call: Call) -> Count:
    """Somebody else's per-channel layer: one operation per output element and per-channel tensor."""
    assert call.layer is not None
    return Count(other=max(1, len(call.layer.in_tensors)) * call.size_out)


def _window(call: Call) -> Count:
    """Pooling: one operation per element of each window."""
    size = call.module.kernel_size if call.module is not None else call.argument(1, "kernel_size")
    ndim = call.output.ndim - 2
    elements = math.prod(size) if isinstance(size, tuple | list) and len(size) > 1 else _single(size) ** ndim
    return Count(other=elements * call.size_out)


def _single(size: Any) -> int:
    return int(size[0] if isinstance(size, tuple | list) else size)


_INTERPOLATION = {"nearest": 0, "nearest-exact": 0, "linear": 2, "bilinear": 4, "trilinear": 8, "bicubic": 16}


def _interpolate(call: Call) -> Count:
    """As many operations per output element as it blends input elements."""
    mode = call.module.mode if call.module is not None else call.argument(3, "mode", "nearest")
    return Count(other=_INTERPOLATION.get(str(mode), 1) * call.size_out)


def _free(call: Call) -> Count:
    return Count()


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def _each(handler: Handler, functions: str) -> dict[str, Handler]:
    return dict.fromkeys(functions.split(), handler)


# Shape bookkeeping, copies and constants: they compute nothing.
FREE_FUNCTIONS = names(
    """
    getattr getitem setitem size dim numel view view_as reshape reshape_as flatten unflatten permute transpose
    swapaxes movedim t chunk split tensor_split narrow select unsqueeze squeeze expand expand_as repeat
    repeat_interleave tile cat concat concatenate stack unbind index_select gather take roll flip pad unfold
    channel_shuffle pixel_shuffle pixel_unshuffle native_channel_shuffle broadcast_to embedding one_hot diagonal
    contiguous clone detach to type type_as float double half bfloat16 bool int long cpu cuda identity requires_grad
    copy zeros ones full empty arange linspace tensor eye as_tensor zeros_like ones_like full_like empty_like
    new_zeros new_ones new_full new_empty dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
    repbnn.set_data repbnn.fold repbnn.unfold repbnn.fold_last repbnn.unfold_last repbnn.repeat_last
    repbnn.repeat_batch
    repbnn.add_channels repbnn.first_replica repbnn._with_ndim
    """
)

FUNCTIONS: Mapping[str, Handler] = {
    **_each(
        per_output(1),
        """
        add sub mul div truediv floordiv pow neg abs positive relu relu6 hardtanh clamp clip clamp_min clamp_max sigmoid
        tanh sign sgn leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid softplus softsign logsigmoid
        hardshrink softshrink threshold prelu rrelu exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin
        cos tan atan erf round floor ceil trunc frac where maximum minimum eq ne lt le gt ge logical_and logical_or
        logical_not logical_xor radd rsub rmul rtruediv rdiv rpow iadd isub imul itruediv ifloordiv ipow imod iand ior
        ixor masked_fill nan_to_num heaviside isnan isinf isfinite and or xor invert bitwise_and bitwise_or bitwise_not
        mod remainder fmod bernoulli uniform normal rand_like randn_like
        repbnn._STESign.apply repbnn._ApproxSign.apply repbnn._EDESign.apply
        repbnn._RBNNSign.apply repbnn._GateStep.apply
        """,
    ),
    **_each(per_output(2), "addcmul addcdiv lerp hypot repbnn._ScaledSign.apply"),
    # clip, scale, round
    **_each(per_output(3), "repbnn._UniformQuantize.apply"),
    **_each(
        per_input(1),
        "mean sum amax amin max min prod any all argmax argmin cumsum cumprod count_nonzero adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "repbnn.mean_of_replicas",
    ),
    **_each(per_input(2), "norm logsumexp"),
    # exponential, sum, division; square, sum, division; mean, centring, square
    **_each(per_input(3), "softmax log_softmax softmin normalize var std"),
    **_each(_window, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d"),
    **_each(_interpolate, "interpolate upsample"),
    **_each(batch_norm, "batch_norm"),
    **_each(_statistics_norm, "layer_norm group_norm instance_norm rms_norm"),
    **_each(_functional_convolution, "conv1d conv2d conv3d"),
    **_each(_transposed, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_each(_product, "linear matmul mm bmm mv addmm baddbmm addmv"),
    **_each(_attention, "scaled_dot_product_attention"),
}

MODULES: Mapping[type, Handler] = {
    **dict.fromkeys(
        (
            nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
            nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardshrink,
            nn.Softshrink, nn.Threshold, nn.PReLU, nn.RReLU, LearnableBias,
        ),
        per_output(1),
    ),
    **dict.fromkeys(
        (
            nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
            nn.AlphaDropout, nn.FeatureAlphaDropout, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d,
            nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
            nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d,
            nn.CircularPad3d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Embedding, nn.Unfold,
            ChannelPad, ChannelDuplicate, ChannelSelect, Repeat,
        ),
        _free,
    ),
    **dict.fromkeys(
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d),
        _window,
    ),
    **dict.fromkeys(
        (
            nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
            nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
        ),
        per_input(1),
    ),
    **dict.fromkeys((nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin), per_input(3)),
    **dict.fromkeys(
        (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _statistics_norm
    ),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _interpolate),
    # 8-bit pixel to 32 planes of ±1: a comparison per plane (and two operations per pixel, 1/16 of that)
    ThermometerEncoder: per_output(1),
}  # fmt: skip


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple | list) else []
