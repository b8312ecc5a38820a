"""The state dicts of other projects' queues, in the layout of a FeatureQueue.

They hold the rows as `queue`, and the pointer as `queue_ptr`, int64 [1]:

    MoCo, and ReSSL's authors    [D, K]
    solo-learn's ReSSL           [K, D]
    solo-learn's MoCo v2+        [2, D, K]: two queues, of the keys of either view
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from relssl.queue import FeatureQueue


def translated(
    state_dict: dict[str, Any], prefix: str, own: FeatureQueue, error_msgs: list[str]
) -> dict[str, Any]:
    """Returns a state dict in which `queue` and `queue_ptr` below the prefix have become a FeatureQueue's.

    own is the queue. A state dict without `queue`, or with `rows`, is returned as it is. A wrong
    shape is left to load_state_dict, or appended to its error_msgs where it would not find it.
    """
    if f"{prefix}queue" not in state_dict or f"{prefix}rows" in state_dict:
        return state_dict
    found = dict(state_dict)
    rows, pointer = found.pop(f"{prefix}queue"), found.pop(f"{prefix}queue_ptr", None)
    size, dim = own.size, own.rows.shape[1]
    if isinstance(rows, Tensor):
        if rows.dim() == 3 and len(rows) == 2:
            error_msgs.append(
                f"{prefix}queue holds two queues, {tuple(rows.shape)}: load {prefix}queue[0], the keys of the"
                f" first view, or {prefix}queue[1], those of the second, as {prefix}queue."
            )
            rows = own.rows
        elif rows.shape == (dim, size):  # Where K = D nothing tells the layouts apart.
            rows = rows.T.contiguous()
    found[f"{prefix}rows"] = rows
    if pointer is not None:
        if isinstance(pointer, Tensor) and pointer.numel() == 1:
            pointer = pointer.reshape(())
        elif isinstance(pointer, Tensor):  # torch would take its first element.
            error_msgs.append(f"{prefix}queue_ptr must have one element, got shape {tuple(pointer.shape)}.")
        found[f"{prefix}pointer"] = pointer
    # Beside the loaded rows: with assign=True they become the queue's, which may be on the meta device.
    device = rows.device if isinstance(rows, Tensor) else None
    found[f"{prefix}count"] = torch.tensor(size, device=device)
    if own.ids is not None:
        found.setdefault(f"{prefix}ids", torch.full((size,), -1, device=device))
    return found
