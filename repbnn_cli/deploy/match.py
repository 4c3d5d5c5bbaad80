"""The blocks of a captured network that a fused kernel can run: a binary convolution and what follows it.

    [shift] → binary convolution → [BatchNorm or RepBatchNorm] → [+ residual] → [hardtanh | PReLU with its shifts]

Blocks are matched by what modules do (`forms`, and a shift by its effect) and by torch's own types, all of them before
anything is replaced. A block ends where the pattern does, or where a value is used by somebody else as well; `then`
names what comes next. What cannot run fused at all is a `Miss` with the reason.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repbnn_cli.deploy.forms import BinaryForm, binary_form, of_all_sizes
from repbnn_cli.deploy.writes import Writes
from repbnn_cli.graph import Network
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.kernels.blocks import Activation, PackedBlock
from repbnn_cli.kernels.packing import pack_kernel
from repbnn_cli.profiler.liveness import written_by
from repbnn_cli.recognize import Layer
from repbnn_cli.rep_layers import is_batch_norm
from repbnn_cli.restoring import unchanged

_SUMS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class Match:
    """One block. nodes: what it replaces, in order; residual: the node added; call: which call of its module it is.

    parts: what it does, in words; then: what follows and is not part of it, where a convolution's own epilogue was
    expected ("max_pool2d"); centred: see BinaryForm.
    """

    path: str
    call: int
    block: PackedBlock
    nodes: tuple[fx.Node, ...]
    input: fx.Node
    residual: fx.Node | None
    centred: bool
    parts: tuple[str, ...]
    then: str | None

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


@dataclass(frozen=True)
class Miss:
    """A binary convolution that stays as it is. reason: half a sentence."""

    path: str
    reason: str


@dataclass(frozen=True)
class Matches:
    """matched and missed cover every call of a layer with 1-bit weights; shifts: RSign node → its values (C,)."""

    matched: tuple[Match, ...]
    missed: tuple[Miss, ...]
    shifts: Mapping[fx.Node, Tensor]


def match(network: Network, layers: Mapping[str, Layer]) -> Matches:
    """All blocks of a network in eval mode, in order of the graph; reads the network, changes nothing."""
    matcher = _Matcher(network)
    matched, missed, shifts = [], [], {}
    calls: Counter[int] = Counter()
    for node in network.graph.nodes:
        layer = layers.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or not layer.kernel_shape or not layer.binary:
            continue
        module = id(fetch(network.module, str(node.target)))
        found = matcher.block(node, layer, calls[module])
        calls[module] += 1
        if isinstance(found, Miss):
            missed.append(found)
            continue
        matched.append(found)
        values = matcher.shift_of(found.input)
        if values is not None:
            shifts[found.input] = values
    return Matches(tuple(matched), tuple(missed), shifts)


@dataclass
class _Epilogue:
    """What follows a convolution, as it is collected: the affine map in float64, then what it is added to."""

    scale: Tensor
    shift: Tensor
    repeats: int
    nodes: list[fx.Node]
    parts: list[str]
    residual: fx.Node | None = None
    activation: Activation = "none"
    rprelu: Tensor | None = field(default=None)


class _Matcher:
    def __init__(self, network: Network) -> None:
        self.network, self.root = network, network.module
        self._writes = Writes(network)
        self._taken: set[fx.Node] = set()  # a sum of two blocks belongs to the first
        self._forms: dict[str, BinaryForm | str] = {}
        self._shifts: dict[str, Tensor | None] = {}

    def block(self, node: fx.Node, layer: Layer, call: int) -> Match | Miss:
        path = str(node.target)
        form = self._form(path, layer)
        if isinstance(form, str):
            return Miss(path, form)
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return Miss(path, "it is called with more than its input")
        end = self._epilogue(node, form)
        read = [n for n in (node.args[0], end.residual) if n is not None]
        if written := self._writes.between(node, end.nodes[-1], read, own=end.nodes):
            return Miss(path, f"{written} is changed in place before the block ends")
        self._taken |= set(end.nodes)
        block = PackedBlock(
            pack_kernel(form.kernel),
            form.kernel.shape[1],
            end.scale.float(),
            end.shift.float(),
            repeats=end.repeats,
            stride=form.stride,
            padding=form.padding,
            residual=end.residual is not None,
            activation=end.activation,
            rprelu=end.rprelu,
        )
        then = None
        if not any("BatchNorm" in part for part in end.parts):
            following = self._next(end.nodes[-1])
            then = "several uses" if following is None else self._name(following)
        return Match(
            path, call, block, tuple(end.nodes), node.args[0], end.residual, form.centred, tuple(end.parts), then
        )

    def _form(self, path: str, layer: Layer) -> BinaryForm | str:
        if layer.called:
            return "its kernel is computed in the forward, outside a module"
        if path not in self._forms:
            self._forms[path] = binary_form(fetch(self.root, path), layer.in_channels)
        return self._forms[path]

    # -- what follows the convolution --------------------------------------------------------------------------------
    def _epilogue(self, node: fx.Node, form: BinaryForm) -> _Epilogue:
        end = _Epilogue(
            form.scale.repeat(form.repeats), form.bias.repeat(form.repeats), form.repeats, [node], ["convolution"]
        )
        self._take_norm(end)
        self._take_sum(end)
        self._take_activation(end)
        return end

    def _take_norm(self, end: _Epilogue) -> None:
        node = self._following(end)
        norm = self._module(node)
        if node is None or not is_batch_norm(norm) or norm.running_mean is None or norm.running_var is None:
            return
        if norm.training:  # whatever the network is: it normalises by its batch
            return
        repeats = getattr(norm, "repeats", 1)
        scale, shift = folded(norm)
        end.scale, end.shift = end.scale.repeat(repeats) * scale, end.shift.repeat(repeats) * scale + shift
        end.repeats *= repeats
        end.nodes.append(node)
        end.parts.append("BatchNorm" + (f" ×{repeats}" if repeats > 1 else ""))

    def _take_sum(self, end: _Epilogue) -> None:
        last, node = end.nodes[-1], self._following(end)
        if node is None or len(node.args) != 2 or node.kwargs or not self._is_sum(node):
            return
        others = [a for a in node.args if a is not last]
        if len(others) != 1 or not isinstance(others[0], fx.Node):  # x + x, x + 1
            return
        if written_by(self.network, node) not in (None, last):  # x += block: others may read x later
            return
        mine, other = last.meta["value"], others[0].meta["value"]
        if not isinstance(other, Tensor) or other.shape != mine.shape:
            return
        end.residual = others[0]
        end.nodes.append(node)
        end.parts.append("residual")

    @staticmethod
    def _is_sum(node: fx.Node) -> bool:
        if node.op == "call_method":
            return node.target in ("add", "add_")
        return node.op == "call_function" and node.target in _SUMS

    def _take_activation(self, end: _Epilogue) -> None:
        node = self._following(end)
        if node is not None and self._is_hardtanh(node):
            end.activation = "hardtanh"
            end.nodes.append(node)
            end.parts.append("hardtanh")
            return
        self._take_rprelu(end)

    def _is_hardtanh(self, node: fx.Node) -> bool:
        module = self._module(node)
        if is_hardtanh(module):
            return (module.min_val, module.max_val) == (-1, 1)
        if node.op == "call_function" and node.target is F.hardtanh:
            bounds = dict(zip(("min_val", "max_val"), node.args[1:3], strict=False)) | dict(node.kwargs)
            return (bounds.get("min_val", -1.0), bounds.get("max_val", 1.0)) == (-1, 1)
        clamp = node.op == "call_function" and node.target is torch.clamp
        if clamp or (node.op == "call_method" and node.target == "clamp"):
            bounds = dict(zip(("min", "max"), node.args[1:3], strict=False)) | dict(node.kwargs)
            return (bounds.get("min"), bounds.get("max")) == (-1, 1)
        return False

    def _take_rprelu(self, end: _Epilogue) -> None:
        """[shift] → PReLU → [shift]. The second shift may be meant as the next sign's: the result is the same."""
        channels = len(end.scale)
        node = self._following(end)
        taken: list[fx.Node] = []
        before, after = (torch.zeros(channels, device=end.scale.device) for _ in range(2))
        shift = self.shift_of(node)
        if node is not None and shift is not None:
            before = shift
            taken.append(node)
            node = self._next(node)
        prelu = self._module(node)
        if node is None or not isinstance(prelu, nn.PReLU) or type(prelu).forward is not nn.PReLU.forward:
            return
        taken.append(node)
        following = self._next(node)
        shift = self.shift_of(following)
        if following is not None and shift is not None:
            after = shift
            taken.append(following)
        end.activation = "rprelu"
        end.rprelu = torch.stack([before, prelu.weight.detach().float().expand(channels), after])
        end.nodes += taken
        end.parts.append("RPReLU" if len(taken) > 1 else "PReLU")

    def _following(self, end: _Epilogue) -> fx.Node | None:
        """What the block could take next: the only user of its value, unless another block has it."""
        node = self._next(end.nodes[-1])
        return None if node in self._taken else node

    # -- small questions ---------------------------------------------------------------------------------------------
    @staticmethod
    def _next(node: fx.Node) -> fx.Node | None:
        """The only user of a value."""
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].op != "output" else None

    def _module(self, node: fx.Node | None) -> nn.Module | None:
        if node is None or node.op != "call_module":
            return None
        module: nn.Module = fetch(self.root, str(node.target))
        return None if is_hooked(module) else module

    def _name(self, node: fx.Node) -> str:
        module = self._module(node)
        return type(module).__name__ if module is not None else node.name.rstrip("_0123456789")

    def shift_of(self, node: fx.Node | None) -> Tensor | None:
        """The values (C,) of a module that adds one number per channel and does nothing else; None for any other."""
        module = self._module(node)
        if node is None or module is None or len(node.all_input_nodes) != 1:
            return None
        value = node.meta["value"]
        path = str(node.target)
        if path not in self._shifts:
            plain = isinstance(value, Tensor) and value.ndim == 4 and any(True for _ in module.parameters())
            self._shifts[path] = _shift(module, value.shape[1]) if plain else None
        return self._shifts[path]


def _shift(module: nn.Module, channels: int) -> Tensor | None:
    like = next(module.parameters())
    if like.numel() != channels or isinstance(module, _BatchNorm | nn.PReLU):
        return None
    x = of_all_sizes((2, channels, 4, 6)).to(like.device)
    with unchanged(module), torch.no_grad():
        try:
            values = module(torch.zeros_like(x))[0, :, 0, 0]
            same = torch.equal(module(x), x + values.view(1, -1, 1, 1))
        except Exception:  # wants other shapes, so it is no shift of (N, C, H, W)
            return None
    return values.detach().float() if same else None


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody's hook may change what a module takes or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_hardtanh(module: nn.Module | None) -> TypeGuard[nn.Hardtanh]:
    """Whether a module clamps as torch's Hardtanh does; a subclass may do something else."""
    return isinstance(module, nn.Hardtanh) and type(module).forward is nn.Hardtanh.forward


def folded(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation as (scale, shift), (C,) float64: weight/√(var + ε), bias − mean·scale."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm without running statistics depends on its batch")
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()
