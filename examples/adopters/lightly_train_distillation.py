"""lightly-train's Distillation with relssl's relation loss as its criterion; nothing else is changed.

    pip install relssl lightly-train scikit-learn
    python examples/adopters/lightly_train_distillation.py

Its DistillationLoss is the relation loss with one temperature for both. For lightly_train.pretrain(...,
method="distillationv1"), too, assign the class below to `distillation.DistillationLoss` beforehand. The
student is trained with either criterion, and its losses compared. The teacher here returns pixels, so that
nothing is downloaded; without the line of get_teacher it is the DINO that `teacher` names.
"""

import logging
from typing import Any

import torch
from lightly_train._methods.distillation import distillation
from lightly_train._models import package_helpers
from lightly_train._models.embedding_model import EmbeddingModel
from pytorch_lightning import Callback, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import relssl


class RelationCriterion(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, teacher_features: Tensor, student_features: Tensor, queue: Tensor) -> Tensor:
        tau = self.temperature
        return relssl.relation_loss(
            student_features, teacher_features, queue, student_temperature=tau, teacher_temperature=tau
        )


class Pixels(nn.Module):
    """A teacher whose features are the pixels of the digits, [B, 64], around their mean."""

    embed_dim = 64

    def forward(self, images: Tensor) -> Tensor:
        pixels = F.adaptive_avg_pool2d(images[:, 0], 8).flatten(1)
        return pixels - pixels.mean(1, keepdim=True)


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.found.append(outputs["loss"].item())


def trained(criterion: type[nn.Module], steps: int) -> list[float]:
    """Trains with a criterion, and returns the loss of each step."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16  # [1797, 1, 8, 8]
    images = F.interpolate(images, size=32).expand(-1, 3, -1, -1)
    rows: Any = [{"views": [image], "filename": ""} for image in images]
    distillation.DistillationLoss = criterion  # type: ignore
    distillation.get_teacher = lambda *args, **options: Pixels()  # type: ignore
    student = package_helpers.get_wrapped_model("torchvision/resnet18", 3, load_weights=False)
    method = distillation.Distillation(
        method_args=distillation.DistillationArgs(queue_size=512),
        optimizer_args=distillation.DistillationAdamWArgs(),
        embedding_model=EmbeddingModel(student),
        global_batch_size=64,
        num_input_channels=3,
    )
    losses = Losses()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(method, DataLoader(rows, batch_size=64, shuffle=True))
    return losses.found


def main(steps: int = 5) -> list[float]:
    """Trains with relssl's criterion, and with lightly-train's; returns the former's losses."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    theirs = trained(distillation.DistillationLoss, steps)
    ours = trained(RelationCriterion, steps)
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(
        f"loss of the first step {ours[0]:.3f}, of the last {ours[-1]:.3f}; they differ by {difference:.1e}"
    )
    if difference > 1e-3:  # Rounding grows from step to step.
        raise SystemExit("the criteria train differently")
    return ours


if __name__ == "__main__":
    main()
