"""Tests the training step on a GPU: views, synchronisation, CUDA graphs, parts of a batch, runs."""

import json
from dataclasses import replace

import pytest
import torch
from peers import replayed
from torch import nn

from relssl.augment import Normalize, RandAugment, View
from relssl.gradients import Encoder, Gradients
from relssl.methods import PRESETS
from relssl.train import train

pytestmark = pytest.mark.gpu
STRONG = {"jitter": (0.4, 0.4, 0.4, 0.1), "grey": 0.2, "blur": 0.5}
VIEWS = {
    "weak": View(32, normalize=Normalize([0.5] * 3, [0.25] * 3)),
    "strong": View(32, **STRONG),
    "small": View(24, **STRONG),
    "randaugment": View(32, **STRONG, randaugment=RandAugment()),
}
METHODS = {
    "ressl": replace(PRESETS["ressl"]["cifar10"], arch="conv4", queue_size=512, bn_splits=4),
    "sacc": replace(PRESETS["sacc"]["digits"], image_size=32, clusters=10, queue_size=512),
}
each_view = pytest.mark.parametrize("name", VIEWS)
each_method = pytest.mark.parametrize("name", METHODS)


def images(count=64, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)


@pytest.mark.parametrize("tf32", ["highest", "medium"])
@each_view
def test_views_equal_the_cpus(name, tf32):
    """TF32 may round neither coordinates nor weights; RandAugment rounds down what may be just above."""
    on_cpu, on_gpu = VIEWS[name], VIEWS[name].cuda()
    parameters = on_gpu.draw(64, 32, 32, "cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(tf32)
    try:
        found = on_gpu(images(), parameters).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    on_cpu = on_cpu.cpu()
    expected = on_cpu(
        images(device="cpu"), type(parameters)(*(p if p is None else p.cpu() for p in parameters))
    )
    difference = (found - expected).abs()
    most = 1.01 / 255 if name == "randaugment" else 1e-4
    assert difference.max() <= most and (difference > 1e-4).float().mean() < 0.01


@each_view
def test_views_are_captured_in_a_graph(name):
    view, x = VIEWS[name].cuda(), images()
    replay = replayed(lambda: view(x))
    first = replay().clone()
    assert torch.isfinite(first).all() and not torch.equal(replay(), first)  # Each replay draws anew.


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("parts", [1, 4])
@each_method
def test_a_step_does_not_synchronise(name, parts):
    method = METHODS[name].build_on_device(torch.zeros(3), torch.ones(3)).train()
    gradients, x = Gradients(method, Encoder(method), parts), images()
    for _ in range(2):
        gradients.add(x, method.default_pass)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients.add(x, method.default_pass)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_method
def test_parts_have_the_gradient_of_the_batch(name):
    found = []
    for parts in (1, 4):
        torch.manual_seed(0)
        method = METHODS[name].build(torch.zeros(3), torch.ones(3)).train()
        for module in list(method.modules()):
            for child, layer in list(module.named_children()):
                if isinstance(layer, nn.BatchNorm2d):
                    setattr(module, child, nn.Identity())
        method, count = method.cuda(), len(method.views)
        method.augment = lambda x, count=count: [x / 255] * count  # the same in each part
        Gradients(method, Encoder(method), parts).add(images(), method.default_pass)
        found.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
    assert (found[1] - found[0]).norm() < 1e-3 * found[0].norm()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("accumulate", [1, 2])
@each_method
def test_a_compiled_run_learns_as_an_eager_one(name, accumulate, mode, tmp_path):
    config = replace(
        PRESETS[name]["digits"], epochs=2, eval_every=2, schedule="constant", accumulate=accumulate, lr=1e-3
    )
    losses = []
    for compiled in ("no", mode):
        train(replace(config, compile=compiled, out=tmp_path / compiled))
        metrics = (tmp_path / compiled / "metrics.json").read_text()
        losses.append(json.loads(metrics)["epochs"][-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
