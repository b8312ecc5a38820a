"""Pictures of a trained method: its features, what its embeddings relate to, and how training went."""

from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from torch import Tensor

from relssl import data as datasets
from relssl.data.loading import spread
from relssl.evaluate import collect
from relssl.methods.base import Method

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, GREY = ("#1f5fa8", "#c8553d", "#4a8c5c", "#8a5fa8", "#c9a227"), "#9a9a9a"


def features(
    method: Method,
    data: datasets.Data,
    path: Path,
    projection: Literal["tsne", "pca"] = "tsne",
    count: int = 2000,
) -> None:
    """At most `count` test images as points, by two coordinates of their features, coloured by class.

    Training images, where there are no labelled test images; of one colour, where there are no labels.
    """
    images, what = _pictured(data)
    some = datasets.Subset(images, spread(len(images), count))
    skipped = method.config.skip_list()
    x, labels = (t.cpu().numpy() for t in collect(method.features, some, skipped=skipped))
    if projection == "pca":
        from sklearn.decomposition import PCA

        points = PCA(2, random_state=0).fit_transform(x)
    else:
        from sklearn.manifold import TSNE

        points = TSNE(2, init="pca", perplexity=min(30, len(x) / 4), random_state=0).fit_transform(x)
    figure, axis = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    colours = plt.get_cmap("tab10" if len(data.classes) <= 10 else "tab20")
    for label in np.unique(labels):
        # A longer legend would hide the picture.
        name = ("no label" if label < 0 else data.classes[label]) if label < 20 else None
        colour = colours(label % colours.N)
        at = points[labels == label]
        axis.scatter(at[:, 0], at[:, 1], s=7, color=colour, label=name, linewidths=0)
    name = {"tsne": "t-SNE", "pca": "PCA"}[projection]
    axis.set(xticks=[], yticks=[], title=f"{name} of {len(x):,} {what} images' features, by class")
    axis.set_aspect("equal", "datalim")
    figure.legend(loc="outside right center", frameon=False, markerscale=2.5, fontsize="small")
    _write(figure, path)


@torch.no_grad()
def neighbours(
    method: Method, data: datasets.Data, path: Path, queries: int = 6, shown: int = 8, size: int = 8192
) -> None:
    """Test images, and the entries of a queue that their softmax weighs most: what "relation" means.

    The queue holds embeddings of at most `size` training images, as the method's own does after a while; the
    temperature is the one that the method's targets come from. Where there are no labelled test images,
    training images are asked, each without its own entry.
    """
    images, what = _pictured(data)
    everything = torch.randperm(len(data.seen), generator=torch.Generator().manual_seed(0), device="cpu")
    skipped = method.config.skip_list()
    entries = datasets.Numbered(data.seen, everything[:size].tolist())
    queue, known = collect(method.embed, entries, skipped=skipped)
    labels, numbers = known.T
    some = datasets.Numbered(images, spread(len(images), 1000))
    x, known = collect(method.embed, some, skipped=skipped)
    classes = known[:, 0].cpu().numpy()
    one_each = np.unique(classes, return_index=True)[1]
    asked = (spread(len(x), queries) if classes.max() < 0 else one_each)[:queries]
    x, (asked_labels, asked_numbers) = x[asked], known[asked].T
    name, temperature = next(iter(method.temperatures.items()))
    logits = x @ queue.T / temperature
    if images is data.seen:
        logits = logits.masked_fill(asked_numbers[:, None] == numbers, -torch.inf)
    share = logits.softmax(1)
    weight, best = share.topk(min(shown, len(queue)), 1)
    figure, axes = plt.subplots(
        len(asked), 1 + best.shape[1], figsize=(1.0 * (1 + best.shape[1]), 1.3 * len(asked)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for row, (label, number) in enumerate(zip(asked_labels.tolist(), asked_numbers.tolist(), strict=True)):
        title = "no label" if label < 0 else data.classes[label]
        _show(axes[row, 0], images[[number]][0][0], title, "black")
        for column, entry in enumerate(best[row].tolist()):
            other = int(labels[entry])
            colour = GREY if min(label, other) < 0 else INK[0] if label == other else INK[1]
            picture = data.seen[[int(numbers[entry])]][0][0]
            _show(axes[row, 1 + column], picture, f"{float(weight[row, column]):.2g}", colour)
    figure.suptitle(
        f"{what.capitalize()} images (left), and the queue entries that weigh most for them"
        " (blue: same class, red: other, grey: no label).\n"
        f"Weights: softmax over {len(queue):,} entries at the {name} temperature, {temperature};"
        f" evenly shared, {1 / len(queue):.2g} each.",
        fontsize="small",
    )
    _write(figure, path)


def _pictured(data: datasets.Data) -> tuple[datasets.Images, str]:
    """The images that pictures are of, and what they are."""
    return (data.seen, "training") if data.test is None else (data.test, "test")


def _show(axis: plt.Axes, image: Tensor, title: str, colour: str) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize="x-small", color=colour, pad=2)
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set(color=colour, linewidth=1.5)


def curves(state: dict[str, Any], path: Path) -> None:
    """Loss, entropies and accuracies against epochs, of what checkpoint.read returns."""
    epochs = state["history"]
    if not epochs:
        raise ValueError("no epoch is complete yet: there is nothing to draw curves of")
    names = dict.fromkeys(name for entry in epochs for name in entry)
    panels = {
        "loss (nats)": [n for n in names if n in ("loss", "info_nce") or n.endswith("_loss")],
        "entropy (nats)": [n for n in names if "entropy" in n],
        "accuracy and scores": [n for n in names if n in ("knn", "acc", "nmi", "ari")],
    }
    panels = {label: found for label, found in panels.items() if found}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for axis, (label, found) in zip(axes[0], panels.items(), strict=True):
        for name, colour in zip(found, (*INK, GREY), strict=False):
            points = [(e["epoch"], e[name]) for e in epochs if name in e]
            marker = "o" if len(points) < len(epochs) or len(points) == 1 else None
            text = LABELS.get(name, name)
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=3, label=text)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize="small")
        if label.startswith("entropy"):
            axis.set_ylim(bottom=0)
    config = state["config"]
    figure.suptitle(f"{state['method']} on {config['data']}, {config['arch']}")
    _write(figure, path)


LABELS = {
    "loss": "loss, all terms",
    "instance_loss": "instance loss",
    "cluster_loss": "cluster loss",
    "info_nce": "InfoNCE",
    "teacher_entropy": "teacher, in training",
    "entropy_at_teacher_temperature": "in evaluation, at the teacher's temperature",
    "entropy_at_student_temperature": "in evaluation, at the student's temperature",
    "entropy_at_instance_temperature": "in evaluation, at the instance temperature",
    "knn": "200-NN accuracy",
    "acc": "clustering ACC",
    "nmi": "clustering NMI",
    "ari": "clustering ARI",
}


def _write(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
