"""Tests the prediction where its result is known: simulation, occupancy, and parsed machine code."""

import re

import figures
import predict
import pytest
import sass
import simulation
from checks import INTERPRETED
from predict import CHIPS, Kernel, occupancy
from simulation import simulate

TILE = [{"tensor": 300}, {"xu": 200, "issue": 150}]


@pytest.mark.parametrize(
    ("program", "groups", "blocks", "clocks"),
    [
        (TILE, 1, 1, 500),  # nothing overlaps: the sum
        (TILE, 1, 16, pytest.approx(16 * 300, rel=0.05)),  # all overlaps: the busiest pipe
        ([{"tensor": 300}, {"xu": 400}], 1, 16, pytest.approx(16 * 400, rel=0.05)),
        ([{"alone": 700}], 1, 2, pytest.approx(700)),  # which they do not share
        ([*TILE, "barrier"], 2, 1, 2 * 500),  # both need the same pipe at the same time
        (["take", TILE[0], "pass", TILE[1]], 2, 1, 600),  # one's work beside the other's product
        (["take", *TILE, "pass"], 2, 1, 2 * 500),
    ],
)
def test_simulation(program, groups, blocks, clocks, monkeypatch):
    monkeypatch.setattr(simulation, "DRAWS", 2)
    assert simulate(program, groups, blocks) == clocks


def test_two_blocks_hide_a_part_of_each_other():
    assert 1.1 * 2 * 300 < simulate(TILE, 1, 2) < 0.9 * 2 * 500


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "columns", "blocks"),
    [
        (90, 255, 0, 8, 0, 1),  # 256 a thread as they are allotted: all registers
        (90, 128, 0, 8, 0, 2),
        (90, 129, 0, 8, 0, 1),  # 136: 56 threads of a quarter's 120 are left
        (90, 168, 163_904, 12, 0, 1),
        (80, 32, 0, 8, 0, 8),  # 2,048 threads
        (80, 16, 0, 1, 0, 32),
        (80, 32, 81 * 1024, 4, 0, 2),  # 164 KB
        (80, 32, 81 * 1024 + 1, 4, 0, 1),
        (90, 32, 227 * 1024, 4, 0, 1),  # the most that a block may have
        (100, 32, 0, 4, 256, 2),
    ],
)
def test_occupancy(capability, registers, shared, warps, columns, blocks):
    assert occupancy(CHIPS[capability], registers, shared, warps, columns) == blocks


def listing(*lines: str | tuple[str, int]) -> str:
    """Returns instructions as cuobjdump prints them, each with its stall, 1 by default."""
    printed = []
    for i, each in enumerate(lines):
        text, stall = (each, 1) if isinstance(each, str) else each
        printed += [f"        /*{16 * i:04x}*/    {text} ;    /* 0x{i:016x} */"]
        printed += [f"{' ' * 40}/* 0x{stall << 41 | 0xFC000000000000:016x} */"]
    return "\n".join(printed)


LOOP = listing(
    "MOV R1, c[0x0][0x28]",  # 00
    "UIADD3 UR14, UR14, 0x1, URZ",  # 10: the loop begins
    "@P4 BRA 0x50",  # 20
    ("FSEL R24, R24, -INF , !P0", 9),  # 30: a mask
    "LDG.E R3, desc[UR4][R2.64]",  # 40
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0",  # 50
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 2),  # 60
    "@!P1 BRA 0xb0",  # 70
    ("FMUL R24, R24, R4", 4),  # 80
    ("MUFU.EX2 R24, R24", 8),  # 90
    "F2FP.BF16.F32.PACK_AB R152, R25, R24",  # a0
    "@!P0 HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88, gsb0",  # b0
    "LDS.128 R4, [R2]",  # c0
    "BAR.SYNC.DEFER_BLOCKING 0x0",  # d0
    "@!P4 BRA 0x10",  # e0: and ends
    "@!P4 BRA 0x0",  # f0: which is not the innermost
    "BRA 0x100",  # 100
)


def kernel(**changed) -> Kernel:
    shape = {"dim": 16, "block_m": 64, "block_n": 128, "warps": 4, "others": 0}
    used = {"registers": 128, "shared": 0, "columns": 0}
    return Kernel(**{"capability": 90, "name": "made up", **shape, **used, "loop": [], **changed})


def test_the_main_loop_is_found_without_its_masks():
    loop = sass.loops(LOOP)[0]
    assert [each.name for each in loop] == (
        ["UIADD3", "BRA", "HGMMA", "WARPGROUP", "BRA", "FMUL", "MUFU", "F2FP", "HGMMA", "LDS", "BAR", "BRA"]
    )
    assert [each.stall for each in loop] == [1, 1, 1, 2, 1, 4, 8, 1, 1, 1, 1, 1]
    assert len(sass.loops(LOOP)) == 2


def test_a_loop_that_multiplies_less_than_a_tile_is_refused():
    assert len(predict.with_loop(kernel(dim=12), LOOP).loop) == 12
    with pytest.raises(
        ValueError, match="made up for sm_90 has no loop that multiplies a tile of 1048576 flop"
    ):
        predict.with_loop(kernel(dim=32), LOOP)


def test_clocks_of_each_pipe():
    made = kernel(loop=sass.loops(LOOP)[0])
    first, second = (each for each in made.loop if each.multiplies)
    assert predict.product(first, made) == (2 * 64 * 128 * 16, 2 * 16 * (64 + 128))
    assert predict.product(second, made) == (2 * 64 * 64 * 16, 2 * 16 * 64)  # the first operand in registers
    assert (predict.clocks(first, made), predict.clocks(second, made)) == (64, 32)
    shared = (2 * 16 * (64 + 128) + 2 * 16 * 64 + 4 * 512) / 128
    pipes = {"xu": 8, "alu": 2, "fma": 1, "issue": 12, "shared": shared, "alone": 23}
    assert predict.work(made.loop, made) == pipes
    assert predict.work(made.loop, made._replace(capability=80)) == pipes | {"fma": 2}
    narrow = sass.Instruction("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT", 1)
    assert predict.clocks(narrow, made) == 24  # operands: 3 KB at 128 bytes a clock, instead of 16


def outline(made: Kernel) -> list:
    """Returns a kernel's steps, without details of those that are work."""
    rest = {"alone": predict.LATENCY}
    found = [step for step in predict.steps(made) if step != rest]
    return ["work" if isinstance(step, dict) and "tensor" not in step else step for step in found]


def test_steps_are_in_the_order_of_the_code():
    made = kernel(loop=sass.loops(LOOP)[0])
    assert outline(made) == ["work", {"tensor": 64}, "work", {"tensor": 32}, "work", "barrier", "work"]
    worked = [step["alone"] for step in predict.steps(made) if isinstance(step, dict) and "xu" in step]
    assert worked == [2, 16, 2, 1]  # by the stalls of all but the products


def test_barriers_of_two_consumers_are_turns():
    turns = listing(
        "MUFU.EX2 R24, R24",
        "BAR.SYNC.DEFER_BLOCKING R89, 0x100",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0",
        "BAR.ARV R17, 0x100",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "BRA 0x0",
    )
    made = kernel(loop=sass.loops(turns)[0])
    assert outline(made) == ["work", "take", "work", {"tensor": 64}, "work", "pass", "work"]
    assert predict.barrier("BAR.SYNC.DEFER_BLOCKING R41, 0x40", turns=False) == ""  # two warps


def test_other_products_come_first():
    one = listing("HMMA.16816.F32.BF16 R4, R8, R2, RZ", "MUFU.EX2 R4, R4", "BAR.SYNC 0x0", "BRA 0x0")
    made = kernel(capability=80, loop=sass.loops(one)[0])
    assert outline(made) == [{"tensor": 8}, "work", "barrier", "work"]


def test_tcgen05_divides_a_tile_among_its_products():
    chain = listing(
        "UTCHMMA tmem[UR9], gdesc[UR56], tmem[UR6], tmem[UR48], idesc[UR49], UPT",
        "UTCHMMA gdesc[UR60], gdesc[UR24], tmem[UR8], tmem[UR62], idesc[UR63], !UPT",
        "MUFU.EX2 R4, R4",
        "BRA 0x0",
    )
    made = predict.with_loop(kernel(capability=100, dim=128, block_m=128), chain)
    assert outline(made) == [{"tensor": 4 * 128**3 / 8192}, "work"]
    half = predict.with_loop(kernel(capability=100, dim=128), chain)
    assert outline(half) == [{"tensor": 4 * 128**3 / 8192}, "work"]  # of half the rows


def test_a_rate_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="the rate of HGMMA on sm_100 is not known"):
        predict.predict(kernel(capability=100, loop=sass.loops(LOOP)[0]))


def test_docs_have_a_row_for_each_chip_and_width():
    for name in ("triton", "cuda"):
        table = figures.report(f"{name}-predictions", figures.ROOT / "docs")
        rows = re.findall(r"\| (sm_\d+) \| \w+ \| (\d+) \|.* \| (\d+)(?: to (\d+))? % \| - \|", table)
        chips = [
            f"sm_{capability}" for capability in predict.CAPABILITIES if name == "triton" or capability < 100
        ]
        assert {(chip, int(dim)) for chip, dim, *_ in rows} == {(c, d) for c in chips for d in predict.DIMS}
        assert all(0 < int(worst) <= int(best or worst) <= 100 for *_, worst, best in rows)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_a_compiled_kernel():
    found = predict.triton_kernel(90, 128, "bf16")
    flop = found.groups * sum(predict.product(each, found)[0] for each in found.loop)
    assert flop == 4 * found.block_m * found.block_n * 128
    exponentials = sum(each.text.startswith("MUFU.EX2") for each in found.loop)
    assert exponentials == found.block_m * found.block_n // 32 // found.warps
    prediction = predict.predict(found)
    assert 0.4 < prediction.worst <= prediction.best <= 1
