"""Encoders of timm: training, resuming, multi-crop, weights to begin with, export, and errors of one line."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from resuming import assert_same, train_until
from torch import nn

import relssl
from relssl import datasets
from relssl.checkpoint import load_method
from relssl.evaluate import baselines, evaluate
from relssl.methods import PRESETS, backbones, timm_models
from relssl.methods.batch_norm import SplitBatchNorm2d
from relssl.methods.export import encoder_state, model_code
from relssl.methods.teacher import Teacher
from relssl.train import build_optimizer, train

timm = pytest.importorskip("timm")

VIT, RESNET = "timm/vit_tiny_patch16_224", "timm/resnet18"
ZEROS, ONES = torch.zeros(3), torch.ones(3)
SMALL = replace(
    PRESETS["ressl"]["digits"], image_size=32, batch_size=16, epochs=2, eval_every=0, queue_size=32,
    hidden=32, dim=16, crops=3, optimizer="adamw", lr=1e-3, clip_grad=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    """48 training images, 3 steps an epoch, and 40 test images, of scikit-learn's digits."""
    data = datasets.load("digits", None, 32)
    train, test = (datasets.Arrays(*part[list(range(n))]) for part, n in ((data.train, 48), (data.test, 40)))
    return datasets.Data(train, train, test, data.classes)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Returns a function that trains an architecture to the end, once, and gives its run's folder."""
    runs: dict[str, Path] = {}

    def run(arch):
        if arch not in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(datasets, "load", lambda *_, **__: digits)
                runs[arch] = tmp_path_factory.mktemp("run")
                train(replace(SMALL, arch=arch, out=runs[arch]))
        return runs[arch]

    return run


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: digits)


@pytest.mark.parametrize("arch", [VIT, RESNET])
def test_trains_and_resumes_in_the_middle_of_an_epoch(arch, trained):
    whole, _ = load_method(trained(arch), "cpu")
    config = replace(SMALL, arch=arch)
    assert 1 < train_until(5, type(whole), config).epoch < 2  # Of 3 steps an epoch.
    resumed = train(replace(config, resume=True))
    assert_same(whole, resumed)
    losses = [entry["loss"] for entry in json.loads(Path("out/train/metrics.json").read_text())["epochs"]]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    assert 0 < evaluate(resumed, config)["knn"] <= 1


@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("arch", [VIT, RESNET])
def test_exported_weights_load_in_timm_and_give_the_same_features(arch, stem, trained, tmp_path):
    if stem == "small":
        method, config = load_method(trained(arch), "cpu")
        backbone, size = method.backbone, config.image_size
    else:
        backbone, size = backbones.build(arch, stem, sides=(64,))[0].eval(), 64
    names = {"timm": timm, "nn": nn}
    exec(model_code(arch, stem, "timm", size), names)
    names["net"].load_state_dict(encoder_state(backbone, arch, "timm"), strict=True)
    own = {"relssl": relssl}
    exec(model_code(arch, stem, "relssl", size), own)
    own["net"].load_state_dict(encoder_state(backbone, arch, "relssl"), strict=True)
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        for net in names["net"], own["net"]:
            torch.testing.assert_close(net.eval()(images), backbone(images))
    with pytest.raises(ValueError, match="is a model of timm: --for timm writes it"):
        encoder_state(backbone, arch, "torchvision")


@pytest.mark.parametrize(("arch", "uses_nn"), [(VIT, False), (RESNET, True)])
def test_printed_code_loads_what_is_exported(arch, uses_nn, command, trained):
    run = command("export", trained(arch), "encoder.pt", "--for", "timm")
    written, *code = run.stdout.splitlines()
    assert written.startswith(f"encoder.pt: {arch}, ") and ("nn" in code[0]) == uses_nn
    names = {}
    exec("\n".join(code), names)
    state = torch.load("encoder.pt")
    assert f"{len(state)} tensors, {sum(t.numel() for t in state.values()):,} numbers" in written
    assert names["net"].state_dict().keys() == state.keys()


def test_width_is_the_models_own():
    for name, width in [("vit_tiny_patch16_224", 192), ("resnet50", 2048), ("mobilenetv3_small_050", 1024)]:
        net, found = backbones.build(f"timm/{name}", "imagenet", sides=(64,))
        assert found == width == net.head_hidden_size


def test_patches_and_crops_of_any_size():
    net, _ = backbones.build(VIT, sides=(32, 27, 14), patch_size=4)
    assert net.patch_embed.patch_size == (4, 4) and net.pos_embed.shape == (1, 1 + 8 * 8, 192)
    assert net.training


def test_patch_size_that_is_a_number():
    """XCiT's and EfficientViT's, where other models have a pair."""
    assert backbones.build("timm/xcit_nano_12_p16_224", sides=(32,))[1] == 128
    with pytest.raises(ValueError, match="cannot create xcit_nano_12_p16_224 for 8 pixels"):
        backbones.build("timm/xcit_nano_12_p16_224", sides=(8,))


def test_batch_norm_in_parts():
    net, _ = backbones.build(RESNET, "small", 4, (32,))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20 and all(isinstance(m, SplitBatchNorm2d) and m.splits == 4 for m in norms)
    plain = timm.create_model("resnet18", num_classes=0)
    assert plain.state_dict().keys() == net.state_dict().keys()


def test_decay_exempts_what_the_model_does():
    method = replace(SMALL, arch=VIT, decay_norm_and_bias=True, weight_decay=0.1).build(ZEROS, ONES)
    groups = build_optimizer(method, method.config).param_groups
    exempt = {id(p) for p in groups[2]["params"]}
    own = dict(method.backbone.named_parameters())
    assert exempt == {id(own["pos_embed"]), id(own["cls_token"])}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len([*method.student.parameters()])


def test_decay_exempts_names_that_fit_a_pattern():
    """XCiT's pos_embed.*; the teacher has such parameters, too, which have no gradient."""
    method = replace(SMALL, arch="timm/xcit_nano_12_p16_224").build(ZEROS, ONES)
    exempt = {id(p) for p in build_optimizer(method, method.config).param_groups[2]["params"]}
    own = method.backbone.named_parameters()
    assert exempt == {id(p) for name, p in own if name.startswith(("pos_embed.", "cls_token"))}
    assert len(exempt) == 3


@pytest.mark.parametrize("largest", [1e-3, 1e3])
def test_gradients_are_clipped(largest):
    """With SGD and without momentum, the norm of the first step is the rate times that of the gradients."""
    config = replace(
        SMALL, arch="conv4", epochs=1, batch_size=48, crops=1, optimizer="sgd", sgd_momentum=0.0, lr=0.1,
        weight_decay=0.0, warmup_epochs=0, out=Path("clipped"),
    )  # fmt: skip
    free = train(replace(config, clip_grad=0.0, out=Path("free")))
    moved = train(replace(config, clip_grad=largest))
    torch.manual_seed(config.seed)
    first = config.build(ZEROS, ONES)

    def step(method):
        pairs = zip(method.student.parameters(), first.student.parameters(), strict=True)
        return torch.cat([(a - b).flatten() for a, b in pairs]).detach()

    free, moved = step(free), step(moved)
    expected = min(0.1 * largest, float(free.norm()))
    assert moved.norm() == pytest.approx(expected, rel=1e-3)
    assert torch.cosine_similarity(free, moved, dim=0) > 0.999


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_training_begins_with_given_weights(suffix):
    """A file of a whole classifier, of which the encoder's part is loaded, for student and teacher."""
    source = timm.create_model("resnet18", num_classes=7)
    state = source.state_dict()
    path = Path(f"weights.{suffix}")
    if suffix == "pt":
        torch.save(state, path)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(state, path)
    config = replace(SMALL, arch=RESNET, stem="imagenet", epochs=1, lr=0.0, init=str(path), momentum=1.0)
    method = train(config)
    for encoder in method.student, method.teacher:
        for name, tensor in encoder["backbone"].named_parameters():
            assert torch.equal(tensor, state[name]), name
    path.unlink()  # It is not needed any more.
    train(replace(config, resume=True))
    load_method(config.out, "cpu")


def pretrain(monkeypatch):
    """Replaces timm's download by weights of 0.01, and the statistics of its images by others."""
    create = timm.create_model

    def created(name, pretrained=False, **options):
        net = create(name, **options)
        if pretrained:
            for p in net.parameters():
                nn.init.constant_(p, 0.01)
            net.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        return net

    monkeypatch.setattr(timm, "create_model", created)
    return partial(created, num_classes=0, pretrained=True)


def test_pretrained_weights_bring_their_statistics(monkeypatch):
    pretrain(monkeypatch)
    method = train(replace(SMALL, arch=VIT, epochs=1, lr=0.0, init="pretrained", crops=1))
    assert all((p == 0.01).all() for p in method.backbone.parameters())
    images = torch.full((1, 3, 2, 2), 0.5)
    expected = (0.5 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(method.normalize(images)[0, :, 0, 0], expected)
    noise = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr("relssl.evaluate._score", lambda encode, *_: {"features": encode(noise)})
    untrained = baselines(method.config)["untrained encoder"]["features"]
    torch.testing.assert_close(untrained, method.features(noise))
    with pytest.raises(ValueError, match=r"pretrained weights .* they need --normalize all"):
        train(replace(PRESETS["cc"]["digits"], normalize="none", arch=VIT, init="pretrained", out=Path("cc")))


def test_pretrained_models_are_teachers(monkeypatch):
    created = pretrain(monkeypatch)
    before = torch.get_rng_state()
    teacher = Teacher(VIT, 32)
    assert torch.equal(before, torch.get_rng_state())
    assert teacher.width == 192 and all((p == 0.01).all() for p in teacher.backbone.parameters())
    config = replace(PRESETS["distill"]["digits"], image_size=32, batch_size=32, epochs=1, eval_every=0)
    method = train(replace(config, teacher=VIT, queue_size=32))
    assert method.queue.rows.shape == (32, 192)
    with pytest.raises(ValueError, match="features of width 192, but dim is 512"):
        train(replace(config, teacher=VIT, dim=512, out=Path("other")))
    monkeypatch.setattr(timm_models, "create", lambda *_, **__: created("gmlp_ti16_224", img_size=32))
    with pytest.raises(ValueError, match=r"teacher timm/vit.* takes no images of 64 pixels: Input height"):
        Teacher(VIT, 64)


@pytest.mark.parametrize("settings", [{"arch": "timm/nothing"}, {"arch": VIT, "image_size": 8}])
def test_encoders_are_checked_before_data_are_read(settings, monkeypatch):
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("data are read"))
    with pytest.raises(ValueError, match=settings["arch"].removeprefix("timm/")):
        train(replace(SMALL, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "timm/vit_tinny_patch16"}, "timm has no model 'vit_tinny_patch16'; similar: vit_tiny"),
        ({"arch": VIT, "image_size": 8}, "has patches of 16 pixels, images of 8: set --patch-size"),
        ({"arch": VIT, "bn_splits": 8}, "8 parts needs a ResNet with BatchNorm, which timm/vit.* is not: "),
        ({"arch": "timm/resnet50_gn", "bn_splits": 8}, "which timm/resnet50_gn is not: --bn-splits 1"),
        ({"arch": "timm/convnext_atto"}, "timm/convnext_atto takes no images of 27 pixels: Calculated"),
        ({"arch": RESNET, "patch_size": 4}, "timm/resnet18 takes no patch size"),
        ({"arch": "conv4", "patch_size": 4}, "patch_size is for vision transformers of timm, not for conv4"),
        ({"arch": "timm/resnet18.nonsense"}, r"cannot create resnet18.nonsense .*Invalid pretrained tag"),
        ({"arch": "timm/nest_tiny", "image_size": 30}, "cannot create nest_tiny for 30 pixels: .*patch_size"),
        ({"arch": "timm/resnet18d"}, "timm/resnet18d has several convolutions as its stem: --stem imagenet"),
        ({"arch": "resnet19"}, "arch must be one of conv4, .*, or timm/NAME; got 'resnet19'"),
        ({"init": "pretrained"}, "pretrained weights are timm's: set --arch to timm/conv4"),
        ({"init": "nowhere.pt"}, "no file nowhere.pt with weights to begin with"),
        ({"init": "text.pt"}, "text.pt has no weights that can be read"),
        ({"init": "list.pt"}, "list.pt is no state_dict of an encoder"),
        ({"init": "numbers.pt"}, "numbers.pt is no state_dict of an encoder"),
        ({"init": "nan.pt"}, r"the weights of nan.pt are not finite: 0.weight$"),
        (
            {"init": "other.pt"},
            r"other.pt are of another encoder: it lacks .* and \d+ more, also has a$",
        ),
        (
            {"init": "shape.pt"},
            r"shape.pt are of another encoder: it has in other shapes \(--stem, .*\) 0.weight$",
        ),
    ],
)
def test_errors_are_lines(settings, message):
    Path("text.pt").write_text("text")
    torch.save([1], "list.pt")
    torch.save({1: torch.zeros(1)}, "numbers.pt")
    torch.save({"a": torch.zeros(1)}, "other.pt")
    state = backbones.build("conv4")[0].state_dict()
    torch.save(state | {"0.weight": torch.zeros(3)}, "shape.pt")
    torch.save(state | {"0.weight": state["0.weight"] / 0}, "nan.pt")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train(replace(SMALL, **settings))
    assert "\n" not in str(error.value)


def test_without_timm_an_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm/resnet18 needs another package: pip install timm"):
        timm_models.create_arguments(RESNET, 32)
