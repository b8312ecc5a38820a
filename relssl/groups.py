"""Process groups, and the collectives of rows by which queues and losses use them.

torch.distributed does all of it. Tensors keep their dtypes, and nothing here has a gradient.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from relssl._compat import all_gather_single

Counts = list[tuple[int, ...]]
"""For each process of a group by rank the numbers that it gave."""

# The process groups that were given, by name in a Group and the other way round. torch's own names recur: a
# group may get that of one which was destroyed.
_groups: WeakValueDictionary[str, Any] = WeakValueDictionary()
_names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_numbers = itertools.count(1)

# The counts of the last exchange in this process, by group and purpose.
_last_counts: dict[tuple[str, str], tuple[tuple[int, ...], Counts]] = {}


@dataclass(frozen=True)
class Group:
    """A process group by a name, which modules can copy and ops can take; "" is the default group.

    The default group need not exist yet: until torch.distributed is initialised it has one process. Other
    names are those of this process alone.
    """

    name: str = ""

    @staticmethod
    def of(group: Any) -> "Group":
        """Returns the Group of a torch.distributed.ProcessGroup, or of None, the default group.

        Raises TypeError for anything else, such as new_group's result outside of the new group.
        """
        if isinstance(group, Group):
            return group
        if group is None:
            return Group()
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a process group of torch.distributed that contains this process, got"
                f" {group!r}"
            )
        if group is dist.group.WORLD:
            return Group()
        if group not in _names:
            name = str(next(_numbers))
            _names[group], _groups[name] = name, group
        return Group(_names[group])

    @property
    def handle(self) -> Optional["dist.ProcessGroup"]:
        """What torch.distributed takes as `group`. Raises RuntimeError if there is no such group any more."""
        if not self.name:
            return None
        if (group := _groups.get(self.name)) is None:
            raise RuntimeError("the process group has been destroyed, or is another process's")
        return group

    @property
    def size(self) -> int:
        if not self.name and not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.handle)

    @property
    def rank(self) -> int:
        """The rank of this process in the group."""
        if not self.name and not (dist.is_available() and dist.is_initialized()):
            return 0
        return dist.get_rank(self.handle)

    def counts(self, what: str, numbers: tuple[int, ...], like: Tensor, uneven: bool = False) -> Counts:
        """Returns the numbers of rows that each process has of `what`.

        They are exchanged where `uneven` and where `like` is on a CPU. Elsewhere, where an exchange waits for
        the device, they are only if they are others than in the last call for the same purpose.

        Raises ValueError, in every process, if they differ and are not `uneven`.
        """
        if torch.compiler.is_compiling():
            return [numbers] * self.size
        key = self.name, what
        own, last = _last_counts.get(key, ((), []))
        if uneven or like.is_cpu or own != numbers or len(last) != self.size:
            found = all_gather(torch.tensor([numbers], device=like.device), self)
            last = [tuple(row) for row in found.tolist()]
        if not uneven and any(other != last[0] for other in last):
            _last_counts.pop(key, None)
            rows = ", ".join(" + ".join(str(n) for n in other if n) or "0" for other in last)
            raise ValueError(f"{what} must have the same number of rows in every process, got {rows} by rank")
        _last_counts[key] = numbers, last
        return last


@torch.no_grad()
def all_gather(rows: Tensor, group: Group, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenates the rows [R, ...] of all processes by rank.

    counts: the number of rows of each process, if they differ.
    """
    size = group.size
    if size == 1:
        return rows
    if counts is None or len(set(counts)) == 1:
        found = rows.new_empty((size * rows.shape[0], *rows.shape[1:]))
        all_gather_single(found, rows.contiguous(), group=group.handle)
        return found
    # Backends gather equal numbers of rows: the largest.
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    blocks = all_gather(padded, group).split(max(counts))
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


@torch.no_grad()
def all_to_all(rows: Tensor, group: Group, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Sends the first send[0] rows to rank 0, the next ones to rank 1 and so on.

    Returns the rows of rank 0, of which there are receive[0], then those of rank 1 and so on.
    """
    if group.size == 1:
        return rows
    found = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(found, rows.contiguous(), list(receive), list(send), group=group.handle)
    return found


@torch.no_grad()
def all_reduce_sum(value: Tensor, group: Group) -> Tensor:
    """Returns the sum over all processes."""
    value = value.clone(memory_format=torch.contiguous_format)
    if group.size > 1:
        dist.all_reduce(value, group=group.handle)
    return value
