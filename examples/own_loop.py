"""A self-supervised loop of your own: ReSSL's student, teacher and queue on handwritten digits, in seconds.

    python examples/own_loop.py

The images are scikit-learn's. The student learns to relate a strongly changed image to past embeddings as the
teacher relates a weakly changed one; the teacher is a moving average of the student.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import relssl
from relssl.functional import relation_loss


def weak(images: Tensor) -> Tensor:
    return images + 0.1 * torch.randn_like(images)


def strong(images: Tensor) -> Tensor:
    """Shifts by up to a pixel, drops pixels, and adds noise."""
    dy, dx = torch.randint(-1, 2, (2,)).tolist()
    return weak(F.dropout(images.roll((dy, dx), dims=(1, 2)), 0.2))


def main(epochs: int = 5) -> list[float]:
    """Trains, and returns the mean loss of each epoch."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images).float() / 16  # [1797, 8, 8]
    student = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64)
    )
    teacher = copy.deepcopy(student).requires_grad_(False)
    queue = relssl.FeatureQueue(1024, 64)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.06, momentum=0.9)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        batches = images[torch.randperm(len(images))].split(128)[:-1]
        for batch in batches:
            q = F.normalize(student(strong(batch)), dim=1)
            with torch.no_grad():
                for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                    slow.lerp_(fast, 0.01)
                k = F.normalize(teacher(weak(batch)), dim=1)
            loss, entropy = relation_loss(q, k, queue, return_entropy=True)
            queue.enqueue(k)  # before backward: the gradient is computed already
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(batches))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}, teacher's entropy {entropy.item():.3f}")
    return losses


if __name__ == "__main__":
    main()
