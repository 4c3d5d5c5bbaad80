"""A page read back as a tree, strictly: every tag closes in its turn, and nothing would be loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input", "base", "source", "area", "col", "embed", "track", "wbr"}
SVG_TAGS = {"svg", "g", "title", "desc", "rect", "line", "path", "circle", "text"}
HTML_TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "nav", "ul", "li", "a", "main", "section",
    "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "code", "strong", "p", "pre", "figure",
    "figcaption", "img", "details", "summary", "script",
}  # fmt: skip


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    parent: Node | None
    children: list[Node] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all(self, *tags: str) -> Iterator[Node]:
        for child in self.children:
            if not tags or child.tag in tags:
                yield child
            yield from child.all(*tags)

    @property
    def text(self) -> str:
        return "".join(self.texts) + "".join(child.text for child in self.children)

    def above(self, tag: str) -> Node:
        node = self.parent
        while node is not None and node.tag != tag:
            node = node.parent
        assert node is not None, f"not inside a {tag}"
        return node


class Reader(HTMLParser):
    """Fails at a tag that does not close, or closes what is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = self.here = Node("", {}, None)
        self.feed(text)
        self.close()
        assert self.here is self.root, f"{self.here.tag} is left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands there twice"
        node = Node(tag, {k: v or "" for k, v in attrs}, self.here)
        self.here.children.append(node)
        if tag not in VOID:
            self.here = node

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_TAGS, f"<{tag}/> is no HTML"
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.here.tag == tag, f"{tag} closes, {self.here.tag} is open"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        self.here.texts.append(data)


def check_page(root: Node) -> None:
    """Well formed, and nothing in it that would be loaded or run but the one script."""
    nodes = [*root.all()]
    assert {n.tag for n in nodes} <= HTML_TAGS | SVG_TAGS
    assert [n.tag for n in nodes].count("script") == [n.tag for n in nodes].count("style") == 1
    ids = [n.attributes["id"] for n in nodes if "id" in n.attributes]
    assert len(ids) == len(set(ids))
    for node in nodes:
        for name, value in node.attributes.items():
            assert not name.startswith("on"), (node.tag, name)
            assert name not in ("action", "formaction", "srcset", "data", "xlink:href", "background", "poster")
            if name == "href":
                assert value[0] == "#"
                assert value[1:] in ids
            if name == "src":
                assert value.startswith("data:image/png;base64,")
            if name in ("aria-labelledby", "aria-describedby"):
                assert set(value.split()) <= set(ids)
            assert "url(" not in value
    (style,), (script,) = ([n.text for n in nodes if n.tag == tag] for tag in ("style", "script"))
    assert not re.search(r"url\s*\(|@import|@font-face|expression", style)
    assert not re.search(r"https?:|//[a-z]|fetch\(|import\b|XMLHttp|eval|innerHTML|document\.write", script)
    (policy,) = (n.attributes["content"] for n in nodes if n.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert {"html", "head", "body"} <= {n.tag for n in nodes}
    assert next(n for n in nodes if n.tag == "html").attributes["lang"] == "en"


def tables_of(root: Node, section: str) -> list[list[list[str]]]:
    (found,) = (s for s in root.all("section") if s.attributes["id"] == section)
    return [[[c.text for c in r.children] for r in t.all("tr")] for t in found.all("table")]
