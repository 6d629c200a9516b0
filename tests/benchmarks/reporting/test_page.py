"""The page and the Markdown of a report, as text."""

from __future__ import annotations

import html.parser
from xml.etree import ElementTree


class Page(html.parser.HTMLParser):
    """Tags that do not balance, references to elsewhere, and counts."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.outside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        for name, value in attributes:
            if name in ("src", "href") and not value.startswith(("data:", "#")):
                self.outside.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def test_the_page_is_well_formed_and_needs_nothing_from_outside(data_dir, results, run_report, tmp_path):
    run_report(results, "--max-ap-drop", 3)
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.outside == []
    assert "@import" not in text
    assert "url(" not in text
    assert page.count("script") == 1  # sorts the tables
    assert page.count("circle") == 1 + 2 * 5  # the verdict's sign, a point and a p99 per model
    assert page.count("image") == 1  # the one that they disagree on, once,
    assert page.count("use") == 3  # shown for the annotations, the teacher and what ships
    assert text.count(' alone"') == 1  # the box that is lost
    for tag, attributes in page.tags:
        if tag == "svg":
            assert "aria-label" in attributes or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes.get("scope")


def test_what_comes_from_files_is_escaped(result, run_report, tmp_path):
    run_report([result("a<b>&c", ap=0.5)])
    text = (tmp_path / "out" / "report.html").read_text()
    assert "a<b>" not in text
    assert "a&lt;b&gt;&amp;c" in text


def test_names_are_only_text_in_markdown_and_junit(result, run_report, tmp_path):
    name = "<img src=x>|**b** [l](javascript:f) \x1b[2J"
    words = ("--ship", name, "--max-latency-ms", "1", "--junit", str(tmp_path / "gate.xml"))
    run_report([result(name, ap=0.5), result(name, ms=20.0)], *words)
    text = (tmp_path / "out" / "report.md").read_text()
    assert r"| \<img src=x\>\|\*\*b\*\* \[l\](javascript:f)  \[2J (ships) |" in text
    assert ElementTree.parse(tmp_path / "gate.xml").find("testsuite/testcase").get("name") == "max-latency-ms"
