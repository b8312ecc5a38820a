"""tools/adopters.py reports what runs, what fails and what differs; no other package is needed."""

import json
from dataclasses import replace

import adopters
import figures
import other_packages
import pytest
import torch
from other_packages import Comparison, Shape
from torch.nn import functional as F

SMALL = Shape(6, 8, 20)


@pytest.fixture
def example(tmp_path, monkeypatch):
    monkeypatch.setattr(adopters, "IMPORTED_FIRST", "json")  # torchvision takes seconds

    def write(text):
        path = tmp_path / "example.py"
        path.write_text(text)
        return path

    return write


def test_an_example_that_runs(example):
    found = adopters.run_example(example("import sys\nprint('first')\nprint(len(sys.argv), __name__)\n"))
    assert found["last_line"] == "1 __main__" and 0 <= found["seconds"] < 60 and "error" not in found


@pytest.mark.parametrize(
    "text, error",
    [("raise ValueError('why')", "ValueError: why"), ("raise SystemExit(3)", "exit status 3")],
)
def test_an_example_that_fails(example, text, error):
    assert adopters.run_example(example(text))["error"] == error


def test_an_example_that_hangs(example):
    assert "longer than 1 s" in adopters.run_example(example("while True: pass"), seconds=1)["error"]


def published(shape, start, order="after", factor=1.0):
    """MoCo's published lines, with the queue enqueued before or after the loss."""
    rows = start[0]

    def step(q, k):
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        if order == "before":
            rows[: len(k)] = k
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ rows.T.clone()], 1) / 0.2
        if order == "after":
            rows[: len(k)] = k
        return factor * F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))

    return step


def compared(**options):
    def theirs(shape, start):
        return published(shape, start, **options)

    return Comparison("torch", "MoCo", SMALL, theirs, other_packages.enqueues_after)


def test_equal_losses_pass(one_thread, capsys):
    (found,) = adopters.compare_all([compared()], rounds=3)
    assert "error" not in found and found["loss_difference"] < 1e-6 < found["gradient"]
    assert found["version"] == torch.__version__ and found["ms"].keys() == {"theirs", "ours"}
    assert "torch: MoCo" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"order": "before"}, {"factor": 1 + 1e-5}], ids=str)
def test_losses_that_differ_fail(one_thread, options):
    (found,) = adopters.compare_all([compared(**options)], rounds=1)
    assert found["error"] == "the difference is too large"


@pytest.mark.parametrize(
    "loss, by, gradient, gradient_by, expected",
    [
        (0.1, 9e-7, 1e-3, 9e-8, False),
        (0.1, 2e-6, 1e-3, 0.0, True),
        (10.0, 2e-6, 1e-3, 0.0, False),
        (0.1, 0.0, 1.0, 9e-6, False),
        (0.1, 0.0, 1.0, 2e-5, True),
        (0.1, 0.0, 1e-3, 2e-7, True),
        (float("nan"), float("nan"), 1.0, 0.0, True),
        (0.1, 0.0, 1.0, float("nan"), True),
    ],
)
def test_what_is_too_large(loss, by, gradient, gradient_by, expected):
    found = {"loss": loss, "loss_difference": by, "gradient": gradient, "gradient_difference": gradient_by}
    assert adopters.too_large(found) == expected


def test_a_package_that_is_missing_is_listed_and_the_next_compared(one_thread):
    missing = replace(compared(), package="no-such-package")
    first, second = adopters.compare_all([missing, compared()], rounds=1)
    assert first["error"].startswith("PackageNotFoundError") and "error" not in second
    table = figures.adopters_table({"device": "a CPU", "comparisons": [first, second]})
    assert "PackageNotFoundError" in table and f"torch {torch.__version__} | MoCo, B 6, K 20, D 8" in table


def test_our_side_of_each_comparison_runs_twice(one_thread):
    for comparison in other_packages.COMPARISONS:
        shape = Shape(6, 8, 20 if comparison.shape.size else 0)
        run = other_packages.runner(comparison, "ours", shape)
        (first, gradients), (second, _) = run(), run()
        assert len(gradients) == comparison.trained and all(g.abs().max() > 0 for g in gradients)
        # The queue has changed in between, and a batch without a queue has not.
        assert (first == second) == (not comparison.shape.size), comparison.name


def test_clip_s_loss_by_the_primitive():
    comparison = other_packages.COMPARISONS[-1]
    leaves, _ = other_packages.inputs(comparison, SMALL)
    image, text = (unit_float64(leaf) for leaf in leaves)
    logits, labels = image @ text.T / 0.07, torch.arange(len(image))
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss, _ = other_packages.runner(comparison, "ours", SMALL)()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def unit_float64(leaf):
    return F.normalize(leaf.detach().double(), dim=1)


@pytest.mark.parametrize("fails", [False, True])
def test_status_and_record(example, tmp_path, monkeypatch, one_thread, fails):
    monkeypatch.setattr(other_packages, "COMPARISONS", [])
    path = example("raise ValueError('why')" if fails else "print('done')")
    assert adopters.main([str(path), "--record", str(tmp_path / "out")]) == fails
    document = json.loads((tmp_path / "out/adopters.json").read_text())
    assert document["examples"][0].get("error") == ("ValueError: why" if fails else None)
    assert document["torch"] == torch.__version__ and document["comparisons"] == []


def test_pins_are_exact_and_packages_are_those_compared():
    def pins(name):
        lines = (adopters.EXAMPLES / name).read_text().splitlines()
        return dict(line.split("==") for line in lines if line and not line.startswith("#"))

    assert pins("packages.txt").keys() == {c.package for c in other_packages.COMPARISONS}
    assert not pins("imports.txt").keys() & {"torch", "torchvision", "numpy"}


def test_the_record_has_every_example_and_comparison():
    document = json.loads((figures.RESULTS / "adopters.json").read_text())
    names = {path.name for path in adopters.EXAMPLES.glob("*.py")}
    assert {e["example"] for e in document["examples"]} >= names
    recorded = [(c["package"], c["title"]) for c in document["comparisons"]]
    assert recorded == [(c.package, c.title) for c in other_packages.COMPARISONS]
    assert not any("error" in entry for entry in document["examples"] + document["comparisons"])
