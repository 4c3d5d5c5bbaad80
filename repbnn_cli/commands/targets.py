"""What a command line names: a result, a checkpoint, a zoo network, a place to write to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from repbnn_cli import checkpoint, result, shapes, source, views
from repbnn_cli import rules as rulebook
from repbnn_cli import zoo as registry
from repbnn_cli.deploy import packed
from repbnn_cli.errors import CheckpointError, UsageError
from repbnn_cli.graph import Network
from repbnn_cli.recognize import Layer, recognize
from repbnn_cli.rules import RuleSet
from repbnn_cli.source import Origin, Source
from repbnn_cli.wording import some

DEFAULT_RULES = "reptran"


def result_or_newest(target: str | None) -> str:
    """What was named, or the newest result, which is then said."""
    if target is not None:
        return target
    found = result.newest()
    views.say(f"newest result: {found}")
    return str(found)


def is_result(path: str) -> bool:
    return Path(path).is_file() and result.is_result(path)


def zoo_network(name: str, input_size: str | None) -> Source:
    """A zoo network without trained weights; a name that is neither file nor network gets the nearest names."""
    if name not in registry.ARCHS:
        if "/" in name or "." in name:
            raise CheckpointError(f"{name}: no such file; name a checkpoint, a result, or a network (`repbnn zoo`)")
        registry.build(name)
    shape = source.parse_input_size(input_size) if input_size else (registry.ARCHS[name].input_shape,)
    origin = source.Origin(name, None, {}, None, shape)
    return Source(source.from_origin(origin), origin, reason="from the zoo, without trained weights")


@dataclass(frozen=True)
class Examined:
    """A network to look at: of a result, the Rep network. trained: whether its weights are anybody's."""

    target: str
    network: Network
    layers: dict[str, Layer]
    origin: Origin
    trained: bool
    file: checkpoint.Checkpoint | None = None
    opened: result.Result | None = None

    @property
    def name(self) -> str:
        return f"Rep-{self.origin.name}" if self.opened else self.origin.name

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of its inputs, without batch."""
        return tuple(shape[1:] for shape in self.network.example)


def examined(
    target: str, *, arch: str | None = None, model: str | None = None, model_args: str | None = None,
    input_size: str | None = None, rules: str | None = None, key: str | None = None, unsafe: bool = False,
    values: bool = False,
) -> Examined:  # fmt: skip
    """The network of a result, a checkpoint, a packed file, or a zoo name. values: a zoo network gets fresh weights
    instead of zeros, so that it can be run; rules: a rule file that says what some of its modules are."""
    if Path(target).is_file() and packed.is_packed(target):
        again = packed.open_packed(target, model)
        return Examined(target, again.network, again.layers, again.origin, trained=True)
    opened = result.open_if_result(target, model) if Path(target).is_file() else None
    if opened is not None:
        if rules is not None:
            raise UsageError(f"--rules {rules}: {target} is a result, and has its rules in it; leave --rules out")
        network, layers = shapes.rep_network(opened.plan, opened.module)
        return Examined(target, network, layers, opened.origin, trained=True, opened=opened)
    if Path(target).exists() or model is not None:
        src = source.from_checkpoint(
            target, arch=arch, model=model, model_args=model_args, input_size=input_size, key=key, unsafe=unsafe
        )
        say_choice(src, key)
    else:
        src = zoo_network(target, input_size)
        if values:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                src = replace(src, model=registry.build(target).eval())
    declared = rulebook.load(rules) if rules else None
    network = source.capture(src.model, src.origin, declared)
    layers = recognize(network, declared.declare if declared else None)
    return Examined(target, network, layers, src.origin, trained=src.file is not None, file=src.file)


def check_output(output: str | Path | None, *, force: bool) -> None:
    """Early, before any work: the place can be written. The folder checkpoints/ is made when there is a result."""
    if output is not None and (isinstance(output, str) or output.parent.is_dir()):
        checkpoint.check_output(output, force=force)


def deliver(text: str, output: str | None, *, force: bool) -> None:
    """To stdout, or atomically into a file."""
    if output is None:
        print(text, end="" if text.endswith("\n") else "\n")
        return
    checkpoint.atomic_write_text(output, text if text.endswith("\n") else text + "\n", force=force)
    views.say(f"wrote {output}")


def named_network(name: str) -> Source:
    """A checkpoint's network with its weights, or a zoo network without."""
    return source.from_checkpoint(name) if Path(name).exists() else zoo_network(name, None)


def network_of(name: str, *, input_size: str | None, **origin: Any) -> Source:
    """A checkpoint's network, the user's own if `origin` names his code; or a zoo network without weights."""
    if Path(name).exists() or origin.get("model"):
        return source.from_checkpoint(name, input_size=input_size, **origin)
    return zoo_network(name, input_size)


def say_choice(src: Source, key: str | None) -> None:
    """What of the file was taken, where there was a choice; nothing where `--key` made it."""
    if src.file is not None and src.file.others and key is None:
        views.say(f"note: took {src.file.container} of the file; --key takes {some(src.file.others)} instead")
    if src.left_out:
        views.say(f"note: {src.left_out}")


def say_attempts(network: Network) -> None:
    """`--verbose`: how the capture was tried, and what came of it."""
    for number, attempt in enumerate(network.attempts, 1):
        views.say(f"capture {number}: {attempt}")


def options_of(rules: RuleSet) -> dict[str, Any]:
    return {"beta": rules.options.beta, "inherit": rules.options.inherit, "last_layer": rules.options.last_layer}
