"""The command line as a user meets it: exit codes, one-line errors, streams, JSON, and what is left on disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import repbnn_cli
from repbnn_cli import source, views
from repbnn_cli.cli import app, run
from repbnn_cli.plan import PlanRow

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "irnet_resnet20_cifar10.pth"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the sample checkpoint in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt.pth").write_bytes(CHECKPOINT.read_bytes())
    return tmp_path


@pytest.fixture
def transformed(here: Path) -> Path:
    assert run(["transform", "ckpt.pth"]) == 0
    return here / "checkpoints" / "ckpt-rep2.repbnn.pt"


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error line."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_no_folder_for_results_is_said_before_any_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "from_checkpoint", lambda *_, **__: pytest.fail("worked"))
    Path("checkpoints").write_text("a file")
    assert run(["transform", "ckpt.pth"]) == 2
    assert "checkpoints: is no folder, as results want it; move it, or name the result with -o" in error_of(capsys)


def test_words_between_colons_stay_words(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("ckpt.pth").rename("a:cat:b.pth")
    assert run(["inspect", "a:cat:b.pth"]) == 0
    assert "a:cat:b.pth" in capsys.readouterr().out


def test_a_result_of_fresh_weights_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transform", "irnet_resnet20", "-o", "fresh.repbnn.pt", "--verify", "quick"]) == 0
    capsys.readouterr()
    assert run(["inspect", "fresh.repbnn.pt"]) == 0
    assert "a network of the zoo with fresh weights" in " ".join(capsys.readouterr().out.split())


# -- the three commands of the main job ------------------------------------------------------------------


def test_main_job_end_to_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transform", "ckpt.pth", "--beta", "2"]) == 0
    shown = capsys.readouterr()
    assert "irnet_resnet20 → RepBNN, β = 2" in shown.out
    assert "merged-kernel identity" in shown.out
    assert "FAILED" not in shown.out
    assert "wrote checkpoints/ckpt-rep2.repbnn.pt" in shown.err
    assert run(["profile"]) == 0
    shown = capsys.readouterr()
    assert re.search(r"OPs without BN\s+1,069,696\s+1,070,336\s+\+640", shown.out)
    assert "newest result: checkpoints/ckpt-rep2.repbnn.pt" in shown.err
    assert run(["report", "--markdown", "--no-timestamp"]) == 0
    report = capsys.readouterr().out
    for wanted in ("merged-kernel identity", "62.35", "87.59", "1,070,336", "`reptran`"):
        assert wanted in report


def test_tables_fit_80_columns(transformed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("profile --layers", "profile --depth 1", "zoo", "rules list", "inspect ckpt.pth",
                 "transform ckpt.pth --dry-run", "rules check reptran"):  # fmt: skip
        command = text.split()
        assert run(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80, command


def test_load_gives_the_ready_network(transformed: Path) -> None:
    network = repbnn_cli.load(transformed)
    assert not network.training
    with torch.no_grad():
        assert network(torch.randn(3, 3, 32, 32)).shape == (3, 10)
    assert torch.load(transformed, weights_only=True)["format"] == "repbnn"


@pytest.mark.parametrize(("way", "ops"), [("all", 1070336), ("1_over_beta", 1069696), ("1_over_beta2", 1069376)])
def test_table_2_through_the_command_line(here: Path, capsys: pytest.CaptureFixture[str], way: str, ops: int) -> None:
    assert run(["transform", "ckpt.pth", "--last-layer", way, "-o", "r.repbnn.pt"]) == 0
    capsys.readouterr()
    assert run(["profile", "r.repbnn.pt", "--json"]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert totals["ops_without_bn"]["before"] == 1069696
    assert totals["ops_without_bn"]["after"] == ops


def test_same_input_same_bytes(here: Path) -> None:
    assert run(["transform", "ckpt.pth", "-o", "a.repbnn.pt"]) == 0
    assert run(["transform", "ckpt.pth", "-o", "b.repbnn.pt"]) == 0
    assert Path("a.repbnn.pt").read_bytes() == Path("b.repbnn.pt").read_bytes()
    for name in ("a", "b"):
        assert run(["report", f"{name}.repbnn.pt", "--no-timestamp", "-o", f"{name}.md"]) == 0
    text = Path("a.md").read_text().replace("a.repbnn", "b.repbnn").replace("a-plots", "b-plots")
    assert text == Path("b.md").read_text()
    for drawing in Path("a-plots").iterdir():
        assert drawing.read_bytes() == (Path("b-plots") / drawing.name).read_bytes()


def test_slim_leaves_the_source_out_and_still_loads(here: Path) -> None:
    assert run(["transform", "ckpt.pth", "-o", "full.repbnn.pt"]) == 0
    assert run(["transform", "ckpt.pth", "-o", "slim.repbnn.pt", "--slim"]) == 0
    assert Path("slim.repbnn.pt").stat().st_size < 0.6 * Path("full.repbnn.pt").stat().st_size
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(repbnn_cli.load("slim.repbnn.pt")(x), repbnn_cli.load("full.repbnn.pt")(x))


def test_safetensors_on_request(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transform", "ckpt.pth", "-o", "r.repbnn.safetensors"]) == 0
    capsys.readouterr()
    assert run(["profile", "r.repbnn.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["ops_without_bn"]["after"] == 1070336


def test_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transform", "ckpt.pth", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {row["part"] for row in plan["plan"]} == {"first_layer", "backbone", "last_layer"}
    assert sorted(p.name for p in here.iterdir()) == ["ckpt.pth"]
    assert run(["transform", "ckpt.pth", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == plan["plan"]


# -- JSON and streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "ckpt.pth"],
        ["profile"],
        ["profile", "irnet_resnet20"],
        ["report"],
        ["rules", "list"],
        ["rules", "check", "reptran"],
        ["zoo"],
    ],
)
def test_json_is_all_there_is_on_stdout(
    transformed: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    capsys.readouterr()
    assert run([*command, "--json"]) == 0
    json.loads(capsys.readouterr().out)


# -- bad input -------------------------------------------------------------------------------------------

BAD = [
    (["transform", "nowhere.pt"], 3, r"nowhere\.pt: "),
    (["transform", "empty.pt"], 3, r"empty\.pt: .*empty"),
    (["transform", "cut.pt"], 3, r"cut\.pt: "),
    (["transform", "photo.pt"], 3, r"photo\.pt: .*JPEG"),
    (["transform", "nan.pt"], 3, r"nan\.pt: .*conv1\.weight"),
    (["transform", "other.pt"], 3, r"other\.pt: .*"),
    (["transform", "ckpt.pth", "--arch", "irnet_resnet21"], 2, r"irnet_resnet21.*irnet_resnet20"),
    (
        ["transform", "ckpt.pth", "--beta", "3"],
        2,
        r"layer1\.0\.conv1: beta 3 does not divide .* possible here: 1, 2, 4, 8, 16",
    ),
    (["transform", "ckpt.pth", "--beta", "0"], 2, r"beta"),
    (["transform", "ckpt.pth", "--beta", "x"], 2, r"beta"),
    (["transform", "ckpt.pth", "--inherit", "folded"], 2, r"inherit.*fold"),
    (["transform", "ckpt.pth", "--last-layer", "half"], 2, r"last_layer.*1_over_beta"),
    (["transform", "ckpt.pth", "--rules", "reptrn"], 2, r"reptrn.*reptran"),
    (["transform", "ckpt.pth", "--rules", "broken.yaml"], 2, r"broken\.yaml:\d+"),
    (["transform", "ckpt.pth", "--verify", "twice"], 2, r"--verify twice"),
    (["transform", "ckpt.pth", "-o", "no/such/file.pt"], 2, r"no/such"),
    (["report", "ckpt.pth", "-o", "no/such/file.md"], 2, r"no/such"),
    (["transform", "ckpt.pth", "--model", "net.py:make"], 2, r"net\.py"),
    (["transform", "ckpt.pth", "--model", "ckpt.pth"], 2, r"callable"),
    (["transform", "ckpt.pth", "--input-size", "32"], 3, r""),
    (["transform", "ckpt.pth", "--input-size", "3xx"], 2, r"--input-size 3xx: expected"),
    (["transform", "ckpt.pth", "--input-size", "3,32,32"], 2, r"for one input of 3 channels write 3x32x32"),
    (["finetune", "out/nope.pt", "--data", "digits"], 3, r"out/nope\.pt: no such file"),
    (["evaluate", "nope.pth", "--data", "digits"], 3, r"nope\.pth: no such file"),
    (["calibrate", "nope.pt"], 3, r"nope\.pt: no such file"),
    (["evaluate", "irnet_resnet"], 2, r"unknown network 'irnet_resnet'.*irnet_resnet20"),
    (["transform", "ckpt.pth", "--model-args", "{", "--model", "net.py:f"], 2, r"--model-args: not JSON"),
    (["profile", "irnet_resnet"], 2, r"unknown network 'irnet_resnet'.*irnet_resnet20"),
    (["profile", "missing.pt"], 3, r"missing\.pt: no such file"),
    (["profile"], 2, r"checkpoints/: holds no result"),
    (["report"], 2, r"checkpoints/: holds no result"),
    (["report", "ckpt.pth"], 3, r"ckpt\.pth: is not a result"),
    (["profile", "irnet_resnet20", "--json", "--csv"], 2, r"give one of them"),
    (["profile", "irnet_resnet20", "--depth", "0"], 2, r"--depth 0"),
    (["profile", "irnet_resnet20", "--sort", "size"], 2, r"--sort size"),
    (["rules", "show", "nothing"], 2, r"nothing"),
    (["nonsense"], 2, r"nonsense"),
    (["transform"], 2, r"(?i)missing.*checkpoint"),
]


@pytest.fixture
def bad_files(here: Path) -> Path:
    (here / "empty.pt").touch()
    (here / "cut.pt").write_bytes(CHECKPOINT.read_bytes()[:5000])
    (here / "photo.pt").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(300))
    state = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    torch.save({k: v * torch.nan if k.endswith("conv1.weight") else v for k, v in state.items()}, here / "nan.pt")
    torch.save({"fc.weight": torch.ones(3, 4)}, here / "other.pt")
    (here / "broken.yaml").write_text("extends: reptran\nrules:\n  backbone-binary-conv:\n    apply: rep_convv\n")
    return here


@pytest.mark.parametrize(("command", "code", "pattern"), BAD, ids=[" ".join(c[:4]) for c, _, _ in BAD])
def test_bad_input_is_one_line_and_the_right_code(
    bad_files: Path, capsys: pytest.CaptureFixture[str], command: list[str], code: int, pattern: str
) -> None:
    before = sorted(p.name for p in bad_files.rglob("*") if p.is_file())
    assert run(command) == code
    assert re.search(pattern, error_of(capsys))
    assert sorted(p.name for p in bad_files.rglob("*") if p.is_file()) == before


def test_compare_tells_files_of_one_name_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transform", "ckpt.pth", "-o", "rep.pt"]) == 0
    (here / "out").mkdir()
    (here / "out" / "ckpt.pth").write_bytes((here / "rep.pt").read_bytes())
    capsys.readouterr()
    assert run(["compare", "ckpt.pth", "out/ckpt.pth", "out/../rep.pt", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["networks"]
    assert [row["target"] for row in rows] == ["ckpt.pth", "out/ckpt.pth", "rep.pt"]


def test_existing_output_is_kept_without_force(transformed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = transformed.read_bytes()
    capsys.readouterr()
    assert run(["transform", "ckpt.pth"]) == 2
    assert "--force" in error_of(capsys)
    assert transformed.read_bytes() == before
    assert run(["transform", "ckpt.pth", "--force"]) == 0


def test_full_disk_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    assert run(["transform", "ckpt.pth", "-o", "/dev/full"]) == 1
    assert "/dev/full" in capsys.readouterr().err


def test_a_result_is_not_transformed_again(transformed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["transform", str(transformed), "-o", "again.repbnn.pt"]) == 2
    assert "is a result of `repbnn transform` already" in error_of(capsys)


def test_half_precision_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, "half.pt")
    assert run(["transform", "half.pt"]) == 0
    assert "its weights in float16 were taken in the network's own precision" in capsys.readouterr().err
    assert next(repbnn_cli.load("checkpoints/half-rep2.repbnn.pt").parameters()).dtype == torch.float32


def test_malicious_checkpoint_runs_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch owned",)

    torch.save({"state_dict": Payload()}, "evil.pt")
    for command in ("transform", "inspect", "profile"):
        assert run([command, "evil.pt"]) == 3
        message = error_of(capsys)
        assert "system" in message
        assert "--unsafe-load" in message
    assert not Path("owned").exists()


def test_debug_shows_the_traceback(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transform", "nowhere.pt", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_exits_130(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from repbnn_cli.commands import costs

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(costs, "zoo", interrupted)
    assert run(["zoo"]) == 130


def test_failed_check_exits_4_and_writes_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from repbnn_cli import surgery

    original = surgery.apply

    def wrong(*args: object, **kwargs: object) -> torch.nn.Module:
        made = original(*args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            made.get_submodule("layer2.0.bn1").weight[3] += 1
        return made

    monkeypatch.setattr(surgery, "apply", wrong)
    assert run(["transform", "ckpt.pth"]) == 4
    shown = capsys.readouterr()
    assert "layer2.0.bn1" in shown.out
    assert "nothing was written" in shown.err
    assert not list(here.glob("checkpoints/*"))


# -- the user's own network ------------------------------------------------------------------------------

NET = """
import torch, torch.nn as nn, torch.nn.functional as F

class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1)

class BinConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        scale = w.abs().mean((1, 2, 3), keepdim=True).detach()
        return F.conv2d(Sign.apply(x), Sign.apply(w) * scale, self.bias, self.stride, self.padding)

class Net(nn.Module):
    def __init__(self, width=8, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(width)
        self.conv = BinConv(width, width, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)
    def forward(self, x):
        x = self.bn0(self.stem(x))
        x = F.hardtanh(self.bn1(self.conv(x)) + x)
        return self.fc(F.avg_pool2d(x, x.size(2)).view(x.size(0), -1))
"""


@pytest.fixture
def own_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (here / "net.py").write_text(NET)
    monkeypatch.syspath_prepend(str(here))
    code = "import torch, net; torch.manual_seed(0); torch.save(net.Net(num_classes=5).state_dict(), 'own.pt')"
    subprocess.run([sys.executable, "-c", code], cwd=here, check=True)
    return here


def test_own_network_without_a_rule_file(own_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "net.py:Net", "--model-args", '{"num_classes": 5}', "--input-size", "3x16x16"]
    assert run(["transform", "own.pt", *options]) == 0
    shown = capsys.readouterr().out
    assert "binary → RepBconv" in shown
    assert "captured learns as source" in shown
    result = "checkpoints/own-rep2.repbnn.pt"
    assert run(["profile", result]) == 2
    assert "--model net.py:Net" in error_of(capsys)
    assert run(["profile", result, "--model", "net.py:Net", "--json"]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert totals["bops"] == {**totals["bops"], "before": 8 * 8 * 9 * 256, "after": 8 * 8 * 9 * 256}
    assert run(["report", result, "--model", "net.py:Net"]) == 0


def test_own_network_from_scratch(own_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It starts as its own code starts it, and that code has to start something."""
    (own_network / "start.py").write_text(
        "import torch, net\n"
        "def make():\n"
        "    made = net.Net(num_classes=5)\n"
        "    torch.nn.init.normal_(made.conv.weight, std=3.0)\n"
        "    torch.nn.init.constant_(made.bn1.weight, 0.25)\n"
        "    return made\n"
        "def trained():\n"
        "    made = make()\n"
        "    made.load_state_dict(torch.load('own.pt'))\n"
        "    return made\n"
    )
    options = ["--input-size", "3x16x16", "--inherit", "none", "--model"]
    assert run(["transform", "own.pt", *options, "start.py:make", "-o", "rep.pt"]) == 0
    tensors = torch.load("rep.pt", weights_only=True)["tensors"]
    assert float(tensors["conv.weight"].std()) == pytest.approx(3 / 2**0.5, rel=0.1)
    assert tensors["bn1.weight"].eq(0.25).all()
    capsys.readouterr()
    assert run(["transform", "own.pt", *options, "start.py:trained", "-o", "no.pt"]) == 2
    assert "start.py:trained gives conv.weight the same values whatever the seed" in error_of(capsys)
    assert not Path("no.pt").exists()


# -- help and documentation ------------------------------------------------------------------------------


def test_help_is_fast_and_imports_no_torch() -> None:
    code = "import sys; from repbnn_cli.cli import run; run(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", [[], ["rules"], ["export"], ["recipes"]])
def test_a_group_without_a_command_shows_its_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command) == 2
    without = capsys.readouterr().err
    assert run([*command, "--help"]) == 0
    assert without.split() == capsys.readouterr().out.split()
    assert without.count("\n") > 8


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    groups = [g.name for g in app.registered_groups]
    commands = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]  # type: ignore[union-attr]
    assert commands
    for name in (*groups, *commands):
        assert f"repbnn {name}" in readme, name


def test_a_plan_s_ranges_go_from_the_smallest_to_the_largest() -> None:
    def row(before: str, role: str) -> PlanRow:
        return PlanRow("backbone", "m", role, "rep_conv", "rule", "file:1", before, before, ())

    rows = [row(f"({n})", "binary_linear") for n in (48, 24, 96, 48)] + [row("(16, 16, 3, 3)", "binary_conv")] * 2
    given = views.plan_table(rows)
    assert [list(column.cells) for column in given.columns][1:4] == [
        ["binary linear → RepBconv", "binary → RepBconv"], ["4", "2"], ["24 … 96", "16×16×3×3"],
    ]  # fmt: skip
