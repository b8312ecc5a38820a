"""How good frozen features are: a weighted nearest-neighbour vote and a linear probe."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl import data as datasets
from relssl.methods.base import Method, TrainConfig


def evaluate(
    method: Method,
    config: TrainConfig,
    k: int = 200,
    temperature: float = 0.1,
    epochs: int = 100,
) -> dict[str, float]:
    """Accuracies in [0, 1] of a method's frozen features on its data set's test images."""
    method.eval()
    data = datasets.load(config.data, config.data_root, config.image_size)
    return _judge(method.features, data, k, temperature, epochs)


def baselines(
    config: TrainConfig, k: int = 200, temperature: float = 0.1, epochs: int = 100
) -> dict[str, dict[str, float]]:
    """The same of what training starts from: raw pixels (less their mean), and the untrained encoder."""
    data = datasets.load(config.data, config.data_root, config.image_size)
    mean, std = datasets.channel_statistics(data.train)
    torch.manual_seed(config.seed)
    method = config.make(mean, std)
    method.eval()
    return {
        "raw pixels": _judge(
            lambda x: (x / 255 - mean.view(3, 1, 1)).flatten(1), data, k, temperature, epochs
        ),
        "untrained encoder": _judge(method.features, data, k, temperature, epochs),
    }


def _judge(
    encode: Callable[[Tensor], Tensor], data: datasets.Data, k: int, temperature: float, epochs: int
) -> dict[str, float]:
    train, test = (collect(encode, part) for part in (data.labelled, data.test))
    return {
        "knn": knn_accuracy(train, test, k=k, temperature=temperature),
        "linear": linear_accuracy(train, test, epochs=epochs),
    }


@torch.no_grad()
def collect(
    encode: Callable[[Tensor], Tensor], data: datasets.Images, batch: int = 512
) -> tuple[Tensor, Tensor]:
    """Features [N, d] (float32) and labels [N] of a data set, where the encoder puts them."""
    features, labels = [], []
    for rows in torch.arange(len(data)).split(batch):
        images, y = data[rows.tolist()]
        features.append(encode(images).float())
        labels.append(y.to(features[-1].device))
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def knn_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    k: int = 200,
    temperature: float = 0.1,
    batch: int = 1024,
) -> float:
    """Top-1 accuracy in [0, 1] of a vote of the k nearest training features by cosine, weighted exp(cos/T).

    (Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018, section 3.4;
    k and T as published for ReSSL's small data sets.) k is at most the number of training features.

    Args:
        train, test: features [N, d] and labels [N].
        batch: test rows at a time; memory is batch x N.
    """
    (bank, bank_labels), (queries, labels) = train, test
    bank = F.normalize(bank, dim=1)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    correct = 0
    for x, y in zip(queries.split(batch), labels.split(batch), strict=True):
        similarity, nearest = (F.normalize(x, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = similarity.new_zeros(len(x), classes)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == y).sum())
    return correct / len(labels)


def linear_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
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
    """
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
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(probe(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float((probe(test_x).argmax(1) == test_y).float().mean())
