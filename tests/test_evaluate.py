"""Scores by hand, the clusters they are of, and the pictures and exports of the command line."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from relssl import data as datasets
from relssl.checkpoint import load_method, save
from relssl.evaluate import clustering_scores, clusters, entropy, evaluate, glance
from relssl.methods import PRESETS
from relssl.methods.backbones import build, torchvision
from relssl.train import train

pytestmark = pytest.mark.xdist_group("evaluate")  # which share what is trained

SACC = replace(
    PRESETS["sacc"]["digits"], clusters=10, epochs=2, batch_size=256, queue_size=300, judge_every=1
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of SACC on digits after two epochs."""
    config = replace(SACC, out=tmp_path_factory.mktemp("sacc"))
    train(config)
    return config.out / "checkpoint.pt"


def test_clustering_scores_by_hand():
    """Clusters 1, 0, 2 of classes 0, 1, 2 with one image astray: 5 of 6; and the ends of every scale."""
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
    more = clustering_scores(labels, torch.arange(6))  # More clusters than classes: one each is paired.
    assert more["acc"] == pytest.approx(0.5)


def test_clusters_are_the_assigned_ones_or_those_of_kmeans():
    y = torch.arange(60) % 3
    parts = [((100.0 * t)[:, None] + torch.rand(len(t), 4), t) for t in (y[:40], y[40:])]
    found, labels = clusters(*parts, SACC, 3, lambda x: None)
    assert torch.equal(labels, y) and clustering_scores(y, found)["acc"] == 1
    found, labels = clusters(*parts, replace(SACC, test_images=False), 3, lambda x: x)
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
    scores = evaluate(method, config, epochs=1)
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    # What the run noted along the way is the same.
    noted = json.loads((trained.parent / "metrics.json").read_text())["epochs"][-1]
    assert noted["knn"] == scores["knn"] and noted["acc"] == pytest.approx(scores["acc"])
    again = glance(method, data)
    assert {name: noted[name] for name in again} == again
    assert 0 < noted["entropy_at_instance_temperature"] <= math.log(300)


def test_plots(trained, command):
    """All three are drawn, of readable size; what they show is for eyes."""
    run = command("evaluate", trained, "--plots", "--projection", "pca", "--epochs", 1)
    assert run.returncode == 0, run.stderr
    for name in ("features", "neighbours", "curves"):
        pixels = np.asarray(Image.open(trained.parent / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 400 and 0.02 < (pixels < 250).mean() < 0.8


@pytest.mark.slow
def test_nothing_to_draw_yet_is_said(trained, command, tmp_path):
    """After Ctrl-C in the first epoch; an export onto a folder is an error of its own."""
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
    """With its classifier taken off, the model gives the features that the method gives."""
    config = replace(
        SACC, arch=arch, stem=stem, image_size=32, epochs=1, out=tmp_path, data="digits", judge_every=0
    )
    method = config.make(torch.zeros(3), torch.ones(3))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        method.train()(images)  # moves BatchNorm's statistics off their start
    method.eval()
    save(tmp_path / "checkpoint.pt", config, {"model": method}, 1, 0, {}, [])
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
