"""`repbnn profile`, `compare` and `zoo`: what networks cost, before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from repbnn_cli import crosscheck, paper, profiler, result, source, views
from repbnn_cli import zoo as registry
from repbnn_cli.commands import targets
from repbnn_cli.errors import GateError, UsageError
from repbnn_cli.graph import Network
from repbnn_cli.profiler import shapes
from repbnn_cli.recognize import Layer, recognize
from repbnn_cli.views import side_by_side, tables


def check_counts_only(of_latency: Mapping[str, str | None]) -> None:
    """Options of --latency without it: counts do not depend on them."""
    if given := [name for name, value in of_latency.items() if value is not None]:
        raise UsageError(f"{', '.join(given)}: are for --latency, which measures time; counts do not depend on them")


def profile(
    target: str | None, *, arch: str | None, model: str | None, model_args: str | None, input_size: str | None,
    per_layer: bool, sort: str | None, depth: int | None, as_json: bool, as_csv: bool, markdown: bool,
    output: str | None, force: bool, key: str | None, unsafe: bool, cross_check: bool, max_ops: float | None,
    verbose: bool = False,
) -> None:  # fmt: skip
    """Costs of one network, or of both sides of a result."""
    _one_format(as_json, as_csv, markdown)
    if as_csv and cross_check:
        raise UsageError("--csv has no place for --cross-check; use --json, --markdown or neither")
    if max_ops is not None and not max_ops > 0:
        raise UsageError(f"--max-ops {max_ops:g}: expected a number of operations above 0, e.g. 0.9e8")
    if depth is not None and depth < 1:
        raise UsageError(f"--depth {depth}: expected 1 or more")
    targets.check_output(output, force=force)
    path = targets.result_or_newest(target)
    sides = _sides(
        targets.examined(
            path, arch=arch, model=model, model_args=model_args, input_size=input_size, key=key, unsafe=unsafe
        )
    )
    for side in sides if verbose else ():
        targets.say_attempts(side.network)
    checks = {s.title: crosscheck.cross_check(s.network, s.layers, s.profile) for s in sides} if cross_check else {}
    profiles = [side.profile for side in sides]
    cost: tables.Cost = profiles[0] if len(profiles) == 1 else profiler.compare(*profiles)
    if as_json:
        plain = {"target": str(path)} | tables.cost_as_dict(cost, sort=sort, depth=depth)
        told = {"cross_check": {title: check.as_plain() for title, check in checks.items()}} if checks else {}
        text = views.json_text(plain | told)
    elif as_csv:
        text = tables.csv_cost(cost, sort=sort, depth=depth)
    elif markdown:
        made = tables.markdown_cost(cost, layers=per_layer, sort=sort, depth=depth)
        text = "\n".join([made, *(side_by_side.markdown_crosscheck(t, c) for t, c in checks.items())])
    else:
        out = views.console()
        shown = [tables.rich_cost(cost, layers=per_layer, sort=sort, depth=depth, width=out.width)]
        shown += [side_by_side.rich_crosscheck(t, c) for t, c in checks.items()]
        text = "\n".join(views.rendered(part, out.width) for part in shown)
    targets.deliver(text, output, force=force)
    if max_ops is not None:
        _gate(path, sides[-1], max_ops)


def _one_format(*chosen: bool) -> None:
    if sum(chosen) > 1:
        raise UsageError("--json, --csv and --markdown: give one of them")


@dataclass(frozen=True)
class _Side:
    """One network with what it costs: the target itself, or source and Rep network of a result."""

    title: str
    network: Network
    layers: Mapping[str, Layer]
    profile: profiler.Profile


def _sides(looked: targets.Examined) -> list[_Side]:
    opened = looked.opened
    both = [(looked.name, looked.network, looked.layers)]
    if opened is not None:
        both = [("before", opened.network, dict(opened.plan.layers)), ("after", looked.network, looked.layers)]
    return [_Side(title, network, layers, profiler.profile(network, layers)) for title, network, layers in both]


def _gate(path: str, side: _Side, limit: float) -> None:
    """`--max-ops`: OPs without BN, of a result the Rep network's."""
    value = side.profile.totals.ops_without_bn
    whose = "the Rep network takes" if side.title == "after" else "takes"
    if value > limit:
        raise GateError(f"{path}: {whose} {value:,} OPs without BN, more than --max-ops {limit:,.0f}")
    if side.profile.omissions:
        views.say(
            f"note: --max-ops: {len(side.profile.omissions)} operations are not counted, so {value:,} is a minimum"
        )


def compare(
    names: Sequence[str], *, models: Sequence[str], as_json: bool, as_csv: bool, markdown: bool, output: str | None,
    force: bool,
) -> None:  # fmt: skip
    """Any number of networks side by side."""
    _one_format(as_json, as_csv, markdown)
    targets.check_output(output, force=force)
    looked = [targets.examined_beside(name, models) for name in names]
    for model in dict.fromkeys(models):
        if model not in {built_by for _, built_by in looked}:
            raise UsageError(f"--model {model}: {', '.join(names)} are built without it; leave --model out")
    entries = [entry(found) for found, _ in looked]
    shared = Counter(e.target for e in entries)  # se.pt and out/se.pt need their folders to be told apart
    entries = [replace(e, target=n) if shared[e.target] > 1 else e for e, n in zip(entries, names, strict=True)]
    if as_json:
        text = views.json_text(side_by_side.entries_as_dict(entries))
    elif as_csv:
        text = side_by_side.csv_entries(entries)
    elif markdown:
        text = side_by_side.markdown_entries(entries)
    else:
        out = views.console()
        text = views.rendered(side_by_side.rich_entries(entries, width=out.width), out.width)
    targets.deliver(text, output, force=force)


def entry(looked: targets.Examined) -> side_by_side.Entry:
    """Accuracy is what the file says; of a Rep network, what was measured after training; of a zoo name, published."""
    made = profiler.profile(looked.network, looked.layers)
    accuracy, whose = None, ""
    arch = registry.ARCHS.get(looked.origin.arch or "")
    made_by_us = looked.opened.payload if looked.opened else looked.packed.header if looked.packed else None
    stated = looked.file.accuracy._asdict() if looked.file and looked.file.accuracy else None
    if looked.packed is not None:
        stated = looked.packed.header.get("file", {}).get("accuracy")  # `packed.pack` in Python may say nothing
    if stated is not None:
        accuracy, whose = stated["percent"], f"stated in the file ({stated['key']})"
    elif made_by_us is not None:
        training = result.training_of(made_by_us)
        accuracy = result.top1_of(training)
        whose = f"measured on {training.get('measured', training).get('data', 'its data')}"
        whose += " after training it" if "recipe" in training else ""
    elif looked.file is None and arch is not None and (published := paper.accuracy(arch)) is not None:
        accuracy, whose = published.raw, f"published for {arch.data}, RepBNN {published.table}"
    name = Path(looked.target).name if looked.file or made_by_us else looked.target
    return side_by_side.Entry(
        name, looked.name, made.totals, accuracy, whose if accuracy is not None else "", made.omissions
    )


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


def comparison(opened: result.Result) -> profiler.Comparison:
    """Both sides of a result, with the roles that its rules declared."""
    before = profiler.profile(opened.network, opened.plan.layers)
    return profiler.compare(before, profiler.profile(*shapes.rep_network(opened.plan, opened.module)))
