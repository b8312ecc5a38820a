"""Triton's kernels without running them: what they compile to, who is refused, how tiles are tuned."""

import itertools
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from contextvars import Context
from pathlib import Path

import pytest
import torch
from checks import INTERPRETED
from relssl.kernels import autotune, heuristics, resources
from relssl.kernels.heuristics import AMD, Tiles
from triton import set_allocator
from triton.runtime._allocation import _allocator
from triton.runtime.errors import OutOfResources

from relssl import backends
from relssl.functional import relation_loss

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")

# Every kernel of the default tables that a training step in bfloat16 uses, on every chip; the other dtypes on
# two. docs/kernels.md has all.
CASES = [
    pytest.param(
        capability,
        case,
        id=f"{resources.chip_name(capability)}-{case.name}-{case.dtype}-{case.dim}",
        marks=[pytest.mark.slow] * (dim != 128),
    )
    for capability in resources.CAPABILITIES
    for dtype, dims in (("bf16", (64, 128, 256)), ("fp16", (128,)), ("fp32", (128,)))
    if dtype == "bf16" or capability in (80, 90)
    for dim in dims
    for case in resources.cases(capability, dim, dtype)
    if not case.name.startswith("combine") or capability in (80, 90)
]


@pytest.mark.parametrize(("capability", "case"), CASES)
def test_compiled(capability, case):
    got = resources.resources(case, capability)
    assert got.spilled == 0
    assert got.shared <= resources.SHARED[capability]
    if case.name in ("lookup", "vjp_x") and case.dtype != "fp32":  # whose tiles go straight to registers
        products = {90: "wgmma", 100: "tcgen05.mma", AMD: "mfma"}
        assert got.tensor == products.get(capability, "mma.sync")
        assert got.tma if case.tiles.tma else got.copies > 0 or capability == AMD
        assert got.narrow == 0


@pytest.mark.parametrize("name", ["combine_relation", "combine_info_nce"])
def test_a_loss_is_stored_before_its_program_arrives(name):
    """What the interpreter cannot show: the block's barriers, and reads that no stale cache serves."""
    (case,) = (case for case in resources.cases(90, 64, "bf16") if case.name == name)
    ptx = resources.compiled(case, 90).asm["ptx"]
    before, after = re.split(r"atom\.global\.gpu\.acq_rel\.add\.u32", ptx)
    assert "bar.sync" in before.rsplit("st.global", 1)[1]
    assert "bar.sync" in after[: after.index("ld.global")]
    assert re.findall(r"ld\.global\S*", after) == ["ld.global.cg.b32"] * 4  # 1,024 losses of 256 threads


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dim"), [(86, 512), (90, 512), (90, 1024)])
def test_wide_rows_fit(capability, dim):
    for case in resources.cases(capability, dim, "bf16"):
        got = resources.resources(case, capability)
        assert got.shared <= resources.SHARED[capability], case.name


def test_logits_are_summed_alike_forward_and_backward():
    """Else p = exp(logit - lse) would be of other logits than lse, by digits that large ones cannot spare."""
    for capability, version in itertools.product(resources.CAPABILITIES, [(3, 6), (3, 7), (3, 8)]):
        for itemsize, dim in itertools.product((2, 4), resources.DIMS):
            chip = heuristics.Chip(capability, 100, version)
            tables = heuristics.forward, heuristics.backward, heuristics.backward_queue
            chunks = {min(table(chip, itemsize, dim).chunk, dim) for table in tables}
            assert len(chunks) == 1, (capability, itemsize, dim)


OLDER, NEWER = ("3.5.1", "3.6.0", "3.7.1"), ("3.8.0+git1", "3.9.0", "4.0")


# The tiles with which some versions of Triton would spill, and what these have instead.
@pytest.mark.parametrize(
    ("table", "capability", "itemsize", "dim", "tiles", "others", "versions"),
    [
        ("forward", 100, 2, 64, (128, 128, 8, 3), (128, 128, 8, 3), NEWER),
        ("forward", 100, 2, 96, (128, 128, 8, 3), (128, 64, 8, 3), NEWER),
        ("forward", 103, 2, 256, (128, 64, 8, 3), (64, 64, 8, 3), NEWER),
        ("forward", 90, 2, 128, (128, 128, 8, 3), (128, 128, 8, 3), NEWER),
        ("forward", 100, 4, 128, (32, 32, 8, 2), (32, 32, 8, 2), NEWER),
        ("backward", AMD, 2, 256, (32, 32, 8, 1), (32, 16, 8, 1), NEWER),
        ("backward_queue", AMD, 2, 256, (16, 16, 8, 1), (16, 16, 8, 1), NEWER),
        ("backward", 80, 4, 128, (16, 32, 8, 2), (16, 32, 8, 1), ("3.6.0",)),
        ("backward", 80, 2, 128, (64, 64, 8, 2), (64, 64, 8, 2), ("3.6.0",)),
    ],
)
def test_tiles_are_of_a_version_of_triton(table, capability, itemsize, dim, tiles, others, versions):
    for version in OLDER + NEWER:
        chip = heuristics.Chip(capability, 100, heuristics.version(version))
        wanted = others if version in versions else tiles
        assert getattr(heuristics, table)(chip, itemsize, dim)[:4] == wanted, version


@pytest.mark.parametrize("rows", [64, 512, 2048, 8192])
@pytest.mark.parametrize("dim", [128, 512, 1024])
def test_means_of_splits_take_little_memory(rows, dim):
    for capability in resources.CAPABILITIES:
        chip = heuristics.Chip(capability, 132)
        splits, _ = heuristics.splits(rows, 1_048_576, dim, heuristics.forward(chip, 2, dim), chip)
        assert splits == 1 or splits * rows * dim * 4 <= 32 << 20


# ------------------------------------------------------------------------------------ who is refused


def test_auto_leaves_cpu_tensors_to_others():
    assert backends.choose("auto", "cpu", torch.float16, 128) == "chunked"


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "reason"),
    [
        ("cpu", torch.float32, 128, "TRITON_INTERPRET=1"),
        ("mps", torch.float32, 128, "not on mps"),
        ("cuda", torch.float64, 128, "not float64"),
        ("cuda", torch.bfloat16, 1025, "at most 1024, not 1025"),
        ("cuda", torch.bfloat16, 128, "compute capability 8.0, not 7.5"),
    ],
)
def test_reasons(device, dtype, dim, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=f"backend 'triton' cannot run this: .*{reason}"):
        backends.choose("triton", device, dtype, dim)


def test_taken_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backends.choose("auto", "cuda", dtype, 128) == "triton"
    assert backends.choose("auto", "cuda", torch.float64, 128) == "chunked"


def test_a_named_backend_does_not_fall_through():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="backend 'triton' cannot run this: it runs on GPUs"):
        relation_loss(x, x, x, backend="triton")


def test_not_installed(monkeypatch):
    monkeypatch.setattr(backends.MODULES["triton"], "_installed", False)
    with pytest.raises(ValueError, match=r"pip install 'relssl\[triton\]'"):
        backends.choose("triton", "cuda", torch.float32, 128)
    assert backends.choose("auto", "cuda", torch.float32, 128) == "chunked"


# ---------------------------------------------------------------------------------------------- launches

# With a driver that does nothing (bench/launch.py): the first launch is Triton's own, the second ours.
LAUNCH_TWICE = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, triton
from launch import Chip, Idle, kernels, launches

triton.runtime.driver.set_active(Idle())
kernels._chip = lambda index: Chip(90, 132)
q, k, queue = (torch.randn(n, 128).bfloat16() for n in (64, 64, 4096))
shifted = torch.randn(4096 * 128 + 1).bfloat16()[1:].view(4096, 128)  # no address for the copy engine
scale = torch.tensor([10.0, 25.0])
for arguments in (q, k, queue), (q, k, shifted), (q.view(2, 32, 128), k[:32], queue):
    for c in ([10.0, 25.0], scale):
        for weight, want in (0.1, True), (None, False):
            for run in (
                lambda: kernels.relation(*arguments, c, "kl", weight, want),
                lambda: kernels.info_nce(*arguments, c[:1], weight, want),
                lambda: kernels.rows(arguments[1], arguments[2], c, 20, None, want),
            ):
                launches.clear()
                run()
                half = len(launches)
                run()
                assert len(launches) == 2 * half and half in (2, 3), (half, len(launches))
                for own, ours in zip(launches[:half], launches[half:]):
                    assert len(own) == len(ours)
                    for a, b in zip(own, ours):
                        if isinstance(a, torch.Tensor):
                            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
                        elif type(a).__name__ != "LazyDict":  # for profilers, made anew
                            assert a == b, (a, b)
print("alike")
"""


def test_remembered_launches_are_those_of_triton(tmp_path):
    bench = Path(__file__).parent.parent / "bench"
    command = [sys.executable, "-W", "ignore", "-c", LAUNCH_TWICE, bench]
    # From an empty folder, so that the source tree cannot stand in for the package.
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "alike\n", run.stderr


class Loaded:
    """In place of a kernel: what is compiled of it is loaded on the device that is current then."""

    arg_names = ()

    def __init__(self, launched, current):
        self.launched, self.current = launched, current

    def __getitem__(self, grid):
        own = self.current[-1]

        def launch(*arguments, **options):
            self.launched.append((own, self.current[-1], _allocator.get()))
            return self

        return launch


@pytest.fixture
def launched(monkeypatch):
    """Of each launch the device that its function was loaded on, the current one, and Triton's allocator."""
    triton, launches, current = backends.MODULES["triton"], [], [0]

    @contextmanager
    def on(x):
        current.append(x.device.index)
        yield
        current.pop()

    monkeypatch.setattr(triton, "on", on)
    monkeypatch.setattr(triton, "_chip", lambda index: heuristics.Chip(90, 132))
    monkeypatch.setattr(triton, "_plans", {})
    for name in ("lookup", "combine_rows", "combine_relation", "combine_info_nce"):
        monkeypatch.setattr(triton._kernels(), name, Loaded(launches, current))
    return launches


def on_device(index, *tensors):
    """Tensors of the CPU that pass for a GPU's, as what is made of them does."""
    device = property(lambda self: torch.device("cuda", index))
    kind = type("OnDevice", (torch.Tensor,), {"device": device, "get_device": lambda self: index})
    return [t.as_subclass(kind) for t in tensors]


@pytest.mark.parametrize("scale", [[10.0, 25.0], torch.tensor([10.0, 25.0])], ids=["numbers", "device"])
@pytest.mark.parametrize("want", [True, False])
def test_each_device_launches_its_own_functions(launched, scale, want):
    triton = backends.MODULES["triton"]
    for run in (
        lambda q, k, queue, scale: triton.relation(q, k, queue, scale, "kl", 0.1, want),
        lambda q, k, queue, scale: triton.info_nce(q, k, queue, scale[:1], 0.1, want),
        lambda q, k, queue, scale: triton.rows(k, queue, scale, 5, None, want),
    ):
        launched.clear()
        for index in (0, 1, 0, 1):
            inputs = (torch.randn(n, 64).bfloat16() for n in (8, 8, 100))
            own = on_device(index, scale)[0] if isinstance(scale, torch.Tensor) else scale
            run(*on_device(index, *inputs), own)
        half = len(launched) // 2
        assert [device for device, _, _ in launched] == [current for _, current, _ in launched]
        assert [device for device, _, _ in launched[:half]] == [0] * (half // 2) + [1] * (half // 2)


def test_the_callers_allocator_is_left_alone(launched):
    """Triton's, for memory that kernels ask for: a context variable, so that each thread has its own."""
    triton, queue = backends.MODULES["triton"], torch.randn(100, 64).bfloat16()

    def allocators():
        before = _allocator.get()
        triton.rows(*on_device(0, queue, queue), [10.0, 25.0], 100, None, True)
        return before, launched[-2][2], _allocator.get()

    def callers(size, alignment, stream):
        raise AssertionError

    nobodys = Context().run(_allocator.get)
    assert Context().run(allocators) == (nobodys, triton._scratch, triton._scratch)
    context = Context()
    context.run(set_allocator, callers)
    assert context.run(allocators) == (callers, callers, callers)


# ------------------------------------------------------------------------------------------ autotuning


def test_autotuning_keeps_the_fastest(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path))
    times = {Tiles(64, 64, 4, 2): 2.0, Tiles(128, 64, 8, 3): 1.0, Tiles(128, 128, 8, 3): None}
    asked = []

    def measure(tiles):
        asked.append(tiles)
        if times[tiles] is None:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return times[tiles]

    best = Tiles(128, 64, 8, 3)
    assert autotune.choose("here", times, measure) == best
    assert asked == list(times)
    assert str(best) in capsys.readouterr().out
    assert autotune.choose("here", times, measure) == best  # from the disk, in silence
    assert asked == list(times)
    assert not capsys.readouterr().out
    autotune._known.clear()  # as in another process
    assert autotune.choose("here", times, measure) == best
    assert autotune.choose("there", [Tiles(64, 64, 4, 2)], measure) == Tiles(64, 64, 4, 2)
    assert autotune.choose("here", [], measure) == best
    assert os.listdir(tmp_path) == ["tiles.json"]


def test_autotuning_survives_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path))
    (tmp_path / "tiles.json").write_text('{"here": [64, 6')
    tiles = Tiles(64, 64, 4, 2)
    assert autotune.choose("here", [tiles], lambda tiles: 1.0) == tiles
    assert json.loads((tmp_path / "tiles.json").read_text()) == {"here": list(tiles)}


def test_autotuning_that_finds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path))

    def measure(tiles):
        raise OutOfResources(300_000, 101_376, "shared memory")

    with pytest.raises(RuntimeError, match="no tiles that were tried for here fit"):
        autotune.choose("here", [Tiles(128, 128, 8, 3)], measure)


def test_autotuning_passes_over_what_does_not_compile(tmp_path, launched, monkeypatch):
    """Of the candidates half do not; another error, after which no launch can be trusted, ends it."""
    triton, queue = backends.MODULES["triton"], torch.randn(4096, 64).bfloat16()
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path))
    monkeypatch.setenv("RELSSL_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(triton._kernels(), "do_bench", lambda run: run() and 1.0)
    tried, errors = [], {8: RuntimeError("PassManager::run failed")}

    class Kernel(Loaded):
        def __getitem__(self, grid):
            def launch(*arguments, num_warps, **options):
                tried.append(num_warps)
                if num_warps in errors:
                    raise errors[num_warps]
                return self

            return launch

    monkeypatch.setattr(triton._kernels(), "lookup", Kernel(None, None))
    (x,) = on_device(0, queue)
    type(x).is_cuda = True
    triton.lookup(x, x[:0], x, (1.0, 1.0), None, True)
    (chosen,) = json.loads((tmp_path / "tiles.json").read_text()).values()
    assert set(tried[:-1]) == {4, 8} and tried[-1] == Tiles(*chosen).warps == 4
    errors[4] = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        triton.lookup(x[:9], x[:0], x, (1.0, 1.0), None, True)
    assert len(json.loads((tmp_path / "tiles.json").read_text())) == 1


def test_autotuning_is_asked_for(monkeypatch):
    monkeypatch.delenv("RELSSL_AUTOTUNE", raising=False)
    assert not autotune.wanted()
    monkeypatch.setenv("RELSSL_AUTOTUNE", "1")
    assert autotune.wanted()
