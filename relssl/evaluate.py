"""Evaluates the frozen features of a method, and its clusters, on a data set."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from relssl import datasets
from relssl.datasets.loading import channel_statistics, load_batches, skipped_message
from relssl.datasets.python import checked
from relssl.methods.base import Method, TrainConfig
from relssl.methods.initial import untrained
from relssl.scores import Features, clustering_scores, entropy, knn_accuracy, linear_accuracy

Encoder = Callable[[Tensor], Tensor]  # uint8 images [B, 3, H, W] to features [B, D]
Assignment = Callable[[Tensor], Tensor | None]  # features to soft assignments [B, M], or None


@dataclass
class EvalConfig:
    """Settings of an evaluation. In brackets: where a default comes from."""

    k: int = 200
    """Neighbours that vote; take fewer than a class has training images. [ReSSL, small data sets]"""
    temperature: float = 0.1
    """Temperature of the votes. [ReSSL, small data sets]"""
    epochs: int = 100
    """Epochs of the linear probe. [ReSSL, small data sets]"""


DEFAULTS = EvalConfig()


def load(config: TrainConfig, data: datasets.Data | None = None) -> datasets.Data:
    """Returns `data`, checked, or loads the data set of a config, without downloading it."""
    if data is not None:
        return checked(data, "data")
    return datasets.load(config.data, config.data_root, config.image_size, classes=config.classes)


def evaluate(
    method: Method,
    config: TrainConfig,
    options: EvalConfig = DEFAULTS,
    data: datasets.Data | None = None,
) -> dict[str, float]:
    """Scores a method's frozen features, and its clusters, on `data`, or on the data set of `config`.

    knn and linear are accuracies on the test images; nmi, acc and ari are `clustering_scores` on training
    and test images (config.clusters_test_images). The clusters are those that the method assigns, or else
    those of k-means. Scores for which the data set has no labels are omitted, with a UserWarning; the
    entropies of `softmax_entropies` need none.
    """
    method.eval()
    data = load(config, data)
    with method.eager():
        scores = _score(method.features, data, config, options, method.assign)
        return scores | softmax_entropies(method, data, config.skip_list())


def baselines(
    config: TrainConfig, options: EvalConfig = DEFAULTS, data: datasets.Data | None = None
) -> dict[str, dict[str, float]]:
    """Scores the encoder before training, and raw pixels less their mean, with clusters by k-means.

    Images larger than 32 x 32 are resized to that before their pixels are taken.
    """
    data = load(config, data)
    mean, std = channel_statistics(data.train, config.skip_list())
    method = untrained(config, lambda: (mean, std)).eval()

    def pixels(images: Tensor) -> Tensor:
        return (_shrink(images) - mean.view(3, 1, 1)).flatten(1)

    return {
        "raw pixels": _score(pixels, data, config, options),
        "untrained encoder": _score(method.features, data, config, options),
    }


def _shrink(images: Tensor) -> Tensor:
    """Scales to [0, 1], and to sides of at most 32 pixels: 224 would make rows of 150,000 numbers."""
    x = images / 255
    if max(x.shape[-2:]) <= 32:
        return x
    return F.interpolate(x, (32, 32), mode="bilinear", antialias=True)


def _score(
    encode: Encoder,
    data: datasets.Data,
    config: TrainConfig,
    options: EvalConfig,
    assign: Assignment = lambda features: None,
) -> dict[str, float]:
    train, test = _labelled_features(encode, data, config)
    scores = {}
    if train and test:
        scores["knn"] = knn_accuracy(train, test, k=options.k, temperature=options.temperature)
        scores["linear"] = linear_accuracy(train, test, epochs=options.epochs)
    if train or test:
        clusters, labels = assign_clusters(train, test, config, len(data.classes), assign)
        scores |= clustering_scores(labels, clusters)
    return scores


@torch.no_grad()
def evaluate_during_training(method: Method, data: datasets.Data) -> dict[str, float]:
    """Computes the scores that a training run records: knn, of the method's clusters, and entropies.

    It uses at most 10,000 training and test images each, and omits (with a UserWarning) the scores for
    which the data set has no labels.
    """
    method.eval()
    train, test = _labelled_features(method.features, data, method.config, 10_000)
    scores = {}
    if train and test:
        scores["knn"] = knn_accuracy(train, test)
    either = train or test
    if either and method.assign(either[0][:1]) is not None:
        clusters, labels = assign_clusters(train, test, method.config, len(data.classes), method.assign)
        scores |= clustering_scores(labels, clusters)
    return scores | softmax_entropies(method, data, method.config.skip_list())


def _labelled_features(
    encode: Encoder, data: datasets.Data, config: TrainConfig, limit: int | None = None
) -> tuple[Features | None, Features | None]:
    """Extracts the features of at most `limit` labelled training and test images each.

    None stands for a missing set, of which a UserWarning is given.
    """
    missing = [n for n, images in (("training", data.labelled), ("test", data.test)) if images is None]
    if missing:
        where = (
            "a folder has them as train/CLASS/... and val/CLASS/..., arrays as train_y and test_y, a function"
            " returns them as labelled and test"
        )
        lost = "knn, linear, nmi, acc or ari"
        if len(missing) == 1:
            lost = "knn or linear; clusters are scored on the other images alone"
        text = f"no labels of {' and '.join(missing)} images ({where}), so no {lost}"
        warnings.warn(text, stacklevel=1)
    skipped = config.skip_list()

    def extract(images: datasets.Images | None) -> Features | None:
        if images is None:
            return None
        subset = datasets.Subset(images, datasets.evenly_spaced(len(images), limit))
        features, labels = extract_features(encode, subset, skipped=skipped)
        wrong = labels[(labels < 0) | (labels >= len(data.classes))]
        if len(wrong):
            expected = f"from 0 to {len(data.classes) - 1}"
            raise ValueError(f"labels of labelled and test images must be {expected}, got {int(wrong[0])}")
        return features, labels

    train, test = extract(data.labelled), extract(data.test)
    if skipped:
        warnings.warn(f"evaluation: {skipped_message(skipped)}", stacklevel=1)
    return train, test


@torch.no_grad()
def softmax_entropies(
    method: Method, data: datasets.Data, skipped: list[str] | None = None
) -> dict[str, float]:
    """Computes the entropies in nats of a method's softmaxes over its queue, of at most 512 test images.

    Training images are used where the data set has no test images.

    Args:
        skipped: a list to which the paths of unreadable images are appended; with None, an unreadable image
            raises ValueError.
    """
    if method.queue is None:
        return {}
    images = data.eval_train if data.test is None else data.test
    subset = datasets.Subset(images, range(min(512, len(images))))
    x, _ = extract_features(method.embed, subset, skipped=skipped)
    return {
        f"entropy_at_{name}_temperature": float(entropy(x, method.queue.rows, temperature))
        for name, temperature in method.temperatures.items()
    }


@torch.no_grad()
def assign_clusters(
    train: Features | None, test: Features | None, config: TrainConfig, count: int, assign: Assignment
) -> tuple[Tensor, Tensor]:
    """Returns clusters [N] and labels [N]: those that the method assigns, or else `count` of k-means.

    They are of training and test images (config.clusters_test_images), or of one set where the other is
    missing.
    """
    parts = [part for part in (train, test) if part is not None]
    if not config.clusters_test_images:
        parts = parts[:1]
    labels = torch.cat([y for _, y in parts])
    assigned = [assign(x) for x, _ in parts]
    if assigned[0] is not None:
        return torch.cat([p.argmax(1) for p in assigned if p is not None]), labels
    from sklearn.cluster import KMeans, MiniBatchKMeans

    features = np.concatenate([x.cpu().numpy() for x, _ in parts])
    # With more images, Lloyd's iterations over all of them would take hours.
    algorithm = KMeans if len(features) <= 100_000 else MiniBatchKMeans
    clusters = algorithm(count, n_init=10, random_state=0).fit_predict(features)
    return torch.from_numpy(clusters), labels


@torch.no_grad()
def extract_features(
    encode: Encoder, images: datasets.Images, batch: int = 512, skipped: list[str] | None = None
) -> Features:
    """Returns features [N, D] (float32) and labels [N] of a set of images, on the encoder's device.

    skipped: see `load_batches`; ValueError if no image can be read.
    """
    features, labels = [], []
    batches = [indices.tolist() for indices in torch.arange(len(images)).split(batch)]
    for x, y, _ in load_batches(images, batches, skipped=skipped):
        features.append(encode(x).float())
        labels.append(y.to(features[-1].device))
    if not features:
        raise ValueError(f"no image can be read; {skipped_message(skipped or [])}")
    return torch.cat(features), torch.cat(labels)
