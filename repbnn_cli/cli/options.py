"""The applications that commands register with, and the options that several of them share."""

from __future__ import annotations

from typing import Annotated

import typer

HELP = """Model surgery and profiling for binary neural networks (RepBNN, arXiv 2207.09049).

RepConv reshapes a kernel (O, I, k, k) to (O/β, I·β, k, k) and repeats its output β² times: more accurate, same
convolution cost. Exit codes: 0 done, 2 wrong usage or rules, 3 cannot be loaded or captured, 4 a check failed,
1 anything else, 130 interrupted. --debug, anywhere, shows tracebacks.
"""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
export_app = typer.Typer(help="Write a network in a form for running it: packed.", no_args_is_help=True)
app.add_typer(export_app, name="export")
rules_app = typer.Typer(help="The RepTran rule files: list, show, check, init.", no_args_is_help=True)
app.add_typer(rules_app, name="rules")
recipes_app = typer.Typer(help="The training recipes: list, show, check.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

LAST_SEED = 2**31 - 1

Arch = Annotated[str | None, typer.Option("--arch", help="Zoo name of the network, where several fit (`repbnn zoo`).")]
Model = Annotated[
    str | None, typer.Option("--model", help="Your own network: path/to/file.py:callable or package.module:callable.")
]
ModelArgs = Annotated[str | None, typer.Option("--model-args", help="""Its arguments, JSON: '{"num_classes": 10}'.""")]
InputSize = Annotated[
    str | None, typer.Option("--input-size", help="Input without batch, e.g. 3x32x32; several with commas.")
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", help="Key of the state dict in the file, e.g. ema, or the prefix of the network's tensor names."
    ),
]
Unsafe = Annotated[
    bool,
    typer.Option("--unsafe-load", help="Unpickle the file as Python does, running code in it. Trusted files only."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else there.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="How the network was captured: each attempt and its reason.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Rules = Annotated[str | None, typer.Option("--rules", help="Rule file or shipped name (`repbnn rules list`).")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="cifar10:DIR, cifar100:DIR, imagenet:DIR, folder:DIR (or an archive), digits."),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
LatencyDevice = Annotated[str | None, typer.Option("--device", help="Of --latency: cpu, cuda, cuda:1, ..., auto.")]
LatencyBackend = Annotated[
    str | None,
    typer.Option("--backend", help="Of --latency: kernels of binary convolutions: torch, triton (fused blocks), auto."),
]
EvaluationBackend = Annotated[
    str, typer.Option("--backend", help="Kernels of binary convolutions: torch, int8 (CPU), triton (fused), or auto.")
]
Spread = Annotated[
    float | None,
    typer.Option(
        "--spread", min=0,
        help="Start the copies of a channel with different thresholds, up to ±SPREAD standard deviations "
        "(default: from scratch 0, try 0.75; in a fit 0.5).",
    ),
]  # fmt: skip
Latents = Annotated[
    float | None,
    typer.Option(
        "--latents",
        help="Behind the fit, factor on latent kernels whose signs alone count: smaller ones learn faster "
        "(default: 0.5; 1 keeps them).",
    ),
]
TrainingBackend = Annotated[
    str, typer.Option("--backend", help="What runs binary convolutions: torch, int8 (CPU, exact), triton, or auto.")
]
