"""What test_restart runs in several processes: relssl with faults or without, and a sharded module."""

import itertools
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from relssl import sharded_checkpoint
from relssl.cli import main, train_config
from relssl.datasets.loading import Loader
from relssl.methods.sacc import SACC
from relssl.train import train

# 7 steps an epoch; checkpoints after steps 2, 4, 6, 7 (the epoch's last), 8, 10 ...
SETTINGS = ["--data", "digits", "--batch-size", "256", "--dim", "16", "--queue-size", "64", "--epochs", "2"]
SETTINGS += ["--schedule", "constant", "--eval-every", "1", "--save-every", "2"]


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


class Sharded(nn.Module):
    """A stand-in for a sharded queue: its state has a DTensor, of which each process holds a part."""

    def __init__(self, world_size, value):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("whole", value)
        self.world_size = world_size
        if world_size > 1:
            self.mesh = init_device_mesh("cpu", (world_size,))
            self.register_state_dict_post_hook(self.shard)
            self.register_load_state_dict_pre_hook(self.gather)

    @staticmethod
    def shard(self, state, *_):
        state["whole"] = distribute_tensor(state["whole"], self.mesh, [Shard(0)])

    @staticmethod
    def gather(self, state, *_):
        assert isinstance(state["whole"], DTensor)
        self.read = len(state["whole"].to_local())
        state["whole"] = state["whole"].full_tensor()


ROWS = torch.arange(14.0).view(7, 2)


def both(rank, world_size, folder):
    """Trains without a fault, and saves and loads a sharded module."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    train(train_config("sacc", [*SETTINGS, "--out", f"{folder}/whole"]))
    module = Sharded(world_size, ROWS.clone())
    nn.init.constant_(module.linear.weight, rank + 1)
    sharded_checkpoint.save(Path(folder) / "sharded", module, lambda path: (path / "more").touch())
    dist.barrier()
    again = Sharded(world_size, torch.zeros_like(ROWS))
    sharded_checkpoint.load(Path(folder) / "sharded", again)
    assert again.read == [4, 3][rank] and torch.equal(again.whole, ROWS)
    assert again.linear.weight.unique().tolist() == [1.0]  # rank 0's
    dist.destroy_process_group()


if __name__ == "__main__":
    faults, start = FAULTS[os.environ["FAULTS"]], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    for rank, what in faults[start : start + 1]:
        if rank == int(os.environ["RANK"]):
            at_call(*what)
    sys.argv[1:1] = ["train", "sacc", *SETTINGS]
    main()
