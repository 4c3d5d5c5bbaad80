"""repbnn: model surgery and profiling for binary neural networks (RepBNN, arXiv 2207.09049).

    import repbnn_cli
    network = repbnn_cli.load("checkpoints/irnet_resnet20_cifar10-rep2.repbnn.pt")   # an nn.Module, ready to run

    small = repbnn_cli.load_packed("net.packed")   # what `repbnn export packed` wrote, for inference

Importing this package imports no torch; `load` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_packed"]

if TYPE_CHECKING:
    from repbnn_cli.deploy.packed import load_packed
    from repbnn_cli.result import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from repbnn_cli.result import load

        return load
    if name == "load_packed":
        from repbnn_cli.deploy.packed import load_packed

        return load_packed
    raise AttributeError(f"module 'repbnn_cli' has no attribute {name!r}")
