"""The arguments of `report`."""

from __future__ import annotations

from typing import Annotated

import typer

from repbnn_cli.cli.options import Force, Json, Model, app


@app.command()
def report(
    target: Annotated[
        str | None, typer.Argument(help="Result, or folder of a training run; the newest result if not given.")
    ] = None,
    others: Annotated[
        list[str] | None, typer.Argument(help="Further results, checkpoints, zoo names: for the OPs/top-1 landscape.")
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="One self-contained page.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown (also what you get without it).")] = False,
    as_json: Json = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")] = None,
    plots: Annotated[
        str | None,
        typer.Option("--plots", help="Folder for the drawings of --markdown; beside -o, as NAME-plots/, if not given."),
    ] = None,
    run_folders: Annotated[
        list[str] | None, typer.Option("--runs", help="Training runs to show: their folders, or a folder of such.")
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option("--images", help="Images, or folders of them: feature maps, real activations.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", help="Whose feature maps to show, e.g. layer2.0.conv1.")
    ] = None,
    timestamp: Annotated[
        bool, typer.Option("--timestamp/--no-timestamp", help="State when the report was made.")
    ] = False,
    model: Model = None,
    sweep: Annotated[str | None, typer.Option("--sweep", help="Folder of a sweep: report on that instead.")] = None,
    force: Force = False,
) -> None:
    """The comparison, ready for a pull request or a talk.

    What was transformed, certificate, costs, accuracy against OPs, training curves, the graph, weights, activations.

    \b
    Examples:
    repbnn report --markdown -o REPORT.md
    repbnn report --html -o report.html --images photos/ --layer layer2.0.conv1
    repbnn report runs/rep-irnet-cifar10-seed0 --runs runs/raw --html -o report.html
    repbnn report --sweep runs/table-3 --markdown -o table-3.md
    """
    from repbnn_cli.commands import report as commands

    commands.report(
        target, others or [], html=html, markdown=markdown, as_json=as_json, output=output, plots=plots,
        run_folders=run_folders or [], images=images or [], layer=layer, timestamp=timestamp, model=model, sweep=sweep,
        force=force,
    )  # fmt: skip
