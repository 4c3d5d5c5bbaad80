"""One trace of a network, or one for each mode where a branch on `self.training` makes it two.

What a forward does to its own attributes no graph can follow: that is noted, or refused where the next forward depends
on it.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli.errors import CaptureError
from repbnn_cli.graph.interception import interceptable
from repbnn_cli.graph.proxies import is_flag
from repbnn_cli.graph.tracer import LeafPolicy, Tracer, explain
from repbnn_cli.restoring import kept_in_eval, unchanged


class TracingError(CaptureError):
    """module: dotted path of the module in whose forward it happened; "" for the network's own. asked: whether it had
    asked for `self.training` before."""

    def __init__(self, text: str, module: str, asked: bool) -> None:
        super().__init__(text)
        self.module, self.asked = module, asked


@dataclass(frozen=True)
class Traced:
    """in_training: of training mode, where that gives another graph."""

    tracer: Tracer
    graph: fx.Graph
    constants: dict[str, Tensor]
    in_training: Traced | None = None


def _trace(
    model: nn.Module, examples: tuple[Tensor, ...], leaf: LeafPolicy, shapes_only: bool = False, *, live: bool = True
) -> Traced:
    frozen = frozenset(kept_in_eval(model).values())
    tracer = Tracer(examples, leaf, shapes_only=shapes_only, frozen=frozen, live=live)
    before = _plain_attributes(model)
    traced, after = _once(model, tracer, {})
    changed = {key: value for key, value in after.items() if key not in before or before[key] is not value}
    for key, value in changed.items():
        if isinstance(value, fx.Proxy):
            where = value.node.meta["where"]
            tracer.notes.append(f"{where}: sets {_dotted(key)}, which the transformed network does not")
    counted = {key: value for key, value in changed.items() if type(before.get(key)) in (int, float, bool)}
    if counted:  # a graph keeps them as they were: is the next forward another one?
        again, _ = _once(model, Tracer(examples, leaf, shapes_only=shapes_only, frozen=frozen, live=live), counted)
        constants = zip(traced.constants.values(), again.constants.values(), strict=False)
        if str(again.graph) != str(traced.graph) or not all(torch.equal(a, b) for a, b in constants):
            raise CaptureError(
                f"the forward changes {', '.join(map(_dotted, counted))}, and the next one computes something else "
                "from it, which a graph cannot: keep it in a buffer that is written in place, or keep the module whole "
                "(rule file: `modules: [{match: {type: ITS_CLASS}, leaf: true}]`)"
            )
    return traced


def _once(
    model: nn.Module, tracer: Tracer, attributes: dict[tuple[str, str], Any]
) -> tuple[Traced, dict[tuple[str, str], Any]]:
    """One trace, with some attributes set before it; and the plain attributes after it."""
    with (
        unchanged(model, parameters=not tracer.shapes_only),
        torch.no_grad(),
        interceptable(),
        tracer.hidden_training_flags(model),
    ):
        for (path, name), value in attributes.items():
            vars(model.get_submodule(path))[name] = value
        try:
            graph = tracer.trace(model)
        except CaptureError:
            raise
        except Exception as error:
            raise TracingError(explain(error, tracer), tracer.failed_in, bool(tracer.asked)) from error
        tracer.refuse_what_is_lost(model)
        # fx parks tensors made in forward on the root; `unchanged` takes them off the user's module again.
        constants = {n: v for n, v in vars(model).items() if n.startswith("_tensor_constant")}
        constants |= {n: v for n, v in model._buffers.items() if n.startswith("_tensor_constant") and v is not None}
        return Traced(tracer, graph, constants), _plain_attributes(model)


def _plain_attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """(path of the module, name) → value, of what a module holds beside tensors and modules."""
    kept = ("training", *vars(nn.Module()))
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in kept and not name.startswith("_tensor_constant") and type(value) is not Tensor
    }


def _dotted(key: tuple[str, str]) -> str:
    return ".".join(filter(None, key))


def in_both_modes(model: nn.Module, examples: tuple[Tensor, ...], policy: LeafPolicy, shapes_only: bool) -> Traced:
    """A graph holds one branch of `if self.training`; where the modes take different ones there are two.

    A value of the graph cannot be asked `self.training is True`, nor looked up in a dictionary. Where a trace with
    plain flags gives something else, its two graphs are taken.
    """
    try:
        traced = _in_both_modes(model, examples, policy, shapes_only, live=True)
    except TracingError as error:
        if error.asked:
            with contextlib.suppress(CaptureError):
                return _in_both_modes(model, examples, policy, shapes_only, live=False)
        raise
    if not traced.tracer.asked:
        return traced
    try:
        plain = _in_both_modes(model, examples, policy, shapes_only, live=False)
    except CaptureError:  # of what the graph with values does not depend on
        return traced
    pairs = (traced, plain, False), (traced.in_training or traced, plain.in_training or plain, True)
    same = all(_told(live.graph, training) == str(told.graph) for live, told, training in pairs)
    return traced if same else plain


def _told(graph: fx.Graph, training: bool) -> str:
    """The graph with every `self.training` in it as a plain value."""
    told = copy.deepcopy(graph)
    for flag in [node for node in told.nodes if is_flag(node)]:
        for user in tuple(flag.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: training if is_flag(n) else n)
        told.erase_node(flag)
    return str(told)


def _in_both_modes(
    model: nn.Module, examples: tuple[Tensor, ...], policy: LeafPolicy, shapes_only: bool, *, live: bool
) -> Traced:
    traced = _trace(model, examples, policy, shapes_only, live=live)
    if shapes_only and (traced.tracer.notes or traced.tracer.convolution_calls):
        # it decides on values, or what it applies has to be looked at; zeros are not the network's
        traced = _trace(model, examples, policy, live=live)
    if live and not traced.tracer.mode_branches:
        return traced
    training = model.training
    with unchanged(model):
        model.train(not training)
        other = _trace(model, examples, policy, live=live)
    evaluated, trained = (other, traced) if training else (traced, other)
    if trained.tracer.drawn:
        raise CaptureError(
            f"{trained.tracer.drawn[0]}: before this line a random number is drawn in training mode that no graph "
            "holds, and what follows from it would stay as it fell; draw it for a size of the input "
            "(`torch.rand(x.shape[0], 1, 1, 1)`), or move it into a module of its own"
        )
    return traced if str(evaluated.graph) == str(trained.graph) else replace(evaluated, in_training=trained)
