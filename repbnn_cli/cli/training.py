"""The arguments of the training commands: finetune, calibrate, evaluate, data, recipes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from repbnn_cli.cli.options import (
    LAST_SEED,
    Arch,
    Data,
    Device,
    EvaluationBackend,
    Force,
    InputSize,
    Json,
    Key,
    Latents,
    Model,
    ModelArgs,
    Spread,
    TrainingBackend,
    Unsafe,
    app,
    recipes_app,
)


def _origin(
    arch: str | None, model: str | None, model_args: str | None, input_size: str | None, key: str | None, unsafe: bool
) -> dict[str, Any]:  # fmt: skip
    """What says how a checkpoint becomes a network."""
    return {"arch": arch, "model": model, "model_args": model_args, "input_size": input_size, "key": key,
            "unsafe": unsafe}  # fmt: skip


@app.command()
def finetune(
    target: Annotated[
        str | None,
        typer.Argument(help="Result, checkpoint, or zoo name (from scratch); the newest result if not given."),
    ] = None,
    data: Data = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe file or shipped name (`repbnn recipes list`).")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Length of every stage instead of the recipe's.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the recipe, e.g. optimizer.lr=0.05.")
    ] = None,
    stages: Annotated[
        list[str] | None, typer.Option("--stage", help="Only this stage of the recipe; may be given several times.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LAST_SEED, help="Seed of initialisation, shuffling and augmentation.")
    ] = 0,
    device: Device = "auto",
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="Folder of the run (default: runs/NAME-RECIPE-seedN).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that folder, exactly.")] = False,
    distill: Annotated[
        float | None,
        typer.Option(
            "--distill", min=0, max=1, help="Weight of learning from the source network, or from --teacher: 0 to 1."
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Checkpoint of a float network to learn from.")
    ] = None,
    teacher_arch: Annotated[
        str | None, typer.Option("--teacher-arch", help="Zoo name of the teacher, where several fit.")
    ] = None,
    teacher_model: Annotated[
        str | None, typer.Option("--teacher-model", help="Your own teacher: file.py:callable or module:callable.")
    ] = None,
    calibrate: Annotated[
        int | None,
        typer.Option(
            "--calibrate",
            min=0,
            help="Batches that first give BatchNorm statistics to inherited weights (default: 50).",
        ),
    ] = None,
    fit: Annotated[
        int | None,
        typer.Option(
            "--fit",
            min=0,
            help="Adam steps per convolution that first fit inherited weights to the source network (default: 200).",
        ),
    ] = None,
    spread: Spread = None,
    latents: Latents = None,
    arch: Arch = None,
    model: Model = None,
    model_args: ModelArgs = None,
    input_size: InputSize = None,
    key: Key = None,
    unsafe: Unsafe = False,
    save_every: Annotated[
        int, typer.Option("--save-every", min=0, help="Steps between states within an epoch, 0: none.")
    ] = 0,
    eval_batch: Annotated[
        int, typer.Option("--eval-batch", min=1, help="Test images at a time; changes rounding alone.")
    ] = 500,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that decode images from folders.")] = 2,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph/--no-cuda-graph", help="On a GPU: a step as one recorded graph.")
    ] = True,
    backend: TrainingBackend = "auto",
    gradients: Annotated[
        str,
        typer.Option(
            "--gradients", help="Gradients of binary convolutions, --backend int8: exact, or bf16 (rounded, faster)."
        ),
    ] = "exact",
    compile_mode: Annotated[
        str, typer.Option("--compile", help="torch.compile: auto (where a run is long enough), on, off.")
    ] = "auto",
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Metrics for TensorBoard, too, in RUN/tensorboard.")
    ] = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Copy the best network there when the run is done.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a network by its method's recipe.

    \b
    Examples:
    repbnn finetune rep.repbnn.pt --data cifar10:DIR --epochs 60
    repbnn finetune irnet_resnet20 --data digits --epochs 2
    repbnn finetune rep.repbnn.pt --data imagenet:DIR --teacher resnet34.pth --teacher-model torchvision.models:resnet34
    torchrun --nproc-per-node 2 -m repbnn_cli finetune rep.repbnn.pt --data cifar10:DIR
    """
    from repbnn_cli.commands import training

    training.finetune(
        target, data=data, recipe=recipe, epochs=epochs, sets=sets or [], stages=stages or [], seed=seed, device=device,
        run_dir=run_dir, resume=resume, distill=distill, teacher=teacher, teacher_arch=teacher_arch,
        teacher_model=teacher_model, calibrate=calibrate, fit=fit, spread=spread, latents=latents,
        origin=_origin(arch, model, model_args, input_size, key, unsafe),
        save_every=save_every, eval_batch=eval_batch, workers=workers, cuda_graph=cuda_graph, backend=backend,
        gradients=gradients, compile_mode=compile_mode, tensorboard=tensorboard, output=output, force=force,
        as_json=as_json,
    )  # fmt: skip


@app.command()
def sweep(
    experiment: Annotated[str, typer.Argument(help="Experiment file: networks × variants × seeds (experiments/).")],
    data: Annotated[str | None, typer.Option("--data", help="Instead of the file's, e.g. cifar10:DIR.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Of every cell, instead of the file's.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Override a key of every cell's recipe.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder; runs/NAME if not given.")] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Cells at a time; they share a GPU, or the cores.")
    ] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PATTERN", help="Cells by name, e.g. 'recu_*-seed1'; the others another time."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Handed to `finetune`.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands of all cells, run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train a whole table: networks × variants × seeds.

    Each cell is an ordinary run; an interrupted sweep continues with the same command.

    \b
    Examples:
    repbnn sweep experiments/table-3.yaml --data cifar10:DIR --epochs 40 --jobs 2
    repbnn report --sweep runs/table-3 --markdown -o table-3.md
    """
    from repbnn_cli.commands import sweep as commands

    commands.sweep(
        experiment, data=data, epochs=epochs, sets=sets or [], out=out, jobs=jobs, only=only or [], device=device,
        dry_run=dry_run, as_json=as_json,
    )  # fmt: skip


@app.command("calibrate")
def calibrate_command(
    target: Annotated[str | None, typer.Argument(help="Result; the newest in checkpoints/ if not given.")] = None,
    data: Data = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe whose preprocessing to use; its own if not given.")
    ] = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Training batches for the statistics.")] = 50,
    fit: Annotated[
        int,
        typer.Option("--fit", min=0, help="Adam steps per convolution that fit it to the source network's; 0: none."),
    ] = 200,
    spread: Annotated[
        float | None,
        typer.Option(
            "--spread", min=0, help="In the fit replicas aim ±SPREAD standard deviations apart (default: 0.5)."
        ),
    ] = None,
    latents: Latents = None,
    images: Annotated[
        int | None,
        typer.Option("--images", min=2, help="Training images to fit on, as far as memory allows (default: 2048)."),
    ] = None,
    device: Device = "auto",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="NAME-calibrated, with its ending, if not given.")
    ] = None,
    force: Force = False,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """After a transform: fit each convolution to the source network, and re-estimate BatchNorm statistics.

    Uses a few training images without their labels. A network that was trained since then gets statistics alone.

    \b
    Examples:
    repbnn calibrate rep.repbnn.pt --data cifar10:DIR
    repbnn calibrate rep.repbnn.pt --data cifar10:DIR --fit 0
    """
    from repbnn_cli.commands import training

    training.calibrate(
        target,
        data=data,
        recipe=recipe,
        batches=batches,
        fit=fit,
        spread=spread,
        latents=latents,
        images=images,
        device=device,
        output=output,
        force=force,
        model=model,
        as_json=as_json,
    )


@app.command()
def evaluate(
    target: Annotated[
        str | None, typer.Argument(help="Result, checkpoint or packed file; the newest result if not given.")
    ] = None,
    data: Data = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe whose preprocessing to use; its own if not given.")
    ] = None,
    device: Device = "auto",
    backend: EvaluationBackend = "auto",
    compile_mode: Annotated[
        str, typer.Option("--compile", help="torch.compile: auto (where there are images enough), on, off.")
    ] = "off",
    arch: Arch = None,
    model: Model = None,
    model_args: ModelArgs = None,
    input_size: InputSize = None,
    key: Key = None,
    unsafe: Unsafe = False,
    as_json: Json = False,
) -> None:
    """Accuracy on the test images.

    \b
    Examples:
    repbnn evaluate rep.repbnn.pt --data cifar10:DIR
    repbnn evaluate reactnet.pth --data imagenet:DIR --backend int8 --compile on
    repbnn evaluate net.packed --data cifar10:DIR --device cuda --backend triton
    """
    from repbnn_cli.commands import training

    training.evaluate(
        target,
        data=data,
        recipe=recipe,
        device=device,
        backend=backend,
        compile_mode=compile_mode,
        origin=_origin(arch, model, model_args, input_size, key, unsafe),
        as_json=as_json,
    )


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
    from repbnn_cli.commands import training

    training.fetch_data(name, folder=folder, url=url)


@recipes_app.command("list")
def recipes_list(as_json: Json = False) -> None:
    """The shipped recipes.

    \b
    Examples:
    repbnn recipes list
    """
    from repbnn_cli.commands import training

    training.recipes_list(as_json=as_json)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="Shipped name or path.")]) -> None:
    """A recipe with all its values.

    \b
    Examples:
    repbnn recipes show own-network > mine.yaml
    """
    from repbnn_cli.commands import training

    training.recipes_show(name)


@recipes_app.command("check")
def recipes_check(name: Annotated[str, typer.Argument(help="Shipped name or path.")]) -> None:
    """Whether a recipe file is valid.

    \b
    Examples:
    repbnn recipes check mine.yaml
    """
    from repbnn_cli.commands import training

    training.recipes_check(name)
