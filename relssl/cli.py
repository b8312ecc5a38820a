"""The command line: relssl train METHOD, relssl evaluate and export CHECKPOINT, relssl tune and info."""

import json
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

PLOTS = ("features", "neighbours", "curves")
USAGE = """usage: relssl COMMAND ...

commands:
  train ressl|sacc       train; relssl train ressl --help shows every setting, its default and source
  evaluate CHECKPOINT    nearest-neighbour, linear and clustering scores of a checkpoint's encoder; --plots
  export CHECKPOINT OUT  the encoder as a state_dict that torchvision's or timm's model of it loads
  tune                   verify and time every kernel on this machine, and keep the fastest for "auto"
  info                   versions, backends, and which of them would be chosen"""


def main() -> None:
    """Bad usage exits with status 2; a bad setting, file or loss with 1 and a line that says which."""
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "info":
        from relssl.info import report

        print(report())
    elif command in (commands := {"train": _train, "evaluate": _evaluate, "export": _export, "tune": _tune}):
        try:
            if command != "tune":
                import tyro  # noqa: F401
        except ImportError:
            sys.exit(f"relssl {command} needs more packages: pip install 'relssl[train]'")
        try:
            commands[command](arguments)
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"relssl {command}: {error}")
        except KeyboardInterrupt:
            print(f"relssl {command}: interrupted", file=sys.stderr)
            sys.exit(130)  # What a shell reports of a process that Ctrl-C ended.
    else:
        print(USAGE, file=sys.stderr)
        sys.exit(2)


def _tune(arguments: list[str]) -> None:
    from relssl.tune import main

    main(arguments)


def _train(arguments: list[str]) -> None:
    import argparse

    import tyro

    from relssl import distributed, methods
    from relssl.evaluate import evaluate
    from relssl.methods.base import TrainConfig
    from relssl.train import train

    name, *arguments = arguments or [""]
    if name not in methods.PRESETS:
        print(f"usage: relssl train {{{','.join(methods.PRESETS)}}} ...", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    # The preset decides the defaults, so it is read first: --preset, or the one named like --data.
    presets: dict[str, TrainConfig] = methods.PRESETS[name]  # type: ignore[assignment]
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", choices=presets)
    early.add_argument("--data")
    known, arguments = early.parse_known_args(arguments)
    if known.data:
        arguments += ["--data", known.data]
    preset = presets.get(known.preset or known.data, next(iter(presets.values())))
    config = tyro.cli(
        type(preset),
        default=replace(preset, out=Path("out") / name),
        args=arguments,
        prog=f"relssl train {name} [--preset {{{','.join(presets)}}}]",
    )
    method = train(config)
    if distributed.first() and method.epoch == config.epochs:
        print(json.dumps({"trained encoder": evaluate(method, method.config)}))


def _evaluate(arguments: list[str]) -> None:
    import tyro

    from relssl.checkpoint import load_method, read
    from relssl.evaluate import baselines, evaluate, load
    from relssl.methods.base import DataName

    @dataclass
    class Options:
        """Scores of a checkpoint's encoder on the labels of its data set, or of another, as a line of JSON.

        knn and linear are accuracies on the test images; nmi, acc (Hungarian method) and ari compare
        clusters with classes on training and test images: the method's own clusters, or k-means' of the
        features. What the data lack labels for is left out, and said.
        """

        checkpoint: tyro.conf.Positional[Path]
        """A checkpoint.pt that relssl train wrote."""
        data: DataName | None = None
        """Judge on this data set and its classes, images resized to the checkpoint's size. Default: that of
        training."""
        data_root: Path | None = None
        """Where the data lie, if no longer where they lay in training."""
        classes: str = ""
        """Class folders to use, as in training. Default: all of --data, and without it those of training."""
        skip_unreadable: bool = False
        """Leave out images that cannot be read, and report them (as a run trained so does anyway)."""
        k: int = 200
        """Neighbours that vote. [ReSSL, small data sets]"""
        temperature: float = 0.1
        """Temperature of the votes. [ReSSL, small data sets]"""
        epochs: int = 100
        """Epochs of the linear probe. [ReSSL, small data sets]"""
        baselines: bool = False
        """Judge raw pixels and the untrained encoder, too."""
        plots: bool = False
        """Draw features.png, neighbours.png and curves.png beside the checkpoint."""
        projection: Literal["tsne", "pca"] = "tsne"
        """How features.png maps features to the plane."""
        device: str = "auto"
        """auto is the GPU where there is one. [relssl]"""

    options = tyro.cli(Options, args=arguments, prog="relssl evaluate")
    method, config = load_method(options.checkpoint, options.device)
    if options.data and options.data != config.data:
        config.data_root = None
    config.data_root = options.data_root or config.data_root
    config.classes = options.classes or ("" if options.data else config.classes)
    config.data = options.data or config.data
    config.skip_unreadable |= options.skip_unreadable
    how = options.k, options.temperature, options.epochs
    scores = {"trained encoder": evaluate(method, config, *how)}
    if options.baselines:
        scores |= baselines(config, *how)
    print(json.dumps(scores))
    if options.plots:
        from relssl import plots

        data, folder = load(config), options.checkpoint.parent
        plots.features(method, data, folder / "features.png", options.projection)
        plots.neighbours(method, data, folder / "neighbours.png")
        plots.curves(read(options.checkpoint), folder / "curves.png")
        print(f"written: {', '.join(str(folder / f'{n}.png') for n in PLOTS)}", file=sys.stderr)


def _export(arguments: list[str]) -> None:
    from typing import Annotated

    import torch
    import tyro

    from relssl.checkpoint import load_method
    from relssl.methods.export import Library, encoder_state, recipe

    @dataclass
    class Options:
        """Write a checkpoint's encoder as a plain state_dict, and print the Python that loads it.

        Its names are those of the library's own model of that architecture, which loads it with strict=True
        once its classifier is taken off and, for a small stem, its first layers are changed as printed.
        """

        checkpoint: tyro.conf.Positional[Path]
        """A checkpoint.pt that relssl train wrote."""
        out: tyro.conf.Positional[Path]
        """The file to write: .safetensors in that format, any other to be read with torch.load."""
        library: Annotated[Library, tyro.conf.arg(name="for")] = "relssl"
        """Whose names: torchvision's, timm's, or those of relssl's encoder (torchvision's, but for conv4)."""

    options = tyro.cli(Options, args=arguments, prog="relssl export")
    safe = options.out.suffix == ".safetensors"
    if safe:
        try:
            import safetensors.torch
        except ImportError as error:
            raise ValueError(f"{options.out} needs another package: pip install safetensors") from error
    method, config = load_method(options.checkpoint, "cpu")
    state = encoder_state(method.backbone, config.arch, options.library)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("wb") as file:
        if safe:
            file.write(safetensors.torch.save(state, {"format": "pt"}))
        else:
            torch.save(state, file)
    size = sum(t.numel() for t in state.values())
    print(f"{options.out}: {config.arch}, stem {config.stem}, {len(state)} tensors, {size:,} numbers")
    library = "relssl.methods.backbones" if options.library == "relssl" else options.library
    reader, read = ("safetensors.torch", "load_file") if safe else ("torch", "load")
    print(f"import {reader}, {library}; from torch import nn")
    print(recipe(config.arch, config.stem, options.library))
    print(f"net.load_state_dict({reader}.{read}({str(options.out)!r}), strict=True)")
