"""Tests how many operations a view and a training step dispatch, and that none waits for the device.

The bounds are what is reached: an operation more fails. Views get 32 images of 32 px, steps 8 of them, which
changes no number.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from operations import Operations, count
from parts import PARTS, Step

from relssl.methods import ressl, sacc
from relssl.train import build_optimizer

RESSL = ressl.PRESETS["cifar10"]
CONFIGS = {
    "ressl": replace(RESSL, bn_splits=1),
    "ressl in parts": RESSL,
    "sacc": replace(sacc.PRESETS["cifar10"], arch="resnet18", stem="small", image_size=32, clusters=10),
}
# Operations where one of relssl counts as one. Then what a GPU gets: torch's operations, with those
# within relssl's, and launches of Triton. BatchNorm in parts is two launches each way.
# Two of ReSSL's compute the agreement that it logs.
STEPS = {"ressl": (440, 438, 3), "ressl in parts": (524, 462, 123), "sacc": (1298, 1445, 20)}


def build(name, **settings):
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    method = replace(CONFIGS[name], **settings).build(mean, std)
    return method.to(memory_format=torch.channels_last).train()


def images(count):
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)


def step(method):
    batch = images(8)

    def run():
        method.zero_grad()
        method(batch)[0].backward()

    return run


def test_counts_operations_and_synchronisations():
    x = torch.rand(3, 4)

    def run():
        y = torch.empty_like(x.T[1:].view(-1, 3)).copy_(x.T[1:])
        if (y + 1).sum().item():
            y.nonzero()
            torch.equal(y, y)

    assert count(run) == (3, 3)  # copy_, add, sum; item, nonzero, equal


@pytest.mark.parametrize(
    "name, view, most",
    [("ressl", "weak", 39), ("ressl", "strong", 116), ("sacc", "weak", 105), ("sacc", "strong", 340)],
)
def test_views(name, view, most):
    augment = {"weak": 0, "strong": -1}[view]
    view, batch = build(name, arch="conv4").views[augment], images(32)
    operations, synchronisations = count(lambda: view(batch))
    assert operations <= most and synchronisations == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_steps(name):
    operations, synchronisations = count(step(build(name)))
    assert operations <= STEPS[name][0] and synchronisations == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_launches_of_a_step_on_a_gpu(name, idle):
    run = step(build(name, backend="triton"))
    run()
    idle.clear()
    with Operations(within=True) as own:
        run()
    _, torch_operations, launches = STEPS[name]
    assert len(own.names) <= torch_operations and len(idle) <= launches and not own.synchronisations


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_of_a_step(name):
    """All of a step but fetching its images, which tests/test_step_parts.py counts."""
    method, found = build(name), {}
    optimizer = build_optimizer(method, CONFIGS[name])
    for group in optimizer.param_groups:
        group["fused"] = True  # as on a GPU
    taken = Step(method, optimizer, nullcontext)

    def record(part, run):
        with Operations() as own:
            result = run()
        found[part] = len(own.names)
        assert not own.synchronisations
        return result

    batch = images(8)
    for _ in range(2):
        taken.run(batch, record)
    assert tuple(found) == PARTS
    most = {"sgd": 4, "adam": 6}[method.config.optimizer]
    assert found.pop("optimizer") <= most and found.pop("metrics") <= 2
    assert sum(found.values()) <= STEPS[name][0]
