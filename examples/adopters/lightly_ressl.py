"""ReSSL, which lightly lacks, with lightly's head, momentum encoder and schedule.

pip install relssl lightly scikit-learn
python examples/adopters/lightly_ressl.py
"""

import copy

import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import relssl


def weak(images: Tensor) -> Tensor:
    return images + 0.05 * torch.randn_like(images)


def strong(images: Tensor) -> Tensor:
    return F.dropout(images, 0.2) + 0.1 * torch.randn_like(images)


def main(steps: int = 60) -> list[float]:
    """Trains, and returns the loss of each step."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data).float() / 16  # [1797, 64]
    student = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), MoCoProjectionHead(128, 128, 64, batch_norm=True))
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    queue = relssl.FeatureQueue(1024, 64)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        batch = images[torch.randperm(len(images))[:128]]
        update_momentum(student, teacher, m=cosine_schedule(step, steps, 0.99, 1))
        q = F.normalize(student(strong(batch)), dim=1)
        k = F.normalize(teacher(weak(batch)), dim=1)
        loss = relssl.relation_loss(q, k, queue, student_temperature=0.1, teacher_temperature=0.04)
        queue.enqueue(k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
