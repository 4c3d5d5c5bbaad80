"""A report as values for JSON, which say what the Markdown and the page say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from repbnn_cli import paper
from repbnn_cli.report.value import INHERIT, Evidence, PaperCost, Report, printed
from repbnn_cli.runs import RunRecord
from repbnn_cli.runs.sweeps import Row, Sweep
from repbnn_cli.views.tables import CONVENTION, cost_as_dict


def as_dict(report: Report) -> dict[str, Any]:
    """JSON values only: numbers that JSON does not have (inf, nan) are text."""
    plain: dict[str, Any] = _finite(_as_dict(report))
    return plain


def _as_dict(report: Report) -> dict[str, Any]:
    given = report.given
    return {
        "title": given.title,
        "arch": given.arch,
        "network": given.network,
        "source": {"file": given.source_file, "sha256": given.source_sha256, "bytes": given.source_bytes},
        "result": {"file": given.result_file, "sha256": given.result_sha256},
        "rules": {"name": given.rules_name, "text": given.rules_text},
        "options": dict(given.options),
        "inherit": INHERIT.get(given.options["inherit"]),
        "plan": [dict(row) for row in given.plan],
        "notes": list(given.notes),
        "certificate": {"passed": report.passed, "checks": [dict(c) for c in given.certificate]},
        "convention": list(CONVENTION),
        "costs": cost_as_dict(given.costs),
        "accuracy": None if given.accuracy is None else {"top1": given.accuracy, "key": given.accuracy_key},
        "paper": {
            "source": paper.SOURCE,
            "accuracy": [asdict(a) for a in given.published],
            "costs": [_plain_paper_cost(c) for c in report.paper_costs],
        },
        "training": dict(given.training),
        "runs": runs_as_list(given.runs),
        "evidence": _evidence(given.evidence),
        "environment": dict(given.environment),
        "timestamp": given.timestamp,
    }


def runs_as_list(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Every run with its rows; its folder by name, so that a report does not depend on where it is."""
    plain: list[dict[str, Any]] = _finite(
        [asdict(run) | {"path": run.path.name, "epochs": run.epochs, "distance": run.distance} for run in runs]
    )
    return plain


def sweep_as_dict(sweep: Sweep) -> dict[str, Any]:
    """The table of a sweep with the runs of each row."""
    return {
        "name": sweep.experiment.name,
        "summary": sweep.experiment.file.summary,
        "tables": list(sweep.experiment.tables),
        "budget": asdict(sweep.budget),
        "rows": [_row(row) for row in sweep.rows],
        "notes": list(sweep.notes),
    }


def _row(row: Row) -> dict[str, Any]:
    spreads = {key: None if (s := getattr(row, key)) is None else asdict(s) for key in ("best", "last", "gain")}
    return {
        "network": row.network, "variant": row.variant, "seeds": row.seeds, **spreads,
        "published": row.published, "published_gain": row.published_gain,
        "runs": [{"path": str(run.path), "seed": run.seed, "epochs": run.epochs, "best_top1": run.best_top1,
                  "last_top1": run.last_top1, "state": run.state} for run in row.runs],
    }  # fmt: skip


def _evidence(evidence: Evidence) -> dict[str, Any]:
    sides = ("source", "rep")
    return {
        "graph": [{"name": b.name, **asdict(b)} for b in evidence.blocks],
        "weights": {side: [asdict(w) for w in found] for side, found in zip(sides, evidence.weights, strict=True)},
        "activations": {
            "images": evidence.images,
            **{side: [asdict(a) for a in found] for side, found in zip(sides, evidence.activations, strict=True)},
        },
        "landscape": [asdict(standing) for standing in evidence.others],
    }


def _plain_paper_cost(cost: PaperCost) -> dict[str, Any]:
    sides = zip(("source", "rep"), cost.ours, cost.printed, strict=True)
    return {
        "table": cost.table,
        "metric": cost.metric,
        **{side: {"here": ours, "paper": p.as_number(), "printed": printed(p)} for side, ours, p in sides},
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
