"""The arguments of what gives advice: explain, lint, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from repbnn_cli.cli.options import Arch, InputSize, Json, Key, Model, ModelArgs, Rules, Unsafe, app


@app.command()
def explain(
    target: Annotated[str | None, typer.Argument(help="Result; the newest in checkpoints/ if not given.")] = None,
    path: Annotated[
        str | None, typer.Argument(help="Module, operator, parameter or block; all parts if not given.")
    ] = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Why each part of a RepBNN is as it is.

    For a module: rule file and line, role and evidence, shapes and channel map, what its weights were made from, and
    which modules had to change with it. Without a path the whole story, part by part.

    \b
    Examples:
    repbnn explain rep.repbnn.pt
    repbnn explain rep.repbnn.pt layer2.0.conv1
    """
    from repbnn_cli.commands import advice as commands

    commands.explain(target, path, model=model, as_json=as_json)


@app.command()
def lint(
    target: Annotated[
        str | None,
        typer.Argument(help="Result, checkpoint or zoo name; the newest result in checkpoints/ if not given."),
    ] = None,
    arch: Arch = None,
    model: Model = None,
    model_args: ModelArgs = None,
    input_size: InputSize = None,
    rules: Rules = None,
    every: Annotated[bool, typer.Option("--all", help="List every place, not the first few.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 4 for a warning or an error.")] = False,
    key: Key = None,
    unsafe_load: Unsafe = False,
    as_json: Json = False,
) -> None:
    """What hurts a binary network in practice.

    Each finding with its severity, the places, what to do, and who says so. Of a result its Rep network is checked.

    \b
    Examples:
    repbnn lint ckpt.pth
    repbnn lint ckpt.pt --model net.py:make --strict
    """
    from repbnn_cli.commands import advice as commands

    commands.lint(
        target, strict=strict, every=every, as_json=as_json, arch=arch, model=model, model_args=model_args,
        input_size=input_size, rules=rules, key=key, unsafe=unsafe_load,
    )  # fmt: skip


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has for repbnn, and what is wrong.

    Versions, devices, optional parts and what each would enable, data sets found, known conflicts. The exit code is 0
    whatever is found.

    \b
    Examples:
    repbnn doctor
    repbnn doctor --json
    """
    from repbnn_cli.commands import advice as commands

    commands.doctor(as_json=as_json)
