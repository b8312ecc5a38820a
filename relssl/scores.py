"""Scores of features and clusters: nearest-neighbour and linear accuracy, and clusters against classes."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.functional import queue_logsumexp

Features = tuple[Tensor, Tensor]  # features [N, D] float32, and labels [N]


def entropy(x: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Computes the mean entropy in nats of the softmax of rows x [R, D] over a queue [K, D].

    It is lse - <x, mean> / temperature.
    """
    lse, mean = queue_logsumexp(x.to(queue.dtype), queue, temperature)
    return (lse - (x * mean).sum(1) / temperature).mean()


def clustering_scores(labels: Tensor, clusters: Tensor) -> dict[str, float]:
    """Computes how well clusters [N] match classes [N], as published for Contrastive Clustering and SACC.

    - nmi: mutual information over the arithmetic mean of the entropies.
    - acc: the share of images in their class's cluster under the best assignment of clusters to classes
      (Hungarian method).
    - ari: adjusted Rand index.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    y, c = labels.cpu().numpy(), clusters.cpu().numpy()
    table = np.asarray(contingency_matrix(y, c))
    assigned = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "nmi": float(normalized_mutual_info_score(y, c)),
        "acc": float(assigned / len(y)),
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
    """Computes the top-1 accuracy in [0, 1] of a vote of the k nearest training features by cosine.

    Votes are weighted by exp(cos / temperature) (Wu et al., Unsupervised Feature Learning via Non-Parametric
    Instance Discrimination, 2018, section 3.4; k and temperature as published for ReSSL's small data sets).
    k is at most the number of training features; of equally near ones, the lowest index votes.

    The training features are read in tiles: beyond the features, memory is O(batch * (k + tile)) for any
    number of them.

    Args:
        train, test: features [N, D] and labels [N]. The training features may have another dtype and device
            than the test features, whose device computes, in float32.
        batch: test rows at a time.

    Raises:
        ValueError: k is below 1, or the temperature is not positive.
    """
    if k < 1 or not temperature > 0:
        raise ValueError(f"k must be at least 1 and temperature positive, got {k} and {temperature}")
    (features, feature_labels), (queries, labels) = train, test
    classes = int(max(feature_labels.max(), labels.max())) + 1
    correct = 0
    for x, y in zip(queries.split(batch), labels.split(batch), strict=True):
        similarity, nearest = _nearest(F.normalize(x.float(), dim=1), features, min(k, len(features)))
        neighbour_labels = feature_labels[nearest.to(feature_labels.device)].to(x.device)
        votes = similarity.new_zeros(len(x), classes)
        votes.scatter_add_(1, neighbour_labels, (similarity / temperature).exp())
        correct += int((votes.argmax(1) == y).sum())
    return correct / len(labels)


def _nearest(x: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds cosines and indices [R, k], unordered, of the k features [N, D] nearest to unit-norm x [R, D].

    A running top-k over tiles. Only what exceeds a row's k-th best so far is a candidate, so there are few
    after the first tiles, and a tile costs little more than its product. Similarity and index are packed into
    one integer: no two are equal, so topk is deterministic.
    """
    none = x.new_full((len(x), k), -torch.inf)
    best = _pack(none, torch.zeros_like(none, dtype=torch.int64))
    start = 0
    while start < len(features):
        # In the first tile everything is a candidate, so tiles start small and double.
        size = min(max(2 * k, start), max(1, 2**21 // max(x.shape)))
        tile = F.normalize(features[start : start + size].to(x), dim=1)
        similarity = x @ tile.T
        worst, _ = _unpack(best.amin(1, keepdim=True))
        row, column = (similarity > worst).nonzero(as_tuple=True)
        count = row.bincount(minlength=len(x))
        slot = torch.arange(len(row), device=x.device) - (count.cumsum(0) - count)[row]
        candidates = best.new_full((len(x), int(count.max())), torch.iinfo(torch.int64).min)
        candidates[row, slot] = _pack(similarity[row, column], start + column)
        best = torch.cat((best, candidates), 1).topk(k, dim=1, sorted=False).values
        start += size
    return _unpack(best)


def _pack(similarity: Tensor, index: Tensor) -> Tensor:
    """Packs into int64 that sort by similarity (float32), and equal ones by falling index (below 2**32)."""
    bits = (similarity + 0.0).view(torch.int32)  # The addition turns -0 into 0.
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
    """Computes the top-1 accuracy in [0, 1] of a linear classifier on frozen features.

    SGD with Nesterov momentum 0.9, no weight decay and a cosine schedule, on normalised features that are
    computed once: unlike in the published protocol, training images are not augmented.

    Args:
        train, test: features [N, D] and labels [N].

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
