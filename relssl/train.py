"""The training loop: any method whose forward gives a loss and what to log, and nothing of a method's own.

A checkpoint holds everything that a step depends on, so a resumed run continues bit for bit, from the end
of an epoch or from the step at which Ctrl-C was pressed.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from relssl import data as datasets
from relssl.checkpoint import restore, save
from relssl.methods.base import Method, TrainConfig


def train(config: TrainConfig) -> Method:
    """Train a method and return it; checkpoint.pt, metrics.json and TensorBoard events go to config.out.

    Raises:
        ValueError: fewer training images than one batch, or a checkpoint of another method.
        FileExistsError: config.out holds a checkpoint and config.resume is off.
    """
    from torch.utils.tensorboard import SummaryWriter

    device = config.pick_device()
    path = config.out / "checkpoint.pt"
    if path.exists() and not config.resume:
        raise FileExistsError(f"{path} exists: pass --resume to go on from it, or another --out")
    data = datasets.load(config.data, config.data_root, config.image_size, config.download)
    steps = len(data.train) // config.batch_size
    if steps == 0:
        raise ValueError(f"batch size {config.batch_size} exceeds the {len(data.train)} training images")
    torch.manual_seed(config.seed)
    method = config.make(*datasets.channel_statistics(data.train))
    optimizer = torch.optim.SGD(parameter_groups(method, config), lr=config.lr, momentum=config.sgd_momentum)
    precision = ("bf16" if device == "cuda" else "fp32") if config.precision == "auto" else config.precision
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    run = {"model": method, "optimizer": optimizer, "scaler": scaler}
    start, step = 0, 0
    sums: dict[str, Tensor] = {}
    history: list[dict[str, float]] = []
    if config.resume and path.exists():
        start, step, sums, history = restore(path, config, run, device)

    config.out.mkdir(parents=True, exist_ok=True)
    board = SummaryWriter(str(config.out / "tensorboard"), purge_step=start * steps + step)
    bar = tqdm(
        total=config.epochs * steps * config.batch_size, initial=(start * steps + step) * config.batch_size,
        unit=" images", unit_scale=True, dynamic_ncols=True,
    )  # fmt: skip
    with interruption() as stop, board, bar:
        for epoch in range(start, config.epochs):
            method.train()
            began, first = time.perf_counter(), step
            for images in batches(data.train, config, epoch, step):
                lr = learning_rate(config, epoch * steps + step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                    loss, logs = method(images.to(device, non_blocking=True))
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                step += 1
                for name, value in {"loss": loss, **logs}.items():
                    sums[name] = sums.get(name, 0) + value.detach()  # On the device: no waiting.
                bar.update(len(images))
                if step % 10 == 0 or step == steps:
                    bar.set_postfix(
                        epoch=f"{epoch + 1}/{config.epochs}",
                        loss=f"{loss.item():.4f}",
                        refresh=False,
                    )
                if stop.pressed and step < steps:
                    save(path, config, run, epoch, step, sums, history)
                    bar.write(f"stopped and saved {path}; --resume goes on from here")
                    return method
            seconds = time.perf_counter() - began
            entry = {name: float(total) / steps for name, total in sums.items()}
            entry |= {"lr": lr, "images_per_second": (steps - first) * config.batch_size / seconds}
            for name, value in entry.items():
                board.add_scalar(name, value, (epoch + 1) * steps)
            history.append({"epoch": epoch + 1, **entry})
            step, sums = 0, {}
            save(path, config, run, epoch + 1, step, sums, history)
            if stop.pressed:
                break
    return method.eval()


def parameter_groups(method: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters; those of one dimension (biases, norms) in a group of their own."""
    learned = [p for p in method.parameters() if p.requires_grad]
    flat = config.weight_decay if config.decay_norm_and_bias else 0.0
    return [
        {"params": [p for p in learned if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learned if p.dim() <= 1], "weight_decay": flat},
    ]


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then a cosine from the peak to zero, by step."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def batches(data: datasets.Images, config: TrainConfig, epoch: int, start: int) -> Iterator[Tensor]:
    """Image batches of an epoch from step `start` on, in an order that seed and epoch alone decide."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(data), generator=generator).split(config.batch_size)
    full = [rows.tolist() for rows in order if len(rows) == config.batch_size][start:]
    workers = 0 if isinstance(data, datasets.Arrays) else config.workers
    loader: DataLoader = DataLoader(
        data, sampler=full, batch_size=None, num_workers=workers, generator=generator,  # type: ignore[arg-type]
        worker_init_fn=_ignore_interrupts, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    for images, _ in loader:
        yield images


def _ignore_interrupts(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Stop:
    pressed = False


@contextmanager
def interruption() -> Iterator[_Stop]:
    """Note the first Ctrl-C instead of raising; a second one raises KeyboardInterrupt."""
    stop = _Stop()

    def note(*_: Any) -> None:
        stop.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
