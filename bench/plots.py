"""Plots of a run's results: time and memory against K, rates, and the loss's share of a training step.

Also that of the model of many GPUs, which has no run.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib
import scaling

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from report import is_relssl, rate_limits

OURS, GREY = "#1f5fa8", "#8a8a8a"
COLOURS = {
    "eager": "#b3442e",
    "torch.compile": "#d98a2b",
    "attention": "#3f8f5f",
    "attention, split queue": "#8cc5a2",
    "relssl cuda": "#0b8f9c",
    "relssl cuda/sm_90a": "#123c6b",
    "relssl triton, graph": "#5b93cf",
    "relssl chunked": "#7fa9d8",
    "relssl reference": "#c9c9c9",
    "liger-kernel": "#8a5aa8",
    "liger-kernel, Triton": "#b891cf",
    "solo-learn": "#c77fa0",
}
STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150}


def draw(path: Path) -> list[Path]:
    """Draws the plots of a JSON file beside it, with its digest in their metadata; returns their paths."""
    document = json.loads(path.read_text())
    drawn = []
    for name, plot in {"size": by_size, "rate": rates, "roofline": roofline, "step": steps}.items():
        with plt.rc_context(STYLE):
            figure = plot(document)
            if figure is None:
                continue
            target = path.with_name(f"{path.stem}-{name}.png")
            figure.savefig(target, metadata={"Source": digest(path)})
            plt.close(figure)
            drawn.append(target)
    return drawn


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def colour(name: str) -> str:
    return COLOURS.get(name, OURS if is_relssl(name) else GREY)


def timed(document: dict, work: str) -> list[dict]:
    return [e for e in document["results"] if e["work"] == work and "ms" in e]


def by_size(document: dict) -> Figure | None:
    """Plots time and memory against K, a line for each peer, at the batch with most sizes."""
    entries = [e for e in timed(document, "relation") if e["grad"]]
    sizes_of: dict[tuple, set] = {}
    for e in entries:
        sizes_of.setdefault((e["rows"], e["dim"], e["dtype"]), set()).add(e["size"])
    if not sizes_of:
        return None
    batch = max(sizes_of, key=lambda key: len(sizes_of[key]))
    if len(sizes_of[batch]) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.6), layout="constrained")
    names = list(dict.fromkeys(e["peer"] for e in entries))
    for name in sorted(names, key=is_relssl):  # relssl is last, above the others.
        line = {"color": colour(name), "marker": "o", "markersize": 3.5}
        line |= {"linewidth": 2.6, "zorder": 5} if is_relssl(name) else {"linewidth": 1.4}
        mine = [e for e in entries if e["peer"] == name and (e["rows"], e["dim"], e["dtype"]) == batch]
        if not mine:
            continue
        mine.sort(key=lambda e: e["size"])
        axes[0].plot([e["size"] for e in mine], [e["ms"][0] for e in mine], label=name, **line)
        kept = [e for e in mine if "bytes" in e]
        axes[1].plot([e["size"] for e in kept], [e["bytes"] / 2**20 for e in kept], **line)
    sizes = sorted(sizes_of[batch])
    for axis, label in zip(
        axes, ("time, forward + backward (ms)", "peak memory beyond inputs (MiB)"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="queue rows K", ylabel=label)
        axis.set_xticks(sizes, [f"{k // 1024}k" if k < 2**20 else f"{k // 2**20}M" for k in sizes])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axis.grid(alpha=0.25)
    rows, dim, dtype = batch
    figure.suptitle(f"relation loss, B {rows:,}, D {dim}, {dtype}\n{document['device']}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def rates(document: dict) -> Figure | None:
    """Plots the flop rate of each peer in the first case, as a part of torch.mm's in the same rounds."""
    entries = [e for e in timed(document, "relation") if e["grad"]]
    entries = [e for e in entries if e["shape"] == entries[0]["shape"]]
    if not entries:
        return None
    entries.sort(key=lambda e: -e["ms"][0])
    figure, axis = plt.subplots(figsize=(8.4, 0.6 + 0.34 * len(entries) + 0.8), layout="constrained")
    parts = [e["flop_rate"] / e["matmul_rate"] for e in entries]
    names = [e["peer"] for e in entries]
    bars = axis.barh(names, parts, color=[OURS if is_relssl(n) else GREY for n in names], height=0.68)
    axis.bar_label(bars, [f"{p:.2f}" for p in parts], padding=3)
    axis.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axis.text(
        1.0, 1.0, "torch.mm ", ha="right", va="bottom", transform=axis.get_xaxis_transform(), fontsize=9
    )
    axis.margins(x=0.09)
    axis.set(xlabel="rate of the least sufficient flop, as a part of torch.mm's")
    figure.suptitle(f"relation loss, forward + backward, {entries[0]['shape']}\n{document['device']}")
    return figure


def roofline(document: dict) -> Figure | None:
    """Plots the rates of relssl's kernels, and what bounds them, against the flop for each byte of the queue.

    The queue counts once: B rows make 8 B D flop of each of its rows, and what several blocks of rows read
    again comes from a cache.
    """
    limits, dim = rate_limits(document), 128
    dtype, bytes_each = ("bfloat16", 2) if "driver" in document else ("float32", 4)
    entries = [
        e
        for e in timed(document, "relation")
        if e["grad"] and is_relssl(e["peer"]) and e["size"] >= 65_536 and e["dtype"] == dtype
    ]
    if not entries:
        return None
    figure, axis = plt.subplots(figsize=(8.4, 4.2), layout="constrained")
    intensity = [2.0**n for n in range(1, 14)]
    scale = 1e9 if limits["matmul"] < 1e13 else 1e12
    tops = {"torch.mm": limits["matmul"]}
    if "fma" in limits:
        tops["multiply-adds in registers"] = limits["fma"]
    if "exponentials" in limits:  # Two for 8 D flop.
        tops[f"exponentials, D {dim}"] = 4 * dim * limits["exponentials"]
    for (name, top), line in zip(tops.items(), ("-", "-", ":"), strict=False):
        axis.axhline(top / scale, color="black", linestyle=line, linewidth=1.2)
        axis.text(intensity[-1], top / scale, name, ha="right", va="bottom", fontsize=9)
    axis.plot(
        intensity,
        [x * limits["bandwidth"] / scale for x in intensity],
        color="black",
        linestyle="--",
        linewidth=1.2,
    )
    axis.text(
        intensity[0], intensity[0] * limits["bandwidth"] / scale * 1.5, "memory", rotation=30, fontsize=9
    )
    for name in dict.fromkeys(e["peer"] for e in entries):
        mine = list({(e["rows"], e["dim"]): e for e in reversed(entries) if e["peer"] == name}.values())
        at = [8 * e["rows"] / bytes_each for e in mine]
        axis.plot(
            at, [e["flop_rate"] / scale for e in mine], "o", color=colour(name), label=name, markersize=5
        )
        for e, x in zip(mine, at, strict=True):
            label = f"B {e['rows']}" + (f", D {e['dim']}" if e["dim"] != dim else "")
            axis.annotate(
                label,
                (x, e["flop_rate"] / scale),
                (0, -13),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axis.set(xscale="log", yscale="log", xlabel="flop for a byte of the queue (8 B / bytes of a value)")
    axis.set(ylabel=f"{'TFlop' if scale == 1e12 else 'GFlop'}/s")
    axis.set_xscale("log", base=2)
    low, high = min(e["flop_rate"] for e in entries), max(tops.values())
    axis.set_ylim(low / scale / 3, high / scale * 4)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    axis.grid(alpha=0.25)
    figure.suptitle(f"relation loss, forward + backward, K 65,536 and more\n{document['device']}")
    return figure


def steps(document: dict) -> Figure | None:
    """Plots a step of training and the losses' share of it, with relssl and with eager code."""
    entries = [e for e in timed(document, "ressl_step") if e["peer"] in ("relssl", "eager")]
    if not entries:
        return None
    names = list(dict.fromkeys(e["title"].removeprefix("a training step of ") for e in entries))
    figure, axes = plt.subplots(1, len(names), figsize=(8.4, 3.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [e for e in entries if e["title"].endswith(name)]
        sizes = sorted({e["size"] for e in mine})
        for e in mine:
            side, shade = (-0.2, OURS) if e["peer"] == "relssl" else (0.2, COLOURS["eager"])
            at = sizes.index(e["size"]) + side
            loss = min(e["loss_ms"], e["ms"][0])
            axis.bar(at, e["ms"][0] - loss, 0.36, color="#d9d9d9")
            axis.bar(at, loss, 0.36, bottom=e["ms"][0] - loss, color=shade)
            share = f"{e['loss_share']:.0%}"
            axis.text(at, e["ms"][0], share, ha="center", va="bottom", fontsize=9, color=shade)
        axis.set_xticks(range(len(sizes)), [f"{k:,}" for k in sizes])
        axis.set(xlabel="queue rows K", ylabel="one step (ms)", title=f"{name}, B {mine[0]['rows']}")
        axis.margins(y=0.12)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (OURS, COLOURS["eager"], "#d9d9d9")]
    labels = ["relation loss by relssl", "by eager code", "augmentation, encoders, optimizer"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"one training step and the loss's share of it\n{document['device']}")
    return figure


def draw_scaling(target: Path) -> Path:
    """Draws the model of many GPUs, with the digest of its numbers in the metadata; returns the path."""
    with plt.rc_context(STYLE):
        figure = many_gpus()
        figure.savefig(target, metadata={"Source": scaling_digest()})
        plt.close(figure)
    return target


def scaling_digest() -> str:
    """Returns a digest of what `many_gpus` plots, to six digits."""
    lines = [*scaling.times_of_queues().items(), *scaling.largest_queues().items()]
    text = [f"{name}: {[(n, f'{value:.6g}') for n, value in line]}" for name, line in lines]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def many_gpus() -> Figure:
    """Plots the model's time of enqueueing and the relation loss, and the largest queue, against the GPUs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    shades = dict(zip(scaling.ROWS, ("#8fbbe3", "#4a86c5", "#1b4f8f", "#0a1f3d"), strict=True))
    looks: dict[str, Any] = {
        "replicated": {"linestyle": "--", "marker": "s", "markersize": 3.5},
        "sharded": {"linestyle": "-", "marker": "o", "markersize": 3.5},
    }
    for (kind, rows), line in scaling.times_of_queues().items():
        left.plot(*zip(*line, strict=True), color=shades[rows], **looks[kind])
        if kind == "sharded":
            label_start(left, line[0], f"K 2$^{{{rows.bit_length() - 1}}}$", shades[rows])
    left.set(ylabel="enqueueing + relation loss (ms)", title="a step on H100s")
    colours = {"H100": OURS, "H200": COLOURS["torch.compile"]}
    for (kind, name), line in scaling.largest_queues().items():
        right.plot(*zip(*line, strict=True), color=colours[name], **looks[kind])
        label_start(right, line[0], name, colours[name])
    right.set(ylabel="queue rows K", title=f"the largest queue in {scaling.QUEUE_SHARE:.0%} of the memory")
    for axis in (left, right):
        axis.set(yscale="log", xlabel="GPUs (8 in a node)")
        axis.set_xscale("log", base=2)
        axis.set_xticks(scaling.PROCESSES, [f"{n:,}" for n in scaling.PROCESSES], fontsize=9)
        axis.set_xlim(scaling.PROCESSES[0] / 2.2, scaling.PROCESSES[-1] * 1.4)
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    left.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    handles = [plt.Line2D([], [], color=GREY, label=f"{kind} queue", **look) for kind, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    s = scaling.EXAMPLE
    about = f"B {s.batch} per GPU, D {s.dim}, V {s.views}, bfloat16"
    figure.suptitle(f"a model from data sheets, not a measurement\n{about}")
    return figure


def label_start(axis: Any, start: tuple[int, float], text: str, colour: str) -> None:
    """Writes a line's name on the left of its first point."""
    axis.annotate(text, start, (-6, 0), textcoords="offset points", color=colour, ha="right", va="center")
