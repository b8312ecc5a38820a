"""Counts what a call dispatches: each operation but views and allocations is a kernel on a GPU."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

# fmt: off
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty",
    "empty_like", "empty_strided", "expand", "is_same_size", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}
# fmt: on
SYNCHRONIZATIONS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero"}


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def count_operations(call):
    """Returns the number of operations of the second call, and checks that none is a synchronization."""
    call()
    with Dispatched() as dispatched:
        call()
    assert not dispatched.names.keys() & SYNCHRONIZATIONS
    return sum(count for name, count in dispatched.names.items() if name not in VIEWS)
