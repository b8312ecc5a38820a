"""The state of a sharded queue: its layout in a checkpoint, and how it is dealt to other processes.

In a checkpoint the shards lie one after another, each with its oldest row first, as a DTensor over the
processes: `rows` [K, D], `ids` [K] and `written` [K], whether a row is none of the start; and `num_shards`.
The queue has attributes of these names, which torch.distributed.checkpoint's get_model_state_dict looks up.

The position of a row in its shard, counted from the newest, is its age. Other numbers of processes get the
rows in the order of their ages, in turn, so that every new shard has rows of all ages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from relssl.backends.sharded import shard_rows
from relssl.groups import Group, all_to_all

if TYPE_CHECKING:
    from relssl.queue import FeatureQueue


def shard_sizes(size: int, shards: int) -> list[int]:
    """Returns the numbers of rows of the shards, as torch.chunk and DTensor divide them."""
    largest = shard_rows(size, shards)
    return [max(0, min(largest, size - rank * largest)) for rank in range(shards)]


def by_age(size: int, shards: int) -> Tensor:
    """Returns the indices [K] of all rows, the oldest of each shard first, in the order of their ages."""
    sizes = shard_sizes(size, shards)
    ages = torch.cat([torch.arange(own).flip(0) for own in sizes])
    return ages.argsort(stable=True)  # Of one age, those of the first shard come first.


def deal(block: Tensor, size: int, was: int, group: Group) -> Tensor:
    """Returns the rows of this process's shard for a block of a queue that was divided into `was` shards.

    block: this process's share of the old order, as large as its shard.
    """
    now, rank = group.size, group.rank
    if was == now:
        return block
    sources = torch.empty(size, dtype=torch.int64)  # For each row of the new order its index in the old one.
    sources[by_age(size, now)] = by_age(size, was)
    wanted = sources.split(shard_sizes(size, now))
    if now == 1:
        return block[wanted[0].to(block.device)]
    per_rank = shard_rows(size, now)
    held = [indices[indices // per_rank == rank] - rank * per_rank for indices in wanted]
    holders = wanted[rank] // per_rank
    counts = torch.bincount(holders, minlength=now).tolist()
    sent = block[torch.cat(held).to(block.device)]
    received = all_to_all(sent, group, [len(indices) for indices in held], counts)
    rows = torch.empty_like(block)
    rows[holders.argsort(stable=True).to(block.device)] = received
    return rows


def state(queue: FeatureQueue) -> dict[str, Tensor]:
    """Returns the state of a sharded queue; its tensors are DTensors where there are several processes."""
    local = {"rows": queue.rows, "written": queue.written.to(torch.uint8)}
    if queue.ids is not None:
        local["ids"] = queue.ids
    pointer = int(queue.pointer)
    found = {name: _to_dtensor(t.roll(-pointer, 0), queue.size, queue.group) for name, t in local.items()}
    return found | {"num_shards": torch.tensor(queue.num_shards)}


def load(
    queue: FeatureQueue,
    state_dict: dict[str, Any],
    prefix: str,
    missing_keys: list[str],
    error_msgs: list[str],
) -> dict[str, Any]:
    """Loads the state of a queue, sharded or not, into a sharded one; returns the rest of the state dict."""
    names = {"rows", "num_shards"} | ({"ids"} if queue.ids is not None else set())
    names |= {"written"} if f"{prefix}num_shards" in state_dict else {"pointer", "count"}
    rest = {key: t for key, t in state_dict.items() if key.removeprefix(prefix) not in names}
    # Sorted: every process must deal them in the same order, and a set's order is the process's own.
    given = {name: state_dict[prefix + name] for name in sorted(names) if prefix + name in state_dict}
    missing = sorted(prefix + name for name in names - given.keys() - {"num_shards"})
    expected = {"rows": (queue.size, queue.rows.shape[1]), "ids": (queue.size,), "written": (queue.size,)}
    wrong = [name for name in given if name in expected and tuple(given[name].shape) != expected[name]]
    for name in wrong:
        shape = tuple(given[name].shape)
        error_msgs.append(f"size mismatch for {prefix}{name}: {shape} instead of {expected[name]}.")
    missing_keys.extend(missing)
    if queue.rows.is_meta:
        error_msgs.append(f"{prefix}rows is on the meta device: call to_empty first.")
    if missing or wrong or queue.rows.is_meta:
        return rest
    was = int(given.pop("num_shards", 1))
    if "pointer" in given:  # A queue that is not sharded.
        pointer, count = int(given.pop("pointer")), int(given.pop("count"))
        given = {name: t.roll(-pointer, 0) for name, t in given.items()}
        given["written"] = (torch.arange(queue.size) >= queue.size - count).to(torch.uint8)
    device = queue.rows.device
    blocks = {name: _to_local(t, queue.group).to(device) for name, t in given.items()}
    dealt = {name: deal(block, queue.size, was, queue.group) for name, block in blocks.items()}
    written = dealt.pop("written")
    order, count = written.argsort(stable=True), int(written.sum())
    queue._make_writable()
    with torch.no_grad():
        for name, t in dealt.items():  # Those not written come first, and belong behind the others.
            getattr(queue, name).copy_(t[order].roll(count, 0) if count < len(t) else t)
        queue.pointer.fill_(count % len(written))
        queue.count.fill_(count)
    return rest


def _to_dtensor(local: Tensor, size: int, group: Group) -> Tensor:
    """Returns the DTensor of which `local` is this process's share; with one process, `local` itself."""
    if group.size == 1:
        return local
    # An import of half a second, which checkpoints alone need.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group.handle or dist.group.WORLD, local.device.type)  # type: ignore
    shape = torch.Size((size, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _to_local(state: Any, group: Group) -> Tensor:
    """Returns this process's share of a DTensor, or of a whole tensor."""
    if hasattr(state, "to_local"):
        return state.to_local()
    largest = shard_rows(len(state), group.size)
    return state[group.rank * largest :][:largest]
