"""Tests `relssl tune`, and how "auto" uses its choices."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import unit

from relssl import backends, trial, tune, tuned
from relssl.functional import relation_loss

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Returns an empty cache folder, of which the process has read nothing."""
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path))
    monkeypatch.delenv("RELSSL_TUNE", raising=False)
    tuned.adopt(None)
    yield tmp_path
    tuned.adopt(None)


def entry(choice, rows=512, queue=65_536, dim=128, dtype="float32"):
    return {"dtype": dtype, "dim": dim, "rows": rows, "queue": queue, "choice": choice}


def keep(*entries):
    tuned.store(tuned.environment("cpu"), list(entries))


def chosen(rows, queue, dim=128, dtype=torch.float32):
    x = torch.empty(1, dtype=dtype).expand(rows // 2, dim)
    return backends.choose("auto", "cpu", dtype, dim, (x, x), x[:1].expand(queue, dim))


# ------------------------------------------------------------------------------- what "auto" takes


def test_auto_takes_the_nearest_choice():
    default = chosen(512, 65_536)
    assert default == "cpu"
    keep(entry("chunked"), entry("reference", rows=64, queue=4096))
    assert chosen(512, 65_536) == chosen(2048, 262_144) == chosen(512, 16_384) == "chunked"
    assert chosen(64, 4096) == chosen(16, 1024) == "reference"
    assert chosen(256, 16_384) == "chunked" and chosen(130, 16_384) == "reference"  # in ratios
    for elsewhere in ((2050, 65_536), (512, 262_145), (14, 4096)):
        assert chosen(*elsewhere) == default
    assert chosen(512, 65_536, dim=64) == default
    assert chosen(512, 65_536, dtype=torch.bfloat16) == default


def test_a_loss_runs_the_choice(monkeypatch):
    inputs, ran = (unit(4, 16), unit(4, 16), unit(64, 16)), []

    def relation(*arguments):
        ran.append("chunked")
        return own(*arguments)

    own = backends.BACKENDS["chunked"].relation
    monkeypatch.setattr(backends.BACKENDS["chunked"], "relation", relation)
    expected = relation_loss(*inputs)
    assert not ran
    keep(entry("chunked", rows=8, queue=64, dim=16))
    torch.testing.assert_close(relation_loss(*inputs), expected)
    assert ran == ["chunked"]
    compiled = torch.compile(relation_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    assert ran == ["chunked"] * 2


def test_what_cannot_run_here_is_passed_over():
    keep(entry("triton"), entry("gone", rows=64), entry("cpu/avx9", rows=4096))
    assert {chosen(rows, 65_536) for rows in (64, 512, 4096)} == {"cpu"}


def test_the_file_is_read_once_and_can_be_ignored(cache, monkeypatch):
    keep(entry("chunked"))
    assert chosen(512, 65_536) == "chunked"
    tuned.path().unlink()
    assert chosen(512, 65_536) == "chunked"
    tuned.adopt(None)
    assert chosen(512, 65_536) == "cpu"
    keep(entry("chunked"))
    monkeypatch.setenv("RELSSL_TUNE", "0")
    assert chosen(512, 65_536) == "cpu"


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"here": [',
        "[1, 2]",
        "[" * 100_000,
        '{"ENVIRONMENT": 3}',
        '{"ENVIRONMENT": [{"dim": 1}]}',
        '{"ENVIRONMENT": [{"dtype": "float32", "dim": 128, "rows": 0, "queue": 65536, "choice": "chunked"}]}',
        '{"ENVIRONMENT": [{"dtype": "float32", "dim": 128, "rows": 512, "queue": 65536, "choice": 5}]}',
    ],
    ids=range(8),
)
def test_a_damaged_file_is_ignored(text):
    tuned.path().write_text(text.replace("ENVIRONMENT", tuned.environment("cpu")))
    assert chosen(512, 65_536) == "cpu"
    keep(entry("chunked"))
    assert chosen(512, 65_536) == "chunked"


def test_a_choice_is_for_its_environment_only(monkeypatch):
    keep(entry("chunked"))
    for name, value in {"get_num_threads": lambda: 77, "__version__": "9.9"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, value)
            tuned.adopt(None)
            assert chosen(512, 65_536) == "cpu"
    tuned.adopt(None)
    assert chosen(512, 65_536) == "chunked"


def test_entries_take_the_place_of_those_of_their_shape(cache):
    keep(entry("chunked"), entry("cpu", rows=64))
    keep(entry("reference"), entry("cpu", rows=1024))
    (found,) = tuned.read().values()
    assert {(e["rows"], e["choice"]) for e in found} == {(512, "reference"), (64, "cpu"), (1024, "cpu")}
    assert os.listdir(cache) == ["tuned.json"]


def test_a_gpu_without_a_choice_gives_one_message(monkeypatch, caplog):
    monkeypatch.setattr(tuned, "environment", lambda device: "a GPU")
    monkeypatch.setattr(tuned, "_advised", False)
    with caplog.at_level(logging.WARNING, "relssl"):
        for dtype in (torch.bfloat16, torch.float16):
            tuned.choices("cuda", dtype)
    (record,) = caplog.records
    assert "`relssl tune` does that, once" in record.getMessage()


# ------------------------------------------------------------------------------------------ the choice


def test_the_baseline_stays_unless_another_is_clearly_faster():
    def choice(**ratios):
        return tune.choice({name: {"ratio": ratio} for name, ratio in ratios.items()}, "cpu")

    assert choice(cpu=1.0, chunked=0.99) == "cpu"
    assert choice(cpu=1.0, chunked=0.97) == "chunked"
    assert choice(cpu=1.0, chunked=1.2, reference=0.5) == "cpu"  # which keeps the similarities
    assert choice(chunked=1.0, reference=0.5) == "chunked"
    assert choice(reference=0.5) is None
    assert tune.choice({"cpu": {"refused": "wrong"}, "chunked": {"ratio": 3.0}}, "cpu") == "chunked"


def test_a_process_has_a_time_limit():
    trial = tune.Trial({"device": "cpu"}, 0.3)  # less than it takes to import torch
    trial.verify()
    assert trial.verdict == {"refused": "no answer within 0.3 s"}
    trial.close()
    assert trial.process.poll() == -9


def test_memory_that_was_used_before_counts_again():
    def run():  # in pieces smaller than those that malloc gives back at once
        return len([torch.ones(6250) for _ in range(100)])

    run()
    for _ in range(2):
        found = trial.peak_memory(run, "cpu")
        assert found is None or 0.6 <= found / 2.5e6 <= 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dim", "0"], "--dim must be at least 1, got 0"),
        (["--rows", "1"], "--rows must be at least 2, got 1"),
        (["--rows", "9"], "--rows counts as many queries as keys, so it must be even; got 9"),
        (["--limit", "nan"], "--limit must be at least 1, got nan"),
        (["--import", "no_such_module"], "--import no_such_module: No module named 'no_such_module'"),
        pytest.param(
            ["--device", "cuda"], "--device cuda: torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_bad_usage_is_a_line(command, arguments, message):
    run = command("tune", *arguments)
    assert run.returncode == 1 and run.stderr.splitlines()[-1] == f"relssl tune: {message}"


COMMAND = ["--device", "cpu", "--dtype", "fp32", "--rows", "64", "--queue", "1024", "--dim", "16"]


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """Runs relssl tune with the bad backends, too; returns its entry, its table and the cache folder."""
    cache = tmp_path_factory.mktemp("cache")
    environment = os.environ | {"RELSSL_CACHE": str(cache), "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "relssl", "tune", *COMMAND, "--import", "bad_backends", "--limit", "25"]
    run = subprocess.run(command, cwd=cache, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (found,) = json.loads((cache / "tuned.json").read_text()).values()
    return found[0], run


@pytest.mark.slow
@pytest.mark.xdist_group("tune")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("crashes", "crashed: SIGSEGV"),
        ("hangs", "no answer within 25 s"),
        ("raises", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("stays", "no answer within 25 s"),
        ("is_wrong", "wrong: an error of "),
        ("is_wrong_in_the_mean", "wrong: an error of "),
        ("ignores_ids", "wrong: an error of "),
        ("varies", "a second call gives other results"),
    ],
)
def test_a_bad_candidate_is_refused(tried, name, why):
    entry, run = tried
    assert entry["candidates"][name]["refused"].startswith(why)
    assert f"refused: {why}" in next(line for line in run.stdout.splitlines() if line.split()[:1] == [name])


@pytest.mark.slow
@pytest.mark.xdist_group("tune")
def test_a_slow_candidate_is_not_chosen(tried):
    entry, _ = tried
    assert entry["candidates"]["is_slow"]["ratio"] > 2 and entry["choice"] == entry["baseline"] == "cpu"
    assert entry["candidates"]["is_slow"]["seconds"] > 0.05
    for name in ("cpu", "chunked", "is_slow", "reference"):
        assert 0 < entry["candidates"][name]["error"] < 1e-4


@pytest.mark.slow
@pytest.mark.xdist_group("tune")
def test_the_table_lists_every_candidate(tried):
    entry, run = tried
    title, heading, *lines = run.stdout.splitlines()
    assert title == "64 rows of q and k, a queue of 1,024, D = 16, float32"
    assert heading.split() == ["ms", "times", "the", "choice", "of", "matmul", "error", "MiB"]
    assert {line.split()[0] for line in lines} == set(entry["candidates"])
    (mine,) = (line for line in lines if line.endswith("chosen"))
    assert mine.split()[0] == "cpu" and mine.split()[2] == "1.00"
