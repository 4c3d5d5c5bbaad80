"""What each command does, by calling the rooms: load, capture, plan, apply, verify, write."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from repbnn_cli import checkpoint, identify, paper, profiler, result, rule_files, shapes, source, surgery, tables, views
from repbnn_cli import report as report_room
from repbnn_cli import rules as rulebook
from repbnn_cli import verify as checks
from repbnn_cli import zoo as registry
from repbnn_cli.cpu_only import running
from repbnn_cli.errors import CheckpointError, UsageError, VerificationError
from repbnn_cli.plan import Plan
from repbnn_cli.recognize import recognize, type_names
from repbnn_cli.rules import RuleSet
from repbnn_cli.source import Source
from repbnn_cli.verify import Certificate

DEFAULT_RULES = "reptran"


# ---------------------------------------------------------------------------------------------------------------------
# transform


def transform(
    path: str, *, beta: int | None, rules: str | None, inherit: str | None, last_layer: str | None, output: str | None,
    slim: bool, verify: str, dry_run: bool, force: bool, as_json: bool, **origin: Any,
) -> None:  # fmt: skip
    """Checkpoint → plan → Rep network → certificate → file."""
    if verify not in ("auto", "full", "quick"):
        raise UsageError(f"--verify {verify}: expected auto, full or quick")
    rule_set = rulebook.load(rules or DEFAULT_RULES).with_options(beta, inherit, last_layer)
    target = Path(output) if output else source.default_output(path, rule_set.options.beta)
    if not dry_run:
        _check_output(output or target, force=force)
    src = source.from_checkpoint(path, **origin)
    with running(src.model):
        plan = make_plan(src, rule_set)
        if dry_run:
            _show_plan(src, plan, as_json=as_json)
            return
        rep = surgery.apply(plan)
        certificate = certify(src, plan, rep, mode=verify)
    payload = result.payload_of(src, plan, rep, certificate, slim=slim)
    if certificate.passed:
        if output is None:
            target.parent.mkdir(exist_ok=True)
        result.save(payload, target, force=force)
    _show_transform(src, plan, certificate, target, as_json=as_json)
    if not certificate.passed:
        failed = ", ".join(c.name for c in certificate.checks if not c.passed)
        raise VerificationError(f"{path}: check failed: {failed}; nothing was written")


def make_plan(src: Source, rules: RuleSet) -> Plan:
    """Capture and plan; declarations of the rule file that match no module are an error."""
    network = source.capture(src.model, src.origin, rules)
    known = [(path, type_names(m)) for path, m in src.model.named_modules() if path]
    rules.check_declared((), known)
    return surgery.plan(network, rules)


def certify(src: Source, plan: Plan, rep: torch.fx.GraphModule, *, mode: str) -> Certificate:
    """All checks; one sample is enough where images are large and no layer is foreign."""
    full = mode == "full" or (mode == "auto" and not src.trusted)
    large = torch.Size(src.origin.input_shape[0]).numel() > 50_000
    return checks.verify(src.model, plan, rep, gradients=full, batch=1 if large and not full else None)


def _show_plan(src: Source, plan: Plan, *, as_json: bool) -> None:
    rows = plan.rows()
    if as_json:
        views.print_json(_plain_plan(src, plan))
        return
    out = views.console()
    _headline(src, plan)
    out.print(views.plan_table(rows))
    out.print()
    out.print(views.plan_details(rows))
    out.print()
    for line in views.rule_places(rows):
        out.print(line)
    views.say(*_notes(plan), "dry run: nothing was changed or written")


def _show_transform(src: Source, plan: Plan, certificate: Certificate, target: Path, *, as_json: bool) -> None:
    if as_json:
        passed = certificate.passed
        outcome = {"certificate": certificate.as_plain(), "passed": passed, "output": str(target) if passed else None}
        views.print_json(_plain_plan(src, plan) | outcome)
        return
    out = views.console()
    _headline(src, plan)
    out.print(views.plan_table(plan.rows()))
    out.print()
    out.print(views.certificate_table(certificate.as_plain()))
    views.say(*_notes(plan))
    if certificate.passed:
        views.say(f"wrote {target}; next: repbnn profile, repbnn report --markdown")


def _plain_plan(src: Source, plan: Plan) -> dict[str, Any]:
    return {
        "network": src.origin.name,
        "identified": src.reason,
        "rules": plan.rules.name,
        "options": _options(plan.rules),
        "plan": [row.as_plain() for row in plan.rows()],
        "notes": [*plan.notes, *plan.network.notes],
    }


def _notes(plan: Plan) -> list[str]:
    return [f"note: {n}" for n in (*plan.notes, *plan.network.notes)]


def _headline(src: Source, plan: Plan) -> None:
    options = plan.rules.options
    views.console().print(
        f"{src.origin.name} → RepBNN, β = {options.beta}, rules {plan.rules.name}, inherit {options.inherit}, "
        f"last layer {options.last_layer}\n{src.reason}\n"
    )


def _options(rules: RuleSet) -> dict[str, Any]:
    return {"beta": rules.options.beta, "inherit": rules.options.inherit, "last_layer": rules.options.last_layer}


# ---------------------------------------------------------------------------------------------------------------------
# inspect


def inspect(path: str, *, arch: str | None, key: str | None, unsafe: bool, as_json: bool) -> None:
    """What is in a file, and which network it belongs to; exit code 3 when it fits none."""
    file = checkpoint.load(path, key=key, unsafe=unsafe)
    stored = _stored(path, file)
    found: identify.Identified | None = None
    problem: CheckpointError | None = None
    if stored is None:
        try:
            found = identify.resolve(file, arch)
        except CheckpointError as error:
            problem = error
    accuracy = file.accuracy
    values = {
        "file": str(file.path),
        "sha256": file.sha256,
        "bytes": file.size_bytes,
        "format": file.format,
        "state dict under": file.container or None,
        "prefix taken off": file.prefix or None,
        "tensors": len(file.tensors),
        "values": sum(t.numel() for t in file.tensors.values()),
        "dtypes": file.dtypes,
        "stated accuracy": {"top1": accuracy.percent, "key": accuracy.key} if accuracy else None,
        "metadata": {} if stored else file.metadata,
        "notes": list(file.notes),
        "network": found.arch if found else (stored or {}).get("source", {}).get("arch"),
        "classes": found.num_classes if found else None,
        "because": found.reason if found else None,
        "fits as well": list(found.alternatives) if found else [],
        "result of transform": {k: stored[k] for k in ("options", "rules_name", "certificate", "source")}
        if stored
        else None,
    }
    if as_json:
        views.print_json(values | {"problem": str(problem) if problem else None})
    else:
        views.console().print(views.facts(_readable(values)))
    if problem is not None:
        raise problem


def _stored(path: str, file: checkpoint.Checkpoint) -> dict[str, Any] | None:
    is_result = file.payload is not None or "repbnn" in file.metadata
    return result.read_payload(path) if is_result else None


def _readable(values: dict[str, Any]) -> Iterator[tuple[str, object]]:
    for label, value in values.items():
        if label == "result of transform" and value:
            options = value["options"]
            passed = all(c["passed"] for c in value["certificate"])
            yield (
                "result of transform",
                f"β = {options['beta']}, rules {value['rules_name']}, inherit {options['inherit']}",
            )
            yield "source", f"{value['source']['file']} (sha256 {str(value['source']['sha256'])[:12]}…)"
            yield "certificate", "passed" if passed else "FAILED"
        elif isinstance(value, dict) and value:
            yield label, ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            yield label, "; ".join(map(str, value))
        elif isinstance(value, int):
            yield label, f"{value:,}"
        else:
            yield label, value


# ---------------------------------------------------------------------------------------------------------------------
# profile, report, zoo


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
    _check_output(output, force=force)
    path = _result_or(target)
    cost: tables.Cost
    if _is_result(path):
        opened = result.open_result(path, model)
        cost = _comparison(opened)
    elif model is None and not Path(path).exists():
        src = _zoo_network(path, input_size)
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
    _deliver(text, output, force=force)


def report(
    target: str | None, *, as_json: bool, output: str | None, timestamp: bool, model: str | None, force: bool
) -> None:
    """Everything about one transform, as Markdown or JSON."""
    _check_output(output, force=force)
    path = _result_or(target)
    opened = result.open_result(path, model)
    made = report_room.build(_report_input(opened, timestamp=timestamp))
    _deliver(views.json_text(made.as_dict()) if as_json else made.markdown(), output, force=force)


def zoo(*, as_json: bool) -> None:
    """All networks of the paper with costs and accuracy."""
    entries = []
    for arch in registry.ARCHS.values():
        src = _zoo_network(arch.name, None)
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


def _result_or(target: str | None) -> str:
    """What was named, or the newest result, which is then said."""
    if target is not None:
        return target
    found = result.newest()
    views.say(f"newest result: {found}")
    return str(found)


def _is_result(path: str) -> bool:
    return Path(path).is_file() and result.is_result(path)


def _zoo_network(name: str, input_size: str | None) -> Source:
    """A zoo network without trained weights; a name that is neither file nor network gets the nearest names."""
    if name not in registry.ARCHS:
        if "/" in name or "." in name:
            raise CheckpointError(f"{name}: no such file; name a checkpoint, a result, or a network (`repbnn zoo`)")
        registry.build(name)
    shape = source.parse_input_size(input_size) if input_size else (registry.ARCHS[name].input_shape,)
    origin = source.Origin(name, None, {}, None, shape)
    return Source(source.from_origin(origin), origin, reason="from the zoo, without trained weights")


def _check_output(output: str | Path | None, *, force: bool) -> None:
    """Early, before any work: the place can be written. The folder checkpoints/ is made when there is a result."""
    if output is not None and (isinstance(output, str) or output.parent.is_dir()):
        checkpoint.check_output(output, force=force)


def _deliver(text: str, output: str | None, *, force: bool) -> None:
    """To stdout, or atomically into a file."""
    if output is None:
        print(text, end="" if text.endswith("\n") else "\n")
        return
    checkpoint.atomic_write_text(output, text if text.endswith("\n") else text + "\n", force=force)
    views.say(f"wrote {output}")


# ---------------------------------------------------------------------------------------------------------------------
# rules


def rules_list(*, as_json: bool) -> None:
    """The shipped rule files with their summaries."""
    files = rulebook.names()
    if as_json:
        views.print_json([{"name": name, "summary": summary} for name, summary in files.items()])
        return
    made = views.table("rules", "summary")
    for name, summary in files.items():
        made.add_row(name, summary)
    views.console().print(made)


def rules_show(name: str, *, resolved: bool) -> None:
    """A rule file's text, as written or resolved."""
    rule_set = rulebook.load(name)
    print(rule_set.text if resolved else rule_files.find(name, None).text, end="")


def rules_check(name: str, *, network: str | None, as_json: bool) -> None:
    """Valid or not; with a network, how many modules each rule claims there."""
    rule_set = rulebook.load(name)
    claims: dict[str, list[str]] = {rule.name: [] for rule in rule_set.rules}
    if network is not None:
        src = _named_network(network)
        captured = source.capture(src.model, src.origin, rule_set)
        assigned = rule_set.assign(surgery.subjects(captured, recognize(captured, rule_set.declare)))
        for path, rule in assigned.items():
            claims[rule.name].append(path)
    if as_json:
        rows = [{"rule": r.name, "part": r.part, "apply": r.apply, "where": r.where, "claims": claims[r.name]}
                for r in rule_set.rules]  # fmt: skip
        views.print_json({"name": rule_set.name, "valid": True, "options": _options(rule_set), "rules": rows})
        return
    made = views.table("rule", "part", "apply", "claims", "where", right=("claims",))
    for rule in rule_set.rules:
        count = str(len(claims[rule.name])) if network else ""
        made.add_row(rule.name, rule.part, rule.apply, count, rule.where)
    views.console().print(made)
    views.say(f"{name}: valid, {len(rule_set.rules)} rules")


def _named_network(name: str) -> Source:
    """A checkpoint's network with its weights, or a zoo network without."""
    return source.from_checkpoint(name) if Path(name).exists() else _zoo_network(name, None)
