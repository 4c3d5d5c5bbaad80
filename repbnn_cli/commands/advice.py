"""`repbnn explain`, `lint` and `doctor`: what to know about a network, a result, a machine."""

from __future__ import annotations

from typing import Any

from repbnn_cli import checkpoint, result, views
from repbnn_cli import doctor as doctor_room
from repbnn_cli import lint as lint_room
from repbnn_cli.commands import targets
from repbnn_cli.errors import GateError, UsageError
from repbnn_cli.explain import Explainer, Story
from repbnn_cli.views import advice_views


def explain(target: str | None, path: str | None, *, model: str | None, as_json: bool) -> None:
    """What became of a module of a result, or of all of them, and why."""
    name = targets.result_or_newest(target)
    opened = result.of_file(checkpoint.load(name), model)
    if opened is None:
        raise UsageError(f"{name}: is not a result of `repbnn transform`; `transform {name} --dry-run` shows a plan")
    payload = opened.payload
    explainer = Explainer(
        opened.plan, opened.module, {row["path"]: row["where"] for row in payload["plan"]},
        weights=bool(payload["source_tensors"]),
    )  # fmt: skip
    told = explainer.one(path) if path else explainer.whole()
    options = payload["options"]
    if as_json:
        head = {"network": opened.origin.name, "rules": payload["rules_name"], "options": options}
        kind = "module" if isinstance(told, Story) else "whole"
        views.print_json(head | {kind: told.as_plain()})
        return
    views.console().print(
        f"{opened.origin.name}, β = {options['beta']}, rules {payload['rules_name']}, inherit {options['inherit']}, "
        f"last layer {options['last_layer']}\n"
    )
    views.console().print(advice_views.story(told) if isinstance(told, Story) else advice_views.whole(told))


def lint(target: str | None, *, strict: bool, every: bool, as_json: bool, **origin: Any) -> None:
    """All checks on one network; of a result, on its Rep network."""
    name = targets.result_or_newest(target)
    looked = targets.examined(name, values=True, **origin)
    outcomes = lint_room.lint(looked.network, looked.layers, trained=looked.trained)
    gravest = lint_room.worst(outcomes)
    if as_json:
        plain = [o.as_plain() for o in outcomes]
        views.print_json({"target": name, "network": looked.name, "worst": gravest, "checks": plain})
    else:
        views.console().print(advice_views.findings(looked.name, outcomes, every=every))
    if strict and gravest in ("error", "warning"):
        found = [o.check.name for o in outcomes if o.places and o.check.severity != "note"]
        raise GateError(f"{name}: --strict: found {', '.join(found)}; what to do is in the table")


def doctor(*, as_json: bool) -> None:
    """This machine: what is there, what is missing, what is wrong."""
    items = doctor_room.examine()
    if as_json:
        views.print_json(doctor_room.as_plain(items))
    else:
        views.console().print(advice_views.health(items))
