"""lightly-train's Distillation with relssl's relation loss as its criterion; nothing else is changed.

    pip install relssl lightly-train scikit-learn
    python examples/adopters/lightly_train_distillation.py

Its DistillationLoss is the relation loss with one temperature for both. For lightly_train.pretrain(...,
method="distillation") assign the class below to `distillation.DistillationLoss` beforehand. The teacher here is
lightly-train's own test network, with random weights, so that nothing is downloaded.
"""

import logging

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


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.found.append(outputs["loss"].item())


def main(steps: int = 20) -> list[float]:
    """Trains, and returns the loss of each step."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16  # [1797, 1, 8, 8]
    images = F.interpolate(images, size=28).expand(-1, 3, -1, -1)  # two patches of 14 pixels each way
    batches = DataLoader([{"views": [image], "filename": ""} for image in images], batch_size=64, shuffle=True)

    distillation.DistillationLoss = RelationCriterion  # type: ignore
    student = package_helpers.get_wrapped_model("torchvision/resnet18", num_input_channels=3, load_weights=False)
    method = distillation.Distillation(
        method_args=distillation.DistillationArgs(teacher="dinov2/_vittest14", queue_size=512),
        optimizer_args=distillation.DistillationAdamWArgs(),
        embedding_model=EmbeddingModel(student),
        global_batch_size=64,
        num_input_channels=3,
    )
    losses = Losses()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=steps, accelerator="cpu", callbacks=[losses], enable_model_summary=False, **quiet)
    trainer.fit(method, batches)
    print(f"loss of the first step {losses.found[0]:.3f}, of the last {losses.found[-1]:.3f}")
    return losses.found


if __name__ == "__main__":
    main()
