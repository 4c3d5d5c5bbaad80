"""The arguments of `export`."""

from __future__ import annotations

from typing import Annotated

import typer

from repbnn_cli.cli.options import Arch, Force, InputSize, Json, Key, Model, ModelArgs, Unsafe, export_app


@export_app.callback()
def _export() -> None:
    """Keeps `export packed` two words while it is the only form."""


@export_app.command("packed")
def export_packed(
    target: Annotated[
        str | None, typer.Argument(help="Result or checkpoint; the newest result in checkpoints/ if not given.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="NAME.packed beside it if not given.")] = None,
    zeros_as_plus: Annotated[
        bool, typer.Option("--zeros-as-plus", help="Weights with sign 0, which no bit can hold, become +1.")
    ] = False,
    force: Force = False,
    arch: Arch = None,
    model: Model = None,
    model_args: ModelArgs = None,
    input_size: InputSize = None,
    key: Key = None,
    unsafe_load: Unsafe = False,
    as_json: Json = False,
) -> None:
    """1-bit kernels as bits, BatchNorm as scale and shift; layout in docs/packed-format.md.

    \b
    Examples:
    repbnn export packed rep.repbnn.pt -o net.packed
    repbnn evaluate net.packed
    """
    from repbnn_cli.commands import deploy

    deploy.export_packed(
        target, output=output, zeros_as_plus=zeros_as_plus, force=force, as_json=as_json, arch=arch, model=model,
        model_args=model_args, input_size=input_size, key=key, unsafe=unsafe_load,
    )  # fmt: skip
