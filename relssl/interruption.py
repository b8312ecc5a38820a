"""Signals that ask a training run to stop: the first is noted, so that the run can save its step."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from relssl import distributed

T = TypeVar("T")
ENDING = signal.SIGTERM, signal.SIGUSR1
STATUS = 143  # What a shell reports of a process that SIGTERM ended.


class _Interrupted(BaseException):
    """A signal has come, and nothing is lost by leaving at once."""


class Stop:
    """The first signal that asked the run to stop, if any."""

    number: int | None = None
    at_once = True  # Whether a signal breaks off what is going on; otherwise it is noted.

    @property
    def name(self) -> str:
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number or 0).name

    def agreed(self, device: torch.device) -> bool:
        """Whether any process has got a signal; then all have."""
        (number,) = distributed.maximum([float(self.number or 0)], device)
        if number:
            self.number = int(number)
        return bool(number)

    def unless_stopped(self, run: Callable[[], T]) -> T | None:
        """run(), or None if a signal breaks it off."""
        try:
            self.at_once = True
            return run() if self.number is None else None
        except _Interrupted:
            return None
        finally:
            self.at_once = False


@contextmanager
def interruption() -> Iterator[Stop]:
    """Note the first Ctrl-C, SIGTERM or SIGUSR1; a second one ends the process as if there were no handler.

    After either of the latter two it ends in SystemExit. Under torchrun, which passes on what a whole group
    of processes has got already, signals within a second count as one.
    """
    stop = Stop()
    defaults = {signal.SIGINT: signal.default_int_handler} | dict.fromkeys(ENDING, signal.SIG_DFL)
    echo = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    noted = 0.0

    def note(number: int, _: Any) -> None:
        nonlocal noted
        if stop.number is None:
            stop.number, noted = number, time.monotonic()
            if not echo:
                set_handlers(defaults)
            if stop.at_once:
                raise _Interrupted
        elif time.monotonic() - noted > echo:
            set_handlers(defaults)
            os.kill(os.getpid(), number)

    def set_handlers(handlers: dict[signal.Signals, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in defaults}
    try:
        yield stop
    except _Interrupted:
        if stop.number == signal.SIGINT:
            raise KeyboardInterrupt from None
        if distributed.first():
            print(f"stopped by {stop.name} before the first step")
    finally:
        set_handlers(before)
    if stop.number in ENDING:
        sys.exit(STATUS)
