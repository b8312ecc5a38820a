"""Exported encoders in torchvision's and timm's own models, and evaluation on another data set."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from relssl.checkpoint import TrainState, save
from relssl.methods import PRESETS
from relssl.methods.backbones import ARCHS, build
from relssl.methods.export import encoder_state, model_code
from relssl.scores import clustering_scores


def stirred(module):
    """Changes every tensor from its initial value, so that exchanged names are found."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.dtype.is_floating_point:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.mul_(1 + 0.2 * noise) if tensor.dim() > 1 else tensor.copy_(0.5 + noise)
        else:
            tensor.fill_(len(name))
    return module.eval()


def built(library, *lines):
    """Returns `net` after running the lines that the command prints."""
    if library == "timm":
        pytest.importorskip("timm")
    names = {}
    for line in lines:
        exec(line, names)
    return names["net"].eval()


# Every architecture, every small stem, and norms of several parts (whose eps must be torchvision's).
CASES = [(arch, "imagenet", 1) for arch in ARCHS if arch != "conv4"]
CASES += [(arch, "small", 1) for arch in ("resnet18", "efficientnet_b0")]
CASES += [("resnet18", "small-pool", 8), ("mobilenet_v3_large", "small", 8)]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("arch", "stem", "splits"), CASES)
@torch.no_grad()
def test_the_librarys_own_model_loads_every_tensor(arch, stem, splits, library):
    """Loading is strict, and the model computes the encoder's features."""
    encoder, width = build(arch, stem, splits)
    state = encoder_state(stirred(encoder), arch, library)
    imports = f"import {library}; from torch import nn"
    net = built(library, imports, model_code(arch, stem, library))
    net.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 40, 40)
    found, expected = net(images), encoder(images)
    assert found.shape == expected.shape == (2, width) and expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def checkpoint(tmp_path):
    """Returns a function that writes a checkpoint of an untrained SACC: checkpoint("resnet18")."""

    def write(arch, **settings):
        preset = PRESETS["sacc"]["digits"]
        config = replace(preset, arch=arch, stem="small", clusters=4, dim=8, out=tmp_path, **settings)
        method = config.build_on_device(torch.zeros(3), torch.ones(3))
        save(tmp_path, TrainState(method, epoch=1))
        return method.eval()

    return write


@pytest.mark.parametrize(("library", "arch"), [("torchvision", "resnet18"), ("relssl", "conv4")])
@pytest.mark.parametrize("name", ["encoder.pt", "encoder.safetensors"])
@torch.no_grad()
def test_the_command_prints_how_to_load_what_it_wrote(command, checkpoint, library, arch, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    method = checkpoint(arch)
    run = command("export", "checkpoint.pt", name, "--for", library)
    assert run.returncode == 0, run.stderr
    net = built(library, *run.stdout.splitlines()[1:])
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net(images), method.backbone(images))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_what_cannot_be_exported_is_refused(command, checkpoint, monkeypatch, tmp_path, library):
    checkpoint("conv4")
    run = command("export", "checkpoint.pt", "encoder.pt", "--for", library)
    assert run.returncode == 1
    assert run.stderr == f"relssl export: {library} has no conv4; --for relssl writes it"
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    run = command("export", "checkpoint.pt", "encoder.safetensors")
    expected = "relssl export: encoder.safetensors needs another package: pip install safetensors"
    assert run.returncode == 1 and run.stderr == expected
    assert not list(tmp_path.glob("encoder*"))


def test_evaluation_on_another_data_set(command, checkpoint, tmp_path):
    """The images differ from those of training in size, number of classes and content."""
    method = checkpoint("conv4")
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 60), ("test", 30)):
        y = np.arange(count) % 3
        x = generator.integers(0, 90, (count, 30, 30, 3)) + 80 * y[:, None, None, None]
        arrays |= {f"{part}_x": x.astype(np.uint8), f"{part}_y": y}
    np.savez(tmp_path / "other.npz", **arrays)
    command_line = "evaluate", "checkpoint.pt", "--data", "arrays", "--data-root", "other.npz", "--epochs", 5
    run = command(*command_line)
    assert run.returncode == 0, run.stderr
    scores = json.loads(run.stdout)["trained encoder"]
    images = torch.cat(
        [torch.from_numpy(arrays[f"{part}_x"]).permute(0, 3, 1, 2) for part in ("train", "test")]
    )
    small = nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    found = method.assign(method.features(small)).argmax(1)
    labels = torch.from_numpy(np.concatenate([arrays["train_y"], arrays["test_y"]]))
    for name, expected in clustering_scores(labels, found).items():
        assert scores[name] == pytest.approx(expected)
    assert scores["knn"] > 0.5 and scores["linear"] > 0.5  # The three classes differ in brightness.
    here = command("evaluate", "checkpoint.pt", "--epochs", 1)
    assert json.loads(here.stdout)["trained encoder"]["knn"] != scores["knn"]  # digits, of the checkpoint
    run = command("evaluate", "checkpoint.pt", "--data", "arrays")
    assert run.returncode == 1 and "data 'arrays' needs a data root (--data-root)" in run.stderr
