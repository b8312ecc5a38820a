"""A loop of your own with an encoder that FSDP2 shards over processes, or that DDP replicates.

    torchrun --standalone --nproc-per-node 2 examples/fsdp.py [--ddp] [--replicate-queue]

Student and teacher are each passed to torch.distributed.fsdp.fully_shard, and each process keeps its share of
the queue. Losses and queue take a process's own embeddings, which are ordinary tensors: nothing of relssl
depends on how the encoder is distributed. All four ways print the same losses, on CPUs and on GPUs.
"""

import argparse
import copy
import os

import torch
import torch.distributed as dist
from own_loop import strong, weak
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import relssl
from relssl.functional import relation_loss


def make_encoder(width: int = 64, depth: int = 2) -> nn.Sequential:
    """A small transformer, to which each row of pixels is a token.

    It has no BatchNorm, whose statistics of each process's images would reveal to the student which
    embeddings its teacher computed together.
    """
    blocks = [
        nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0, batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    return nn.Sequential(
        nn.Linear(8, width), *blocks, nn.LayerNorm(width), nn.Flatten(), nn.Linear(8 * width, 64)
    )


def shard(encoder: nn.Sequential) -> nn.Module:
    """Shards each block, and what is left: the parameters of one block at a time are gathered."""
    for block in encoder:
        if isinstance(block, nn.TransformerEncoderLayer):
            fully_shard(block)
    # By default the outermost module's parameters stay gathered from forward to backward, which a teacher
    # never has: in its moving average they would be whole, where the student's are shards.
    fully_shard(encoder, reshard_after_forward=True)
    return encoder


def local(parameter: Tensor) -> Tensor:
    """Returns this process's share of a parameter, all of it where it is replicated."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def train(steps: int = 50, ddp: bool = False, sharded_queue: bool = True) -> list[float]:
    """Trains, and returns the loss of each step, the mean over processes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    images = torch.from_numpy(load_digits().images).float().to(device) / 16  # [1797, 8, 8]
    torch.manual_seed(0)  # the same weights everywhere: unlike DDP, fully_shard does not send rank 0's
    encoder = make_encoder().to(device)
    frozen = copy.deepcopy(encoder).requires_grad_(False)
    student, teacher = (DistributedDataParallel(encoder), frozen) if ddp else (shard(encoder), shard(frozen))
    # "empty": without random rows, whose draw depends on how the queue is divided.
    queue = relssl.FeatureQueue(1024, 64, sharded=sharded_queue, start="empty", device=device)
    # fully_shard has replaced the parameters: the optimizer is created behind it.
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(0)  # the same batches everywhere; each process takes a part
    torch.manual_seed(1 + rank)  # other noise
    losses = []
    for step in range(steps):
        batch = images[torch.randperm(len(images), generator=order)[:128][rank::world_size]]
        # Before the student's forward pass, where the parameters of both are shards: each process averages
        # its own, without communication. From forward to backward FSDP may keep the student's gathered.
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                local(slow).lerp_(local(fast), 0.01)
            k = F.normalize(teacher(weak(batch)), dim=1)
        q = F.normalize(student(strong(batch)), dim=1)
        loss = relation_loss(q, k, queue)
        queue.enqueue(k)  # before backward: the gradient is computed already
        optimizer.zero_grad()
        loss.backward()  # FSDP and DDP average gradients: that of the whole batch
        optimizer.step()
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        losses.append(mean.item())
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {losses[-1]:.4f}")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ddp", action="store_true", help="replicate the encoder with DDP")
    parser.add_argument("--replicate-queue", action="store_true", help="keep the whole queue everywhere")
    options = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(ddp=options.ddp, sharded_queue=not options.replicate_queue)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
