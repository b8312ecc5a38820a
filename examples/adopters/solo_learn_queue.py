"""The queue in a checkpoint of solo-learn's ReSSL, loaded into a FeatureQueue.

    pip install relssl torch pytorch-lightning timm scipy einops
    pip install --no-deps solo-learn
    python examples/adopters/solo_learn_queue.py [CHECKPOINT]

solo-learn asks for torch 1.9 and lightning-bolts, which cannot be imported beside a later Lightning; its
ReSSL needs one name of it, which it does not use. Without a path, a checkpoint of its ReSSL is written first.
"""

import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

import relssl


def ressl_class() -> type:
    """Imports solo-learn's ReSSL without lightning-bolts, of which it imports a scheduler."""
    for name in ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["pl_bolts.optimizers.lr_scheduler"].LinearWarmupCosineAnnealingLR = None  # type: ignore
    from solo.methods.ressl import ReSSL

    return ReSSL


def write_checkpoint(path: Path) -> None:
    """Saves solo-learn's ReSSL in Lightning's layout, with some keys enqueued."""
    options: dict[str, Any] = dict.fromkeys(("accumulate_grad_batches", "num_large_crops"), 1)
    options |= dict.fromkeys(("lr", "weight_decay", "classifier_lr", "min_lr", "warmup_start_lr"), 0.0)
    options |= dict.fromkeys(("warmup_epochs", "num_small_crops"), 0)
    options |= dict.fromkeys(("lars", "exclude_bias_n_norm", "momentum_classifier"), False)
    model = ressl_class()(
        proj_output_dim=32,
        proj_hidden_dim=64,
        temperature_q=0.1,
        temperature_k=0.04,
        queue_size=512,
        encoder="resnet18",
        num_classes=10,
        backbone_args={"cifar": True},
        max_epochs=1,
        batch_size=64,
        optimizer="sgd",
        extra_optimizer_args={},
        scheduler="none",
        base_tau_momentum=0.99,
        final_tau_momentum=1.0,
        **options,
    )
    model.dequeue_and_enqueue(F.normalize(torch.randn(64, 32), dim=1))
    torch.save({"state_dict": model.state_dict()}, path)


def load_queue(path: Path) -> relssl.FeatureQueue:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    queue = relssl.FeatureQueue(*state["queue"].shape)  # [K, D]
    queue.load_state_dict({name: state[name] for name in ("queue", "queue_ptr")})
    return queue


def main(path: str | None = None) -> float:
    """Returns the difference of the two losses over the loaded queue."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(path or Path(folder) / "ressl.ckpt")
        if path is None:
            write_checkpoint(checkpoint)
        queue = load_queue(checkpoint)
    ressl_class()
    from solo.losses.ressl import ressl_loss_func

    q, k = (F.normalize(torch.randn(64, queue.rows.shape[1]), dim=1) for _ in range(2))
    theirs = ressl_loss_func(q, k, queue.rows, 0.1, 0.04)
    ours = relssl.relation_loss(q, k, queue, form="ce", student_temperature=0.1, teacher_temperature=0.04)
    difference = abs(float(theirs - ours))
    print(
        f"{queue.size} rows, the next is written at {int(queue.pointer)}: losses differ by {difference:.1e}"
    )
    if difference > 1e-5:
        raise SystemExit("the losses differ")
    return difference


if __name__ == "__main__":
    main(*sys.argv[1:])
