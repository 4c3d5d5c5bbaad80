"""What a command line names: a result, a checkpoint, a zoo network, a place to write to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repbnn_cli import checkpoint, result, seeds, source, views, writing
from repbnn_cli import rules as rulebook
from repbnn_cli import zoo as registry
from repbnn_cli.deploy import packed
from repbnn_cli.errors import CheckpointError, RepbnnError, UsageError
from repbnn_cli.graph import Network
from repbnn_cli.profiler import shapes
from repbnn_cli.recognize import Layer, recognize
from repbnn_cli.rules import RuleSet
from repbnn_cli.source import Origin, Source
from repbnn_cli.user_code import user_model
from repbnn_cli.wording import some

DEFAULT_RULES = "reptran"


def result_or_newest(target: str | None) -> str:
    """What was named, or the newest result, which is then said."""
    if target is not None:
        return target
    found = result.newest()
    views.say(f"newest result: {found}")
    return str(found)


def is_zoo_name(target: str) -> bool:
    """Whether a network of the zoo is meant: its name, where no file is called so. An error for what is neither."""
    if target in registry.ARCHS:
        return not Path(target).is_file()
    if Path(target).exists():
        return False
    if "/" in target or "." in target:
        checkpoint.load(target)  # raises, with the nearest file
    registry.build(target)  # raises, with the nearest names
    return True


def zoo_network(name: str, input_size: str | None) -> Source:
    """A zoo network without trained weights."""
    origin = source.zoo_origin(name, input_size)
    return Source(source.from_origin(origin), origin, reason="from the zoo, without trained weights")


@dataclass(frozen=True)
class Found:
    """What a target is: a packed file, a result of `transform`, or a source network, one of the zoo without a file."""

    packed: packed.Opened | None = None
    opened: result.Result | None = None
    source: Source | None = None


def found(
    target: str, *, model: str | None = None, key: str | None = None, unsafe: bool = False, rules: str | None = None,
    **said: str | None,
) -> Found:  # fmt: skip
    """The target, read once; what is said of it, and the target says itself, has to agree with that.

    said: what else `source.from_file` takes.
    """
    if is_zoo_name(target):
        src = zoo_network(target, said.get("input_size"))
        check_zoo_agrees(src.origin, **said, key=key, model=model)
        return Found(source=src)
    file = checkpoint.load(target, key=key, unsafe=unsafe)
    if packed.is_packed(file):
        again = packed.open_packed(target, model)
        check_agrees(f"{target} is a packed network", again.origin, **said, key=key, rules=rules)
        return Found(packed=again)
    opened = result.of_file(file, model)
    if opened is not None:
        check_agrees(f"{target} is a result", opened.origin, **said, key=key, rules=rules)
        return Found(opened=opened)
    src = source.from_file(file, model=model, **said)
    say_choice(src, key)
    return Found(source=src)


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
    packed: packed.Opened | None = None

    @property
    def name(self) -> str:
        rep = self.opened or (self.packed and self.packed.header["rules"])
        return f"Rep-{self.origin.name}" if rep else self.origin.name

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
    read = found(
        target, model=model, key=key, unsafe=unsafe, rules=rules, arch=arch, model_args=model_args,
        input_size=input_size,
    )  # fmt: skip
    if read.packed is not None:
        again = read.packed
        return Examined(target, again.network, again.layers, again.origin, trained=True, packed=again)
    if read.opened is not None:
        network, layers = shapes.rep_network(read.opened.plan, read.opened.module)
        return Examined(target, network, layers, read.opened.origin, trained=True, opened=read.opened)
    assert read.source is not None
    src = read.source
    if src.file is None and values:
        with seeds.seeded(0):
            src = replace(src, model=registry.build(target).eval())
    declared = rulebook.load(rules) if rules else None
    if declared is not None:
        source.check_declared(src.model, declared)
    network = source.capture(src.model, src.origin, declared)
    layers = recognize(network, declared.declare if declared else None)
    return Examined(target, network, layers, src.origin, trained=src.file is not None, file=src.file)


def examined_beside(name: str, models: Sequence[str] = ()) -> tuple[Examined, str | None]:
    """One of several networks, and which of `models` built it: the first that fits, None where the zoo knows it."""
    refusals: list[RepbnnError] = []
    for model in () if is_zoo_name(name) else models:
        try:
            return examined(name, model=model), model
        except (CheckpointError, UsageError) as error:
            refusals.append(error)
    try:
        return examined(name), None
    except RepbnnError:
        if refusals:
            raise refusals[-1] from None
        raise


def check_agrees(
    what: str, origin: Origin, *, arch: str | None = None, model_args: str | None = None,
    input_size: str | None = None, key: str | None = None, rules: str | None = None,
) -> None:  # fmt: skip
    """Options that say which network a checkpoint holds, for a target that says so itself: they agree with it, or
    UsageError. what: the target and its kind, for the message."""
    said = (
        ("--arch", arch, arch, origin.arch),
        ("--model-args", model_args, source.parse_args(model_args), dict(origin.model_args)),
        ("--input-size", input_size, source.parse_input_size(input_size), origin.input_shape),
    )
    for option, text, meant, own in said:
        if text is not None and meant != own:
            is_own = f"has {_as_option(own)} in it" if own else "takes none"
            raise UsageError(f"{option} {text}: {what}, and {is_own}; leave {option} out")
    if rules is not None:
        raise UsageError(f"--rules {rules}: {what}, and has its rules in it; leave --rules out")
    if key is not None:
        raise UsageError(f"--key {key}: chooses among the state dicts of a checkpoint; {what}; leave --key out")


def check_zoo_agrees(origin: Origin, **said: Any) -> None:
    """`check_agrees` for a name of the zoo."""
    if said.get("model") is not None:
        raise UsageError(f"--model {said['model']}: {origin.arch} is a network of the zoo; leave --model out")
    told = {name: said.get(name) for name in ("arch", "model_args", "input_size", "key")}
    check_agrees(f"{origin.arch} is a network of the zoo", origin, **told)


def _as_option(value: Any) -> str:
    """As the command line writes it."""
    if isinstance(value, tuple):
        return ",".join("x".join(map(str, shape)) for shape in value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def check_output(output: str | Path | None, *, force: bool) -> None:
    """Early, before any work: the place can be written. A Path is a default, whose folder is made when there is a
    result."""
    if output is None:
        return
    if isinstance(output, str) or output.parent.is_dir():
        writing.check_output(output, force=force)
    elif output.parent.exists():
        raise UsageError(f"{output.parent}: is no folder, as results want it; move it, or name the result with -o")
    elif not os.access(output.parent.parent, os.W_OK | os.X_OK):
        above = output.parent.absolute().parent
        raise UsageError(f"{output.parent}: cannot be made, as {above} is not writable; name the result with -o")


def deliver(text: str, output: str | None, *, force: bool) -> None:
    """To stdout, or atomically into a file."""
    if output is None:
        views.print_text(text)
        return
    writing.atomic_write_text(output, text if text.endswith("\n") else text + "\n", force=force)
    views.say(f"wrote {output}")


def network_of(name: str, *, input_size: str | None = None, **origin: Any) -> Source:
    """A checkpoint's network, the user's own if `origin` names his code; or a zoo network without weights."""
    if not is_zoo_name(name):
        return source.from_checkpoint(name, input_size=input_size, **origin)
    src = zoo_network(name, input_size)
    check_zoo_agrees(src.origin, **origin)
    return src


def say_choice(src: Source, key: str | None) -> None:
    """What of the file was taken, where there was a choice (none where `--key` made it), and what became of it."""
    if src.file is not None and src.file.others and key is None:
        views.say(f"note: took {src.file.container} of the file; --key takes {some(src.file.others)} instead")
    if src.left_out:
        views.say(f"note: {src.left_out}")
    if src.file is not None and (narrow := user_model.widened(src.file.tensors, src.model)):
        views.say(f"note: {narrow}")


def say_attempts(network: Network) -> None:
    """`--verbose`: how the capture was tried, and what came of it."""
    for number, attempt in enumerate(network.attempts, 1):
        views.say(f"capture {number}: {attempt}")


def options_of(rules: RuleSet) -> dict[str, Any]:
    return {"beta": rules.options.beta, "inherit": rules.options.inherit, "last_layer": rules.options.last_layer}
