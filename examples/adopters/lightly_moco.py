"""MoCo with lightly's heads and momentum encoder, and relssl's InfoNCE in place of its NTXentLoss.

    pip install relssl lightly scikit-learn
    python examples/adopters/lightly_moco.py

Instead of NTXentLoss(temperature=0.2, memory_bank_size=(K, D)), which clones its bank in every step.
"""

import copy

import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import relssl


def view(images: Tensor) -> Tensor:
    return F.dropout(images, 0.2) + 0.1 * torch.randn_like(images)


def main(steps: int = 100) -> list[float]:
    """Trains, and returns the loss of each step."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data).float() / 16  # [1797, 64]
    student = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), MoCoProjectionHead(128, 128, 64))
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    queue = relssl.FeatureQueue(1024, 64)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        batch = images[torch.randperm(len(images))[:128]]
        update_momentum(student, teacher, m=0.99)
        q = F.normalize(student(view(batch)), dim=1)
        k = F.normalize(teacher(view(batch)), dim=1)
        loss = relssl.info_nce(q, k, queue, temperature=0.2)
        queue.enqueue(k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss of step 10, whose queue is full of keys, {losses[9]:.3f}, of the last {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
