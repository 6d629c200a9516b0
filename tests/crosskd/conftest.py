"""The tiny detectors of these tests, a drawn data set, and one finished run of each kind that many tests read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mmengine")

from crosskd import distill, train  # noqa: E402
from crosskd.config import load_config  # noqa: E402
from crosskd.models.detector import detector_from_config  # noqa: E402
from crosskd.shapes import write_shapes  # noqa: E402

CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture(scope="session")
def configs() -> Path:
    """The folder of the tiny configs: gfl_tiny.py, gfl_tiny_teacher.py, crosskd_tiny.py."""
    return CONFIGS


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawn images, eight of them to train on."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, images=12, size_px=96, seed=0)
    return folder


@pytest.fixture(scope="session")
def teacher_run(shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of crosskd.train: one epoch of the tiny teacher."""
    run_dir = tmp_path_factory.mktemp("runs") / "teacher"
    assert train.main([str(CONFIGS / "gfl_tiny_teacher.py"), "--data", str(shapes_dir), "-o", str(run_dir)]) == 0
    return run_dir


@pytest.fixture(scope="session")
def student_run(shapes_dir: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of crosskd.distill: one epoch of the tiny student under that teacher."""
    run_dir = tmp_path_factory.mktemp("runs") / "student"
    words = [str(CONFIGS / "crosskd_tiny.py"), "--data", str(shapes_dir), "-o", str(run_dir)]
    assert distill.main([*words, "--teacher-checkpoint", str(teacher_run / "detector.pth")]) == 0
    return run_dir


@pytest.fixture(scope="module")
def unformatted_configs() -> Iterator[None]:
    """Leaves configs as they are written out: mmengine formats them for each checkpoint, most of a short run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_options: (text, True))
        # It asks compilers for their versions.
        patch.setattr("mmengine.runner.Runner._log_env", lambda _runner, _config: None)
        yield


@pytest.fixture
def build() -> Callable[..., Any]:
    """config name, overrides -> the detector, in training mode, with random weights."""

    def build(name: str = "crosskd_tiny.py", overrides: dict[str, Any] | None = None) -> Any:
        return detector_from_config(load_config(CONFIGS / name, overrides), load_weights=False).train()

    return build


@pytest.fixture
def make_batch() -> Callable[..., tuple[Any, list[Any]]]:
    """(number of boxes per image, height, width) -> normalised images and their data samples."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    def make(boxes_per_image: list[int], height: int = 64, width: int = 96) -> tuple[Any, list[Any]]:
        samples = []
        for count in boxes_per_image:
            corners = torch.rand(count, 2) * torch.tensor([width * 0.6, height * 0.6])
            boxes = torch.cat([corners, corners + 8 + 20 * torch.rand(count, 2)], 1)
            shape = (height, width)
            sample = DetDataSample(
                metainfo=dict(
                    img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0)
                )
            )
            sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(0, 6, (count,)))
            samples.append(sample)
        return torch.randn(len(samples), 3, height, width), samples

    return make
