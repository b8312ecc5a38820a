"""How good frozen features are: nearest neighbours' votes, a linear probe, and clusters against classes."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl import data as datasets
from relssl.data.loading import channel_statistics, left_out, load_batches, spread
from relssl.functional import queue_logsumexp
from relssl.methods.base import Method, TrainConfig

Features = tuple[Tensor, Tensor]  # [N, d] float32, and labels [N]


def load(config: TrainConfig) -> datasets.Data:
    """The data set of a config, without downloading it."""
    return datasets.load(config.data, config.data_root, config.image_size, classes=config.classes)


def evaluate(
    method: Method,
    config: TrainConfig,
    k: int = 200,
    temperature: float = 0.1,
    epochs: int = 100,
) -> dict[str, float]:
    """Scores of a method's frozen features, and of its clusters, on the data set of `config`.

    knn and linear are accuracies on the test images; nmi, acc and ari are `clustering_scores` on training
    and test images (config.clusters_test_images). The clusters are those that the method assigns, or else
    found by k-means. Scores for which the data have no labels are left out, with a UserWarning; the entropies
    of `softmax_entropies` need none.
    """
    method.eval()
    data = load(config)
    scores = _judge(method.features, data, config, k, temperature, epochs, method.assign)
    return scores | softmax_entropies(method, data, config.skip_list())


def baselines(
    config: TrainConfig, k: int = 200, temperature: float = 0.1, epochs: int = 100
) -> dict[str, dict[str, float]]:
    """The same, with clusters by k-means, of the untrained encoder and of raw pixels less their mean.

    Pixels of images larger than 32 x 32 are of the image at that size.
    """
    data = load(config)
    mean, std = channel_statistics(data.train, config.skip_list())
    torch.manual_seed(config.seed)
    method = config.make(mean, std)
    method.eval()
    how = data, config, k, temperature, epochs
    return {
        "raw pixels": _judge(lambda x: (_shrink(x) - mean.view(3, 1, 1)).flatten(1), *how),
        "untrained encoder": _judge(method.features, *how),
    }


def _shrink(images: Tensor, most: int = 32) -> Tensor:
    """To [0, 1], and to at most 32 pixels a side: 224 would make rows of 150,000 numbers."""
    x = images / 255
    if max(x.shape[-2:]) <= most:
        return x
    return F.interpolate(x, (most, most), mode="bilinear", antialias=True)


def _judge(
    encode: Callable[[Tensor], Tensor],
    data: datasets.Data,
    config: TrainConfig,
    k: int,
    temperature: float,
    epochs: int,
    assign: Callable[[Tensor], Tensor | None] = lambda features: None,
) -> dict[str, float]:
    train, test = _labelled_features(encode, data, config)
    scores = {}
    if train and test:
        scores["knn"] = knn_accuracy(train, test, k=k, temperature=temperature)
        scores["linear"] = linear_accuracy(train, test, epochs=epochs)
    if train or test:
        found, labels = clusters(train, test, config, len(data.classes), assign)
        scores |= clustering_scores(labels, found)
    return scores


@torch.no_grad()
def glance(method: Method, data: datasets.Data) -> dict[str, float]:
    """What a training run looks at along the way: knn, its clusters' scores, its softmaxes' entropies.

    Of at most 10,000 training and test images each; without what the data have no labels for (a UserWarning).
    """
    method.eval()
    train, test = _labelled_features(method.features, data, method.config, 10_000)
    scores = {}
    if train and test:
        scores["knn"] = knn_accuracy(train, test)
    either = train or test
    if either and method.assign(either[0][:1]) is not None:
        found, labels = clusters(train, test, method.config, len(data.classes), method.assign)
        scores |= clustering_scores(labels, found)
    return scores | softmax_entropies(method, data, method.config.skip_list())


def _labelled_features(
    encode: Callable[[Tensor], Tensor], data: datasets.Data, config: TrainConfig, most: int | None = None
) -> tuple[Features | None, Features | None]:
    """Features of at most `most` labelled training and test images each; what there is none of is told."""
    lacking = [n for n, part in (("training", data.labelled), ("test", data.test)) if part is None]
    if lacking:
        where = "a folder has them as train/CLASS/... and val/CLASS/..., arrays as train_y and test_y"
        missed = "knn, linear, nmi, acc or ari"
        if len(lacking) == 1:
            missed = "knn or linear; clusters are scored on the other images alone"
        text = f"no labels of {' and '.join(lacking)} images ({where}), so no {missed}"
        warnings.warn(text, stacklevel=1)
    skipped = config.skip_list()
    found = [
        None
        if part is None
        else collect(encode, datasets.Subset(part, spread(len(part), most)), skipped=skipped)
        for part in (data.labelled, data.test)
    ]
    if skipped:
        warnings.warn(f"evaluation: {left_out(skipped)}", stacklevel=1)
    return found[0], found[1]


@torch.no_grad()
def softmax_entropies(
    method: Method, data: datasets.Data, skipped: list[str] | None = None
) -> dict[str, float]:
    """Entropies in nats of a method's softmaxes over its queue, of at most 512 test images.

    Of training images, where there are no labelled test images. skipped: see `load_batches`.
    """
    if method.queue is None:
        return {}
    images = data.seen if data.test is None else data.test
    some = datasets.Subset(images, range(min(512, len(images))))
    x, _ = collect(method.embed, some, skipped=skipped)
    return {
        f"entropy_at_{name}_temperature": float(entropy(x, method.queue.rows, temperature))
        for name, temperature in method.temperatures.items()
    }


@torch.no_grad()
def clusters(
    train: Features | None,
    test: Features | None,
    config: TrainConfig,
    count: int,
    assign: Callable[[Tensor], Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Clusters [N] and labels [N] of the images: as assigned, or else `count` of them by k-means.

    Those of training and test images, or of the former alone (config.clusters_test_images); of what there is.
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
    # Above that, Lloyd's iterations over all images would take hours.
    kind = KMeans if len(features) <= 100_000 else MiniBatchKMeans
    found = kind(count, n_init=10, random_state=0).fit_predict(features)
    return torch.from_numpy(found), labels


def entropy(x: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Mean entropy in nats of the softmax of rows x [R, D] over a queue [K, D]: lse - <x, mean> / tau."""
    lse, mean = queue_logsumexp(x.to(queue.dtype), queue, temperature)
    return (lse - (x * mean).sum(1) / temperature).mean()


@torch.no_grad()
def collect(
    encode: Callable[[Tensor], Tensor],
    data: datasets.Images,
    batch: int = 512,
    skipped: list[str] | None = None,
) -> Features:
    """Features [N, d] (float32) and labels [N] of a data set, where the encoder puts them.

    skipped: see `load_batches`; ValueError where no image can be read.
    """
    features, labels = [], []
    rows = [rows.tolist() for rows in torch.arange(len(data)).split(batch)]
    for images, y in load_batches(data, rows, skipped=skipped):
        features.append(encode(images).float())
        labels.append(y.to(features[-1].device))
    if not features:
        raise ValueError(f"no image can be read; {left_out(skipped or [])}")
    return torch.cat(features), torch.cat(labels)


def clustering_scores(labels: Tensor, found: Tensor) -> dict[str, float]:
    """How well clusters [N] match classes [N], as published for Contrastive Clustering and SACC.

    nmi: mutual information over the arithmetic mean of the entropies. acc: the share of images in their
    class's cluster when clusters and classes are paired best (Hungarian method). ari: adjusted Rand index.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    y, c = labels.cpu().numpy(), found.cpu().numpy()
    table = np.asarray(contingency_matrix(y, c))
    paired = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "nmi": float(normalized_mutual_info_score(y, c)),
        "acc": float(paired / len(y)),
        "ari": float(adjusted_rand_score(y, c)),
    }


@torch.no_grad()
def knn_accuracy(
    train: Features,
    test: Features,
    *,
    k: int = 200,
    temperature: float = 0.1,
    batch: int = 1024,
) -> float:
    """Top-1 accuracy in [0, 1] of a vote of the k nearest training features by cosine, weighted exp(cos/T).

    (Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018, section 3.4;
    k and T as published for ReSSL's small data sets.) k is at most the number of training features.

    The training features are read in tiles: beyond the features, memory is O(batch * (k + tile)), whatever
    their number. Of equally near ones the lowest index votes.

    Args:
        train, test: features [N, d] and labels [N]. The training features may be of another dtype and on
            another device than the test features, which decide where and (in float32) how it is computed.
        batch: test rows at a time.

    Raises:
        ValueError: k is below 1, or the temperature is not positive.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(f"k must be at least 1 and temperature positive, got {k} and {temperature}")
    (bank, bank_labels), (queries, labels) = train, test
    classes = int(max(bank_labels.max(), labels.max())) + 1
    correct = 0
    for x, y in zip(queries.split(batch), labels.split(batch), strict=True):
        similarity, nearest = _nearest(F.normalize(x.float(), dim=1), bank, min(k, len(bank)))
        voters = bank_labels[nearest.to(bank_labels.device)].to(x.device)
        votes = similarity.new_zeros(len(x), classes)
        votes.scatter_add_(1, voters, (similarity / temperature).exp())
        correct += int((votes.argmax(1) == y).sum())
    return correct / len(labels)


def _nearest(x: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices [R, k], in no order, of the k rows of a bank [N, d] nearest to unit-norm x [R, d].

    A running top-k over tiles. Only what exceeds a row's k-th best so far is a candidate, so after the first
    tiles few are, and each tile costs little more than its product. Similarity and index are one integer:
    none are equal, and topk has no choice.
    """
    none = x.new_full((len(x), k), -torch.inf)
    best = _pack(none, torch.zeros_like(none, dtype=torch.int64))
    start = 0
    while start < len(bank):
        # The first tile is all candidates, so tiles start small and double.
        size = min(max(2 * k, start), max(1, 2**21 // max(x.shape)))
        tile = F.normalize(bank[start : start + size].to(x), dim=1)
        similarity = x @ tile.T
        worst, _ = _unpack(best.amin(1, keepdim=True))
        row, column = (similarity > worst).nonzero(as_tuple=True)
        count = row.bincount(minlength=len(x))
        place = torch.arange(len(row), device=x.device) - (count.cumsum(0) - count)[row]
        candidates = best.new_full((len(x), int(count.max())), torch.iinfo(torch.int64).min)
        candidates[row, place] = _pack(similarity[row, column], start + column)
        best = torch.cat((best, candidates), 1).topk(k, dim=1, sorted=False).values
        start += size
    return _unpack(best)


def _pack(similarity: Tensor, index: Tensor) -> Tensor:
    """int64 that sort by similarity (float32), among equals by falling index (below 2**32)."""
    bits = (similarity + 0.0).view(torch.int32)  # The sum makes -0 of equal bits with 0.
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (0xFFFFFFFF - index)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    bits = (packed >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32), 0xFFFFFFFF - (packed & 0xFFFFFFFF)


def linear_accuracy(
    train: Features,
    test: Features,
    *,
    epochs: int = 100,
    batch: int = 256,
    lr: float = 0.1,
    seed: int = 0,
) -> float:
    """Top-1 accuracy in [0, 1] of a linear classifier on frozen features.

    SGD with Nesterov momentum 0.9, no weight decay and a cosine schedule, on standardised features that are
    computed once: unlike in the published protocol, training images are not augmented.

    Args:
        train, test: features [N, d] and labels [N].

    Raises:
        ValueError: epochs is below 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    (x, y), (test_x, test_y) = train, test
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, test_x = (x - mean) / std, (test_x - mean) / std
    generator = torch.Generator().manual_seed(seed)
    probe = nn.Linear(x.shape[1], int(max(y.max(), test_y.max())) + 1, device=x.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.SGD(probe.parameters(), lr=lr, momentum=0.9, nesterov=True)
    steps = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator, device="cpu").to(x.device).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(probe(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float((probe(test_x).argmax(1) == test_y).float().mean())
