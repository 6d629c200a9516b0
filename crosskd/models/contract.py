"""The model contract of an mmdet config: how deployment feeds and reads its detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crosskd.models.families import family_with_decoder
from deploy.contract import LAYOUTS, OUTPUTS, ModelContract
from deploy.errors import ExportError
from deploy.export_options import INPUT_NAME


def contract_from_config(
    config: Any,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    size_px: tuple[int, int] | None = None,
    batch: int = 1,
    input_type: str = "float32",
    outputs: str = "topk",
    output_names: Sequence[str] | None = None,
) -> ModelContract:
    """
    The model contract of an mmdet config: pre-processing from its test pipeline, thresholds from its test_cfg.

    Args:
        size_px: width and height of the network input; by default what the test pipeline pads to.
        batch: number of images, DYNAMIC for any.
        input_type, outputs: as in ModelContract.
        output_names: by default those of OUTPUTS.

    Raises:
        ExportError: the head's boxes cannot be decoded in a graph, the pipeline does something that deployment does
            not know, or the size does not fit the strides.
    """
    family = family_with_decoder(config.model.bbox_head.type)
    transforms = {transform["type"]: transform for transform in config.test_dataloader.dataset.pipeline}
    known = {"LoadImageFromFile", "LoadAnnotations", "Resize", "FitResize", "Pad", "FitPad", "PackDetInputs"}
    unknown = sorted(set(transforms) - known)
    if unknown:
        raise ExportError(f"test_pipeline has {unknown}, which deployment cannot repeat; expected only {sorted(known)}")
    resize = transforms.get("FitResize") or transforms.get("Resize")
    if resize is None:
        raise ExportError(
            "test_pipeline has neither Resize nor FitResize; expected one, since the network input has a fixed size"
        )
    normalise = config.model.data_preprocessor
    turned = bool(normalise.get("bgr_to_rgb") or normalise.get("rgb_to_bgr"))  # mmdet reads blue-green-red
    pad = transforms.get("FitPad") or transforms.get("Pad")
    width, height = size_px or size_from_pipeline(resize, pad or {}, normalise.get("pad_size_divisor", 1))
    if width % 32 or height % 32:
        raise ExportError(
            f"the network input is {width} x {height}; expected multiples of 32. Give --size WIDTH HEIGHT"
        )
    scale = resize.get("scale")
    into_all = size_px is not None or not isinstance(scale, (tuple, list)) or tuple(scale) == (width, height)
    mean, std = normalise.get("mean") or (0.0, 0.0, 0.0), normalise.get("std") or (1.0, 1.0, 1.0)
    pad_value = mean  # mmdet's preprocessor pads with 0 after normalisation
    if pad:
        value = pad.get("pad_value") or pad.get("pad_val", 0)
        value = value.get("img", 0) if isinstance(value, dict) else value
        value = (value, value, value) if isinstance(value, (int, float)) else value
        pad_value = value[::-1] if turned else value
    test_cfg = config.model.test_cfg
    if test_cfg.nms.get("type", "nms") != "nms":
        raise ExportError(f"test_cfg.nms.type is {test_cfg.nms.type!r}; deployment knows 'nms' only")
    sizes = {"N": batch, "3": 3, "height": height, "width": width}
    input_shape: Any = tuple(sizes[name] for name in LAYOUTS[input_type])
    numbers: Any = (tuple(float(value) for value in values) for values in (mean, std, pad_value))
    mean, std, pad_value = numbers
    return ModelContract(
        input_name=INPUT_NAME,
        input_shape=input_shape,
        channel_order="rgb" if turned else "bgr",
        mean=mean,
        std=std,
        pad_value=pad_value,
        resize="keep_ratio" if resize["type"] == "FitResize" or resize.get("keep_ratio") else "stretch",
        output_names=tuple(output_names or OUTPUTS[outputs]),
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        # Where the graph applies mmdet's threshold, what it rejects leaves with a score of 0: see best_candidates.
        score_threshold=0.0 if family.threshold_in_graph else test_cfg.score_thr,
        nms_iou_threshold=test_cfg.nms.iou_threshold,
        max_detections=test_cfg.max_per_img,
        input_type=input_type,
        outputs=outputs,
        resize_wh_px=None if into_all else tuple(scale),
    )


def size_from_pipeline(resize: Any, pad: Any, divisor: int) -> tuple[int, int]:
    """
    Width and height to which a test pipeline brings its images.

    Raises:
        ExportError: it brings them to no fixed size.
    """
    size = pad.get("size") or resize.get("scale")
    if not isinstance(size, (tuple, list)) or len(size) != 2 or isinstance(size[0], (tuple, list)):
        raise ExportError(
            f"test_pipeline resizes to {size!r}; expected one (width, height), since the network input has a fixed "
            "size. Give --size WIDTH HEIGHT"
        )
    divisor = pad.get("size_divisor") or divisor
    width, height = (-(-side // divisor) * divisor for side in size)
    return width, height
