"""Tests Triton's kernels without running them: compiled code, unsupported inputs, and launches."""

import itertools
import re
import subprocess
import sys
from contextlib import contextmanager
from contextvars import Context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_resources as resources
from checks import INTERPRETED
from relssl.kernels import heuristics, specialised
from relssl.kernels.heuristics import AMD, Tiles
from triton import set_allocator
from triton.runtime._allocation import _allocator

from relssl import backends
from relssl.backends import launching
from relssl.functional import relation_loss

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")

WIDTHS = 64, 128, 256, 512
# Every kernel of the default tables, and the candidate, on every chip; float32 on two. make test has only
# bfloat16's of D = 128, on three. docs/kernels.md has all.
CASES = [
    pytest.param(
        capability,
        case,
        id=f"{resources.chip_name(capability)}-{case.name}-{case.dtype}-{case.dim}",
        marks=[pytest.mark.slow] * ((dtype, dim) != ("bf16", 128) or capability not in (80, 90, 100)),
    )
    for capability in resources.CAPABILITIES
    for dtype, dims in (("bf16", WIDTHS), ("fp16", WIDTHS), ("fp32", (128, 512)))
    if dtype == "bf16" or (capability != AMD if dtype == "fp16" else capability in (80, 90))
    for dim in dims
    for case in resources.cases(capability, dim, dtype)
    if not case.name.startswith("combine") or (capability in (80, 89, 90) and dtype == "bf16")
    if case.name != "enqueue" or (dtype == "bf16" and dim == 128)
]


@pytest.mark.parametrize(("capability", "case"), CASES)
def test_compiled(capability, case):
    got = resources.resources(case, capability)
    assert got.spilled == 0
    assert got.shared <= heuristics.SHARED[heuristics.family(capability)]
    assert got.columns <= heuristics.TENSOR_COLUMNS
    assert "F2F.BF16" not in got.sass  # one by one, and in the unit that the exponentials need
    if (
        case.name in ("forward", "backward_x") and case.dtype != "fp32"
    ):  # whose tiles go straight to registers
        products = {90: "wgmma", 100: "tcgen05.mma", AMD: "mfma"}
        if case.name == "backward_x" and case.dim == 512:  # whose sums fill the registers otherwise
            products = {100: "tcgen05.mma"} if case.dtype == "bf16" else {}
        products[AMD] = "mfma"
        assert got.tensor == products.get(capability, "mma.sync")
        assert got.tma if case.tiles.tma else got.copies > 0 or capability == AMD
        assert got.narrow == 0
    if case.name == "specialised":
        assert (got.warps, got.registers, got.tma) == (12, 168, True)
        assert got.tensor == {90: "wgmma", 100: "tcgen05.mma"}[capability]


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 100, 120, AMD))]
)
def test_kernels_that_compare_ids_do_not_spill(capability):
    for case in resources.cases(capability, 128, "bf16"):
        if case.name in ("forward", "backward_x", "backward_queue"):
            flags = {"EXCLUDE": 2, "FILLED": True, "EVEN": False}
            tiles = heuristics.with_ids(case.tiles)
            got = resources.resources(
                case._replace(constants=case.constants | flags, tiles=tiles), capability
            )
            assert got.spilled == 0, case.name


def order(loop):
    """Returns a loop's products, waits and exponentials in their order, as (name, count)."""
    names = (re.match(r"(?:@\S+ )?(HGMMA|WARPGROUP\.DEPBAR\S* .*, \S+|MUFU\.EX2)", step) for step in loop)
    found = (re.sub(r".*DEPBAR.*, (\S+)", r"DEPBAR \1", name[1]) for name in names if name)
    return [(name, len(list(group))) for name, group in itertools.groupby(found)]


# Triton waits for the similarities (DEPBAR 0x0) before the exponentials. The default kernel's groups of warps
# synchronise at barriers in each tile; the candidate's two have a loop each, and take turns.
PRODUCTS = ("HGMMA", 8)
SERIAL = [PRODUCTS, ("DEPBAR 0x0", 1), ("MUFU.EX2", 64), PRODUCTS]


@pytest.mark.parametrize(
    ("name", "loops"), [("forward", [SERIAL]), ("specialised", [[*SERIAL, ("DEPBAR 0x0", 1)]] * 2)]
)
def test_order_of_hoppers_instructions(name, loops):
    """The order is that of the tested versions of Triton; another one may be faster or slower."""
    (case,) = (case for case in resources.cases(90, 128, "bf16") if case.name == name)
    orders = [order(loop) for loop in resources.loops(resources.resources(case, 90).sass)]
    fixed = [found for found in orders if sum(name == "MUFU.EX2" for name, _ in found) == 1]
    assert [found for found in fixed if dict(found)["MUFU.EX2"] == 64 and len(found) < 6][
        : len(loops)
    ] == loops


def test_loops_are_read_off_a_program():
    sass = """
        /*0000*/  MOV R1, R2 ;          /* 0x0000000000000000 */
                                        /* 0x0000000000000000 */
        /*0010*/  @P0 BRA 0x0040 ;      /* 0x0000000000000000 */
        /*0020*/  MUFU.EX2 R1, R1 ;     /* 0x0000000000000000 */
        /*0030*/  @!P1 BRA 0x20 ;       /* 0x0000000000000000 */
        /*0040*/  BRA 0x40;             /* 0x0000000000000000 */
    """
    assert resources.loops(sass) == [["MUFU.EX2 R1, R1", "@!P1 BRA 0x20"]]


@pytest.mark.parametrize("name", ["combine_relation", "combine_info_nce"])
def test_a_loss_is_stored_before_its_program_arrives(name):
    """The interpreter does not test the block's barriers, nor that reads bypass the L1 cache."""
    (case,) = (case for case in resources.cases(90, 64, "bf16") if case.name == name)
    ptx = resources.compiled(case, 90).asm["ptx"]
    before, after = re.split(r"atom\.global\.gpu\.acq_rel\.add\.u32", ptx)
    assert "bar.sync" in before.rsplit("st.global", 1)[1]
    assert "bar.sync" in after[: after.index("ld.global")]
    assert re.findall(r"ld\.global\S*", after) == ["ld.global.cg.b32"] * 4  # 1,024 losses of 256 threads


def test_the_pointer_is_read_before_a_program_arrives():
    """The last one to arrive moves it. The interpreter runs programs one after the other."""
    (case,) = (case for case in resources.cases(90, 128, "bf16") if case.name == "enqueue")
    ptx = resources.compiled(case, 90).asm["ptx"]
    before, after = re.split(r"atom\.global\.gpu\.acq_rel\.add\.u64", ptx)
    pointer = re.search(r"ld\.global\.b64 \S+ \S+ \S+ \[ (%rd\d+)", before)[1]
    assert "bar.sync" in before.rsplit("ld.global", 1)[1]
    assert "ld.global" not in after
    stores = re.findall(r"(bar\.sync|st\.global\S* \[ %rd\d+)", after)
    assert stores[:2] == ["bar.sync", f"st.global.b64 [ {pointer}"] and len(stores) == 3
    assert "ld.global.v4" in before and "st.global.v4" in before  # whole sectors


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 90])
def test_wide_rows_fit(capability):
    for case in resources.cases(capability, 1024, "bf16"):
        got = resources.resources(case, capability)
        assert got.shared <= heuristics.SHARED[heuristics.family(capability)], case.name


def test_logits_are_summed_alike_forward_and_backward():
    """Otherwise p = exp(logit - lse) and lse would use different logits, which matters for large ones."""
    for capability, version in itertools.product(resources.CAPABILITIES, [(3, 6), (3, 7), (3, 8)]):
        for dtype, dim in itertools.product(("bf16", "fp16", "fp32"), resources.DIMS):
            chip = heuristics.Chip(capability, 100, version)
            tables = heuristics.forward, heuristics.backward, heuristics.backward_queue
            chunks = {min(table(chip, dtype, dim).chunk, dim) for table in tables}
            assert len(chunks) == 1, (capability, dtype, dim)


OLDER, NEWER = ("3.5.1", "3.6.0", "3.7.1"), ("3.8.0+git1", "3.9.0", "4.0")


# The tiles with which some versions of Triton would spill, and what these have instead.
@pytest.mark.parametrize(
    ("table", "capability", "dtype", "dim", "tiles", "others", "versions"),
    [
        ("forward", 100, "bf16", 64, (128, 128, 8, 3), (128, 128, 8, 3), NEWER),
        ("forward", 100, "bf16", 96, (128, 128, 8, 3), (128, 64, 8, 3), NEWER),
        ("forward", 103, "bf16", 256, (128, 64, 8, 3), (64, 64, 8, 3), NEWER),
        ("forward", 90, "bf16", 128, (128, 128, 8, 3), (128, 128, 8, 3), NEWER),
        ("forward", 100, "fp32", 128, (32, 32, 8, 2), (32, 32, 8, 2), NEWER),
        ("backward", AMD, "bf16", 256, (32, 32, 8, 1), (32, 16, 8, 1), NEWER),
        ("backward_queue", AMD, "bf16", 256, (16, 16, 8, 1), (16, 16, 8, 1), NEWER),
        ("backward", 80, "fp32", 128, (16, 32, 8, 2), (16, 32, 8, 1), ("3.6.0",)),
        ("backward", 80, "bf16", 128, (64, 64, 8, 2), (64, 64, 8, 2), ("3.6.0",)),
        ("backward", 100, "bf16", 512, (64, 32, 8, 2), (32, 32, 8, 2), ("3.6.0",)),
        ("backward", 100, "fp16", 512, (32, 32, 8, 2), (32, 32, 8, 2), ("3.6.0",)),
        ("forward", 90, "fp16", 512, (64, 64, 8, 2), (64, 64, 8, 2), OLDER),
        ("backward", 90, "bf16", 128, (128, 64, 8, 2), (128, 64, 8, 2), OLDER),
        ("backward", 90, "fp16", 128, (128, 32, 8, 2), (128, 32, 8, 2), OLDER),
        ("backward_queue", 90, "bf16", 128, (64, 64, 8, 2), (64, 64, 8, 2), OLDER),
        ("backward_queue", 90, "fp16", 128, (64, 16, 8, 2), (64, 16, 8, 2), OLDER),
    ],
)
def test_tiles_are_of_a_version_of_triton(table, capability, dtype, dim, tiles, others, versions):
    for version in OLDER + NEWER:
        chip = heuristics.Chip(capability, 100, heuristics.version(version))
        wanted = others if version in versions else tiles
        assert getattr(heuristics, table)(chip, dtype, dim)[:4] == wanted, version


@pytest.mark.parametrize("rows", [64, 512, 2048, 8192])
@pytest.mark.parametrize("dim", [128, 512, 1024])
def test_means_of_splits_take_little_memory(rows, dim):
    for capability in resources.CAPABILITIES:
        chip = heuristics.Chip(capability, 132)
        splits, _ = heuristics.split_queue(rows, 1_048_576, dim, heuristics.forward(chip, "bf16", dim), chip)
        assert splits == 1 or splits * rows * dim * 4 <= 32 << 20


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "columns", "programs"),
    [
        (90, 8, 249, 132_096, 0, 1),  # half of the registers and half of the shared memory, each and a bit
        (90, 4, 166, 66_000, 0, 3),  # 168 registers x 32 a warp: three in each quarter
        (90, 4, 166, 80_000, 0, 2),  # twice 80,000 bytes
        (90, 12, 168, 196_920, 0, 1),
        (80, 8, 96, 51_456, 0, 2),
        (80, 2, 16, 0, 0, 32),  # 64 warps
        (89, 2, 16, 0, 0, 24),  # 48 warps
        (89, 8, 80, 51_456, 0, 1),  # of 100 KiB
        (100, 8, 73, 82_736, 256, 2),
        (100, 8, 73, 82_736, 512, 1),  # of tensor memory
        (90, 8, 255, 232_448, 0, 1),
        (90, 8, 0, 16, 0, 1),  # registers are unknown
        (AMD, 8, 64, 16, 0, 1),
        (heuristics.INTERPRETER, 8, 64, 16, 0, 1),
    ],
)
def test_programs_on_a_processor(capability, warps, registers, shared, columns, programs):
    chip = heuristics.Chip(capability, 132)
    assert heuristics.resident(chip, warps, registers, shared, columns) == programs


def test_combine_has_few_warps_where_float64_is_slow():
    for capability, warps in ((80, 8), (86, 2), (89, 2), (90, 8), (100, 8), (120, 2), (AMD, 8)):
        sizes, found = heuristics.combine(heuristics.Chip(capability, 132), 512, 128)
        assert (found, sizes["S"], sizes["BLOCK_D"]) == (warps, 128, 8 * warps)


# ------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "dim", "reason"),
    [
        ("64x64x4", 90, "bf16", 128, "one of '', '64x64x4x3', .* not '64x64x4'"),
        ("specialised ", 90, "bf16", 128, "not 'specialised '"),
        ("specialised128x128x4x3", 90, "bf16", 128, "not 'specialised128x128x4x3'"),
        ("Specialised", 90, "bf16", 128, "not 'Specialised'"),
        ("64x48x4x3", 90, "bf16", 128, "powers of 2 .* not '64x48x4x3'"),
        ("64x0x4x3", 90, "bf16", 128, "powers of 2"),
        ("8x64x4x3", 90, "bf16", 128, "from 16"),
        ("512x64x4x3", 90, "bf16", 128, "to 256"),
        ("64x64x32x3", 90, "bf16", 128, "to 16"),
        ("64x64x4x9", 90, "bf16", 128, "1 to 8"),
        ("128x128x8x7", 90, "bf16", 128, "takes 262,144 bytes of shared memory, and a program has 232,448"),
        ("128x128x8x4", 89, "bf16", 128, "takes 131,072 bytes of shared memory, and a program has 101,376"),
        ("specialised", 80, "bf16", 128, "Hopper"),
        ("specialised", 120, "bf16", 128, "Hopper"),
        ("specialised", AMD, "bf16", 128, "Hopper"),
        ("specialised", 90, "fp32", 128, "16-bit rows of 64 or 128, not fp32 of 128"),
        ("specialised", 90, "fp16", 256, "not fp16 of 256"),
        ("specialised", 100, "fp16", 128, "fp16"),
        ("specialised 128x64x8x3", 90, "bf16", 128, "of 4 alone, not 'specialised 128x64x8x3'"),
        ("specialised 128x128x4x7", 90, "bf16", 128, "232,448"),
    ],
)
def test_variants_refused(name, capability, dtype, dim, reason, monkeypatch):
    chip = heuristics.Chip(capability, 132)
    with pytest.raises(ValueError, match=reason):
        heuristics.variant(name, chip, dtype, dim)
    triton = backends.BACKENDS["triton"]
    monkeypatch.setattr(launching, "current_chip", lambda: chip)
    (torch_dtype,) = (known for known, name in launching.DTYPE_NAMES.items() if name == dtype)
    assert re.search(reason, triton.unsupported_variant(name, torch_dtype, dim))


def test_variants_are_of_a_version_of_triton(monkeypatch):
    triton = backends.BACKENDS["triton"]
    monkeypatch.setattr(launching, "current_chip", lambda: heuristics.Chip(90, 132))
    assert specialised.specialises
    assert triton.unsupported_variant("specialised", torch.bfloat16, 128) is None
    assert triton.variants(torch.bfloat16, 128)[0] == "specialised"
    monkeypatch.setattr(launching.kernels(), "specialises", False)
    assert "specialised warps" in triton.unsupported_variant("specialised", torch.bfloat16, 128)
    assert not any(name.startswith("specialised") for name in triton.variants(torch.bfloat16, 128))
    assert triton.unsupported_variant("64x64x4x3", torch.bfloat16, 128) is None


def test_what_a_variant_stands_for():
    hopper = heuristics.Chip(90, 132)
    default = heuristics.forward(hopper, "bf16", 128)
    assert heuristics.variant("", hopper, "bf16", 128) == default
    assert heuristics.variant("64x32x4x2", hopper, "bf16", 128) == Tiles(64, 32, 4, 2, tma=True)
    own = Tiles(128, 128, 4, 3, tma=True, specialised=True)
    assert heuristics.variant("specialised", hopper, "bf16", 128) == own
    assert heuristics.variant("specialised 128x64x4x4", hopper, "bf16", 64) == own._replace(
        block_n=64, stages=4
    )
    assert heuristics.variant("specialised", heuristics.Chip(100, 148), "bf16", 64) == own._replace(warps=8)
    wide = heuristics.variant("16x16x8x2", heuristics.Chip(89, 132), "fp32", 256)
    assert wide == Tiles(16, 16, 8, 2, chunk=64)  # as backward


@pytest.mark.parametrize("capability", resources.CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_variants_to_try(capability, dtype):
    chip = heuristics.Chip(capability, 132)
    for dim in (8, *resources.DIMS):
        names = heuristics.variants(chip, dtype, dim)
        tiles = [heuristics.variant(name, chip, dtype, dim) for name in names]
        assert len(set(tiles)) == len(names) <= 16 and (len(names) >= 3 or dim > 256)
        assert heuristics.forward(chip, dtype, dim) not in tiles
        assert (capability in (90, 100)) >= any(t.specialised for t in tiles)


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
    monkeypatch.setattr(backends.triton, "_installed", False)
    with pytest.raises(ValueError, match=r"pip install 'relssl\[triton\]'"):
        backends.choose("triton", "cuda", torch.float32, 128)
    assert backends.choose("auto", "cuda", torch.float32, 128) == "chunked"


# ---------------------------------------------------------------------------------------------- launches

# With a driver that does nothing (tools/launch.py): the first launch is Triton's own, the second ours.
LAUNCH_TWICE = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, triton
from launch import Chip, Idle, backend, launches, launching

triton.runtime.driver.set_active(Idle())
launching.chip = lambda index: Chip(90, 132)
q, k, queue = (torch.randn(n, 128).bfloat16() for n in (64, 64, 4096))
shifted = torch.randn(4096 * 128 + 1).bfloat16()[1:].view(4096, 128)  # an address that TMA cannot use
c = torch.tensor([10.0, 25.0]) if sys.argv[2] == "device" else [10.0, 25.0]
for arguments in (q, k, queue), (q, k, shifted), (q.view(2, 32, 128), k[:32], queue):
    for weight, want in (0.1, True), (None, False):
        for run in (
            lambda: backend.relation(*arguments, c, "kl", weight, want),
            lambda: backend.info_nce(*arguments, c[:1], weight, want),
            lambda: backend.lse_and_mean(arguments[1], arguments[2], c, 20, None, want),
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

for dtype, variant, expected in (
    (torch.bfloat16, "", 1),
    (torch.bfloat16, "64x64x4x3", 1),
    (torch.bfloat16, "specialised", 2),  # and what is to be done again
    (torch.float16, "specialised", 1),
):
    own = [t.to(dtype) for t in (q, k, queue)]
    for _ in range(2):
        launches.clear()
        backend.variant(variant).forward(*own, (1.0, 1.0), None, True)
        assert len(launches) == expected, (dtype, variant, len(launches))
print("alike")
"""


@pytest.mark.parametrize("scales", ["numbers", pytest.param("device", marks=pytest.mark.slow)])
def test_cached_launches_are_those_of_triton(tmp_path, scales):
    tools = Path(__file__).parent.parent / "tools"
    command = [sys.executable, "-W", "ignore", "-c", LAUNCH_TWICE, tools, scales]
    # From an empty folder, so that the source tree cannot stand in for the package.
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "alike\n", run.stderr


class Loaded:
    """Stands for a kernel, whose compiled function is loaded on the device that is current then."""

    arg_names = ()

    def __init__(self, launched, current):
        self.launched, self.current = launched, current

    run, n_regs, metadata = None, 0, SimpleNamespace(num_warps=4, shared=0)  # as compiled

    def warmup(self, *arguments, **options):
        return self

    def __getitem__(self, grid):
        own = self.current[-1]

        def launch(*arguments, **options):
            self.launched.append((own, self.current[-1], _allocator.get()))
            return self

        return launch


@pytest.fixture
def launched(monkeypatch):
    """Lists for each launch its function's device, the current device, and Triton's allocator."""
    launches, current = [], [0]

    @contextmanager
    def device_guard(x):
        current.append(x.device.index)
        yield
        current.pop()

    monkeypatch.setattr(launching, "device_guard", device_guard)
    monkeypatch.setattr(launching, "chip", lambda index: heuristics.Chip(90, 132))
    monkeypatch.setattr(launching, "_cache", {})
    for name in ("forward", "combine_lse_and_mean", "combine_relation", "combine_info_nce"):
        monkeypatch.setattr(launching.kernels(), name, Loaded(launches, current))
    return launches


def on_device(index, *tensors):
    """Returns CPU tensors with the device of a GPU, which tensors made from them inherit."""
    device = property(lambda self: torch.device("cuda", index))
    cls = type("OnDevice", (torch.Tensor,), {"device": device, "get_device": lambda self: index})
    return [t.as_subclass(cls) for t in tensors]


@pytest.mark.parametrize("scale", [[10.0, 25.0], torch.tensor([10.0, 25.0])], ids=["numbers", "device"])
@pytest.mark.parametrize("want", [True, False])
def test_each_device_launches_its_own_functions(launched, scale, want):
    triton = backends.BACKENDS["triton"]
    for run in (
        lambda q, k, queue, scale: triton.relation(q, k, queue, scale, "kl", 0.1, want),
        lambda q, k, queue, scale: triton.info_nce(q, k, queue, scale[:1], 0.1, want),
        lambda q, k, queue, scale: triton.lse_and_mean(k, queue, scale, 5, None, want),
    ):
        launched.clear()
        for index in (0, 1, 0, 1):
            inputs = (torch.randn(n, 64).bfloat16() for n in (8, 8, 100))
            own = on_device(index, scale)[0] if isinstance(scale, torch.Tensor) else scale
            run(*on_device(index, *inputs), own)
        half = len(launched) // 2
        assert [device for device, _, _ in launched] == [current for _, current, _ in launched]
        assert [device for device, _, _ in launched[:half]] == [0] * (half // 2) + [1] * (half // 2)


def test_splits_are_for_all_that_a_processor_runs(launched, monkeypatch):
    """Two programs fit in 65,536 registers and 232,448 bytes, or one."""
    triton, (x,) = backends.BACKENDS["triton"], on_device(0, torch.zeros(65_536, 64).bfloat16())

    def splits(registers, shared):
        monkeypatch.setattr(Loaded, "n_regs", registers)
        monkeypatch.setattr(Loaded, "metadata", SimpleNamespace(num_warps=8, shared=shared))
        launching._cache.clear()
        return triton.forward(x[:128], x[:0], x, (1.0, 1.0), None, True)[3]

    assert [splits(0, 0), splits(128, 100_000), splits(136, 100_000), splits(128, 120_000)] == [
        128,
        256,
        128,
        128,
    ]


def test_the_callers_allocator_is_left_alone(launched):
    """Triton's allocator for kernels is a context variable, so each thread has its own."""
    triton, queue = backends.BACKENDS["triton"], torch.randn(100, 64).bfloat16()

    def allocators():
        before = _allocator.get()
        triton.lse_and_mean(*on_device(0, queue, queue), [10.0, 25.0], 100, None, True)
        return before, launched[-2][2], _allocator.get()

    def callers(size, alignment, stream):
        raise AssertionError

    nobodys = Context().run(_allocator.get)
    assert Context().run(allocators) == (nobodys, launching._scratch, launching._scratch)
    context = Context()
    context.run(set_allocator, callers)
    assert context.run(allocators) == (callers, callers, callers)
