"""The parts of a training step around the loss: teacher, optimizer, sums, and batches on the device."""

from dataclasses import replace

import pytest
import torch
from operations import Operations

from relssl import datasets, tuned
from relssl.checkpoint import TrainState, restore, save
from relssl.datasets.on_device import DeviceLoader, OnDevice, move_to_device
from relssl.methods.ressl import PRESETS
from relssl.sums import Sums
from relssl.train import build_optimizer, epoch_batches, image_loaders, train

HALF = torch.full((3,), 0.5)
SMALL = replace(
    PRESETS["digits"], hidden=32, dim=16, queue_size=96, batch_size=32, image_size=8, epochs=2, eval_every=0
)
CPU = torch.device("cpu")


def arrays(count, first=0):
    images = torch.arange(first, first + count).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    return datasets.Arrays(images.to(torch.uint8).contiguous(), torch.arange(first, first + count) % 10)


def test_teacher_moves_in_one_operation_as_by_lerp():
    method = SMALL.build(HALF, HALF)
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(torch.randn_like(p))
    pairs = zip(method.teacher.parameters(), method.student.parameters(), strict=True)
    expected = [t.lerp(s, 1 - SMALL.momentum) for t, s in pairs]
    with Operations() as own:
        method.update_teacher()
    assert own.names == ["aten::_foreach_lerp_.Scalar"]
    assert all(torch.equal(t, e) for t, e in zip(method.teacher.parameters(), expected, strict=True))


def test_sums_take_two_operations_and_continue_from_their_totals():
    """Names change between the steps of an epoch; the oracle adds each name's terms in float32, in order."""
    steps = [{"loss": torch.rand(()), "a": torch.rand(())} for _ in range(5)]
    steps += [{"loss": torch.rand(()), "b": torch.rand(())} for _ in range(4)]
    steps += [{"b": torch.rand(()), "a": torch.rand(())} for _ in range(3)]
    expected = {}
    for step in steps:
        for name, value in step.items():
            total, count = expected.get(name, (torch.zeros(()), 0))
            expected[name] = total + value, count + 1
    for stop in range(len(steps) + 1):
        sums = Sums()
        for step in steps[:stop]:
            sums.add(step)
        sums = Sums(sums.totals())
        for step in steps[stop:]:
            sums.add(step)
        found = sums.totals()
        assert found.keys() == expected.keys()
        for name, (total, count) in expected.items():
            assert torch.equal(found[name], torch.stack((total, torch.tensor(float(count)))))
    sums.add(steps[-1])
    with Operations() as own:
        sums.add(steps[-1])
    assert own.names == ["aten::stack", "aten::add_.Tensor"]


@pytest.mark.parametrize("start", [0, 2, 5, 7])
def test_batches_on_the_device_are_those_of_the_host(start):
    passes = {"first": arrays(170), "second": datasets.ConcatImages(arrays(40, 170), arrays(30, 210))}
    moved = move_to_device(passes, "device", CPU)
    assert all(isinstance(images, OnDevice) for images in moved.values())
    batches = []
    for sets in (moved, passes):
        with image_loaders(sets, SMALL) as loaders:
            batches.append(list(epoch_batches(loaders, SMALL, 3, start)))
    ours, theirs = batches
    assert len(ours) == len(theirs) == 7 - start
    for (name, own), (other_name, other) in zip(ours, theirs, strict=True):
        assert name == other_name
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
        assert torch.equal(own.images[:, 0, 0, 0].long(), own.indices)  # An image holds its own index.


def test_a_batch_on_the_device_takes_two_operations_without_synchronisation():
    images = OnDevice([arrays(96), arrays(32, 96)], CPU)
    loader = DeviceLoader(images)
    batches = epoch_batches({"train": loader}, SMALL, 0, 0)
    next(batches)  # draws the order
    with Operations() as own:
        for _ in batches:
            pass
    assert own.names == ["aten::index_select"] * 2 * 3
    with Operations() as own:
        list(loader.load(torch.randperm(128).view(4, 32)))
    assert not own.synchronisations


def test_what_moves(monkeypatch):
    files = datasets.images.Files([("a.png", 0)], lambda path: None, lambda path, crops, key: None)
    passes = {"arrays": arrays(10), "both": datasets.ConcatImages(arrays(10), files), "files": files}
    assert move_to_device(passes, "auto", CPU) == move_to_device(passes, "cpu", CPU) == passes
    moved = move_to_device(passes, "device", CPU)
    assert isinstance(moved["arrays"], OnDevice) and moved["both"] is passes["both"]
    assert moved["arrays"].images.data_ptr() == passes["arrays"].images.data_ptr()  # On a CPU no copy.
    # "auto": 10 images of 192 bytes fill a quarter of 7,680 bytes.
    gpu = torch.device("cuda")
    monkeypatch.setattr("relssl.datasets.on_device.OnDevice", lambda parts, device: device)
    for free, fits in (7681, True), (7680, False):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert (move_to_device(passes, "auto", gpu)["arrays"] == gpu) == fits


@pytest.mark.parametrize("setting", ["cpu", "device"])
def test_resumes_bit_for_bit_with_data_elsewhere(setting, tmp_path, monkeypatch, capsys):
    images = arrays(96)
    data = datasets.Data(images, images, None, list("0123456789"))
    monkeypatch.setattr(datasets, "load", lambda *_: data)
    config = replace(SMALL, bn_splits=4, exclude_own=True, schedule="constant")
    part = replace(config, out=tmp_path / "part", data_device=setting)
    once = replace(config, out=tmp_path / "once", data_device="cpu")
    train(replace(part, epochs=1))
    other = {"cpu": "device", "device": "cpu"}[setting]
    resumed = train(replace(part, resume=True, data_device=other)).state_dict()
    expected = train(once).state_dict()
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert "data_device" not in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("before", [None, False, True])
def test_optimizers_of_a_checkpoint_keep_the_runs_own_way(optimizer, before, tmp_path):
    """A checkpoint of a fused, of another or of an old optimizer continues as this run computes its steps."""
    config = replace(SMALL, optimizer=optimizer)
    build = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    methods = [config.build(HALF, HALF) for _ in range(2)]
    saved, own = (TrainState(m, build_optimizer(m, config)) for m in methods)
    options = {"momentum": 0.9} if optimizer == "sgd" else {}
    groups = [{"params": g["params"]} for g in saved.optimizer.param_groups]
    saved.optimizer = build(groups, lr=1e-3, fused=before, **options)
    for p in saved.method.student.parameters():
        p.grad = torch.randn_like(p)
    saved.optimizer.step()
    save(tmp_path, saved)
    ways = [(g["fused"], g["foreach"]) for g in own.optimizer.param_groups]
    assert ways == [(True if optimizer == "adam" else None, None)] * 2
    restore(tmp_path / "checkpoint.pt", own, CPU)
    tuned.adopt(None)
    assert [(g["fused"], g["foreach"]) for g in own.optimizer.param_groups] == ways
    for p, q in zip(own.method.student.parameters(), saved.method.student.parameters(), strict=True):
        p.grad = q.grad.clone()
        for name, value in saved.optimizer.state[q].items():
            assert torch.equal(own.optimizer.state[p][name], value)
    own.optimizer.step()
