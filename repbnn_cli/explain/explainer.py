"""Why each part of a RepBNN is as it is: the rule that claims it, its channels, its weights, and what changed with it.

Everything comes from the plan that made the network: the same values that `surgery.apply` carried out, in words. What
holds for one tensor (`channel_map`, `made_from`) is in `explain_words`; here is what holds for a module and a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from repbnn_cli import surgery
from repbnn_cli.channels import Folded, State, operator_name, plain
from repbnn_cli.errors import UsageError
from repbnn_cli.explain.explain_words import ChannelMap, channel_map, made_from, tensor_names, what_happens
from repbnn_cli.graph.tracer import fetch
from repbnn_cli.plan import ModuleEdit, Plan
from repbnn_cli.positions import holds_tensor
from repbnn_cli.recognize import CONVOLUTIONS
from repbnn_cli.rules import Rule
from repbnn_cli.rules.yaml_marks import nearest
from repbnn_cli.surgery.walk import subject_of

PARTS = ("first_layer", "backbone", "bypass", "last_layer")
_JOINS = ("add", "sub", "cat", "concat", "concatenate", "stack")


@dataclass(frozen=True)
class TensorStory:
    """One tensor of a changed module. values: whether they are still what the transform put there, if that is known."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    made_from: str
    values: str = ""


@dataclass(frozen=True)
class Neighbour:
    """A module that had to change as well. why: input, behind or sum; see `Story.with_it`."""

    path: str
    why: str
    what: str


@dataclass(frozen=True)
class Story:
    """What became of one module, operator or parameter.

    position: first, trunk, bypass or last, for what convolves. what: the change in a sentence. inputs, output: the
    channel maps of the tensors that go in and come out, at its first call. with_it: `input` delivers its input already
    expanded; `behind` takes its output, up to the next convolutions; `sum` meets its output in a sum or concatenation.
    """

    path: str
    kind: str
    role: str
    evidence: str
    changed: bool
    what: str
    part: str = ""
    rule: str = ""
    where: str = ""
    position: str = ""
    before: str = ""
    after: str = ""
    tensors: tuple[TensorStory, ...] = ()
    inputs: tuple[ChannelMap, ...] = ()
    output: ChannelMap | None = None
    with_it: tuple[Neighbour, ...] = ()

    def as_plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """The modules of a part that one rule treats alike; `rule` is empty for what no rule had to change."""

    part: str
    rule: str
    where: str
    what: str
    paths: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    """A whole network, or the part of it below `path`: changed groups in order of the parts, then what stayed."""

    path: str
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()

    def as_plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Explainer:
    """Explains one plan.

    module: the Rep network, to say which tensors were trained since; places: module path → file and line of its rule
    when the plan was made (a result's rules are stored again, with lines of their own).
    weights: whether the source network has its own weights, so that values can be compared.
    """

    plan: Plan
    module: nn.Module
    places: Mapping[str, str] = field(default_factory=dict)
    weights: bool = True

    def __post_init__(self) -> None:
        self.edits = {e.path: e for e in self.plan.edits}
        self.nodes: dict[str, list[fx.Node]] = {}
        for node in self.plan.network.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.nodes.setdefault(subject_of(node), []).append(node)
        trained = self.plan.network.in_training
        self.in_training_alone = {
            subject_of(n): n for n in (trained.graph.nodes if trained else ())
            if n.op not in ("placeholder", "output") and subject_of(n) not in self.nodes
        }  # fmt: skip
        subjects = surgery.subjects(self.plan.network, dict(self.plan.layers))
        self.positions = {s.path: s.position for s in subjects}
        claims = self.plan.rules.assign(subjects) if self.plan.beta > 1 else {}
        self.claims: Mapping[str, Rule] = claims

    def whole(self, below: str = "") -> Whole:
        """Part by part: what each rule did to how many modules; with `below`, only in that part of the network."""
        inside = [e for e in self.plan.edits if not below or e.path == below or e.path.startswith(f"{below}.")]
        grouped: dict[tuple[str, str, str, str], list[ModuleEdit]] = {}
        for part in PARTS:
            for edit in inside:
                if edit.part == part:
                    key = (part, edit.rule, self._where(edit), what_happens(edit, self.plan.beta, general=True))
                    grouped.setdefault(key, []).append(edit)
        groups = [
            Group(*key, tuple(e.path for e in edits), tuple(e.before for e in edits), tuple(e.after for e in edits))
            for key, edits in grouped.items()
        ]
        stayed: dict[str, list[str]] = {}
        for path in self.plan.layers:
            if path not in self.edits and (not below or path == below or path.startswith(f"{below}.")):
                stayed.setdefault(self._stays(path), []).append(path)
        groups += [Group("unchanged", "", "", why, tuple(paths)) for why, paths in stayed.items()]
        notes = () if below else (*self.plan.notes, *self.plan.network.notes)
        return Whole(below, tuple(groups), notes)

    def one(self, path: str) -> Story | Whole:
        """A module, operator, parameter or tensor; a block gives the story of what is in it.

        Raises UsageError with the nearest names for a path that the network does not have.
        """
        path = self._resolved(path)
        if path in self.nodes or path in self.edits:
            return self._story(path)
        inside = [p for p in (*self.plan.layers, *self.edits) if p.startswith(f"{path}.")]
        if inside:
            return self.whole(path)
        module = fetch(self.plan.network.module, path)
        return Story(
            path, "module", "", f"is a {type(module).__name__}", False,
            "is never called by the forward: it stays as it is, and in the file",
        )  # fmt: skip

    # -- one module --------------------------------------------------------------------------------------------------
    def _story(self, path: str) -> Story:
        edit, layer = self.edits.get(path), self.plan.layers.get(path)
        nodes = self.nodes.get(path, [])
        first = nodes[0] if nodes else None
        seen = first or self.in_training_alone.get(path)
        kind = {"call_module": "module", "get_attr": "parameter"}.get(seen.op if seen else "get_attr", "operator")
        role = layer.role if layer else (edit.role if edit else "weightless")
        evidence = layer.evidence if layer else self._operator_evidence(seen)
        evidence += "; in training mode alone the forward gets there" if first is None and seen is not None else ""
        claim = self.claims.get(path)
        story = Story(
            path, kind, role, evidence, changed=edit is not None, position=self.positions.get(path, ""),
            what=what_happens(edit, self.plan.beta) if edit else self._stays(path),
            inputs=tuple(self._maps(first)) if first else (), output=self._output(first) if first else None,
        )  # fmt: skip
        if edit is not None:
            return replace(
                story, part=edit.part, rule=edit.rule, where=self._where(edit), before=edit.before, after=edit.after,
                tensors=tuple(self._tensors(edit)), with_it=tuple(self._with_it(path, nodes)),
            )  # fmt: skip
        claim = self.claims.get(path)
        return replace(story, part=claim.part, rule=claim.name, where=claim.where) if claim else story

    def _operator_evidence(self, node: fx.Node | None) -> str:
        if node is None or node.op == "get_attr":
            return "a tensor that a forward uses directly"
        where = node.meta.get("where", "")
        return f"the operator {operator_name(node)}" + (f", called at {where}" if where else "")

    def _where(self, edit: ModuleEdit) -> str:
        return self.places.get(edit.path, edit.where)

    def _stays(self, path: str) -> str:
        claim, layer = self.claims.get(path), self.plan.layers.get(path)
        if self.plan.beta == 1:
            return "with β = 1 nothing is repeated"
        if claim is not None and claim.apply == "keep":
            return f"rule {claim.name} ({claim.where}) says `apply: keep`"
        node = self.nodes[path][0] if path in self.nodes else None
        state = self._state(node) if node is not None else None
        inputs = [self._state(n) for n in node.all_input_nodes] if node is not None else []
        if node is not None and node.op == "get_attr" and any(self._state(user) for user in node.users):
            return "each replica takes it as it is"
        if state is None and not any(inputs):
            return "no expanded tensor reaches it"
        if layer is None or layer.role == "weightless":
            return "without parameters, it takes any number of channels"
        return "none of its tensors is sized by channel"

    def _tensors(self, edit: ModuleEdit) -> Iterator[TensorStory]:
        source = self.plan.network.module
        for name, recipe in edit.tensors:
            old: Tensor = fetch(source, edit.tensor_path(name)).detach()
            new: Tensor = fetch(self.module, edit.tensor_path(name)).detach()
            text = "a fresh start (inherit: none)" if edit.reset else made_from(recipe)
            values = ""
            if self.weights and not edit.reset and new.device == old.device:
                same = torch.equal(recipe(old), new)
                values = "as the transform made them" if same else "changed since the transform"
            yield TensorStory(name, tuple(old.shape), tuple(new.shape), text, values)

    # -- channels ----------------------------------------------------------------------------------------------------
    def _state(self, node: fx.Node) -> State:
        step = self.plan.steps.get(node.name)
        return step.state if step is not None else None

    def _maps(self, node: fx.Node) -> Iterator[ChannelMap]:
        edit = self.edits.get(subject_of(node))
        action = edit.action if edit is not None else ""
        layer = self.plan.layers.get(subject_of(node))
        last = layer is not None and layer.last_axis
        unfolds = not isinstance(self._state(node), Folded)  # else it takes replicas as samples, and gives them so
        for source in node.all_input_nodes:
            value = source.meta["value"]
            if isinstance(value, Tensor) and source.op != "get_attr":
                state = self._state(source)
                if action == "first_replica":
                    state = None
                elif action not in ("", "per_replica") and (
                    (isinstance(state, Folded) and unfolds) or (state and last)
                ):
                    state = plain(value.shape[-1 if last else 1], self.plan.beta)
                yield channel_map(state, tuple(value.shape[1:]), value.ndim - 2 if last else 0)

    def _output(self, node: fx.Node) -> ChannelMap | None:
        value = node.meta["value"]
        if not isinstance(value, Tensor) or node.op == "get_attr":
            return None
        return channel_map(self._state(node), tuple(value.shape[1:]))

    # -- what changed with it ----------------------------------------------------------------------------------------
    def _with_it(self, path: str, nodes: list[fx.Node]) -> Iterator[Neighbour]:
        before = list(dict.fromkeys(p for n in nodes for i in n.all_input_nodes for p in self._upstream(i)))
        behind, joins = self._downstream(nodes)
        others = [p for n in joins for i in n.all_input_nodes for p in self._upstream(i)]
        told = {path}
        for why, paths in (("input", before), ("behind", behind), ("sum", others)):
            for other in paths:
                if other not in told and other in self.edits:
                    told.add(other)
                    yield Neighbour(other, why, what_happens(self.edits[other], self.plan.beta, brief=True))

    def _upstream(self, node: fx.Node) -> list[str]:
        """The nearest changed modules that a tensor comes from, itself included."""
        found: dict[str, None] = {}
        seen: set[fx.Node] = set()
        todo = [node]
        while todo:
            at = todo.pop(0)
            if at in seen or not holds_tensor(at.meta.get("value")):
                continue
            seen.add(at)
            if at.op != "placeholder" and subject_of(at) in self.edits:
                found[subject_of(at)] = None
            else:
                todo += at.all_input_nodes
        return list(found)

    def _downstream(self, nodes: Iterable[fx.Node]) -> tuple[list[str], list[fx.Node]]:
        """The changed modules behind, up to and with the next convolutions; and the sums on the way."""
        found: dict[str, None] = {}
        joins: list[fx.Node] = []
        seen: set[fx.Node] = set()
        todo = [u for n in nodes for u in n.users]
        while todo:
            at = todo.pop(0)
            if at in seen or at.op == "output":
                continue
            seen.add(at)
            subject = subject_of(at)
            if subject in self.edits:
                found[subject] = None
            layer = self.plan.layers.get(subject)
            if layer is not None and layer.role in CONVOLUTIONS:
                continue
            if operator_name(at) in _JOINS and at.op != "call_module":
                joins.append(at)
                continue  # behind a sum the stream belongs to both sides
            todo += at.users
        return list(found), joins

    # -- names -------------------------------------------------------------------------------------------------------
    def _resolved(self, path: str) -> str:
        known = {n for n, _ in self.plan.network.module.named_modules() if n} | set(self.nodes) | set(self.edits)
        if path in known:
            return path
        owner, _, name = path.rpartition(".")
        if owner in known and name in tensor_names(self.plan.network.module, owner):
            return owner  # a tensor: its module's story has it
        inner = [p for p in known if p.endswith(f".{path}")]
        hint = f"; it has {', '.join(sorted(inner)[:3])}" if inner else nearest(path, sorted(known))
        raise UsageError(f"{path}: the network has no such module{hint}; without a path, all of it is explained")
