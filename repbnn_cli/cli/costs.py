"""The arguments of what measures and compares networks: profile, compare, zoo."""

from __future__ import annotations

from typing import Annotated

import typer

from repbnn_cli.cli.options import (
    Arch,
    Force,
    InputSize,
    Json,
    Key,
    LatencyBackend,
    LatencyDevice,
    Model,
    ModelArgs,
    Unsafe,
    Verbose,
    app,
)


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
        str | None,
        typer.Option(
            "--sort", help="Order of the layers: ops, flops, bops, other, macs, parameters, packed, latent, path."
        ),
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="Sum layers up to this depth of their path.")] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One row per layer as CSV.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables as Markdown.")] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")] = None,
    force: Force = False,
    cross_check: Annotated[
        bool, typer.Option("--cross-check", help="Count with fvcore, thop and torch too, and explain every gap.")
    ] = False,
    max_ops: Annotated[
        float | None,
        typer.Option(
            "--max-ops", help="Exit code 4 above this many OPs without BN, e.g. 0.9e8; of a result: its Rep network's."
        ),
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time per batch instead, measured here, before and after.")
    ] = False,
    batch: Annotated[
        str | None, typer.Option("--batch", help="Batch sizes of --latency; 1,8,128 if not given.")
    ] = None,
    device: LatencyDevice = None,
    backend: LatencyBackend = None,
    key: Key = None,
    unsafe_load: Unsafe = False,
    verbose: Verbose = False,
) -> None:
    """What a network costs, before and after.

    FLOPs, BOPs, OPs, sizes and activation memory per layer and in total; both sides for a result of `transform`.

    \b
    Examples:
    repbnn profile                       the newest result in checkpoints/
    repbnn profile reactnet_a --layers --depth 2 --sort ops
    repbnn profile ckpt.pth --cross-check
    repbnn profile rep.repbnn.pt --max-ops 0.9e8   a gate for CI
    repbnn profile rep.repbnn.pt --latency --batch 1,64
    """
    if latency:
        from repbnn_cli.commands import deploy

        given: dict[str, object] = {
            "--layers": per_layer, "--sort": sort, "--depth": depth, "--csv": as_csv, "--markdown": markdown,
            "--cross-check": cross_check, "--max-ops": max_ops, "--verbose": verbose,
        }  # fmt: skip
        deploy.timings(
            target, batch=batch or "1,8,128", device=device or "auto", backend=backend or "auto", output=output,
            force=force, as_json=as_json, others=[n for n, v in given.items() if v is not None and v is not False],
            arch=arch, model=model, model_args=model_args, input_size=input_size, key=key, unsafe=unsafe_load,
        )  # fmt: skip
        return
    from repbnn_cli.commands import costs as commands

    commands.check_counts_only({"--batch": batch, "--device": device, "--backend": backend})
    commands.profile(
        target, arch=arch, model=model, model_args=model_args, input_size=input_size, per_layer=per_layer, sort=sort,
        depth=depth, as_json=as_json, as_csv=as_csv, markdown=markdown, output=output, force=force, key=key,
        unsafe=unsafe_load, cross_check=cross_check, max_ops=max_ops, verbose=verbose,
    )  # fmt: skip


@app.command()
def compare(
    names: Annotated[
        list[str], typer.Argument(help="Results, checkpoints and zoo names, any number.", metavar="A B ...")
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Your own network: path/to/file.py:callable; of several, given one by one, the first that fits.",
        ),
    ] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One row per network as CSV, exact.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table, exact.")] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")] = None,
    force: Force = False,
) -> None:
    """Networks side by side: sizes, FLOPs, BOPs, OPs, memory, stated accuracy.

    Of a result the Rep network. OPs are without BN, as in the paper's tables.

    \b
    Examples:
    repbnn compare ckpt.pth rep.repbnn.pt reactnet_a
    repbnn compare mine.pt theirs.pt --model mine.py:make --model theirs.py:make
    """
    from repbnn_cli.commands import costs as commands

    commands.compare(names, models=models or [], as_json=as_json, as_csv=as_csv, markdown=markdown, output=output,
                     force=force)  # fmt: skip


@app.command()
def zoo(as_json: Json = False) -> None:
    """The networks of the paper, with accuracy.

    \b
    Examples:
    repbnn zoo
    repbnn zoo --json
    """
    from repbnn_cli.commands import costs as commands

    commands.zoo(as_json=as_json)
