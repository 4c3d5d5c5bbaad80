"""`repbnn rules list | show | check | init`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from repbnn_cli import drafts, source, surgery, views
from repbnn_cli import rules as rulebook
from repbnn_cli.commands import targets
from repbnn_cli.errors import UsageError
from repbnn_cli.recognize import recognize
from repbnn_cli.rules import rule_files
from repbnn_cli.user_code.cpu_only import running


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
    views.print_text(rule_set.text if resolved else rule_files.find(name, None).text)


def rules_check(
    name: str, *, network: str | None, as_json: bool, input_size: str | None = None, **origin: Any
) -> None:  # fmt: skip
    """Valid or not; with a network, how many modules each rule claims there."""
    rule_set = rulebook.load(name)
    if network is None and (input_size or any(origin.values())):
        raise UsageError("--network: is missing; --model and its like say what is in the checkpoint that it names")
    claims: dict[str, list[str]] = {rule.name: [] for rule in rule_set.rules}
    if network is not None:
        src = targets.network_of(network, input_size=input_size, **origin)
        source.check_declared(src.model, rule_set)
        with running(src.model):
            captured = source.capture(src.model, src.origin, rule_set)
            assigned = rule_set.assign(surgery.subjects(captured, recognize(captured, rule_set.declare)))
        for path, rule in assigned.items():
            claims[rule.name].append(path)
    if as_json:
        rows = [{"rule": r.name, "part": r.part, "apply": r.apply, "where": r.where, "claims": claims[r.name]}
                for r in rule_set.rules]  # fmt: skip
        views.print_json({"name": rule_set.name, "valid": True, "options": targets.options_of(rule_set), "rules": rows})
        return
    made = views.table("rule", "part", "apply", *(["claims"] if network else []), "where", right=("claims",))
    for rule in rule_set.rules:
        count = [str(len(claims[rule.name]))] if network else []
        made.add_row(rule.name, rule.part, rule.apply, *count, rule.where.removeprefix("rules/"))
    views.console().print(made)
    views.say(f"{name}: valid, {len(rule_set.rules)} rules")


def rules_init(
    network: str, *, rules: str | None, output: str | None, input_size: str | None, force: bool, as_json: bool,
    **origin: Any,
) -> None:  # fmt: skip
    """A rule file that says what was found out about a network, and what is left to decide."""
    if output is not None:
        targets.check_output(output, force=force)
    base = rules or targets.DEFAULT_RULES
    rule_set = rulebook.load(base)
    if base not in rulebook.names():  # a path is relative to the file that extends it
        base = os.path.relpath(base, Path(output).parent if output else Path.cwd())
        base = base if base.startswith("..") else f"./{base}"
    src = targets.network_of(network, input_size=input_size, **origin)
    found = drafts.draft(src, base, rule_set)
    if as_json:
        targets.deliver(views.json_text(found.as_plain()), output, force=force)
        return
    title = f"What `repbnn rules init {network}` found out about {src.origin.name} ({src.reason})."
    targets.deliver(found.text(title), output, force=force)
    declared = sum(e.declared is not None for e in found.entries)
    views.say(f"{declared} of {len(found.entries)} modules declared; {len(found.decide) or 'nothing'} left to decide")
