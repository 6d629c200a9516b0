from __future__ import annotations

import base64

import cv2
import numpy as np

from benchmarks.measuring.detections import NO_BOXES, boxes_by_image
from benchmarks.reporting.gallery import GALLERY_SIDE_PX, Side, alone_of, gallery, most_disagreed

NAMES = {7: "star", 3: "disc"}


def found(*rows):
    """Image id -> boxes, of (image id, left, category)."""
    return boxes_by_image(
        [
            {"image_id": image_id, "category_id": category, "bbox": [left, 20.0, 20.0, 40.0], "score": 0.9}
            for image_id, left, category in rows
        ]
    )


def side(title, image_ids, *rows):
    boxes = found(*rows)
    return Side(title, {image_id: boxes.get(image_id, NO_BOXES) for image_id in image_ids})


def test_the_most_disagreed_images_come_first_and_agreement_is_left_out():
    first = side("Teacher", range(1, 6), (1, 0, 3), (2, 0, 3), (2, 50, 3), (3, 0, 3), (5, 0, 3))
    second = side("ONNX INT8", range(1, 6), (1, 1, 3), (3, 0, 7), (3, 90, 3), (5, 50, 3))
    assert most_disagreed(first, second) == [3, 2, 5]  # 3 boxes alone, then 2 and 2 by id; 1 and 4 agree
    assert most_disagreed(first, second, count=1) == [3]
    assert alone_of(first.boxes[3], second.boxes[3]) == ([0], [0, 1])


def image(name, width=1200, height=900):
    return {"id": 1, "file_name": name, "width": width, "height": height}


def test_a_picture_has_its_pixels_once_and_three_panels(tmp_path):
    pixels = np.zeros((900, 1200, 3), np.uint8)
    pixels[:, :600] = 255
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    sides = (side("Teacher", [1], (1, 10, 3), (1, 500, 7)), side("INT8", [1], (1, 12, 3)))
    (picture,), missing = gallery([image("a.png")], tmp_path, found((1, 10, 3)), sides, NAMES)
    assert missing == []
    assert [panel["title"] for panel in picture["panels"]] == ["Annotated", "Teacher", "INT8"]
    assert [len(panel["boxes"]) for panel in picture["panels"]] == [1, 2, 1]
    assert [panel["alone"] for panel in picture["panels"]] == [None, 1, 0]
    near, far = picture["panels"][1]["boxes"]
    assert [near[key] for key in ("x", "y", "width", "height", "text")] == [10.0, 20.0, 20.0, 40.0, "disc 0.90"]
    assert (near["alone"], far["alone"]) == (False, True)
    assert (near["colour"], far["colour"]) == (1, 0)  # in the order of the annotation file
    jpeg = base64.b64decode(picture["uri"].partition(",")[2])
    shown = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert max(shown.shape) == GALLERY_SIDE_PX
    assert shown[:, 100].mean() > 250
    assert shown[:, 400].mean() < 5


def test_images_that_are_missing_or_others_are_left_out(tmp_path):
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((10, 10, 3), np.uint8))
    sides = (side("Teacher", [1], (1, 0, 3)), side("INT8", [1]))
    images = [image("none.png"), image("small.png")]
    assert gallery(images, tmp_path, {}, sides, NAMES) == ([], ["none.png", "small.png"])


def test_the_gallery_needs_the_annotations_and_images_measured_with(data_dir, results, run_report, tmp_path):
    document = run_report(results)[2]
    assert not [note for note in document["notes"] if "allery" in note]
    (data_dir / "images" / "sub" / "2.png").unlink()
    notes = "\n".join(run_report(results)[2]["notes"])
    assert "Gallery images not shown: 1. sub/2.png" in notes
    annotations = data_dir / "annotations" / "instances_test.json"
    annotations.rename(tmp_path / "moved.json")
    assert "No gallery: " in "\n".join(run_report(results)[2]["notes"])
    assert "No gallery: " not in "\n".join(run_report(results, "--annotations", tmp_path / "moved.json")[2]["notes"])
    annotations.write_text((tmp_path / "moved.json").read_text() + " ")
    status, error, _ = run_report(results)
    assert status == 2
    assert "is not the annotation file that the models were measured with" in error
