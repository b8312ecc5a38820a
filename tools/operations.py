"""Counts the operations of torch that a call dispatches, and its synchronisations.

An operation is about a launch on a GPU. Views and allocations, which launch nothing, are left out. An op of
relssl counts as one operation, or as those that it consists of; where the Triton backend runs with a driver
that does nothing (tools/launch.py), the latter and its launches are what a GPU would get.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SYNCHRONISE = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}  # The host waits for their results.
WITHOUT_LAUNCH = {"_unsafe_view", "_reshape_alias", "is_same_size"}  # whose schemas are not those of views


class Operations(TorchDispatchMode):
    """Records operations, such as "aten::add.Tensor", and synchronisations while it is active.

    within: whether an op of relssl is replaced by the operations within it, for tensors of the CPU.
    """

    def __init__(self, within: bool = False) -> None:
        super().__init__()
        self.within = within
        self.names: list[str] = []
        self.synchronisations: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if self.within and operation.namespace == "relssl":
            with self:
                return operation.redispatch(_CPU, *arguments, **options)
        full = operation.name()
        name = full.split("::")[1].split(".")[0]
        if name in SYNCHRONISE:
            self.synchronisations.append(full)
        elif not operation.is_view and "empty" not in name and name not in WITHOUT_LAUNCH:
            self.names.append(full)
        return operation(*arguments, **options)


_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def count(run: Callable[[], object], within: bool = False) -> tuple[int, int]:
    """Returns how many operations and synchronisations a call has, after a first one that fills caches."""
    run()
    with Operations(within) as own:
        run()
    return len(own.names), len(own.synchronisations)
