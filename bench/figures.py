"""Plots of recorded results, and the README's part that shows them.

python bench/figures.py        draws bench/results/*.json anew and writes README.md's table (make figures)
"""

import hashlib
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter
from report import groups, number

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
START, END = "<!-- make figures writes from here -->", "<!-- to here -->"

OURS, GREY = "#1f5fa8", "#8a8a8a"
COLOURS = {
    "eager": "#b3442e",
    "torch.compile": "#d98a2b",
    "attention": "#3f8f5f",
    "attention, split queue": "#8cc5a2",
    "relssl chunked": "#7fa9d8",
    "relssl reference": "#c9c9c9",
    "liger-kernel": "#8a5aa8",
    "liger-kernel, Triton": "#b891cf",
    "solo-learn": "#c77fa0",
}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150}


def draw(path: Path) -> list[Path]:
    """The plots of a JSON file, beside it. Each says in its metadata which file it was drawn from."""
    document = json.loads(path.read_text())
    drawn = []
    for name, plot in {"size": by_size, "rate": rates, "step": steps}.items():
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


def timed(document: dict, work: str) -> list[dict]:
    return [e for e in document["results"] if e["work"] == work and "ms" in e]


def by_size(document: dict):
    """Time and memory against K, a line for each peer, at the batch that was run with most sizes."""
    entries = [e for e in timed(document, "relation") if e["grad"]]
    kinds: dict[tuple, set] = {}
    for e in entries:
        kinds.setdefault((e["rows"], e["dim"], e["dtype"]), set()).add(e["size"])
    if not kinds:
        return None
    kind = max(kinds, key=lambda k: len(kinds[k]))
    if len(kinds[kind]) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.6), layout="constrained")
    names = list(dict.fromkeys(e["peer"] for e in entries))
    for name in sorted(names, key=own):  # Ours last, above the others.
        line = {"color": OURS if own(name) else COLOURS.get(name, GREY), "marker": "o", "markersize": 3.5}
        line |= {"linewidth": 2.6, "zorder": 5} if own(name) else {"linewidth": 1.4}
        mine = [e for e in entries if e["peer"] == name and (e["rows"], e["dim"], e["dtype"]) == kind]
        if not mine:
            continue
        mine.sort(key=lambda e: e["size"])
        axes[0].plot([e["size"] for e in mine], [e["ms"][0] for e in mine], label=name, **line)
        kept = [e for e in mine if "bytes" in e]
        axes[1].plot([e["size"] for e in kept], [e["bytes"] / 2**20 for e in kept], **line)
    sizes = sorted(kinds[kind])
    for axis, label in zip(
        axes, ("time, forward + backward (ms)", "peak memory beyond inputs (MiB)"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="queue rows K", ylabel=label)
        axis.set_xticks(sizes, [f"{k // 1024}k" if k < 2**20 else f"{k // 2**20}M" for k in sizes])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axis.grid(alpha=0.25)
    rows, dim, dtype = kind
    figure.suptitle(f"relation loss, B {rows:,}, D {dim}, {dtype}\n{document['device']}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def own(name: str) -> bool:
    """Whether it is one of relssl's kernels: not its PyTorch code."""
    return name.startswith("relssl") and name not in ("relssl chunked", "relssl reference")


def rates(document: dict):
    """The flop rate of each peer at the yardstick, as a part of torch.mm's in the same rounds."""
    entries = [e for e in timed(document, "relation") if e["grad"]]
    entries = [e for e in entries if e["shape"] == entries[0]["shape"]]
    if not entries:
        return None
    entries.sort(key=lambda e: -e["ms"][0])
    figure, axis = plt.subplots(figsize=(8.4, 0.6 + 0.34 * len(entries) + 0.8), layout="constrained")
    parts = [e["flop_rate"] / e["matmul_rate"] for e in entries]
    names = [e["peer"] for e in entries]
    bars = axis.barh(names, parts, color=[OURS if own(n) else GREY for n in names], height=0.68)
    axis.bar_label(bars, [f"{p:.2f}" for p in parts], padding=3)
    axis.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axis.text(
        1.0, 1.0, "torch.mm ", ha="right", va="bottom", transform=axis.get_xaxis_transform(), fontsize=9
    )
    axis.margins(x=0.09)
    axis.set(xlabel="rate of the least flop that suffice, as a part of torch.mm's")
    figure.suptitle(f"relation loss, forward + backward, {entries[0]['shape']}\n{document['device']}")
    return figure


def steps(document: dict):
    """A step of training and the losses in it, by relssl and by eager code."""
    entries = timed(document, "ressl_step")
    if not entries:
        return None
    names = list(dict.fromkeys(e["title"].removeprefix("a training step of ") for e in entries))
    figure, axes = plt.subplots(1, len(names), figsize=(8.4, 3.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [e for e in entries if e["title"].endswith(name)]
        sizes = sorted({e["size"] for e in mine})
        for e in mine:
            fast = e["peer"] == "relssl"
            at, colour = (
                sizes.index(e["size"]) + (0.2 if not fast else -0.2),
                OURS if fast else COLOURS["eager"],
            )
            loss = min(e["loss_ms"], e["ms"][0])
            axis.bar(at, e["ms"][0] - loss, 0.36, color="#d9d9d9")
            axis.bar(at, loss, 0.36, bottom=e["ms"][0] - loss, color=colour)
            told = f"{e['loss_share']:.0%}"
            axis.text(at, e["ms"][0], told, ha="center", va="bottom", fontsize=9, color=colour)
        axis.set_xticks(range(len(sizes)), [f"{k:,}" for k in sizes])
        axis.set(xlabel="queue rows K", ylabel="one step (ms)", title=f"{name}, B {mine[0]['rows']}")
        axis.margins(y=0.12)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (OURS, COLOURS["eager"], "#d9d9d9")]
    told = ["relation loss by relssl", "by eager code", "augmentation, encoders, optimizer"]
    figure.legend(handles, told, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"one training step and the loss's share of it\n{document['device']}")
    return figure


# ------------------------------------------------------------------------------------------------ README


def readme(text: str) -> str:
    """README.md with the part between its two marks written from bench/results."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    documents = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    parts = [section(path, document) for path, document in documents.items()]
    if not any("driver" in document for document in documents.values()):
        parts.append("**No result on a GPU is recorded yet.**\n")
    return before + START + "\n\n" + "\n".join(parts) + "\n" + END + after


def section(path: Path, document: dict) -> str:
    """The yardstick with every peer, all other work in a line each, and the plots."""
    (title, entries), *others = groups(document)
    versions = ", ".join(
        f"{n} {document[n]}" for n in ("driver", "torch", "triton", "commit", "date") if n in document
    )
    lines = [f"**{document['device']}** ({versions}): {title}", ""]
    lines += ["| | ms | times relssl's | error | MiB | of torch.mm's rate |", "|---|---|---|---|---|---|"]
    for e in entries:
        if "ms" in e:
            mid, low, high = e["times_ours"]
            cells = [
                e["peer"],
                number(e["ms"][0]),
                f"{mid:.2f} ({low:.2f} to {high:.2f})",
                f"{e['error']:.0e}",
            ]
            cells += [
                number(e["bytes"] / 2**20) if "bytes" in e else "",
                f"{e['flop_rate'] / e['matmul_rate']:.2f}",
            ]
            lines.append("| " + " | ".join(f"**{c}**" if own(e["peer"]) else c for c in cells) + " |")
    lines += ["", "| | relssl, ms | eager | best other | |", "|---|---|---|---|---|"]
    for title, entries in others:
        rest = [e for e in entries if "ms" in e and not e["peer"].startswith("relssl")]
        if rest:
            best = min(rest, key=lambda e: e["times_ours"][0])
            ours = best["ms"][0] / best["times_ours"][0]
            eager = [f"{e['times_ours'][0]:.2f}" for e in rest if e["peer"] == "eager"] or [""]
            lines.append(
                f"| {title} | {number(ours)} | {eager[0]} | {best['times_ours'][0]:.2f} | {best['peer']} |"
            )
    lines += [""]
    for name in ("size", "rate", "step"):
        plot = path.with_name(f"{path.stem}-{name}.png")
        if plot.exists():
            lines += [f"![{ALT[name]}]({plot.relative_to(ROOT)})", ""]
    return "\n".join(lines)


ALT = {
    "size": "Time and memory against the size of the queue",
    "rate": "Rate of each peer as a part of a matrix product's",
    "step": "A training step, and the loss's share of it",
}


if __name__ == "__main__":
    for recorded in sorted(RESULTS.glob("*.json")):
        print(*draw(recorded), sep="\n")
    target = ROOT / "README.md"
    target.write_text(readme(target.read_text()))
