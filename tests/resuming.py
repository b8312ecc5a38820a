"""What the tests of resumed runs share."""

import signal

import pytest
import torch

from relssl.train import train


def train_until(step, method, config):
    """Trains until Ctrl-C after a step, counted from 1 over all epochs; returns what train returns."""
    update, steps = method.update_queue, []

    def interrupt(self, *outputs):
        update(self, *outputs)
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "update_queue", interrupt)
        return train(config)


def assert_same(one, other):
    """Compares the state dicts of two methods bit by bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
