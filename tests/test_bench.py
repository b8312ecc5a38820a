"""The benchmark: its exact results are right, its peers agree, and the pages match the recorded results."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from math import log
from pathlib import Path

import figures
import memory
import oracle
import parts
import peers
import plots
import pytest
import runs
import timing
import torch
import views
import work
from PIL import Image

ROOT = Path(__file__).parents[1]
RESULTS = sorted(figures.benchmarks())
SMALL = {
    "relation": work.Case("relation", 6, 64, 16),
    "multi_crop": work.Case("multi_crop", 6, 64, 16, views=3),
    "info_nce": work.Case("info_nce", 6, 64, 16),
    "in_queue": work.Case("in_queue", 6, 64, 16),
    "nt_xent": work.Case("nt_xent", 6, 0, 16),
    "nt_xent_queue": work.Case("nt_xent_queue", 6, 64, 16),
    "sacc": work.Case("sacc", 6, 0, 16, views=3),
}


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_pages_match_the_recorded_results(page):
    assert figures.filled(page) == page.read_text(), "run make figures"


def test_every_result_is_on_a_page():
    text = {page.name: page.read_text() for page in figures.PAGES}
    marks = [found[2] for page in text.values() for found in figures.MARKED.finditer(page)]
    assert sorted(marks) == sorted(figures.PARTS), "each part once"
    assert sum(page.count("<!-- figures:") for page in text.values()) == len(marks), "each mark has its end"
    devices = [document["device"] for document in figures.benchmarks().values()]
    assert devices and all(f"**{name}**" in text["README.md"] for name in devices)
    table = text["README.md"].split("<!-- figures: summary -->")[1].split("<!-- end -->")[0]
    assert 0 < table.count("float32 |") + table.count("bfloat16 |") <= 8 * len(devices)
    reports = {f"{name}.json" for name in (*figures.REPORTS, "adopters")}
    assert reports | {path.name for path in RESULTS} == {p.name for p in figures.RESULTS.glob("*.json")}


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_plots_are_of_what_is_recorded(path):
    drawn = sorted(path.parent.glob(f"{path.stem}-*.png"))
    assert drawn
    for plot in drawn:
        assert Image.open(plot).text["Source"] == plots.digest(path), f"run make figures: {plot.name}"


def formula(p):
    """Returns the mean loss by tests/oracle.py, and the gradients of p.leaves."""
    leaves = [t.detach().double().requires_grad_() for t in p.leaves]
    q, k, queue = leaves[0], p.k.detach().double(), p.queue.double()
    if p.case.work in ("relation", "relation_ids", "multi_crop"):
        loss, _ = oracle.relation(q, k, queue, work.STUDENT, work.TEACHER, "ce")
    elif p.case.work == "info_nce":
        loss = oracle.info_nce(q, k, queue, work.INFO_NCE)
    elif p.case.work == "in_queue":  # its own key is the positive, all others are negatives
        rows = [torch.cat((queue[:i], queue[i + 1 :])) for i in range(len(q))]
        pairs = zip(q.split(1), k.split(1), rows, strict=True)
        loss = torch.cat([oracle.info_nce(a, b, rest, work.INFO_NCE) for a, b, rest in pairs])
    elif p.case.work == "sacc":
        views, assigned = leaves
        loss = sum(oracle.nt_xent(*views[[i, i + 1]], None, work.NT_XENT).mean() for i in (0, 1))
        for pair in ([0, 1], [0, 2], [1, 2]):
            columns = [torch.nn.functional.normalize(p.T) for p in assigned[pair]]
            loss = loss + oracle.nt_xent(*columns, None, 1.0).mean() + 2 * log(10)
            loss = loss - torch.special.entr(torch.stack([p.sum(0) / p.sum() for p in assigned[pair]])).sum()
    else:
        loss = oracle.nt_xent(*leaves, queue if len(queue) else None, work.NT_XENT)
    loss = loss.mean()
    return loss, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_exact_results(case, monkeypatch):
    monkeypatch.setattr(work, "BLOCK", 2 * 64)  # So that there are several blocks of rows.
    problem = work.Problem(case, "cpu")
    loss, grads = formula(problem)
    assert problem.exact[0]["ce"] == pytest.approx(loss.item(), rel=1e-12)
    for ours, theirs in zip(problem.exact[1], grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert problem.error(loss, list(grads)) < 1e-12
    # An error of a thousandth in the loss or a gradient is detected.
    assert problem.error(loss * 1.001, list(grads)) == pytest.approx(1e-3, rel=1e-3)
    assert problem.error(loss, [g * 0.999 for g in grads]) == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_without_the_queue_is_detected():
    """At the benchmark's size, where a peer might skip every small probability of InfoNCE."""
    problem = work.Problem(work.Case("in_queue", 32, 65_536, 128), "cpu")
    loss = torch.tensor(problem.exact[0]["ce"])
    short = -problem.k.double() / (work.INFO_NCE * 32)
    assert problem.error(loss, [short]) > 0.03


PLAIN = ("eager", "attention", "attention, split queue", "relssl", "relssl cpu", "relssl chunked")


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("name", PLAIN)
def test_peers_agree(case, name, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # Two pieces of the queue, on any machine.
    if name not in peers.PEERS[case.work] and name != "relssl":
        pytest.skip("not one of its peers")
    problem = work.Problem(case, "cpu")
    peer = peers.find(case.work, name)
    value, grads = peers.runner(problem, name)()
    assert problem.error(value, grads, peer.form, peer.normalises) < 1e-5


@pytest.mark.parametrize(("name", "size"), [("ReSSL", 64), ("SACC", 0)])
def test_steps_agree(name, size):
    steps = pytest.importorskip("test_step")
    views = oracle.unit(3, 8, steps.DIM).requires_grad_()
    images = torch.randint(256, (8, 3, steps.SIZE, steps.SIZE), dtype=torch.uint8)
    grads = []
    for side in ("relssl", "eager", "kornia"):
        if side == "kornia" and not importlib.util.find_spec("kornia"):
            continue
        method = steps.METHODS[name](size, side)
        grads.append(torch.autograd.grad(method.losses(views), views)[0])
        assert steps.step(method)(images).isfinite()
    for other in grads[1:]:
        torch.testing.assert_close(grads[0], other, rtol=1e-4, atol=1e-6)


def test_the_parts_of_a_step_are_recorded():
    """Its loss is that of Method.forward, and operations are those of the parts."""
    steps = pytest.importorskip("test_step")
    side = steps.METHODS["ReSSL"](64, "relssl")
    images = torch.randint(256, (8, 3, steps.SIZE, steps.SIZE), dtype=torch.uint8)
    other = copy.deepcopy(side.method)
    torch.manual_seed(1)
    expected, _ = other(images)
    torch.manual_seed(1)
    run = steps.step(side)
    assert run(images) == expected
    found = steps.recorded(lambda *record: run(images, *record))
    assert tuple(found["parts_ms"]) == tuple(found["parts_operations"]) == parts.PARTS
    assert sum(found["parts_operations"].values()) == found["operations"] and not found["synchronisations"]
    assert found["parts_operations"]["teacher"] == found["parts_operations"]["queue"] == 1


def in_process(images, transform):
    items = views.PerImage(images, transform)
    return lambda: torch.stack([items[number] for number in range(len(items))])


@pytest.mark.parametrize("work", ["weak_view", "strong_view", "sacc_view"])
@pytest.mark.parametrize("name", ["torchvision", "kornia", "lightly", "solo-learn"])
def test_views_agree(work, name, monkeypatch):
    """Each peer draws its own: only averages over many images can agree."""
    monkeypatch.setattr(views, "in_workers", in_process)
    images = views.pictures(1024, 32, "cpu")
    view = views.view_of(work, 32)
    try:
        theirs = views.VIEWS[name](view, images)()
    except peers.Unsupported as why:
        pytest.skip(str(why))
    assert theirs.dtype == torch.float32
    assert views.disagreement(views.ours(view, images)(), theirs) < 5
    # Another scale of the crops is detected.
    view.scale = (0.01, 0.01)
    assert views.disagreement(views.ours(view, images)(), theirs) > 6


@pytest.mark.parametrize("name", ["eager", "relssl"])
def test_queues_agree(name):
    start, keys = oracle.unit(12, 4), oracle.unit(2, 3, 4)
    queue = peers.QUEUES[name](start)
    for batch in keys:
        queue.enqueue(batch)
    assert torch.equal(queue.rows(), torch.cat((keys.flatten(0, 1), start[6:])))


def test_absent_peers_give_the_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    problem = work.Problem(SMALL["nt_xent"], "cpu")
    with pytest.raises(peers.Unsupported, match="pytorch-metric-learning is not installed"):
        peers.find("nt_xent", "pytorch-metric-learning").make(problem)
    with pytest.raises(peers.Unsupported, match="solo-learn is not installed"):
        peers.find("nt_xent", "solo-learn").make(problem)


def test_flop():
    """A product of similarities has 2 B K D flop; the relation loss has two of them, and two means."""
    product = 2 * 6 * 64 * 16
    assert work.Case("relation", 6, 64, 16).flop == 4 * product
    assert work.Case("relation", 6, 64, 16, grad=False).flop == 2 * product
    assert work.Case("multi_crop", 6, 64, 16, views=5).flop == 12 * product
    assert work.Case("nt_xent", 6, 0, 16).flop == 3 * (2 * 12 * 12 * 16)
    assert work.Case("nt_xent_queue", 6, 64, 16).flop == 3 * (2 * 12 * 12 * 16) + 4 * product
    assert work.Case("sacc", 6, 0, 16, views=3).flop == 6 * (2 * 12 * 12 * 16)


def test_slowdown():
    assert timing.slowdown([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == (2.0, 2.0, 3.0)


@pytest.mark.alone
@pytest.mark.skipif(not memory.measurable(), reason="needs /proc/self/clear_refs")
def test_memory_includes_the_similarities():
    eager, fused = (
        memory.case_memory(work.Case("info_nce", 64, 2**16, 16), name) for name in ("eager", "relssl cpu")
    )
    matrix = 64 * 2**16 * 4
    assert fused < matrix < 3 * matrix < eager < 8 * matrix
    with pytest.raises(RuntimeError, match="Unsupported: it runs on"):
        memory.case_memory(work.Case("info_nce", 64, 2**10, 16), "relssl cuda")


@pytest.mark.alone
@pytest.mark.slow
def test_a_run_ends_with_table_json_and_plots(tmp_path):
    """Runs the smallest case with two peers, and one that is absent, from another folder."""
    nothing = f"{ROOT}/bench/test_losses.py::test_loss[{work.Case('relation', 8, 64, 32)}-{{}}]"
    command = [sys.executable, "-m", "pytest", "-q", "--record", tmp_path, "-p", "no:cacheprovider"]
    command += ["--benchmark-json", tmp_path / "statistics" / "all.json"]
    command += [nothing.format(name) for name in ("eager", "relssl cpu", "relssl cuda")]
    (tmp_path / "statistics").mkdir()
    run = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (recorded,) = tmp_path.glob("*.json")
    document = json.loads(recorded.read_text())
    assert {"device", "threads", "torch", "relssl", "date"} <= document.keys()
    timed = {e["peer"]: e for e in document["results"] if "ms" in e}
    assert timed.keys() == {"eager", "relssl cpu"}
    absent = [e["peer"] for e in document["results"] if "absent" in e]
    assert absent == ["relssl cuda"]
    for entry in timed.values():
        low, high = entry["slowdown"][1:]
        assert 0 < low <= entry["slowdown"][0] <= high and entry["error"] < 1e-4
    assert f"{timed['eager']['slowdown'][0]:.2f}" in run.stdout
    assert recorded.with_name(f"{recorded.stem}-rate.png").exists()
    # The statistics of pytest-benchmark are those of the same rounds, and its table is printed, too.
    statistics = json.loads((tmp_path / "statistics" / "all.json").read_text())["benchmarks"]
    assert {each["name"] for each in statistics} == timed.keys()
    for each in statistics:
        entry = each["extra_info"]
        assert entry == timed[each["name"]] and each["stats"]["rounds"] == entry["rounds"] >= 3
        assert each["stats"]["median"] * 1e3 == pytest.approx(entry["ms"][0], rel=1e-3)
    assert "Name (time in" in run.stdout and "slowdown" in run.stdout


def test_runs_are_merged():
    entry = {"title": "t", "shape": "s", "peer": "eager", "rounds": 3, "error": 1e-7, "bytes": 5}
    about = {"device": "d", "threads": "2", "torch": "2", "commit": "c"}
    three = [
        about | {"results": [entry | {"ms": [10.0, 9.0, 12.0], "slowdown": [4.0, 3.5, 4.4]}]},
        about | {"results": [entry | {"ms": [12.0, 8.0, 13.0], "slowdown": [5.0, 4.9, 5.5], "bytes": 7}]},
        about | {"results": [entry | {"ms": [11.0, 9.0, 14.0], "slowdown": [4.5, 4.0, 5.0]}]},
    ]
    (got,) = runs.merge(three)["results"]
    assert got["ms"] == [11.0, 8.0, 14.0] and got["slowdown"] == [4.5, 3.5, 5.5]
    assert (got["runs"], got["rounds"], got["bytes"]) == (3, 9, 7)
    assert not runs.overlap([4.0, 3.5, 4.4], [5.0, 4.9, 5.5])
    assert runs.overlap(got["slowdown"], [5.0, 4.9, 5.5])
    with pytest.raises(ValueError, match="more than one commit: "):
        runs.merge([three[0], three[1] | {"commit": "other"}])


COLLECT = """
import sys, pytest

sys.path[:0] = sys.argv[1:]
from gpu_report import ROOT, SELECTIONS, selected


class Names(list):
    def pytest_collection_finish(self, session):
        self += [item.nodeid for item in session.items]


def names(*arguments):
    found = Names()
    options = ["-q", "-q", "--collect-only", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    assert pytest.main([*options, *map(str, arguments)], plugins=[found]) == 0
    return found

chosen = {name: names(*selected(expression)) for name, expression in SELECTIONS.items()}
everything = sorted(names("-m", "gpu", ROOT / "tests"))
assert sorted(sum(chosen.values(), [])) == everything, "not once each"
backends = {"triton": "triton", "cuda": "cuda", "cuda, sm_90a": "sm_90", "step": "gpu_step"}
for name, tests in chosen.items():
    assert tests and all(backends[name] in test for test in tests), name
print(len(everything) > 250)
"""


@pytest.mark.slow
def test_the_gpu_report_runs_each_test_for_a_gpu_once(tmp_path):
    command = [sys.executable, "-P", "-W", "ignore", "-c", COLLECT, ROOT / "tools", ROOT / "tests"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.endswith("True\n"), run.stdout[-2000:] + run.stderr[-2000:]


COMPILE = """
import sys

sys.path[:0] = sys.argv[1:]
from compile_kernels import compile_all, jobs

assert len(jobs()) == len(set(jobs())) and jobs()[0] == ("float32", (None, 40, 1000, 1024), "relation")
print(compile_all(("float16", (None, 3, 17, 16), "info_nce"), 90, 132))
"""


@pytest.mark.slow
def test_kernels_are_compiled_before_tests_need_them(tmp_path):
    """There are two launches forward and two backward: exponents, and the gradient of the queue."""
    command = [
        sys.executable,
        "-P",
        "-W",
        "ignore",
        "-c",
        COMPILE,
        *(ROOT / name for name in ("tests", "tools", "bench")),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout == "4\n", run.stderr
    assert {file.stem for file in tmp_path.rglob("*.cubin")} == {
        "forward", "combine_info_nce", "lse_to_log2", "backward_queue"
    }  # fmt: skip
