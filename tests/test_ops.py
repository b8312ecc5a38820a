"""Tests the registered ops with torch's opcheck, under torch.compile, and for equal bits in every run."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from oracle import unit
from torch._dynamo.testing import CompileCounterWithBackend

from relssl import FeatureQueue, backends
from relssl.backends.chunked import Chunked
from relssl.functional import cluster_loss, info_nce, nt_xent, queue_logsumexp, relation_loss
from relssl.info import report

LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
}
SCALES = {"numbers": ([10.0, 25.0], None), "device": ([], torch.tensor([10.0, 25.0]))}
# Each value of each of the three is quickly checked with some of the others'.
QUICK = {
    ("contiguous", "numbers", torch.float32),
    ("transposed", "device", torch.bfloat16),
    ("sliced", "device", torch.float32),
}
CHECKED = [
    pytest.param(*case, id="-".join(map(str, case)), marks=[pytest.mark.slow] * (case not in QUICK))
    for case in product(LAYOUTS, SCALES, (torch.float32, torch.bfloat16))
]


@pytest.mark.parametrize("on_device", [False, True])
def test_the_primitive_of_the_reference_in_float64(on_device):
    """Its scales, too, keep all digits."""
    x, queue = unit(6, 8, dtype=torch.float64), unit(20, 8, dtype=torch.float64)
    scale = [1 / 0.07, 1 / 0.03]
    theta = torch.cat((x[:2] * scale[0], x[2:] * scale[1]))
    scale = torch.tensor(scale, dtype=torch.float64) if on_device else scale
    lse, mean = backends.get("reference").lse_and_mean(x, queue, scale, 2, None, True)
    torch.testing.assert_close(lse.sum(0), (theta @ queue.T).logsumexp(1), rtol=0, atol=1e-13)
    torch.testing.assert_close(mean, (theta @ queue.T).softmax(1) @ queue, rtol=0, atol=1e-13)


def test_the_backend_of_the_documentation(monkeypatch):
    """docs/backends.md's, in float64: each loss with its gradients, and a row for which all is excluded."""
    page = Path(__file__).parents[1] / "docs" / "backends.md"
    (code,) = re.findall("```python\n(.*?)```", page.read_text(), re.S)
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS})
    exec(code, {})
    leaves = [unit(*s, 8, dtype=torch.float64).requires_grad_() for s in ((2, 5), (5,), (40,))]
    taus = {"student_temperature": 0.07, "teacher_temperature": 0.03}

    def losses(q, k, queue, backend):
        lse, mean = queue_logsumexp(k[:1], queue[:1], 0.07, exclude=torch.tensor([0]), backend=backend)
        assert lse == -torch.inf and not mean.any()
        return (
            relation_loss(q, k, queue, **taus, backend=backend)
            + info_nce(q, k, queue, temperature=0.07, backend=backend)
            + nt_xent(q[0], k, queue=queue, temperature=0.07, backend=backend)
            + queue_logsumexp(k, queue, 0.07, exclude=torch.arange(5), backend=backend)[1].cos().sum()
        )

    found, expected = (losses(*leaves, backend) for backend in ("mine", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for own, other in zip(*(torch.autograd.grad(loss, leaves) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(losses(*leaves, "mine"), expected, rtol=1e-12, atol=0)


def test_a_backend_replaced_under_its_name(monkeypatch):
    ran = []

    class Mine(Chunked):
        def info_nce(self, *arguments):
            ran.append(self)
            return super().info_nce(*arguments)

    own = Mine(), Mine()
    for backend in own:
        monkeypatch.setitem(backends.BACKENDS, "mine", backend)
        info_nce(unit(3, 8), unit(3, 8), unit(7, 8), backend="mine")
    assert ran == [*own]
    assert "  mine " in report()  # without a docstring, too


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize(("layout", "scale", "dtype"), CHECKED)
def test_opcheck(layout, scale, dtype, backend):
    q, k, queue = (LAYOUTS[layout](unit(*s, 16, dtype=dtype)) for s in ((2, 5), (5,), (40,)))
    by_value, on_device = SCALES[scale]
    ops = torch.ops.relssl
    for views, form, *how in (
        (q, "kl", "mean", True, True),
        (q[0], "ce", "none", True, False),
        (q, "ce", "sum", False, False),
    ):
        arguments = (views, k, queue, by_value, on_device, form, *how, backend)
        torch.library.opcheck(ops.relation.default, arguments)
    torch.library.opcheck(ops.snapshot.default, (queue,))
    for views, reduction, want in ((q, "mean", True), (q[0], "none", False)):
        one = (by_value[:1], None if on_device is None else on_device[:1])
        torch.library.opcheck(ops.info_nce.default, (views, k, queue, *one, reduction, want, backend))
        for negatives in (None, queue):
            arguments = (q[0], k, negatives, *one, reduction, want, backend)
            torch.library.opcheck(ops.nt_xent.default, arguments)
    lse = ops.nt_xent.default(q[0], k, None, *one, "none", True, backend)[2]
    torch.library.opcheck(
        ops.nt_xent_vjp.default, (torch.cat((q[0], k)), *one, lse, torch.randn(10), backend)
    )
    p1, p2 = (LAYOUTS[layout](torch.rand(7, 3)) for _ in range(2))
    for penalize, want in ((True, True), (False, False)):
        arguments = (p1, p2, *one, p1.dtype, penalize, want, backend)
        torch.library.opcheck(ops.cluster_loss.default, arguments)
    ids, queue_ids, filled = torch.tensor([0, -1, 3, 39, -1]), torch.arange(40) // 2, torch.tensor(30)
    for out, want in (((), True), ((ids,), True), ((ids, queue_ids), False), ((None, None, filled), True)):
        arguments = (k, queue, by_value, on_device, 3, want, backend, *out)
        torch.library.opcheck(ops.lse_and_mean.default, arguments)
    how, out = ("mean", True), (ids, queue_ids, filled)
    torch.library.opcheck(
        ops.relation.default, (q, k, queue, by_value, on_device, "kl", *how, True, backend, *out)
    )
    torch.library.opcheck(ops.info_nce.default, (q, k, queue, *one, *how, backend, *out))
    torch.library.opcheck(ops.nt_xent.default, (q[0], k, queue, *one, *how, backend, *out))
    lse, mean = ops.lse_and_mean.default(k, queue, by_value, on_device, 5, True, backend, *out)
    one = (by_value[:1], None if on_device is None else on_device[:1])
    g_lse, g_mean = torch.randn(5), torch.randn(5, 16)
    for g, g_row, want_x, want_queue in (
        (g_mean, g_mean, True, True),
        (g_mean, None, True, False),
        (None, None, False, True),
    ):
        arguments = (k, queue, *one, lse, mean, g_lse, g, g_row, want_x, want_queue, backend, *out)
        torch.library.opcheck(ops.lse_and_mean_vjp.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_over_a_group(layout):
    """The group has this process alone; a queue that is sharded among it is the queue."""
    z1, z2, queue = (LAYOUTS[layout](unit(n, 16)) for n in (5, 5, 40))
    ops, ids = torch.ops.relssl, torch.tensor([0, -1, 3, 39, -1])
    sharded = "sharded/40/even//chunked"
    for negatives, reduction, backend, out in (
        (None, "mean", "chunked", ()),
        (queue, "none", sharded, (ids, torch.arange(40) // 2, torch.tensor(30))),
    ):
        arguments = (z1, z2, negatives, [2.0], None, reduction, "", backend, *out)
        torch.library.opcheck(ops.group_nt_xent.default, arguments)
    _, mean, _, _, all_z, all_lse = ops.group_nt_xent.default(*arguments)
    z = torch.cat((z1, z2))
    arguments = (z, all_z, [2.0], None, all_lse, mean, torch.randn(10), "", sharded)
    torch.library.opcheck(ops.group_nt_xent_vjp.default, arguments)
    torch.library.opcheck(ops.group_sum.default, (queue, ""))
    arguments = (z1, z2, queue, [10.0, 25.0], None, "kl", "mean", True, True)
    torch.library.opcheck(ops.relation.default, (*arguments, sharded, ids))
    for found, expected in zip(
        ops.relation.default(*arguments, sharded), ops.relation.default(*arguments, "chunked"), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_enqueue(layout, dtype):
    for ids, batch in ((True, 3), (False, 9)):
        queue = FeatureQueue(5, 8, dtype=dtype, ids=ids)
        keys, own = LAYOUTS[layout](unit(batch, 8)), (queue.rows, queue.ids, queue.pointer, queue.count)
        arguments = (*own, keys, torch.arange(batch) if ids else None)
        torch.library.opcheck(torch.ops.relssl.enqueue.default, arguments)


def losses(q, k, queue, tau):
    lse, mean = queue_logsumexp(q, queue, tau)
    return (
        relation_loss(q, k, queue),
        relation_loss(torch.stack((q, k)), k, queue, student_temperature=tau, form="ce"),
        info_nce(q, k, queue, temperature=tau),
        nt_xent(q, k, queue=queue, temperature=tau, reduction="none").square().sum(),
        lse.square().mean() + mean.square().sum(),
        cluster_loss(q.softmax(1), k.softmax(1), temperature=tau),
    )


@pytest.mark.parametrize(  # inductor compiles C++ for half a minute: once will do
    ("backend", "wants"), [("aot_eager", "q"), ("aot_eager", "all"), ("inductor", "q")]
)
def test_compiled_equals_eager(backend, wants):
    values = *(unit(n, 16) for n in (6, 6, 50)), torch.tensor(0.2)
    results = []
    for run in (losses, torch.compile(losses, fullgraph=True, backend=backend)):
        inputs = [t.clone().requires_grad_(wants == "all" or i == 0) for i, t in enumerate(values)]
        found = run(*inputs)
        sum(found).backward()
        results.append((*found, *(t.grad for t in inputs if t.requires_grad)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_dynamic_shapes_compile_once():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend=counter)
    torch.compiler.reset()
    frames = []
    for batch, size in ((4, 20), (5, 30), (7, 33)):
        values = unit(batch, 16), unit(batch, 16), unit(size, 16), torch.tensor(0.1 + batch / 100)
        grads = []
        for run in (losses, compiled):
            inputs = [t.clone().requires_grad_() for t in values]
            grads.append(torch.autograd.grad(sum(run(*inputs)), inputs))
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[1:] == frames[:1] * 2  # The first may begin again on some versions of torch.


def test_a_compiled_graph_refuses_a_variant_that_cannot_run():
    run = torch.compile(relation_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="it has no variants"):
        run(unit(4, 16), unit(4, 16), unit(20, 16), backend="chunked/fast")
    with pytest.raises(ValueError, match="mmx"):
        run(unit(4, 16), unit(4, 16), unit(20, 16), backend="cpu/mmx")


def test_compiled_step_with_enqueue_does_not_recompile():
    """Loss, enqueue and backward in one graph, three times; the ring wraps in the third."""
    counter = CompileCounterWithBackend("aot_eager")
    eager_queue, queue = FeatureQueue(16, 8), FeatureQueue(16, 8)
    weight = torch.randn(8, 8)

    def step(x, weight, queue):
        q = torch.nn.functional.normalize(x @ weight, dim=1)
        loss = relation_loss(q, x, queue)
        queue.enqueue(x)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for _ in range(3):
        x = unit(6, 8)
        grads = []
        for run, ring in ((step, eager_queue), (compiled, queue)):
            w = weight.clone().requires_grad_()
            run(x, w, ring).backward()
            grads.append(w.grad)
        torch.testing.assert_close(*grads)
        assert torch.equal(eager_queue.rows, queue.rows)
    assert int(queue.pointer) == 2
    assert counter.frame_count == 1


def test_bitwise_equal_from_run_to_run():
    q, k, queue = (unit(n, 64) for n in (64, 64, 20_000))
    runs = []
    for _ in range(3):
        inputs = [t.clone().requires_grad_() for t in (q, k, queue)]
        loss = relation_loss(*inputs)
        loss.backward()
        runs.append((loss.detach(), *(t.grad for t in inputs)))
    for again in runs[1:]:
        for a, b in zip(runs[0], again, strict=True):
            assert torch.equal(a, b)


def test_temperature_on_an_accelerator_is_not_read_but_makes_the_row_nan():
    """Where a value may not be read (here: under compile), a bad one is NaN instead of an error."""
    q, k, queue = unit(6, 16), unit(6, 16), unit(50, 16)
    run = torch.compile(
        lambda tau: relation_loss(q, k, queue, student_temperature=tau), fullgraph=True, backend="aot_eager"
    )
    assert torch.isfinite(run(torch.tensor(0.1)))
    for bad in (0.0, -1.0, torch.inf, torch.nan):
        assert run(torch.tensor(bad)).isnan()


def test_exclude_out_of_range_unread_makes_its_row_nan():
    x, queue = unit(4, 16), unit(50, 16)
    run = torch.compile(
        lambda e: queue_logsumexp(x, queue, 0.1, exclude=e)[0], fullgraph=True, backend="aot_eager"
    )
    lse = run(torch.tensor([-2, 50, -1, 49]))
    assert lse.isnan().tolist() == [True, True, False, False]
