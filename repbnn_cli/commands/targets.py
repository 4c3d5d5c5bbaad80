"""What a command line names: a result, a checkpoint, a zoo network, a place to write to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repbnn_cli import checkpoint, result, source, views
from repbnn_cli import zoo as registry
from repbnn_cli.errors import CheckpointError
from repbnn_cli.rules import RuleSet
from repbnn_cli.source import Source


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


def options_of(rules: RuleSet) -> dict[str, Any]:
    return {"beta": rules.options.beta, "inherit": rules.options.inherit, "last_layer": rules.options.last_layer}
