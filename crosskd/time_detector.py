"""
Times a finished run in torch, stage by stage: `python -m crosskd.time_detector RUN_DIR --annotations FILE
--images-dir DIR -o times.json`.

The stages are those of deployment: pre-processing (mmdet's test pipeline on an image in memory), inference (backbone,
neck, head), post-processing (decoding and NMS). Needs the training packages (torch, mmdet).
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from crosskd.training import load_run
from deploy.dataset import load_coco, read_image
from deploy.errors import ConfigError, command
from deploy.files import check_writable, write_json

STAGES = ("preprocess", "inference", "postprocess")
MOST_IMAGES = 16


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.time_detector", description="Time a trained detector in torch."
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="folder of a finished run of crosskd.train or crosskd.distill"
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="COCO JSON that names the images")
    parser.add_argument("--images-dir", required=True, metavar="DIR")
    parser.add_argument("--runs", type=int, default=200, help="timed images (default: 200)")
    parser.add_argument("--warmup", type=int, default=20, help="images before that, not counted (default: 20)")
    parser.add_argument("--threads", type=int, help="for torch's operators (default: torch's choice)")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="JSON: samples_ms by stage, description")
    arguments = parser.parse_args(argv)
    if arguments.runs < 1 or arguments.warmup < 0:
        raise ConfigError(f"--runs {arguments.runs} --warmup {arguments.warmup}: expected at least 1 and 0")
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigError(f"--threads is {arguments.threads}; expected at least 1")
    check_writable(arguments.output)
    coco = load_coco(arguments.annotations, arguments.images_dir, check_files=False)
    pixels = [read_image(image.path) for image in coco.images[:MOST_IMAGES]]
    config, detector, _ = load_run(arguments.run_dir)
    write_json(
        arguments.output,
        times_of_detector(config, detector, pixels, arguments.runs, arguments.warmup, arguments.threads),
    )
    return 0


def times_of_detector(
    config: Any, detector: Any, images: list[Any], runs: int, warmup: int, threads: int | None
) -> dict[str, Any]:
    """
    `samples_ms` (stage -> one number per run, milliseconds) and `description` of what ran where.

    Args:
        images: (H, W, 3) uint8, blue-green-red, cycled through.
    """
    import torch
    from mmdet.registry import TRANSFORMS
    from mmengine.dataset import Compose, pseudo_collate

    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector.to(device)
    loaders = ("LoadImageFromFile", "LoadAnnotations")
    pipeline = Compose(
        [
            TRANSFORMS.build(transform)
            for transform in config.test_dataloader.dataset.pipeline
            if transform["type"] not in loaders
        ]
    )

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    samples: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with torch.no_grad():
        for run in range(warmup + runs):
            image = images[run % len(images)]
            times = [now()]
            data = pipeline(
                {
                    "img": image,
                    "img_id": run,
                    "img_path": "",
                    "img_shape": image.shape[:2],
                    "ori_shape": image.shape[:2],
                }
            )
            data = detector.data_preprocessor(pseudo_collate([data]), False)
            times.append(now())
            outputs = detector.bbox_head(detector.extract_feat(data["inputs"]))
            times.append(now())
            metas = [sample.metainfo for sample in data["data_samples"]]
            detector.bbox_head.predict_by_feat(*outputs, batch_img_metas=metas, rescale=True)
            times.append(now())
            if run >= warmup:
                for stage, start, end in zip(STAGES, times[:-1], times[1:], strict=True):
                    samples[stage].append((end - start) * 1e3)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"samples_ms": samples, "description": f"torch {torch.__version__}, {where}"}


if __name__ == "__main__":
    sys.exit(main())
