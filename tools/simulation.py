"""How far the warps of a multiprocessor hide one another's waits: a simulation of them in their loops.

Four warps, one on each quarter of the multiprocessor, are a group: a warpgroup, a view that serves all chips.
They go through steps:

    {pipe: clocks}    all pipes at the same time; "alone" is a pipe of each group's own
    "meet"            until the block's other groups are there
    "take", "pass"    the turn, which the block's groups pass round

Groups that want the same pipe at the same time share it evenly. Groups of a block begin together, blocks at
times drawn at random: sharing evenly, they neither fall into step nor out of it, so that the mean of several
draws is taken.
"""

import random
from collections import Counter
from statistics import fmean

Work = dict[str, float]
Step = Work | str

ROUNDS = 32  # tiles of each group; the first half only gets them under way
DRAWS = 16  # of the times at which blocks begin
DONE = 1e-6  # clocks that rounding may leave


class Group:
    def __init__(self, begin: float) -> None:
        self.at = self.tiles = self.meetings = 0
        self.met = False
        self.work: Work = {"alone": begin}


class Block:
    def __init__(self, groups: int, begin: float) -> None:
        self.groups = [Group(begin) for _ in range(groups)]
        self.turn = 0

    def go_on(self, i: int, program: list[Step]) -> bool:
        """Whether group i has gone on to its next step."""
        group = self.groups[i]
        step = program[group.at]
        if step == "meet" and not group.work and not group.met:
            group.meetings, group.met = group.meetings + 1, True
        if (
            group.work
            or (step == "take" and self.turn != i)
            or (step == "meet" and any(other.meetings < group.meetings for other in self.groups))
        ):
            return False
        if isinstance(step, dict):
            group.work = {pipe: clocks for pipe, clocks in step.items() if clocks}
        elif step == "pass":
            self.turn = (i + 1) % len(self.groups)
        group.met = False
        group.at = (group.at + 1) % len(program)
        group.tiles += group.at == 0
        return True


def simulate(program: list[Step], groups: int, blocks: int = 1) -> float:
    """Clocks in which each group of each block goes through its steps once."""
    tile = sum(max(step.values()) for step in program if isinstance(step, dict))
    drawn, draws = random.Random(0), DRAWS if blocks > 1 else 1
    return fmean(
        run(program, [Block(groups, drawn.uniform(0, tile)) for _ in range(blocks)]) for _ in range(draws)
    )


def run(program: list[Step], resident: list[Block]) -> float:
    """What simulate() returns, for one draw."""
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
        while any([block.go_on(i, program) for block in resident for i in range(len(block.groups))]):
            pass
    return (time - middle[0]) / (done - middle[1])
