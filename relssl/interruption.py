"""Signals that ask a training run to stop: the first is recorded, so that the run can save its step."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch

from relssl import distributed

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], object] | int | None
TERMINATING = signal.SIGTERM, signal.SIGUSR1
EXIT_STATUS = 143  # A shell's status of a process that SIGTERM ended.


class _Interrupted(BaseException):
    """A signal has come at a time when nothing is lost by stopping at once."""


class Stop:
    """The first signal that asked the run to stop, if any."""

    number: int | None = None
    at_once = True  # Whether a signal raises _Interrupted; otherwise it is only recorded.

    @property
    def name(self) -> str:
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number or 0).name

    def any_rank_received(self, device: torch.device) -> bool:
        """Returns whether any process has received a signal, and records it in all of them."""
        (number,) = distributed.all_reduce_max([float(self.number or 0)], device)
        if number:
            self.number = int(number)
        return bool(number)

    def run_unless_stopped(self, run: Callable[[], T]) -> T | None:
        """Returns run(), or None if a signal interrupts it."""
        try:
            self.at_once = True
            return run() if self.number is None else None
        except _Interrupted:
            return None
        finally:
            self.at_once = False


@contextmanager
def interruption() -> Iterator[Stop]:
    """Records the first Ctrl-C, SIGTERM or SIGUSR1; a second one ends the process as without a handler.

    After SIGTERM or SIGUSR1, the context ends in SystemExit. torchrun forwards signals that the whole process
    group may have received already, sends SIGTERM where one process has ended, and kills processes 30 seconds
    later: under it, no later signal counts.
    """
    stop = Stop()
    defaults: dict[signal.Signals, Handler] = {signal.SIGINT: signal.default_int_handler}
    defaults |= dict.fromkeys(TERMINATING, signal.SIG_DFL)
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ

    def record(number: int, _: FrameType | None) -> None:
        if stop.number is None:
            stop.number = number
            if not torchrun:
                set_handlers(defaults)
            if stop.at_once:
                raise _Interrupted

    def set_handlers(handlers: dict[signal.Signals, Handler]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    before: dict[signal.Signals, Handler] = {number: signal.signal(number, record) for number in defaults}
    try:
        yield stop
    except _Interrupted:
        if stop.number == signal.SIGINT:
            raise KeyboardInterrupt from None
        if distributed.is_main_process():
            print(f"stopped by {stop.name} before the first step")
    finally:
        if not torchrun or stop.number not in TERMINATING:  # Otherwise the process is about to end.
            set_handlers(before)
    if stop.number in TERMINATING:
        sys.exit(EXIT_STATUS)
