"""Arguments, help, exit codes and the one error boundary; imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer

import repbnn_cli
from repbnn_cli.errors import RepbnnError

HELP = """Model surgery and profiling for binary neural networks (RepBNN, arXiv 2207.09049).

RepConv reshapes a kernel (O, I, k, k) to (O/β, I·β, k, k) and repeats its output β² times: more accurate, same
convolution cost. Exit codes: 0 done, 2 wrong usage or rules, 3 cannot be loaded or captured, 4 a check failed,
1 anything else, 130 interrupted. --debug, anywhere, shows tracebacks.
"""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
rules_app = typer.Typer(help="The RepTran rule files: list, show, check.", no_args_is_help=True)
app.add_typer(rules_app, name="rules")
recipes_app = typer.Typer(help="The training recipes: list, show, check.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

Arch = Annotated[str | None, typer.Option("--arch", help="Zoo name of the network, where several fit (`repbnn zoo`).")]
Model = Annotated[
    str | None, typer.Option("--model", help="Your own network: path/to/file.py:callable or package.module:callable.")
]
ModelArgs = Annotated[str | None, typer.Option("--model-args", help="""Its arguments, JSON: '{"num_classes": 10}'.""")]
InputSize = Annotated[str | None, typer.Option("--input-size", help="Input without batch, e.g. 3x32x32.")]
Key = Annotated[str | None, typer.Option("--key", help="Entry of the file that holds the state dict, e.g. ema.")]
Unsafe = Annotated[
    bool,
    typer.Option("--unsafe-load", help="Unpickle the file as Python does, running code in it. Trusted files only."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else there.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Rules = Annotated[str | None, typer.Option("--rules", help="Rule file or shipped name (`repbnn rules list`).")]


@app.command()
def transform(
    checkpoint: Annotated[str, typer.Argument(help="Trained checkpoint: .pt .pth .th .tar .safetensors ...")],
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
    key: Key = None,
    unsafe_load: Unsafe = False,
    as_json: Json = False,
) -> None:
    """Turn a trained BNN into its verified RepBNN.

    \b
    Examples:
    repbnn transform ckpt.pt --beta 2
    repbnn transform ckpt.pt --model net.py:make --input-size 3x32x32 --dry-run
    """
    from repbnn_cli import commands

    commands.transform(
        checkpoint, beta=beta, rules=rules, inherit=inherit, last_layer=last_layer, arch=arch, model=model,
        model_args=model_args, input_size=input_size, output=output, slim=slim, verify=verify, dry_run=dry_run,
        force=force, key=key, unsafe=unsafe_load, as_json=as_json,
    )  # fmt: skip


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
    from repbnn_cli import commands

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
    from repbnn_cli import commands

    del markdown  # the only format for reading so far
    commands.report(target, as_json=as_json, output=output, timestamp=timestamp, model=model, force=force)


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
    from repbnn_cli import commands

    commands.inspect(checkpoint, arch=arch, key=key, unsafe=unsafe_load, as_json=as_json)


@app.command()
def zoo(as_json: Json = False) -> None:
    """The networks of the paper, with accuracy."""
    from repbnn_cli import commands

    commands.zoo(as_json=as_json)


@rules_app.command("list")
def rules_list(as_json: Json = False) -> None:
    """The shipped rule files."""
    from repbnn_cli import commands

    commands.rules_list(as_json=as_json)


@rules_app.command("show")
def rules_show(
    name: Annotated[str, typer.Argument(help="Shipped name or path.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="With everything it extends put in.")] = False,
) -> None:
    """The text of a rule file."""
    from repbnn_cli import commands

    commands.rules_show(name, resolved=resolved)


@rules_app.command("check")
def rules_check(
    name: Annotated[str, typer.Argument(help="Shipped name or path.")],
    network: Annotated[
        str | None, typer.Option("--network", help="Also say what it claims in this zoo network or checkpoint.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Whether a rule file is valid and, with --network, what each rule claims."""
    from repbnn_cli import commands

    commands.rules_check(name, network=network, as_json=as_json)


Data = Annotated[
    str | None,
    typer.Option("--data", help="cifar10:DIR, cifar100:DIR, imagenet:DIR, folder:DIR (or an archive), digits."),
]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]


@app.command()
def finetune(
    target: Annotated[
        str | None,
        typer.Argument(help="Result, checkpoint, or zoo name (from scratch); the newest result if not given."),
    ] = None,
    data: Data = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe file or shipped name (`repbnn recipes`).")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Length of every stage instead of the recipe's.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the recipe, e.g. optimizer.lr=0.05.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of initialisation, shuffling and augmentation.")] = 0,
    device: Device = "cpu",
    run_dir: Annotated[str | None, typer.Option("--run-dir", help="Folder of the run; runs/NAME-RECIPE-seedN.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that folder, exactly.")] = False,
    distill: Annotated[
        float, typer.Option("--distill", help="Weight of learning from the source network, 0 to 1.")
    ] = 0.0,
    calibrate: Annotated[
        int, typer.Option("--calibrate", help="Batches for BatchNorm statistics before inherited weights are trained.")
    ] = 50,
    arch: Arch = None,
    model: Model = None,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between states within an epoch, 0: none.")] = 0,
    workers: Annotated[int, typer.Option("--workers", help="Processes that decode images from folders.")] = 2,
    as_json: Json = False,
) -> None:
    """Train a network by its method's recipe.

    \b
    Examples:
    repbnn finetune rep.repbnn.pt --data cifar10:DIR --epochs 60
    repbnn finetune irnet_resnet20 --data digits --epochs 2
    """
    from repbnn_cli import training

    training.finetune(
        target, data=data, recipe=recipe, epochs=epochs, sets=sets or [], seed=seed, device=device, run_dir=run_dir,
        resume=resume, distill=distill, calibrate=calibrate, arch=arch, model=model, save_every=save_every,
        workers=workers, as_json=as_json,
    )  # fmt: skip


@app.command("calibrate")
def calibrate_command(
    target: Annotated[str | None, typer.Argument(help="Result; the newest in checkpoints/ if not given.")] = None,
    data: Data = None,
    batches: Annotated[int, typer.Option("--batches", help="Training batches to look at.")] = 50,
    device: Device = "cpu",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="NAME-calibrated.repbnn.pt if not given.")
    ] = None,
    force: Force = False,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Re-estimate BatchNorm statistics after a transform.

    \b
    Examples:
    repbnn calibrate rep.repbnn.pt --data cifar10:DIR
    """
    from repbnn_cli import training

    training.calibrate(
        target, data=data, batches=batches, device=device, output=output, force=force, model=model, as_json=as_json
    )


@app.command()
def evaluate(
    target: Annotated[str | None, typer.Argument(help="Result or checkpoint; the newest result if not given.")] = None,
    data: Data = None,
    device: Device = "cpu",
    arch: Arch = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Accuracy on the test images.

    \b
    Examples:
    repbnn evaluate rep.repbnn.pt --data cifar10:DIR
    """
    from repbnn_cli import training

    training.evaluate(target, data=data, device=device, arch=arch, model=model, as_json=as_json)


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="cifar10 or cifar100.")],
    folder: Annotated[
        str | None, typer.Option("--folder", help="Where to put it; a cache folder if not given.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="Another place to get the official archive from.")] = None,
) -> None:
    """Download a data set, resuming and checking it.

    \b
    Examples:
    repbnn data cifar10
    """
    from repbnn_cli import training

    training.fetch_data(name, folder=folder, url=url)


@recipes_app.command("list")
def recipes_list(as_json: Json = False) -> None:
    """The shipped recipes."""
    from repbnn_cli import training

    training.recipes_list(as_json=as_json)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="Shipped name or path.")]) -> None:
    """A recipe with all its values."""
    from repbnn_cli import training

    training.recipes_show(name)


@recipes_app.command("check")
def recipes_check(name: Annotated[str, typer.Argument(help="Shipped name or path.")]) -> None:
    """Whether a recipe file is valid."""
    from repbnn_cli import training

    training.recipes_check(name)


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
        result = app([a for a in arguments if a != "--debug"], prog_name="repbnn", standalone_mode=False)
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


def _explain(error: BaseException, debug: bool) -> int:
    describe = getattr(error, "format_message", None)  # typer's usage errors; the class moved between its versions
    if callable(describe):
        context: Any = getattr(error, "ctx", None)
        where = f" (see `{context.command_path} --help`)" if context else ""
        print(f"error: {' '.join(describe().split())}{where}", file=sys.stderr)
        return 2
    if isinstance(error, RepbnnError):
        print(f"error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if not isinstance(error, Exception):
        raise error
    text = " ".join(str(error).split()) or "no further description"
    hint = "" if debug else "; --debug shows where"
    print(f"error: {type(error).__name__}: {text}{hint}", file=sys.stderr)
    return 1


def main() -> None:
    """Entry point of `repbnn`."""
    sys.exit(run(sys.argv[1:]))
