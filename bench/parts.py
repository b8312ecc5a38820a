"""A training step in its parts, each of which can be timed, or have its operations counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relssl.methods.base import Method
from relssl.sums import Sums

PARTS = ("teacher", "views", "encoders", "losses", "queue", "backward", "optimizer", "metrics")


class Step:
    """A step of a method from images to updated weights, as relssl.train takes it.

    autocast: returns the context of the forward pass.
    """

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, autocast: Callable[[], Any]) -> None:
        self.method, self.optimizer, self.autocast = method, optimizer, autocast
        self.sums = Sums()

    def run(self, images: Tensor, record: Callable[[str, Callable], Any] = lambda part, run: run()) -> Tensor:
        """Takes a step and returns its loss. record(name of a part, function) must call the function, and
        return its result.
        """
        method = self.method
        record("teacher", method.update_teacher)
        with self.autocast():
            views = record("views", lambda: method.augment(images))
            outputs = record("encoders", lambda: method.encode(views, method.default_pass))
            loss, logs = record("losses", lambda: method.loss(outputs, method.default_pass))
            record("queue", lambda: method.update_queue(outputs))
        self.optimizer.zero_grad()
        record("backward", loss.backward)
        record("optimizer", self.optimizer.step)
        logs = {name: value.detach() for name, value in logs.items()}
        record("metrics", lambda: self.sums.add({"loss": loss.detach(), **logs}))
        return loss
