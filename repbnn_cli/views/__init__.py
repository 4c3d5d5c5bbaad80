"""Everything that a command prints on a terminal, from values alone; measures nothing."""

from repbnn_cli.views.networks import (
    certificate_table,
    console,
    facts,
    json_text,
    left_out_lines,
    own_code,
    plan_details,
    plan_table,
    print_json,
    print_text,
    rendered,
    rule_places,
    say,
    table,
)

__all__ = [
    "certificate_table",
    "console",
    "facts",
    "json_text",
    "left_out_lines",
    "own_code",
    "plan_details",
    "plan_table",
    "print_json",
    "print_text",
    "rendered",
    "rule_places",
    "say",
    "table",
]
