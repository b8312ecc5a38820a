"""One of test_fsdp's two processes, a script: its arguments are a folder, its rank and their number."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from relssl import FeatureQueue
from relssl.functional import relation_loss

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import fsdp

SIZE = 10


class Model(nn.Module):
    """An encoder whose child is a sharded queue, beside a buffer that differs between processes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.queue = FeatureQueue(SIZE, 4, sharded=True, ids=True)
        self.register_buffer("rank", torch.tensor(float(dist.get_rank())))

    def forward(self, x):
        q = self.net(x)
        loss = relation_loss(q, q.detach(), self.queue)
        self.queue.enqueue(q.detach(), torch.arange(len(x)) + 100 * dist.get_rank())
        return loss


def trained(wrap):
    """Returns a wrapped model after two steps, in which each process enqueued four rows of its own."""
    torch.manual_seed(0)
    model = wrap(Model())
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        model(torch.randn(2, 4)).backward()
    return model


def content(queue):
    """Returns copies of the shard's rows and ids, the oldest first, and the count."""
    shift = -int(queue.pointer)
    return queue.rows.roll(shift, 0), queue.ids.roll(shift), queue.count.clone()


def reloaded(model, load):
    """Returns the content of another model's queue, with another start, that has loaded this one's state."""
    other = Model()
    other.queue.rows.zero_()
    fully_shard(other)
    load(other)
    assert torch.equal(other.net.weight.to_local(), model.net.weight.to_local())
    return content(other.queue)


def in_ddp():
    model = trained(DistributedDataParallel).module
    return {"rank": model.rank, "content": content(model.queue)}


def in_fsdp(folder):
    model = trained(fully_shard)
    state = model.state_dict()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    dcp.save({"model": state}, checkpoint_id=folder / "checkpoint")

    def load_checkpoint(other):
        found = {"model": other.state_dict()}
        dcp.load(found, checkpoint_id=folder / "checkpoint")
        other.load_state_dict(found["model"])

    def load_full(other):
        set_model_state_dict(other, full, options=StateDictOptions(full_state_dict=True))

    loads = {
        "load_state_dict": lambda other: other.load_state_dict(state),
        "set_model_state_dict": lambda other: set_model_state_dict(other, get_model_state_dict(model)),
        "set_model_state_dict of a full one": load_full,
        "torch.distributed.checkpoint": load_checkpoint,
    }
    found = {name: reloaded(model, load) for name, load in loads.items()}
    with torch.device("meta"):
        meta = fully_shard(Model())
    return found | {
        "content": content(model.queue),
        "deepcopy": content(copy.deepcopy(trained(lambda model: model).queue)),
        "full": full["queue.rows"],
        "double": content(model.to(torch.float64).queue),
        "from meta": meta.to_empty(device="cpu").queue.rows,
        "start": Model().queue.rows,
        "DTensors": sorted(name for name, t in state.items() if isinstance(t, DTensor)),
    }


if __name__ == "__main__":
    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    found = {
        ("losses", ddp, sharded): fsdp.train(20, ddp=ddp, sharded_queue=sharded)
        for ddp in (False, True)
        for sharded in (False, True)
    }
    found |= {
        "shares": [fsdp.local(p).numel() / p.numel() for p in fsdp.shard(fsdp.make_encoder()).parameters()]
    }
    torch.save(found | {"ddp": in_ddp(), "fsdp": in_fsdp(folder)}, folder / f"{rank}.pt")
    dist.destroy_process_group()
