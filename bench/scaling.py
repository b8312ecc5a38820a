"""What a step on many GPUs costs: bytes, flop and memory by formulas, and from these its time by a model.

    python bench/scaling.py --processes 64 --batch 32 --queue 67108864

prints both for your sizes; `make figures` writes the tables and the plot of docs/scaling.md. The formulas
count what the algorithms must do. The times are a model from data sheets: no GPU has run it.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import tables
from report import number

# ---------------------------------------------------------------------------------------------- the formulas

ACCUMULATOR = 4  # f: bytes of a float32, which log-sum-exps, means and sums are
ID = 8  # bytes of an int64
# On a CPU each gather of rows follows one of their number: this many bytes for a loss over a sharded queue,
# whose rows have two temperatures, otherwise 8. On a GPU that happens only when the number changes. The
# formulas omit it.
ROW_COUNT = 16

Loss = Literal["relation", "info_nce"]


class Sizes(NamedTuple):
    """The sizes of a step; W must divide K."""

    processes: int  # W
    batch: int  # B: images of each process
    queue: int = 0  # K: rows of the queue, those of all processes together
    dim: int = 128  # D
    views: int = 1  # V: the student's views of an image
    element: int = 2  # e: bytes of a number that the losses compute with
    queue_element: int = 2  # those of a number in the queue
    ids: bool = False  # whether queue and losses have ids

    @property
    def row(self) -> int:
        """Bytes of a row of the queue."""
        return self.dim * self.queue_element + ID * self.ids


class Collective(NamedTuple):
    """One call of torch.distributed."""

    name: Literal["all_gather", "all_to_all", "all_reduce"]
    what: str
    size: int  # bytes of a process's tensor; of all_to_all, those for each one process

    def payload(self, processes: int) -> float:
        """Returns the bytes that a process sends to others. It receives as many.

        Those of all_reduce are a ring's: one all_gather's and one reduce_scatter's of 1/W of the tensor.
        """
        if self.name == "all_reduce":
            return 2 * (processes - 1) * self.size / processes
        return (processes - 1) * self.size


class Cost(NamedTuple):
    """What a process does in a step, forward and backward."""

    enqueue: list[Collective]
    loss: list[Collective]
    flop: int  # of matrix products
    memory: dict[str, int]  # bytes of what lasts, and of the largest buffers, without an allocator's rest

    @property
    def calls(self) -> list[Collective]:
        return self.enqueue + self.loss

    def payload(self, processes: int) -> float:
        """Returns the bytes that a process sends, which are as many as it receives."""
        return sum(call.payload(processes) for call in self.calls)


def rows_of(s: Sizes, loss: Loss) -> int:
    """Returns how many rows of a process are compared with the queue: the student's and the teacher's, once.

    InfoNCE compares the student's only.
    """
    return (s.views + (loss == "relation")) * s.batch


def over_queue(s: Sizes, loss: Loss) -> int:
    """Returns the flop of similarities and means of a process's rows, with the gradient of q."""
    return 2 * 2 * rows_of(s, loss) * s.queue * s.dim


def partials(s: Sizes, rows: int) -> int:
    """Returns the bytes of log-sum-exps in two parts and means."""
    return rows * (2 + s.dim) * ACCUMULATOR


def replicated_queue(s: Sizes, loss: Loss = "relation") -> Cost:
    """Returns what it costs that every process holds all K rows: the keys travel, the loss does not."""
    calls = [Collective("all_gather", "keys", s.batch * s.dim * s.queue_element)]
    if s.ids:
        calls.append(Collective("all_gather", "ids of the keys", s.batch * ID))
    memory = {
        "queue": s.queue * s.row,
        "gathered": s.processes * s.batch * s.row,
        "partials": partials(s, rows_of(s, loss)),
    }
    return Cost(calls, [], over_queue(s, loss), memory)


def sharded_queue(s: Sizes, loss: Loss = "relation") -> Cost:
    """Returns what it costs that a process holds K/W rows: its own keys stay, the rows of the loss travel.

    Every process computes partials of the rows of all processes over its shard, and sends them back. The
    formulas are those of forward with the gradient of q; gradients of k, the queue or temperatures need
    further collectives in backward.
    """
    rows = rows_of(s, loss)
    calls = [Collective("all_gather", "rows", rows * s.dim * s.element)]
    if s.ids:
        calls.append(Collective("all_gather", "ids of the rows", rows * ID))
    calls.append(Collective("all_to_all", "partials", partials(s, rows)))
    memory = {
        "queue": s.queue // s.processes * s.row,
        "gathered": s.processes * rows * (s.dim * s.element + ID * s.ids),
        "partials": 2 * s.processes * partials(s, rows),  # those computed and those received
    }
    return Cost([], calls, over_queue(s, loss), memory)


def nt_xent_everywhere(s: Sizes) -> Cost:
    """Returns what NT-Xent costs where every process computes the loss of all 2N = 2WB rows.

    Three products: similarities for the log-sum-exps, and again for p, whose symmetric sum is multiplied.
    """
    own, everyone = 2 * s.batch, 2 * s.batch * s.processes
    calls = [
        Collective("all_gather", "rows", own * s.dim * s.element),
        Collective("all_reduce", "gradients of all rows", everyone * s.dim * s.element),
    ]
    memory = {"gathered": everyone * s.dim * s.element, "gradients": everyone * s.dim * ACCUMULATOR}
    return Cost([], calls, 3 * 2 * everyone * everyone * s.dim, memory)


def nt_xent_own_rows(s: Sizes) -> Cost:
    """Returns what NT-Xent costs where a process compares its own 2B rows with all 2N.

    Four products: similarities and means of the own rows; and once all log-sum-exps are known, similarities
    again and the gradient through the columns.
    """
    own, everyone = 2 * s.batch, 2 * s.batch * s.processes
    calls = [
        Collective("all_gather", "rows", own * s.dim * s.element),
        Collective("all_gather", "log-sum-exps in two parts", 2 * own * ACCUMULATOR),
    ]
    memory = {
        "gathered": everyone * (s.dim * s.element + 2 * ACCUMULATOR),
        "gradients": own * s.dim * ACCUMULATOR,
    }
    return Cost([], calls, 4 * 2 * own * everyone * s.dim, memory)


QUEUES: dict[str, Callable[..., Cost]] = {"replicated": replicated_queue, "sharded": sharded_queue}
NT_XENT: dict[str, Callable[..., Cost]] = {"everywhere": nt_xent_everywhere, "own rows": nt_xent_own_rows}


def cluster_loss(s: Sizes, clusters: int) -> Cost:
    """Returns what the cluster loss of M clusters costs: it needs sums over images of products of columns.

    Two products: those of the 2M columns of a process's images, and their gradient.
    """
    columns = 2 * clusters
    size = (columns**2 + columns) * ACCUMULATOR
    calls = [Collective("all_reduce", "products and sums of columns", size)]
    return Cost([], calls, 2 * 2 * s.batch * columns**2, {"products and sums": size})


# ------------------------------------------------------------------------------------------------- the model


class GPU(NamedTuple):
    flop: float  # per second, dense, bfloat16
    bandwidth: float  # bytes per second of its memory
    memory: float  # bytes


class Link(NamedTuple):
    bandwidth: float  # bytes per second and direction, of a GPU
    latency: float  # seconds of a step


# NVIDIA H100 and H200 Tensor Core GPU data sheets, SXM. Flop are without sparsity.
GPUS = {"H100": GPU(989e12, 3.35e12, 80e9), "H200": GPU(989e12, 4.8e12, 141e9)}
# Nodes of 8 GPUs with 900 GB/s of NVLink each, both directions together, and an adapter of 400 Gb/s each
# (NVIDIA DGX H100 data sheet). Latencies: NCCL's own model, src/graph/tuning.cc, rings with protocol LL128.
NODE = 8
NVLINK, NETWORK = Link(450e9, 1.9e-6), Link(50e9, 4.0e-6)
START = 14e-6  # seconds until a collective's first step

# The parts of the nominal rates that are assumed to be reached.
MATMUL_EFFICIENCY = 0.6  # FlashAttention-3 reaches 0.66 on an H100 at D = 128 (its README: 648 Tflop/s).
HBM_EFFICIENCY = 0.8
NVLINK_EFFICIENCY = 0.8  # 376 to 380 of 450 GB/s between two GPUs (NVIDIA/nccl, issue 1264)
NETWORK_EFFICIENCY = 0.8  # 46 to 48 of 50 GB/s expected of an adapter (NVIDIA/nccl-tests, issue 290)
QUEUE_SHARE = 0.25  # of a GPU's memory, for the queue


def steps(call: Collective, processes: int) -> tuple[int, int, float]:
    """Returns a collective's steps over NVLink, those over the network, and the bytes of each.

    What every process gets crosses the network once for each node and travels on over NVLink, as NCCL's rings
    do it. What only one process gets takes a step to each.
    """
    nodes = -(-processes // NODE)
    if call.name == "all_to_all":
        within = min(NODE, processes)
        return within - 1, processes - within, call.size
    if call.name == "all_gather":
        return processes - nodes, nodes - 1, call.size
    return 2 * (processes - nodes), 2 * (nodes - 1), call.size / processes


def latency(cost: Cost, processes: int) -> float:
    """Returns the seconds of all collectives without their bytes, of which no step overlaps another."""
    if processes == 1:
        return 0.0
    counts = [steps(call, processes) for call in cost.calls]
    return sum(START + n * NVLINK.latency + m * NETWORK.latency for n, m, _ in counts)


def transfer(cost: Cost, processes: int) -> float:
    """Returns the seconds of the bytes of all collectives."""
    nvlink, network = NVLINK.bandwidth * NVLINK_EFFICIENCY, NETWORK.bandwidth * NETWORK_EFFICIENCY
    counts = [steps(call, processes) for call in cost.calls]
    return sum(size * (n / nvlink + m / network) for n, m, size in counts)


def communication(cost: Cost, processes: int) -> float:
    return latency(cost, processes) + transfer(cost, processes)


def computation(cost: Cost, gpu: GPU) -> float:
    """Returns the seconds of the products, or of reading the queue once where that takes longer."""
    products = cost.flop / gpu.flop / MATMUL_EFFICIENCY
    return max(products, cost.memory.get("queue", 0) / gpu.bandwidth / HBM_EFFICIENCY)


def seconds(cost: Cost, processes: int, gpu: GPU) -> float:
    """Returns the seconds of enqueueing and the loss, of which nothing overlaps."""
    return communication(cost, processes) + computation(cost, gpu)


def fits(cost: Cost, gpu: GPU) -> bool:
    return cost.memory["queue"] <= QUEUE_SHARE * gpu.memory


def largest_queue(processes: int, row: int, gpu: GPU) -> int:
    """Returns how many rows the share of `processes` GPUs' memory holds; 1 for a replicated queue.

    row: bytes of a row.
    """
    return processes * int(QUEUE_SHARE * gpu.memory / row)


def queue_where(ratio: float, s: Sizes, gpu: GPU) -> float | None:
    """Returns the K from which on a step with the sharded queue takes at most `ratio` times the other's time.

    None if no number of rows is enough. s.queue is ignored.
    """
    fixed, per_row = [], []
    for make in QUEUES.values():
        cost = make(s._replace(queue=s.processes))
        fixed.append(communication(cost, s.processes))
        per_row.append(computation(cost, gpu) / s.processes)  # It is proportional to K.
    gain = ratio * per_row[0] - per_row[1]
    # A difference that is rounding is none.
    return max(0.0, (fixed[1] - ratio * fixed[0]) / gain) if gain > 1e-9 * per_row[1] else None


# ---------------------------------------------------------------------------------------- tables and the plot

PROCESSES = (8, 16, 32, 64, 128, 256, 512, 1024)
ROWS = (2**16, 2**20, 2**26, 2**30)  # K
EXAMPLE = Sizes(processes=64, batch=64, queue=2**26)


def costs(s: Sizes = EXAMPLE) -> list[tables.Row]:
    """Returns a row for each algorithm: what a process sends, computes and keeps."""
    made = {
        "relation loss, replicated queue": replicated_queue(s),
        "relation loss, sharded queue": sharded_queue(s),
        "InfoNCE, replicated queue": replicated_queue(s, "info_nce"),
        "InfoNCE, sharded queue": sharded_queue(s, "info_nce"),
        "NT-Xent, all rows everywhere": nt_xent_everywhere(s),
        "NT-Xent, own rows": nt_xent_own_rows(s),
        "cluster loss, M = 100": cluster_loss(s, 100),
    }
    return [
        {
            "": name,
            "sent, MB": number(cost.payload(s.processes) / 1e6),
            "Gflop": number(cost.flop / 1e9),
            "memory, MB": number(sum(cost.memory.values()) / 1e6),
        }
        for name, cost in made.items()
    ]


def rough(value: float) -> str:
    """Returns a number with two digits, since a model has no more."""
    return f"{float(f'{value:.2g}'):,g}"


def pair(ways: dict[str, Callable[..., Cost]], s: Sizes, take: Callable[..., float | None], *gpu: GPU) -> str:
    """Returns the ms that two ways take, as a cell."""
    found = [take(make(s), s.processes, *gpu) for make in ways.values()]
    return " / ".join("-" if value is None else rough(1e3 * value) for value in found)


def times(
    s: Sizes = EXAMPLE, processes: Iterable[int] = PROCESSES, queues: Iterable[int] = ROWS
) -> list[tables.Row]:
    """Returns a row for each number of H100s; a dash is a queue that does not fit."""
    gpu, found = GPUS["H100"], []
    for count in processes:
        s = s._replace(processes=count)
        row: tables.Row = {
            "GPUs": count,
            "communication": pair(QUEUES, s, communication),
            "its bytes alone": pair(QUEUES, s, transfer),
        }
        row |= {f"K {queue:,}": pair(QUEUES, s._replace(queue=queue), step, gpu) for queue in queues}
        found.append(row)
    return found


def step(cost: Cost, processes: int, gpu: GPU) -> float | None:
    """Returns the seconds of enqueueing and the loss, None if the queue does not fit."""
    return seconds(cost, processes, gpu) if fits(cost, gpu) else None


def largest(s: Sizes = EXAMPLE, processes: Iterable[int] = (1, *PROCESSES)) -> list[tables.Row]:
    """Returns a row for each number of GPUs: the largest queue that they hold, and a step's time with it."""
    found = []
    for count in processes:
        row: tables.Row = {"GPUs": count}
        for name, gpu in GPUS.items():
            queue = largest_queue(count, s.row, gpu)
            cost = sharded_queue(s._replace(processes=count, queue=queue))
            row[f"{name}, 10⁶ rows"] = number(queue / 1e6)
            row[f"{name}, ms"] = rough(1e3 * seconds(cost, count, gpu))
        found.append(row)
    return found


def pays(s: Sizes = EXAMPLE) -> list[tables.Row]:
    """Returns a row for each number of H100s and batch: from which K on sharding costs little, or nothing."""
    gpu, found = GPUS["H100"], []
    for count in (8, 64, 512):
        for batch in (8, 32, 64, 256):
            s = s._replace(processes=count, batch=batch)
            near, faster = (queue_where(ratio, s, gpu) for ratio in (1.1, 1.0))
            found.append(
                {
                    "GPUs": count,
                    "B": batch,
                    "communication, ms": pair(QUEUES, s, communication),
                    "at most 10 % slower, 10⁶ rows": "never" if near is None else rough(near / 1e6),
                    "faster, 10⁶ rows": "never" if faster is None else rough(faster / 1e6),
                }
            )
    return found


def nt_xent(s: Sizes = EXAMPLE) -> list[tables.Row]:
    """Returns a row for each number of H100s: the ms of NT-Xent of all rows everywhere, and of own rows."""
    gpu, found = GPUS["H100"], []
    for count in PROCESSES:
        s = s._replace(processes=count)
        row: tables.Row = {"GPUs": count, "communication": pair(NT_XENT, s, communication)}
        row |= {f"B {batch}": pair(NT_XENT, s._replace(batch=batch), seconds, gpu) for batch in (64, 256)}
        found.append(row)
    return found


Line = list[tuple[int, float]]  # of numbers of GPUs and values


def times_of_queues(s: Sizes = EXAMPLE) -> dict[tuple[str, int], Line]:
    """Returns the ms of a step with H100s, for each kind of queue and K; only where the queue fits."""
    lines: dict[tuple[str, int], Line] = {}
    for kind, make in QUEUES.items():
        for queue in ROWS:
            made = [(count, make(s._replace(processes=count, queue=queue))) for count in PROCESSES]
            found = [(count, step(cost, count, GPUS["H100"])) for count, cost in made]
            lines[kind, queue] = [(count, 1e3 * taken) for count, taken in found if taken is not None]
    return lines


def largest_queues(s: Sizes = EXAMPLE) -> dict[tuple[str, str], Line]:
    """Returns the largest queue, for each kind of queue and GPU."""
    return {
        (kind, name): [(n, largest_queue(1 if kind == "replicated" else n, s.row, gpu)) for n in PROCESSES]
        for kind in QUEUES
        for name, gpu in GPUS.items()
    }


TABLES = (costs, times, largest, pays, nt_xent)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in EXAMPLE._asdict().items():
        if name == "ids":
            parser.add_argument("--ids", action="store_true")
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    s = Sizes(**vars(parser.parse_args()))
    print("A process does in a step:", "", tables.table(costs(s)), "", sep="\n")
    print("By the model, H100s take in bfloat16, replicated / sharded, in ms:", "", sep="\n")
    print(tables.table(times(s, [s.processes], [s.queue])))


if __name__ == "__main__":
    main()
