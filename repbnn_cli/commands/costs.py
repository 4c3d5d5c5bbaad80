"""`repbnn profile`, `report` and `zoo`: what networks cost, before and after."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from repbnn_cli import paper, profiler, result, shapes, source, tables, views
from repbnn_cli import report as report_room
from repbnn_cli import zoo as registry
from repbnn_cli.commands import targets
from repbnn_cli.errors import UsageError
from repbnn_cli.recognize import recognize


def profile(
    target: str | None, *, arch: str | None, model: str | None, model_args: str | None, input_size: str | None,
    per_layer: bool, sort: str | None, depth: int | None, as_json: bool, as_csv: bool, markdown: bool,
    output: str | None, force: bool, key: str | None, unsafe: bool,
) -> None:  # fmt: skip
    """Costs of one network, or of both sides of a result."""
    if as_json + as_csv + markdown > 1:
        raise UsageError("--json, --csv and --markdown: give one of them")
    if depth is not None and depth < 1:
        raise UsageError(f"--depth {depth}: expected 1 or more")
    targets.check_output(output, force=force)
    path = targets.result_or_newest(target)
    cost: tables.Cost
    if targets.is_result(path):
        opened = result.open_result(path, model)
        cost = _comparison(opened)
    elif model is None and not Path(path).exists():
        src = targets.zoo_network(path, input_size)
        cost = _profile_of(src.model, src.origin)
    else:
        src = source.from_checkpoint(
            path, arch=arch, model=model, model_args=model_args, input_size=input_size, key=key, unsafe=unsafe
        )
        cost = _profile_of(src.model, src.origin)
    if as_json:
        text = views.json_text({"target": str(path)} | tables.cost_as_dict(cost, sort=sort, depth=depth))
    elif as_csv:
        text = tables.csv_cost(cost, sort=sort, depth=depth)
    elif markdown:
        text = tables.markdown_cost(cost, layers=per_layer, sort=sort, depth=depth)
    else:
        out = views.console()
        text = views.rendered(
            tables.rich_cost(cost, layers=per_layer, sort=sort, depth=depth, width=out.width), out.width
        )
    targets.deliver(text, output, force=force)


def report(
    target: str | None, *, as_json: bool, output: str | None, timestamp: bool, model: str | None, force: bool
) -> None:
    """Everything about one transform, as Markdown or JSON."""
    targets.check_output(output, force=force)
    path = targets.result_or_newest(target)
    opened = result.open_result(path, model)
    made = report_room.build(_report_input(opened, timestamp=timestamp))
    targets.deliver(views.json_text(made.as_dict()) if as_json else made.markdown(), output, force=force)


def zoo(*, as_json: bool) -> None:
    """All networks of the paper with costs and accuracy."""
    entries = []
    for arch in registry.ARCHS.values():
        src = targets.zoo_network(arch.name, None)
        totals = _profile_of(src.model, src.origin).totals
        entries.append(
            tables.ZooRow(
                arch.name, arch.network, arch.method, arch.data, totals.parameters, totals.ops_without_bn,
                totals.ops_with_bn, paper.accuracy(arch),
            )
        )  # fmt: skip
    if as_json:
        views.print_json(tables.zoo_as_dict(entries))
    else:
        out = views.console()
        out.print(tables.rich_zoo(entries, width=out.width))


def _profile_of(model: torch.nn.Module, origin: source.Origin) -> profiler.Profile:
    network = source.capture(model, origin)
    return profiler.profile(network, recognize(network))


def _comparison(opened: result.Result) -> profiler.Comparison:
    """Both sides of a result, with the roles that its rules declared."""
    before = profiler.profile(opened.network, opened.plan.layers)
    return profiler.compare(before, profiler.profile(*shapes.rep_network(opened.plan, opened.module)))


def _report_input(opened: result.Result, *, timestamp: bool) -> report_room.ReportInput:
    payload, origin = opened.payload, opened.origin
    accuracy = payload["source"]["accuracy"] or {}
    options = payload["options"]
    arch = registry.ARCHS.get(origin.arch) if origin.arch else None
    return report_room.ReportInput(
        title=f"{origin.name}, β = {options['beta']}",
        rules_name=payload["rules_name"],
        rules_text=payload["rules"],
        options=options,
        plan=payload["plan"],
        certificate=payload["certificate"],
        costs=_comparison(opened),
        arch=origin.name,
        network=f"{arch.method} {arch.network}, {arch.data}" if arch else None,
        source_file=payload["source"]["file"],
        source_sha256=payload["source"]["sha256"],
        source_bytes=payload["source"]["size_bytes"],
        result_file=opened.path.name,
        result_sha256=payload["sha256"],
        accuracy=accuracy.get("top1"),
        accuracy_key=accuracy.get("key"),
        published=paper.accuracies(arch) if arch else (),
        published_costs=paper.costs(arch, options["beta"], options["last_layer"]) if arch else (),
        notes=payload["notes"],
        environment={**payload["provenance"], "python": platform.python_version()},
        timestamp=datetime.now(UTC).isoformat(timespec="seconds") if timestamp else None,
    )
