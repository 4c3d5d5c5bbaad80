"""`repbnn rules list | show | check`."""

from __future__ import annotations

from repbnn_cli import rule_files, source, surgery, views
from repbnn_cli import rules as rulebook
from repbnn_cli.commands import targets
from repbnn_cli.recognize import recognize


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
        src = targets.named_network(network)
        captured = source.capture(src.model, src.origin, rule_set)
        assigned = rule_set.assign(surgery.subjects(captured, recognize(captured, rule_set.declare)))
        for path, rule in assigned.items():
            claims[rule.name].append(path)
    if as_json:
        rows = [{"rule": r.name, "part": r.part, "apply": r.apply, "where": r.where, "claims": claims[r.name]}
                for r in rule_set.rules]  # fmt: skip
        views.print_json({"name": rule_set.name, "valid": True, "options": targets.options_of(rule_set), "rules": rows})
        return
    made = views.table("rule", "part", "apply", "claims", "where", right=("claims",))
    for rule in rule_set.rules:
        count = str(len(claims[rule.name])) if network else ""
        made.add_row(rule.name, rule.part, rule.apply, count, rule.where)
    views.console().print(made)
    views.say(f"{name}: valid, {len(rule_set.rules)} rules")
