"""The report in a real browser: headless Chromium, of which nothing but the program itself is needed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from benchmarks import report
from benchmarks.measuring.subject import ROLES, TEACHER_FORMS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

PROBE = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const found = {};
  %s
  const node = document.createElement("pre");
  node.id = "found";
  node.textContent = JSON.stringify(found);
  document.body.append(node);
}, 0));
</script>
"""


@pytest.fixture
def page(data_dir, result, tmp_path):
    """A report of 24 results: the nine roles and three others."""
    paths = []
    roles = [role for role in ROLES if role not in TEACHER_FORMS]
    for index, role in enumerate([*roles, "rival-1", "rival-2", "rival-3"]):
        paths += [result(role, ap=0.6 - index / 50), result(role, ms=100.0 / (1 + index))]
    output = tmp_path / "out" / "report.html"
    assert report.main([*map(str, paths), "-o", str(output), "--ship", "engine-int8", "--max-ap-drop", "20"]) == 0
    return output


@pytest.fixture
def probe(page, tmp_path):
    """Opens the page with a script that fills `found`: (found, what the browser wrote to its log)."""

    def probe(script, *flags):
        probed = page.with_name("probed.html")
        probed.write_text(page.read_text().replace("</body>", PROBE % script + "</body>"))
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--enable-logging=stderr", "--v=0", *flags, "--dump-dom", probed.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        assert text, done.stderr[-2000:]
        return json.loads(html.unescape(text.group(1))), done.stderr

    return probe


def test_it_opens_in_under_a_second_without_console_errors_and_with_labels(probe):
    found, log = probe("""
      const timing = performance.getEntriesByType("navigation")[0];
      found.opened_ms = timing.domComplete;
      found.requests = performance.getEntriesByType("resource")
        .map((one) => one.name).filter((one) => !one.startsWith("data:"));
      found.unlabelled = [...document.querySelectorAll("svg")]
        .filter((one) => !one.getAttribute("aria-label") && one.getAttribute("aria-hidden") !== "true").length;
      found.charts = [...document.querySelectorAll("svg.plot, svg.curves")]
        .map((one) => one.getAttribute("aria-label"));
      found.axes = [...document.querySelectorAll("svg .axis")].map((one) => one.textContent);
      found.shown = [...document.querySelectorAll("figure svg")].map((one) => one.getBoundingClientRect().height);
      found.regions = [...document.querySelectorAll(".scroll")].every((one) => one.tabIndex === 0);
    """)
    assert "CONSOLE" not in log, log
    assert found["requests"] == []
    assert found["opened_ms"] < 1000
    assert found["unlabelled"] == 0
    assert len(found["charts"]) == 6  # speed against AP, two curves, two classes, how latency varies
    assert any("TensorRT INT8 11.1 ms, AP 44.0" in label for label in found["charts"])
    assert {"AP, points", "recall", "precision", "part of the model\N{RIGHT SINGLE QUOTATION MARK}s own median"} <= set(
        found["axes"]
    )
    assert len(found["shown"]) == 3
    assert min(found["shown"]) > 50
    assert found["regions"]


def test_a_console_error_would_be_seen(probe):
    assert "CONSOLE" in probe('console.error("seen");')[1]


def test_tables_sort_by_click_and_by_keyboard(probe):
    found, _ = probe("""
      const table = document.querySelector("table.sortable");
      const column = (index) => [...table.tBodies[0].rows].map((row) => row.cells[index].firstChild.textContent.trim());
      const head = (index) => table.tHead.rows[0].cells[index];
      const click = (index) => head(index).querySelector("button").click();
      found.before = column(0);
      click(4); found.descending = column(4); found.sort = head(4).getAttribute("aria-sort");
      click(4); found.ascending = column(4); found.turned = head(4).getAttribute("aria-sort");
      click(0); found.names = column(0); found.other = head(4).getAttribute("aria-sort");
      click(2); found.gains = column(2);
      const button = head(1).querySelector("button");
      button.focus();
      found.focused = document.activeElement === button;
      found.tables = document.querySelectorAll("table.sortable").length;
      found.headless = [...document.querySelectorAll("table.sortable thead th")]
        .filter((one) => !one.querySelector("button")).length;
    """)
    assert found["before"][0] == "Teacher"
    numbers = [float(text) for text in found["descending"]]
    assert numbers == sorted(numbers, reverse=True)
    assert found["ascending"] == found["descending"][::-1]
    assert (found["sort"], found["turned"], found["other"]) == ("descending", "ascending", "none")
    assert found["names"] == sorted(found["names"], key=str.casefold)
    assert found["gains"][-1] == "\N{EN DASH}"  # the teacher's own is unknown: last, whichever way
    assert found["focused"]
    assert found["tables"] == 4
    assert found["headless"] == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_of_the_page(probe, page, width):
    """Wide tables scroll in their own region. The browser's window is never narrower than 500: hence a frame."""
    found, _ = probe(f"""
      const frame = document.createElement("iframe");
      frame.style.width = "{width}px";
      document.body.append(frame);
      const view = frame.contentDocument;
      view.documentElement.innerHTML = document.documentElement.innerHTML;
      view.querySelectorAll("iframe").forEach((one) => one.remove());
      found.window = frame.contentWindow.innerWidth;
      found.page = view.documentElement.scrollWidth;
    """)
    assert found["page"] <= found["window"] <= width


def test_it_is_light_or_dark_as_the_reader_wants(probe):
    script = """
      const style = getComputedStyle(document.body);
      found.page = style.backgroundColor;
      found.ink = style.color;
    """
    light, _ = probe(script, "--blink-settings=preferredColorScheme=1")
    dark, _ = probe(script, "--blink-settings=preferredColorScheme=0")

    def brightness(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert brightness(light["page"]) > 600 > 150 > brightness(light["ink"])
    assert brightness(dark["page"]) < 150 < 600 < brightness(dark["ink"])


def test_it_prints(page, tmp_path):
    pdf = tmp_path / "report.pdf"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*command, f"--print-to-pdf={pdf}", page.as_uri()], capture_output=True, check=True, timeout=60)
    assert pdf.read_bytes().startswith(b"%PDF")
