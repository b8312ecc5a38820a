"""The formulas of bench/scaling.py against counts, docs/scaling.md against both, and the model's limits."""

import re
from itertools import pairwise, product

import figures
import plots
import pytest
import scaling
import torch
from PIL import Image
from processes import spawn
from scaling import GPUS, Collective, Sizes
from scaling_worker import BATCH, CLUSTERS, DIM, PROCESSES, QUEUE, VIEWS, count
from torch.utils.flop_counter import FlopCounterMode

from relssl import backends
from relssl.backends.base import Backend

pytestmark = pytest.mark.xdist_group("scaling")  # The tests share counts of three processes.
PAGE = (figures.ROOT / "docs" / "scaling.md").read_text()
# No two alike, so that one in the place of another shows.
SIZES = [
    Sizes(processes=2, batch=3, queue=20, dim=5, views=2, element=2, queue_element=4),
    Sizes(processes=8, batch=5, queue=72, dim=16, views=1, element=4, queue_element=2, ids=True),
    Sizes(processes=1, batch=7, queue=9, dim=11, views=3, element=8, queue_element=2, ids=True),
]


def page_rows(first: str, ids: bool = True) -> list[list[str]]:
    """Returns the cells of the table of the page whose heading begins so, an empty first cell filled in."""
    table = PAGE[PAGE.index(first) :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    for above, row in pairwise(rows):
        row[0] = row[0] or above[0]
    return [row for row in rows if ids or "ids" not in "".join(row[1:-1])]


def value(formula: str, s: Sizes, loss: scaling.Loss) -> float:
    """Evaluates a formula of the page."""
    code = formula.strip("`").translate(str.maketrans({"·": "*", "²": "**2"}))  # what Python calls them
    sizes = {"W": s.processes, "B": s.batch, "K": s.queue, "D": s.dim, "V": s.views, "M": CLUSTERS}
    rows = (1 + s.views) * s.batch if loss == "relation" else s.views * s.batch
    sizes |= {"R": rows, "e": s.element, "h": s.queue_element, "f": 4, "i": 8 if s.ids else 0}
    return eval(code, {}, sizes)


def made(s: Sizes, loss: scaling.Loss) -> dict[str, scaling.Cost]:
    """Returns the costs by the first words of their rows on the page."""
    return {
        "replicated queue": scaling.replicated_queue(s, loss),
        "sharded queue": scaling.sharded_queue(s, loss),
        "NT-Xent, all rows everywhere": scaling.nt_xent_everywhere(s),
        "NT-Xent, own rows": scaling.nt_xent_own_rows(s),
        "cluster loss": scaling.cluster_loss(s, CLUSTERS),
    }


@pytest.mark.parametrize(("s", "loss"), list(product(SIZES, ("relation", "info_nce"))))
def test_the_formulas_of_the_page(s, loss):
    calls, rest = page_rows("| algorithm | collective", s.ids), page_rows("| algorithm | flop")
    for name, cost in made(s, loss).items():
        formulas = [row for row in calls if row[0].startswith(name)]
        assert [row[1] for row in formulas] == [call.name for call in cost.calls]
        assert [value(row[3], s, loss) for row in formulas] == [call.size for call in cost.calls]
        (row,) = [row for row in rest if row[0].startswith(name)]
        assert value(row[1], s, loss) == cost.flop
        assert value(row[2], s, loss) == sum(cost.memory.values())
    assert len({row[0] for row in calls}) == len(rest) == len(made(s, loss))


def test_costs_by_hand():
    """Two processes with a batch of 3 in rows of 5 numbers: one sends what the other receives."""
    s = SIZES[0]
    assert scaling.replicated_queue(s).payload(2) == 3 * 5 * 4
    # A teacher's and two students' rows travel in 2 bytes; two parts and five sums of each return in 4.
    assert scaling.sharded_queue(s).payload(2) == 9 * 5 * 2 + 9 * 7 * 4
    assert scaling.sharded_queue(s, "info_nce").payload(2) == 6 * 5 * 2 + 6 * 7 * 4
    assert scaling.nt_xent_everywhere(s).payload(2) == 6 * 5 * 2 + 12 * 5 * 2
    assert scaling.nt_xent_own_rows(s).payload(2) == 6 * 5 * 2 + 12 * 4
    assert scaling.cluster_loss(s, 3).payload(2) == (36 + 6) * 4
    assert scaling.sharded_queue(s).memory["queue"] * 2 == scaling.replicated_queue(s).memory["queue"] == 400


@pytest.mark.parametrize("make", [*scaling.QUEUES.values(), *scaling.NT_XENT.values()])
def test_one_process_sends_nothing(make):
    cost = make(SIZES[2])
    assert cost.payload(1) == 0 == scaling.communication(cost, 1)


def test_sharding_at_one_process_keeps_everything():
    whole, shard = (make(SIZES[2]) for make in scaling.QUEUES.values())
    assert (whole.flop, whole.memory["queue"]) == (shard.flop, shard.memory["queue"])


# ---------------------------------------------------------------------------------- counts of what is done


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """Returns the collectives and the flop of each case, counted in one of three processes."""
    folder = tmp_path_factory.mktemp("counts")
    spawn(count, (PROCESSES, str(folder)), PROCESSES, 100)
    return torch.load(folder / "0.pt")


def check(counted, calls: list[Collective], flop: int | None = None) -> None:
    """Compares what was counted with a formula; each gather of rows follows one of their numbers."""
    exchanges = ("all_gather", 8), ("all_gather", scaling.ROW_COUNT)
    found = [call for call in counted[0] if call not in exchanges]
    assert found == [(call.name, call.size) for call in calls]
    if flop is not None:
        assert counted[1] == flop


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("kind", scaling.QUEUES)
def test_counts_over_a_queue(counts, kind, ids):
    s = Sizes(PROCESSES, BATCH, QUEUE, DIM, VIEWS, ids=ids)
    check(counts[kind, "enqueue", ids], scaling.QUEUES[kind](s).enqueue, 0)
    for loss in ("relation", "info_nce"):
        cost = scaling.QUEUES[kind](s, loss)
        check(counts[kind, loss, ids], cost.loss, cost.flop)
    exchanged = [size for name, size in counts[kind, "relation", ids][0] if size == scaling.ROW_COUNT]
    assert len(exchanged) == (kind == "sharded")


def test_counts_of_in_batch_losses(counts):
    s = Sizes(PROCESSES, BATCH, dim=DIM, element=4)
    cost = scaling.nt_xent_own_rows(s)
    check(counts["nt_xent"], cost.loss, cost.flop)
    assert counts["nt_xent"][1] == pytest.approx(scaling.nt_xent_everywhere(s).flop * 4 / 3 / PROCESSES)
    cost = scaling.cluster_loss(s, CLUSTERS)
    check(counts["cluster_loss"], cost.loss)


def flop_of(run) -> int:
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops()


SCALE = (10.0, 25.0)


def test_flop_of_a_replicated_queue():
    s = Sizes(processes=1, batch=4, queue=64, dim=8, views=2)
    backend = backends.BACKENDS["chunked"]
    q, k, rows = torch.randn(2, 4, 8), torch.randn(4, 8), torch.randn(64, 8)
    relation = flop_of(lambda: backend.relation(q, k, rows, SCALE, "kl", 1.0, True))
    assert relation == scaling.replicated_queue(s).flop
    students = flop_of(lambda: backend.lse_and_mean(q.flatten(0, 1), rows, SCALE, 8, None, True))
    assert students == scaling.replicated_queue(s, "info_nce").flop


def test_flop_of_nt_xent_everywhere():
    s = Sizes(processes=3, batch=4, dim=8)
    z, backend = torch.randn(2 * 3 * 4, 8), backends.BACKENDS["chunked"]
    taken = flop_of(lambda: Backend.nt_xent(backend, z, (5.0, 5.0), None, 1.0, True))
    assert taken == scaling.nt_xent_everywhere(s).flop
    assert scaling.nt_xent_own_rows(s).flop == pytest.approx(taken * 4 / 3 / 3)


# ------------------------------------------------------------------------------------------------ the model


def ring(processes: int, node: int) -> tuple[int, int]:
    """Counts the hops of a tensor from the first process around the ring, within nodes and between them."""
    between = [rank // node != (rank + 1) // node for rank in range(processes - 1)]
    return between.count(False), between.count(True)


@pytest.mark.parametrize("processes", (2, *scaling.PROCESSES))
def test_steps_carry_the_payload(processes):
    for name in ("all_gather", "all_to_all", "all_reduce"):
        call = Collective(name, "", 1024)
        nvlink, network, size = scaling.steps(call, processes)
        assert (nvlink + network) * size == pytest.approx(call.payload(processes))
    assert scaling.steps(Collective("all_gather", "", 1), processes)[:2] == ring(processes, scaling.NODE)
    nvlink, network, _ = scaling.steps(Collective("all_to_all", "", 1), processes)
    assert (nvlink, network) == ((7, processes - 8) if processes > 2 else (1, 0))


def test_seconds_by_hand():
    """An all_gather of a megabyte on two nodes: 14 steps at 360 GB/s and one at 40 GB/s."""
    cost = scaling.Cost([Collective("all_gather", "", 10**6)], [], 0, {})
    microseconds = 14 + 14 * (1.9 + 1e6 / 360e3) + (4.0 + 1e6 / 40e3)
    assert scaling.communication(cost, 16) == pytest.approx(1e-6 * microseconds)
    assert scaling.latency(cost, 16) == pytest.approx(1e-6 * (14 + 14 * 1.9 + 4.0))
    # 593.4 Tflop/s, or 2.68 TB/s where the queue takes longer to read.
    assert scaling.computation(scaling.Cost([], [], 5_934, {"queue": 10}), GPUS["H100"]) == pytest.approx(
        1e-11
    )
    assert scaling.computation(scaling.Cost([], [], 0, {"queue": 268}), GPUS["H100"]) == pytest.approx(1e-10)


@pytest.mark.parametrize("make", scaling.QUEUES.values(), ids=scaling.QUEUES)
def test_time_grows_with_what_grows(make):
    def seconds(**sizes):
        s = scaling.EXAMPLE._replace(**sizes)
        return scaling.seconds(make(s), s.processes, GPUS["H100"])

    for name in ("processes", "batch", "queue", "dim", "views"):
        assert seconds(**{name: 2 * getattr(scaling.EXAMPLE, name)}) > seconds()
    # Infinitely many rows: the products alone.
    s = scaling.EXAMPLE._replace(queue=2**50)
    assert f"take {seconds(queue=10**9):.2f} s" in PAGE  # mostly the products
    assert seconds(queue=2**50) == pytest.approx(8 * s.batch * s.queue * s.dim / (0.6 * 989e12), rel=1e-6)


def test_where_sharding_is_faster():
    """There, both take the same time; and only a queue that bounds the time by being read is shared out."""
    gpu = GPUS["H100"]
    for ratio, batch in ((1.0, 8), (1.0, 48), (1.1, 256)):
        s = scaling.EXAMPLE._replace(batch=batch)
        rows = 64 * round(scaling.queue_where(ratio, s, gpu) / 64)
        whole, shard = (
            scaling.seconds(make(s._replace(queue=rows)), 64, gpu) for make in scaling.QUEUES.values()
        )
        assert shard == pytest.approx(ratio * whole, rel=1e-3)
    assert "at most 55 images for each H100 (38 for each H200)" in " ".join(PAGE.split())
    for name, batch in (("H100", 55), ("H200", 38)):
        assert scaling.queue_where(1.0, scaling.EXAMPLE._replace(batch=batch), GPUS[name]) is not None
        assert scaling.queue_where(1.0, scaling.EXAMPLE._replace(batch=batch + 1), GPUS[name]) is None


def test_the_largest_queue():
    assert scaling.largest_queue(1, 256, GPUS["H100"]) == 20e9 // 256
    assert scaling.largest_queue(8, 256, GPUS["H100"]) == 8 * (20e9 // 256) > 10**8
    assert f"Above {20e9 / 256 / 1e6:.0f} · 10⁶ rows only a sharded queue fits" in " ".join(PAGE.split())
    for processes in scaling.PROCESSES:
        rows = scaling.largest_queue(processes, 256, GPUS["H200"])
        full, more = (
            scaling.EXAMPLE._replace(processes=processes, queue=n) for n in (rows, rows + processes)
        )
        assert scaling.fits(scaling.sharded_queue(full), GPUS["H200"])
        assert not scaling.fits(scaling.sharded_queue(more), GPUS["H200"])


# ------------------------------------------------------------------------------------ the page and the plot


def test_constants_of_the_page():
    """test_bench.py compares the tables that `make figures` writes."""
    values = {row[0]: row[1] for row in page_rows("| figure | value")}
    assert (
        values["flop, bfloat16, dense"] == "989 Tflop/s" and GPUS["H100"].flop == GPUS["H200"].flop == 989e12
    )
    memory = "; ".join(f"{g.memory / 1e9:g} GB, {g.bandwidth / 1e12:g} TB/s ({n})" for n, g in GPUS.items())
    assert values["memory; its bandwidth"] == memory
    assert values["NVLink, each direction"].startswith(f"{scaling.NVLINK.bandwidth / 1e9:g} GB/s")
    assert values["InfiniBand NDR, of a GPU"].endswith(f" {scaling.NETWORK.bandwidth / 1e9:g} GB/s")
    latencies = [1e6 * t for t in (scaling.START, scaling.NVLINK.latency, scaling.NETWORK.latency)]
    assert values["latencies"] == "{:g}, {:g} and {:g} µs".format(*latencies)
    assumed = [float(v.split(",")[0]) for v in values.values() if "assumed" in v]
    names = ("MATMUL", "HBM", "NVLINK", "NETWORK")
    assert assumed == [*(getattr(scaling, f"{n}_EFFICIENCY") for n in names), scaling.QUEUE_SHARE]


def test_tables_say_that_they_are_modelled():
    for name in ("times", "largest", "pays", "nt_xent"):
        before = PAGE.split(f"<!-- figures: scaling-{name} -->")[0].rstrip()
        assert re.search(r"\*\*Modelled, not\smeasured:\*\*$", before)


def test_the_plot_is_of_the_model():
    plot = figures.ROOT / "docs" / "scaling.png"
    assert Image.open(plot).text["Source"] == plots.scaling_digest(), "run make figures"


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scaling.py", "--processes", "16", "--batch", "3", "--queue", "1024"])
    scaling.main()
    printed = capsys.readouterr().out
    s = scaling.EXAMPLE._replace(processes=16, batch=3, queue=1024)
    assert all(scaling.tables.line(row.values()) in printed for row in scaling.costs(s))
    assert "| 16 | " in printed and "K 1,024" in printed
