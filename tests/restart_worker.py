"""What test_restart runs in several processes: relssl with faults or without."""

import itertools
import os
import signal
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from relssl.cli import main, train_config
from relssl.datasets.loading import Loader
from relssl.methods.sacc import SACC
from relssl.train import train

# 7 steps an epoch; checkpoints after steps 2, 4, 6, 7 (the epoch's last), 8, 10 ...
SETTINGS = ["--data", "digits", "--batch-size", "256", "--dim", "16", "--queue-size", "64", "--epochs", "2"]
SETTINGS += ["--schedule", "constant", "--eval-every", "1", "--save-every", "2", "--shard-queue"]


def at_call(owner, name, number, act):
    """Makes the call of a method with this number, counted from 1, call act() before."""
    call, numbers = getattr(owner, name), itertools.count(1)

    def counted(*arguments, **options):
        if next(numbers) == number:
            act()
        return call(*arguments, **options)

    setattr(owner, name, counted)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def unreadable():
    raise ValueError("cannot read photos/cat.png")


# By name: the faults of each start of the processes, as rank and what at_call gets.
FAULTS = {
    "none": [],
    # In the second epoch, then after the data of a checkpoint has been written, before its index.
    "kills": [(1, (SACC, "loss", 10, kill)), (0, (dcp.FileSystemWriter, "finish", 1, kill))],
    "data": [(1, (Loader, "load", 3, unreadable))],  # the first is for the statistics, then one an epoch
    "SIGTERM": [(1, (SACC, "loss", 3, lambda: signal.raise_signal(signal.SIGTERM)))],
}


def undisturbed(rank, world_size, folder):
    """Trains without a fault."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    train(train_config("sacc", [*SETTINGS, "--out", f"{folder}/whole"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    faults, start = FAULTS[os.environ["FAULTS"]], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    for rank, what in faults[start : start + 1]:
        if rank == int(os.environ["RANK"]):
            at_call(*what)
    sys.argv[1:1] = ["train", "sacc", *SETTINGS]
    main()
