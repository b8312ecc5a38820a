"""Gradients of a batch in parts: same views and dropout, statistics that move once, autocast and scaling."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from relssl.gradients import Encoder, Gradients, frozen_statistics
from relssl.methods import PRESETS
from relssl.train import train

ZEROS, ONES = torch.zeros(3), torch.ones(3)
CONFIGS = {
    "ressl": replace(PRESETS["ressl"]["digits"], dim=16, hidden=32, queue_size=40),
    "sacc": replace(PRESETS["sacc"]["digits"], dim=16, clusters=10, queue_size=40),
}
IMAGES = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(name, norm=nn.Identity, dropout=0.0):
    """Returns a method in float64, but for its views, with dropout or another norm instead of BatchNorm."""
    torch.manual_seed(0)
    method = CONFIGS[name].build(ZEROS, ONES).train()
    for module in list(method.modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                new = norm() if norm is nn.Identity else norm(layer.num_features)
                setattr(module, child, nn.Sequential(new, nn.Dropout(dropout)) if dropout else new)
    method.double()
    augment = method.augment
    method.augment = lambda images: [view.double() for view in augment(images)]
    return method


def gradient(method):
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_have_the_gradient_of_their_joint_graph(name, dropout):
    """The loss of all parts' outputs, of one graph that no pass repeats, has the very same random numbers."""
    parts = 4
    method = build(name, dropout=dropout)
    torch.manual_seed(1)
    outputs = [method.encode(method.augment(images), "joint") for images in IMAGES.chunk(parts)]
    expected, _ = method.loss([torch.cat(rows) for rows in zip(*outputs, strict=True)], "joint")
    expected.backward()
    after = torch.rand(3)

    other = build(name, dropout=dropout)
    queue = other.queue.rows.clone()
    torch.manual_seed(1)
    loss, logs = Gradients(other, Encoder(other), parts).add(IMAGES, "joint")
    assert torch.equal(torch.rand(3), after)  # A resumed run draws what follows.
    assert abs(loss - expected) < 1e-10 * expected
    error = gradient(other) - gradient(method)
    assert error.norm() < 1e-10 * gradient(method).norm()
    assert not any(value.requires_grad for value in (loss, *logs.values()))
    enqueued = (other.queue.rows != queue).any(1)
    assert enqueued.tolist() == [True] * 16 + [False] * 24 and other.queue.count == 16


@pytest.mark.parametrize("name", CONFIGS)
def test_running_statistics_move_once_for_each_part(name):
    """BatchNorm's moves are those of a plain forward pass of each part, in order."""
    parts = 2
    method = build(name, nn.BatchNorm2d)
    torch.manual_seed(1)
    with torch.no_grad():
        for images in IMAGES.chunk(parts):
            method.encode(method.augment(images), "joint")
    other = build(name, nn.BatchNorm2d)
    torch.manual_seed(1)
    Gradients(other, Encoder(other), parts).add(IMAGES, "joint")
    moved = {key: value for key, value in method.state_dict().items() if "running" in key or "tracked" in key}
    assert moved
    for key, value in moved.items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-12, atol=0)


def test_frozen_statistics_come_back_after_an_error():
    norm = nn.BatchNorm2d(2)
    with pytest.raises(ZeroDivisionError), frozen_statistics(norm):
        x = torch.randn(5, 2, 3, 3)
        torch.testing.assert_close(norm(x).mean((0, 2, 3)), torch.zeros(2), atol=1e-6, rtol=0)
        assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(2))
        raise ZeroDivisionError
    norm(x)
    assert norm.num_batches_tracked == 1 and norm.track_running_stats


@pytest.mark.parametrize("name", CONFIGS)
def test_scaled_losses_have_scaled_gradients_under_autocast(name):
    def found(parts, scale):
        method = build(name).float()
        method.augment = type(method).augment.__get__(method)
        torch.manual_seed(1)
        context = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
        Gradients(method, Encoder(method), parts, context, lambda loss: scale * loss).add(IMAGES, "joint")
        return gradient(method)

    torch.testing.assert_close(found(2, 1024.0), 1024 * found(2, 1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 7}, "a batch of 64 does not divide into 7 parts"),
        ({"accumulate": 64}, "a part of a batch has 1 images: .* (batch_size 64, accumulate 64)"),
        ({"accumulate": 16, "bn_splits": 8}, "a part of a batch has 4 images: .* a multiple of bn_splits"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
    ],
)
def test_parts_that_cannot_be_are_refused_before_the_first_step(settings, message, tmp_path):
    config = replace(CONFIGS["ressl"], batch_size=64, device="cpu", out=tmp_path, **settings)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        train(config)
