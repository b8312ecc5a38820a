"""Rows of norm 1: `normalized` divides by the norms, `warn_unless_unit` finds where that was forgotten."""

import warnings

from torch import Tensor
from torch.nn import functional as F

from relssl.backends.common import Temperature, accumulator
from relssl.validation import is_readable

CHECKED_ROWS = 16
# Of a process's calls, so many are checked: by the third, the queue has rows of the caller.
calls_left = 3


def normalized(x: Tensor) -> Tensor:
    """Divides the rows of x [..., D] by their norms, in float32 (float64 for float64); keeps x's dtype."""
    return F.normalize(x.to(accumulator(x.dtype)), dim=-1).to(x.dtype)


def warn_unless_unit(temperature: Temperature, **tensors: Tensor | None) -> None:
    """Warns once in a process if the rows of a tensor have other norms than about 1, and tau is below 1.

    The first rows of each are read, if their values are free to read; rows of zeros, such as a queue can
    start with, do not count. To be called only while there are `calls_left`, outside of torch.compile.
    """
    global calls_left
    values = [t for t in (*tensors.values(), temperature) if isinstance(t, Tensor)]
    if not all(map(is_readable, values)):
        return
    calls_left -= 1
    if not float(temperature) < 1:
        return
    for name, t in tensors.items():
        if t is None:
            continue
        norms = t.detach().reshape(-1, t.shape[-1])[:CHECKED_ROWS].float().norm(dim=1)
        norm = float(norms[norms != 0].mean()) if norms.any() else 1.0
        if not 0.5 < norm < 2:
            calls_left = 0
            tau = f"{float(temperature):.3g}"
            mend = "enqueue normalised keys" if name == "queue" else "pass normalize=True"
            warnings.warn(
                f"rows of {name} have a mean norm of {norm:.3g}, and the temperature {tau} is usual for rows"
                f" of norm 1: {mend}, unless this is intended (only the first calls are checked)",
                stacklevel=3,
            )
            return
