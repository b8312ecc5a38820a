"""How far the warps of a multiprocessor hide one another's waits: a simulation of them in their loops.

Four warps, one on each quarter of the multiprocessor, are a group: a warpgroup, a view that serves all chips.
They go through steps:

    ("work", {pipe: clocks})   all pipes at the same time; "alone" is a pipe of each group's own
    ("product", clocks)        is issued, and goes on while the group does
    ("wait", n)                until no more than n products of the group are left
    ("meet", 0)                until the block's other groups are there
    ("take", 0), ("pass", 0)   the turn, which the block's groups pass round

Those who want the same pipe, or the tensor cores, at the same time share it evenly. Groups of a block begin
together; blocks begin one after the other, spread over the time that a tile takes, because schedulers prefer
some warps to others, which drives equal blocks apart.
"""

from collections import Counter, deque
from typing import Any

Work = dict[str, float]
Step = tuple[str, Any]

LATENCY = 60  # clocks until a group goes on after a wait, a meeting or a turn: an assumption
ROUNDS = 48  # tiles of each group; the first half only gets them under way
DONE = 1e-6  # clocks that rounding may leave


class Group:
    def __init__(self, ready: float) -> None:
        self.at = self.tiles = self.meetings = 0
        self.met = False
        self.ready = ready  # when it goes on
        self.work: Work = {}
        self.products: deque[float] = deque()


class Block:
    def __init__(self, groups: int, begin: float) -> None:
        self.groups = [Group(begin) for _ in range(groups)]
        self.turn = 0

    def go_on(self, i: int, program: list[Step], time: float, latency: float) -> bool:
        """Whether group i has gone on to its next step."""
        group = self.groups[i]
        if group.work or group.ready > time:
            return False
        kind, value = program[group.at]
        if kind == "meet" and not group.met:
            group.meetings, group.met = group.meetings + 1, True
        if (
            (kind == "wait" and len(group.products) > value)
            or (kind == "take" and self.turn != i)
            or (kind == "meet" and any(other.meetings < group.meetings for other in self.groups))
        ):
            return False
        if kind == "work":
            group.work = {pipe: clocks for pipe, clocks in value.items() if clocks}
        elif kind == "product":
            group.products.append(value)
        elif kind == "pass":
            self.turn = (i + 1) % len(self.groups)
        else:
            group.met, group.ready = False, time + latency
        group.at = (group.at + 1) % len(program)
        group.tiles += group.at == 0
        return True


def simulate(program: list[Step], groups: int, blocks: int = 1, latency: float = LATENCY) -> float:
    """Clocks in which each group of each block goes through its steps once."""
    products = sum(value for kind, value in program if kind == "product")
    works = sum(max(value.values()) for kind, value in program if kind == "work")
    resident = [Block(groups, b / blocks * (products + works)) for b in range(blocks)]
    every = [group for block in resident for group in block.groups]
    time, middle = 0.0, (0.0, 0)
    while (done := min(group.tiles for group in every)) < ROUNDS:
        if not middle[1] and done >= ROUNDS // 2:
            middle = time, done
        moved = True
        while moved:
            moved = any([b.go_on(i, program, time, latency) for b in resident for i in range(groups)])
        users = Counter(pipe for group in every for pipe in group.work)
        users["alone"] = 1
        users["tensor"] = sum(bool(group.products) for group in every)
        ends = [left * users[pipe] for group in every for pipe, left in group.work.items()]
        ends += [group.products[0] * users["tensor"] for group in every if group.products]
        ends += [group.ready - time for group in every if group.ready > time]
        passed = min(ends)
        time += passed
        for group in every:
            rest = {pipe: left - passed / users[pipe] for pipe, left in group.work.items()}
            group.work = {pipe: left for pipe, left in rest.items() if left > DONE}
            if group.products:
                group.products[0] -= passed / users["tensor"]
                if group.products[0] <= DONE:
                    group.products.popleft()
    return (time - middle[0]) / (done - middle[1])
