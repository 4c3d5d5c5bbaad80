"""What `repbnn report` writes: links that resolve, the same bytes every time, all or nothing; and Markdown as read."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from repbnn_cli import report
from repbnn_cli.cli import run
from repbnn_cli.number_text import code, markdown_table, safe
from repbnn_cli.report.document import Document, Folded, Listing, Section

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "irnet_resnet20_cifar10.pth"
GITHUB = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@pytest.fixture(scope="module")
def rep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result, and two images beside it."""
    here = tmp_path_factory.mktemp("rep")
    assert run(["transform", str(CHECKPOINT), "-o", str(here / "rep.repbnn.pt")]) == 0
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(here / f"{i}.png")
    return here / "rep.repbnn.pt"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def images_of(text: str) -> list[tuple[str, str]]:
    """(target, alternative text) of every image that a reader of the Markdown shows."""
    found = []
    for token in GITHUB.parse(text):
        for child in token.children or ():
            if child.type == "image":
                found.append((unquote(str(child.attrs["src"])), child.content))
    return found


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Links and files


@pytest.mark.parametrize(
    ("output", "options", "folder"),
    [
        ("REPORT.md", [], "REPORT-plots"),
        ("docs (1)/our net.md", [], "docs (1)/our net-plots"),
        ("docs (1)/r.md", ["--plots", "figures [a]"], "figures [a]"),
        ("r.md", ["--plots", "."], "."),
    ],
)
def test_links_lead_to_the_drawings(rep: Path, here: Path, output: str, options: list[str], folder: str) -> None:
    (here / "docs (1)").mkdir()
    pictures = [str(rep.parent / f"{i}.png") for i in range(2)]
    given_images = [option for picture in pictures for option in ("--images", picture)]
    assert run(["report", str(rep), "--markdown", "-o", output, *options, *given_images]) == 0
    linked = images_of(Path(output).read_text())
    assert len(linked) == len(dict(linked)) == 11
    for target, words in linked:
        file = Path(output).parent / target
        assert not target.startswith("/")
        assert len(words) > 40
        if target.endswith(".svg"):
            assert ElementTree.fromstring(file.read_text()).tag.endswith("}svg")
        else:
            assert Image.open(file).size[0] > 200
    there = {p.name for p in Path(folder).iterdir() if p.is_file()} - {Path(output).name}
    assert there == {Path(target).name for target, _ in linked}
    assert {n for n in there if n.endswith(".png")} == {"maps-1.png", "maps-2.png"}
    assert {"ops.svg", "sizes.svg", "layers.svg", "landscape.svg", "network.svg", "weights.svg"} <= there


def test_what_goes_to_the_terminal_has_drawings_only_where_a_folder_is_named(
    rep: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(rep)]) == 0
    assert images_of(capsys.readouterr().out) == []
    assert list(here.iterdir()) == []
    assert run(["report", str(rep), "--plots", "figures"]) == 0
    linked = images_of(capsys.readouterr().out)
    assert {Path(target) for target, _ in linked} == set(Path("figures").iterdir())


@pytest.mark.parametrize("kind", ["--markdown", "--html", "--json"])
def test_the_same_bytes_every_time_and_a_date_when_asked(rep: Path, here: Path, kind: str) -> None:
    for name in ("a", "b", "dated"):
        (here / name).mkdir()
        os.chdir(here / name)
        assert run(["report", str(rep), kind, "-o", "report", *(["--timestamp"] if name == "dated" else [])]) == 0
    first, second, dated = (written(here / name) for name in ("a", "b", "dated"))
    assert first == second
    assert {n: t for n, t in dated.items() if n != "report"} == {n: t for n, t in first.items() if n != "report"}
    moment = re.findall(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", dated["report"])
    assert len(moment) == 1
    assert not re.search(rb"\d{4}-\d\d-\d\dT\d\d:", first["report"])
    without = re.sub(rb"\| made \|.*\n|<tr><th scope=\"row\">made</th>.*?</tr>", b"", dated["report"])
    without = without.replace(b'"timestamp": "%s"' % moment[0], b'"timestamp": null')
    assert without == first["report"]
    assert str(here).encode() not in first["report"]


# ---------------------------------------------------------------------------------------------------------------------
# All or nothing


def test_a_place_that_cannot_be_written_gets_nothing(
    rep: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("mine")
    (here / "taken").mkdir()
    (here / "taken" / "sizes.svg").write_text("mine")
    (here / "folders").mkdir()
    (here / "folders" / "weights.svg").mkdir()
    before = written(here)
    for options, said in (
        (["-o", "no/r.md"], "no/r.md: the folder no does not exist"),
        (["-o", "file/r.md"], "file/r.md"),
        (["-o", "taken"], "taken: is a folder"),
        (["-o", "file"], "file: exists already"),
        (["-o", "r.md", "--plots", "file"], "file: is no folder, as drawings want it; --plots names another"),
        (["-o", "r.md", "--plots", "no/plots"], "no/plots: the folder no does not exist; create it first"),
        (["-o", "r.md", "--plots", "taken"], "taken/sizes.svg: exists already"),
        (["-o", "r.md", "--plots", "folders", "--force"], "folders/weights.svg: is a folder"),
    ):
        assert run(["report", str(rep), *options]) == 2, options
        assert said in error_of(capsys)
        assert written(here) == before, options
    (here / "locked").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: "locked" not in str(p) and real(p, mode))  # root may write all
    for options in (["-o", "locked/r.md"], ["-o", "r.md", "--plots", "locked"], ["--html", "-o", "locked/r.html"]):
        assert run(["report", str(rep), *options]) == 2
        assert "the folder locked is not writable" in error_of(capsys)
        assert written(here) == before, options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--html", "--json"], "--html, --markdown and --json: give one of them"),
        (["--html", "--plots", "p"], "--plots: is for --markdown"),
        (["--layer", "conv1"], "--layer: is for feature maps; give --images as well"),
        (["--images", "nowhere"], "--images nowhere: no such file or folder"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(
    rep: Path, here: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(rep), *options, "-o", "out"]) == 2
    assert said in error_of(capsys)
    assert list(here.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Markdown as a reader sees it


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab _*`\\|[]()<>&~!#-:/\n\"'.x1")))
def test_any_text_reads_as_itself(words: str) -> None:
    shown = GITHUB.render(markdown_table(("a", "b"), [(safe(words), code(words))]))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown, re.DOTALL)
    flat = " ".join(words.split())
    assert len(cells) == 2
    assert html.unescape(cells[0]) == flat
    assert " ".join(html.unescape(re.sub("</?code>", "", cells[1])).split()) == flat


def test_summaries_and_titles_read_as_themselves() -> None:
    name = "my_*rules*\\ <b>&amp; `x`"
    folded = Folded(f"Rules ({name})\n\n# no heading", [Listing("a: 1")])
    made = report.markdown(Document(name, [], [Section("s", f"About {name}", [folded])]))
    shown = GITHUB.render(made)
    read = {tag: html.unescape(t) for tag, t in re.findall(r"<(summary|h1|h2)>(.*?)</", shown)}
    assert read == {"h1": name, "h2": f"About {name}", "summary": f"Rules ({name}) # no heading"}
