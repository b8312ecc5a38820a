"""The training loop, for any method whose forward returns a loss and scalars to log.

A checkpoint holds everything that a step depends on, so a resumed run continues bit for bit (on a GPU as
far as cuDNN's kernels are deterministic), from the end of an epoch or from the step at which a signal stopped
it. Under torchrun each process takes its share of every batch, and DistributedDataParallel averages the
gradients.
"""

import math
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from relssl import datasets, distributed, tuned
from relssl.checkpoint import TrainState, describe_position, newest, previous_path, read, restore, save
from relssl.datasets.loading import Batch, Loader, channel_statistics, default_workers, skipped_message
from relssl.datasets.on_device import DeviceLoader, OnDevice, move_to_device
from relssl.datasets.python import GIVEN, absolute, checked
from relssl.evaluate import evaluate_during_training
from relssl.gradients import Encoder, Gradients
from relssl.interruption import Stop, interruption
from relssl.logs import Log, open_logs
from relssl.methods.base import Method, TrainConfig
from relssl.methods.initial import untrained
from relssl.sums import Sums

READ_EVERY = 10  # Steps after which losses are read, which synchronises device and processes.


def train(config: TrainConfig, data: datasets.Data | None = None) -> Method:
    """Trains a method and returns it; checkpoints, metrics.json and the logs go to config.out.

    Ctrl-C saves the step and returns; SIGTERM and SIGUSR1 (which Slurm sends before a job's time is up) save
    it and end the process. A second signal ends the process at once.

    data: trained on instead of what config.data names. A checkpoint does not contain them: pass them again to
        resume, and to `evaluate`.

    Raises:
        ValueError: fewer training images than one batch, a batch that cannot be divided among the processes,
            or a checkpoint that is damaged, of another method or of settings that cannot change.
        FileExistsError: config.out has a checkpoint and config.resume is off, unless torchrun has restarted
            the run that wrote it.
        FloatingPointError: the loss or a weight is not finite; the last two checkpoints are kept.
        SystemExit: with status 143, after SIGTERM or SIGUSR1.
    """
    device = config.pick_device()
    try:
        with interruption() as stop, distributed.process_group(device):
            trainer = _Trainer(config, device, stop, data)
            with open_outputs(trainer.config, trainer.state) as (trainer.logs, trainer.bar):
                trainer.run()
            trainer.state.method.discard_compiled()
            return trainer.state.method.eval()
    finally:
        tuned.adopt(None)


class _Trainer:
    """A training run, new or restored from its checkpoint."""

    logs: list[Log]
    bar: tqdm
    loaders: dict[str, Loader | DeviceLoader]

    def __init__(
        self, config: TrainConfig, device: torch.device, stop: Stop, data: datasets.Data | None = None
    ) -> None:
        self.device, self.stop = device, stop
        config = replace(config, data=absolute(config.data) if data is None else GIVEN)
        self.path = find_checkpoint(config)  # The last one.
        config.validate()
        self.save_steps, self.save_seconds = parse_save_every(config.save_every)
        if config.batch_size % (distributed.world_size() * config.accumulate):
            share = f"among {distributed.world_size()} processes"
            if config.accumulate > 1:
                share = f"into {config.accumulate} parts" + f" {share}" * (distributed.world_size() > 1)
            raise ValueError(f"a batch of {config.batch_size} does not divide {share}")
        part = config.batch_size // (distributed.world_size() * config.accumulate)
        if part < 2 or part % getattr(config, "bn_splits", 1):
            raise ValueError(
                f"a part of a batch has {part} images: BatchNorm needs at least 2, and a multiple of"
                f" bn_splits (batch_size {config.batch_size}, accumulate {config.accumulate})"
            )
        source = config.data, config.data_root, config.image_size, config.download, config.classes
        self.data = (
            distributed.main_process_first(lambda: datasets.load(*source))  # It may download.
            if data is None
            else checked(data, "data")
        )
        self.config = config = config.resolve(self.data)
        self.passes = move_to_device(config.passes(self.data), config.data_device, device)
        smallest = min(map(len, self.passes.values()))
        if smallest < config.batch_size:
            raise ValueError(f"batch size {config.batch_size} exceeds the {smallest} training images")
        if config.queue_size > smallest and not config.exclude_own and distributed.rank() == 0:
            warnings.warn(
                f"the queue of {config.queue_size} exceeds the {smallest} training images: it contains"
                " earlier embeddings of the images that it is compared with; --exclude-own excludes them",
                stacklevel=3,
            )
        if 0 < config.epochs < config.warmup_epochs and distributed.rank() == 0:
            warnings.warn(
                f"the warm-up of {config.warmup_epochs} epochs does not end in a run of {config.epochs}:"
                " set --warmup-epochs",
                stacklevel=3,
            )
        self.skipped = config.skip_list()
        placeholder = torch.ones(3)  # The statistics are buffers, which a checkpoint has.
        method = (
            config.build_on_device(placeholder, placeholder)
            if self.path
            else untrained(config, lambda: channel_statistics(self.data.train, self.skipped))
        )
        torch.manual_seed(config.seed + distributed.rank())  # The same weights, but other augmentations.
        self.optimizer = build_optimizer(method, config)
        auto = "bf16" if device.type == "cuda" else "fp32"
        precision = auto if config.precision == "auto" else config.precision
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.steps = sum(len(images) // config.batch_size for images in self.passes.values())
        images = sum(map(len, self.passes.values()))
        self.state = TrainState(method, self.optimizer, self.scaler, self.steps, images)
        self.saved: tuple[int, int] | None = None  # Epoch and step of the checkpoint.
        if self.path:
            restore(self.path, self.state, device)
            self.saved = self.state.epoch, self.state.step
        else:
            tuned.adopt(distributed.all_gather_object(tuned.record(device.type))[0])  # Rank 0's, everywhere.
        self.sums = Sums(self.state.sums)
        method.epoch = self.state.epoch + self.state.step / self.steps
        encoder = distributed.wrap_ddp(Encoder(method), find_unused_parameters=len(self.passes) > 1)
        if config.compile != "no":
            # Random numbers are those of eager code, of which checkpoints have the state.
            graphs = {"triton.cudagraphs": config.compile == "reduce-overhead" and device.type == "cuda"}
            method.compile_parts(options={"fallback_random": True, **graphs})
        self.gradients = Gradients(method, encoder, config.accumulate, self.autocast, self.scaler.scale)
        self.saved_at = time.monotonic()
        self.compiling = config.compile != "no"

    def run(self) -> None:
        """Trains to the last epoch, or until a signal, and saves what has been trained."""
        self.stop.at_once = False  # From here on there is something to save.
        stopped = self.state.evaluation_due and self.evaluate_and_save()
        if self.compiling:
            self.bar.write("compiling views, student and teacher, which takes minutes", file=sys.stderr)
        crops = self.state.method.crops
        with image_loaders(self.passes, self.config, crops, self.skipped) as self.loaders:
            while not stopped and self.state.epoch < self.config.epochs:
                stopped = self.run_epoch()
        if stopped and distributed.rank() == 0:
            self.bar.write(f"stopped by {self.stop.name} and saved {self.path}; --resume continues from here")

    def run_epoch(self) -> bool:
        """Trains an epoch, or the rest of it; returns whether a signal has stopped the run."""
        state, config = self.state, self.config
        state.method.train()
        began, first_step = time.perf_counter(), state.step
        losses: list[Tensor] = []  # Those not read yet.
        for pass_name, batch in epoch_batches(self.loaders, config, state.epoch, state.step):
            losses.append(self.run_step(batch, pass_name))
            if self.compiling:
                self.report_compiled(time.perf_counter() - began)
            if self.check_and_save(losses):
                return True
        seconds = time.perf_counter() - began
        totals = {name: distributed.all_reduce_mean(total) for name, total in self.sums.totals().items()}
        entry = {name: float(total / count) for name, (total, count) in totals.items()}
        entry["lr"] = self.optimizer.param_groups[0]["lr"]
        entry["images_per_second"] = rate = (self.steps - first_step) * config.batch_size / seconds
        entry["hours_left"] = (config.epochs - state.epoch - 1) * self.steps * config.batch_size / rate / 3600
        if "teacher_entropy" in entry:
            entry["effective_neighbours"] = math.exp(entry["teacher_entropy"])
        state.epoch, state.step, self.sums = state.epoch + 1, 0, Sums()
        state.method.epoch = state.epoch
        state.history.append({"epoch": state.epoch, **entry})
        last = state.epoch == config.epochs
        state.evaluation_due = bool(config.eval_every) and (last or state.epoch % config.eval_every == 0)
        self.save_state()
        self.log(entry)
        if state.evaluation_due:
            return self.evaluate_and_save()
        return self.stop.any_rank_received(self.device)

    def run_step(self, batch: Batch, pass_name: str) -> Tensor:
        """Trains on one batch; returns its loss, on the device."""
        state = self.state
        lr = learning_rate(self.config, self.global_step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        state.method.epoch = state.epoch + state.step / self.steps
        if self.config.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        images = batch.images
        if isinstance(images, tuple):
            images = tuple(view.to(self.device, non_blocking=True) for view in images)
        else:
            images = images.to(self.device, non_blocking=True)
        ids = batch.indices.to(self.device, non_blocking=True) if self.config.exclude_own else None
        self.optimizer.zero_grad()
        loss, logs = self.gradients.add(images, pass_name, ids)
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(state.method.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        state.step += 1
        self.sums.add({"loss": loss, **logs})
        self.bar.update(self.config.batch_size)
        return loss

    def report_compiled(self, seconds: float) -> None:
        self.compiling = False
        self.bar.write(f"compiled, and trained the first step, in {seconds:.0f} s", file=sys.stderr)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def check_and_save(self, losses: list[Tensor]) -> bool:
        """Checks and clears the losses, and saves the step, if it is time to.

        Returns whether a signal has stopped the run.
        """
        state, step = self.state, self.state.step
        save_due = bool(self.save_steps) and self.global_step % self.save_steps == 0
        late = distributed.rank() == 0 and time.monotonic() - self.saved_at >= self.save_seconds
        # Several processes, each with its own signals and clock, must synchronise at the same steps.
        at_any_step = distributed.world_size() == 1 and (self.stop.number is not None or late)
        if not (step % READ_EVERY == 0 or step == self.steps or save_due or at_any_step):
            return False
        values = torch.stack(losses).tolist()
        epoch = f"{state.epoch + 1}/{self.config.epochs}"
        self.bar.set_postfix(epoch=epoch, loss=f"{values[-1]:.4f}", refresh=False)
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), math.inf)
        # The first bad loss of all processes, and whether it is time for any of them to save.
        first_bad, save_now = distributed.all_reduce_max([-bad, float(save_due or late)], self.device)
        if first_bad > -math.inf:
            self.fail("the loss is", state.epoch, step - len(losses) - int(first_bad))
        losses.clear()
        stopped = step < self.steps and self.stop.any_rank_received(self.device)
        if step < self.steps and (save_now or stopped):
            self.save_state()
        return stopped

    def evaluate_and_save(self) -> bool:
        """Evaluates the last epoch, which is saved already; returns whether a signal has stopped the run.

        A signal interrupts the evaluation, and the resumed run repeats it.
        """
        scores = None
        if distributed.rank() == 0:
            method, data = self.state.method, self.data
            with method.eager():
                scores = self.stop.run_unless_stopped(lambda: evaluate_during_training(method, data))
        self.state.history[-1] |= scores or {}
        self.state.evaluation_due = scores is None
        self.save_state()
        self.log(scores or {})
        return self.stop.any_rank_received(self.device)

    @property
    def global_step(self) -> int:
        return self.state.epoch * self.steps + self.state.step

    def log(self, entry: dict[str, float]) -> None:
        """Passes scalars of the last epoch, which are saved already, to the logs."""
        for log in self.logs:
            log(entry, self.global_step, self.state.history)

    def save_state(self) -> None:
        report_skipped(self.skipped, self.bar)
        state, position = self.state, (self.state.epoch, self.state.step)
        tensors = map(distributed.local_part, state.method.state_dict().values())
        finite = torch.stack([t.isfinite().all() for t in tensors]).all()
        if distributed.any_rank(not finite, self.device):  # The loss was of the weights before the last step.
            epoch, step = position
            self.fail("weights are", *((epoch, step - 1) if step else (epoch - 1, self.steps - 1)))
        sums = {name: distributed.all_reduce_mean(total) for name, total in self.sums.totals().items()}
        replaced = self.path if self.saved == position else None
        self.path = save(self.config.out, replace(state, sums=sums), replaced=replaced)
        self.saved, self.saved_at = position, time.monotonic()

    def fail(self, what: str, epoch: int, step: int) -> NoReturn:
        rate = learning_rate(self.config, epoch * self.steps + step, self.steps)
        position = f"epoch {epoch + 1}, step {step + 1} of {self.steps} (learning rate {rate:.3g})"
        kept = f"no checkpoint has been written to {self.config.out} yet"
        lower = "--resume with a lower --lr continues from"
        if self.path and self.saved:
            before, last = previous_path(self.path), describe_position(self.saved[0] + 1, self.saved[1])
            kept = f"{self.path} holds all before {last} and is kept; {lower} there"
            if what == "the loss is" and self.saved == (epoch, step):  # The saved weights cause it.
                kept = f"the weights in {self.path} cause it"
                if before.exists():
                    copy = f"copy {before} over it, and {lower} there"
                    kept += f"; {copy if self.path.is_file() else f'remove it, and {lower} {before}'}"
        raise FloatingPointError(f"{what} not finite at {position}: {kept}")


def find_checkpoint(config: TrainConfig) -> Path | None:
    """Returns the checkpoint that a run continues from, as rank 0 finds it; None for a new run.

    Raises:
        FileExistsError: there is one and config.resume is off, unless this is a restart by torchrun of the
            run that wrote it.
    """
    path, own = None, False
    if distributed.rank() == 0 and (path := newest(config.out)):
        launch, restarted = distributed.launch()
        own = restarted and read(path).get("launch") == launch
    path, own = distributed.all_gather_object((path, own))[0]
    if path and not (config.resume or own):
        raise FileExistsError(f"{path} exists: pass --resume to continue it, or another --out")
    if own and distributed.rank() == 0:
        print(f"restarted by torchrun: continues from {path}", file=sys.stderr)
    return path


def build_optimizer(method: Method, config: TrainConfig) -> torch.optim.Optimizer:
    """Builds the optimizer of the trainable parameters.

    Biases and norms are a separate group, and so are the parameters that a model of timm exempts from decay.
    """
    named = method.backbone.named_parameters()
    exempt: set[str] = getattr(method.backbone, "no_weight_decay", set)()
    undecayed = [p for name, p in named if p.requires_grad and any(fnmatch(name, e) for e in exempt)]
    others = set(method.parameters()) - set(undecayed)
    parameters = [p for p in method.parameters() if p.requires_grad and p in others]
    norm_and_bias_decay = config.weight_decay if config.decay_norm_and_bias else 0.0
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": norm_and_bias_decay},
    ]
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0})
    # Fused, a group takes few launches. On a CPU this makes Adam three times as fast, and SGD slower.
    fused = {"sgd": ("cuda",), "adam": ("cuda", "cpu"), "adamw": ("cuda", "cpu")}[config.optimizer]
    use = parameters[0].device.type in fused or None
    if config.optimizer != "sgd":
        adam = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        return adam(groups, lr=config.lr, fused=use)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, fused=use)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Computes the rate of a step: a linear warm-up to the peak, then a cosine to zero, or the peak."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def parse_save_every(text: str) -> tuple[int, float]:
    """Parses --save-every to a number of steps (0: not by steps) and of seconds (infinite: not by time).

    Raises:
        ValueError: it is neither a number of steps, such as 500, nor one of minutes, such as 10m or 0.5m.
    """
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)m", text or "0", re.ASCII)
    if not match:
        raise ValueError(f"save_every must be a number of steps (500) or of minutes (10m), got {text!r}")
    return int(match[1] or 0), 60 * float(match[2] or 0) or math.inf


@contextmanager
def image_loaders(
    passes: dict[str, datasets.Images],
    config: TrainConfig,
    crops: Sequence[datasets.Crop] | None = None,
    skipped: list[str] | None = None,
) -> Iterator[dict[str, Loader | DeviceLoader]]:
    """Makes the loader of each pass, whose worker processes persist until the context ends.

    Their indices count on from one pass to the next, whose images are others: each image of a run has one
    index. crops, skipped: see `Loader`.
    """
    workers = default_workers() if config.workers is None else config.workers
    loaders: dict[str, Loader | DeviceLoader] = {}
    with ExitStack() as stack:
        first = 0  # The index of the pass's first image.
        for name, images in passes.items():
            if isinstance(images, OnDevice):
                loaders[name] = DeviceLoader(images, first)
            else:
                useful = min(workers, len(images) // config.batch_size)  # A batch is the work of one process.
                loader = Loader(images, useful, skipped, True, crops, config.seed, first)
                loaders[name] = stack.enter_context(closing(loader))
            first += len(images)
        yield loaders


def epoch_batches(
    loaders: dict[str, Loader | DeviceLoader], config: TrainConfig, epoch: int, start: int
) -> Iterator[tuple[str, Batch]]:
    """Yields this process's share of an epoch's batches from step `start` on, with the name of their pass.

    Only the seed and the epoch determine their order.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    share = config.batch_size // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    for name, loader in loaders.items():
        order = torch.randperm(len(loader.images), generator=generator, device="cpu")
        steps = len(order) // config.batch_size
        full = order[: steps * config.batch_size].view(steps, config.batch_size)[:, own]
        remaining, start = full[start:], max(0, start - steps)
        for batch in loader.load(remaining, epoch):
            yield name, batch


def report_skipped(skipped: list[str] | None, bar: tqdm) -> None:
    """Writes a line about the unreadable images that all processes have skipped since the last call."""
    if skipped is not None:
        paths = [path for own in distributed.all_gather_object(skipped) for path in own]
        skipped.clear()
        if paths and distributed.rank() == 0:
            bar.write(f"{skipped_message(paths)}; others replaced them", file=sys.stderr)


@contextmanager
def open_outputs(config: TrainConfig, state: TrainState) -> Iterator[tuple[list[Log], tqdm]]:
    """Opens the logs and a progress bar in rank 0; returns no logs and a disabled bar in others."""
    step = state.epoch * state.steps_per_epoch + state.step
    bar = tqdm(
        total=config.epochs * state.steps_per_epoch * config.batch_size, initial=step * config.batch_size,
        unit=" images", unit_scale=True, dynamic_ncols=True, disable=distributed.rank() != 0,
    )  # fmt: skip
    if distributed.rank():
        yield [], bar
        return
    config.out.mkdir(parents=True, exist_ok=True)
    with open_logs(config, step) as logs, bar:
        yield logs, bar
