"""Simulates the warps of a multiprocessor in their loops, to find how far they hide one another's waits.

Four warps, one on each quarter of the multiprocessor, form a group, on all chips. A group executes steps:

    {pipe: clocks}    work on all pipes at the same time; each group has a pipe "alone" of its own
    "barrier"         a barrier of the block's groups
    "take", "pass"    wait for the turn, which the block's groups pass round, and pass it on

Groups on the same pipe at the same time share it evenly. The groups of a block begin together, the blocks at
random times. With even sharing they keep their distance, so the result is the mean of several draws.
"""

import random
from collections import Counter
from statistics import fmean

Work = dict[str, float]
Step = Work | str

ROUNDS = 32  # tiles of each group, of which the second half is timed
DRAWS = 16  # of the times at which blocks begin
DONE = 1e-6  # clocks that rounding may leave


class Group:
    def __init__(self, begin: float) -> None:
        self.at = self.tiles = self.arrivals = 0
        self.arrived = False
        self.work: Work = {"alone": begin}


class Block:
    def __init__(self, groups: int, begin: float) -> None:
        self.groups = [Group(begin) for _ in range(groups)]
        self.turn = 0

    def advance(self, i: int, program: list[Step]) -> bool:
        """Moves group i to its next step, and returns whether it could."""
        group = self.groups[i]
        step = program[group.at]
        if step == "barrier" and not group.work and not group.arrived:
            group.arrivals, group.arrived = group.arrivals + 1, True
        if (
            group.work
            or (step == "take" and self.turn != i)
            or (step == "barrier" and any(other.arrivals < group.arrivals for other in self.groups))
        ):
            return False
        if isinstance(step, dict):
            group.work = {pipe: clocks for pipe, clocks in step.items() if clocks}
        elif step == "pass":
            self.turn = (i + 1) % len(self.groups)
        group.arrived = False
        group.at = (group.at + 1) % len(program)
        group.tiles += group.at == 0
        return True


def simulate(program: list[Step], groups: int, blocks: int = 1) -> float:
    """Returns the clocks in which each group of each block executes its steps once."""
    tile = sum(max(step.values()) for step in program if isinstance(step, dict))
    drawn, draws = random.Random(0), DRAWS if blocks > 1 else 1
    return fmean(
        run(program, [Block(groups, drawn.uniform(0, tile)) for _ in range(blocks)]) for _ in range(draws)
    )


def run(program: list[Step], resident: list[Block]) -> float:
    """Returns the clocks for one draw of the times at which blocks begin."""
    every = [group for block in resident for group in block.groups]
    time, middle = 0.0, (0.0, 0)
    while (done := min(group.tiles for group in every)) < ROUNDS:
        if not middle[1] and done >= ROUNDS // 2:
            middle = time, done
        users = Counter(pipe for group in every for pipe in group.work)
        users["alone"] = 1
        passed = min((left * users[pipe] for group in every for pipe, left in group.work.items()), default=0)
        time += passed
        for group in every:
            rest = {pipe: left - passed / users[pipe] for pipe, left in group.work.items()}
            group.work = {pipe: left for pipe, left in rest.items() if left > DONE}
        while any([block.advance(i, program) for block in resident for i in range(len(block.groups))]):
            pass
    return (time - middle[0]) / (done - middle[1])
