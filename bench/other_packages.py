"""The losses of other packages, each beside the call of relssl that replaces it.

A Comparison makes, of either side, a step without its backward pass: from the leaves, which are rows of any
norm, to a loss. What belongs to a step of that package belongs to both: normalising the rows, and enqueueing
where its step enqueues. Both sides begin with the same queue.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peers import package, solo_learn
from torch import Tensor, nn
from torch.nn import functional as F

from relssl import FeatureQueue
from relssl.functional import info_nce, nt_xent, queue_logsumexp, relation_loss

Step = Callable[..., Tensor]  # the leaves -> the loss
SIDES = ("theirs", "ours")


@dataclass(frozen=True)
class Shape:
    """B rows of width D, and K of the queue; 0 where there is none."""

    rows: int
    dim: int
    size: int = 0

    def __str__(self) -> str:
        queue = f", K {self.size:,}" if self.size else ""
        return f"B {self.rows:,}{queue}, D {self.dim}"


@dataclass(frozen=True)
class Comparison:
    """theirs and ours make a step from the shape and the start of the queues, [queues, K, D].

    Of the leaves, [B, D] each, the first `trained` get gradients.
    """

    package: str  # as it is installed
    title: str
    shape: Shape
    theirs: Callable[[Shape, Tensor], Step]
    ours: Callable[[Shape, Tensor], Step]
    leaves: int = 2
    trained: int = 1
    queues: int = 1

    @property
    def name(self) -> str:
        return f"{self.package}: {self.title}"


def inputs(comparison: Comparison, shape: Shape) -> tuple[list[Tensor], Tensor]:
    """Returns the leaves, whose rows have norms from 0.5 to 2 and correlate, and the unit rows of the queues.

    They depend on the shape alone.
    """
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    shared = draw(shape.rows, shape.dim)
    leaves = []
    for i in range(comparison.leaves):
        scale = 2 ** torch.empty(shape.rows, 1).uniform_(-1, 1, generator=generator)
        leaf = scale * F.normalize(shared + draw(shape.rows, shape.dim), dim=1)
        leaves.append(leaf.requires_grad_(i < comparison.trained))
    return leaves, F.normalize(draw(comparison.queues, shape.size, shape.dim), dim=2)


def runner(comparison: Comparison, side: str, shape: Shape | None = None) -> Callable[[], tuple]:
    """Returns a function that runs a step with its backward pass: the loss and the leaves' gradients."""
    shape = shape or comparison.shape
    leaves, start = inputs(comparison, shape)
    step = getattr(comparison, side)(shape, start.clone())
    trained = leaves[: comparison.trained]

    def run() -> tuple[Tensor, Sequence[Tensor]]:
        loss = step(*leaves)
        return loss.detach(), torch.autograd.grad(loss, trained)

    return run


def unit(*leaves: Tensor) -> list[Tensor]:
    return [F.normalize(leaf, dim=1) for leaf in leaves]


def filled(rows: Tensor, ids: bool = False) -> FeatureQueue:
    """Returns a full queue of these rows, whose ids, if any, match nothing."""
    queue = FeatureQueue(*rows.shape, ids=ids)
    queue.rows.copy_(rows)
    return queue


def module(name: str) -> Any:
    """Imports a module of a package that imports torchvision."""
    importlib.import_module("relssl.datasets.torchvision_import")
    return package(name.partition(".")[0], name)


# ------------------------------------------------------------------------------------------- InfoNCE, MoCo


def lightly_moco(shape: Shape, start: Tensor) -> Step:
    loss = module("lightly.loss").NTXentLoss(temperature=0.2, memory_bank_size=(shape.size, shape.dim))
    loss.memory_bank.bank = start[0]
    return loss


def enqueues_after(shape: Shape, start: Tensor) -> Step:
    queue = filled(start[0])

    def step(q: Tensor, k: Tensor) -> Tensor:
        q, k = unit(q, k)
        loss = info_nce(q, k, queue, temperature=0.2)
        queue.enqueue(k)
        return loss

    return step


class Passed(nn.Module):
    """Stands for a student and its teacher: returns what it is given."""

    def forward_student(self, x: Tensor) -> Tensor:
        return x

    forward_teacher = forward_student


def stable_pretraining_moco(shape: Shape, start: Tensor) -> Step:
    """Its forward pass with networks that return their input. It also runs the teacher for its probe."""
    made = module("stable_pretraining.methods.mocov2").MoCov2(nn.Flatten(), (1, 1), queue_length=1)
    queue = module("stable_pretraining.callbacks.queues").UnsortedQueue(shape.size, shape.dim)
    queue.out.copy_(start[0])
    queue.filled.fill_(True)
    made.backbone, made.projector, made.queue = Passed(), Passed(), queue
    return lambda q, k: made(q, k).loss


def enqueues_before(shape: Shape, start: Tensor) -> Step:
    queue = filled(start[0])

    def step(q: Tensor, k: Tensor) -> Tensor:
        q, k = unit(q, k)
        queue.enqueue(k)
        return info_nce(q, k, queue, temperature=0.2)

    return step


def solo_learn_moco(shape: Shape, start: Tensor) -> Step:
    """The loss and the queue's lines of MoCoV2Plus.training_step, which needs a Trainer."""
    loss = solo_learn("losses/moco").moco_loss_func
    kept = SimpleNamespace(queue=start.transpose(1, 2).contiguous(), pointer=0)

    def step(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        q1, q2, k1, k2 = unit(q1, q2, k1, k2)
        queue = kept.queue.clone().detach()
        found = (loss(q1, k2, queue[1], 0.1) + loss(q2, k1, queue[0], 0.1)) / 2
        end = kept.pointer + shape.rows
        kept.queue[:, :, kept.pointer : end] = torch.stack((k1, k2)).permute(0, 2, 1)
        kept.pointer = end % shape.size
        return found

    return step


def symmetric(shape: Shape, start: Tensor) -> Step:
    first, second = filled(start[0]), filled(start[1])

    def step(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        q1, q2, k1, k2 = unit(q1, q2, k1, k2)
        loss = info_nce(q1, k2, second, temperature=0.1) + info_nce(q2, k1, first, temperature=0.1)
        first.enqueue(k1)
        second.enqueue(k2)
        return loss / 2

    return step


def cross_batch_memory(shape: Shape, start: Tensor) -> Step:
    losses = module("pytorch_metric_learning.losses")
    memory = losses.CrossBatchMemory(losses.NTXentLoss(temperature=0.07), shape.dim, memory_size=shape.size)
    memory.embedding_memory, memory.has_been_filled = start[0], True
    memory.label_memory -= 1  # Matches no image.
    images = torch.arange(shape.rows)
    keys = torch.arange(2 * shape.rows) >= shape.rows
    return lambda q, k: memory(torch.cat([q, k]), images.repeat(2), enqueue_mask=keys)


def excludes_own(shape: Shape, start: Tensor) -> Step:
    """The key in the memory is the positive, and is no negative: ids exclude it."""
    queue, images = filled(start[0], ids=True), torch.arange(shape.rows)

    def step(q: Tensor, k: Tensor) -> Tensor:
        q, k = unit(q, k)
        queue.enqueue(k, images)
        return info_nce(q, k, queue, ids=images, temperature=0.07)

    return step


# -------------------------------------------------------------------------------------------- relation loss


def lightly_train_distillation(shape: Shape, start: Tensor) -> Step:
    """The criterion and the update of the queue of Distillation, whose teacher is a DINO."""
    found = module("lightly_train._methods.distillation.distillation")
    criterion, method = found.DistillationLoss(temperature=0.07), SimpleNamespace(teacher_queue=start[0])

    def step(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = unit(student, teacher)
        found.Distillation._update_queue(method, x_teacher=teacher)
        return criterion(teacher, student, method.teacher_queue)

    return step


def distils(shape: Shape, start: Tensor) -> Step:
    queue = filled(start[0].flip(0))  # Its queue is shifted: the last rows are replaced first.

    def step(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = unit(student, teacher)
        queue.enqueue(teacher)
        return relation_loss(student, teacher, queue, student_temperature=0.07, teacher_temperature=0.07)

    return step


def solo_learn_ressl(shape: Shape, start: Tensor) -> Step:
    """The loss and the queue's lines of ReSSL.training_step, which needs a Trainer."""
    loss = solo_learn("losses/ressl").ressl_loss_func
    kept = SimpleNamespace(queue=start[0], pointer=0)

    def step(q: Tensor, k: Tensor) -> Tensor:
        q, k = unit(q, k)
        found = loss(q, k, kept.queue.clone().detach(), 0.1, 0.04)
        end = kept.pointer + shape.rows
        kept.queue[kept.pointer : end] = k
        kept.pointer = end % shape.size
        return found

    return step


def relates(shape: Shape, start: Tensor) -> Step:
    queue = filled(start[0])

    def step(q: Tensor, k: Tensor) -> Tensor:
        q, k = unit(q, k)
        loss = relation_loss(q, k, queue, form="ce")
        queue.enqueue(k)
        return loss

    return step


# ------------------------------------------------------------------------------------------- within a batch


def lightly_simclr(shape: Shape, start: Tensor) -> Step:
    return module("lightly.loss").NTXentLoss(temperature=0.5)


def stable_pretraining_simclr(shape: Shape, start: Tensor) -> Step:
    return module("stable_pretraining.losses").NTXEntLoss(temperature=0.5)


def metric_learning_simclr(shape: Shape, start: Tensor) -> Step:
    losses = module("pytorch_metric_learning.losses")
    return losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.07))


def contrasts(temperature: float) -> Callable[[Shape, Tensor], Step]:
    return lambda shape, start: lambda z1, z2: nt_xent(*unit(z1, z2), temperature=temperature)


def open_clip(shape: Shape, start: Tensor) -> Step:
    loss = module("open_clip.loss").ClipLoss()
    return lambda image, text: loss(*unit(image, text), logit_scale=1 / 0.07)


def clip(shape: Shape, start: Tensor) -> Step:
    """CLIP's loss by the log-partition function: no negatives of the own modality, as in NT-Xent."""

    def step(image: Tensor, text: Tensor) -> Tensor:
        image, text = unit(image, text)
        of_image, _ = queue_logsumexp(image, text, 0.07)
        of_text, _ = queue_logsumexp(text, image, 0.07)
        return ((of_image + of_text) / 2 - (image * text).sum(1) / 0.07).mean()

    return step


QUEUE = Shape(256, 128, 65_536)
BATCH = Shape(1024, 128)
COMPARISONS = [
    Comparison("lightly", "`NTXentLoss` with a memory bank", QUEUE, lightly_moco, enqueues_after),
    Comparison("lightly", "`NTXentLoss`", BATCH, lightly_simclr, contrasts(0.5), trained=2),
    Comparison(
        "lightly-train", "`Distillation`", Shape(256, 768, 8_192), lightly_train_distillation, distils
    ),
    Comparison("stable-pretraining", "`MoCov2`", QUEUE, stable_pretraining_moco, enqueues_before),
    Comparison(
        "stable-pretraining", "`NTXEntLoss`", BATCH, stable_pretraining_simclr, contrasts(0.5), trained=2
    ),
    Comparison("solo-learn", "`ReSSL`", QUEUE, solo_learn_ressl, relates),
    Comparison(
        "solo-learn", "`MoCoV2Plus`", QUEUE, solo_learn_moco, symmetric, leaves=4, trained=2, queues=2
    ),
    Comparison(
        "pytorch-metric-learning",
        "`CrossBatchMemory(NTXentLoss)`",
        Shape(64, 128, 4_096),
        cross_batch_memory,
        excludes_own,
    ),
    Comparison(
        "pytorch-metric-learning",
        "`SelfSupervisedLoss(NTXentLoss)`",
        Shape(128, 128),
        metric_learning_simclr,
        contrasts(0.07),
        trained=2,
    ),
    Comparison("open-clip-torch", "`ClipLoss`", Shape(2048, 512), open_clip, clip, trained=2),
]
