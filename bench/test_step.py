"""Times a whole step of training, from augmentation to optimizer, with relssl's losses and with eager ones.

The losses alone (forward, backward and enqueueing) are timed beside it, for their share of the step.
"""

from dataclasses import replace
from statistics import median

import eager
import pytest
import torch
from machine import DEVICE
from report import rounded
from timing import alternate
from torch import Tensor, nn
from torch.nn import functional as F
from work import NT_XENT, STUDENT, TEACHER, Case

# The dependencies of training may be missing.
ressl = pytest.importorskip("relssl.methods.ressl", exc_type=ImportError)
sacc = pytest.importorskip("relssl.methods.sacc", exc_type=ImportError)
build_optimizer = pytest.importorskip("relssl.train", exc_type=ImportError).build_optimizer

# On a CPU a small encoder: the published one takes ten seconds a step.
ARCH, ROWS = ("conv4", 128) if DEVICE == "cpu" else ("resnet18", 256)
SIZE, DIM = 32, 128  # pixels; width of embeddings


class Columns(nn.Module):
    """ReSSL's queue as published, of shape [D, K]."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.queue = eager.Queue(rows)

    def enqueue(self, keys: Tensor, ids: None = None) -> None:
        self.queue.enqueue(keys)


class EagerNTXent(nn.Module):
    def forward(self, z1: Tensor, z2: Tensor, queue: None, ids: None) -> Tensor:
        return eager.nt_xent(z1, z2, NT_XENT)


def eager_relation(q, k, queue, *, student_temperature, teacher_temperature, **_) -> tuple[Tensor, Tensor]:
    loss = eager.relation_loss(q, k, queue.queue.columns, student_temperature, teacher_temperature)
    return loss, torch.zeros(())


class ReSSL:
    config = replace(ressl.PRESETS["cifar10"], arch=ARCH, bn_splits=1)

    def __init__(self, size: int, losses: str) -> None:
        self.relation = eager_relation if losses == "eager" else ressl.relation_loss
        method = ressl.ReSSL(replace(self.config, queue_size=size), torch.zeros(3), torch.ones(3))
        self.method = prepared(method)
        if losses == "eager":
            self.method.queue = Columns(self.method.queue.rows)

    def loss(self, images: Tensor) -> Tensor:
        own, ressl.relation_loss = ressl.relation_loss, self.relation
        try:
            return self.method(images)[0]
        finally:
            ressl.relation_loss = own

    def losses(self, views: Tensor) -> Tensor:
        """Computes the loss of given unit-norm embeddings, and enqueues as the step does."""
        q, k = views[0], views[1].detach()
        queue = self.method.queue
        taus = {"student_temperature": STUDENT, "teacher_temperature": TEACHER}
        loss, _ = self.relation(q, k, queue, **taus, return_entropy=True)
        queue.enqueue(k)
        return loss


class SACC:
    config = replace(sacc.PRESETS["cifar10"], arch=ARCH, stem="small", image_size=SIZE, clusters=10)

    def __init__(self, size: int, losses: str) -> None:
        self.method = prepared(sacc.SACC(self.config, torch.zeros(3), torch.ones(3)))
        if losses == "eager":
            self.method.nt_xent = EagerNTXent()

    def loss(self, images: Tensor) -> Tensor:
        return self.method(images)[0]

    def losses(self, views: Tensor) -> Tensor:
        assigned = (views[:, :, : self.config.clusters] * 10).softmax(2)
        return self.method.instance_losses(views) + self.method.cluster_losses(assigned)


def prepared(method):
    return method.to(DEVICE, memory_format=torch.channels_last).train()


METHODS = {"ReSSL": ReSSL, "SACC": SACC}
CASES = [
    ("ReSSL", 4_096),
    ("ReSSL", 65_536),
    ("SACC", 0),
    pytest.param("ReSSL", 262_144, marks=pytest.mark.large),
]


@pytest.mark.parametrize("peer", ["relssl", "eager"])
@pytest.mark.parametrize(("name", "size"), CASES)
def test_step(name, size, peer, benchmark, results):
    case = Case(f"{name.lower()}_step", ROWS, size, DIM)
    generator = torch.Generator(DEVICE).manual_seed(0)
    images = torch.randint(256, (ROWS, 3, SIZE, SIZE), dtype=torch.uint8, device=DEVICE, generator=generator)
    views = F.normalize(torch.randn(3, ROWS, DIM, device=DEVICE, generator=generator), dim=2).requires_grad_()
    sides = {side: METHODS[name](size, side) for side in ("relssl", peer)}

    def autocast() -> torch.autocast:
        return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")

    def losses(side) -> Tensor:
        with autocast():
            loss = side.losses(views)
        return torch.autograd.grad(loss, views)[0]

    gradients = [losses(side) for side in sides.values()]
    error = ((gradients[-1] - gradients[0]).norm() / gradients[0].norm()).item()
    assert error < (1e-4 if DEVICE == "cpu" else 0.03)

    def step(side):
        optimizer = build_optimizer(side.method, side.config)

        def run() -> None:
            with autocast():
                loss = side.loss(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return run

    ours, theirs = step(sides["relssl"]), step(sides[peer])
    benchmark.group, benchmark.name = str(case), peer
    seconds = alternate(benchmark, DEVICE, ours, theirs, lambda: losses(sides[peer]), 2.5)
    alone = median(seconds["between"])
    extra: dict = {"title": f"{case.title}, {ARCH} at {SIZE} px"}
    extra["loss_ms"], extra["loss_share"] = rounded([1e3 * alone, alone / median(seconds["peer"])])
    benchmark.extra_info.update(results.timed(case, peer, seconds, None, None, extra=extra))
