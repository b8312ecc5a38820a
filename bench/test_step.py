"""Times a whole step of training, from augmentation to optimizer, with relssl's losses and with eager ones.

The losses alone (forward, backward and enqueueing) are timed beside it, for their share of the step, and so
is each part of it; operations are counted. The peer `kornia` has relssl's losses, and kornia's views.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import median

import eager
import peers
import pytest
import torch
from machine import DEVICE
from operations import Operations
from report import rounded
from timing import Clock, alternate
from torch import Tensor, nn
from torch.nn import functional as F
from work import NT_XENT, STUDENT, TEACHER, Case

# The dependencies of training may be missing.
ressl = pytest.importorskip("relssl.methods.ressl", exc_type=ImportError)
sacc = pytest.importorskip("relssl.methods.sacc", exc_type=ImportError)
build_optimizer = pytest.importorskip("relssl.train", exc_type=ImportError).build_optimizer
Step = pytest.importorskip("parts", exc_type=ImportError).Step

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


def by_kornia(method) -> None:
    """Replaces the views of a method by kornia's."""
    peers.package("kornia", "kornia.augmentation")
    from kornia_view import KorniaView

    method.weak = KorniaView(method.weak)
    if isinstance(method.strong, nn.ModuleList):
        method.strong = nn.ModuleList(KorniaView(view) for view in method.strong)
    else:
        method.strong = KorniaView(method.strong)


class ReSSL:
    config = replace(ressl.PRESETS["cifar10"], arch=ARCH, bn_splits=1)

    def __init__(self, size: int, side: str) -> None:
        self.relation = eager_relation if side == "eager" else ressl.relation_loss
        method = ressl.ReSSL(replace(self.config, queue_size=size), torch.zeros(3), torch.ones(3))
        self.method = prepared(method, side)
        if side == "eager":
            self.method.queue = Columns(self.method.queue.rows)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Lets the method call the loss of this side."""
        own, ressl.relation_loss = ressl.relation_loss, self.relation
        try:
            yield
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

    def __init__(self, size: int, side: str) -> None:
        self.method = prepared(sacc.SACC(self.config, torch.zeros(3), torch.ones(3)), side)
        if side == "eager":
            self.method.nt_xent = EagerNTXent()

    installed = staticmethod(nullcontext)

    def losses(self, views: Tensor) -> Tensor:
        assigned = (views[:, :, : self.config.clusters] * 10).softmax(2)
        return self.method.instance_losses(views) + self.method.cluster_losses(assigned)


def prepared(method, side: str):
    if side == "kornia":
        by_kornia(method)
    return method.to(DEVICE, memory_format=torch.channels_last).train()


METHODS = {"ReSSL": ReSSL, "SACC": SACC}
CASES = [
    ("ReSSL", 4_096),
    ("ReSSL", 65_536),
    ("SACC", 0),
    pytest.param("ReSSL", 262_144, marks=pytest.mark.large),
]


@pytest.mark.parametrize("peer", ["relssl", "eager", "kornia"])
@pytest.mark.parametrize(("name", "size"), CASES)
def test_step(name, size, peer, benchmark, results):
    case = Case(f"{name.lower()}_step", ROWS, size, DIM)
    title = f"{case.title}, {ARCH} at {SIZE} px"
    if peer == "kornia" and size not in (0, 4_096):
        pytest.skip("its views cost the same with every queue")
    generator = torch.Generator(DEVICE).manual_seed(0)
    images = torch.randint(256, (ROWS, 3, SIZE, SIZE), dtype=torch.uint8, device=DEVICE, generator=generator)
    views = F.normalize(torch.randn(3, ROWS, DIM, device=DEVICE, generator=generator), dim=2).requires_grad_()
    try:
        sides = {side: METHODS[name](size, side) for side in ("relssl", peer)}
    except peers.Unsupported as why:
        results.absent(case, peer, str(why), title)
        pytest.skip(str(why))

    def losses(side) -> Tensor:
        with autocast():
            loss = side.losses(views)
        return torch.autograd.grad(loss, views)[0]

    gradients = [losses(side) for side in sides.values()]
    error = ((gradients[-1] - gradients[0]).norm() / gradients[0].norm()).item()
    assert error < (1e-4 if DEVICE == "cpu" else 0.03)

    ours, theirs = (partial(step(side), images) for side in (sides["relssl"], sides[peer]))
    benchmark.group, benchmark.name = str(case), peer
    seconds = alternate(benchmark, DEVICE, ours, theirs, lambda: losses(sides[peer]), 2.5)
    alone = median(seconds["between"])
    extra: dict = {"title": title} | recorded(theirs)
    extra["loss_ms"], extra["loss_share"] = rounded([1e3 * alone, alone / median(seconds["peer"])])
    benchmark.extra_info.update(results.timed(case, peer, seconds, None, None, extra=extra))


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")


def step(side) -> Callable[..., Tensor]:
    """Returns a function that takes a step of one side on given images: parts.Step.run."""
    taken = Step(side.method, build_optimizer(side.method, side.config), autocast)

    def run(*arguments) -> Tensor:
        with side.installed():
            return taken.run(*arguments)

    return run


def recorded(run: Callable[..., Tensor]) -> dict:
    """Returns a step's operations and synchronisations, and of each part the operations and the time."""
    clock, counted = Clock(DEVICE), {}

    def timed(part, call):
        results = []
        clock.time(part, lambda: results.append(call()))
        return results[0]

    def count(part, call):
        with Operations() as own:
            result = call()
        counted[part] = len(own.names), len(own.synchronisations)
        return result

    run(count)
    for _ in range(5):
        run(timed)
    operations, synchronisations = map(sum, zip(*counted.values(), strict=True))
    times = {part: rounded([1e3 * median(taken)])[0] for part, taken in clock.seconds().items()}
    parts = {"parts_ms": times, "parts_operations": {part: number for part, (number, _) in counted.items()}}
    return {"operations": operations, "synchronisations": synchronisations} | parts
