"""The baselines MoCo, SimCLR and CC: their losses against float64, what they share, and runs that resume."""

from dataclasses import replace

import oracle
import pytest
import torch
from oracle import unit
from resuming import assert_same, train_until
from torch.nn import functional as F

from relssl import methods
from relssl.checkpoint import load_method
from relssl.evaluate import evaluate
from relssl.train import train

HALF, QUARTER = torch.full((3,), 0.5), torch.full((3,), 0.25)
DIGITS = {name: methods.PRESETS[name]["digits"] for name in ("moco", "simclr", "cc")}
DIGITS["cc"] = replace(DIGITS["cc"], clusters=5)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def images(count=8):
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)


def agrees(ours, theirs, inputs):
    assert abs(ours - theirs) < 1e-10 * theirs
    for one, other in zip(*(torch.autograd.grad(loss, inputs) for loss in (ours, theirs)), strict=True):
        assert (one - other).norm() < 1e-10 * other.norm()


def test_moco_is_info_nce_over_the_old_queue():
    method = replace(DIGITS["moco"], queue_size=24, dim=16).build(HALF, QUARTER).double()
    k, q = unit(6, 16, dtype=torch.float64), unit(6, 16, dtype=torch.float64).requires_grad_()
    old = method.queue.rows.clone()
    loss, _ = method.loss((k, q))
    method.update_queue((k, q))
    agrees(loss, oracle.info_nce(q, k, old, 0.2).mean(), [q])
    assert torch.equal(method.queue.rows, torch.cat((k, old[6:])))


def test_moco_has_two_strong_views_and_a_teacher_behind():
    method = replace(DIGITS["moco"], momentum=0.9).build(HALF, QUARTER).train()
    first, second = method.augment(images())
    assert not torch.equal(first, second) and method.views[0] is method.views[1] is method.strong
    with torch.no_grad():
        for p in method.student.parameters():
            p += 1
    k, q = method.encode((first, second))
    assert k.grad_fn is None and q.grad_fn is not None
    method.eval()
    with torch.no_grad():
        k, q = method.encode((first, second))
        torch.testing.assert_close(k, F.normalize(method.teacher(second), dim=1))
        torch.testing.assert_close(q, F.normalize(method.student(first), dim=1))
    method.update_teacher()
    for p, s in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
        torch.testing.assert_close(s - p, torch.full_like(s, 0.9))


@pytest.mark.parametrize("queue_size", [0, 12])
def test_simclr_is_nt_xent_of_two_views(queue_size):
    method = replace(DIGITS["simclr"], dim=16, queue_size=queue_size).build(HALF, QUARTER).double()
    z = [unit(6, 16, dtype=torch.float64).requires_grad_() for _ in range(2)]
    queue = None if method.queue is None else method.queue.rows.clone()
    agrees(method.loss(z)[0], oracle.nt_xent(*z, queue, 0.5).mean(), z)


def test_cc_adds_a_loss_between_clusters():
    """The total is L_I + L_C, with the entropies of both views; SACC's is that of three views."""
    method = replace(DIGITS["cc"], dim=16).build(HALF, QUARTER).double()
    z = [unit(6, 16, dtype=torch.float64).requires_grad_() for _ in range(2)]
    p = [torch.randn(6, 5).double().softmax(1).requires_grad_() for _ in range(2)]
    loss, logs = method.loss((*z, *p), "joint")
    agrees(loss, oracle.nt_xent(*z, None, 0.5).mean() + oracle.clusters(*p, 1.0, True), z + p)
    assert logs.keys() == {"instance_loss", "cluster_loss"} and len(method.views) == 2


@pytest.mark.parametrize("name", DIGITS)
def test_step_reaches_every_parameter_but_the_teachers(name):
    method = DIGITS[name].build(HALF, QUARTER).train()
    loss, _ = method(images())
    loss.backward()
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad.abs().sum() > 0 for p in trained)
    assert (len(trained) < len(list(method.parameters()))) == (name == "moco")


def test_presets_share_what_they_compare():
    """On CIFAR-10, MoCo and SimCLR have ReSSL's encoder and optimizer, and CC has SACC's."""
    of = {name: presets["cifar10"] for name, presets in methods.PRESETS.items()}
    shared = ("arch", "stem", "image_size", "epochs", "optimizer", "lr", "schedule", "weight_decay", "dim")
    for one, other in (("moco", "ressl"), ("simclr", "ressl"), ("cc", "sacc")):
        for name in shared:
            assert getattr(of[one], name) == getattr(of[other], name), (one, name)
    assert (of["moco"].queue_size, of["moco"].bn_splits, of["moco"].temperature) == (4096, 8, 0.2)
    assert (of["simclr"].queue_size, of["simclr"].crop_min, of["simclr"].jitter) == (0, 0.08, 0.5)
    assert (of["cc"].normalize, of["cc"].batch_size, of["sacc"].batch_size) == ("none", 256, 200)
    simclr = methods.PRESETS["simclr"]
    for name, jitter, blur in ("tiny-imagenet", 1.0, False), ("stl10", 1.0, False), ("imagenet", 1.0, True):
        assert (simclr[name].jitter, simclr[name].blur) == (jitter, blur), name
    assert methods.PRESETS["cc"]["imagenet-dogs"].blur


@pytest.mark.parametrize("name", DIGITS)
def test_run_resumes_in_the_middle_of_an_epoch(name):
    config = replace(methods.PRESETS[name]["digits"], image_size=8, batch_size=256, epochs=2, eval_every=1)
    whole = train(replace(config, out=config.out / "whole"))
    assert 1 < train_until(9, type(whole), config).epoch < 2  # Of 5 or 7 steps an epoch.
    resumed = train(replace(config, resume=True))
    assert_same(whole, resumed)
    method, saved = load_method(config.out, "cpu")
    scores = evaluate(method, saved)
    assert scores["knn"] > 0.5 and (name != "cc" or scores["acc"] > 0.2)
