"""ReSSL's parts against its authors' code: teacher, queue order, BatchNorm, views, encoders."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from relssl.functional import info_nce, relation_loss
from relssl.methods.backbones import build
from relssl.methods.ressl import PRESETS

SMALL = replace(PRESETS["digits"], hidden=32, dim=16, queue_size=64, batch_size=8)
HALF, QUARTER = torch.full((3,), 0.5), torch.full((3,), 0.25)


def images(count=8, size=16):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def view(size, strong):
    """Returns ReSSL's strong or weak augmentation."""
    method = replace(SMALL, image_size=size, crop_min=0.2, flip=True).build(HALF, QUARTER)
    return method.strong[0] if strong else method.weak


def test_teacher_starts_as_the_student_and_follows_it_in_parameters_only():
    method = replace(SMALL, momentum=0.9).build(HALF, QUARTER)
    before = [p.clone() for p in method.teacher.parameters()]
    for ours, theirs in zip(before, method.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
        for name, b in method.student.named_buffers():
            if "running" in name:
                b.add_(5.0)
    statistics = [b.clone() for b in method.teacher.buffers()]
    method.update_teacher()
    for old, new in zip(before, method.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)
    for old, new in zip(statistics, method.teacher.buffers(), strict=True):
        assert torch.equal(old, new)
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_step_updates_the_teacher_uses_the_old_queue_and_enqueues(monkeypatch):
    method = SMALL.build(HALF, QUARTER).train()
    old = method.queue.rows.clone()
    seen = {}

    def spy(q, k, queue, **settings):
        seen.update(q=q.detach(), k=k.clone(), rows=queue.rows.clone(), **settings)
        assert method.teacher_moved and not k.requires_grad
        return relation_loss(q, k, queue, **settings)

    update = method.update_teacher
    method.teacher_moved = False

    def moved():
        method.teacher_moved = True
        update()

    monkeypatch.setattr(method, "update_teacher", moved)
    monkeypatch.setattr("relssl.methods.ressl.relation_loss", spy)
    loss, logs = method(images())
    loss.backward()
    assert torch.equal(seen["rows"], old)  # the current keys are not in the softmax
    assert torch.equal(method.queue.rows[:8], seen["k"]) and torch.equal(method.queue.rows[8:], old[8:])
    for embeddings in (seen["q"], seen["k"]):
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(8))
    assert (seen["student_temperature"], seen["teacher_temperature"]) == (0.1, 0.04)
    assert logs["teacher_entropy"] > 0
    assert all(p.grad is not None for p in method.student.parameters())


def test_predictor_starts_as_the_identity_and_is_the_students_alone():
    torch.manual_seed(0)
    plain = SMALL.build(HALF, QUARTER).train()
    method = replace(SMALL, predictor=24).build(HALF, QUARTER).train()
    method.student.load_state_dict(plain.student.state_dict())
    method.teacher.load_state_dict(plain.teacher.state_dict())
    losses = []
    for m in (plain, method):
        torch.manual_seed(1)
        losses.append(m(images())[0])
    torch.testing.assert_close(*losses)
    losses[1].backward()
    assert method.predictor.mlp[-1].weight.grad.norm() > 0
    assert not any("predictor" in name for name, _ in method.teacher.named_parameters())


def test_multi_crop_shrinks_views_and_runs_the_teacher_once(monkeypatch):
    """Sides are 224, 192, 160, 128 and 96 of 224 parts, here of 32 px; all losses have the same weight."""
    method = replace(SMALL, image_size=32, crops=5).build(HALF, QUARTER).train()
    batch = images(8, 40)
    assert [view(batch).shape[-1] for view in method.strong] == [32, 27, 23, 18, 14]
    seen, calls = {}, []

    def spy(q, k, queue, **settings):
        seen.update(q=q.detach(), k=k, queue=queue.rows.clone(), settings=settings)
        return relation_loss(q, k, queue, **settings)

    keys = method.keys
    monkeypatch.setattr(method, "keys", lambda x: calls.append(1) or keys(x))
    monkeypatch.setattr("relssl.methods.ressl.relation_loss", spy)
    loss, _ = method(batch)
    assert seen["q"].shape == (5, 8, 16) and len(calls) == 1
    each = [relation_loss(q, seen["k"], seen["queue"], student_temperature=0.1) for q in seen["q"]]
    torch.testing.assert_close(loss, torch.stack(each).mean())


@pytest.mark.parametrize(
    ("decay", "weight", "shares"),
    [("linear", 1.0, [1, 0.75, 0.5, 0, 0]), ("none", 0.6, [0.6, 0.6, 0.6, 0, 0])],
)
def test_info_nce_warm_up(monkeypatch, decay, weight, shares):
    """Checks the weights at epochs 0, 1, 2, 4 and 5 of a warm-up of 4, and the total loss."""
    config = replace(SMALL, info_nce_epochs=4, info_nce_weight=weight, info_nce_decay=decay)
    method = config.build(HALF, QUARTER).train()
    parts = {}

    def spy(name, function):
        def run(*arguments, **settings):
            found = function(*arguments, **settings)
            parts[name] = found[0] if isinstance(found, tuple) else found
            return found

        return run

    monkeypatch.setattr("relssl.methods.ressl.relation_loss", spy("relation", relation_loss))
    monkeypatch.setattr("relssl.methods.ressl.info_nce", spy("info_nce", info_nce))
    for epoch, share in zip((0, 1, 2, 4, 5), shares, strict=True):
        method.epoch = epoch
        parts.clear()
        loss, logs = method(images())
        assert ("info_nce" in logs) == (share > 0) == ("info_nce" in parts)
        expected = share * parts.get("info_nce", 0) + (1 - share) * parts["relation"]
        torch.testing.assert_close(loss, expected)


def test_shuffled_keys_come_back_in_order():
    """With BatchNorm in eval mode the shuffle must change nothing."""
    method = replace(SMALL, bn_splits=4).build(HALF, QUARTER).eval()
    x = torch.randn(8, 3, 16, 16)
    shuffled = method.keys(x)
    method.config.bn_splits = 1
    torch.testing.assert_close(shuffled, method.keys(x))


@pytest.mark.parametrize("strong", [False, True])
def test_augmentation_differs_by_image_and_by_call_and_follows_the_seed(strong):
    same = images(1, 32).expand(6, -1, -1, -1)
    augment = view(32, strong)

    def draw(seed):
        torch.manual_seed(seed)
        return augment(same)

    first = draw(0)
    assert first.shape == (6, 3, 32, 32) and first.dtype == torch.float32
    assert torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
    assert len({tuple(x.flatten()[:50].tolist()) for x in first}) == 6
    assert first.min() >= -2 - 1e-5 and first.max() <= 2 + 1e-5  # [0, 1] normalized by (0.5, 0.25)


def test_only_the_strong_view_loses_colour():
    """A fifth of 1000 strong views are grey, within five standard deviations, and no weak view is."""
    colour = images(1, 8).expand(1000, -1, -1, -1)
    grey = {}
    for strong in (False, True):
        x = view(8, strong)(colour)
        grey[strong] = int(((x - x[:, :1]).abs().amax((1, 2, 3)) < 1e-5).sum())
    assert grey[False] == 0 and 200 - 63 < grey[True] < 200 + 63


@pytest.mark.parametrize(
    ("arch", "stem", "size", "width", "before_pool"),
    [
        ("resnet18", "small", 32, 512, 4),  # CIFAR: 32 px reach the last block as 4 x 4
        ("resnet18", "small-pool", 64, 512, 4),  # STL-10: 64 px as well
        ("resnet34", "small", 32, 512, 4),
        ("resnet50", "imagenet", 64, 2048, 2),
        ("mobilenet_v3_large", "imagenet", 64, 960, 2),
        ("mobilenet_v3_large", "small", 32, 960, 2),
        ("efficientnet_b0", "small", 32, 1280, 2),
        ("conv4", "small", 32, 128, 2),
    ],
)
def test_backbones(arch, stem, size, width, before_pool):
    net, features = build(arch, stem)
    shapes = []
    for module in net.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):
            module.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape[-1]))
    net.eval()
    assert net(torch.randn(2, 3, size, size)).shape == (2, width) and features == width
    assert shapes[-1] == before_pool  # Earlier ones belong to squeeze-and-excitation.


def test_presets_are_the_published_ones():
    """The authors' settings: K, m, D, hidden width, batch, epochs, lr, weight decay, side."""
    published = {
        "cifar10": (4096, 0.99, 128, 2048, 256, 200, 0.06, 5e-4, 32),
        "cifar100": (4096, 0.99, 128, 2048, 256, 200, 0.06, 5e-4, 32),
        "stl10": (16384, 0.996, 128, 2048, 256, 200, 0.06, 5e-4, 64),
        "tiny-imagenet": (16384, 0.996, 128, 2048, 256, 200, 0.06, 5e-4, 64),
        "imagenet": (131072, 0.999, 512, 4096, 256, 200, 0.05, 1e-4, 224),
    }
    for name, row in published.items():
        p = PRESETS[name]
        fields = (p.queue_size, p.momentum, p.dim, p.hidden, p.batch_size, p.epochs, p.lr)
        assert (*fields, p.weight_decay, p.image_size) == row
        assert (p.student_temperature, p.teacher_temperature, p.warmup_epochs) == (0.1, 0.04, 5)
