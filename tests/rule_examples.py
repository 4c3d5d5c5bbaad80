"""A small network as rules see it, and short ways to write rules: for the tests of rules."""

from __future__ import annotations

from repbnn_cli import rules
from repbnn_cli.rules import RuleSet, Subject


def subject(path: str, role: str, position: str = "", *classes: str) -> Subject:
    types = classes or {"batch_norm": ("BatchNorm2d", "torch.nn.BatchNorm2d")}.get(role, ("Conv2d", "torch.nn.Conv2d"))
    return Subject(path, types, role, position)


NETWORK = (
    subject("conv1", "float_conv", "first"),
    subject("bn1", "batch_norm"),
    subject("layer1.0.conv1", "binary_conv", "trunk", "BinConv", "nets.BinConv", "Conv2d", "torch.nn.Conv2d"),
    subject("layer1.0.bn1", "batch_norm"),
    subject("layer1.0.act", "per_channel", "", "RPReLU", "nets.RPReLU"),
    subject("layer1.0:add", "weightless", "", "add"),
    subject("layer1.0.down", "float_conv", "bypass"),
    subject("fc", "float_linear", "last", "Linear", "torch.nn.Linear"),
)


def claims(rule_set: RuleSet, network: tuple[Subject, ...] = NETWORK) -> dict[str, str]:
    return {path: rule.name for path, rule in rule_set.assign(network).items()}


def rule(match: str, *more: str, apply: str = "rep_conv") -> str:
    return "{" + ", ".join([f"part: backbone, match: {match}, apply: {apply}", *more]) + "}"


def one_file(**named: str) -> RuleSet:
    return rules.loads("rules:\n" + "".join(f"  {name}: {text}\n" for name, text in named.items()), "mine.yaml")
