"""exclude_own: no image is compared with its own past embeddings in the queue."""

import json
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import nn

from relssl import datasets, distributed, functional
from relssl.checkpoint import read
from relssl.methods import PRESETS
from relssl.train import epoch_batches, image_loaders, train

DIGITS = {
    "ressl": replace(
        PRESETS["ressl"]["digits"], hidden=32, dim=16, queue_size=2000, batch_size=256, epochs=3, crops=2,
        info_nce_epochs=2, eval_every=3, warmup_epochs=0, exclude_own=True,
    ),
    "sacc": replace(
        PRESETS["sacc"]["digits"], dim=16, queue_size=2000, batch_size=256, epochs=2, eval_every=2,
        exclude_own=True,
    ),
}  # fmt: skip


def log_softmax(rows, queue, tau, own):
    """Computes log-probabilities [B, K] over the queue without each row's own entries, in float64."""
    logits = rows.double() @ queue.double().T / tau
    return torch.where(own, -torch.inf, logits).log_softmax(1)


def relation_loss(q, k, queue, own, student_temperature, teacher_temperature):
    teacher = log_softmax(k, queue, teacher_temperature, own)
    student = log_softmax(q, queue, student_temperature, own)
    terms = teacher.exp() * (teacher - student)
    return torch.where(own, 0, terms).sum(1).mean()


def info_nce(q, k, queue, own, temperature):
    positive = (q.double() * k.double()).sum(1, keepdim=True) / temperature
    negatives = torch.where(own, -torch.inf, q.double() @ queue.double().T / temperature)
    return -torch.cat((positive, negatives), 1).log_softmax(1)[:, 0].mean()


def nt_xent(z1, z2, queue, own, temperature):
    z, n = torch.cat((z1, z2)), len(z1)
    excluded = torch.cat((torch.eye(2 * n, dtype=torch.bool), own.repeat(2, 1)), 1)
    logits = log_softmax(z, torch.cat((z, queue)), temperature, excluded)
    return -logits[torch.arange(2 * n), (torch.arange(2 * n) + n) % (2 * n)].mean()


def spied(patch, target, oracle, found):
    """Appends (the loss, the oracle's, the number of queue entries left out) of every call to `found`."""
    function = getattr(functional, oracle.__name__)

    def run(*arguments, **settings):
        result = function(*arguments, **settings)
        q, k, queue = (*arguments, settings.get("queue"))[:3]
        if queue is None:  # That of clusters.
            return result
        own = (queue.ids == settings["ids"][:, None]) & (queue.ids >= 0)
        taus = {name: value for name, value in settings.items() if "temperature" in name}
        views = q.detach().view(-1, *k.shape)
        expected = torch.stack([oracle(view, k.detach(), queue.rows, own, **taus) for view in views]).mean()
        loss = result[0] if isinstance(result, tuple) else result
        found.append((loss.item(), expected.item(), int(own.sum())))
        return result

    patch.setattr(target, run)


@pytest.mark.parametrize("name", DIGITS)
def test_every_loss_of_a_run_is_without_an_images_own_embeddings(name, monkeypatch, tmp_path):
    """Checks each step's losses; the ids of the queue are those of the images in the order of the batches."""
    config = replace(DIGITS[name], out=tmp_path / "out")
    data = datasets.load("digits", None, 16)
    (images,) = config.passes(data).values()
    found = {"relation_loss": [], "info_nce": [], "nt_xent": []}
    spied(monkeypatch, "relssl.methods.ressl.relation_loss", relation_loss, found["relation_loss"])
    spied(monkeypatch, "relssl.methods.ressl.info_nce", info_nce, found["info_nce"])
    spied(monkeypatch, "relssl.nn.functional.nt_xent", nt_xent, found["nt_xent"])
    method = train(config)  # Without the warning of a queue larger than the data, which would be an error.
    steps = len(images) // 256
    calls = {"ressl": (3 * steps, 2 * steps, 0), "sacc": (0, 0, 4 * steps)}[name]
    assert tuple(map(len, found.values())) == calls
    for loss, expected, _ in chain(*found.values()):
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
    excluded = [count for *_, count in found["relation_loss"] + found["nt_xent"]]
    per_epoch = len(excluded) // config.epochs
    assert not any(excluded[:per_epoch]) and all(excluded[per_epoch + 2 :])

    shown = []
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        shown.append(order[: 256 * steps])
    shown = torch.cat(shown)
    queue = read(config.out / "checkpoint.pt")["model"]
    assert torch.equal(queue["queue.ids"].roll(-int(queue["queue.pointer"])), shown[-2000:])
    assert torch.equal(queue["queue.ids"], method.queue.ids)
    scores = json.loads((config.out / "metrics.json").read_text())["epochs"][-1]
    assert scores["knn"] > 0.5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ressl", {"bn_splits": 1, "momentum": 1.0}),
        ("ressl", {"bn_splits": 4, "momentum": 1.0}),
        ("sacc", {"clusters": 10}),
    ],
)
def test_the_ids_of_keys_are_those_of_their_images(name, settings):
    """Without random views and with a constant teacher, an image's entries equal its own embedding."""
    config = replace(DIGITS[name], queue_size=50, batch_size=8, **settings)
    method = config.build(torch.zeros(3), torch.ones(3)).train()
    method.weak = Floats()
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    for step in range(9):
        ids = (8 * step + torch.randperm(8)) % 20
        method(images[ids], ids=ids)
    assert set(method.queue.ids.tolist()) == set(range(20))
    torch.testing.assert_close(method.queue.rows, method.embed(images)[method.queue.ids])


class Floats(nn.Module):
    """The pixels in [0, 1], as a view without random numbers."""

    def forward(self, images):
        return images / 255


def test_an_index_is_that_of_one_image_in_all_passes_epochs_and_processes(monkeypatch):
    """Two passes of 13 and 9 images, of which each image has its own colour."""
    config = replace(DIGITS["sacc"], batch_size=4, workers=0)
    colours = torch.arange(22, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    first, *others = colours.split((13, 4, 5))
    sets = [datasets.Arrays(c, torch.zeros(len(c)).long()) for c in (first, *others)]
    passes = {"instance": sets[0], "cluster": datasets.ConcatImages(*sets[1:])}
    seen = {0: [], 1: []}
    for processes, epochs, start in ((1, 5, 0), (2, 5, 0), (1, 5, 2), (1, 5, 4)):
        monkeypatch.setattr(distributed, "world_size", lambda processes=processes: processes)
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            for epoch in range(epochs):
                with image_loaders(passes, config) as loaders:
                    for name, batch in epoch_batches(loaders, config, epoch, start):
                        assert batch.indices.tolist() == batch.images[:, 0, 0, 0].tolist()
                        seen[name == "cluster"] += batch.indices.tolist()
    assert set(seen[0]) == set(range(13)) and set(seen[1]) == set(range(13, 22))


def test_a_resumed_run_cannot_change_it(tmp_path):
    """A checkpoint of an earlier version, which lacks the setting, is of a run without it."""
    config = replace(
        DIGITS["sacc"], queue_size=300, epochs=1, schedule="constant", eval_every=0, out=tmp_path
    )
    train(config)
    resumed = replace(config, epochs=2, resume=True)
    with pytest.raises(ValueError, match=r"of other settings \(exclude_own was True\)"):
        train(replace(resumed, exclude_own=False))
    path = tmp_path / "checkpoint.pt"
    path.unlink()
    train(replace(config, exclude_own=False))
    saved = read(path)
    assert "queue.ids" not in saved["model"]
    del saved["config"]["exclude_own"]
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"of other settings \(exclude_own was False\)"):
        train(resumed)
    assert train(replace(resumed, exclude_own=False)).epoch == 2


def test_without_a_queue_it_is_refused(command):
    run = command("train", "sacc", "--data", "digits", "--exclude-own", "--out", "run")
    assert run.returncode == 1 and run.stderr.splitlines()[-1] == (
        "relssl train: exclude_own needs a queue, got queue_size 0"
    )
