"""
Detects with a finished run in torch and times its stages: `python -m crosskd.workers.time_detector RUN_DIR IMAGE...`.

It is driven by `benchmarks.latency`, which has one loop for torch, ONNX Runtime and TensorRT: for each line on its
standard input, the number of a run, it detects in one of the images and answers with a line of JSON, stage ->
milliseconds. Before that it says `starting`, before torch is loaded, and then what runs it where.

The stages are those of deployment: pre-processing (mmdet's test pipeline on an image in memory), copies to the device
and back where there is one, inference (backbone, neck, head), post-processing (decoding and NMS). Needs the training
packages (torch, mmdet).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

from deploy.contract import weights_of_run
from deploy.errors import ConfigError, command
from deploy.images import read_image


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m crosskd.workers.time_detector",
        description="Time a trained detector in torch: a line of JSON for each line of the standard input.",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="folder of a finished run of crosskd.train or crosskd.distill"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, which are detected in in turn")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's choice)")
    arguments = parser.parse_args(argv)
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigError(f"--threads is {arguments.threads}; expected at least 1")
    weights_of_run(arguments.run_dir)  # refused before torch is loaded
    images = [read_image(path) for path in arguments.images]

    answers = sys.stdout

    def answer(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no answer
        answer({"starting": True})
        from crosskd.run_dir import load_run

        config, detector, _ = load_run(arguments.run_dir)
        detect, description, on_gpu = detection_of(config, detector, images, arguments.threads)
        answer({"description": description, "on_gpu": on_gpu})
        for line in sys.stdin:
            answer(detect(int(line)))
    return 0


def detection_of(
    config: Any, detector: Any, images: list[Any], threads: int | None
) -> tuple[Callable[[int], dict[str, float]], str, bool]:
    """
    (number of a run -> stage -> milliseconds, description of what runs it where, whether that is a GPU).

    Without a GPU there are no stages `host_to_device` and `device_to_host`.

    Args:
        images: (H, W, 3) uint8, blue-green-red, cycled through.
    """
    import cv2
    import torch
    from mmdet.registry import TRANSFORMS
    from mmengine.dataset import Compose, pseudo_collate

    from crosskd.loop.precision import now_s

    if threads is not None:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)  # mmcv resizes with OpenCV
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    now = functools.partial(now_s, device)
    detector.to(device)
    loaders = ("LoadImageFromFile", "LoadAnnotations")
    pipeline = Compose(
        [
            TRANSFORMS.build(transform)
            for transform in config.test_dataloader.dataset.pipeline
            if transform["type"] not in loaders
        ]
    )

    @torch.no_grad()
    def detect(number: int) -> dict[str, float]:
        image = images[number % len(images)]
        facts = {"img": image, "img_id": number, "img_path": ""}
        shape = image.shape[:2]
        start = now()
        data = pseudo_collate([pipeline({**facts, "img_shape": shape, "ori_shape": shape})])
        packed = now()
        data = detector.data_preprocessor.cast_data(data)
        moved = now()
        data = detector.data_preprocessor(data, False)
        prepared = now()
        outputs = detector.bbox_head(detector.extract_feat(data["inputs"]))
        inferred = now()
        metas = [sample.metainfo for sample in data["data_samples"]]
        (found,) = detector.bbox_head.predict_by_feat(*outputs, batch_img_metas=metas, rescale=True)
        decoded = now()
        _ = [found[key].cpu().numpy() for key in ("bboxes", "scores", "labels")]
        end = now()
        stages_s = {"preprocess": prepared - start, "inference": inferred - prepared, "postprocess": end - inferred}
        if on_gpu:
            stages_s["preprocess"] -= moved - packed
            stages_s["postprocess"] -= end - decoded
            stages_s.update(host_to_device=moved - packed, device_to_host=end - decoded)
        return {stage: 1e3 * value for stage, value in {**stages_s, "total": end - start}.items()}

    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return detect, f"torch {torch.__version__}, {where}", on_gpu


if __name__ == "__main__":
    sys.exit(main())
