"""Scores against values by hand, assignment of clusters, plots and exports of the command line."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from relssl import datasets
from relssl.checkpoint import TrainState, load_method, save
from relssl.evaluate import EvalConfig, assign_clusters, evaluate, evaluate_during_training
from relssl.methods import PRESETS
from relssl.methods.backbones import build, torchvision
from relssl.scores import clustering_scores, entropy, knn_accuracy, linear_accuracy
from relssl.train import train

pytestmark = pytest.mark.xdist_group("evaluate")  # The tests share a trained checkpoint.

SACC = replace(PRESETS["sacc"]["digits"], clusters=10, epochs=2, batch_size=256, queue_size=300, eval_every=1)


@pytest.fixture(scope="session")  # xdist may run tests of other files in between
def trained(tmp_path_factory):
    """Returns a checkpoint of SACC on digits after two epochs."""
    config = replace(SACC, out=tmp_path_factory.mktemp("sacc"))
    train(config)
    return config.out / "checkpoint.pt"


def test_clustering_scores_by_hand():
    """Checks clusters 1, 0, 2 of classes 0, 1, 2 with 1 of 6 images misplaced, and the ends of all scales."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    found = torch.tensor([1, 1, 0, 0, 2, 0])
    scores = clustering_scores(labels, found)
    assert scores["acc"] == pytest.approx(5 / 6)
    # Mutual information of the table ((0,2,0), (2,0,0), (1,0,1)), over the mean of ln 3 and H(3,2,1).
    sizes = [3 / 6, 2 / 6, 1 / 6]
    mutual = 2 / 6 * math.log(3) + 2 / 6 * math.log(2) + 1 / 6 * math.log(1) + 1 / 6 * math.log(3)
    assert scores["nmi"] == pytest.approx(mutual / ((math.log(3) - sum(s * math.log(s) for s in sizes)) / 2))
    # Rand: 2 of the pairs agree; expected 3 * 4 / 15; at most (3 + 4) / 2.
    assert scores["ari"] == pytest.approx((2 - 0.8) / (3.5 - 0.8))
    assert clustering_scores(labels, (labels + 1) % 3) == pytest.approx({"nmi": 1, "acc": 1, "ari": 1})
    assert clustering_scores(labels, torch.zeros(6, dtype=torch.long))["acc"] == pytest.approx(1 / 3)
    more = clustering_scores(labels, torch.arange(6))  # More clusters than classes: each class gets one.
    assert more["acc"] == pytest.approx(0.5)


def test_clusters_are_the_assigned_ones_or_those_of_kmeans():
    y = torch.arange(60) % 3
    parts = [((100.0 * t)[:, None] + torch.rand(len(t), 4), t) for t in (y[:40], y[40:])]
    found, labels = assign_clusters(*parts, SACC, 3, lambda x: None)
    assert torch.equal(labels, y) and clustering_scores(y, found)["acc"] == 1
    found, labels = assign_clusters(*parts, replace(SACC, test_images=False), 3, lambda x: x)
    assert torch.equal(labels, y[:40]) and torch.equal(found, parts[0][0].argmax(1))


def test_entropy_is_of_the_softmax():
    x, queue = torch.randn(5, 8), torch.randn(11, 8)
    p = (x @ queue.T / 0.3).softmax(1)
    torch.testing.assert_close(entropy(x, queue, 0.3), -(p * p.log()).sum(1).mean())


def test_evaluation_of_a_method_that_clusters(trained):
    method, config = load_method(trained, "cpu")
    data = datasets.load("digits", None, 16)
    everything = torch.cat((data.train.images, data.test.images))
    labels = torch.cat((data.train.labels, data.test.labels))
    expected = clustering_scores(
        labels, method.assign(method.features(everything)).argmax(1)
    )  # over train + test
    scores = evaluate(method, config, EvalConfig(epochs=1))
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    # The run recorded the same scores.
    noted = json.loads((trained.parent / "metrics.json").read_text())["epochs"][-1]
    assert noted["knn"] == scores["knn"] and noted["acc"] == pytest.approx(scores["acc"])
    again = evaluate_during_training(method, data)
    assert {name: noted[name] for name in again} == again
    assert 0 < noted["entropy_at_instance_temperature"] <= math.log(300)


def vote_by_sorting(features, feature_labels, queries, k, temperature):
    """Returns the predicted classes, in float64, by all similarities at once and a stable sort."""
    similarity = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        features / np.linalg.norm(features, axis=1, keepdims=True)
    ).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(queries), feature_labels.max() + 1))
    for row, at in enumerate(nearest):
        np.add.at(votes[row], feature_labels[at], np.exp(similarity[row, at] / temperature))
    return votes.argmax(1)


@pytest.mark.parametrize(("k", "count"), [(1, 3000), (5, 3000), (200, 5000), (200, 130)])
def test_knn_votes_as_a_stable_sort_does(k, count):
    """Rows of 16 signs have few cosines, all exact: nearly every k-th neighbour is one of many equals.

    Labels are random, so which of them votes decides.
    """
    generator = np.random.default_rng(k)
    features, queries = (generator.choice([-1.0, 1.0], (n, 16)) for n in (count, 300))
    labels = generator.integers(0, 7, count)
    expected = vote_by_sorting(features, labels, queries, k, 0.5)
    train_set = torch.from_numpy(features).float(), torch.from_numpy(labels)
    test_set = torch.from_numpy(queries).float(), torch.from_numpy(expected)
    for batch in (1024, 7):
        assert knn_accuracy(train_set, test_set, k=k, temperature=0.5, batch=batch) == 1
    half = train_set[0].half(), train_set[1]  # Signs are exact in it, too.
    assert knn_accuracy(half, test_set, k=k, temperature=0.5) == 1


def test_votes_and_probes_of_nothing_are_refused():
    features = torch.eye(4), torch.arange(4)
    for k, temperature in ((0, 0.1), (1, 0.0), (1, -1.0), (1, math.nan)):
        with pytest.raises(ValueError, match="k must be at least 1 and temperature positive, got "):
            knn_accuracy(features, features, k=k, temperature=temperature)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        linear_accuracy(features, features, epochs=0)


def test_knn_gives_ties_to_the_lowest_index():
    """Checks equal cosines in one tile and across tiles; 0 and -0 are equal, and worse ones come last."""
    features = torch.zeros(9000, 4)
    features[:, 1] = torch.tensor([0.0, -0.0]).repeat(4500)
    features[:, 2] = 1
    features[6000:6004, 0] = 1
    labels = torch.ones(9000, dtype=torch.long)
    labels[:6] = 0  # the first six of those that are equally near
    query = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([1])
    for k, right in ((4, 1), (7, 1), (10, 0), (17, 1)):  # 4 near ones, 6 of class 0, then class 1 again
        assert knn_accuracy((features, labels), query, k=k, temperature=1e6) == right, k


def test_knn_by_any_order_of_the_features():
    """Every tile has better ones in order from the farthest to the nearest, and none in reverse order."""
    features, queries = torch.randn(4000, 8), torch.randn(50, 8)
    labels = torch.randint(0, 5, (4000,))
    expected = vote_by_sorting(features.double().numpy(), labels.numpy(), queries.double().numpy(), 20, 0.1)
    order = (features / features.norm(dim=1, keepdim=True) @ queries[0]).argsort()
    for rows in (order, order.flip(0)):
        train_set = features[rows], labels[rows]
        assert knn_accuracy(train_set, (queries, torch.from_numpy(expected)), k=20) == 1


def test_plots(trained, command):
    """Checks that all three have a readable size and are not empty, but not their content."""
    run = command("evaluate", trained, "--plots", "--projection", "pca", "--epochs", 1)
    assert run.returncode == 0, run.stderr
    for name in ("features", "neighbours", "curves"):
        pixels = np.asarray(Image.open(trained.parent / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 400 and 0.02 < (pixels < 250).mean() < 0.8


@pytest.mark.slow
def test_plots_without_an_epoch_are_refused(trained, command, tmp_path):
    """There are none after Ctrl-C in the first epoch. An export to a folder's path is an error, too."""
    state = torch.load(trained, weights_only=True)
    torch.save(state | {"history": []}, tmp_path / "checkpoint.pt")
    run = command("evaluate", "checkpoint.pt", "--plots", "--projection", "pca", "--epochs", 1)
    assert run.returncode == 1 and "no epoch is complete yet" in run.stderr
    run = command("export", "checkpoint.pt", ".")
    assert run.returncode == 1 and "relssl export: " in run.stderr


@pytest.mark.parametrize(
    ("arch", "stem"), [("resnet18", "imagenet"), ("resnet18", "small"), ("mobilenet_v3_large", "small")]
)
def test_export_loads_into_torchvisions_model(command, tmp_path, arch, stem):
    """Without its classifier, the model computes the same features as the method."""
    config = replace(
        SACC, arch=arch, stem=stem, image_size=32, epochs=1, out=tmp_path, data="digits", eval_every=0
    )
    method = config.build_on_device(torch.zeros(3), torch.ones(3))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        method.train()(images)  # This changes BatchNorm's statistics.
    method.eval()
    save(tmp_path, TrainState(method, epoch=1))
    run = command("export", "checkpoint.pt", "encoder.pt")
    assert run.returncode == 0 and arch in run.stdout, run.stderr
    net = getattr(torchvision.models, arch)(weights=None)
    if stem == "small" and arch == "resnet18":
        net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    elif stem == "small":
        net.features[0][0].stride = (1, 1)
    head = "fc" if arch == "resnet18" else "classifier"
    lost = net.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True), strict=False)
    assert not lost.unexpected_keys and all(key.startswith(head) for key in lost.missing_keys)
    setattr(net, head, torch.nn.Identity())
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(method.prepare(images)), method.features(images))
    assert build(arch, stem)[1] == method.features(images).shape[1]
