"""
mmdet's own detections of a finished run: `python -m crosskd.predict RUN_DIR --annotations FILE --images-dir DIR -o
detections.json`.

Goes through mmdet's test pipeline and post-processing, and so is independent of everything in deploy/: the reference
that exported models are compared with. Needs the training packages (torch, mmdet).
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from crosskd.run_dir import load_run
from deploy.dataset import CocoImage, check_image_files, load_coco, with_classes
from deploy.errors import ConfigError, command
from deploy.files import check_writable, replacing
from deploy.progress import progress


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.predict", description="Detect with a trained detector, in torch."
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="folder of a finished run of crosskd.train or crosskd.distill"
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="COCO JSON that names the images")
    parser.add_argument("--images-dir", required=True, metavar="DIR", help="folder of the images of --annotations")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="COCO result JSON")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    arguments = parser.parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is {arguments.limit}; expected at least 1")
    check_writable(arguments.output)
    coco = load_coco(arguments.annotations, arguments.images_dir, check_files=False)
    images = coco.images[: arguments.limit]
    check_image_files(images)
    config, detector, sidecar = load_run(arguments.run_dir)
    details = sidecar["details"]
    coco = with_classes(coco, details["class_names"], details["category_ids"], f"the detector of {arguments.run_dir}")

    results: list[dict[str, Any]] = []
    predict = predictor(config, detector)
    for image in progress(images, len(images), "detecting"):
        boxes, scores, labels = predict(image)
        for (x1, y1, x2, y2), score, label in zip(boxes, scores, labels, strict=True):
            results.append(
                {
                    "image_id": image.image_id,
                    "category_id": coco.category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                }
            )
    with replacing(arguments.output) as temporary:
        temporary.write_text(json.dumps(results))
    return 0


def predictor(config: Any, detector: Any) -> Any:
    """
    A function: CocoImage -> (boxes_xyxy, scores, labels) as lists, pixels of the original image.

    Image by image, through the config's own test pipeline.
    """
    import torch
    from mmdet.registry import TRANSFORMS
    from mmengine.dataset import Compose, pseudo_collate

    transforms = [
        TRANSFORMS.build(transform)
        for transform in config.test_dataloader.dataset.pipeline
        if transform["type"] != "LoadAnnotations"
    ]
    pipeline = Compose(transforms)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector.to(device)

    @torch.no_grad()
    def predict(image: CocoImage) -> tuple[list[list[float]], list[float], list[int]]:
        data = pipeline({"img_path": str(image.path), "img_id": image.image_id})
        found = detector.test_step(pseudo_collate([data]))[0].pred_instances
        return found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist()

    return predict


if __name__ == "__main__":
    sys.exit(main())
