"""The arguments of what measures and compares networks: profile, report, zoo."""

from __future__ import annotations

from typing import Annotated

import typer

from repbnn_cli.cli.options import Arch, Force, InputSize, Json, Key, Model, ModelArgs, Unsafe, app


@app.command()
def profile(
    target: Annotated[
        str | None,
        typer.Argument(help="Result, checkpoint or zoo name; the newest result in checkpoints/ if not given."),
    ] = None,
    arch: Arch = None,
    model: Model = None,
    model_args: ModelArgs = None,
    input_size: InputSize = None,
    per_layer: Annotated[bool, typer.Option("--layers", help="One row per layer as well as the totals.")] = False,
    sort: Annotated[
        str | None, typer.Option("--sort", help="Order of the layers: ops, flops, bops, parameters, packed.")
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="Sum layers up to this depth of their path.")] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One row per layer as CSV.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables as Markdown.")] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")] = None,
    force: Force = False,
    key: Key = None,
    unsafe_load: Unsafe = False,
) -> None:
    """What a network costs, before and after.

    FLOPs, BOPs, OPs, sizes and activation memory per layer and in total; both sides for a result of `transform`.

    \b
    Examples:
    repbnn profile                       the newest result in checkpoints/
    repbnn profile reactnet_a --layers --depth 2 --sort ops
    """
    from repbnn_cli.commands import costs as commands

    commands.profile(
        target, arch=arch, model=model, model_args=model_args, input_size=input_size, per_layer=per_layer, sort=sort,
        depth=depth, as_json=as_json, as_csv=as_csv, markdown=markdown, output=output, force=force, key=key,
        unsafe=unsafe_load,
    )  # fmt: skip


@app.command()
def report(
    target: Annotated[str | None, typer.Argument(help="Result; the newest in checkpoints/ if not given.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown (also what you get without it).")] = False,
    as_json: Json = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")] = None,
    timestamp: Annotated[
        bool, typer.Option("--timestamp/--no-timestamp", help="State when the report was made.")
    ] = True,
    model: Model = None,
    force: Force = False,
) -> None:
    """The comparison, ready for a pull request.

    What was transformed, by which rules, the certificate, costs before and after, and the paper's figures.

    \b
    Examples:
    repbnn report --markdown -o REPORT.md
    """
    from repbnn_cli.commands import costs as commands

    del markdown  # the only format for reading so far
    commands.report(target, as_json=as_json, output=output, timestamp=timestamp, model=model, force=force)


@app.command()
def zoo(as_json: Json = False) -> None:
    """The networks of the paper, with accuracy."""
    from repbnn_cli.commands import costs as commands

    commands.zoo(as_json=as_json)
