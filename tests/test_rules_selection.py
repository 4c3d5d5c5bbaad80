"""Which rule claims which module: one test per edge of the precedence, and the declarations of the user's modules."""

from __future__ import annotations

import pytest
from rule_examples import NETWORK, claims, one_file, rule, subject

from repbnn_cli import rules
from repbnn_cli.errors import RulesError


def test_path_beats_type_beats_role_and_position() -> None:
    role_and_position = rule("{role: binary_conv, position: trunk}")
    by_type, by_path = rule("{type: BinConv}"), rule("{path: layer1.*.conv1}")
    network = (NETWORK[2],)
    assert claims(one_file(a=role_and_position, b=by_type, c=by_path), network) == {"layer1.0.conv1": "c"}
    assert claims(one_file(c=by_path, b=by_type, a=role_and_position), network) == {"layer1.0.conv1": "c"}
    assert claims(one_file(a=role_and_position, b=by_type), network) == {"layer1.0.conv1": "b"}
    assert claims(one_file(a=role_and_position), network) == {"layer1.0.conv1": "a"}


def test_specificity_goes_before_optional() -> None:
    firm, optional = rule("{role: binary_conv}"), rule("{type: BinConv}", "optional: true")
    assert claims(one_file(a=firm, b=optional), (NETWORK[2],)) == {"layer1.0.conv1": "b"}


def test_at_the_same_level_the_optional_one_yields() -> None:
    a, b = rule("{role: binary_conv}", "optional: true"), rule("{position: trunk}")
    assert claims(one_file(a=a, b=b), (NETWORK[2],)) == {"layer1.0.conv1": "b"}
    assert claims(one_file(b=b, a=a), (NETWORK[2],)) == {"layer1.0.conv1": "b"}


@pytest.mark.parametrize("more", [[], ["optional: true"]])
def test_two_rules_of_the_same_level_are_a_conflict(more: list[str]) -> None:
    both = one_file(a=rule("{role: binary_conv}", *more), b=rule("{position: trunk}", *more))
    with pytest.raises(RulesError) as error:
        both.assign((NETWORK[2], subject("other", "binary_conv", "trunk")))
    assert str(error.value) == (
        "mine.yaml:2 rules.a and mine.yaml:3 rules.b: both claim layer1.0.conv1 (and 1 more) and neither is more "
        "specific (path over type over role and position); mark one of them `optional: true`, or narrow it"
    )


def test_type_globs_see_base_classes_and_dotted_paths_and_case() -> None:
    network = (NETWORK[2],)
    for glob in ("BinConv", "Conv2d", "torch.nn.*", "Bin*", "nets.Bin?onv", "[BC]inConv"):
        assert claims(one_file(a=rule(f"{{type: '{glob}'}}")), network), glob
    for glob in ("binconv", "Conv", "nn.Conv2d"):
        assert not claims(one_file(a=rule(f"{{type: '{glob}'}}", "optional: true")), network), glob


def test_keys_are_anded_and_values_ored() -> None:
    chosen = one_file(a=rule("{role: [float_conv, binary_conv], position: [trunk, bypass], path: [layer1.*, fc]}"))
    assert set(claims(chosen)) == {"layer1.0.conv1", "layer1.0.down"}


def test_a_star_crosses_dots() -> None:
    assert set(claims(one_file(a=rule("{path: 'layer1*'}", apply="keep")))) == {
        s.path for s in NETWORK if s.path.startswith("layer1")
    }


def test_subjects_that_no_rule_covers_are_absent() -> None:
    assert claims(one_file(a=rule("{path: conv1}"))) == {"conv1": "a"}


def test_a_rule_that_matches_and_claims_nothing_is_fine() -> None:
    assert claims(one_file(a=rule("{role: float_linear}"), b=rule("{path: fc}"))) == {"fc": "b"}


@pytest.mark.parametrize(
    ("match", "why"),
    [
        (
            "{role: depthwise_conv}",
            "no module has the role depthwise_conv; roles here: float_conv (2), batch_norm (2), ",
        ),
        ("{position: [last]}", "no module has the position last; positions here: first (1), trunk (1), bypass (1)"),
        ("{path: layr1.0.conv1}", "no module has the path 'layr1.0.conv1'; nearest: layer1.0.conv1"),
        ("{path: zzz}", "no module has the path 'zzz'; paths here: conv1, bn1, layer1.0.conv1"),
        ("{type: BinConv2d}", "no module has the type 'BinConv2d'; nearest: BinConv, "),
        ("{role: binary_conv, position: first}", "each of its keys matches some module, no module matches all of them"),
    ],
)
def test_a_rule_that_matches_nothing_says_what_would_match(match: str, why: str) -> None:
    network = NETWORK[:-1]
    with pytest.raises(RulesError) as error:
        one_file(a=rule(match)).assign(network)
    message = str(error.value)
    assert message.startswith(f"mine.yaml:2 rules.a.match: matches no module; {why}")
    assert message.endswith("; change it, or mark the rule `optional: true`")
    assert one_file(a=rule(match, "optional: true")).assign(network) == {}


def test_an_action_that_does_not_fit_the_role_is_an_error() -> None:
    with pytest.raises(RulesError) as error:
        one_file(a=rule("{path: 'layer1.0*'}")).assign(NETWORK)
    assert str(error.value).splitlines() == [
        "mine.yaml:2 rules.a.apply: rep_conv does not fit layer1.0.bn1, role batch_norm; expected one of tile, keep",
        "mine.yaml:2 rules.a.apply: rep_conv does not fit layer1.0.act, role per_channel; expected one of tile, keep",
        "mine.yaml:2 rules.a.apply: rep_conv does not fit layer1.0:add, role weightless; expected one of tile, "
        "select_inputs, keep",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# modules


DECLARED = """extends: reptran
modules:
  - {match: {type: Bin*}, role: binary_conv, kernel: w, per_channel: {alpha: {channels: out, axis: 0}}}
  - {match: {path: head}, leaf: false}
  - {match: {type: Sign}, role: weightless, optional: true}
"""


def test_declarations_and_their_precedence() -> None:
    mine = rules.loads(DECLARED, "mine.yaml")
    declared = mine.declare("head", ("BinConv",))
    assert declared is not None
    assert declared.leaf is False  # path over type
    declared = mine.declare("x", ("BinConv", "Conv2d"))
    assert declared is not None
    assert declared.where == "mine.yaml:3"
    assert declared.per_channel["alpha"].axis == 0
    assert declared.attributes == {}
    assert mine.declare("x", ("Conv2d",)) is None


def test_declarations_conflict_as_rules_do() -> None:
    text = DECLARED + "  - {match: {type: '*Conv'}, leaf: true}\n"
    with pytest.raises(RulesError, match=r"^mine.yaml:3 modules and mine.yaml:6 modules: both claim x and neither"):
        rules.loads(text, "mine.yaml").declare("x", ("BinConv",))
    yielding = rules.loads(text.replace("leaf: true", "leaf: true, optional: true"), "mine.yaml")
    assert yielding.declare("x", ("BinConv",)) == yielding.modules[0]


def test_a_declaration_that_matches_nothing_is_an_error() -> None:
    mine = rules.loads(DECLARED, "mine.yaml")
    known = [("layer1", ("BiConv", "nets.BiConv")), ("head", ("Linear",))]
    with pytest.raises(RulesError) as error:
        mine.check_declared({mine.modules[1]}, known)
    assert str(error.value) == (
        "mine.yaml:3 modules.match: matches no module; no module has the type 'Bin*'; nearest: BiConv; "
        "change it, or mark the entry `optional: true`"
    )
    mine.check_declared(set(mine.modules[:2]))
    mine.check_declared((), [*known, ("x", ("BinConv",))])  # matched, though another entry may have claimed it
