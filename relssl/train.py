"""The training loop: any method whose forward gives a loss and what to log, and nothing of a method's own.

A checkpoint holds everything that a step depends on, so a resumed run continues bit for bit (on a GPU as
far as cuDNN's kernels repeat), from the end of an epoch or from the step at which a signal stopped it. Under
torchrun each process takes its share of every batch, and DistributedDataParallel averages the gradients.
"""

import math
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from relssl import data as datasets
from relssl import distributed, tuned
from relssl.checkpoint import place, previous, restore, save
from relssl.data.loading import channel_statistics, left_out, load_batches
from relssl.evaluate import glance
from relssl.interruption import Stop, interruption
from relssl.methods.base import Method, TrainConfig


def train(config: TrainConfig) -> Method:
    """Train a method and return it; checkpoint.pt, metrics.json and TensorBoard events go to config.out.

    Ctrl-C saves the step and returns; SIGTERM and SIGUSR1 (which Slurm sends before a job's time is up) save
    it and end the process. A second signal ends the process at once.

    Raises:
        ValueError: fewer training images than one batch, a batch that does not divide among the processes, or
            a checkpoint that is damaged, of another method or of settings that cannot change.
        FileExistsError: config.out holds a checkpoint and config.resume is off.
        FloatingPointError: the loss or a weight is not finite; the last two checkpoints are kept.
        SystemExit: with status 143, after SIGTERM or SIGUSR1.
    """
    device = config.pick_device()
    try:
        with interruption() as stop, distributed.processes(device):
            return _train(config, device, stop)
    finally:
        tuned.adopt(None)


def _train(config: TrainConfig, device: torch.device, stop: Stop) -> Method:
    path = config.out / "checkpoint.pt"
    if path.exists() and not config.resume:
        raise FileExistsError(f"{path} exists: pass --resume to go on from it, or another --out")
    config.check()
    every_steps, every_seconds = interval(config.save_every)
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
    start, step, unjudged = 0, 0, False
    sums: dict[str, Tensor] = {}
    history: list[dict[str, float]] = []
    saved: tuple[int, int] | None = None  # Epoch and step of the checkpoint.
    if config.resume and path.exists():
        start, step, sums, history, unjudged = restore(path, config, run, device, steps)
        saved = start, step
    else:
        tuned.adopt(distributed.collect(tuned.record(device.type))[0])  # the first process's, in all
    method.epoch = start + step / steps
    forward = distributed.parallel(method, unused=len(passes) > 1)
    written = time.monotonic()

    def fail(what: str, epoch: int, step: int) -> NoReturn:
        rate = learning_rate(config, epoch * steps + step, steps)
        at = f"epoch {epoch + 1}, step {step + 1} of {steps} (learning rate {rate:.3g})"
        held = f"no checkpoint has been written to {path} yet"
        if what == "the loss is" and saved == (epoch, step):  # It is of the saved weights, whatever the rate.
            held = f"the weights in {path} make it so"
            if (before := previous(path)).exists():
                held += f"; copy {before} over it, and --resume with a lower --lr goes on from there"
        elif saved:
            held = f"{path} holds all before {place(saved[0] + 1, saved[1])} and is kept;"
            held += " --resume with a lower --lr goes on from there"
        raise FloatingPointError(f"{what} not finite at {at}: {held}")

    def keep(epoch: int, step: int, sums: dict[str, Tensor], unjudged: bool = False) -> None:
        nonlocal saved, written
        report_skipped(skipped, bar)
        finite = torch.stack([t.isfinite().all() for t in method.state_dict().values()]).all()
        (spoilt,) = distributed.maximum([float(not finite)], device)
        if spoilt:  # The loss was of the weights before the last step.
            fail("weights are", *((epoch, step - 1) if step else (epoch - 1, steps - 1)))
        again = saved == (epoch, step)
        save(path, config, run, epoch, step, sums, history, steps=steps, unjudged=unjudged, again=again)
        saved, written = (epoch, step), time.monotonic()

    with reporting(config, start * steps + step, steps) as (board, bar):

        def log(entry: dict[str, float], epochs: int) -> None:
            history[-1] |= entry
            for name, value in entry.items():
                board.add_scalar(name, value, epochs * steps)

        def judge(epochs: int) -> None:
            """Evaluate after so many epochs, all saved; a resumed run makes up for what is cut off."""
            scores = stop.unless_stopped(lambda: glance(method, data)) if distributed.rank() == 0 else None
            log(scores or {}, epochs)
            keep(epochs, 0, {}, unjudged=scores is None)

        def stopped() -> Method:
            if distributed.rank() == 0:
                bar.write(f"stopped by {stop.name} and saved {path}; --resume goes on from here")
            return method.eval()

        stop.at_once = False  # From here on there is something to save.
        if unjudged:
            judge(start)
            if stop.agreed(device):
                return stopped()
        for epoch in range(start, config.epochs):
            method.train()
            began, first = time.perf_counter(), step
            losses: list[Tensor] = []  # Since they were last read.
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
                losses.append(loss.detach())
                # Summed on the device: no waiting. A pass that does not log a name leaves it out of the mean.
                for name, value in {"loss": loss, **logs}.items():
                    found = torch.stack((value.detach().float(), torch.ones_like(value, dtype=torch.float)))
                    sums[name] = sums[name] + found if name in sums else found
                bar.update(config.batch_size)
                # Reading losses waits for the device and the other processes, so all do it at the same steps.
                due = bool(every_steps) and (epoch * steps + step) % every_steps == 0
                late = distributed.rank() == 0 and time.monotonic() - written >= every_seconds
                alone = distributed.world() == 1 and (stop.number is not None or late)
                if not (step % 10 == 0 or step == steps or due or alone):
                    continue
                values = torch.stack(losses).tolist()
                bar.set_postfix(epoch=f"{epoch + 1}/{config.epochs}", loss=f"{values[-1]:.4f}", refresh=False)
                bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), math.inf)
                # The first bad one of all processes, and whether it is time for any of them to save.
                early, save_now = distributed.maximum([-bad, float(due or late)], device)
                if early > -math.inf:
                    fail("the loss is", epoch, step - len(losses) - int(early))
                losses = []
                stopping = step < steps and stop.agreed(device)
                if step < steps and (save_now or stopping):
                    keep(epoch, step, {name: distributed.mean(total) for name, total in sums.items()})
                if stopping:
                    return stopped()
            seconds = time.perf_counter() - began
            totals = {name: distributed.mean(total) for name, total in sums.items()}
            entry = {name: float(total / count) for name, (total, count) in totals.items()}
            entry |= {"lr": lr, "images_per_second": (steps - first) * config.batch_size / seconds}
            method.epoch = epoch + 1
            history.append({"epoch": epoch + 1})
            log(entry, epoch + 1)
            step, sums = 0, {}
            last = epoch + 1 == config.epochs
            due = bool(config.judge_every) and (last or (epoch + 1) % config.judge_every == 0)
            keep(epoch + 1, step, sums, unjudged=due)
            if due:
                judge(epoch + 1)
            if stop.agreed(device):
                return stopped()
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


def interval(every: str) -> tuple[int, float]:
    """What --save-every asks for: so many steps (0: not by steps), or seconds (infinite: not by time).

    Raises:
        ValueError: it is neither a number of steps, such as 500, nor one of minutes, such as 10m or 0.5m.
    """
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)m", every or "0", re.ASCII)
    if not found:
        raise ValueError(f"save_every must be a number of steps (500) or of minutes (10m), got {every!r}")
    return int(found[1] or 0), 60 * float(found[2] or 0) or math.inf


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
        order = torch.randperm(len(data), generator=generator, device="cpu").split(config.batch_size)
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
