"""Random numbers for a batch, in one draw on its device, and constants to combine them with."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)
Range = tuple[float, float]


def constant(function: F) -> F:
    """Caches a function of hashable arguments outside of compiled graphs, where its results become constants.

    The copy of a constant to a GPU waits for the host; so it takes place once for each device.
    """
    cached = lru_cache(maxsize=256)(function)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) if torch.compiler.is_compiling() else cached(*arguments)

    return call  # type: ignore[return-value]


@constant
def floats(values: Any, device: torch.device) -> Tensor:
    """Returns a float32 tensor of (nested) values.

    A compiled graph would copy them from the host in every call: it selects them by their index instead.
    """
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float32, device=device)
    shape, flat = [len(values)], values
    while isinstance(flat[0], tuple):
        shape.append(len(flat[0]))
        flat = sum(flat, ())
    index = torch.arange(len(flat), device=device)
    result = torch.full((len(flat),), flat[0], dtype=torch.float32, device=device)
    for first in range(1, len(flat)):
        if flat[first] != flat[first - 1]:
            result = torch.where(index < first, result, flat[first])
    return result.view(shape)


def draw(batch: int, device: torch.device, *groups: tuple[Range, ...]) -> tuple[Tensor, ...]:
    """Draws independent uniform numbers for each image, with one call of the device's generator.

    Args:
        batch: number of images B.
        groups: for each result, the ranges [low, high) of its columns.

    Returns:
        For each group a float32 tensor [B, number of its ranges].
    """
    ranges = sum(groups, ())
    low = floats(tuple(low for low, _ in ranges), device)
    span = floats(tuple(high - low for low, high in ranges), device)
    numbers = torch.addcmul(low, torch.rand(batch, len(ranges), dtype=torch.float32, device=device), span)
    return numbers.split([len(group) for group in groups], dim=1)


def chance(probability: float) -> Range:
    """Returns the range of a number whose floor is 1 with this probability, and 0 otherwise."""
    return probability, min(1 + probability, 2 - 2**-20)  # A number just below 2 is not rounded to it.
