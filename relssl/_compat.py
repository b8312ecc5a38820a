"""The private parts of torch that relssl uses, each with what holds where a version of torch lacks it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable)

try:  # the torch.func transform that is running, if any
    from torch._C._functorch import peek_interpreter_stack
except ImportError:
    peek_interpreter_stack = None  # type: ignore[assignment]

try:  # whether a tensor is what is_grads_batched passes to a backward
    from torch._C._functorch import is_legacy_batchedtensor
except ImportError:
    is_legacy_batchedtensor = None  # type: ignore[assignment]

try:  # the hooks on what autograd saves, such as activation checkpointing's
    from torch._C._autograd import _top_saved_tensors_default_hooks
except ImportError:
    _top_saved_tensors_default_hooks = None  # type: ignore[assignment]

# torch < 2.13 has the older name alone. Builds without torch.distributed have none.
all_gather_single: Any = getattr(dist, "all_gather_single", None)
all_gather_single = all_gather_single or getattr(dist, "all_gather_into_tensor", None)


# The names, by module, that a pickle of torch.distributed.checkpoint's Metadata refers to.
CHECKPOINT_INDEX_GLOBALS = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": (
        "Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
        "bool", "contiguous_format", "preserve_format", "channels_last",
    ),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}  # fmt: skip


def saving_is_hooked() -> bool:
    """Whether tensors that autograd saves pass through hooks; true where torch does not reveal it."""
    return _top_saved_tensors_default_hooks is None or _top_saved_tensors_default_hooks(False) is not None


def in_functorch_transform() -> bool:
    """Whether torch.func or forward-mode AD is active, which only plain torch code supports."""
    if torch.compiler.is_compiling():
        return False
    if peek_interpreter_stack is not None and peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0


def is_batched(g: Tensor) -> bool:
    """Whether a backward runs for many cotangents at once, which out= does not accept."""
    return in_functorch_transform() or is_legacy_batchedtensor is None or is_legacy_batchedtensor(g)


def version(t: Tensor | None) -> int | None:
    """Returns how often a tensor was written to; None without one, or for one of inference, not counted."""
    return None if t is None or t.is_inference() else t._version


def constant_result(function: F) -> F:
    """Marks a function that torch.compile is to call while it traces, for a constant of the graph.

    torch.compiler.assume_constant_result does the same, after it has imported all of Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def cuda_driver_version() -> int:
    """Returns the CUDA version of the driver, 1000 times the major plus 10 times the minor number."""
    return torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
