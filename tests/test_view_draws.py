"""The draws of `View`: boxes against torchvision's, the distributions of all others, and independence."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from relssl.augment import RandAugment, View
from relssl.datasets.torchvision_import import torchvision  # noqa: F401, to be imported first

# isort: split
from torchvision.transforms import RandomResizedCrop

DRAWS = 100_000


# A square, a shape with fallbacks, and a row of pixels, where boxes without a height are drawn and left.
@pytest.mark.parametrize("shape", [(32, 32), (40, 120), (1, 3)])
def test_boxes_are_distributed_as_torchvisions(shape):
    view, draws = View(32), 20_000
    p = view.draw(DRAWS, *shape, "cpu")
    image = torch.zeros(3, *shape)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(draws)]
    )
    ours = torch.cat((p.start, p.size), 1).numpy()
    assert (ours == ours.round()).all() and (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= shape).all()

    def columns(boxes):
        """Returns top, left, height, width, area, shape and where the box is in the image."""
        top, left, height, width = boxes.T.astype(np.float64)
        space = np.maximum([shape[0] - height, shape[1] - width], 1)
        return [top, left, height, width, height * width, width / height, top / space[0], left / space[1]]

    for n, (our, their) in enumerate(zip(columns(ours), columns(theirs), strict=True)):
        error = 5 * their.std() * math.sqrt(1 / draws + 1 / DRAWS)
        probability = stats.ks_2samp(our, their, method="asymp").pvalue
        assert abs(our.mean() - their.mean()) <= error and probability > 1e-4, n
        assert our.std() == pytest.approx(their.std(), rel=0.02), n
        # The test of Kolmogorov and Smirnov is weak where few values repeat often: histograms, too.
        edges = np.unique(np.quantile(their, np.linspace(0, 1, 41)))
        counts = [
            np.histogram(x, np.append(edges[:-1], np.inf))[0] for x in (np.maximum(our, edges[0]), their)
        ]
        if len(edges) > 2:
            assert stats.chi2_contingency(counts).pvalue > 1e-4, n


@pytest.mark.parametrize(
    "shape, scale, ratio",
    [
        ((40, 120), (0.99, 1), (3 / 4, 4 / 3)),
        ((120, 40), (0.99, 1), (3 / 4, 4 / 3)),
        ((33, 101), (1, 1), (3 / 4, 4 / 3)),
        ((101, 33), (1, 1), (3 / 4, 4 / 3)),
        ((31, 31), (1, 1), (1, 1)),  # which fits
        ((30, 20), (1, 1), (1.6, 1.7)),
    ],
)
def test_box_where_none_fits_is_torchvisions(shape, scale, ratio):
    p = View(32, scale=scale, ratio=ratio).draw(8, *shape, "cpu")
    box = RandomResizedCrop.get_params(torch.zeros(3, *shape), list(scale), list(ratio))
    assert torch.cat((p.start, p.size), 1).tolist() == [list(box)] * 8


def is_share(drawn, share):
    """Checks the mean of zeros and ones within five standard deviations."""
    assert set(drawn.unique().tolist()) == {0, 1}
    assert abs(drawn.double().mean() - share) <= 5 * math.sqrt(share * (1 - share) / len(drawn))


def test_draws_have_the_distributions_of_the_settings():
    strengths = (0.4, 1.5, 0.2, 0.1)
    view = View(32, flip=0.3, jitter=strengths, jitter_probability=0.7, grey=0.2, blur=0.6, sigma=(0.5, 1.5))
    p = view.draw(DRAWS, 32, 32, "cpu")
    jittered, blurred = p.jitter.ne(0).any(1), p.sigma.ne(0)
    for drawn, share in (p.flip, 0.3), (jittered.float(), 0.7), (p.grey, 0.2), (blurred.float(), 0.6):
        is_share(drawn, share)
    assert (p.jitter[jittered] != 0).float().mean() > 0.9999
    uniform = [(p.sigma[blurred], 0.5, 1.5)]
    uniform += [(x, max(-s, -1), s) for x, s in zip(p.jitter[jittered].T, strengths, strict=True)]
    for drawn, low, high in uniform:
        assert low <= drawn.min() and drawn.max() <= high
        assert stats.kstest(drawn.double().numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-4
    orders, counts = p.order[jittered].unique(dim=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == [*itertools.permutations(range(4))]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert p.order.dtype == torch.int64


def test_draws_are_independent():
    """An image's draws correlate neither with one another nor with those of the next image."""
    view = View(
        32,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_probability=0.5,
        grey=0.5,
        blur=0.5,
        randaugment=RandAugment(2),
    )
    p = view.draw(DRAWS, 64, 64, "cpu")
    jittered, blurred = p.jitter.ne(0).any(1), p.sigma.ne(0)
    assert len(p.jitter[jittered].unique(dim=0)) == jittered.sum()
    place = p.start - (64 - p.size) / 2
    columns = torch.cat(
        (
            torch.stack((p.flip, jittered, p.grey, blurred, (p.sigma - 1.05) * blurred, p.order[:, 0]), 1),
            place, p.size[:, :1], p.jitter, p.operations.T.float(),
        ), 1,
    ).double()  # fmt: skip
    columns = torch.cat((columns[:-1], columns[1:]), 1)
    correlations = columns.T.corrcoef().fill_diagonal_(0).abs()
    assert correlations.max() <= 5 / math.sqrt(DRAWS), divmod(int(correlations.argmax()), len(correlations))


LARGEST = 1 - 2**-24  # which torch.rand returns


@pytest.mark.parametrize(
    "share, number",
    [(0, 0.0), (0, LARGEST), (0.5, 0.0), (0.5, LARGEST), (1, 0.0), (1, LARGEST)],
)
def test_smallest_and_largest_random_numbers(share, number, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.full(shape, number))
    view = View(32, flip=share, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=share, grey=share, blur=share)
    p = view.draw(2, 40, 33, "cpu")
    for drawn in (p.flip, p.grey) if share else (p.flip,):
        assert drawn.tolist() in ([[share] * 2] if share in (0, 1) else [[0, 0], [1, 1]])
    assert (p.jitter.abs() <= torch.tensor([0.4, 0.4, 0.4, 0.1]) * math.ceil(share)).all()
    assert (p.start >= 0).all() and (p.start + p.size <= torch.tensor([40, 33])).all()
    assert p.sigma is None or ((p.sigma == 0) | (p.sigma >= 0.1) & (p.sigma <= 2)).all()


def test_one_sigma_alone():
    sigma = View(32, blur=0.5, sigma=(1.0, 1.0)).draw(1000, 32, 32, "cpu").sigma
    is_share(sigma, 0.5)
