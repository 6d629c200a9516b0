"""
Two processes on the CPU, started by torchrun's own launcher from forks of the process of the tests, so that the
packages are imported once.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from crosskd import distill, train
from crosskd.loop.distributed import is_first_process, joined_processes, process_count
from crosskd.loop.hooks import StudentEMAHook
from crosskd.models.checkpoint import read_checkpoint
from deploy.contract import read_sidecar
from deploy.errors import ConfigError

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="gloo on CPUs; forked processes have no GPU"),
    pytest.mark.usefixtures("unformatted_configs"),
]


def _torchrun(work: Callable[[], int]) -> int:
    """The exit status of `torchrun --nproc-per-node 2` on processes that exit with what `work` returns."""

    def worker() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a process that is not forked has no handler of the launcher's
        torch.set_num_threads(1)  # the pool of threads of the parent is not there
        raise SystemExit(work())

    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", monitor_interval=0.1, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test",
    )  # fmt: skip
    gc.freeze()  # or each collection in the child would touch, and copy, all that it shares with this process
    child = os.fork()
    if child == 0:
        status = 1
        try:
            elastic_launch(launch, worker)()
            status = 0
        except ChildFailedError:
            pass
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    gc.unfreeze()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def _gradients(model: nn.Module, inputs: torch.Tensor, samples: list[Any]) -> dict[str, torch.Tensor]:
    detector = model.module if isinstance(model, DistributedDataParallel) else model
    total, _ = detector.parse_losses(model(inputs, samples, mode="loss"))
    total.backward()
    return {name: parameter.grad for name, parameter in detector.named_parameters() if parameter.grad is not None}


def _gradients_of_two(detector: nn.Module, batches: list[tuple[Any, Any]], folder: Path) -> dict[str, torch.Tensor]:
    """The gradients after two processes have each taken one of `batches`; both must have the same."""

    def work() -> int:
        with joined_processes():
            rank = int(os.environ["RANK"])
            torch.save(_gradients(DistributedDataParallel(detector), *batches[rank]), folder / f"{rank}.pth")
        return 0

    assert _torchrun(work) == 0
    first, second = (torch.load(folder / f"{rank}.pth") for rank in (0, 1))
    assert _equal(first, second)
    return first


def _with_fixed_norms(detector: nn.Module) -> nn.Module:
    """In training mode but for the norms, which otherwise pool over the batch of a process."""
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return detector


def _assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-4 * value.norm() + 1e-7, key


def test_two_processes_have_the_gradients_of_one_with_both_batches(
    build: Callable[..., Any], make_batch: Callable[..., Any], tmp_path: Path
) -> None:
    detector = _with_fixed_norms(build("gfl_tiny.py"))
    nn.init.zeros_(detector.bbox_head.gfl_cls.bias)  # scores of a half: averaging factors above their floor of 1
    inputs, samples = make_batch([4, 1, 2, 5])
    found = _gradients_of_two(detector, [(inputs[:2], samples[:2]), (inputs[2:], samples[2:])], tmp_path)
    _assert_close(found, _gradients(detector, inputs, samples))


@pytest.mark.parametrize("method", ["crosskd+pkd", "mimic"])
def test_distilled_terms_are_not_counted_twice(
    method: str, build: Callable[..., Any], make_batch: Callable[..., Any], tmp_path: Path
) -> None:
    # What is pooled in each process is the same for the same batch, so two of them are as one.
    detector = _with_fixed_norms(build("crosskd_tiny.py", {"model.distill.method": method}))
    batch = make_batch([4, 1])
    _assert_close(_gradients_of_two(detector, [batch, batch], tmp_path), _gradients(detector, *batch))


def _words(configs: Path, shapes_dir: Path, teacher_run: Path) -> list[str]:
    words = [str(configs / "crosskd_tiny.py"), "--data", str(shapes_dir), "--epochs", "3", "--ema", "0.1"]
    words += ["--teacher-checkpoint", str(teacher_run / "detector.pth"), "--set", "train_cfg.val_interval=9"]
    # Two steps an epoch, three to a step of the optimiser: the first epoch ends in the middle of an accumulation.
    words[1:1] = ["--accumulate", "3"]
    return [*words, "train_dataloader.batch_size=2"]


def test_a_run_of_two_processes_writes_what_a_run_of_one_does_and_is_resumed(
    configs: Path, shapes_dir: Path, teacher_run: Path, tmp_path: Path
) -> None:
    words, run_dir = _words(configs, shapes_dir, teacher_run), tmp_path / "run"

    def distilled(extra: list[str], kill_at: int | None = None) -> int:
        rank = os.environ["RANK"]
        run_iter, train_runner = EpochBasedTrainLoop.run_iter, Runner.train

        def killed_iter(loop: Any, index: int, batch: Any) -> None:
            if loop.iter == kill_at and rank == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            run_iter(loop, index, batch)

        def kept_train(runner: Runner) -> None:
            train_runner(runner)
            (average,) = (hook for hook in runner.hooks if isinstance(hook, StudentEMAHook))
            live = average.ema_model.module  # the two have changed places
            torch.save([runner.model.module.student.state_dict(), live.state_dict()], tmp_path / f"rank{rank}.pth")

        EpochBasedTrainLoop.run_iter, Runner.train = killed_iter, kept_train
        with (tmp_path / f"stdout{rank}").open("w") as file, contextlib.redirect_stdout(file):
            return distill.main([*words, *extra])

    assert _torchrun(lambda: distilled(["-o", str(run_dir)])) == 0
    state = torch.load(run_dir / "student.pth", weights_only=True)["state_dict"]
    (averaged, live), of_second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    assert _equal(averaged, of_second[0])
    assert _equal(live, of_second[1])
    assert _equal(state, averaged)
    assert not _equal(state, live)
    checkpoint = read_checkpoint(run_dir / "epoch_3.pth")["state_dict"]
    assert _equal(checkpoint, {f"student.{key}": value for key, value in averaged.items()})
    details = read_sidecar(run_dir / "student.pth")["details"]
    assert (details["processes"], details["iterations"]) == (2, 6)  # 8 images, 2 x 2 in a step
    assert "wrote " in (tmp_path / "stdout0").read_text()
    assert (tmp_path / "stdout1").read_text() == ""
    assert len([path for path in run_dir.iterdir() if path.is_dir()]) == 1  # mmengine's, named by the time
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "train", "train", "val"]

    resumed = ["-o", str(tmp_path / "resumed")]
    assert _torchrun(lambda: distilled(resumed, kill_at=3)) == 1
    assert _torchrun(lambda: distilled([*resumed, "--resume"])) == 0
    again = torch.load(tmp_path / "resumed" / "student.pth", weights_only=True)["state_dict"]
    assert _equal(again, state)


def test_an_error_of_one_process_ends_the_other(
    configs: Path, shapes_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        run_iter = EpochBasedTrainLoop.run_iter

        def failing_iter(loop: Any, index: int, batch: Any) -> None:
            if not is_first_process():
                raise ConfigError("the second process cannot go on")
            run_iter(loop, index, batch)  # waits for the other's gradients

        EpochBasedTrainLoop.run_iter = failing_iter
        return train.main([str(configs / "gfl_tiny.py"), "--data", str(shapes_dir), "-o", str(tmp_path / "run")])

    began = time.monotonic()
    assert _torchrun(work) == 1
    assert time.monotonic() - began < 25  # gloo itself would wait for half an hour
    assert "error: the second process cannot go on" in capfd.readouterr().err


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined_processes():
        assert not torch.distributed.is_initialized()
        assert (process_count(), is_first_process()) == (1, True)


def test_several_processes_without_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 4, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        joined_processes().__enter__()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "2"), ("LOCAL_RANK", "2"), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="more than 2 processes on this machine, which has 2 GPUs"):
        joined_processes().__enter__()
