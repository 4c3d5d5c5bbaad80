"""Arguments, help, exit codes and the one error boundary; imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.models import CommandInfo

import repbnn_cli
from repbnn_cli import runs, streams
from repbnn_cli.cli import (  # noqa: F401 — importing them registers their commands
    advice,
    costs,
    deploy,
    report,
    surgery,
    training,
)  # fmt: skip
from repbnn_cli.cli.options import app
from repbnn_cli.errors import RepbnnError

__all__ = ["app", "main", "run"]


def _name(command: CommandInfo) -> str:
    return command.name or (command.callback.__name__ if command.callback else "")


# What one does with a network, in the order in which one does it; all other commands follow.
_FIRST = ("transform", "inspect", "explain", "lint", "profile", "compare", "report", "zoo")
app.registered_commands.sort(key=lambda c: (*_FIRST, _name(c)).index(_name(c)))


def _version(value: bool) -> None:
    if value:
        print(f"repbnn {repbnn_cli.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version


def run(arguments: list[str]) -> int:
    """Runs the command line; the exit code. Errors become one line on stderr."""
    debug = "--debug" in arguments
    try:
        command = _with_clean_output(typer.main.get_command(app))
        result = command([a for a in arguments if a != "--debug"], prog_name="repbnn", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:  # `repbnn zoo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BaseException as error:
        if debug:
            traceback.print_exc()
        return _explain(error, debug)


def _with_clean_output(command: Any) -> Any:
    """The command, or each one of a group, with standard output for its results alone; help is none of that."""
    parts = getattr(command, "commands", None)
    if parts is None:
        command.callback = _cleanly(command.callback)
    for part in (parts or {}).values():
        _with_clean_output(part)
    return command


def _cleanly(callback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(callback)
    def called(*arguments: Any, **named: Any) -> Any:
        with streams.for_results_alone():
            return callback(*arguments, **named)

    return called


def _explain(error: BaseException, debug: bool) -> int:
    rank = runs.other_rank()
    label = "error" if rank is None else f"rank {rank}: error"
    describe = getattr(error, "format_message", None)  # typer's usage errors; the class moved between its versions
    if callable(describe) and type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: its help
        print(describe(), file=sys.stderr)
        return 2
    if callable(describe):
        context: Any = getattr(error, "ctx", None)
        where = f" (see `{context.command_path} --help`)" if context else ""
        print(f"{label}: {' '.join(describe().split())}{where}", file=sys.stderr)
        return 2
    if isinstance(error, RepbnnError):
        print(f"{label}: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if not isinstance(error, Exception):
        raise error
    text = " ".join(str(error).split()) or "no further description"
    hint = "" if debug else "; --debug shows where"
    print(f"{label}: {type(error).__name__}: {text}{hint}", file=sys.stderr)
    return 1


def main() -> None:
    """Entry point of `repbnn`."""
    sys.exit(run(sys.argv[1:]))
