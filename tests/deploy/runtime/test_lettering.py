"""Class names beyond ASCII are drawn, or said not to be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Iterator

import numpy as np
import pytest

from deploy.runtime import lettering
from deploy.runtime.draw import draw
from deploy.runtime.lettering import letters_mask
from deploy.runtime.postprocess import Detections

BOX = Detections(np.float32([[40, 60, 160, 120]]), np.float32([0.5]), np.array([0]))


@pytest.fixture(autouse=True)
def one_folder_of_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With DejaVu in it, which has letters of Europe."""
    folder = Path(pytest.importorskip("matplotlib").get_data_path(), "fonts", "ttf")
    monkeypatch.setattr(lettering, "FONT_FOLDERS", (str(folder),))
    lettering._font_for.cache_clear()
    yield
    lettering._font_for.cache_clear()


def _drawn(name: str) -> np.ndarray:
    return draw(np.zeros((200, 300, 3), np.uint8), BOX, (name,))


@pytest.mark.parametrize(("name", "other"), [("Straße", "Strase"), ("Übung", "Ubung"), ("автомобиль", "avtomobil")])
def test_names_beyond_ascii_are_drawn_as_they_are(name: str, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = _drawn(name)
    for wrong in ("?" * len(name), other, name.encode("ascii", "replace").decode()):
        assert (drawn != _drawn(wrong)).any()
    ink = letters_mask(name, (name,), 20)
    assert ink is not None
    assert ink.max() == 255
    assert ink.shape[0] > 20
    assert capsys.readouterr().err == ""


def test_a_letter_that_no_font_has_is_a_question_mark_and_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("人ß",)
    mask = letters_mask("人ß", names, 20)
    np.testing.assert_array_equal(mask, letters_mask("?ß", names, 20))
    assert not np.array_equal(mask, letters_mask("??", names, 20))
    assert capsys.readouterr().err == (
        "note: letters of class names are drawn as question marks; no font here has 人: install one "
        "(apt install fonts-noto-core fonts-noto-cjk)\n"
    )


def test_without_any_font_all_of_them_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lettering, "FONT_FOLDERS", ())
    np.testing.assert_array_equal(_drawn("Straße"), _drawn("Stra?e"))
    assert "no font here has ß: install one" in capsys.readouterr().err


def test_without_pillow_all_of_them_are_question_marks_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    drawn = _drawn("Straße")
    np.testing.assert_array_equal(drawn, _drawn("Stra?e"))
    np.testing.assert_array_equal(drawn, _drawn("Straße"))
    assert capsys.readouterr().err.count("to draw them Pillow is needed: pip install pillow") == 1


def test_ascii_names_ask_for_no_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.runtime.draw.letters_mask", None)
    _drawn("street")


def test_a_name_at_the_edge_of_a_picture_smaller_than_it_is_cut() -> None:
    boxes = Detections(np.float32([[0, 0, 12, 9]]), np.float32([0.5]), np.array([0]))
    drawn = draw(np.zeros((10, 14, 3), np.uint8), boxes, ("Straßenübergang",))
    assert drawn.shape == (10, 14, 3)
