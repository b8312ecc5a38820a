"""`Sums`: running sums of logged scalars, on their device."""

import torch
from torch import Tensor


class Sums:
    """Sums of scalars by name, and the numbers of their terms; not every step has every name.

    A step with the names of the one before takes two operations, and no step synchronises.

    sums: what `totals` returned, to continue from.
    """

    def __init__(self, sums: dict[str, Tensor] | None = None) -> None:
        sums = sums or {}
        self.counts = {name: int(count) for name, (_, count) in sums.items()}
        self._others = {name: total for name, (total, _) in sums.items()}
        self._names: tuple[str, ...] = ()  # those of the buffer
        self._buffer: Tensor | None = None

    @torch.no_grad()
    def add(self, values: dict[str, Tensor]) -> None:
        terms = torch.stack([value.float() for value in values.values()])
        if self._buffer is None or tuple(values) != self._names:
            self._others = self._by_name()
            self._names = tuple(values)
            zero = torch.zeros_like(terms[0])
            self._buffer = torch.stack([self._others.pop(name, zero) for name in values])
        self._buffer.add_(terms)
        for name in values:
            self.counts[name] = self.counts.get(name, 0) + 1

    def totals(self) -> dict[str, Tensor]:
        """Returns for each name the sum and the number of its terms, float32 [2]."""
        sums = self._by_name()
        return {name: torch.stack((t, torch.full_like(t, self.counts[name]))) for name, t in sums.items()}

    def _by_name(self) -> dict[str, Tensor]:
        own = () if self._buffer is None else self._buffer.unbind()
        return self._others | dict(zip(self._names, own, strict=True))
