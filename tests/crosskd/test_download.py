"""Published checkpoints: found by the config's name, downloaded once, never used with another hash."""

from __future__ import annotations

import re
from pathlib import Path

import mmdet
import pytest
import yaml

from crosskd.download import fetched_checkpoint, local_weights, published_checkpoint, published_url
from deploy.errors import CheckpointError, ConfigError
from deploy.files import sha256_of

CONFIGS = Path(__file__).parents[2] / "configs"
TRAINED_BY_THE_USER = {"swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"}  # mmdet publishes no weights of it
GFL_R101 = (
    "https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r101_fpn_mstrain_2x_coco/"
    "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CROSSKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A file whose name ends in its hash, as those of mmdet's checkpoints do."""
    content = tmp_path / "content"
    content.write_bytes(b"weights " * 100_000)
    return content.rename(tmp_path / f"gfl_r50_fpn_1x_coco_20200629-{sha256_of(content)[:8]}.pth")


def test_each_teacher_of_the_configs_is_a_published_one() -> None:
    weights = {}
    for metafile in (Path(mmdet.__file__).parent / ".mim" / "configs").glob("*/metafile.yml"):
        entries = yaml.load(metafile.read_text(), yaml.CSafeLoader)
        for entry in entries["Models"] if isinstance(entries, dict) else entries:
            weights[entry.get("Config", "").removeprefix("configs/")] = entry.get("Weights")
    teachers = {}
    for path in CONFIGS.glob("crosskd_*_coco.py"):
        match = re.search(r'teacher=dict\(\s*config="mmdet::(.+?)",\s*checkpoint=(?:None|"(.+?)"),', path.read_text())
        if match is not None:  # those with PKD inherit the teacher of those without
            teachers[match[1]] = match[2]
    assert len(teachers) >= 6
    assert {name for name in teachers if weights.get(name) is None} == TRAINED_BY_THE_USER
    assert {name: url for name, url in teachers.items() if url != weights.get(name)} == {}


def test_the_weights_of_a_config_are_those_of_its_metafile() -> None:
    assert published_url("mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py") == GFL_R101


@pytest.mark.parametrize("name", ["mmdet::gfl/gfl_r34_fpn_1x_coco.py", "teacher.py"])
def test_a_config_without_published_weights_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no weights for {name}; give --teacher-checkpoint"):
        published_url(name)


def test_a_checkpoint_is_downloaded_once(served: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosskd.download.published_url", lambda _name: served.as_uri())
    path = published_checkpoint("mmdet::gfl/gfl_r50_fpn_1x_coco.py")
    assert path == cache / served.name
    assert path.read_bytes() == served.read_bytes()
    served.unlink()
    assert published_checkpoint("mmdet::gfl/gfl_r50_fpn_1x_coco.py") == path
    assert list(cache.iterdir()) == [path]


def test_what_has_another_hash_is_not_kept(served: Path, cache: Path) -> None:
    served.write_bytes(b"<html>Please log in</html>")
    with pytest.raises(CheckpointError, match=r"not the published file \(.*got .*\); it was not kept"):
        fetched_checkpoint(served.as_uri())
    assert list(cache.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_not_used(served: Path) -> None:
    path = fetched_checkpoint(served.as_uri())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{path} is damaged: .*Delete it"):
        fetched_checkpoint(served.as_uri())


def test_without_a_network_it_says_where_the_file_belongs(served: Path, cache: Path) -> None:
    url = served.as_uri()
    served.rename(served.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match=rf"cannot download {url} \(.*\). Without a network: .*{served.name}"):
        fetched_checkpoint(url)
    assert list(cache.iterdir()) == []
    served.with_name("elsewhere").rename(cache / served.name)  # as the message says
    assert fetched_checkpoint(url) == cache / served.name


def test_a_name_without_a_hash_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"ddq_detr_swinl_30e.pth cannot be checked: expected a name that ends in"
    ):
        fetched_checkpoint("https://download.openmmlab.com/mmdetection/v3.0/ddq/ddq_detr_swinl_30e.pth")


def test_weights_are_named_by_a_file_an_address_a_config_or_as_published(
    served: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("crosskd.download.published_url", lambda name: asked.append(name) or served.as_uri())
    assert local_weights("runs/teacher/detector.pth") == "runs/teacher/detector.pth"
    assert local_weights(served.as_uri()) == str(cache / served.name)
    assert local_weights("published", "mmdet::gfl/a.py") == local_weights("mmdet::gfl/b.py", "c.py")
    assert asked == ["mmdet::gfl/a.py", "mmdet::gfl/b.py"]
    assert local_weights("https://example.com/any.pth", only_with_hash=True) == "https://example.com/any.pth"


def test_a_short_address_is_one_that_mmengine_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosskd.download.fetched_checkpoint", lambda url: url)
    assert local_weights("torchvision://resnet18") == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    with pytest.raises(ConfigError, match=r"there are no weights torchvision://resnet17; expected one of .*resnet18"):
        local_weights("torchvision://resnet17")


def test_what_torch_has_downloaded_already_is_taken(
    served: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    kept = served.rename(tmp_path / "torch" / "hub" / "checkpoints" / served.name)
    assert fetched_checkpoint(f"https://example.com/{served.name}") == kept
    assert not cache.exists()
