"""The training loop: any method whose forward gives a loss and what to log, and nothing of a method's own.

A checkpoint holds everything that a step depends on, so a resumed run continues bit for bit (on a GPU as
far as cuDNN's kernels repeat), from the end of an epoch or from the step at which Ctrl-C was pressed. Under
torchrun each process takes its share of every batch, and DistributedDataParallel averages the gradients.
"""

import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from relssl import data as datasets
from relssl import distributed
from relssl.checkpoint import restore, save
from relssl.data.loading import channel_statistics, left_out, load_batches
from relssl.evaluate import glance
from relssl.methods.base import Method, TrainConfig


def train(config: TrainConfig) -> Method:
    """Train a method and return it; checkpoint.pt, metrics.json and TensorBoard events go to config.out.

    Raises:
        ValueError: fewer training images than one batch, a batch that does not divide among the processes, or
            a checkpoint that is damaged, of another method or of other settings.
        FileExistsError: config.out holds a checkpoint and config.resume is off.
    """
    device = config.pick_device()
    with distributed.processes(device):
        return _train(config, device)


def _train(config: TrainConfig, device: torch.device) -> Method:
    path = config.out / "checkpoint.pt"
    if path.exists() and not config.resume:
        raise FileExistsError(f"{path} exists: pass --resume to go on from it, or another --out")
    if config.batch_size % distributed.world():
        processes = f"{distributed.world()} processes"
        raise ValueError(f"a batch of {config.batch_size} does not divide among {processes}")
    where = config.data, config.data_root, config.image_size, config.download, config.classes
    data = distributed.first_ahead(lambda: datasets.load(*where))  # Which may download.
    config = config.fit(data)
    passes = config.passes(data)
    smallest = min(map(len, passes.values()))
    if smallest < config.batch_size:
        raise ValueError(f"batch size {config.batch_size} exceeds the {smallest} training images")
    if config.queue_size > smallest and distributed.rank() == 0:
        warnings.warn(
            f"the queue of {config.queue_size} exceeds the {smallest} training images: it holds earlier"
            " embeddings of the very images that it is compared with",
            stacklevel=2,
        )
    torch.manual_seed(config.seed)
    skipped = config.skip_list()
    method = config.make(*channel_statistics(data.train, skipped))
    torch.manual_seed(config.seed + distributed.rank())  # The same weights, other augmentations.
    optimizer = optimizer_of(method, config)
    precision = (
        ("bf16" if device.type == "cuda" else "fp32") if config.precision == "auto" else config.precision
    )
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = {"model": method, "optimizer": optimizer, "scaler": scaler}
    steps = sum(len(images) // config.batch_size for images in passes.values())
    start, step = 0, 0
    sums: dict[str, Tensor] = {}
    history: list[dict[str, float]] = []
    if config.resume and path.exists():
        start, step, sums, history = restore(path, config, run, device)
    method.epoch = start + step / steps
    forward = distributed.parallel(method, unused=len(passes) > 1)

    with interruption() as stop, reporting(config, start * steps + step, steps) as (board, bar):
        for epoch in range(start, config.epochs):
            method.train()
            began, first = time.perf_counter(), step
            for part, images in batches(passes, config, epoch, step, skipped):
                lr = learning_rate(config, epoch * steps + step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                method.epoch = epoch + step / steps
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    loss, logs = forward(images.to(device, non_blocking=True), part)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                step += 1
                # Summed on the device: no waiting. A pass that does not log a name leaves it out of the mean.
                for name, value in {"loss": loss, **logs}.items():
                    found = torch.stack((value.detach().float(), torch.ones_like(value, dtype=torch.float)))
                    sums[name] = sums[name] + found if name in sums else found
                bar.update(config.batch_size)
                if step % 10 == 0 or step == steps:
                    bar.set_postfix(
                        epoch=f"{epoch + 1}/{config.epochs}", loss=f"{loss.item():.4f}", refresh=False
                    )
                if step < steps and stop.agreed(step, device):
                    sums = {name: distributed.mean(total) for name, total in sums.items()}
                    save(path, config, run, epoch, step, sums, history)
                    report_skipped(skipped, bar)
                    bar.write(f"stopped and saved {path}; --resume goes on from here")
                    return method.eval()
            seconds = time.perf_counter() - began
            totals = {name: distributed.mean(total) for name, total in sums.items()}
            entry = {name: float(total / count) for name, (total, count) in totals.items()}
            entry |= {"lr": lr, "images_per_second": (steps - first) * config.batch_size / seconds}
            method.epoch = epoch + 1
            history.append({"epoch": epoch + 1, **entry})
            step, sums = 0, {}
            report_skipped(skipped, bar)
            save(path, config, run, epoch + 1, step, sums, history)
            every, last = config.judge_every, epoch + 1 == config.epochs
            if every and (last or (epoch + 1) % every == 0):  # After saving, lest it fail.
                if distributed.rank() == 0:
                    entry |= glance(method, data)
                    history[-1] |= entry
                save(path, config, run, epoch + 1, step, sums, history)
            for name, value in entry.items():
                board.add_scalar(name, value, (epoch + 1) * steps)
            if stop.agreed(step, device):
                break
    return method.eval()


def optimizer_of(method: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or Adam of the trainable parameters; biases and norms are a group of their own."""
    learned = [p for p in method.parameters() if p.requires_grad]
    flat = config.weight_decay if config.decay_norm_and_bias else 0.0
    groups = [
        {"params": [p for p in learned if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learned if p.dim() <= 1], "weight_decay": flat},
    ]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up to the peak, then a cosine to zero or the peak all along, by step."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def batches(
    passes: dict[str, datasets.Images],
    config: TrainConfig,
    epoch: int,
    start: int,
    skipped: list[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """This process's share of an epoch's batches from step `start` on, with the name of their pass.

    Seed and epoch alone decide their order. skipped: see `load_batches`.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    share = config.batch_size // distributed.world()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    for name, data in passes.items():
        order = torch.randperm(len(data), generator=generator).split(config.batch_size)
        full = [rows[mine].tolist() for rows in order if len(rows) == config.batch_size]
        todo, start = full[start:], max(0, start - len(full))
        for images, _ in load_batches(data, todo, config.workers, skipped, fill=True):
            yield name, images


def report_skipped(skipped: list[str] | None, bar: tqdm) -> None:
    """Write a line about the unreadable images that all processes have left out since the last one."""
    if skipped is not None:
        paths = [path for those in distributed.collect(skipped) for path in those]
        skipped.clear()
        if paths and distributed.rank() == 0:
            bar.write(f"{left_out(paths)}; others took their places", file=sys.stderr)


@contextmanager
def reporting(config: TrainConfig, step: int, steps_per_epoch: int) -> Iterator[tuple[Any, tqdm]]:
    """TensorBoard and a progress bar, of the first process; the others' write nothing."""
    from torch.utils.tensorboard import SummaryWriter

    first = distributed.rank() == 0
    bar = tqdm(
        total=config.epochs * steps_per_epoch * config.batch_size, initial=step * config.batch_size,
        unit=" images", unit_scale=True, dynamic_ncols=True, disable=not first,
    )  # fmt: skip
    if not first:
        yield _Silent(), bar
        return
    config.out.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1) as board, bar:
        yield board, bar


class _Silent:
    def add_scalar(self, *_: Any) -> None:
        pass


class _Stop:
    pressed = False

    def agreed(self, step: int, device: torch.device) -> bool:
        """Whether to stop now. Processes hear of Ctrl-C at different steps; at every tenth they agree."""
        if distributed.world() == 1:
            return self.pressed
        return step % 10 == 0 and distributed.anyone(self.pressed, device)


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
