"""One of three processes in which test_scaling counts collectives and flop; child processes import it."""

import torch
import torch.distributed as dist
from torch.profiler import profile

from relssl import FeatureQueue, groups
from relssl.functional import cluster_loss, info_nce, nt_xent, relation_loss

PROCESSES, BATCH, QUEUE, DIM, VIEWS, CLUSTERS = 3, 4, 24, 8, 2, 5


def counted(run):
    """Returns the collectives that run() calls, with the bytes of a tensor or chunk, and its flop."""
    calls, own = [], (groups.all_gather_single, dist.all_to_all_single, dist.all_reduce)

    def all_gather(out, rows, group=None):
        calls.append(("all_gather", rows.nbytes))
        return own[0](out, rows, group=group)

    def all_to_all(out, rows, *splits, group=None):
        calls.append(("all_to_all", rows.nbytes // PROCESSES))
        return own[1](out, rows, *splits, group=group)

    def all_reduce(value, group=None):
        calls.append(("all_reduce", value.nbytes))
        return own[2](value, group=group)

    groups.all_gather_single, dist.all_to_all_single, dist.all_reduce = all_gather, all_to_all, all_reduce
    try:
        with profile(record_shapes=True) as profiled:  # FlopCounterMode sees an op of relssl as a whole.
            run()
    finally:
        groups.all_gather_single, dist.all_to_all_single, dist.all_reduce = own
    return calls, sum(flop(e) for e in profiled.events() if e.name in ("aten::mm", "aten::addmm_"))


def flop(event):
    """Returns the flop of a product, whose matrices are the last two of its arguments."""
    a, b = [shape for shape in event.input_shapes if len(shape) == 2][-2:]
    return 2 * a[0] * a[1] * b[1]


def count(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    found, how = {}, {"backend": "chunked"}
    for ids in (None, torch.arange(BATCH)):
        k, q = torch.randn(BATCH, DIM), torch.randn(VIEWS, BATCH, DIM, requires_grad=True)
        kept = {"dtype": torch.bfloat16, "ids": ids is not None}
        queues = {"replicated": FeatureQueue(QUEUE, DIM, **kept)}
        queues["sharded"] = FeatureQueue(QUEUE, DIM, **kept, sharded=True)
        for name, queue in queues.items():
            runs = {
                "enqueue": lambda queue=queue, k=k, ids=ids: queue.enqueue(k, ids),
                "relation": lambda queue=queue, q=q, k=k, ids=ids: relation_loss(
                    q, k, queue, ids=ids, **how
                ).backward(),
                "info_nce": lambda queue=queue, q=q, k=k, ids=ids: info_nce(
                    q, k, queue, ids=ids, **how
                ).backward(),
            }
            for run in runs:
                found[name, run, ids is not None] = counted(runs[run])
    z = torch.randn(2, BATCH, DIM, requires_grad=True)
    p = torch.randn(2, BATCH, CLUSTERS).softmax(-1).requires_grad_()
    everyone = dist.group.WORLD
    found["nt_xent"] = counted(lambda: nt_xent(*z, group=everyone, **how).backward())
    found["cluster_loss"] = counted(lambda: cluster_loss(*p, group=everyone).backward())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
