"""The blocks of a captured network that a fused kernel can run: a binary convolution and what follows it.

    [shift] → binary convolution → [BatchNorm or RepBatchNorm] → [+ residual] → [hardtanh | PReLU with its shifts]

Blocks are matched by what modules do (`forms`, and a shift by its effect) and by torch's own types, all of them before
anything is replaced. A block ends where the pattern does, or where a value is used by somebody else as well; `then`
names what comes next. What cannot run fused at all is a `Miss` with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repbnn_cli.deploy.forms import BinaryForm, binary_form
from repbnn_cli.graph import Network
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.kernels.blocks import Activation, PackedBlock
from repbnn_cli.kernels.packing import pack_kernel
from repbnn_cli.recognize import Layer
from repbnn_cli.rep_layers import is_batch_norm
from repbnn_cli.restoring import unchanged

_SUMS = (operator.add, operator.iadd, torch.add)
_WRITING = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


@dataclass(frozen=True)
class Match:
    """One block. nodes: what it replaces, in order; residual: the node added; shift: the RSign node before it.

    parts: what it does, in words; then: what follows and is not part of it, where a convolution's own epilogue was
    expected ("max_pool2d"); centred: see BinaryForm.
    """

    path: str
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
    for node in network.graph.nodes:
        layer = layers.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or not layer.kernel_shape or not layer.binary:
            continue
        found = matcher.block(node, layer)
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
        self.root = network.module
        self._taken: set[fx.Node] = set()  # a sum of two blocks belongs to the first
        self._forms: dict[str, BinaryForm | str] = {}
        self._shifts: dict[str, Tensor | None] = {}

    def block(self, node: fx.Node, layer: Layer) -> Match | Miss:
        path = str(node.target)
        form = self._form(path, layer)
        if isinstance(form, str):
            return Miss(path, form)
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return Miss(path, "it is called with more than its input")
        end = self._epilogue(node, form)
        if written := self._written(node.args[0], end):
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
        return Match(path, block, tuple(end.nodes), node.args[0], end.residual, form.centred, tuple(end.parts), then)

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
        if writes_in_place(self.root, node) and node.args[0] is not last:  # x += block: others may read x later
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
        if isinstance(module, nn.Hardtanh):
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
        if node is None or not isinstance(prelu, nn.PReLU):
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

    def _written(self, given: fx.Node, end: _Epilogue) -> str | None:
        """An operand that somebody writes to between the block's first node and its last, where the block reads it."""
        node = end.nodes[0]
        while node is not end.nodes[-1]:
            node = node.next
            operand = node.args[0] if node.args else None
            if node not in end.nodes and operand in (given, end.residual) and writes_in_place(self.root, node):
                return str(operand)
        return None

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
        return module

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
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, channels, 2, 3), generator=generator).to(like.device)
    with unchanged(module), torch.no_grad():
        try:
            values = module(torch.zeros_like(x))[0, :, 0, 0]
            same = torch.equal(module(x), x + values.view(1, -1, 1, 1))
        except Exception:  # wants other shapes, so it is no shift of (N, C, H, W)
            return None
    return values.detach().float() if same else None


def writes_in_place(root: nn.Module, node: fx.Node) -> bool:
    """Whether a call changes its first argument."""
    if node.op == "call_module":
        return bool(getattr(fetch(root, str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace")) or node.target in _WRITING or (name.endswith("_") and name[0] != "_")


def folded(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation as (scale, shift), (C,) float64: weight/√(var + ε), bias − mean·scale."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm without running statistics depends on its batch")
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()
