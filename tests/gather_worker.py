"""One of two processes in test_queue's test of all_gather; a module, since child processes import it."""

import torch
import torch.distributed as dist

from relssl import FeatureQueue


def gather(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    queue = FeatureQueue(7, 3, ids=True)
    found = {"start": queue.rows.clone()}
    for step in range(2):
        keys = torch.tensor([[rank, step, row] for row in range(2)]).float().requires_grad_()
        queue.enqueue(keys * 1, torch.arange(2) + 100 * rank + 10 * step)
    found |= {
        "rows": queue.rows.clone(),
        "ids": queue.ids.clone(),
        "requires_grad": queue.rows.requires_grad,
        "pointer": int(queue.pointer),
        "count": int(queue.count),
    }
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
