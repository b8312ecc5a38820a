"""The states of torch's random number generators that a training step uses."""

import torch
from torch import Tensor

State = dict[str, Tensor | None]


def get() -> State:
    """Returns the states of the CPU's generator and, if there is one, the current GPU's."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": gpu, "mps": mps}


def restore(state: State) -> None:
    """Sets the generators to states that `get` returned."""
    if state["cpu"] is not None:
        torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if (mps := state.get("mps")) is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(mps)
