"""The commands relssl train METHOD, relssl evaluate and export CHECKPOINT, relssl tune and info."""

import json
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

if TYPE_CHECKING:
    from relssl.methods.base import TrainConfig

from relssl.version import __version__

PLOTS = ("features", "neighbours", "curves")
USAGE = """usage: relssl COMMAND ...

commands:
  train METHOD           train ressl, sacc or distill, or the baselines moco, simclr or cc;
                         relssl train ressl --help shows every setting, its default and source
  evaluate CHECKPOINT    compute nearest-neighbour, linear and clustering scores of an encoder; --plots
  export CHECKPOINT OUT  write the encoder as a state_dict for torchvision's or timm's model
  tune                   verify and time every kernel on this machine, and keep the fastest for "auto"
  info                   print versions and backends, and which backends would be chosen

options: --help, --version"""


def main() -> None:
    """Runs a command. Bad usage exits with status 2; a bad setting, file or loss with 1 and an error line."""
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        print(f"relssl {__version__}")
    elif command == "info":
        from relssl.info import report

        print(report())
    elif command in COMMANDS:
        try:
            if command != "tune":
                import tyro  # noqa: F401
        except ImportError:
            sys.exit(f"relssl {command} needs more packages: pip install 'relssl[train]'")
        from relssl.distributed import end_of_process

        with end_of_process():
            try:
                COMMANDS[command](arguments)
            except (ValueError, OSError, FloatingPointError) as error:
                sys.exit(f"relssl {command}: {error}")
            except KeyboardInterrupt:
                print(f"relssl {command}: interrupted", file=sys.stderr)
                sys.exit(130)  # A shell's status of a process that Ctrl-C ended.
    else:
        print(USAGE, file=sys.stderr)
        sys.exit(2)


def _tune(arguments: list[str]) -> None:
    from relssl.tune import main

    main(arguments)


def train_config(name: str, arguments: list[str]) -> "TrainConfig":
    """Returns the config of `relssl train NAME`; bad usage exits with status 2."""
    import argparse

    import tyro

    from relssl import methods

    # The preset determines the defaults, so it is read first: --preset, or the one with --data's name.
    presets = methods.PRESETS[name]
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", choices=presets)
    early.add_argument("--data")
    early.add_argument("--loggers", nargs="+")  # torchrun takes --log for its own --log-dir.
    known, arguments = early.parse_known_args(arguments)
    if known.data:
        arguments += ["--data", known.data]
    if known.loggers:
        arguments += ["--log", *known.loggers]
    preset = presets.get(known.preset or known.data, next(iter(presets.values())))
    return tyro.cli(
        type(preset),
        default=replace(preset, out=Path("out") / name),
        args=arguments,
        prog=f"relssl train {name} [--preset {{{','.join(presets)}}}]",
    )


def _train(arguments: list[str]) -> None:
    from relssl import distributed, methods
    from relssl.evaluate import evaluate
    from relssl.train import train

    name, *arguments = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: relssl train {{{','.join(methods.PRESETS)}}} ...\n")
        print("relssl train ressl --help shows every setting, its default and source; so for each method.")
        return
    if name not in methods.PRESETS:
        print(f"relssl train: no method {name!r}, only {', '.join(methods.PRESETS)}", file=sys.stderr)
        sys.exit(2)
    config = train_config(name, arguments)
    method = train(config)
    if distributed.is_main_process() and method.epoch == config.epochs:
        print(json.dumps({"trained encoder": evaluate(method, method.config)}))


def _evaluate(arguments: list[str]) -> None:
    import tyro

    from relssl.checkpoint import load_method, locate, read
    from relssl.evaluate import EvalConfig, baselines, evaluate, load

    @dataclass(kw_only=True)
    class Options(EvalConfig):
        """Print the scores of a checkpoint's encoder on its data set, or another, as a line of JSON.

        knn and linear are accuracies on the test images; nmi, acc (Hungarian method) and ari compare
        clusters with classes on training and test images: the method's own clusters, or those of k-means on
        the features. Scores for which the data set has no labels are omitted, with a warning.
        """

        checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
        """A checkpoint.pt or a folder in checkpoints/ that relssl train wrote, or the --out of a run, for
        its newest one."""
        data: str | None = None
        """Evaluate on this data set and its classes, with images resized to the checkpoint's size: a name, or
        FILE.py:FUNCTION, as in training. Default: that of training."""
        data_root: Path | None = None
        """Path of the data, if it is not the same as in training."""
        classes: str = ""
        """Class folders to use, as in training. Default: those of training, or all of --data."""
        skip_unreadable: bool = False
        """Skip images that cannot be read, and report them. Default: as in training."""
        baselines: bool = False
        """Evaluate raw pixels and the untrained encoder, too."""
        plots: bool = False
        """Draw features.png, neighbours.png and curves.png beside the checkpoint, or in the run's folder."""
        projection: Literal["tsne", "pca"] = "tsne"
        """How features.png projects features to the plane."""
        device: str = "auto"
        """auto is the GPU if there is one. [relssl]"""

    options = tyro.cli(Options, args=arguments, prog="relssl evaluate")
    method, config = load_method(options.checkpoint, options.device)
    if options.data and options.data != config.data:
        config.data_root = None
    config.data_root = options.data_root or config.data_root
    config.classes = options.classes or ("" if options.data else config.classes)
    config.data = options.data or config.data
    config.skip_unreadable |= options.skip_unreadable
    scores = {"trained encoder": evaluate(method, config, options)}
    if options.baselines:
        scores |= baselines(config, options)
    print(json.dumps(scores))
    if options.plots:
        from relssl import plots

        path = options.checkpoint
        data, folder = load(config), path.parent if locate(path) == path else path
        plots.features(method, data, folder / "features.png", options.projection)
        plots.neighbours(method, data, folder / "neighbours.png")
        plots.curves(read(options.checkpoint), folder / "curves.png")
        print(f"written: {', '.join(str(folder / f'{n}.png') for n in PLOTS)}", file=sys.stderr)


def _export(arguments: list[str]) -> None:
    import torch
    import tyro

    from relssl.checkpoint import load_method
    from relssl.methods.export import Library, encoder_state, model_code

    @dataclass
    class Options:
        """Write a checkpoint's encoder as a plain state_dict, and print the Python that loads it.

        The tensors' names are those of the library's own model of the architecture. It loads them with
        strict=True after the printed changes: no classifier and, for a small stem, other first layers.
        """

        checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
        """A checkpoint.pt or a folder in checkpoints/ that relssl train wrote, or the --out of a run, for
        its newest one."""
        out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
        """The file to write: in the format safetensors with that extension, otherwise for torch.load."""
        library: Annotated[Library, tyro.conf.arg(name="for")] = "relssl"
        """Library whose names are used; relssl's are those of torchvision, and of conv4."""

    options = tyro.cli(Options, args=arguments, prog="relssl export")
    use_safetensors = options.out.suffix == ".safetensors"
    if use_safetensors:
        try:
            import safetensors.torch
        except ImportError as error:
            raise ValueError(f"{options.out} needs another package: pip install safetensors") from error
    method, config = load_method(options.checkpoint, "cpu")
    state = encoder_state(method.backbone, config.arch, options.library)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("wb") as file:
        if use_safetensors:
            file.write(safetensors.torch.save(state, {"format": "pt"}))
        else:
            torch.save(state, file)
    size = sum(t.numel() for t in state.values())
    print(f"{options.out}: {config.arch}, {len(state)} tensors, {size:,} numbers")
    library = "relssl.methods.backbones" if options.library == "relssl" else options.library
    module, function = ("safetensors.torch", "load_file") if use_safetensors else ("torch", "load")
    code = model_code(config.arch, config.stem, options.library, config.image_size, config.patch_size)
    print(f"import {module}, {library}" + "; from torch import nn" * ("nn." in code))
    print(code)
    print(f"net.load_state_dict({module}.{function}({str(options.out)!r}), strict=True)")


COMMANDS = {"train": _train, "evaluate": _evaluate, "export": _export, "tune": _tune}
