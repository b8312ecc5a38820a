"""The command line: relssl train METHOD, relssl evaluate CHECKPOINT, relssl info."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

USAGE = """usage: relssl COMMAND ...

commands:
  train ressl            train; relssl train ressl --help shows every setting, its default and source
  evaluate CHECKPOINT    nearest-neighbour and linear accuracy of a checkpoint's encoder
  info                   versions, backends, and which of them would be chosen"""


def main() -> None:
    """Bad usage exits with status 2; a bad setting or a missing file with 1 and a line that says which."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "info":
        from relssl.info import report

        print(report())
    elif command in ("train", "evaluate"):
        try:
            import tyro  # noqa: F401
        except ImportError:
            sys.exit(f"relssl {command} needs more packages: pip install 'relssl[train]'")
        try:
            (_train if command == "train" else _evaluate)(arguments)
        except (ValueError, OSError) as error:
            sys.exit(f"relssl {command}: {error}")
    else:
        print(USAGE, file=sys.stderr)
        sys.exit(2)


def _train(arguments: list[str]) -> None:
    import argparse

    import tyro

    from relssl import methods
    from relssl.evaluate import evaluate
    from relssl.train import train

    method, *arguments = arguments or [""]
    if method not in methods.PRESETS:
        print(f"usage: relssl train {{{','.join(methods.PRESETS)}}} ...", file=sys.stderr)
        sys.exit(0 if method in ("-h", "--help") else 2)
    # The preset decides the defaults, so it is read first: --preset, or the one named like --data.
    presets = methods.PRESETS[method]
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", choices=presets)
    early.add_argument("--data")
    known, arguments = early.parse_known_args(arguments)
    if known.data:
        arguments += ["--data", known.data]
    preset = presets.get(known.preset or known.data, next(iter(presets.values())))
    config = tyro.cli(
        type(preset),
        default=replace(preset, out=Path("out") / method),
        args=arguments,
        prog=f"relssl train {method} [--preset {{{','.join(presets)}}}]",
    )
    print(json.dumps({"trained encoder": evaluate(train(config), config)}))


def _evaluate(arguments: list[str]) -> None:
    import tyro

    from relssl.checkpoint import load_method
    from relssl.evaluate import baselines, evaluate

    @dataclass
    class Options:
        """Accuracy of the encoder of a checkpoint on the labels of its data set, as a line of JSON."""

        checkpoint: tyro.conf.Positional[Path]
        """A checkpoint.pt that relssl train wrote."""
        data_root: Path | None = None
        """Where the data lie, if no longer where they lay in training."""
        k: int = 200
        """Neighbours that vote. [ReSSL, small data sets]"""
        temperature: float = 0.1
        """Temperature of the votes. [ReSSL, small data sets]"""
        epochs: int = 100
        """Epochs of the linear probe. [ReSSL, small data sets]"""
        baselines: bool = False
        """Judge raw pixels and the untrained encoder, too."""
        device: str = "auto"
        """auto is the GPU where there is one. [relssl]"""

    options = tyro.cli(Options, args=arguments, prog="relssl evaluate")
    method, config = load_method(options.checkpoint, options.device)
    config.data_root = options.data_root or config.data_root
    how = options.k, options.temperature, options.epochs
    scores = {"trained encoder": evaluate(method, config, *how)}
    if options.baselines:
        scores |= baselines(config, *how)
    print(json.dumps(scores))
