"""Every command and option is documented: help on each, examples that parse, and docs/commands.md made from them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from repbnn_cli.cli.command_reference import commands, parts_of_help, reference

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = commands()


def options(command: Any) -> dict[str, Any]:
    return {o: p for p in command.params for o in (*p.opts, *p.secondary_opts) if p.param_type_name == "option"}


def mentioned(text: str) -> list[list[str]]:
    """The words of every `repbnn ...` in examples or indented code, without comments and what follows a pipe."""
    lines = re.findall(r"^(?:    |\$ )(?:repbnn|.+ -m repbnn_cli) (.+)$", text, re.M)
    return [shlex.split(re.split(r"\s{2,}|\s[#>|]\s", line)[0]) for line in lines]


def command_of(words: list[str]) -> str:
    """The longest command that the words begin with."""
    found = [name for name in COMMANDS if words[: len(name.split())] == name.split()]
    assert found, f"no such command: repbnn {' '.join(words)}"
    return max(found, key=len)


def unknown_options(words: list[str]) -> list[str]:
    known = options(COMMANDS[command_of(words)])
    given = [w.partition("=")[0] for w in words if re.match(r"-{1,2}[a-z]", w)]
    return [o for o in given if o not in (*known, "--help", "--debug")]


def test_the_reference_is_made_from_the_commands() -> None:
    written = (ROOT / "docs" / "commands.md").read_text("utf-8")
    assert written == reference(), "docs/commands.md is not up to date; its first lines say how to write it again"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_is_for_with_examples_that_parse(name: str) -> None:
    told, examples = parts_of_help(COMMANDS[name])
    assert told.endswith("."), f"repbnn {name}: its help is no sentence"
    assert examples, f"repbnn {name}: its help has no `Examples:` block"
    calls = mentioned("".join(f"    {line}\n" for line in examples))
    assert len(calls) == len(examples)
    assert name in {command_of(words) for words in calls}
    assert [o for words in calls for o in unknown_options(words)] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_and_option_has_help(name: str) -> None:
    assert [p.name for p in COMMANDS[name].params if not p.help] == []


def test_the_readme_shows_every_command() -> None:
    """Groups (`rules`, `recipes`) with any of their commands; `docs/commands.md` has the rest."""
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = {word for line in re.findall(r"^    repbnn (.+)$", readme, re.M) for word in line.split()[:1]}
    assert {name.split()[0] for name in COMMANDS} - shown == set()


def test_commands_that_are_written_down_exist_with_their_options() -> None:
    wrong = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for words in mentioned(page.read_text("utf-8")):
            if "|" not in words and words[0] in {n.split()[0] for n in COMMANDS}:
                wrong += [f"{page.name}: repbnn {' '.join(words)}: {o}" for o in unknown_options(words)]
    assert wrong == []


def test_help_begins_with_what_the_tool_is_for() -> None:
    assert list(COMMANDS)[:3] == ["transform", "inspect", "explain"]
    assert list(COMMANDS)[-3:] == ["recipes list", "recipes show", "recipes check"]
