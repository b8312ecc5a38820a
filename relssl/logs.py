"""Where a run's scalars go, besides metrics.json: TensorBoard, Weights & Biases, or a CSV file."""

import csv
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from relssl.methods.base import TrainConfig

LogName = Literal["tensorboard", "wandb", "csv"]
Entry = dict[str, float]
# Is called with the scalars that are new, the number of steps so far, and the entries of all epochs.
Log = Callable[[Entry, int, list[Entry]], None]


def check(names: tuple[LogName, ...]) -> None:
    """Raises ValueError unless it is a tuple of names of logs."""
    unknown = [name for name in names if name not in LOGS]
    if isinstance(names, str) or unknown:
        expected = f"names among {', '.join(LOGS)}"
        raise ValueError(f"log must be {expected}, got {names!r}")


@contextmanager
def open_logs(config: "TrainConfig", step: int) -> Iterator[list[Log]]:
    """Opens the logs of config.log, which continue those of a run that is resumed at a step.

    Raises:
        ValueError: a package is missing.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(LOGS[name](config, step)) for name in dict.fromkeys(config.log)]


def _missing(name: str, package: str) -> ValueError:
    return ValueError(f"log {name} needs another package: pip install {package}")


@contextmanager
def _tensorboard(config: "TrainConfig", step: int) -> Iterator[Log]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard", "tensorboard") from error
    # What was logged after the checkpoint will be logged again.
    with SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1) as writer:

        def log(entry: Entry, step: int, history: list[Entry]) -> None:
            for name, value in entry.items():
                writer.add_scalar(name, value, step)

        yield log


@contextmanager
def _wandb(config: "TrainConfig", step: int) -> Iterator[Log]:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb", "wandb") from error
    path = config.out / "wandb-id.txt"
    if not (step and path.exists()):
        path.write_text(secrets.token_hex(4))
    run = wandb.init(
        project="relssl", name=config.out.name, dir=str(config.out), config=config.as_json(),
        id=path.read_text(), resume="allow",
    )  # fmt: skip
    run.define_metric("*", step_metric="step")
    with run:
        yield lambda entry, step, history: run.log({**entry, "step": step})


@contextmanager
def _csv(config: "TrainConfig", step: int) -> Iterator[Log]:
    """Has a row for each epoch, and a column for each scalar that any epoch has.

    All rows are written each time, since an epoch's scores, which come later, may be new columns.
    """

    def log(entry: Entry, step: int, history: list[Entry]) -> None:
        columns = dict.fromkeys(name for epoch in history for name in epoch)
        with (config.out / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(history)

    yield log


LOGS = {"tensorboard": _tensorboard, "wandb": _wandb, "csv": _csv}
