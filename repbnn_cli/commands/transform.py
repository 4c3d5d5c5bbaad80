"""`repbnn transform`: load, capture, plan, apply, verify, write."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repbnn_cli import result, runs, source, surgery, views
from repbnn_cli import rules as rulebook
from repbnn_cli import verify as checks
from repbnn_cli.commands import targets
from repbnn_cli.errors import UsageError, VerificationError
from repbnn_cli.graph import KeptGraphModule
from repbnn_cli.inherit import Kernel
from repbnn_cli.plan import Plan
from repbnn_cli.rules import RuleSet
from repbnn_cli.source import Source
from repbnn_cli.user_code.cpu_only import running
from repbnn_cli.verify import Certificate


def transform(
    path: str, *, beta: int | None, rules: str | None, inherit: str | None, last_layer: str | None, output: str | None,
    slim: bool, verify: str, dry_run: bool, force: bool, as_json: bool, seed: int, verbose: bool = False,
    **origin: Any,
) -> None:  # fmt: skip
    """Checkpoint, or a fresh network of the zoo → plan → Rep network → certificate → file."""
    if verify not in ("auto", "full", "quick"):
        raise UsageError(f"--verify {verify}: expected auto, full or quick")
    rule_set = rulebook.load(rules or targets.DEFAULT_RULES)
    from_zoo = targets.is_zoo_name(path)
    if from_zoo and inherit is None:
        inherit = "none"  # a network that was never trained has nothing to hand down
    rule_set = rule_set.with_options(beta, inherit, last_layer)
    run = runs.folder_of(path)  # best.pt of a run is called as the run is
    target = Path(output) if output else source.default_output(run.name if run else path, rule_set.options.beta)
    if not dry_run:
        targets.check_output(output or target, force=force)
    if from_zoo:
        src = source.fresh(path, seed, origin["input_size"])
        targets.check_zoo_agrees(src.origin, **origin)
    else:
        src = source.from_checkpoint(path, **origin)
    targets.say_choice(src, origin.get("key"))
    with running(src.model):
        plan = make_plan(src, rule_set)
        if verbose:
            targets.say_attempts(plan.network)
        if dry_run:
            _show_plan(src, plan, as_json=as_json)
            return
        afresh = rule_set.options.inherit == "none" and not from_zoo
        rep = surgery.apply(plan, fresh=_new_tensors(src, plan, seed) if afresh else None, seed=seed)
        certificate = certify(src, plan, rep, mode=verify)
    payload = result.payload_of(src, plan, rep, certificate, slim=slim)
    if certificate.passed:
        if output is None:
            target.parent.mkdir(exist_ok=True)
        result.save(payload, target, force=force)
        views.say(*views.left_out_lines(target, payload))
    _show_transform(src, plan, certificate, target, newest=output is None, as_json=as_json)
    if not certificate.passed:
        failed = ", ".join(c.name for c in certificate.checks if not c.passed)
        raise VerificationError(f"{path}: check failed: {failed}; nothing was written")


def make_plan(src: Source, rules: RuleSet) -> Plan:
    """Capture and plan; declarations of the rule file that match no module are an error."""
    network = source.capture(src.model, src.origin, rules)
    source.check_declared(src.model, rules)
    return surgery.plan(network, rules)


def _new_tensors(src: Source, plan: Plan, seed: int) -> dict[str, Tensor]:
    """The tensors of the source network as its own code starts them, for `--inherit none`."""
    tensors = source.newly_built(src.origin, seed).state_dict()
    if src.origin.model is not None:  # code that is not known to start anything
        again = source.newly_built(src.origin, seed + 1).state_dict()
        kernels = (e.tensor_path(n) for e in plan.edits for n, recipe in e.tensors if isinstance(recipe, Kernel))
        for name in kernels:
            if name in tensors and torch.equal(tensors[name], again[name]):
                raise UsageError(
                    f"--inherit none: {src.origin.name} gives {name} the same values whatever the seed; expected "
                    "a callable that builds a new network and loads nothing"
                )
    return tensors


def certify(src: Source, plan: Plan, rep: KeptGraphModule, *, mode: str) -> Certificate:
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


def _show_transform(
    src: Source, plan: Plan, certificate: Certificate, target: Path, *, newest: bool, as_json: bool
) -> None:
    """newest: whether commands find the result by themselves."""
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
        what = ("" if newest else f" {shlex.quote(str(target))}") + views.own_code(src.origin.model)
        views.say(f"wrote {target}; next: repbnn profile{what}, repbnn report{what} --markdown")


def _plain_plan(src: Source, plan: Plan) -> dict[str, Any]:
    return {
        "network": src.origin.name,
        "identified": src.reason,
        "rules": plan.rules.name,
        "options": targets.options_of(plan.rules),
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
