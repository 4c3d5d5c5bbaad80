"""A source network with its weights: found in a checkpoint, built from the zoo, or built by the user's own code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repbnn_cli import checkpoint, graph, seeds, zoo
from repbnn_cli.checkpoint import Checkpoint, identify
from repbnn_cli.checkpoint.tied import assign
from repbnn_cli.errors import UsageError
from repbnn_cli.graph.interception import interceptable
from repbnn_cli.recognize import type_names
from repbnn_cli.rules import RuleSet
from repbnn_cli.user_code import user_model
from repbnn_cli.user_code.cpu_only import is_foreign, running


@dataclass(frozen=True)
class Origin:
    """How to build the network again, in plain values: a zoo name, or the user's `file.py:callable` and arguments."""

    arch: str | None
    model: str | None
    model_args: Mapping[str, Any]
    num_classes: int | None
    input_shape: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        return self.arch or str(self.model)

    def as_plain(self) -> dict[str, Any]:
        return {
            "arch": self.arch,
            "model": self.model,
            "model_args": dict(self.model_args),
            "num_classes": self.num_classes,
            "input_shape": [list(s) for s in self.input_shape],
        }

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> Origin:
        shape = tuple(tuple(s) for s in value["input_shape"])
        return cls(value["arch"], value["model"], dict(value["model_args"]), value["num_classes"], shape)


@dataclass(frozen=True)
class Source:
    """A network ready to be captured. `file` is None for a network without trained weights.

    left_out: which tensors of the file were left out since they lie beside the network's; "" where none were.
    """

    model: nn.Module
    origin: Origin
    file: Checkpoint | None = None
    reason: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)
    left_out: str = ""

    @property
    def trusted(self) -> bool:
        """A zoo network of torch's and our layers: their shapes are known without running them. A user's forward may do
        anything between them."""
        return self.origin.model is None and not is_foreign(self.model)


def from_checkpoint(
    path: str,
    *,
    arch: str | None = None,
    model: str | None = None,
    model_args: str | None = None,
    input_size: str | None = None,
    key: str | None = None,
    unsafe: bool = False,
) -> Source:
    """`from_file` of what `checkpoint.load` reads. Raises CheckpointError as well where it cannot be read."""
    file = checkpoint.load(path, key=key, unsafe=unsafe)
    return from_file(file, arch=arch, model=model, model_args=model_args, input_size=input_size)


def from_file(
    file: Checkpoint,
    *,
    arch: str | None = None,
    model: str | None = None,
    model_args: str | None = None,
    input_size: str | None = None,
) -> Source:
    """The network of a checkpoint: `model` (the user's code) if given, else `arch`, else found from the tensors.

    Raises CheckpointError (fits nothing, holds NaN), CaptureError (the user's code fails), UsageError.
    """
    path = str(file.path)
    if file.payload is not None:
        source = file.payload["source"]["file"] or file.payload["source"]["arch"] or "the network it came from"
        raise UsageError(f"{path}: is a result of `repbnn transform` already; transform its source ({source}) instead")
    if checkpoint.PACKED in file.metadata:
        raise UsageError(f"{path}: is a packed network (`repbnn export packed`), for inference alone; name its source")
    if model is None:
        if model_args is not None:
            raise UsageError(f"--model-args {model_args}: are those of your own network; name it with --model")
        checkpoint.check_finite(file.tensors, path)
    else:
        if arch is not None:
            raise UsageError("--model and --arch both name the network; give one of them")
        network = build_user_model(model, parse_args(model_args)).eval()
        file, rest = user_model.part_of(file, network)
        checkpoint.check_finite(file.tensors, path)
        user_model.load_weights(network, file.tensors, prefix=file.prefix, path=path)
        origin = Origin(None, model, parse_args(model_args), None, parse_input_size(input_size))
        sizes = ",".join("x".join(map(str, shape)) for shape in origin.input_shape)
        taken = f" for {sizes}" + " (assumed; --input-size says another)" * (input_size is None)
        return Source(network, origin, file, f"built by {model}{taken}", file.notes, rest)
    found = identify.resolve(file, arch)
    with torch.device("meta"):
        network = zoo.build(found.arch, found.num_classes)
    user_model.load_weights(network, found.tensors, path=path)
    network.eval()
    origin = zoo_origin(found.arch, input_size, found.num_classes)
    return Source(network, origin, file, found.reason, (*file.notes, *found.notes), found.left_out)


def zoo_origin(arch: str, input_size: str | None = None, num_classes: int | None = None) -> Origin:
    """Of a network of the zoo: without an input size, as large as its own data's images."""
    shape = parse_input_size(input_size) if input_size else (zoo.ARCHS[arch].input_shape,)
    return Origin(arch, None, {}, num_classes, shape)


def fresh(arch: str, seed: int, input_size: str | None = None) -> Source:
    """A network of the zoo as it starts training, its initialisation drawn with the seed. Raises UsageError."""
    origin = zoo_origin(arch, input_size)
    return Source(newly_built(origin, seed), origin, reason=f"fresh from the zoo, seed {seed}: not trained")


def newly_built(origin: Origin, seed: int) -> nn.Module:
    """The network of an origin as its own code starts it, in eval mode, drawn with the seed."""
    with seeds.seeded(seed):
        if origin.arch is not None:
            return zoo.build(origin.arch, origin.num_classes).eval()
        assert origin.model is not None
        return build_user_model(origin.model, dict(origin.model_args)).eval()


def from_origin(origin: Origin) -> nn.Module:
    """The network of an origin without its weights (zeros), in eval mode; runs the user's code if that builds it."""
    if origin.arch is None:
        assert origin.model is not None
        return build_user_model(origin.model, dict(origin.model_args)).eval()
    with torch.device("meta"):
        network = zoo.build(origin.arch, origin.num_classes)
    # Zeros are not allocated before they are touched, and shape-only work never touches them.
    zeros = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in network.state_dict().items()}
    assign(network, zeros)
    return network.eval()


def build_user_model(spec: str, args: dict[str, Any]) -> nn.Module:
    """The user's network; calls that fx cannot see are made visible while it is imported and built."""
    return user_model.build(spec, args, around=interceptable())


def capture(model: nn.Module, origin: Origin, rules: RuleSet | None = None) -> graph.Network:
    """The network's graph; a rule file may say which modules to keep whole."""

    def leaf(path: str, module: nn.Module) -> bool | None:
        rule = rules.declare(path, type_names(module)) if rules and rules.modules else None
        if rule is None or (rule.leaf is None and rule.role is None):
            return None
        return rule.leaf is not False

    with running(model):
        known = origin.model is None and not is_foreign(model)
        return graph.capture(model, origin.input_shape, leaf=leaf, shapes_only=known)


def check_declared(model: nn.Module, rules: RuleSet) -> None:
    """Raises RulesError where an entry of a rule file's modules matches none of the network's."""
    rules.check_declared((), [(path, type_names(m)) for path, m in model.named_modules() if path])


def parse_args(text: str | None) -> dict[str, Any]:
    """`--model-args`: a JSON object."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--model-args: not JSON ({error.msg} at column {error.colno}): {text}") from None
    if not isinstance(value, dict):
        raise UsageError(f"--model-args: expected a JSON object like '{{\"num_classes\": 10}}', got {text}")
    return value


def parse_input_size(text: str | None) -> tuple[tuple[int, ...], ...]:
    """`--input-size 3x32x32`, several inputs separated by commas; 3x32x32 when not given."""
    if text is None:
        return ((3, 32, 32),)
    try:
        shapes = tuple(tuple(int(n) for n in part.lower().split("x")) for part in text.split(","))
    except ValueError:
        shapes = ()
    if len(shapes) > 2 and all(len(shape) == 1 for shape in shapes):
        raise UsageError(
            f"--input-size {text}: commas separate several inputs; for one input of {shapes[0][0]} channels write "
            f"{text.replace(',', 'x')}"
        )
    if not shapes or any(n < 1 for shape in shapes for n in shape):
        raise UsageError(f"--input-size {text}: expected channels x height x width, e.g. 3x32x32 or 3x224x224")
    return shapes


def default_output(path: str, beta: int) -> Path:
    """checkpoints/NAME-rep2.repbnn.pt for NAME.pth.tar."""
    name = Path(path).name
    for ending in (".tar", ".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors", ".pth"):
        name = name.removesuffix(ending)
    return Path("checkpoints") / f"{name}-rep{beta}.repbnn.pt"
