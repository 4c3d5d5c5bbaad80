"""What a captured network costs: `profiler.profile`. Numbers alone, no text.

`counting` knows the operations of every kind of call, `sizes` the bytes, `liveness` the peak memory, `shapes` the
graph of a Rep network without capturing it again.
"""

from repbnn_cli.profiler.costs import (
    METRICS,
    Change,
    Comparison,
    LayerCost,
    Metric,
    Omission,
    Profile,
    Totals,
    compare,
    ops,
    profile,
)

__all__ = [
    "METRICS",
    "Change",
    "Comparison",
    "LayerCost",
    "Metric",
    "Omission",
    "Profile",
    "Totals",
    "compare",
    "ops",
    "profile",
]
