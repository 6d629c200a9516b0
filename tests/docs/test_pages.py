"""
README and the pages in docs/: their links lead somewhere, their options exist, and their commands run as written.

A block of shell or Python that cannot run here has a comment before it, `<!-- not run: WHY -->`; every other one is
run, in a folder of its own, with a `python` that is this one. What is made short is what lies in that folder, never the
text: all configs train for one epoch, and the drawn data set is thinned out to a few images.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from tests.stand_ins.detector import write_detector
from tests.stand_ins.tensorrt import write_module

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "docs/commands.md"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
FIRST = ("docs/distil-on-my-data.md", "docs/ship-to-a-jetson.md")
"""Each leaves what the later ones start from: the data set and the runs; the ONNX files."""
OWN_TEST = "docs/add-a-head.md"
FENCE = re.compile(r"(?:^<!-- not run: (\S[^\n]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(-m |`)((?:crosskd|deploy|calibration|benchmarks)\.[a-z_]+)((?:\\\n|[^`\n])*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
OPTIONS_OF_OTHERS = {"--nproc-per-node"}


class Block(NamedTuple):
    """What stands between two fences."""

    page: str
    line: int
    language: str
    text: str
    not_run: str
    """Why; empty if it is run."""


def blocks_of(page: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(PAGES[page]):
        not_run, language, text = match.groups()
        found.append(Block(page, PAGES[page].count("\n", 0, match.start(2)) + 1, language, text, not_run or ""))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def blocks_to_run() -> list[Block]:
    """In the order in which a reader would come to them."""
    pages = [*FIRST, *(page for page in PAGES if page not in FIRST)]
    runnable = [block for block in BLOCKS if block.language in ("sh", "python") and not block.not_run]
    return [
        block
        for page in pages
        for block in runnable
        if block.page == page and (page, block.language) != (OWN_TEST, "python")
    ]


# ---- what the pages say


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        file, _, heading = link.partition("#")
        target = ROOT / page if not file else (ROOT / page).parent / file
        assert target.exists(), link
        if heading:
            assert heading in _anchors(target), link


def _anchors(page: Path) -> set[str]:
    """Those that GitHub gives to headings: lower case, without punctuation, a dash for each space."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_from_the_tests(page: str) -> None:
    """A comment stands right before its block, and a block of commands is named `sh`."""
    assert PAGES[page].count("<!-- not run") == sum(bool(block.not_run) for block in BLOCKS if block.page == page)
    assert sum(line.startswith("```") for line in PAGES[page].splitlines()) == 2 * len(blocks_of(page))
    for block in blocks_of(page):
        assert block.language in ("", "text", "sh", "python", "toml"), f"{page}:{block.line}"
        if block.language in ("", "text"):
            assert not re.search(r"^(\$|python3? |make |pip |sudo )", block.text, re.MULTILINE), f"{page}:{block.line}"


@pytest.mark.parametrize("page", sorted({*PAGES} - {REFERENCE}))
def test_the_commands_have_the_options_that_a_page_gives_them(page: str) -> None:
    helps = dict(re.findall(r"^### (\S+)\n\n```text\n(.*?)^```", PAGES[REFERENCE], re.DOTALL | re.MULTILINE))
    for before, module, words in COMMAND.findall(PAGES[page]):
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), module
        assert before == "`" or module in helps, f"{module} is no command"
        if module in helps:
            missing = set(OPTION.findall(words)) - set(OPTION.findall(helps[module]))
            assert not missing, f"{module} {words}"
    alone = {option for code in re.findall(r"`(--[^`\n]+)`", PAGES[page]) for option in OPTION.findall(code)}
    assert alone <= {*OPTION.findall(PAGES[REFERENCE]), *OPTIONS_OF_OTHERS}


# ---- what the pages do


class Workshop:
    """A reader's folder, beside a checkout whose virtual environment is active."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name in ("python", "python3"):
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            (programs / name).chmod(0o755)
        (programs / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
        write_module(folder / "stand_ins", "10.3.0")
        for config in sorted((ROOT / "configs").rglob("*.py")):
            copy = folder / config.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(config.read_text(encoding="utf-8") + "\nmax_epochs = 1\n", encoding="utf-8")
        cv2.imwrite(str(folder / "street.jpg"), np.random.randint(0, 256, (96, 160, 3), np.uint8))
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "HOME": str(folder), "PATH": path, "PYTHONPATH": str(ROOT)}

    def run(self, block: Block) -> None:
        """Runs a block; then thins out the data set, if the block has drawn it."""
        if block.language == "python":
            for engine in re.findall(r'Detector\("(.+\.engine)"\)', block.text):  # made on the board
                self._do(["python", "-m", "deploy.build_trt", "student.onnx", "-o", engine], block, True)
            self._do(["python", "-c", block.text], block, True)
            return
        self._do(["bash", "-e", "-c", block.text], block, False)
        if "crosskd.shapes mydata" in block.text:
            thin_out(self.folder / "mydata")

    def _do(self, words: list[str], block: Block, with_tensorrt: bool) -> None:
        environment = dict(self.environment)
        if with_tensorrt:
            environment["PYTHONPATH"] += f"{os.pathsep}{self.folder / 'stand_ins'}"
        done = subprocess.run(
            words, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        last = block.text.strip().splitlines()[-1]
        gives_verdict = "crosskd.pipeline" in last or "benchmarks.report" in last
        refused = done.returncode == 1 and gives_verdict and "Traceback" not in done.stdout  # a verdict, too
        assert done.returncode == 0 or refused, f"{block.page}:{block.line}\n{block.text}\n{done.stdout[-4000:]}"


def thin_out(data: Path, images: int = 8) -> None:
    """Keeps the first images of each split."""
    for path in (data / "annotations").glob("*.json"):
        document = json.loads(path.read_text())
        document["images"] = document["images"][:images]
        kept = {image["id"] for image in document["images"]}
        document["annotations"] = [one for one in document["annotations"] if one["image_id"] in kept]
        path.write_text(json.dumps(document))


def test_from_onnx_files_to_detections_as_the_page_on_the_jetson_says(tmp_path: Path) -> None:
    """All but its first block, which wants a trained student."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    workshop = Workshop(tmp_path)
    plain = write_detector(tmp_path / "student.onnx")
    write_detector(tmp_path / "student.int8.onnx", np.int8, {"model": plain})
    first, *others = [block for block in blocks_to_run() if block.page == "docs/ship-to-a-jetson.md"]
    assert "deploy.export" in first.text
    assert {block.language for block in others} == {"sh", "python"}
    for block in others:
        workshop.run(block)
    assert (tmp_path / "student.tar.gz").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_pages_one_after_the_other(tmp_path: Path) -> None:
    for package in ("torch", "mmdet", "onnxruntime", "onnxslim"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    workshop = Workshop(tmp_path)
    for block in blocks_to_run():
        workshop.run(block)
    assert (tmp_path / "deepstream.accuracy.result.json").is_file()  # the last that a block makes
