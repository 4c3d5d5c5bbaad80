"""Which backend the binary operators run on; importing this package imports no Triton.

| file | owns |
| --- | --- |
| packing.py | the layout of packed bits, and packing and unpacking in plain torch |
| reference.py | every operator in plain torch: exact, on any device |
| blocks.py | packed blocks for inference: a binary convolution and all that follows it up to the next sign |
| sign_packing.py | packing and unpacking in Triton |
| rep_batch_norm.py | BatchNorm of training over a repeat, with residual, clamp and sign, in Triton |
| rep_bconv_fused.py | a packed block in one kernel, in Triton |
| binary_mma.py | its product on binary tensor cores |
| int8_conv2d.py | the convolution of signs on a CPU, in 8-bit integers, with its gradient |
| binary_conv2d.py | the binary convolution of training, in Triton, with its gradient |

Triton needs a GPU, or TRITON_INTERPRET=1, with which its kernels run in Python on the CPU: a thousand times slower, for
tests. A file with Triton kernels imports Triton at its top, so it is imported only once `choose` has said "triton".
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from torch import Tensor

from repbnn_cli.errors import UsageError

BACKENDS = ("auto", "torch", "triton")
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)  # int8 and binary tensor cores, as the kernels use them


@dataclass(frozen=True)
class Backend:
    """What runs the binary operators. why: half a sentence for the user, e.g. "asked for"."""

    name: Literal["torch", "int8", "triton"]
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def choose(device: torch.device, requested: str = "auto") -> Backend:
    """The backend for tensors on `device`; a UsageError where Triton is asked for and cannot run there.

    auto means torch: the Triton kernels are tested in the interpreter and compiled, but nobody has timed them on a GPU
    yet, and what has not been measured is not chosen for the user.
    """
    if requested not in BACKENDS:
        raise UsageError(f"--backend: unknown value '{requested}'; expected one of {', '.join(BACKENDS)}")
    obstacle = why_not_triton(device)
    if requested == "triton":
        if obstacle:
            raise UsageError(f"--backend triton: {obstacle}; --backend torch runs everywhere")
        return Backend("triton", "asked for; interpreted on the CPU" if device.type == "cpu" else "asked for")
    if requested == "torch":
        return Backend("torch", "asked for")
    if obstacle:
        return Backend("torch", obstacle.partition(";")[0])  # what to do about it is for who asked for Triton
    return Backend("torch", "the Triton kernels have not been timed on a GPU yet; --backend triton tries them")


def why_not_triton(device: torch.device) -> str | None:
    """What keeps Triton kernels from running on tensors of `device`; None where they run."""
    if device.type != "cuda" and not interpreted():
        return f"device '{device.type}' is no GPU; expected --device cuda (or TRITON_INTERPRET=1, slow, for tests)"
    installed = _triton_version()
    if installed is None:
        return "Triton is not installed; pip install 'repbnn[triton]', or a CUDA build of torch, brings it"
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {installed} is too old; expected {'.'.join(map(str, OLDEST_TRITON))} or newer"
    return None if interpreted() else _cuda_obstacle(device)


def launching(x: Tensor) -> AbstractContextManager[None]:
    """Around the launches of an operator on x: makes its GPU the current one; a UsageError where Triton cannot run."""
    obstacle = why_not_triton(x.device)
    if obstacle:
        raise UsageError(f"Triton operator on {x.device}: {obstacle}; repbnn_cli.kernels.reference runs everywhere")
    return torch.cuda.device_of(x)


@functools.cache
def _cuda_obstacle(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs; the kernels are written for NVIDIA's"
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; expected 8.0 (Ampere) or newer"
    return None


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for Triton's interpreter; Triton reads it once, when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
