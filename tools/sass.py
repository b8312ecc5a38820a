"""Parses what cuobjdump -sass prints: instructions, and the loops with products and exponentials."""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    text: str
    stall: int  # clocks before the warp's next instruction, set by the compiler

    @property
    def name(self) -> str:
        """The opcode: HGMMA, for example, of "@!P0 HGMMA.64x128x16.F32.BF16 R24, ..."."""
        return re.sub(r"^@\S+\s+", "", self.text).split()[0].split(".")[0]

    @property
    def multiplies(self) -> bool:
        return "MMA" in self.name


def instructions(listing: str) -> dict[int, Instruction]:
    """Returns a kernel's instructions by address.

    The stall is in bits 105 to 108 of an instruction (Jia et al. 2018, arXiv:1804.06826).
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;[^\n]*\n\s*/\* 0x([0-9a-f]{16})", listing)
    return {int(at, 16): Instruction(text, int(code, 16) >> 41 & 15) for at, text, code in lines}


def loops(listing: str) -> list[list[Instruction]]:
    """Returns the instructions of each loop with products and exponentials, the shortest first.

    Blocks that a branch skips and that neither compute, copy nor wait are left out: they mask tails and
    excluded rows.
    """
    listed = instructions(listing)
    code, index = list(listed.values()), {at: i for i, at in enumerate(listed)}
    targets = [
        (i, re.search(r"0x([0-9a-f]+)$", each.text)) for i, each in enumerate(code) if each.name == "BRA"
    ]
    jumps = [(i, index[int(to[1], 16)]) for i, to in targets if to]

    def has(pattern: str, begin: int, end: int) -> bool:
        return any(re.search(pattern, each.text) for each in code[begin:end])

    found = []
    for last, begin in sorted(jumps, key=lambda jump: jump[0] - jump[1]):
        if begin <= last and has("MMA", begin, last) and has(r"MUFU\.EX2", begin, last):
            rare: set[int] = set()
            for i, to in jumps:
                if begin <= i < to <= last and not has("MMA|MUFU|LDGSTS|UTMALDG|BAR|SYNCS", i + 1, to):
                    rare.update(range(i + 1, to))
            found.append([code[i] for i in range(begin, last + 1) if i not in rare])
    return found
