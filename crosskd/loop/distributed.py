"""
Training in several processes, as torchrun starts them: `torchrun --nproc-per-node 2 -m crosskd.distill ...`.

torchrun gives each process RANK, LOCAL_RANK, WORLD_SIZE and a rendezvous, on one node or on several. Every process
reads the same arguments, and the data and RUN_DIR under the same paths. The first process, rank 0, writes all files
and prints; the others are silent, errors excepted.

A process that fails ends with its own message; torchrun sees that at once, ends the others, which may be waiting for it
in a reduction, and exits with status 1.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator

from deploy.errors import ConfigError
from deploy.errors import is_first_process as is_first_process  # which all who write files ask


def process_count() -> int:
    """How many processes train together; 1 unless torchrun started more."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
    """
    Joins the processes that torchrun started into a group for the block: NCCL with a GPU each, else gloo.

    Does nothing in a run of one process. After an error the group is left as it is, since leaving it in good order
    would wait for the others.

    Raises:
        ConfigError: there are more processes on this machine than GPUs, or torchrun's variables are incomplete.
    """
    if process_count() == 1:
        yield
        return
    missing = sorted({"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ))
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {process_count()}, but {', '.join(missing)} is not set; start several processes with "
            "torchrun, or unset WORLD_SIZE for one"
        )
    import torch

    gpus = torch.cuda.device_count()
    if gpus:
        if local_rank() >= gpus:
            raise ConfigError(
                f"torchrun started more than {gpus} processes on this machine, which has {gpus} GPUs; give it "
                f"--nproc-per-node {gpus}"
            )
        torch.cuda.set_device(local_rank())
    # Time for what the first process does alone, calibration above all; torchrun itself sees one that ends.
    torch.distributed.init_process_group("nccl" if gpus else "gloo", timeout=datetime.timedelta(hours=2))
    with contextlib.ExitStack() as stack:
        if not is_first_process():
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield
    gc.collect()  # a wrapped detector is a cycle, and its threads would abort the process if the group went before it
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if process_count() > 1:
        import torch

        torch.distributed.barrier()


@contextlib.contextmanager
def first_of_each_machine_first() -> Iterator[None]:
    """
    Lets one process of each machine run the block, then the others: what it downloads is then there already.
    """
    if local_rank() > 0:
        wait_for_all()
    yield
    if local_rank() == 0:
        wait_for_all()
