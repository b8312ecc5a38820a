"""Images without labels: their data sets, training, evaluation and plots."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from relssl import datasets
from relssl.evaluate import evaluate, evaluate_during_training, extract_features
from relssl.methods import PRESETS
from relssl.scores import clustering_scores

NO_LABELS = (
    "no labels of training and test images (a folder has them as train/CLASS/... and val/CLASS/..., arrays as"
    " train_y and test_y, a function returns them as labelled and test), so no knn, linear, nmi, acc or ari"
)


def write(root, *names):
    """Writes images of 20 x 20, each in another shade of red: 10, 20, 30, ..."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * number + 10, 0, 0)).save(root / name)


def reds(images):
    pixels, labels = images[list(range(len(images)))]
    return pixels[:, 0, 3, 3].tolist(), labels.tolist()


def test_a_flat_folder(tmp_path):
    """Images are found at any depth, in the order of their paths; other files are ignored."""
    write(tmp_path, "b.png", "a.png", "deep/er/c.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    data = datasets.load("folder", tmp_path, 14)
    assert (data.labelled, data.test, data.classes) == (None, None, [])
    assert reds(data.train) == ([20, 10, 30], [-1, -1, -1]) == reds(data.unlabelled)
    assert data.train[[0]][0].shape == (1, 3, 16, 16) and data.unlabelled[[0]][0].shape == (1, 3, 14, 14)


def test_a_train_folder_without_classes(tmp_path):
    """Test images are used only if they have class folders, which then determine the classes."""
    write(tmp_path, "train/a.png", "train/b.png", "val/c.png", "test/cat/d.png", "test/dog/e.png")
    data = datasets.load("folder", tmp_path, 14)
    assert data.labelled is None and data.classes == ["cat", "dog"]
    assert reds(data.train) == ([10, 20], [-1, -1]) and reds(data.test) == ([40, 50], [0, 1])
    method = replace(PRESETS["sacc"]["folder"], test_images=True)
    assert reds(method.passes(data)["joint"]) == ([10, 20, 40, 50], [-1, -1, 0, 1])
    assert method.resolve(data).clusters == 2


def test_classes_without_test_images(tmp_path):
    write(tmp_path, "train/cat/a.png", "train/dog/deep/er/b.png", "val/c.png")
    data = datasets.load("folder", tmp_path, 14)
    assert data.test is None and data.unlabelled is None and data.classes == ["cat", "dog"]
    assert reds(data.train) == reds(data.labelled) == ([10, 20], [0, 1])
    for test_images in (False, True):
        config = replace(PRESETS["sacc"]["folder"], test_images=test_images)
        assert config.passes(data) == {"joint": data.train}


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        ([], "", "no images in .*/images: .* Supported extensions are: .jpg"),
        (["val/cat/a.png"], "", "no folder .*train$"),
        (["a.png"], "imagenet-10", "no folder .*train$"),
        (["train/a.png"], "imagenet-10", "no class folder .*train/n02056570 and 9 others"),
    ],
)
def test_what_is_no_data_set(tmp_path, names, classes, message):
    write(tmp_path / "images", "x.png")
    (tmp_path / "images/x.png").unlink()
    write(tmp_path / "images", *names)
    with pytest.raises(FileNotFoundError, match=message):
        datasets.load("folder", tmp_path / "images", 14, classes=classes)


def test_arrays_without_labels(tmp_path):
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8).numpy()
    np.savez(tmp_path / "x.npz", train_x=images)
    data = datasets.load("arrays", tmp_path / "x.npz", 8)
    assert (data.labelled, data.test, data.classes) == (None, None, [])
    pixels, labels = data.train[[1, 4]]
    assert np.array_equal(pixels.numpy(), images[[1, 4]].transpose(0, 3, 1, 2)) and labels.tolist() == [
        -1,
        -1,
    ]
    np.savez(tmp_path / "y.npz", train_x=images, test_x=images[:2], test_y=[0, 1])
    data = datasets.load("arrays", tmp_path / "y.npz", 8)
    assert data.labelled is None and data.test[[0, 1]][1].tolist() == [0, 1] and data.classes == ["0", "1"]
    np.savez(tmp_path / "z.npz", train_x=images, train_y=np.arange(5) % 2)
    data = datasets.load("arrays", tmp_path / "z.npz", 8)
    assert data.test is None and data.labelled is data.train and data.classes == ["0", "1"]
    for extra, lacking in (({"test_x": images}, "test_y"), ({"test_y": [0]}, "test_x")):
        np.savez(tmp_path / "bad.npz", train_x=images, **extra)
        with pytest.raises(ValueError, match=rf"bad\.npz lacks {lacking}; it has train_x"):
            datasets.load("arrays", tmp_path / "bad.npz", 8)


RUNS = {
    "ressl": "--queue-size 16 --dim 16 --hidden 16 --bn-splits 1",
    "sacc": "--clusters 3 --dim 16",
    "sacc with a queue": "--clusters 3 --dim 16 --queue-size 16",
}


@pytest.mark.parametrize("run", RUNS)
def test_training_evaluation_and_pictures(command, tmp_path, run):
    """Each command succeeds, names the missing labels in a line, and computes what needs none."""
    write(tmp_path / "flat", *(f"{i:02}.png" for i in range(20)))
    settings = "--data folder --data-root flat --arch conv4 --image-size 16 --epochs 1 --batch-size 10"
    settings += f" --stem small --workers 0 --warmup-epochs 0 --out run {RUNS[run]}"
    with pytest.warns(UserWarning, match=f"^{re.escape(NO_LABELS)}$"):
        trained = command("train", run.split()[0], *settings.split())
    assert trained.returncode == 0, trained.stderr
    scores = json.loads(trained.stdout)["trained encoder"]
    noted = json.loads((tmp_path / "run/metrics.json").read_text())["epochs"][-1]
    sides = {"ressl": ("teacher", "student"), "sacc": ()}.get(run, ("instance",))
    assert scores.keys() == {f"entropy_at_{side}_temperature" for side in sides}
    assert all(0 < value <= np.log(16) and value == noted[name] for name, value in scores.items())
    with pytest.warns(UserWarning, match=f"^{re.escape(NO_LABELS)}$"):
        again = command("evaluate", "run/checkpoint.pt", "--plots", "--projection", "pca")
    assert again.returncode == 0 and json.loads(again.stdout) == {"trained encoder": scores}
    for name in ("features", "neighbours", "curves"):
        pixels = np.asarray(Image.open(tmp_path / f"run/{name}.png").convert("L"))
        assert min(pixels.shape) > 300 and 0.005 < (pixels < 250).mean() < 0.9


def test_sacc_needs_a_number_of_clusters(command, tmp_path):
    write(tmp_path / "flat", "a.png")
    run = command("train", "sacc", "--data", "folder", "--data-root", "flat")
    assert run.returncode == 1 and run.stderr.splitlines()[-1] == (
        "relssl train: data 'folder' has no classes to count: set the number of --clusters"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lacking", ["test", "training"])
def test_clusters_are_scored_on_the_labels_there_are(monkeypatch, lacking):
    labels = torch.arange(40) % 3
    images = torch.randint(0, 80, (40, 3, 16, 16), dtype=torch.uint8) + (80 * labels).byte().view(-1, 1, 1, 1)
    some = datasets.Arrays(images, labels)
    sets = {"test": (some, None), "training": (None, some)}[lacking]
    data = datasets.Data(some, *sets, ["a", "b", "c"], None if sets[0] else some)
    config = replace(PRESETS["sacc"]["digits"], clusters=4)
    method = config.build(torch.zeros(3), torch.ones(3)).eval()
    found = method.assign(extract_features(method.features, some)[0]).argmax(1)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: data)
    with pytest.warns(
        UserWarning, match=f"no labels of {lacking} images .* scored on the other images alone"
    ):
        assert (
            evaluate(method, config)
            == clustering_scores(labels, found)
            == evaluate_during_training(method, data)
        )


def test_a_training_image_is_not_its_own_neighbour(monkeypatch, tmp_path):
    from relssl import plots

    pixels = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    some = datasets.Arrays(pixels, torch.full((9,), -1))
    shown = []
    monkeypatch.setattr(
        plots, "_show", lambda axis, image, title, colour: shown.append((image, title, colour))
    )
    method = PRESETS["ressl"]["digits"].build(torch.zeros(3), torch.ones(3)).eval()
    plots.neighbours(
        method, datasets.Data(some, None, None, [], some), tmp_path / "n.png", queries=2, shown=8
    )
    assert len(shown) == 2 * (1 + 8)
    for row in (shown[:9], shown[9:]):
        numbers = [int((pixels == image).flatten(1).all(1).nonzero()) for image, _, _ in row]
        assert sorted(numbers) == list(range(9))  # the other eight, once each
        assert row[0][1] == "no label" and {colour for _, _, colour in row[1:]} == {plots.GREY}
