"""ReSSL, which stable-pretraining lacks, with its Module, momentum teacher and online probe.

pip install relssl stable-pretraining scikit-learn
python examples/adopters/stable_pretraining_ressl.py
"""

from typing import Any

import lightning
import stable_pretraining as spt
import torch
import torchmetrics
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import relssl


def weak(images: Tensor) -> Tensor:
    return images + 0.05 * torch.randn_like(images)


def strong(images: Tensor) -> Tensor:
    return F.dropout(images, 0.2) + 0.1 * torch.randn_like(images)


def forward(self, batch: dict, stage: str) -> dict:
    """Returns what the module's optimizer and the probe read: the loss, and the student's embedding."""
    if not self.training:
        return {"embedding": self.backbone.forward_student(batch["image"])}
    embedding = self.backbone.forward_student(strong(batch["image"]))
    q = F.normalize(self.projector.forward_student(embedding), dim=1)
    with torch.no_grad():
        k = self.projector.forward_teacher(self.backbone.forward_teacher(weak(batch["image"])))
        k = F.normalize(k, dim=1)
    loss = relssl.relation_loss(q, k, self.memory)
    self.memory.enqueue(k)
    return {"embedding": embedding, "loss": loss}


def main(epochs: int = 4) -> float:
    """Trains, and returns the accuracy of the probe on images that were not trained on."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.data).float() / 16  # [1797, 64]
    rows: Any = [{"image": x, "label": int(y)} for x, y in zip(images, digits.target, strict=True)]
    backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU())
    teacher = {"base_ema_coefficient": 0.99, "final_ema_coefficient": 1.0}
    module = spt.Module(
        backbone=spt.TeacherStudentWrapper(backbone, **teacher),
        projector=spt.TeacherStudentWrapper(nn.Linear(256, 64), **teacher),
        memory=relssl.FeatureQueue(1024, 64),
        forward=forward,
        optim={"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}, "interval": "step"},
    )
    probe = spt.OnlineProbe(
        module,
        name="probe",
        input="embedding",
        target="label",
        probe=nn.Linear(256, 10),
        loss=nn.CrossEntropyLoss(),
        optimizer={"type": "AdamW", "lr": 1e-2},
        metrics=torchmetrics.classification.MulticlassAccuracy(10),
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[probe, spt.TeacherStudentCallback()],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    train = DataLoader(rows[:1500], batch_size=100, shuffle=True, drop_last=True)
    trainer.fit(module, train, DataLoader(rows[1500:], batch_size=100))
    accuracy = float(trainer.callback_metrics["eval/probe_MulticlassAccuracy"])
    print(f"accuracy of the probe {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
