"""ReSSL as a LightningModule, on scikit-learn's digits: pip install lightning (tried: 2.6.6), then

    python examples/lightning_module.py                    # three epochs
    python examples/lightning_module.py --devices 2        # two processes, which share a queue
    python examples/lightning_module.py --epochs 6 --resume out/lightning/last.ckpt

The queue is a submodule: its rows and pointer are in Lightning's checkpoints, and on every device.
"""

import argparse
import copy
from collections.abc import Sequence

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import relssl
from relssl.augment import View


class ReSSL(lightning.LightningModule):
    def __init__(self, size: int = 1024, dim: int = 64, momentum: float = 0.99, lr: float = 0.06) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.student = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 16 * 16, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, dim)
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        # Every process enqueues the keys of all of them.
        self.queue = relssl.FeatureQueue(size, dim)
        self.weak = View(16, scale=(0.5, 1.0), flip=0.0)
        self.strong = View(16, scale=(0.5, 1.0), flip=0.0, jitter=(0.4, 0.4, 0.4, 0.1), blur=0.5)

    def on_train_epoch_start(self) -> None:
        # Lightning's checkpoints have no random numbers: without this, a resumed run draws other views.
        torch.manual_seed(1000 * self.current_epoch + self.global_rank)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        teacher, student = tuple(self.teacher.parameters()), tuple(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - self.hparams["momentum"])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        images = batch[0]
        q = F.normalize(self.student(self.strong(images)), dim=1)
        with torch.no_grad():
            k = F.normalize(self.teacher(self.weak(images)), dim=1)
        loss, entropy = relssl.relation_loss(q, k, self.queue, return_entropy=True)
        self.queue.enqueue(k)  # before backward, without a clone
        self.log_dict({"loss": loss, "teacher_entropy": entropy}, prog_bar=True)
        return loss

    def train_dataloader(self) -> DataLoader:
        images = torch.from_numpy(load_digits().images * (255 / 16)).to(torch.uint8)
        images = F.interpolate(images[:, None], (16, 16)).expand(-1, 3, -1, -1)
        data = TensorDataset(images)
        # Only the epoch, which Lightning sets, determines the order of this sampler.
        processes = self.trainer.world_size
        sampler: DistributedSampler = DistributedSampler(data, processes, self.global_rank, drop_last=True)
        # With a generator of its own it draws nothing from the one that the views use.
        own = torch.Generator()
        return DataLoader(data, 128 // processes, sampler=sampler, generator=own, drop_last=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), self.hparams["lr"], momentum=0.9)


def main(arguments: Sequence[str] | None = None) -> ReSSL:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--resume", help="a checkpoint of Lightning")
    parser.add_argument("--out", default="out/lightning")
    options = parser.parse_args(arguments)
    lightning.seed_everything(0)
    model = ReSSL()
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(options.out, save_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=options.devices, strategy="ddp" if options.devices > 1 else "auto",
        max_epochs=options.epochs, callbacks=[checkpoint], logger=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=options.resume)
    return model


if __name__ == "__main__":
    main()
