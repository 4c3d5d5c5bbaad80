"""The figures that RepBNN (arXiv 2207.09049) publishes: Tables 1 to 8 and Figure 1, each looked up with its number.

Accuracies are top-1 in percent, weights and activations 1 bit, β = 2, unless a row says otherwise. Costs are as
printed: `Rounded(0.102, 7)` is 0.102 × 10⁷.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repbnn_cli.zoo import Arch

CIFAR, IMAGENET = "CIFAR-10", "ImageNet"
SOURCE = "RepBNN, arXiv 2207.09049"


@dataclass(frozen=True)
class Rounded:
    """A printed figure: value × 10^exponent; exponent 0 for exact integers."""

    value: float
    exponent: int = 0

    def as_number(self) -> float:
        return float(self.value * 10**self.exponent)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of the source network and of its RepBNN in one table; None where the table has no such figure.

    setting: what the row varies, "" for the paper's default.
    """

    table: str
    data: str
    network: str
    method: str
    raw: float | None
    rep: float | None
    setting: str = ""
    raw_top5: float | None = None
    rep_top5: float | None = None


@dataclass(frozen=True)
class Cost:
    """One cost in one table, source and Rep network; metric as in `profiler.METRICS`."""

    table: str
    metric: str
    raw: Rounded
    rep: Rounded


@dataclass(frozen=True)
class Point:
    """One network of Figure 1: OPs and top-1 on ImageNet."""

    name: str
    ops: Rounded
    top1: float


# Table 1: ReActNet-A, 224×224, β = 2, last layer way 1.
TABLE_1: Mapping[str, tuple[Rounded, Rounded]] = {
    "fc": (Rounded(0.102, 7), Rounded(0.205, 7)),
    "conv": (Rounded(1.084, 7), Rounded(1.084, 7)),
    "bn": (Rounded(1.009, 7), Rounded(1.261, 7)),
    "bconv": (Rounded(4.822, 9), Rounded(4.822, 9)),
    "ops_without_bn": (Rounded(0.872, 8), Rounded(0.882, 8)),
    "ops_with_bn": (Rounded(0.973, 8), Rounded(1.008, 8)),
}

# Table 2: OPs without BN of ResNet-20 on CIFAR-10, β = 2, by how many inputs the last layer takes.
TABLE_2_SOURCE = 1069696
TABLE_2_OPS: Mapping[str, int] = {"all": 1070336, "1_over_beta": 1069696, "1_over_beta2": 1069376}
WAYS = {"all": "last layer way 1", "1_over_beta": "last layer way 2", "1_over_beta2": "last layer way 3"}
BEFORE = "BatchNorm before the repeat"
# Rule sets that give the network of the paper's main results (last-layer-1 to 3: by the last layer that they choose).
_RULES = frozenset(["reptran", "reptran-released", "full-precision", "last-layer-1", "last-layer-2", "last-layer-3"])


def _variants(
    table: str, network: str, method: str, raw: float, rep: Mapping[str, float], data: str = CIFAR
) -> tuple[Accuracy, ...]:
    return tuple(Accuracy(table, data, network, method, raw, value, setting) for setting, value in rep.items())


def _ways(method: str, raw: float, *rep: float) -> tuple[Accuracy, ...]:
    return _variants("Table 2", "ResNet-20", method, raw, dict(zip(WAYS.values(), rep, strict=True)))


def _betas(method: str, raw: float, *rep: float) -> tuple[Accuracy, ...]:
    return _variants("Table 3", "ResNet-20", method, raw, dict(zip(("β = 2", "β = 4", "β = 8"), rep, strict=True)))


def _places(method: str, after: float, before: float) -> tuple[Accuracy, ...]:
    settings = {"BatchNorm after the repeat": after, BEFORE: before}
    return tuple(Accuracy("Table 4", CIFAR, "ResNet-20", method, None, v, s) for s, v in settings.items())


TABLE_2 = _ways("IR-Net", 86.50, 87.59, 87.50, 87.50) + _ways("ReCU", 87.50, 88.97, 88.92, 88.82)
TABLE_3 = _betas("IR-Net", 86.50, 87.59, 88.07, 87.07) + _betas("ReCU", 87.50, 88.97, 89.59, 88.72)
TABLE_4 = _places("IR-Net", 87.59, 82.74) + _places("ReCU", 88.97, 85.30)
TABLE_5 = (
    Accuracy("Table 5", CIFAR, "VGG-small", "IR-Net", 90.40, 86.95, "no residuals"),
    Accuracy("Table 5", CIFAR, "VGG-small", "ReCU", 92.22, 92.41, "no residuals"),
    Accuracy("Table 5", CIFAR, "ResNet-20", "IR-Net", 86.50, 87.59, "residuals"),
    Accuracy("Table 5", CIFAR, "ResNet-20", "ReCU", 87.50, 88.97, "residuals"),
)
TABLE_6 = (
    Accuracy("Table 6", CIFAR, "ResNet-20", "full precision", 91.73, 90.62),
    Accuracy("Table 6", CIFAR, "ResNet-20-bireal", "full precision", 90.57, 90.84),
)
TABLE_7 = tuple(
    Accuracy("Table 7", CIFAR, network, method, raw, rep)
    for network, method, raw, rep in (
        ("VGG-small", "RBNN", 91.3, 92.3),
        ("VGG-small", "IR-Net", 90.4, 86.9),
        ("VGG-small", "ReCU", 92.2, 92.4),
        ("ResNet-20", "IR-Net", 86.5, 87.6),
        ("ResNet-20", "RBNN", 86.5, 88.6),
        ("ResNet-20", "FracBNN (1 bit)", 87.2, 87.6),
        ("ResNet-20", "RBNN-bireal", 87.8, 88.7),
        ("ResNet-20", "ReCU", 87.5, 89.0),
        ("ResNet-18", "RBNN", 92.2, 93.1),
        ("ResNet-18", "ReCU", 92.8, 93.6),
    )
)
TABLE_8 = tuple(
    Accuracy("Table 8", IMAGENET, network, method, raw[0], rep[0], "", raw[1], rep[1])
    for network, method, raw, rep in (
        ("ResNet-18", "BNN", (42.2, 67.1), (None, None)),
        ("ResNet-18", "XNOR-Net", (51.2, 73.2), (None, None)),
        ("ResNet-18", "Bi-Real Net", (56.4, 79.5), (57.1, 79.5)),
        ("ResNet-18", "IR-Net", (58.1, 80.0), (None, None)),
        ("ResNet-18", "RBNN", (59.9, 81.9), (None, None)),
        ("ResNet-18", "ReCU", (61.0, 82.6), (62.3, 83.8)),
        ("ReActNet-A", "ReActNet", (69.4, 88.6), (70.2, 89.1)),
        ("ReActNet-A", "AdamBNN", (70.5, 89.1), (71.34, 89.8)),
    )
)
FIGURE_1 = tuple(
    Point(name, Rounded(ops, 8), top1)
    for name, ops, top1 in (
        ("Real-to-Bin", 1.83, 65.4),
        ("Group-Net", 2.68, 67.0),
        ("Group-Net", 4.13, 70.5),
        ("MeliusNet", 2.14, 65.8),
        ("MeliusNet", 3.25, 69.2),
        ("MeliusNet", 5.32, 71.0),
        ("ReActNet", 0.87, 69.4),
        ("ReActNet", 1.63, 70.1),
        ("ReActNet", 2.14, 71.4),
        ("AdamBNN", 0.87, 70.5),
        ("High-capacity expert", 1.37, 71.2),
        ("RepBNN", 0.88, 71.3),
    )
)

_ONE_DECIMAL = frozenset(["Table 7", "Table 8"])  # the others print two
_HEADLINE = (*TABLE_7, *TABLE_8, *TABLE_6)
_ALL = (*TABLE_7, *TABLE_8, *TABLE_6, *TABLE_2, *TABLE_3, *TABLE_4, *TABLE_5)


def accuracy(arch: Arch) -> Accuracy | None:
    """The main result for a network: Table 7 (CIFAR-10), 8 (ImageNet) or 6 (full precision); else None."""
    return next((a for a in _HEADLINE if _is(a, arch)), None)


def accuracies(arch: Arch) -> tuple[Accuracy, ...]:
    """Everything published about a network's accuracy, the main result first, then the ablations."""
    return tuple(a for a in _ALL if _is(a, arch))


def same_data(stated: str, name: str) -> bool:
    """Whether a data set by its name here (`--data`) is the one that the paper names so."""
    return stated.lower().replace("-", "") == name


def settings() -> dict[str, tuple[str, ...]]:
    """The tables with accuracies, each with what its rows vary ("" for the paper's default)."""
    return {row.table: tuple(dict.fromkeys(r.setting for r in _ALL if r.table == row.table)) for row in _ALL}


def row(arch: Arch, table: str, setting: str | None) -> Accuracy | None:
    """A network's row in a table; setting None: its first one, whose source figure all of them share."""
    found = (a for a in accuracies(arch) if a.table == table and setting in (None, a.setting))
    return next(found, None)


def setting(beta: int, last_layer: str, rules: str) -> str | None:
    """The ablations' name for a RepBNN made with these options; None for one that the paper has no figure of."""
    if rules == "bn-before-repeat":
        return BEFORE if (beta, last_layer) == (2, "all") else None
    if rules not in _RULES:
        return None
    if last_layer == "all":
        return f"β = {beta}"
    return WAYS[last_layer] if beta == 2 else None


def costs(arch: Arch, beta: int, last_layer: str) -> tuple[Cost, ...]:
    """Published costs of a network and of its RepBNN; empty where the paper has none for these options."""
    key = (arch.data, arch.network)
    if beta != 2:
        return ()
    if key == (IMAGENET, "ReActNet-A") and arch.method in ("ReActNet", "AdamBNN") and last_layer == "all":
        return tuple(Cost("Table 1", metric, raw, rep) for metric, (raw, rep) in TABLE_1.items())
    if key == (CIFAR, "ResNet-20") and arch.method in ("IR-Net", "ReCU") and last_layer in TABLE_2_OPS:
        return (Cost("Table 2", "ops_without_bn", Rounded(TABLE_2_SOURCE), Rounded(TABLE_2_OPS[last_layer])),)
    return ()


def as_printed(row: Accuracy, value: float | None) -> str:
    """One of the row's figures with the digits of its table; empty where there is none."""
    if value is None:
        return ""
    decimals = max(1 if row.table in _ONE_DECIMAL else 2, len(repr(value).partition(".")[2]))
    return f"{value:.{decimals}f}"


def _is(row: Accuracy, arch: Arch) -> bool:
    return (row.data, row.network, row.method) == (arch.data, arch.network, arch.method)
