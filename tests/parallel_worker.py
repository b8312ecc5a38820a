"""The code that test_distributed runs in one process and in each of two; child processes import it."""

import contextlib
import math
import signal
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from relssl import FeatureQueue, distributed
from relssl.gradients import Encoder, Gradients
from relssl.methods import PRESETS
from relssl.methods.sacc import SACC, SACCConfig
from relssl.train import train

CASES = {
    "ressl": replace(
        PRESETS["ressl"]["digits"], dim=16, hidden=32, queue_size=40, crops=2, info_nce_epochs=1
    ),
    "sacc": replace(PRESETS["sacc"]["digits"], dim=16, clusters=10),
    "sacc with a queue": replace(PRESETS["sacc"]["digits"], dim=16, clusters=10, queue_size=40, sigma=0.5),
    "moco": replace(PRESETS["moco"]["digits"], dim=16, hidden=32, queue_size=40),
    "simclr": replace(PRESETS["simclr"]["digits"], dim=16, queue_size=40),
    "cc": replace(PRESETS["cc"]["digits"], dim=16, clusters=10),
}
for case in ("ressl", "sacc with a queue"):
    CASES[f"{case} without own"] = replace(CASES[case], exclude_own=True)
    CASES[f"{case}, sharded"] = replace(CASES[case], exclude_own=True, shard_queue=True)
STEPS, BATCH = 2, 16
PARTS = 1, 2, 4  # which a process divides its share of a batch into


def without_batch_norm(module):
    """Removes BatchNorm, whose statistics of each process's share would make gradients differ."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)


class FixedView(nn.Module):
    """An augmentation without random numbers: a blend of an image with its mirror image."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, images):
        x = images.double() / 255 - 0.5
        return torch.lerp(x, x.flip(3), self.share)


def deal(queue):
    """Gives each process those rows of one process's start that its own keys overwrite, in their order."""
    world, rank = distributed.world_size(), distributed.rank()
    rows = FeatureQueue(queue.size, queue.rows.shape[1]).rows.double()
    overwritten = rows[: STEPS * BATCH].view(STEPS, world, BATCH // world, -1)[:, rank].flatten(0, 1)
    queue.rows.copy_(torch.cat((overwritten, rows[STEPS * BATCH :].chunk(world)[rank])))


def steps(case, parts=1):
    """Returns this process's gradients of every step and, if there is one, its final queue."""
    torch.manual_seed(0)
    method = CASES[case].build(torch.zeros(3), torch.ones(3)).double().train()
    without_batch_norm(method)
    method.weak = FixedView(0.1)
    strong = [FixedView(0.3), FixedView(0.4)]
    method.strong = nn.ModuleList(strong) if "ressl" in case else strong[0]
    method.epoch = 0.5
    if method.config.shard_queue:
        deal(method.queue)
    encoder = distributed.wrap_ddp(Encoder(method), find_unused_parameters=False)
    gradients = Gradients(method, encoder, parts)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    everything = torch.randint(0, 256, (STEPS, BATCH, 3, 16, 16), dtype=torch.uint8)
    found = {}
    for step, images in enumerate(everything):
        ids = (torch.arange(BATCH) + step) % BATCH  # The queue has those of the step before.
        images, ids = (t.chunk(distributed.world_size())[distributed.rank()] for t in (images, ids))
        optimizer.zero_grad()
        loss, logs = gradients.add(images, "joint", ids if method.config.exclude_own else None)
        optimizer.step()
        for name, p in method.named_parameters():
            if p.requires_grad:
                found[f"{step} {name}"] = p.grad.clone()
        found |= {f"loss {step}": distributed.all_reduce_mean(loss)}
        found |= {f"{name} {step}": distributed.all_reduce_mean(value) for name, value in logs.items()}
    if method.queue is not None:
        found |= {f"queue {name}": t.double() for name, t in method.queue.named_buffers()}
    return found


# 14 steps an epoch.
RUN = replace(
    CASES["sacc with a queue"], batch_size=128, epochs=1, schedule="constant", eval_every=0, device="cpu"
)


def build(config, mean, std):
    """Builds SACC without BatchNorm and random views, which any number of processes trains alike."""
    method = SACC(config, mean, std).double()
    without_batch_norm(method)
    method.weak, method.strong = FixedView(0.1), FixedView(0.3)
    return method


@contextlib.contextmanager
def at_step(step, act):
    """Uses SACC as built here, with act(loss) as the loss of the given step, counted from 1."""
    compute, made, calls = SACC.loss, SACCConfig.build, [0]

    def counted(self, *batch):
        loss, logs = compute(self, *batch)
        calls[0] += 1
        return (act(loss) if calls[0] == step else loss), logs

    SACC.loss, SACCConfig.build = counted, build
    try:
        yield
    finally:
        SACC.loss, SACCConfig.build = compute, made


def terminated(loss):
    signal.raise_signal(signal.SIGTERM)
    return loss


def ended(config, step, act):
    """Trains with act at a step; returns the exit status or the error message."""
    try:
        with at_step(step, act):
            train(config)
    except (SystemExit, FloatingPointError) as end:
        return end.code if isinstance(end, SystemExit) else str(end)
    return "at its end"


def runs(folder):
    """Trains in two processes: the second is stopped, or has a bad loss; and a resumed run."""
    mine = distributed.rank() == 1
    often = replace(RUN, out=folder / "often", save_every="2")
    return {
        "stopped": ended(replace(RUN, out=folder / "two"), 4 if mine else 0, terminated),
        "bad": ended(replace(RUN, out=folder / "bad"), 3 if mine else 0, lambda loss: loss * math.nan),
        "often": ended(often, 5 if mine else 0, lambda loss: loss * math.nan),
        "resumed": ended(replace(RUN, out=folder / "one", resume=True), 0, None),
    }


def both(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    found = {(case, parts): steps(case, parts) for case in CASES for parts in PARTS} | {
        "runs": runs(Path(folder))
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
