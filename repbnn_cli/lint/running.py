"""The table of checks for binary networks, and running them: `repbnn lint`.

A check says what it looks for, how much that matters, what to do about it, and who says so. error: the network does
not do what it is meant to; warning: accuracy, training or deployment suffers; note: it costs something, and most
published networks have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from repbnn_cli import profiler
from repbnn_cli.graph import Network
from repbnn_cli.lint import lint_checks as find
from repbnn_cli.lint.lint_checks import Evidence, Place
from repbnn_cli.lint.observe import observe
from repbnn_cli.positions import other_layers, positions
from repbnn_cli.recognize import Layer

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Check:
    """name: for --json; title: what was found, in a few words; trained: whether it says something of weights, so that a
    network without trained ones cannot be asked."""

    name: str
    severity: Severity
    title: str
    find: Callable[[Evidence], Iterable[Place]]
    remedy: str
    source: str
    trained: bool = False


_SIGN = "BNN, arXiv 1602.02830, eq. 1: sign(0) is +1; torch.sign(0) is 0"
_OPERANDS = "XNOR-Net, arXiv 1603.05279, section 3: XNOR and popcount need both operands binary"
_PACKED = "Larq Compute Engine, model optimization guide (docs.larq.dev/compute-engine/model_optimization_guide)"

CHECKS: tuple[Check, ...] = (
    Check(
        "empty-filters", "error", "binary filters that are all zero", find.empty_filters,
        "their output is 0 for every input: start these filters anew, or remove the channels",
        _SIGN, trained=True,
    ),
    Check(
        "zero-weights", "warning", "binary weights that are exactly 0", find.zero_weights,
        "a packed kernel stores one bit and computes something else: binarise by torch.where(w >= 0, 1, -1) and "
        "measure again",
        _SIGN, trained=True,
    ),
    Check(
        "dead-latent-weights", "warning", "latent weights that cannot learn any more", find.dead_latent,
        "the estimator's gradient is 0 where they are: clip latent weights to ±1 after every step, or use an "
        "estimator without a cut",
        "BNN, arXiv 1602.02830, section 1.3 and Algorithm 1: weights are clipped to [-1, 1]", trained=True,
    ),
    Check(
        "far-latent-weights", "note", "latent weights far beyond the sign's threshold", find.far_latent,
        "they flip only after many steps: clip them to ±1, or add weight decay",
        "Latent weights do not exist, arXiv 1906.02107: their magnitude acts as inertia", trained=True,
    ),
    Check(
        "small-variance", "warning", "BatchNorm channels with next to no variance", find.small_variance,
        "their input hardly varies and ε sets their scale: look at the layer before; `repbnn calibrate` estimates "
        "statistics anew",
        "Batch Normalization, arXiv 1502.03167, Algorithm 1", trained=True,
    ),
    Check(
        "nothing-binary", "warning", "no layer is binary", find.nothing_binary,
        "if it should be: `repbnn inspect` says which network it is taken for, and a rule file says what is binary "
        "(`modules: [{match: {type: ...}, role: binary_conv}]`)",
        _OPERANDS,
    ),
    Check(
        "float-weights", "warning", "1-bit inputs meet real weights", find.float_weights,
        "counts as FLOPs: binarise the weights too, or leave the inputs real; if something outside the network "
        "binarises them, declare the layer (rule file: `role: binary_conv`)",
        _OPERANDS,
    ),
    Check(
        "float-inputs", "warning", "1-bit weights meet real inputs", find.float_inputs,
        "saves memory, not multiplications, and counts as FLOPs: binarise the inputs, or do not call it a BNN",
        _OPERANDS,
    ),
    Check(
        "no-residual", "warning", "binary convolutions without a residual around them", find.no_residual,
        "RepTran may hurt here (VGG-small: IR-Net 90.40 → 86.95, ReCU 92.22 → 92.41): put a shortcut around each, as "
        "Bi-Real Net does, and measure",
        "RepBNN, arXiv 2207.09049, Table 5",
    ),
    Check(
        "skipped-inputs", "note", "downsampling that skips positions", find.skipped_inputs,
        "average-pool first (nn.AvgPool2d), then a 1×1 convolution with stride 1",
        "Bi-Real Net, arXiv 1808.00278: its shortcuts average-pool",
    ),
    Check(
        "zero-padding", "note", "±1 inputs padded with zeros", find.zero_padding,
        "a third value for packed kernels, which then correct the border: pad with 1 (F.pad(x, ..., value=1)) when "
        "training anew",
        "Larq Compute Engine, core/bconv2d/zero_padding_correction.h",
    ),
    Check(
        "input-words", "note", "input channels that are no multiple of 32", find.input_words,
        "padded up to 32 when packed, and then as fast as 32: use multiples, or expand them (RepTran does)", _PACKED,
    ),
    Check(
        "output-lanes", "note", "output channels that are no multiple of 8", find.output_lanes,
        "packed kernels compute 8 at a time: use multiples of 8", _PACKED,
    ),
    Check(
        "large-last-layer", "note", "a last layer larger than all others together", find.large_last_layer,
        "RepTran multiplies it by β, unless `transform --last-layer 1_over_beta` keeps its size or 1_over_beta2 "
        "divides it; or quantise it to 8 bits",
        "RepBNN, arXiv 2207.09049, Table 2",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One check and where it found something. skipped: why it could not be asked, else ""."""

    check: Check
    places: tuple[Place, ...]
    skipped: str = ""

    def as_plain(self) -> dict[str, Any]:
        check = self.check
        return {
            "check": check.name, "severity": check.severity, "title": check.title, "found": len(self.places),
            "places": [asdict(p) for p in self.places], "remedy": check.remedy, "source": check.source,
            "skipped": self.skipped or None,
        }  # fmt: skip


def lint(network: Network, layers: dict[str, Layer], *, trained: bool = True) -> tuple[Outcome, ...]:
    """All checks, in the order of the table. trained: whether the network's weights mean something."""
    found = Evidence(
        network,
        layers,
        positions(network, layers, other_layers(network, layers)),
        observe(network, layers, latent=trained),
        profiler.profile(network, layers),
    )
    why = "" if trained else "no trained weights"
    return tuple(Outcome(c, (), why) if c.trained and not trained else Outcome(c, tuple(c.find(found))) for c in CHECKS)


def worst(outcomes: Iterable[Outcome]) -> Severity | None:
    """The gravest severity of what was found."""
    found = {o.check.severity for o in outcomes if o.places}
    return next((s for s in SEVERITIES if s in found), None)
