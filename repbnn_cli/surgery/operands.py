"""How the parameters behind a convolution change that is called as a function with a kernel computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from repbnn_cli.graph.static import evaluate, roots
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.inherit import Columns, Kernel, Mean, Recipe, Tile, layout, turned
from repbnn_cli.recognize import Layer
from repbnn_cli.recognize.sides import Probe


class CannotTellError(Exception):
    """Why the parameters of a call cannot be resized, in words for a refusal, and a way out where there is another."""

    def __init__(self, what: str, remedy: str | None = None) -> None:
        super().__init__(what)
        self.remedy = remedy


def operand_recipes(
    module: nn.Module, kernel: fx.Node, bias: fx.Node | None, layer: Layer, way: Kernel | Columns | Tile,
    index: tuple[int, ...], after: tuple[int, ...],
) -> dict[str, Recipe]:  # fmt: skip
    """Path of each parameter that changes → how.

    way: what happens to the kernel; after: the shape that it then has; index: the source channel that each input
    channel stands for.
    """
    members = way.members if isinstance(way, Kernel) else None
    recipes: dict[str, Recipe] = {}
    held = {str(n.target): fetch(module, str(n.target)) for n in roots(kernel)}
    held = {n: t for n, t in held.items() if isinstance(t, Tensor) and t.numel() > 1}
    for name, (side, axis) in _sides(module, kernel, layer, held).items():
        if side == "kernel":
            recipes[name] = _of_kernel(way, held[name], layer, inputs_first=axis == 1)
        elif side == "out" and members is not None:
            recipes[name] = Mean(axis, members)
        elif side == "in" or (side == "out" and isinstance(way, Tile)):
            recipes[name] = Tile(axis, index)
        elif side is None:
            shape = tuple(held[name].shape)
            raise CannotTellError(f"the channel axis of {name} {shape}, which its kernel is made from")
    if bias is not None and (members is not None or isinstance(way, Tile)):
        for node in roots(bias):
            shape = node.meta["value"].shape
            if tuple(shape) == (layer.out_channels,):
                recipes[str(node.target)] = Mean(0, members) if members is not None else Tile(0, index)
    _check(module, kernel, bias, recipes, after)
    return recipes


def _sides(
    module: nn.Module, kernel: fx.Node, layer: Layer, held: Mapping[str, Tensor]
) -> dict[str, tuple[str | None, int]]:
    size = torch.Size(layer.kernel_shape).numel()
    candidates = [n for n, t in held.items() if t.numel() == size]
    exact = [n for n in candidates if tuple(held[n].shape) == layer.kernel_shape]
    either = [n for n in candidates if tuple(held[n].shape) == turned(layer.kernel_shape)]
    inputs_first = [n for n in either if _is_turned(module, kernel, n, held)]
    flat = [n for n in candidates if layout(tuple(held[n].shape), layer.kernel_shape, layer.kernel_shape) is not None]
    kernels = tuple(inputs_first or exact or flat)
    if candidates and not kernels:
        name, shape = candidates[0], tuple(held[candidates[0]].shape)
        raise CannotTellError(f"the axes of {name} {shape}, its kernel {layer.kernel_shape} in another order",
                              "store it in that order, and the checkpoint's with it")  # fmt: skip
    if not kernels:
        found = ", ".join(f"{n} {tuple(t.shape)}" for n, t in held.items()) or "no parameter"
        raise CannotTellError(f"which parameter holds its kernel {layer.kernel_shape} (it is computed from {found})")

    def run(replaced: Mapping[str, Tensor], order: Tensor | None) -> Tensor:
        value: Tensor = evaluate(module, kernel, replaced)
        return value

    probe = Probe(
        run, held, kernels, layer.kernel_shape, layer.groups, out_axis=0, in_axis=1, inputs_first=bool(inputs_first)
    )
    sides: dict[str, tuple[str | None, int]] = {
        n: ("kernel", int(bool(inputs_first))) if n in kernels else probe.place(n) for n in held
    }
    for root in roots(kernel):
        name = str(root.target)
        if name in sides and sides[name][0] is None:
            sides[name] = _aligned(root, kernel, layer)
    return sides


def _is_turned(module: nn.Module, kernel: fx.Node, name: str, held: Mapping[str, Tensor]) -> bool:
    """Whether a tensor holds the inputs first, (I, O, k...): the kernel, (O, I, k...), follows a permutation of the
    tensor's rows with its own columns."""
    rows = torch.arange(len(held[name])).roll(1)
    alike = {n: t.mean().expand_as(t).clone() for n, t in held.items() if n != name and t.is_floating_point()}
    before: Tensor = evaluate(module, kernel, alike)
    after: Tensor = evaluate(module, kernel, {**alike, name: held[name].detach()[rows]})
    if after.shape[0] == after.shape[1] and torch.allclose(after, before.index_select(0, rows)):
        return False
    return torch.allclose(after, before.index_select(1, rows))


def _aligned(root: fx.Node, kernel: fx.Node, layer: Layer) -> tuple[str | None, int]:
    """The side of a tensor by the form, (O, 1, 1, 1) or (1, I, 1, 1), in which it meets the kernel."""
    long = [a for a, n in enumerate(root.meta["value"].shape) if n > 1]
    node = root
    while len(long) == 1 and node is not kernel:
        shape = node.meta["value"].shape if isinstance(node.meta["value"], Tensor) else ()
        axes = [a for a, n in enumerate(shape) if n > 1]
        if len(shape) == len(layer.kernel_shape) and len(axes) == 1 and axes[0] < 2:
            return ("out", "in")[axes[0]], long[0]
        users = [n for n in node.users if isinstance(n.meta["value"], Tensor)]
        if len(users) != 1:
            break
        node = users[0]
    return None, 0


def _of_kernel(way: Kernel | Columns | Tile, tensor: Tensor, layer: Layer, *, inputs_first: bool) -> Recipe:
    if isinstance(way, Kernel):
        return replace(way, inputs_first=inputs_first)
    if inputs_first:
        assert isinstance(way, Columns), "a kernel with its inputs first is no depthwise one"
        return replace(way, axis=0)
    if tuple(tensor.shape) != layer.kernel_shape:
        raise CannotTellError("how to resize a kernel that is stored flat in a last or depthwise layer")
    return way


def _check(
    module: nn.Module, kernel: fx.Node, bias: fx.Node | None, recipes: Mapping[str, Recipe], after: tuple[int, ...]
) -> None:
    """What the forward writes down as numbers (`view(64, 1, 1, 1)`) does not follow its parameters."""
    with torch.no_grad():
        resized = {n: recipe(fetch(module, n).detach()) for n, recipe in recipes.items()}
    try:
        shape = tuple(evaluate(module, kernel, resized).shape)
        length = None if bias is None else len(evaluate(module, bias, resized))
    except Exception as error:  # the user's code on tensors of other sizes
        text = " ".join(str(error).split())[:120]
        raise CannotTellError(
            f"how to compute its kernel from resized parameters ({type(error).__name__}: {text})"
        ) from error
    if shape != after or length not in (None, after[0]):
        raise CannotTellError(f"how to compute a kernel {after} from resized parameters (it comes to {shape})")
