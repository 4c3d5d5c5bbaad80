"""What hurts a binary network in practice: `lint.lint` runs the checks (`lint_checks`) on one run of it (`observe`)."""

from repbnn_cli.lint.running import CHECKS, SEVERITIES, Check, Outcome, lint, worst

__all__ = [
    "CHECKS",
    "SEVERITIES",
    "Check",
    "Outcome",
    "lint",
    "worst",
]
