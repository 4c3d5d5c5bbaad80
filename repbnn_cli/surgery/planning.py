"""`plan`: what rules make of a captured network, as values; nothing is changed yet."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

from repbnn_cli.channels import operator_name
from repbnn_cli.errors import SurgeryError
from repbnn_cli.graph import Network
from repbnn_cli.graph.static import static_nodes
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.plan import ModuleEdit, Plan, Step
from repbnn_cli.positions import ends, holds_tensor, other_layers, positions
from repbnn_cli.recognize import Layer, recognize, type_names
from repbnn_cli.recognize.hints import frozen, hints
from repbnn_cli.rules import RuleSet, Subject
from repbnn_cli.surgery.rewrite import Rewriter
from repbnn_cli.surgery.walk import subject_of
from repbnn_cli.user_code.cpu_only import running


def plan(network: Network, rules: RuleSet) -> Plan:
    """What `rules` make of `network`, as values; changes nothing.

    Raises RulesError (a rule matches nothing, or two claim one module), UsageError (β does not divide a layer),
    SurgeryError (an operator or module that cannot carry expanded channels), each naming the place.
    """
    with running(network.module):
        return _plan(network, rules)


def _plan(network: Network, rules: RuleSet) -> Plan:
    layers = recognize(network, rules.declare)
    trained = network.in_training
    if rules.options.beta == 1:  # the identity: nothing is repeated, so nothing is touched
        same = _identity(trained, layers, rules) if trained else None
        return replace(_identity(network, layers, rules), in_training=same)
    walk, *others = _walks(network, layers, rules)
    edits, added, notes, in_training = walk.edits, walk.added, walk.notes, None
    if trained is not None:
        (other,) = others
        edits, added = _merged(edits, other.edits), {**added, **other.added}
        notes += [f"in training mode, {note}" for note in other.notes if note not in notes]
        in_training = Plan(trained, layers, rules, other.graph, tuple(edits.values()), added, other.steps)
    if not edits:
        raise SurgeryError(
            "the rules change nothing: no first layer was found whose output is repeated; "
            f"check the rule with `apply: repeat_output` in {rules.source}"
        )
    notes += frozen(network, [edit.path for edit in edits.values() if edit.action == "rep_conv"])
    notes += hints(network, layers)
    return Plan(network, layers, rules, walk.graph, tuple(edits.values()), added, walk.steps, notes, in_training)


def _identity(network: Network, layers: dict[str, Layer], rules: RuleSet) -> Plan:
    steps = {n.name: Step(n.name, None) for n in network.graph.nodes if n.op != "output"}
    return Plan(network, layers, rules, copy.deepcopy(network.graph), (), {}, steps)


def _walks(network: Network, layers: dict[str, Layer], rules: RuleSet, apart: Collection[str] = ()) -> list[Rewriter]:
    """A walk over each of the network's graphs: of eval mode, of training mode where that is another one."""
    found = _agreed([subjects(n, layers) for n in network.modes])
    options, taken = rules.options, set[str]()
    walks: list[Rewriter] = []
    for one, own in zip(network.modes, found, strict=True):
        assigned = rules.assign(own, [subject for other in found if other is not own for subject in other])
        walk = Rewriter(
            one, layers, assigned, beta=options.beta, inherit=options.inherit, last_layer=options.last_layer,
            taken=taken, apart=apart,
        )  # fmt: skip
        walk.run()
        taken |= set(walk.added)
        walks.append(walk)
    repeats = [{path: edit.repeats for path, edit in walk.edits.items()} for walk in walks]
    unlike = {path for path, n in repeats[0].items() if repeats[-1].get(path, n) != n}
    return _walks(network, layers, rules, unlike) if unlike - set(apart) else walks


def _agreed(found: list[list[Subject]]) -> list[list[Subject]]:
    """What is last in one mode alone (features in the one, logits in the other) is not the last layer."""
    elsewhere = [{s.path: s.position for s in other} for other in reversed(found)]
    return [
        [replace(s, position=other[s.path]) if s.position == "last" and other.get(s.path) else s for s in own]
        for own, other in zip(found, elsewhere, strict=True)
    ]


def _merged(edits: dict[str, ModuleEdit], others: dict[str, ModuleEdit]) -> dict[str, ModuleEdit]:
    """The edits of both modes. Raises SurgeryError where one module would be made two things."""
    for path, other in others.items():
        edit = edits.get(path, other)
        same = replace(other, part=edit.part, rule=edit.rule, where=edit.where)
        if same != edit:
            raise SurgeryError(
                f"{path}: carries other channels in training mode ({other.action}, {other.after}) than in eval mode "
                f"({edit.action}, {edit.after}); give each mode a module of its own"
            )
    return {**others, **edits}


def subjects(network: Network, layers: dict[str, Layer]) -> list[Subject]:
    """Everything a rule can match: modules, operators without parameters, parameters that a forward uses directly."""
    others = other_layers(network, layers)
    last = ends(network, layers, others)
    position = positions(network, layers, others) | {str(n.target): "last" for n in last if n.op == "call_module"}
    found = []
    for path, layer in layers.items():
        names = type_names(fetch(network.module, path))
        found.append(Subject(path, names, layer.role, position.get(path, "")))
    held = {n for n, _ in (*network.module.named_parameters(), *network.module.named_buffers())}
    static = static_nodes(network.graph)
    for node in network.graph.nodes:
        if node.op in ("call_function", "call_method") and node not in static and holds_tensor(node.meta["value"]):
            role, at = ("unknown", "last") if node in last else ("weightless", "")
            found.append(Subject(subject_of(node), (operator_name(node),), role, at))
        elif node.op == "get_attr" and node.target in held:
            found.append(Subject(subject_of(node), ("Parameter",), "per_channel", ""))
    return found
