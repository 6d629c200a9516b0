"""The check of a teacher before the first step: a teacher that detects nothing teaches nothing, and no loss says so."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmdet.evaluation import CocoMetric
from mmdet.registry import TRANSFORMS
from mmengine.dataset import Compose, pseudo_collate
from mmengine.dist import broadcast_object_list, is_main_process
from torch import Tensor
from torch.utils._pytree import tree_map

from crosskd.data import DETECTIONS_COUNTED, TrainingData
from crosskd.loop.aside import quiet_logger, random_states_kept
from deploy.dataset import CocoSet, coco_document, renumbered
from deploy.errors import ConfigError
from deploy.progress import progress


def check_teacher(
    config: Any, detector: Any, data: TrainingData, images: int = 100, min_teacher_ap: float | None = None
) -> dict[str, Any]:
    """
    `teacher_ap` (points, 0 to 100; None if the images have no boxes) and `teacher_images`, for the sidecar; tells it.

    The teacher gets the pixels that it will get in training: the student's test pipeline and normalisation, turned
    into its own by the detector. So a mismatch shows, which the teacher's AP in its own pipeline would not. Nothing is
    changed: neither the detector nor any random state. In several processes the first one does it, the others wait.

    Args:
        config: of the distillation; its `test_dataloader` has the student's pipeline.
        detector: a CrossKDDetector, on the device where it is to be checked.
        images: how many of the validation images, evenly spread; all of them if there are fewer.
        min_teacher_ap: the AP that is demanded, in points.

    Raises:
        ConfigError: the AP is below `min_teacher_ap`, or cannot be told while one is demanded.
    """
    if images < 1:
        raise ConfigError(f"the teacher is to be checked on {images} images; expected at least 1")
    count = len(data.val.images)
    images = min(images, count)
    points: list[Any] = [None]
    if is_main_process():
        chosen = [data.val.images[number * count // images] for number in range(images)]
        with random_states_kept():
            points[0] = _points_of_teacher(config, detector, dataclasses.replace(data.val, images=chosen))
    broadcast_object_list(points)
    ap, ap50 = points[0]
    where = f"on {images:,} of {count:,} validation images"
    if ap is None:
        words = f"teacher: no AP {where}, which have no boxes"
    else:
        words = f"teacher: AP {ap:.1f}, AP50 {ap50:.1f} {where}"
    if min_teacher_ap is not None and (ap is None or ap < min_teacher_ap):
        raise ConfigError(
            f"{words}; expected at least {min_teacher_ap:g} (--min-teacher-ap). Look at its checkpoint, its config "
            "and the classes of the data."
        )
    if is_main_process():
        print(words)
        if ap is not None and ap < 1:
            print(
                "warning: a teacher that knows nothing: wrong weights, classes or pre-processing? --min-teacher-ap "
                "makes this an error",
                file=sys.stderr,
            )
    return {"teacher_ap": ap, "teacher_images": images}


def _points_of_teacher(config: Any, detector: Any, coco: CocoSet) -> tuple[float | None, float | None]:
    """AP and AP50 in points; None if there are no boxes to find."""
    samples = enumerate(_detected(config, detector, coco), start=1)
    detected = [{**sample, "img_id": number} for number, sample in samples]
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),  # pycocotools tells how long each part took
        quiet_logger(),
    ):
        annotations = Path(folder) / "annotations.json"
        annotations.write_text(json.dumps(coco_document(renumbered(coco))))
        metric = CocoMetric(ann_file=str(annotations), metric="bbox", proposal_nums=DETECTIONS_COUNTED)
        metric.dataset_meta = {"classes": coco.class_names}
        metric.process({}, detected)
        numbers = metric.compute_metrics(metric.results)
    # mmdet has no numbers where nothing was detected; COCO's are -1 where there is nothing to detect.
    ap, ap50 = (round(100 * numbers.get(name, 0.0), 1) for name in ("bbox_mAP", "bbox_mAP_50"))
    has_boxes = any(not crowd for image in coco.images for crowd in image.crowd)
    return (ap, ap50) if has_boxes else (None, None)


def _detected(config: Any, detector: Any, coco: CocoSet) -> Iterator[dict[str, Any]]:
    """What the teacher detects, image by image, as the dicts that mmdet's metrics take."""
    pipeline = Compose(
        [
            TRANSFORMS.build(transform)
            for transform in config.test_dataloader.dataset.pipeline
            if transform["type"] != "LoadAnnotations"
        ]
    )
    # A teacher that was prepared for training under autocast has convolutions in that type, and runs under it here too.
    low = {parameter.dtype for parameter in detector.teacher.parameters()} & {torch.bfloat16, torch.float16}
    head = detector.teacher.bbox_head
    for image in progress(coco.images, len(coco.images), "checking the teacher"):
        loaded = pseudo_collate([pipeline({"img_path": str(image.path), "img_id": image.image_id})])
        with torch.no_grad():
            batch = detector.student.data_preprocessor(loaded, False)
            (sample,) = batch["data_samples"]
            inputs = detector.teacher_inputs_from_student(batch["inputs"])
            with torch.autocast(inputs.device.type, dtype=next(iter(low), None), enabled=bool(low)):
                outputs = head(detector.teacher.extract_feat(inputs))
            # As in training, boxes are decoded in float32 (crosskd.loop.amp.keep_losses_in_float32).
            outputs = tree_map(lambda value: value.float() if isinstance(value, Tensor) else value, outputs)
            (instances,) = head.predict_by_feat(*outputs, batch_img_metas=[sample.metainfo], rescale=True)
        sample.pred_instances = instances
        yield sample.to_dict()
