"""Plots of a trained method: its features, its embeddings' nearest queue entries, and its training curves."""

import math
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from torch import Tensor

from relssl import datasets
from relssl.evaluate import extract_features
from relssl.methods.base import Method

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS, GREY = ("#1f5fa8", "#c8553d", "#4a8c5c", "#8a5fa8", "#c9a227"), "#9a9a9a"


def features(
    method: Method,
    data: datasets.Data,
    path: Path,
    projection: Literal["tsne", "pca"] = "tsne",
    count: int = 2000,
) -> None:
    """Plots a projection of the features of at most `count` test images, coloured by class.

    Without labelled test images, training images are plotted; without labels, in one colour.
    """
    images, split = _plotted_images(data)
    subset = datasets.Subset(images, datasets.evenly_spaced(len(images), count))
    skipped = method.config.skip_list()
    x, labels = (t.cpu().numpy() for t in extract_features(method.features, subset, skipped=skipped))
    if projection == "pca":
        from sklearn.decomposition import PCA

        points = PCA(2, random_state=0).fit_transform(x)
    else:
        from sklearn.manifold import TSNE

        points = TSNE(2, init="pca", perplexity=min(30, len(x) / 4), random_state=0).fit_transform(x)
    figure, axis = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    colours = plt.get_cmap("tab10" if len(data.classes) <= 10 else "tab20")
    for label in np.unique(labels):
        # A longer legend would not fit.
        name = ("no label" if label < 0 else data.classes[label]) if label < 20 else None
        colour = colours(label % colours.N)
        own = points[labels == label]
        axis.scatter(own[:, 0], own[:, 1], s=7, color=colour, label=name, linewidths=0)
    name = {"tsne": "t-SNE", "pca": "PCA"}[projection]
    axis.set(xticks=[], yticks=[], title=f"{name} of {len(x):,} {split} images' features, by class")
    axis.set_aspect("equal", "datalim")
    figure.legend(loc="outside right center", frameon=False, markerscale=2.5, fontsize="small")
    _write(figure, path)


@torch.no_grad()
def neighbours(
    method: Method, data: datasets.Data, path: Path, queries: int = 6, shown: int = 8, size: int = 8192
) -> None:
    """Plots test images and the entries of a queue with the largest weights in their softmax.

    The queue holds embeddings of at most `size` training images, as the method's own does after some steps;
    the temperature is that of the method's targets. Without labelled test images, training images are the
    queries, each without its own entry.
    """
    images, split = _plotted_images(data)
    order = torch.randperm(len(data.eval_train), generator=torch.Generator().manual_seed(0), device="cpu")
    skipped = method.config.skip_list()
    entries = datasets.IndexedSubset(data.eval_train, order[:size].tolist())
    queue, labels_and_indices = extract_features(method.embed, entries, skipped=skipped)
    labels, indices = labels_and_indices.T
    subset = datasets.IndexedSubset(images, datasets.evenly_spaced(len(images), 1000))
    x, labels_and_indices = extract_features(method.embed, subset, skipped=skipped)
    classes = labels_and_indices[:, 0].cpu().numpy()
    one_per_class = np.unique(classes, return_index=True)[1]
    rows = (datasets.evenly_spaced(len(x), queries) if classes.max() < 0 else one_per_class)[:queries]
    x, (query_labels, query_indices) = x[rows], labels_and_indices[rows].T
    name, temperature = next(iter(method.temperatures.items()))
    logits = x @ queue.T / temperature
    if images is data.eval_train:
        logits = logits.masked_fill(query_indices[:, None] == indices, -torch.inf)
    weight, best = logits.softmax(1).topk(min(shown, len(queue)), 1)
    figure, axes = plt.subplots(
        len(rows), 1 + best.shape[1], figsize=(1.0 * (1 + best.shape[1]), 1.3 * len(rows)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for row, (label, index) in enumerate(zip(query_labels.tolist(), query_indices.tolist(), strict=True)):
        title = "no label" if label < 0 else data.classes[label]
        _show(axes[row, 0], images[[index]][0][0], title, "black")
        for column, entry in enumerate(best[row].tolist()):
            other = int(labels[entry])
            colour = GREY if min(label, other) < 0 else COLOURS[0] if label == other else COLOURS[1]
            image = data.eval_train[[int(indices[entry])]][0][0]
            _show(axes[row, 1 + column], image, f"{float(weight[row, column]):.2g}", colour)
    figure.suptitle(
        f"{split.capitalize()} images (left), and the queue entries with the largest weights"
        " (blue: same class, red: other, grey: no label).\n"
        f"Weights: softmax over {len(queue):,} entries at the {name} temperature, {temperature};"
        f" uniform weights would be {1 / len(queue):.2g}.",
        fontsize="small",
    )
    _write(figure, path)


def _plotted_images(data: datasets.Data) -> tuple[datasets.Images, str]:
    """Returns the images to plot, and which they are."""
    return (data.eval_train, "training") if data.test is None else (data.test, "test")


def _show(axis: plt.Axes, image: Tensor, title: str, colour: str) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize="x-small", color=colour, pad=2)
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set(color=colour, linewidth=1.5)


def curves(state: dict[str, Any], path: Path) -> None:
    """Plots losses, entropies, agreement and scores against epochs, of what checkpoint.read returns.

    The effective number of neighbours is the exponential of an entropy.
    """
    epochs = state["history"]
    if not epochs:
        raise ValueError("no epoch is complete yet: there are no curves to plot")
    names = dict.fromkeys(name for entry in epochs for name in entry)
    entropies = [n for n in names if "entropy" in n]
    panels = {
        "loss (nats)": [n for n in names if n in ("loss", "info_nce") or n.endswith("_loss")],
        "entropy (nats)": entropies,
        "effective number of neighbours": entropies,
        "accuracy and scores": [n for n in names if n in ("knn", "acc", "nmi", "ari")],
        "mean cosine of student and teacher": [n for n in names if n == "agreement"],
        "images per second": [n for n in names if n == "images_per_second"],
    }
    panels = {label: plotted for label, plotted in panels.items() if plotted}
    rows = -(-len(panels) // 3)
    columns = -(-len(panels) // rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.3 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (label, plotted) in zip(axes.flat, panels.items(), strict=False):
        for name, colour in zip(plotted, (*COLOURS, GREY), strict=False):
            points = [(e["epoch"], e[name]) for e in epochs if name in e]
            if label.startswith("effective"):
                points = [(epoch, math.exp(entropy)) for epoch, entropy in points]
            marker = "o" if len(points) < len(epochs) or len(points) == 1 else None
            text = LABELS.get(name, name)
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=3, label=text)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if label.startswith("effective"):  # The legend is that of the entropies.
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_minor_formatter("{x:,.0f}")
            continue
        if label.startswith(("entropy", "images")):
            axis.set_ylim(bottom=0)
        if not label.startswith(("mean", "images")):  # Their only curve is named by the label.
            axis.legend(frameon=False, fontsize="small")
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
