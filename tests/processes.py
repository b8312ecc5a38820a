"""Processes of a test, which end in any case."""

import multiprocessing
import time

import torch.multiprocessing as mp

# Not relssl, which that process would import from the working directory.
PRELOADED = ["torch.distributed.tensor", "torch.distributed.checkpoint"]


def spawn(function, arguments, processes, seconds):
    """Runs function(rank, *arguments) in processes, which are killed if they take longer.

    They are forked from a process that has imported torch already: several imports take long on two cores.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = mp.start_processes(function, arguments, nprocs=processes, join=False, start_method="forkserver")
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"the processes take longer than {seconds} s"
    finally:
        for process in context.processes:
            process.kill()
