"""What a transform will do, as values: which module changes how, and the graph of the Rep network.

`--dry-run` prints a Plan, `surgery.apply` carries it out; making one changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from torch import fx, nn

from repbnn_cli.channels import State
from repbnn_cli.graph import Network
from repbnn_cli.inherit import Recipe
from repbnn_cli.recognize import Layer
from repbnn_cli.rules import RuleSet


@dataclass(frozen=True)
class ModuleEdit:
    """One module (or one parameter used by a forward directly) and what becomes of it.

    action: repeat_output, rep_conv, rep_batch_norm, batch_norm, per_channel, parameter, depthwise, per_replica,
    select_inputs, first_replica.
    tensors: (name within the module, recipe); channels: (in, out) the module has afterwards; repeats: of its output.
    before, after: shapes for people to read. reset: fresh initialisation instead of the recipes' values.
    layout: for a convolution that is called as a function, what happens to its kernel, which is computed elsewhere.
    """

    path: str
    part: str
    rule: str
    where: str
    role: str
    action: str
    before: str
    after: str
    tensors: tuple[tuple[str, Recipe], ...] = ()
    channels: tuple[int, int] | None = None
    repeats: int = 1
    reset: bool = False
    layout: Recipe | None = None

    @property
    def way(self) -> Recipe:
        """What happens to the kernel of a convolution or linear layer."""
        return self.layout or self.tensors[0][1]

    def resized(self, layer: Layer) -> Layer:
        """The convolution `layer` with the channels that it has afterwards."""
        assert self.channels is not None
        into, out = self.channels
        groups = into if self.action == "depthwise" else layer.groups
        return replace(layer, kernel_shape=(out, into // groups, *layer.kernel_shape[2:]), groups=groups)

    def tensor_path(self, name: str) -> str:
        """Dotted path from the network of a tensor that is edited."""
        return self.path if self.action == "parameter" else f"{self.path}.{name}"


@dataclass(frozen=True)
class Step:
    """Where a tensor of the source network is found in the Rep network: node name there, and its channel map.

    static: computed from parameters alone, which change in their own ways; not comparable.
    by_position: a sum of differently ordered replicas as they come (rules: `align: position`); not comparable either.
    """

    node: str
    state: State
    static: bool = False
    by_position: bool = False


@dataclass
class Plan:
    """Everything `apply` needs. `steps`: source node name → Step; `added`: path → helper layer that the graph calls.

    in_training: graph and steps of training mode, where the network has another graph then; all else is the same there.
    """

    network: Network
    layers: Mapping[str, Layer]
    rules: RuleSet
    graph: fx.Graph
    edits: tuple[ModuleEdit, ...]
    added: dict[str, nn.Module]
    steps: dict[str, Step]
    notes: list[str] = field(default_factory=list)
    in_training: Plan | None = None

    @property
    def beta(self) -> int:
        return self.rules.options.beta

    def rows(self) -> list[PlanRow]:
        """Every changed module, in order of the network."""
        return [PlanRow.of(e) for e in self.edits]


@dataclass(frozen=True)
class PlanRow:
    """One changed module, as plain values: what reports and `--dry-run` show."""

    part: str
    path: str
    role: str
    action: str
    rule: str
    where: str
    before: str
    after: str
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, edit: ModuleEdit) -> PlanRow:
        tensors = tuple(f"{name}: {recipe.describe()}" for name, recipe in edit.tensors)
        if edit.reset:
            tensors = tuple(f"{name}: fresh" for name, _ in edit.tensors)
        return cls(
            edit.part, edit.path, edit.role, edit.action, edit.rule, edit.where, edit.before, edit.after, tensors
        )

    def as_plain(self) -> dict[str, object]:
        return {**asdict(self), "tensors": list(self.tensors)}
