"""relssl::enqueue, the op that writes a batch into a queue's ring: rows, ids, pointer and count in one call.

It is one C++ call on a CPU, one launch of Triton on a GPU, and elsewhere some operations of torch. Dtypes,
shapes and devices have been checked.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from relssl import backends, ops
from relssl._compat import in_functorch_transform
from relssl.backends import cpu, launching
from relssl.backends.common import device_type, row_contiguous, to_dtype


def enqueue(
    rows: Tensor, ids: Tensor | None, pointer: Tensor, count: Tensor, keys: Tensor, key_ids: Tensor | None
) -> None:
    """Overwrites the oldest of rows [K, D] with keys [B, D], and their ids [K] with key_ids [B].

    Of more keys than rows the last K stay; pointer and count advance by all.
    """
    # torch.compile gets torch's operations, which it writes into the queue itself. For an op that mutates its
    # arguments AOT autograd makes copies of them, which only inductor removes again: of the whole queue.
    if torch.compiler.is_compiling() or in_functorch_transform():
        _by_torch(rows, ids, pointer, count, keys, key_ids)
    else:
        _op(rows, ids, pointer, count, keys, key_ids)


@ops.op(
    "enqueue(Tensor(a!) rows, Tensor(b!)? ids, Tensor(c!) pointer, Tensor(d!) count, Tensor keys,"
    " Tensor? key_ids) -> ()",
    lambda *arguments: None,
)
def _op(
    rows: Tensor, ids: Tensor | None, pointer: Tensor, count: Tensor, keys: Tensor, key_ids: Tensor | None
) -> None:
    run = _way(rows, ids, pointer, count)
    if run is not _by_cpu:  # C++ has a check of its own.
        for to, new in (rows, keys), (ids, key_ids):
            if to is not None and new is not None and _overlap(to, new):
                raise RuntimeError("keys or ids share memory with the queue: pass a clone")
    run(rows, ids, pointer, count, keys, key_ids)
    if run is not _by_torch:
        # Autograd, and the guard of a queue that changes before backward, see no write to an address.
        increment_version((rows, pointer, count) if ids is None else (rows, ids, pointer, count))


def _way(rows: Tensor, ids: Tensor | None, pointer: Tensor, count: Tensor) -> Any:
    """Returns the function for this device; torch's where load_state_dict has assigned other buffers."""
    if not rows.is_contiguous() or not pointer.dtype == count.dtype == torch.int64:
        return _by_torch
    if ids is not None and not (ids.is_contiguous() and ids.dtype == torch.int64):
        return _by_torch
    if rows.is_cpu and not launching.INTERPRETED:
        return _by_cpu if cpu._cpu else _by_torch
    unsupported = backends.BACKENDS["triton"].supports(device_type(rows), rows.dtype, rows.shape[1])
    return _by_torch if unsupported else _by_triton


def _by_torch(
    rows: Tensor, ids: Tensor | None, pointer: Tensor, count: Tensor, keys: Tensor, key_ids: Tensor | None
) -> None:
    size, total = len(rows), len(keys)
    keys = keys[-size:].to(rows.dtype)
    first = pointer + (total - len(keys))
    at = (first + torch.arange(len(keys), device=keys.device)) % size
    rows.index_copy_(0, at, keys)
    if ids is not None and key_ids is not None:
        ids.index_copy_(0, at, key_ids[-size:])
    pointer.add_(total).remainder_(size)
    count.add_(total).clamp_(max=size)


def _by_cpu(
    rows: Tensor, ids: Tensor | None, pointer: Tensor, count: Tensor, keys: Tensor, key_ids: Tensor | None
) -> None:
    (size, dim), width = rows.shape, rows.element_size()
    keys = row_contiguous(to_dtype(keys, rows.dtype))
    key_ids = None if key_ids is None else key_ids.contiguous()
    cpu._cpu.enqueue(
        rows.data_ptr(),
        size,
        dim * width,
        cpu._address(ids),
        pointer.data_ptr(),
        count.data_ptr(),
        keys.data_ptr(),
        keys.shape[0],
        keys.stride(0) * width,
        cpu._address(key_ids),
    )


def _by_triton(
    rows: Tensor, ids: Tensor | None, pointer: Tensor, count: Tensor, keys: Tensor, key_ids: Tensor | None
) -> None:
    if keys.dtype not in launching.DTYPE_NAMES:  # The kernel casts those; others are rounded as by torch.
        keys = keys.to(rows.dtype)
    key_ids = None if key_ids is None else key_ids.contiguous()
    with launching.device_guard(rows):
        launch = launching.cached_launch(_launch, rows.get_device(), rows, ids, pointer, count, keys, key_ids)
        launch(rows, ids, pointer, count, keys, key_ids, *keys.stride(), keys.shape[0], rows.shape[0])


def _launch(
    device: int, rows: Tensor, ids: Tensor | None, pointer: Tensor, count: Tensor, keys: Tensor, *rest: Any
) -> launching.Launch:
    kernels = launching.kernels()
    constants = kernels.enqueue_blocks(rows.shape[1]) | {"IDS": ids is not None}
    programs = -(-min(len(keys), len(rows)) // constants["BLOCK"])
    return launching.Launch(kernels.enqueue, (programs,), constants, num_warps=4)


def _overlap(a: Tensor, b: Tensor) -> bool:
    def end(t: Tensor) -> int:
        last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr() + (last + 1) * t.element_size()

    return a.data_ptr() < end(b) and b.data_ptr() < end(a)
