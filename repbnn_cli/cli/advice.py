"""The arguments of what gives advice: explain, lint, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from repbnn_cli.cli.options import Json, Model, app


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
