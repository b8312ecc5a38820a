"""SACC against its published total, and its parts against the authors' code."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch.nn import functional as F

from relssl import datasets
from relssl.datasets.folder import class_names
from relssl.methods.sacc import PRESETS

SMALL = replace(PRESETS["digits"], dim=16, batch_size=8, clusters=10)
HALF, QUARTER = torch.full((3,), 0.5), torch.full((3,), 0.25)


def images(count=8, size=16):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def instance_loss(a, b, tau, queue=None):
    """Computes NT-Xent by its definition, one image and one sum at a time."""
    z, n = torch.cat((a, b)), len(a)
    losses = []
    for i in range(2 * n):
        others = [z[i] @ z[j] / tau for j in range(2 * n) if j != i]
        others += [] if queue is None else [z[i] @ m / tau for m in queue]
        losses.append(torch.stack(others).exp().sum().log() - z[i] @ z[(i + n) % (2 * n)] / tau)
    return torch.stack(losses).mean()


def cluster_loss(p, r, tau):
    """Computes NT-Xent of unit columns, and log M less the entropy of the clusters' sizes for both views."""
    m = p.shape[1]
    a, b = ([c / c.norm() for c in v.T] for v in (p, r))
    loss = instance_loss(torch.stack(a), torch.stack(b), tau)
    for v in (p, r):
        share = v.sum(0) / v.sum()
        loss = loss + torch.log(torch.tensor(float(m), dtype=v.dtype)) + sum(s * s.log() for s in share)
    return loss


@pytest.mark.parametrize("part", ["joint", "stl10"])
@pytest.mark.parametrize("queue_size", [0, 12])
@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_total_is_the_published_one(part, queue_size, sigma):
    """It is L_I(w1,w2) + L_I(w2,s) + sigma [L_C of every pair], with gradients, in float64."""
    config = replace(SMALL, queue_size=queue_size, sigma=sigma)
    method = config.build(HALF, QUARTER).double()
    z = [F.normalize(torch.randn(6, 16).double(), dim=1).requires_grad_() for _ in range(3)]
    p = [torch.randn(6, 10).double().softmax(1).requires_grad_() for _ in range(3)]
    queue = None if method.queue is None else method.queue.rows.clone()
    if part == "joint":
        ours = method.instance_losses(z) + sigma * method.cluster_losses(p)
        (w1, w2, s), (c1, c2, cs) = z, p
        theirs = instance_loss(w1, w2, 0.5, queue) + instance_loss(w2, s, 0.5, queue)
        theirs = theirs + sigma * sum(cluster_loss(a, b, 1.0) for a, b in combinations((c1, c2, cs), 2))
    else:  # train_STL10.py: (w1, s) instead of (w2, s), and no loss between w2 and s
        ours = method.instance_losses(z, "instance") + method.cluster_losses(p, "cluster")
        (w1, w2, s), (c1, c2, cs) = z, p
        theirs = instance_loss(w1, w2, 0.5, queue) + instance_loss(w1, s, 0.5, queue)
        theirs = theirs + cluster_loss(c1, c2, 1.0) + cluster_loss(c1, cs, 1.0)
    assert abs(ours - theirs) < 1e-10 * theirs
    for one, other in zip(torch.autograd.grad(ours, z + p), torch.autograd.grad(theirs, z + p), strict=True):
        assert (one - other).norm() < 1e-10 * other.norm()
    if queue is not None:
        assert torch.equal(method.queue.rows, queue)
        method.update_queue(z)  # of the second weak view's embeddings
        assert torch.equal(method.queue.rows[:6], w2.detach()) and torch.equal(
            method.queue.rows[6:], queue[6:]
        )


def test_step_weighs_the_parts_and_reaches_every_parameter():
    method = replace(SMALL, sigma=0.5).build(HALF, QUARTER).train()
    loss, logs = method(images())
    torch.testing.assert_close(loss, logs["instance_loss"] + 0.5 * logs["cluster_loss"])
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_passes_of_the_stl10_recipe():
    """The first has only instance losses, without the cluster head; the second has both, without sigma."""
    method = replace(SMALL, recipe="stl10", sigma=0.5).build(HALF, QUARTER).train()
    loss, logs = method(images(), "instance")
    assert logs.keys() == {"instance_loss"} and loss == logs["instance_loss"]
    loss.backward()
    still = {name.split(".")[0] for name, p in method.named_parameters() if p.grad is None}
    assert still == {"cluster"}
    loss, logs = method(images(), "cluster")
    torch.testing.assert_close(loss, logs["instance_loss"] + logs["cluster_loss"])


def test_published_normalization_is_of_the_strong_view_alone():
    method = replace(SMALL, normalize="strong", randaugment=0).build(HALF, QUARTER)
    white = torch.full((4, 3, 16, 16), 255, dtype=torch.uint8)
    assert method.weak(white).amax() <= 1 and method.prepare(white).amax() == 1
    # White stays white in the fifth of the views that have no jitter.
    torch.manual_seed(0)
    seen = torch.cat([method.strong(white) for _ in range(20)]).amax((0, 2, 3))
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)


def arrays(count, size=8):
    return datasets.Arrays(images(count, size), torch.arange(count) % 3)


def test_what_an_epoch_goes_through():
    labelled, unlabelled, test = arrays(5), arrays(7), arrays(3)
    data = datasets.Data(
        datasets.ConcatImages(labelled, unlabelled), labelled, test, ["a", "b", "c"], unlabelled
    )
    passes = {name: {k: len(v) for k, v in PRESETS[name].passes(data).items()} for name in PRESETS}
    assert passes["cifar10"] == passes["digits"] == {"joint": 8}  # training and test images, as published
    assert passes["stl10"] == {"instance": 7, "cluster": 8}
    assert passes["imagenet-10"] == {"joint": 12}  # the training images
    assert PRESETS["cifar10"].clusters_test_images and not PRESETS["imagenet-10"].clusters_test_images
    # As many clusters as classes, unless the setting is another.
    assert PRESETS["cifar10"].resolve(data).clusters == 3
    assert replace(PRESETS["cifar10"], clusters=7).resolve(data).clusters == 7
    with pytest.raises(ValueError, match="clusters must be at least 2, got 0"):
        PRESETS["digits"].build(HALF, QUARTER)
    data.unlabelled = None
    with pytest.raises(ValueError, match="needs unlabelled images"):
        PRESETS["stl10"].passes(data)


def test_presets_are_the_published_ones():
    for name, sigma, jitter, blur in [
        ("cifar10", 1.0, 0.5, False),
        ("cifar20", 0.5, 0.5, False),
        ("stl10", 1.0, 1.0, False),
        ("imagenet-10", 1.0, 1.0, True),
        ("imagenet-dogs", 1.0, 1.0, True),
    ]:
        p = PRESETS[name]
        assert (p.sigma, p.jitter, p.blur) == (sigma, jitter, blur)
        assert (p.arch, p.stem, p.image_size, p.batch_size, p.epochs) == (
            "resnet34",
            "imagenet",
            224,
            200,
            1000,
        )
        assert (p.optimizer, p.lr, p.weight_decay, p.schedule, p.warmup_epochs) == (
            "adam",
            3e-4,
            0,
            "constant",
            0,
        )
        assert (p.dim, p.instance_temperature, p.cluster_temperature, p.queue_size) == (128, 0.5, 1.0, 0)
        assert (p.randaugment, p.normalize, p.crop_min, p.flip) == (5, "strong", 0.08, True)
    assert len(class_names("imagenet-10")) == 10 and len(class_names("imagenet-dogs")) == 15
