"""Walks a captured graph once and writes the graph of its RepBNN beside it, with the channel map of every tensor.

Each node is carried by what it does to channels (tables in `channels`, handlers in `rewrite_operators`); each module by
its role and the rule that claims it (`rewrite_modules`). Nothing is changed here: module edits are collected as values.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NoReturn

from torch import Tensor, fx

from repbnn_cli import rep_layers
from repbnn_cli.channels import (
    PARTS,
    Compact,
    Folded,
    Tiled,
    makes_container,
    memory_of,
    operator_name,
    plain,
    shares_memory,
    takes_rows,
)
from repbnn_cli.graph.proxies import is_write, set_data
from repbnn_cli.graph.static import evaluate, roots
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.inherit import Tile
from repbnn_cli.plan import Step
from repbnn_cli.positions import holds_tensor
from repbnn_cli.surgery.rewrite_modules import ModuleWalk
from repbnn_cli.surgery.rewrite_operators import unfoldable
from repbnn_cli.surgery.walk import GIVE_NOTHING, Made, shape_text
from repbnn_cli.wording import some

_PURE = ("torch", "_operator", "operator", "math", "builtins")


class Rewriter(ModuleWalk):
    """One walk. After `run`, `graph`, `edits`, `added`, `steps` and `notes` are what `plan.Plan` holds."""

    def run(self) -> None:
        used = _used(self.network.graph)
        for node in self.network.graph.nodes:
            if node in used:
                self._refuse_unseen_write(node)
                self._visit(node)
        for path, node in self._read_whole.items():
            if path in self.edits or any(path.startswith(f"{e}.") for e in self.edits):
                self._refuse(node, f"{path} is used both by channel and in another way", "use two parameters")
        if self.by_position:
            self.notes.append(
                f"{len(self.by_position)} sums take differently ordered replicas as they come ({self.by_position[0]} "
                "first; rules: `align: position`): behind them the replicas of a channel are no longer alike"
            )
        if self.products:
            self.notes.append(
                f"{self._place(self.products[0])}: products of activations, {len(self.products)} in all, are computed "
                f"for each replica, at {self.beta} times their cost"
            )
        binary = [path for path, layer in self.layers.items() if layer.binary and layer.role != "depthwise_conv"]
        if binary and not any(self.edits[path].action == "rep_conv" for path in binary if path in self.edits):
            self.notes.append(f"no binary layer becomes a RepConv ({some(binary)})")
        if not any(isinstance(recipe, Tile) for edit in self.edits.values() for _, recipe in edit.tensors):
            self.notes.append(
                "no layer has parameters for each replica, so the replicas of a channel stay alike, in training too, "
                "and add nothing; a BatchNorm, or a scale for each channel, behind a RepConv tells them apart"
            )
        self._follow_writes()
        self._repeat_in_convolutions()
        self.graph.lint()

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self.graph.output(fx.map_arg(node.args[0], self._output))
        elif node.op == "placeholder" or node in self._static:
            self._keep(node, self._copy_mapped(node, lambda n: self._made[n].node), None)
        elif node.op == "call_function" and node.target in GIVE_NOTHING:
            self._effect(node)
        elif not holds_tensor(node.meta["value"]) and not makes_container(node):
            return  # a size or another number: written where it is used
        elif node.op == "call_module":
            self._module(node)
        else:
            self._call(node)
            if is_write(node):
                self._write_back(node)

    def _refuse_unseen_write(self, node: fx.Node) -> None:
        """`F.relu(x[:, 4:], inplace=True)` whose result is dropped, `torch.neg(x, out=y)`: no edge leads on."""
        dropped = node.kwargs.get("inplace") is True and not node.users
        if (dropped or node.kwargs.get("out") is not None) and self._expanded(node):
            what = "works in place, and its result is dropped" if dropped else "writes into what `out` names"
            self._refuse(node, f"{operator_name(node)} {what}", "go on with its result")

    def _effect(self, node: fx.Node) -> None:
        expanded = self._expanded(node)
        if node.target is set_data and len(expanded) == 2:  # x.data = f(x): a straight-through estimator
            x, value = expanded
            want, tiled = self._map(x), self._as_tiled(x)
            self._keep(node, self._copy(node, (tiled, self._reordered(value, want)), {}), want)
            self._made[x] = Made(tiled, want)  # the only form that holds the new values
            return
        if expanded:
            self._set_item(node)
            return
        self._keep(node, self._copy_mapped(node, lambda n: self._made[n].node), None)

    def _set_item(self, node: fx.Node) -> None:
        """`x[:, 4:] = y`, in each replica: x goes on as a tensor of its own, into which the value was written."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if not isinstance(x.meta["value"], Tensor) or self._made[x].state is None or takes_rows(node):
            self._refuse_write(node)
        written = self._own_memory(node, x)
        self._keep(
            node, self._copy_mapped(node, lambda n: written if n is x else self._as_folded(n), folded=True), None
        )
        self._goes_on(x, written)

    def _write_back(self, node: fx.Node) -> None:
        """`x.narrow(1, 4, 4).add_(y)`: in the new network the part may be a copy, so that its values are set in x, too.

        Nothing to do where x is not used any more, or where `x[:, 4:] += y` sets them itself.
        """
        chain: list[fx.Node] = []  # parts of parts, and what was written to them
        at = node.args[0]
        while isinstance(at, fx.Node) and shares_memory(at, PARTS):
            chain.append(at)
            at = at.args[0]
        while chain and is_write(chain[-1]):
            chain.pop()
        x = chain[-1].args[0] if chain else None
        if not isinstance(x, fx.Node) or self._made[x].state is None or not self._later(x, node):
            return
        item = [u for u in x.users if u.target is operator.setitem and u.args[2] is node]
        if len(chain) == 1 and any(u.args[:2] == chain[0].args[:2] for u in item):
            return
        if any(takes_rows(link) for link in chain):
            self._refuse_write(node)
        written = self._own_memory(node, x, besides=chain)
        copies = {x: written}
        for link in reversed(chain):
            if is_write(link):
                copies[link] = copies[link.args[0]]  # type: ignore[index]
            else:
                copies[link] = self._copy_mapped(link, lambda n: copies.get(n) or self._as_folded(n), folded=True)
        whole: Any = ...
        self.graph.call_function(operator.setitem, (copies[chain[0]], whole, self._as_folded(node)))
        self._goes_on(x, written)

    def _own_memory(self, node: fx.Node, x: fx.Node, besides: Sequence[fx.Node] = ()) -> fx.Node:
        """A copy of x with its replicas as samples; refused where others that are used later share memory with x."""
        before = (u for u in x.users if u not in besides and self._order[u] < self._order[node])
        _, *above = memory_of(x)
        others = [*(u for u in before if shares_memory(u)), *above]
        state = self._made[x].state
        if any(self._later(other, node) for other in others) or (
            isinstance(state, Folded) and not unfoldable(x, self.network)
        ):
            self._refuse_write(node)
        return self.graph.call_method("clone", (self._as_folded(x),))

    def _goes_on(self, x: fx.Node, written: fx.Node) -> None:
        made = Made(self._by_rows(rep_layers.unfold, written, x), plain(x.meta["value"].shape[1], self.beta))
        made.folded = written
        self._made[x] = made

    def _later(self, node: fx.Node, than: fx.Node) -> bool:
        """Whether a node is used behind another one."""
        return any(self._order[user] > self._order[than] for user in node.users)

    def _refuse_write(self, node: fx.Node) -> NoReturn:
        self._refuse(
            node, f"{operator_name(node)} writes into an expanded tensor, or others in its memory", "compute a new "
            "tensor instead (`torch.cat((x[:, :k], x[:, k:] + y), 1)` for `x[:, k:] += y`)",
        )  # fmt: skip

    @cached_property
    def _order(self) -> dict[fx.Node, int]:
        return {node: i for i, node in enumerate(self.network.graph.nodes)}

    # -- afterwards --------------------------------------------------------------------------------------------------
    def _follow_writes(self) -> None:
        """`self.conv.weight.data = sign(self.latent)`: what a resized tensor is written from is resized like it."""
        resized = {e.tensor_path(name): (e, recipe) for e in self.edits.values() for name, recipe in e.tensors}
        for node in self.network.graph.nodes:
            target, value = _written(node) if node in self._static else (None, None)
            if target not in resized or value is None:
                continue
            edit, recipe = resized[target]
            module = self.network.module
            shape = fetch(module, target).shape
            held = {str(r.target): fetch(module, str(r.target)).detach() for r in roots(value)}
            made = {p: recipe(t) for p, t in held.items() if p not in (target, *resized) and t.shape == shape}
            now = made | {p: resized[p][1](t) for p, t in held.items() if p in resized}
            if evaluate(module, value, now).shape != recipe.result_shape(shape):
                self._refuse(
                    node,
                    f"{target} is resized, and it is not known how what is written to it follows from "
                    f"{', '.join(held)}",
                    "compute it in the module that owns it",
                )
            for path in made:
                new = shape_text(recipe.result_shape(shape))
                self.edits[path] = replace(
                    edit, path=path, role="per_channel", action="parameter", before=shape_text(tuple(shape)), after=new,
                    tensors=((path.rpartition(".")[2], recipe),), channels=None, repeats=1, reset=False,
                )  # fmt: skip

    def _repeat_in_convolutions(self) -> None:
        """Where nothing but its repeat uses a RepConv's output, the RepConv repeats by itself."""
        for node in list(self.graph.nodes):
            helper = self.added.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(helper, rep_layers.Repeat):
                continue
            x = node.args[0]
            edit = self.edits.get(str(x.target)) if isinstance(x, fx.Node) and x.op == "call_module" else None
            calls = [n for n in self.graph.nodes if n.op == "call_module" and edit and n.target == edit.path]
            if not isinstance(x, fx.Node) or edit is None or edit.action != "rep_conv":
                continue
            if len(x.users) != 1 or len(calls) != 1 or edit.path in self._apart:
                continue
            self.edits[edit.path] = replace(edit, repeats=helper.repeats)
            for name, step in self.steps.items():
                if step.node == x.name and isinstance(step.state, Compact):
                    self.steps[name] = Step(x.name, Tiled(step.state.index, step.state.source))
                elif step.node == node.name:
                    self.steps[name] = Step(x.name, step.state)
            node.replace_all_uses_with(x)
            self.graph.erase_node(node)
            del self.added[str(node.target)]


def _used(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that an output or a write depends on; research code computes things that it only looks at."""
    used: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output", "call_module") or not _is_pure(node) or used.intersection(node.users):
            used.add(node)
    return used


def _is_pure(node: fx.Node) -> bool:
    if node.op == "call_function":
        module = getattr(node.target, "__module__", None) or "torch"
        aside = node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None
        return module.startswith(_PURE) and not is_write(node) and not aside
    return not is_write(node)


def _written(node: fx.Node) -> tuple[Any, fx.Node | None]:
    """(path of the parameter, value) of `parameter.data = value` and `parameter.data.copy_(value)`; else Nones."""
    copies = node.target == "copy_" or node.target is set_data
    if not copies or len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
        return None, None
    at: Any = node.args[0]
    while at.op != "get_attr" and at.target in (getattr, "detach"):
        at = at.args[0]
    return (str(at.target), node.args[1]) if at.op == "get_attr" else (None, None)
