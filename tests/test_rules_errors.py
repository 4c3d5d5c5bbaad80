"""What is said about a wrong rule file: one line per problem with file, line, dotted key, found, expected, nearest."""

from __future__ import annotations

from pathlib import Path

import pytest

from repbnn_cli import rules
from repbnn_cli.errors import RulesError
from repbnn_cli.rules.yaml_marks import MAX_CHARACTERS

ROLES = "binary_conv, float_conv, depthwise_conv, binary_linear, float_linear, batch_norm, per_channel, weightless"
SHIPPED = "bn-before-repeat, full-precision, last-layer-1, last-layer-2, last-layer-3, reptran, reptran-released"
VALID = "rules: {a: {part: bypass, match: {role: weightless}, apply: tile}}\n"


def said(text: str) -> list[str]:
    with pytest.raises(RulesError) as error:
        rules.loads(text, "mine.yaml")
    assert error.value.exit_code == 2
    return str(error.value).split("\n")


def said_of(path: str | Path) -> str:
    with pytest.raises(RulesError) as error:
        rules.load(path)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Keys and values


def test_every_problem_gets_its_line() -> None:
    text = """schema: 1
rules:
  backbone:
    part: backbon
    match:
      role:
        - weightless
        - conv
    apply: repconv
    repaet: before_batch_norm
optoins: {beta: 2}
"""
    assert said(text) == [
        "mine.yaml:4 rules.backbone.part: unknown value 'backbon'; expected one of first_layer, backbone, bypass, "
        "last_layer; nearest: backbone",
        f"mine.yaml:8 rules.backbone.match.role[1]: unknown value 'conv'; expected one of {ROLES}; "
        "nearest: float_conv, binary_conv",
        "mine.yaml:9 rules.backbone.apply: unknown value 'repconv'; expected one of repeat_output, rep_conv, tile, "
        "select_inputs, keep; nearest: rep_conv",
        "mine.yaml:10 rules.backbone.repaet: unknown key 'repaet'; expected one of part, match, apply, repeat, share, "
        "align, optional; nearest: repeat, part",
        "mine.yaml:11 optoins: unknown key 'optoins'; expected one of schema, name, summary, extends, remove, options, "
        "rules, modules; nearest: options",
    ]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("options: {beta: true}", "options.beta: found true; expected a whole number"),
        ("options: {beta: 2.0}", "options.beta: found 2.0; expected a whole number"),
        ("options: {beta: '2'}", "options.beta: found '2'; expected a whole number"),
        ("options: {beta: }", "options.beta: found nothing; expected a whole number"),
        ("options: {beta: [2]}", "options.beta: found a list; expected a whole number"),
        ("options: {beta: 0}", "options.beta: found 0; expected at least 1"),
        ("options: {beta: 65537}", "options.beta: found 65537; expected at most 65536"),
        (f"options: {{beta: 0x{'f' * 9000}}}", "options.beta: found a huge number; expected at most 65536"),
        (f"options: {{beta: {'9' * 9000}}}", f"options.beta: '{'9' * 57}...' is not a valid int"),
        ("options: {inherit: ~}", "options.inherit: found nothing; expected one of fold, reshape, none"),
        ("options: 3", "options: found 3; expected a mapping"),
        ("options: []", "options: found a list; expected a mapping"),
        ("modules: {}", "modules: found a mapping; expected a list"),
        ("schema: 2", "schema: found 2; expected 1, the only version of this language"),
        ("schema: true", "schema: found true; expected 1, the only version of this language"),
        ("schema: 1.0", "schema: found 1.0; expected 1, the only version of this language"),
        ("name: ../x", "name: found '../x'; expected text of the form [A-Za-z0-9][A-Za-z0-9 ._-]*"),
        ("summary: null", "summary: found nothing; expected text"),
        ('summary: "a\\nb"', "summary: found 'a\\nb'; expected one line of printable text"),
        ("extends: ''", "extends: found ''; expected text that is not empty"),
        ("remove: reptran", "remove: found 'reptran'; expected a list"),
        ('"a\\nb": 1', "'a\\nb': unknown key 'a\\nb'; expected one of schema, name, summary, extends, remove, options, "
         "rules, modules"),
    ],
)  # fmt: skip
def test_wrong_values(written: str, message: str) -> None:
    assert said(VALID + written) == [f"mine.yaml:2 {message}"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a: {part: bypass, match: {}, apply: tile}", "rules.a.match: found a mapping; expected at least one of "),
        ("a: {part: bypass, match: {role: []}, apply: tile}", "rules.a.match.role: found a list; expected one value"),
        ("a: {part: bypass, match: {rol: conv}, apply: tile}", "rules.a.match.rol: unknown key 'rol'; expected one of"),
        ("a: {part: bypass, match: weightless, apply: tile}", "rules.a.match: found 'weightless'; expected a mapping"),
        ("a: {part: bypass, match: {path: 3}, apply: tile}", "rules.a.match.path: found 3; expected text"),
        ("a: {part: bypass, match: {path: x}, apply: tile, optional: 1}", "rules.a.optional: found 1; expected true"),
        ("a: {part: bypass, match: {path: x}, apply: tile, repeat: before_batch_norm}",
         "rules.a.repeat: has no effect with apply: tile; expected with repeat_output or rep_conv"),
        ("a: {part: bypass, match: {path: x}, apply: rep_conv, share: all}",
         "rules.a.share: has no effect with apply: rep_conv; expected with select_inputs"),
        ("a: {part: bypass, match: {role: [float_conv, batch_norm]}, apply: rep_conv}",
         "rules.a.apply: rep_conv does not fit role batch_norm; expected one of tile, keep"),
        ("a: {match: {path: x}}", "rules.a: has no part, apply; expected part, match and apply, or the name of an "),
        ("a: ", "rules.a: found nothing; expected a mapping"),
        ("A_b: {}", "rules.A_b: found 'A_b'; expected text of the form [a-z0-9-]+"),
        ("1: {}", "rules: found the key 1; expected text (put quotes around it)"),
        ("yes: {}", "rules: found the key yes; expected text (put quotes around it)"),
        ("[a]: {}", "rules: found the key a list or mapping; expected text"),
        ("match: {part: bypass, match: {path: x}, apply: tile, foo: 1}", "rules.match.foo: unknown key 'foo'; expected "
         "one of part, match, apply, repeat, share, align, optional"),
        ("a: {part: bypass, match: {path: x}, apply: rep_conv, align: position}",
         "rules.a.align: has no effect with apply: rep_conv; expected with tile"),
    ],
)  # fmt: skip
def test_wrong_rules(entry: str, message: str) -> None:
    (line,) = said(f"rules:\n  {entry}\n")
    assert line.startswith(f"mine.yaml:2 {message}")


@pytest.mark.parametrize(
    ("entry", "messages"),
    [
        ("{leaf: true}", [": has no 'match'; expected match, role, kernel, kernel_shape, per_channel, attributes, "
                          "weight_bits, activation_bits, leaf, optional"]),
        ("{match: {type: A}}", [": says nothing about its modules; expected a role or a leaf"]),
        ("{match: {type: A}, role: conv}", [f".role: unknown value 'conv'; expected one of {ROLES}; "
                                            "nearest: float_conv, binary_conv"]),
        ("{match: {role: binary_conv}, leaf: true}", [".match.role: unknown key 'role'; expected one of type, path"]),
        ("{match: {type: A}, kernel: w, leaf: true}",
         [".kernel: has no effect without a role; expected `role:` beside it"]),
        ("{match: {type: A}, role: batch_norm, weight_bits: 1}",
         [".weight_bits: has no effect for role batch_norm; expected one of binary_conv, float_conv, depthwise_conv, "
          "binary_linear, float_linear"]),
        ("{match: {type: A}, role: weightless, per_channel: {a: {channels: in, axis: 0}}}",
         [".per_channel: does not go with role weightless; expected role per_channel"]),
        ("{match: {type: A}, role: float_conv, leaf: false}",
         [".leaf: false traces into the module, which then needs no role; drop one"]),
        ("{match: {type: A}, role: per_channel, per_channel: {a: {channels: out}, b: {channels: up, axis: 1.0}, c: 3}}",
         [".per_channel.a: has no 'axis'; expected channels, axis",
          ".per_channel.b.axis: found 1.0; expected a whole number",
          ".per_channel.b.channels: unknown value 'up'; expected one of out, in",
          ".per_channel.c: found 3; expected a mapping"]),
        ("{match: {type: A}, role: binary_conv, kernel_shape: [4, true], attributes: {n: in_channel}, weight_bits: 33}",
         [".attributes.n: unknown value 'in_channel'; expected one of in_channels, out_channels, kernel_shape, fan_in, "
          "numel; nearest: in_channels, out_channels",
          ".kernel_shape[1]: found true; expected a whole number, at least 1, or the name of an attribute that "
          "holds one",
          ".weight_bits: found 33; expected at most 32"]),
        ("{match: {type: A}, role: binary_conv, kernel_shape: [4]}",
         [".kernel_shape: found a list; expected at least two entries, output and input channels"]),
    ],
)  # fmt: skip
def test_wrong_modules(entry: str, messages: list[str]) -> None:
    assert said(f"{VALID}modules:\n  - {entry}\n") == [f"mine.yaml:3 modules[0]{m}" for m in messages]


def test_the_same_match_twice_in_modules() -> None:
    text = VALID + "modules:\n  - {match: {type: A}, leaf: true}\n  - {match: {type: [A]}, leaf: true}\n"
    assert said(text) == ["mine.yaml:4 modules[1]: has the match of line 3 again; join the two"]


def test_duplicate_keys_name_both_lines() -> None:
    text = VALID + "options:\n  beta: 2\n\n  beta: 4\nrules: {}\n"
    assert said(text) == [
        "mine.yaml:5 options.beta: written twice, first at line 3; keep one",
        "mine.yaml:6 rules: written twice, first at line 1; keep one",
    ]


@pytest.mark.parametrize("text", ["options: {beta: 2}", "rules: {}", "modules: []"])
def test_a_file_without_rules(text: str) -> None:
    assert said(text) == ["mine.yaml:1: has no rules; expected `rules:` with some, or `extends: reptran`"]


# ---------------------------------------------------------------------------------------------------------------------
# Extending


def test_a_misspelt_inherited_rule() -> None:
    assert said("extends: reptran\nrules:\n  fist-layer: {repeat: after_batch_norm}\n") == [
        "mine.yaml:3 rules.fist-layer: has no part, match, apply; expected part, match and apply, or the name of an "
        "inherited rule; nearest: first-layer, last-layer"
    ]
    (line,) = said("extends: reptran\nremove:\n  - first-layr\n")
    assert line.startswith(
        "mine.yaml:3 remove[0]: no inherited rule is called 'first-layr'; expected one of first-layer"
    )
    assert line.endswith("; nearest: first-layer, last-layer")
    assert said(VALID + "remove: [a]") == [
        "mine.yaml:2 remove[0]: no inherited rule is called 'a'; nothing is inherited here"
    ]


def test_a_problem_is_reported_where_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("rules:\n  a: {part: bypass, match: {path: x}, apply: rep_conv}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nrules:\n  a: {match: {role: batch_norm}}\n")
    assert said_of("mine.yaml").startswith("mine.yaml:3 rules.a.apply: rep_conv does not fit role batch_norm")
    (tmp_path / "base.yaml").write_text("rules:\n  a: {part: bypas, match: {path: x}, apply: rep_conv}\n")
    assert said_of("mine.yaml").startswith("base.yaml:2 rules.a.part: unknown value 'bypas'")


def test_an_entry_is_called_as_in_the_file_with_the_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entry = "  - match: {type: %s}\n    role: per_channel\n    optional: true\n"
    (tmp_path / "base.yaml").write_text("extends: reptran\nmodules:\n" + entry % "Own")
    mine = "extends: ./base.yaml\nmodules:\n" + entry % "Other" + "  - match: {type: Own}\n    kernel: w\n"
    (tmp_path / "mine.yaml").write_text(mine)
    assert said_of("mine.yaml").startswith("mine.yaml:7 modules[1].kernel: has no effect for role per_channel")


def test_extending_nothing_and_in_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said("extends: reptan") == [
        f"mine.yaml:1 extends: reptan: no such rule file comes with repbnn; expected one of {SHIPPED}; "
        "nearest: reptran, reptran-released"
    ]
    (tmp_path / "a.yaml").write_text("# one\nextends: b.yaml\n")
    assert said_of("a.yaml") == (f"a.yaml:2 extends: b.yaml: no such rule file; expected a path or one of {SHIPPED}")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml\n")
    assert said_of("a.yaml") == (
        "b.yaml:1 extends: goes in a circle (a.yaml → b.yaml → a.yaml); one of them must not extend"
    )
    (tmp_path / "a.yaml").write_text("extends: a.yaml\n")
    assert said_of("a.yaml") == ("a.yaml:1 extends: goes in a circle (a.yaml → a.yaml); one of them must not extend")


# ---------------------------------------------------------------------------------------------------------------------
# Texts that are no rule files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.yaml:1: is empty; expected a mapping, for example `extends: reptran`"),
        ("# nothing\n", "mine.yaml:1: is empty; expected a mapping, for example `extends: reptran`"),
        ("\n- a\n", "mine.yaml:2: found a list; expected a mapping"),
        ("reptran", "mine.yaml:1: found 'reptran'; expected a mapping"),
        ("rules:\n\ta: 1", "mine.yaml:2: not valid YAML: while scanning for the next token, found character '\\t' that "
         "cannot start any token; indent with spaces, not with tabs"),
        ("rules: [\n", "mine.yaml:2: not valid YAML: while parsing a flow node, expected the node content, but found "
         "'<stream end>'"),
        ("a: b: c", "mine.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n--- \nb: 1", "mine.yaml:2: not valid YAML: expected a single document in the stream, but found another "
         "document"),
        ("a: 1\nb: \x07", "mine.yaml:2: holds the character 0x07; expected a YAML text file"),
        ('a: "\\UFFFFFFFF"', "mine.yaml: not valid YAML: Python int too large to convert to C int"),
        ("[" * 100_000, "mine.yaml: nested too deeply; expected a YAML file"),
        ("a" * (MAX_CHARACTERS + 1), "mine.yaml: longer than 256 KiB; expected a YAML file"),
    ],
)  # fmt: skip
def test_not_a_rule_file(text: str, message: str) -> None:
    assert said(text) == [message]


def test_aliases_that_explode_or_bite_their_tail() -> None:
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcd", "bcde", strict=True))
    assert said(text) == ["mine.yaml:1: its aliases expand to more than 20000 values; write fewer"]
    assert "mine.yaml:2 options.beta[0]: the alias refers to what it stands in (line 2); write it out" in said(
        VALID + "options: {beta: &b [*b]}"
    )
    assert "mine.yaml:2 options.<<: expected the alias of another mapping" in said(VALID + "options: &b {<<: *b}")
    assert said(VALID + "<<: 3") == ["mine.yaml:2 <<: expected the alias of another mapping"]


def test_tags_are_refused_and_never_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.mkdir", "!mine"):
        (line,) = said(f"{VALID}options: {{beta: {tag} ['mkdir {made}']}}")
        assert line.startswith("mine.yaml:2 options.beta: the tag '")
        assert line.endswith("is not allowed; expected a plain value")
    assert not made.exists()


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said_of("reptrain") == (
        f"reptrain: no such rule file; expected a path or one of {SHIPPED}; nearest: reptran, reptran-released"
    )
    assert said_of("lab/full_precision.yaml").endswith("; nearest: full-precision")
    (tmp_path / "folder.yaml").mkdir()
    assert said_of("folder.yaml").startswith("folder.yaml: cannot be read (Is a directory); expected a path or one of")
    assert said_of("a\0b").startswith("'a\\x00b': cannot be read (embedded null byte)")
    assert said_of("a\nb").startswith("'a\\nb': no such rule file")
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert said_of("image.yaml") == "image.yaml: is not UTF-8 text (byte 0); expected a YAML rule file"
    (tmp_path / "big.yaml").write_text("#" * (MAX_CHARACTERS + 1))
    assert said_of("big.yaml") == "big.yaml: longer than 256 KiB; expected a rule file"


def test_a_file_with_a_byte_order_mark_and_windows_lines_is_fine(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + b"extends: reptran\r\noptions: {beta: 4}\r\n")
    assert rules.load(tmp_path / "mine.yaml").options.beta == 4
