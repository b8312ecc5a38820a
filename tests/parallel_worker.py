"""What test_distributed runs in one process and in each of two, whose children import it."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from relssl import distributed
from relssl.methods import PRESETS

CASES = {
    "ressl": replace(
        PRESETS["ressl"]["digits"], dim=16, hidden=32, queue_size=40, crops=2, info_nce_epochs=1
    ),
    "sacc": replace(PRESETS["sacc"]["digits"], dim=16, clusters=10),
    "sacc with a queue": replace(PRESETS["sacc"]["digits"], dim=16, clusters=10, queue_size=40, sigma=0.5),
}
STEPS, BATCH = 2, 16


def without_batch_norm(module):
    """BatchNorm sees each process's share alone, so with it gradients could not be equal."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)


class FixedView(nn.Module):
    """An augmentation that draws nothing: a blend of an image with its mirror image."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, images):
        x = images.double() / 255 - 0.5
        return torch.lerp(x, x.flip(3), self.share)


def steps(case):
    """Gradients of every step, the parameters' and the queue's end, of this process."""
    torch.manual_seed(0)
    method = CASES[case].build(torch.zeros(3), torch.ones(3)).double().train()
    without_batch_norm(method)
    method.weak = FixedView(0.1)
    strong = [FixedView(0.3), FixedView(0.4)]
    method.strong = nn.ModuleList(strong) if case == "ressl" else strong[0]
    method.epoch = 0.5
    forward = distributed.parallel(method, unused=False)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    everything = torch.randint(0, 256, (STEPS, BATCH, 3, 16, 16), dtype=torch.uint8)
    found = {}
    for step, images in enumerate(everything):
        loss, _ = forward(images.chunk(distributed.world())[distributed.rank()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, p in method.named_parameters():
            if p.requires_grad:
                found[f"{step} {name}"] = p.grad.clone()
    if method.queue is not None:
        found["queue"] = method.queue.rows.clone()
    return found


def both(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save({case: steps(case) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
