"""The prediction: simulation, occupancy, and what is read in machine code, where the answer is known."""

import re

import predict
import pytest
import sass
from checks import INTERPRETED
from predict import CHIPS, Kernel, occupancy
from simulation import simulate

APART = [("product", 300), ("wait", 0), ("work", {"xu": 200, "issue": 150})]
# The next tile's similarities are issued before this one's mean, and waited for alone.
AHEAD = [("work", {"xu": 200}), ("wait", 0), ("product", 150), ("product", 150), ("wait", 1)]


@pytest.mark.parametrize(
    ("program", "groups", "blocks", "latency", "clocks"),
    [
        (APART, 1, 1, 0, 500),  # nothing overlaps: the sum
        (APART, 1, 1, 60, 560),
        (APART, 1, 32, 0, 32 * 300),  # all overlaps: the busiest pipe
        ([*APART[:2], ("work", {"xu": 400, "issue": 150})], 1, 32, 0, 32 * 400),
        ([*APART[:2], ("work", {"xu": 200, "alone": 700})], 1, 2, 0, 1000),  # which is no pipe of both
        ([*APART, ("meet", 0)], 2, 1, 0, 2 * 500),  # both want the same at the same time
        (
            [("take", 0), *APART[:2], ("pass", 0), APART[2]],
            2,
            1,
            0,
            600,
        ),  # one's work beside the other's product
        (AHEAD, 1, 1, 0, 150 + 200),  # work beside half of the products
    ],
)
def test_simulation(program, groups, blocks, latency, clocks):
    assert simulate(program, groups, blocks, latency) == pytest.approx(clocks, rel=0.01)


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
    """As cuobjdump prints it, each instruction with its stall, or 1."""
    told = []
    for i, each in enumerate(lines):
        text, stall = (each, 1) if isinstance(each, str) else each
        told += [f"        /*{16 * i:04x}*/    {text} ;    /* 0x{i:016x} */"]
        told += [f"{' ' * 40}/* 0x{stall << 41 | 0xFC000000000000:016x} */"]
    return "\n".join(told)


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


def test_steps_are_in_the_order_of_the_code():
    program = predict.steps(kernel(loop=sass.loops(LOOP)[0]))
    assert [kind for kind, _ in program] == (
        ["work", "product", "work", "wait", "work", "product", "work", "meet", "work"]
    )
    assert [value for kind, value in program if kind in ("product", "wait")] == [64, 0, 32]


def test_barriers_of_two_consumers_are_turns():
    turns = listing(
        "MUFU.EX2 R24, R24",
        "BAR.SYNC.DEFER_BLOCKING R89, 0x100",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0",
        "BAR.ARV R17, 0x100",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "BRA 0x0",
    )
    program = predict.steps(kernel(loop=sass.loops(turns)[0]))
    assert [step for step in program if step[0] != "work"] == (
        [("take", 0), ("product", 64), ("pass", 0), ("wait", 1)]
    )
    assert predict.barrier("BAR.SYNC.DEFER_BLOCKING R41, 0x40", turns=False) == ""  # two warps


def test_mma_sync_is_waited_for():
    one = listing("HMMA.16816.F32.BF16 R4, R8, R2, RZ", "MUFU.EX2 R4, R4", "BAR.SYNC 0x0", "BRA 0x0")
    program = predict.steps(kernel(capability=80, loop=sass.loops(one)[0]))
    assert program[:2] == [("product", 8), ("wait", 0)]
    assert [kind for kind, _ in program[2:]] == ["work", "meet", "work"]


def test_tcgen05_divides_a_tile_among_its_products():
    chain = listing(
        "UTCHMMA tmem[UR9], gdesc[UR56], tmem[UR6], tmem[UR48], idesc[UR49], UPT",
        "UTCHMMA gdesc[UR60], gdesc[UR24], tmem[UR8], tmem[UR62], idesc[UR63], !UPT",
        "UTCBAR [UR69], URZ",
        "LDTM.x64 R4, tmem[UR7+0x80]",
        "MUFU.EX2 R4, R4",
        "BRA 0x0",
    )
    made = predict.with_loop(kernel(capability=100, dim=128, block_m=128), chain)
    assert predict.steps(made)[1] == ("product", 4 * 128**3 / 8192)
    assert [kind for kind, _ in predict.steps(made)] == ["work", "product", "work", "wait", "work"]
    half = predict.with_loop(kernel(capability=100, dim=128), chain)
    assert predict.steps(half)[1] == ("product", 4 * 128**3 / 8192)  # of half the rows


def test_a_rate_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="the rate of HGMMA on sm_100 is not known"):
        predict.predict(kernel(capability=100, loop=sass.loops(LOOP)[0]))


def test_docs_have_a_row_for_each_chip_and_width():
    for name, page in predict.DOCS.items():
        table = page.read_text().split(predict.START)[1].split(predict.END)[0]
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
