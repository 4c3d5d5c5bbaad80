"""Rule files, YAML → validated rule set: `rules.load(name)`. Pure Python, never sees a tensor.

The language itself is `rule_models`; every complaint about a file is made with the marks of `yaml_marks`.
"""

from repbnn_cli.rules.rule_models import schema, schema_text
from repbnn_cli.rules.rule_set import ModuleRule, Rule, RuleSet, Subject, load, loads, names

__all__ = ["ModuleRule", "Rule", "RuleSet", "Subject", "load", "loads", "names", "schema", "schema_text"]
