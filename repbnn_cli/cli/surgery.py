"""The arguments of what reads and changes networks: transform, inspect, rules."""

from __future__ import annotations

from typing import Annotated

import typer

from repbnn_cli.cli.options import (
    LAST_SEED,
    Arch,
    Force,
    InputSize,
    Json,
    Key,
    Model,
    ModelArgs,
    Rules,
    Unsafe,
    Verbose,
    app,
    rules_app,
)


@app.command()
def transform(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Trained checkpoint (.pt .pth .th .tar .safetensors ...), or a zoo name for a fresh network."
        ),
    ],
    beta: Annotated[
        int | None, typer.Option("--beta", "-b", help="Expansion factor β; from the rules if not given.")
    ] = None,
    rules: Rules = None,
    inherit: Annotated[
        str | None, typer.Option("--inherit", help="How trained kernels are carried over: fold, reshape or none.")
    ] = None,
    last_layer: Annotated[
        str | None,
        typer.Option("--last-layer", help="Inputs the classifier takes: all, 1_over_beta or 1_over_beta2 (ways 1-3)."),
    ] = None,
    arch: Arch = None,
    model: Model = None,
    model_args: ModelArgs = None,
    input_size: InputSize = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Result file; checkpoints/NAME-repβ.repbnn.pt if not given.")
    ] = None,
    slim: Annotated[bool, typer.Option("--slim", help="Leave the source network's weights out of the result.")] = False,
    verify: Annotated[
        str,
        typer.Option(
            "--verify", help="full: also compare training mode and every gradient; quick; auto: full for --model."
        ),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, change and write nothing.")] = False,
    force: Force = False,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, max=LAST_SEED, help="Seed of newly drawn weights: of a zoo name, of --inherit none."
        ),
    ] = 0,
    key: Key = None,
    unsafe_load: Unsafe = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Turn a trained BNN into its verified RepBNN.

    \b
    Examples:
    repbnn transform ckpt.pt --beta 2
    repbnn transform ckpt.pt --model net.py:make --input-size 3x32x32 --dry-run
    repbnn transform irnet_resnet20 --beta 4 --seed 1     a RepBNN to train from scratch
    """
    from repbnn_cli.commands import transform as commands

    commands.transform(
        checkpoint, beta=beta, rules=rules, inherit=inherit, last_layer=last_layer, arch=arch, model=model,
        model_args=model_args, input_size=input_size, output=output, slim=slim, verify=verify, dry_run=dry_run,
        force=force, seed=seed, key=key, unsafe=unsafe_load, as_json=as_json, verbose=verbose,
    )  # fmt: skip


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Any checkpoint.")],
    arch: Arch = None,
    key: Key = None,
    unsafe_load: Unsafe = False,
    as_json: Json = False,
) -> None:
    """What a file holds and which network it is.

    Nothing in the file is run. Exit code 3 when it fits no known network.

    \b
    Examples:
    repbnn inspect ckpt.pth.tar
    """
    from repbnn_cli.commands import inspect as commands

    commands.inspect(checkpoint, arch=arch, key=key, unsafe=unsafe_load, as_json=as_json)


@rules_app.command("list")
def rules_list(as_json: Json = False) -> None:
    """The shipped rule files.

    \b
    Examples:
    repbnn rules list
    """
    from repbnn_cli.commands import rules as commands

    commands.rules_list(as_json=as_json)


@rules_app.command("show")
def rules_show(
    name: Annotated[str, typer.Argument(help="Shipped name or path.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="With everything it extends put in.")] = False,
) -> None:
    """The text of a rule file.

    \b
    Examples:
    repbnn rules show reptran > mine.yaml
    repbnn rules show mine.yaml --resolved
    """
    from repbnn_cli.commands import rules as commands

    commands.rules_show(name, resolved=resolved)


@rules_app.command("check")
def rules_check(
    name: Annotated[str, typer.Argument(help="Shipped name or path.")],
    network: Annotated[
        str | None, typer.Option("--network", help="Also say what it claims in this zoo network or checkpoint.")
    ] = None,
    arch: Arch = None,
    model: Model = None,
    model_args: ModelArgs = None,
    input_size: InputSize = None,
    key: Key = None,
    unsafe_load: Unsafe = False,
    as_json: Json = False,
) -> None:
    """Whether a rule file is valid and, with --network, what each rule claims.

    \b
    Examples:
    repbnn rules check mine.yaml --network ckpt.pth
    repbnn rules check mine.yaml --network ckpt.pt --model net.py:make
    """
    from repbnn_cli.commands import rules as commands

    commands.rules_check(
        name, network=network, as_json=as_json, input_size=input_size, arch=arch, model=model, model_args=model_args,
        key=key, unsafe=unsafe_load,
    )  # fmt: skip


@rules_app.command("init")
def rules_init(
    network: Annotated[str, typer.Argument(help="Checkpoint, or zoo network.")],
    arch: Arch = None,
    model: Model = None,
    model_args: ModelArgs = None,
    input_size: InputSize = None,
    rules: Rules = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Rule file; on stdout if not given.")] = None,
    force: Force = False,
    key: Key = None,
    unsafe_load: Unsafe = False,
    as_json: Json = False,
) -> None:
    """Write a rule file for a network: each role with its evidence, and what is left to decide.

    Unchanged, the file gives the same plan as no file; correct in it what was found wrong. --rules: what it extends.

    \b
    Examples:
    repbnn rules init ckpt.pt --model net.py:make -o rules.yaml
    repbnn transform ckpt.pt --model net.py:make --rules rules.yaml
    """
    from repbnn_cli.commands import rules as commands

    commands.rules_init(
        network, rules=rules, output=output, input_size=input_size, force=force, as_json=as_json, arch=arch,
        model=model, model_args=model_args, key=key, unsafe=unsafe_load,
    )  # fmt: skip
