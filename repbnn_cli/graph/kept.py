"""A graph as a module with the parts and tensors of the network that it was recorded from, in both modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx.graph import PythonCode

_TREE = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class KeptGraphModule(fx.GraphModule):
    """GraphModule that keeps modules and tensors which its graph does not mention.

    in_training: another graph over the same modules, which the forward follows in training mode; the attribute is a
    module of that graph alone, None without one.
    frozen: paths of modules that stay in eval mode when this one is trained.
    """

    in_training: KeptGraphModule | None
    frozen: tuple[str, ...]

    def __init__(
        self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule", in_training: fx.Graph | None = None,
        frozen: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__(root, graph, class_name=class_name)
        for kind in _TREE:
            self.__dict__[kind] = root.__dict__[kind]
        self.frozen = frozen
        # Beside the module tree: its parts are those of this module.
        self.__dict__["in_training"] = KeptGraphModule(self, in_training, class_name) if in_training else None
        self.recompile()

    def recompile(self) -> PythonCode:
        code = super().recompile()
        other = self.__dict__.get("in_training")
        if other is not None:
            own, in_training = type(self).forward, type(other).forward

            def forward(self: KeptGraphModule, *args: Any) -> Any:
                return (in_training if self.training else own)(self, *args)

            type(self).forward = forward
        return code

    def train(self, mode: bool = True) -> KeptGraphModule:
        super().train(mode)
        for path in self.frozen:
            self.get_submodule(path).training = False
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptGraphModule:
        tree = bare(self, lambda held: copy.deepcopy(held, memo))
        in_training = copied_graph(self.in_training.graph, memo) if self.in_training else None
        copied = KeptGraphModule(tree, copied_graph(self.graph, memo), type(self).__name__, in_training, self.frozen)
        memo[id(self)] = copied
        return copied


def bare(module: nn.Module, copied: Callable[[Any], Any] = lambda held: held) -> nn.Module:
    """A module with the parts, tensors and mode of another one, or with copies of what holds them, and without code."""
    tree = nn.Module()
    for kind in (*_TREE, "training"):
        tree.__dict__[kind] = copied(module.__dict__[kind])
    return tree


def copied_graph(graph: fx.Graph, memo: dict[int, Any] | None = None) -> fx.Graph:
    """A copy whose nodes carry what is known of them."""
    copied: fx.Graph = copy.deepcopy(graph, memo)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        new.meta = dict(old.meta)
    return copied


TAKEN = frozenset((*dir(KeptGraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph())), "in_training", "frozen"))
"""What a graph module's own attributes are called, so that no part of a network can be."""
