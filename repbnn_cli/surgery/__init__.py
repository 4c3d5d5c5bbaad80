"""Turns a captured network into its RepBNN: `plan` says what will happen, `apply` does it on a copy.

RepTran, RepBNN (arXiv 2207.09049), section 4; which rule says what is in rules/*.yaml, nowhere here. `rewrite` walks
the graph once, with the state of `walk`; `rewrite_modules`, `rewrite_operators` and `rewrite_operands` say what becomes
of each node. `applying` carries the plan out.
"""

from repbnn_cli.surgery.applying import apply
from repbnn_cli.surgery.planning import plan, subjects

__all__ = [
    "apply",
    "plan",
    "subjects",
]
