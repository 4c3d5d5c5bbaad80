"""The table of a sweep: a value as Markdown, JSON or a terminal's table. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from repbnn_cli import paper, views
from repbnn_cli.number_text import cell, code, markdown_table, safe
from repbnn_cli.sweeps import Row, Spread, Sweep

COLUMNS = ("network", "variant", "runs", "best top-1", "last top-1", "gain", "paper", "paper's gain")


def markdown(sweep: Sweep) -> str:
    return "\n".join(_markdown(sweep)).rstrip() + "\n"


def terminal(sweep: Sweep) -> Table:
    made = views.table(*COLUMNS, right=COLUMNS[2:])
    for row in sweep.rows:
        made.add_row(row.network, row.variant, *_figures(row))
    return made


def as_dict(sweep: Sweep) -> dict[str, Any]:
    return {
        "name": sweep.experiment.name,
        "summary": sweep.experiment.file.summary,
        "tables": list(sweep.experiment.tables),
        "budget": asdict(sweep.budget),
        "rows": [_plain(row) for row in sweep.rows],
        "notes": list(sweep.notes),
    }


def explanation(sweep: Sweep) -> Iterator[str]:
    """What stands under the table."""
    yield "top-1 in percent: best over epochs, as the published codes report it, and that of the last epoch"
    yield "gain: points over the same network's source variant, paired by seed; ± is the sample standard deviation"
    if tables := sweep.experiment.tables:
        yield f"paper: {', '.join(tables)} of {paper.SOURCE}, trained for the full published schedules"
    yield from sweep.notes


def _markdown(sweep: Sweep) -> Iterator[str]:
    yield f"# {cell(safe(sweep.experiment.name))}: {safe(sweep.experiment.file.summary)}\n"
    rows = [(code(row.network), safe(row.variant), *_figures(row)) for row in sweep.rows]
    yield markdown_table(COLUMNS, rows, left=2)
    yield "\n".join(f"- {safe(line)}" for line in explanation(sweep)) + "\n"
    yield "## Runs\n"
    runs = [
        (
            code(run.path.name),
            str(run.seed),
            str(run.epochs),
            _number(run.best_top1),
            str(run.best_epoch or ""),
            run.state,
        )
        for row in sweep.rows
        for run in row.runs
    ]
    yield markdown_table(("run", "seed", "epochs", "best top-1", "at epoch", "state"), runs, left=1)


def _figures(row: Row) -> tuple[str, ...]:
    return (
        f"{len(row.finished)}/{row.seeds}", _spread(row.best), _spread(row.last), _spread(row.gain, sign="+"),
        _number(row.published), _number(row.published_gain, sign="+"),
    )  # fmt: skip


def _spread(value: Spread | None, sign: str = "") -> str:
    if value is None:
        return "–"
    spread = "" if value.deviation is None else f" ± {value.deviation:.2f}"
    return f"{value.mean:{sign}.2f}{spread}"


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.2f}"


def _plain(row: Row) -> dict[str, Any]:
    spreads = {key: None if (s := getattr(row, key)) is None else asdict(s) for key in ("best", "last", "gain")}
    return {
        "network": row.network, "variant": row.variant, "seeds": row.seeds, **spreads,
        "published": row.published, "published_gain": row.published_gain,
        "runs": [{"path": str(run.path), "seed": run.seed, "epochs": run.epochs, "best_top1": run.best_top1,
                  "last_top1": run.last_top1, "state": run.state} for run in row.runs],
    }  # fmt: skip
