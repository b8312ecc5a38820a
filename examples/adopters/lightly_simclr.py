"""SimCLR with lightly's head, and relssl's NT-Xent in place of its NTXentLoss.

    pip install relssl lightly scikit-learn
    python examples/adopters/lightly_simclr.py

Instead of NTXentLoss(temperature=0.5). For gather_distributed=True pass group=torch.distributed.group.WORLD.
"""

import torch
from lightly.models.modules import SimCLRProjectionHead
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import relssl


def view(images: Tensor) -> Tensor:
    return F.dropout(images, 0.2) + 0.1 * torch.randn_like(images)


def main(steps: int = 60) -> list[float]:
    """Trains, and returns the loss of each step."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data).float() / 16  # [1797, 64]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), SimCLRProjectionHead(128, 128, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        batch = images[torch.randperm(len(images))[:128]]
        z1 = F.normalize(model(view(batch)), dim=1)
        z2 = F.normalize(model(view(batch)), dim=1)
        loss = relssl.nt_xent(z1, z2, temperature=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
