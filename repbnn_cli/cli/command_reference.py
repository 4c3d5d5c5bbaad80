"""The reference of the command line as Markdown, made from the commands themselves; pure text, imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from repbnn_cli.cli import app

HEAD = """# Commands

Generated from the commands' own arguments and help; a test compares the two. To write it again:

    python -c "from repbnn_cli.cli.command_reference import reference; print(reference(), end='')" > docs/commands.md

Every table has a `--json` twin. Exit codes: 0 done, 2 wrong usage or rules, 3 cannot be loaded or captured, 4 a check
failed, 1 anything else, 130 interrupted. `--debug`, anywhere, shows tracebacks.
"""


def commands() -> dict[str, Any]:
    """ "rules check" → command, in order of registration."""
    return dict(_walk(typer.main.get_command(app), ()))


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield " ".join(path), command
        return
    for name, sub in inner.items():
        yield from _walk(sub, (*path, name))


def parts_of_help(command: Any) -> tuple[str, list[str]]:
    """What a command is for, and its examples."""
    text, _, examples = str(command.help or "").partition("Examples:")
    told = "\n\n".join(" ".join(p.split()) for p in text.replace("\b", "").split("\n\n") if p.strip())
    return told, [line.strip() for line in examples.splitlines() if line.strip()]


def reference() -> str:
    """What docs/commands.md holds."""
    return HEAD + "".join(_section(name, command) for name, command in commands().items())


def _section(name: str, command: Any) -> str:
    told, examples = parts_of_help(command)
    shown = "".join(f"    {line}\n" for line in examples)
    rows = "".join(f"| {_name(p)} | {_text(p)} |\n" for p in command.params if p.name != "help")
    table = f"\n| argument or option | |\n| --- | --- |\n{rows}" if rows else ""
    return f"\n## repbnn {name}\n\n{told}\n" + (f"\n{shown}" if shown else "") + table


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = str(parameter.metavar or parameter.name.upper())
        return f"`{name}`" if parameter.required else f"`[{name}]`"
    return ", ".join(f"`{o}`" for o in (*parameter.opts, *parameter.secondary_opts))


def _text(parameter: Any) -> str:
    default = parameter.default
    plain = isinstance(default, int | float | str) and not isinstance(default, bool)
    said = f" Default: {default}." if plain and default != "" else ""
    return (str(parameter.help or "") + said).replace("|", "\\|")
