from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import errors, jetpack, machine
from deploy.errors import MissingDependencyError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ((32, 7, 4), "4"), ((35, 1, 0), "5.0"), ((35, 4, 1), "5.1"), ((35, 6, 2), "5.1"), ((36, 3, 0), "6.0"),
        ((36, 4, 0), "6.1, 6.2"), ((36, 5, 0), "6.1, 6.2"), ((38, 2, 0), "7.0, 7.1"), ((38, 4, 0), "7.0, 7.1"),
        ((39, 2, 0), "7.2"),
    ],
)  # fmt: skip
def test_the_jetpack_of_a_release(release: tuple[int, int, int], name: str) -> None:
    found = jetpack.jetpack_of(machine.L4tRelease(*release))
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("release", [(21, 5, 0), (33, 0, 0), (37, 1, 0), (40, 0, 0)])
def test_a_release_of_no_known_jetpack(release: tuple[int, int, int]) -> None:
    assert jetpack.jetpack_of(machine.L4tRelease(*release)) is None


@pytest.mark.parametrize(
    ("cuda", "requirement"),
    [
        ((11, 4), "cuda-python==11.8.*"), ((12, 2), "cuda-python==12.2.*"), ((12, 6), "cuda-python==12.6.*"),
        ((12, 7), "cuda-python==12.6.*"), ((12, 9), "cuda-python==12.9.*"), ((13, 0), "cuda-python==13.*"),
    ],
)  # fmt: skip
def test_a_driver_is_given_a_cuda_python_that_it_runs(cuda: tuple[int, int], requirement: str) -> None:
    assert jetpack.cuda_python_for(cuda) == requirement


def test_only_a_jetson_of_no_known_jetpack_is_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for release, said in ((None, False), (machine.L4tRelease(36, 4, 3), False), (machine.L4tRelease(51, 0, 0), True)):
        monkeypatch.setattr(jetpack, "l4t_release", lambda release=release: release)
        words = jetpack.unknown_jetpack()
        assert (words is not None) == said
        assert not said or "Jetson Linux 51.0.0 belongs to no JetPack" in str(words)


def test_the_advice_for_a_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetpack, "l4t_release", lambda: None)
    assert jetpack.install_cuda_binding() == "pip install cuda-python (or pycuda)"
    assert jetpack.install_cuda_binding((13, 1)) == "pip install cuda-python (or pycuda)"
    assert jetpack.install_cuda_binding((12, 4)) == "pip install 'cuda-python==12.4.*' (or pycuda)"
    assert jetpack.gpu_check() == "nvidia-smi"
    monkeypatch.setattr(jetpack, "l4t_release", lambda: machine.L4tRelease(36, 4, 3))
    assert jetpack.install_cuda_binding((12, 6)) == "pip install 'cuda-python==12.6.*' (or pycuda)"
    assert jetpack.gpu_check() == "sudo tegrastats"


def test_every_line_that_works_says_what_to_install_and_where_it_was_read() -> None:
    for row in jetpack.JETPACKS:
        assert row.sources
        assert all(source.startswith("https://") for source in row.sources)
        assert bool(row.install) != row.works.startswith("nothing")
    starts = [row.l4t for row in jetpack.JETPACKS]
    assert starts == sorted(starts)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(starts))


def test_the_page_has_the_table() -> None:
    assert jetpack.table() in (ROOT / "docs" / "ship-to-a-jetson.md").read_text(encoding="utf-8")


def test_the_extra_for_jetpack_6_has_the_pin_of_its_line() -> None:
    (pin,) = {row.install[0].split("'")[1] for row in jetpack.JETPACKS if row.name.startswith("6")}
    (extra,) = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("jetpack6 = ")]
    assert f'"{pin}"' in extra


def test_where_pip_refuses_a_missing_package_says_the_environment_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "is_externally_managed", lambda: True)
    message = str(MissingDependencyError("onnx", "a test", "pip install onnx"))
    assert message.endswith(
        "Do: python3 -m venv --system-site-packages env && . env/bin/activate (this Python belongs to the system, "
        "PEP 668), then: pip install onnx"
    )


def test_pip_is_known_to_refuse_by_the_marker_of_pep_668(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert not machine.is_externally_managed()
    (tmp_path / "EXTERNALLY-MANAGED").write_text("[externally-managed]\n")
    assert machine.is_externally_managed()
    monkeypatch.setattr(sys, "prefix", "/an/environment")
    assert not machine.is_externally_managed()


def test_it_is_read_without_any_package() -> None:
    words = [sys.executable, "-S", "-c", "from deploy.jetpack import table; print(table())"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "cuda-python==12.6.*" in done.stdout
