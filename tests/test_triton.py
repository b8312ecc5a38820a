"""Tests Triton's kernels beyond the grid of test_losses.py, on a GPU or in the interpreter."""

import itertools
from importlib.metadata import version

import checks
import pytest
import torch
from checks import (
    INTERPRETED,
    batch,
    check_info_nce,
    check_logsumexp,
    check_relation,
    device,
    slow_if_interpreted,
    to_device,
)
from oracle import unit

from relssl import FeatureQueue, backends, enqueuing
from relssl.backends import launching
from relssl.backends.common import Exclude
from relssl.functional import queue_logsumexp, relation_loss

if not INTERPRETED:
    pytestmark = pytest.mark.gpu
gpu_only = pytest.mark.skipif(INTERPRETED, reason="of a GPU, not of the interpreter")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)


@pytest.fixture
def triton():
    return backends.BACKENDS["triton"]


@pytest.fixture
def replace(triton, monkeypatch):
    """Returns a monkeypatch.setattr that also clears the cached launches, which depend on the attribute."""

    def replace(owner, name, value):
        monkeypatch.setattr(owner, name, value)
        launching._cache.clear()

    yield replace
    launching._cache.clear()


@pytest.fixture
def heuristics():
    return pytest.importorskip("relssl.kernels.heuristics")


def test_float64_rows_for_a_narrower_queue():
    """Losses are computed in the queue's dtype; a temperature keeps that of q."""
    q, k, queue = to_device("triton", *batch(None, 5, 40, 24, torch.float16))
    expected = with_gradients(q, k, queue)
    tau = torch.tensor(0.2, dtype=torch.float64, device=q.device)
    for got, want in zip(with_gradients(q.double(), k.double(), queue, tau=tau), expected, strict=True):
        torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-2, atol=1e-2)


def losses(*inputs, **options):
    return checks.losses(*inputs, backend="triton", **options)


def with_gradients(*inputs, **options):
    leaves = [t.clone().requires_grad_() for t in inputs]
    outputs = losses(*leaves, **options)
    return *outputs, *torch.autograd.grad(sum(t.sum() for t in outputs), leaves)


# ------------------------------------------------------------------------------------ the two paths


def shifts(triton, x, queue, scale):
    """Returns the shifts and means: a shift is 0 if the first path was exact, else the largest similarity."""
    stats, means, rows, splits = triton.forward(
        x, x[:0], queue, triton.kernel_scales([scale] * 2), None, True
    )
    return stats[: splits * rows].view(splits, rows), means


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shift_of_unit_rows(triton, dtype):
    x, queue = to_device("triton", unit(40, 64, dtype=dtype), unit(1000, 64, dtype=dtype))
    shift, _ = shifts(triton, x, queue, 25.0)
    if dtype == torch.float16:  # where 2^36 overflows
        assert (shift != 0).all()
    else:
        assert (shift == 0).all()


@pytest.mark.parametrize(("norm", "scale"), [(1.0, 200.0), (100.0, 25.0)])
def test_large_logits_use_a_running_maximum(triton, norm, scale):
    x, queue = unit(3, 64), unit(1000, 64, norm=norm)
    queue[7] = x[0] * norm  # a logit of 200, or 2,500
    x, queue = to_device("triton", x, queue)
    shift, _ = shifts(triton, x, queue, scale)
    assert (shift[:, 0] != 0).any()
    check_logsumexp(x, queue, 1 / scale, "triton")


def test_an_overflowing_mean_is_redone(triton):
    # 2^(c s) is about 2^90 and rows have norm 2^50: their product overflows float32, the mean does not.
    x, queue = torch.zeros(2, 16), unit(50, 16)
    queue[:, 0], x[:, 0] = 2.0**50, 2.0**-50
    x, queue = to_device("triton", x, queue)
    shift, means = shifts(triton, x, queue, 62.0)
    assert (shift != 0).all() and means.isfinite().all()
    _, mean = queue_logsumexp(x, queue, 1 / 62, backend="triton")
    torch.testing.assert_close(mean[:, 0], x.new_full((2,), 2.0**50))


@pytest.mark.parametrize("dtype", [torch.float32] + [torch.bfloat16] * (not INTERPRETED), ids=str)
def test_both_paths_agree(triton, dtype, replace):
    inputs = to_device("triton", *batch(None, 20, 600, 40, dtype))
    fixed = with_gradients(*inputs)
    kernels = launching.kernels()
    launch, ran = kernels.forward, []

    class Online:
        arg_names = launch.arg_names
        warmup = launch.warmup

        def __getitem__(self, grid):
            def run(*args, FIXED, **options):
                ran.append(FIXED)
                launch[grid](*args, FIXED=False, **options)

            return run

    replace(kernels, "forward", Online())
    loose = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for one, other in zip(fixed, with_gradients(*inputs), strict=True):
        torch.testing.assert_close(other, one, rtol=loose, atol=loose)
    assert ran == [True] * 4, "one forward pass for each loss, and for the primitive"


# ------------------------------------------------------------------------------------- how it is cut


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "tma"), [(16, True), slow_if_interpreted(600, False), (600, True), (1024, False)]
)
def test_widths(dtype, dim, tma, replace, heuristics):
    if INTERPRETED:  # as Hopper reads 16-bit rows, or any GPU wide ones of float32
        tiles = heuristics.Tiles(16, 32, 4, 1, tma=True) if tma else heuristics.Tiles(16, 32, 4, 1, chunk=64)
        replace(heuristics, "INTERPRETED", tiles)
        if version("triton").startswith("3.5.") and dim == 600:
            dim = 592  # Its interpreter applies TMA's limit for strides in bytes to elements.
    inputs = batch(None, 3, 70, dim, dtype)
    check_relation(*inputs, 0.1, 0.04, "kl", "triton")
    check_info_nce(*inputs, 0.2, "triton")
    check_logsumexp(inputs[0], inputs[2], 0.1, "triton", torch.tensor([0, -1, 69]))


def test_a_variant_compiles_with_a_symbolic_width():
    inputs, name = to_device("triton", *batch(None, 4, 20, 16, torch.float32)), "triton/64x64x4x3"
    run = torch.compile(relation_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(run(*inputs, backend=name), relation_loss(*inputs, backend=name))
    with pytest.raises(ValueError, match="a variant is one of"):
        run(*inputs, backend="triton/fast")


@pytest.mark.parametrize("processors", [slow_if_interpreted(1), 3, slow_if_interpreted(64)])
def test_any_number_of_splits(processors, replace, heuristics, triton):
    """The number of splits changes results by rounding only."""
    inputs = to_device("triton", *batch(2, 5, 300, 24, torch.float32))
    expected = with_gradients(*inputs)
    chip = launching.chip(inputs[0].get_device())._replace(processors=processors)
    scales = triton.kernel_scales([5.0, 5.0])

    def splits(_, k, queue):
        return triton.forward(k, k[:0], queue, scales, None, True)[3]

    splits(*inputs)  # cached, but for the replacements
    replace(launching, "chip", lambda index: chip)
    if INTERPRETED:
        replace(heuristics, "INTERPRETED", heuristics.Tiles(16, 32, 4, 1))
    assert splits(*inputs) == min(processors, 10 if INTERPRETED else 5)  # tiles of 32, or of 64
    for got, want in zip(with_gradients(*inputs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_splits_cover_the_queue_and_fill_the_chip(heuristics):
    chip, tiles = heuristics.Chip(90, 132), heuristics.Tiles(128, 128, 8, 3)
    for rows in (1, 64, 512, 2048, 8192, 12_000):
        for size in (1, 127, 128, 65_536, 65_537, 1_048_576):
            splits, step = heuristics.split_queue(rows, size, 128, tiles, chip)
            assert step % 128 == 0 and (splits - 1) * step < size <= splits * step
            programs = -(-rows // 128) * splits
            if size >= 65_536:
                waves = -(-programs // 132)
                assert programs / (132 * waves) > 0.9, (rows, size, splits)


# -------------------------------------------------------------------------- specialised warps


@pytest.fixture
def specialise(triton, replace, heuristics):
    """Makes forward passes use specialised.py, and records the kernels of both launches."""

    def specialise(name="specialised"):
        if INTERPRETED:
            replace(heuristics, "INTERPRETED", heuristics.Tiles(16, 32, 4, 1))
        kernels, launches = launching.kernels(), []

        class Recorded:
            def __init__(self, name):
                self.name, self.kernel = name, getattr(kernels, name)
                self.arg_names, self.warmup = self.kernel.arg_names, self.kernel.warmup

            def __getitem__(self, grid):
                launches.append((self.name, grid[0]))
                return self.kernel[grid]

        for kernel in ("forward", "specialised"):
            replace(kernels, kernel, Recorded(kernel))
        replace(triton, "_variant", name)
        return launches

    return specialise


hopper_only = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="of Hopper or the interpreter",
)
WARPS = [torch.float32 if INTERPRETED else torch.bfloat16, torch.float16]
DIM = 16 if INTERPRETED else 64


@hopper_only
@pytest.mark.parametrize("dtype", WARPS, ids=str)
@pytest.mark.parametrize(
    ("views", "rows", "size"),
    [(2, 9, 70), slow_if_interpreted(None, 33, 96), slow_if_interpreted(None, 1, 5)],
)
def test_specialised_warps(dtype, views, rows, size, specialise):
    """Blocks and tiles are partly filled, or full, or the only ones; gradients are left out, too."""
    launches = specialise()
    inputs = batch(views, rows, size, DIM, dtype)
    check_relation(*inputs, 0.1, 0.04, "kl", "triton")
    check_info_nce(*inputs, 0.2, "triton")  # all rows in the first stack
    check_logsumexp(inputs[1], inputs[2], 0.1, "triton")
    block = 16 if INTERPRETED else 128
    stacks = rows, rows * (views or 1)
    assert launches[0] == ("specialised", sum(-(-count // block) for count in stacks))
    again = [] if dtype == torch.float16 else ["forward"]  # float16 has no second launch
    assert [name for name, _ in launches] == ["specialised", *again] * (len(launches) // (1 + len(again)))


@hopper_only
@pytest.mark.parametrize("split", [0, 5, 7])
def test_specialised_warps_with_an_empty_stack(split, specialise, triton):
    specialise()
    x, queue = to_device("triton", unit(7, DIM, dtype=WARPS[0]), unit(50, DIM, dtype=WARPS[0]))
    lse, mean = triton.lse_and_mean(x, queue, [5.0, 10.0], split, None, True)
    scale = torch.where(torch.arange(7, device=x.device) < split, 5.0, 10.0)
    logits = scale[:, None] * (x.double() @ queue.double().T)
    torch.testing.assert_close(lse.sum(0).double(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)
    expected = logits.softmax(1) @ queue.double()
    torch.testing.assert_close(mean.double(), expected, rtol=1e-2, atol=1e-5 if INTERPRETED else 1e-3)


@hopper_only
def test_only_inexact_blocks_are_recomputed(specialise, triton, replace):
    dtype, block = WARPS[0], 16 if INTERPRETED else 128
    x, queue = unit(2 * block + 8, DIM, dtype=dtype), unit(1000, DIM, dtype=dtype)
    x[2 * block + 3] = 1000 * queue[7]  # a logit of 25,000
    x, queue = to_device("triton", x, queue)
    launches = specialise()

    def stats():
        launches.clear()
        return shifts(triton, x, queue, 25.0), [name for name, _ in launches]

    class Nothing:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append(("nothing", grid[0]))

        arg_names = launching.kernels().forward.arg_names

    (shift, means), ran = stats()
    replace(launching.kernels(), "forward", Nothing())
    (of_one, first), ran_one = stats()
    assert ran == ["specialised", "forward"] and ran_one == ["specialised", "nothing"]
    assert (of_one == 0).all() and not first[:, 2 * block + 3].isfinite().all()
    assert (shift[:, : 2 * block] == 0).all() and (shift[:, 2 * block :] != 0).all()
    assert torch.equal(means[:, : 2 * block], first[:, : 2 * block]) and means.isfinite().all()


@hopper_only
def test_specialised_warps_with_large_logits(specialise):
    specialise()
    x, queue = unit(3, DIM, dtype=WARPS[0]), unit(100, DIM, dtype=WARPS[0], norm=100.0)
    check_logsumexp(x, queue, 1 / 25, "triton")
    check_relation(x, x, queue, 0.04, 0.01, "kl", "triton")


@hopper_only
def test_specialised_warps_with_an_overflowing_mean(specialise, triton):
    specialise()
    x, queue = torch.zeros(2, DIM, dtype=WARPS[0]), torch.zeros(50, DIM, dtype=WARPS[0])
    queue[:, 0], x[:, 0] = 2.0**50, 2.0**-50  # as above
    x, queue = to_device("triton", x, queue)
    shift, means = shifts(triton, x, queue, 62.0)
    assert (shift != 0).all() and means.isfinite().all()


@hopper_only
@pytest.mark.parametrize("what", ["first", "second", "queue", "exclude"])
def test_unsupported_inputs_use_the_default_kernel(what, specialise, triton):
    launches = specialise()
    tensors = {name: unit(9, DIM, dtype=WARPS[0]) for name in ("first", "second", "queue")}
    exclude = Exclude(to_device("triton", torch.arange(18) % 9), None, None) if what == "exclude" else None
    tensors = {name: to_device("triton", t) for name, t in tensors.items()}
    expected = backends.triton.Triton().forward(*tensors.values(), (5.0, 5.0), exclude, True)
    if exclude is None:  # an address that TMA cannot use
        shifted = tensors[what].new_empty(9 * DIM + 1)[1:].view(9, DIM)
        tensors[what] = shifted.copy_(tensors[what])
    launches.clear()
    got = triton.forward(*tensors.values(), (5.0, 5.0), exclude, True)
    assert [name for name, _ in launches] == ["forward"]
    for one, other in zip(got[:2], expected[:2], strict=True):
        assert torch.equal(one, other)


# -------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("tau", [0.2, 0.005, 1e4])
def test_numbers_and_tensors_are_the_same_temperature(tau):
    inputs = to_device("triton", *batch(None, 5, 300, 40, torch.float32))
    tensor = torch.tensor(tau, device=device("triton"))
    for one, other in zip(with_gradients(*inputs, tau=tau), with_gradients(*inputs, tau=tensor), strict=True):
        # One more rounding of 1 / tau, which logits of up to 200 multiply.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_the_same_without_gradients(dtype):
    q, k, queue = to_device("triton", *batch(2, 5, 300, 40, dtype))
    for one, other in zip(losses(q, k, queue), losses(q.clone().requires_grad_(), k, queue), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- as torch's own ops


@pytest.mark.parametrize(
    "scale", [slow_if_interpreted(([10.0, 25.0], None)), ([], (10.0, 25.0))], ids=["numbers", "device"]
)
def test_opcheck(scale):
    q, k, queue = to_device("triton", unit(2, 5, 16), unit(5, 16), unit(40, 16).mT.contiguous().mT)
    by_value, on_device = scale
    on_device = None if on_device is None else to_device("triton", torch.tensor(on_device))
    ops, check = torch.ops.relssl, torch.library.opcheck
    one = by_value[:1], None if on_device is None else on_device[:1]
    exclude = to_device("triton", torch.tensor([0, -1, 3, 39, -1]))
    for reduction, want in (("mean", True), ("none", False)):
        check(ops.relation.default, (q, k, queue, by_value, on_device, "kl", reduction, want, want, "triton"))
        check(ops.info_nce.default, (q, k, queue, *one, reduction, want, "triton"))
        check(ops.lse_and_mean.default, (k, queue, by_value, on_device, 3, want, "triton", exclude))
    lse, mean = ops.lse_and_mean.default(k, queue, by_value, on_device, 5, True, "triton", exclude)
    g_lse, g_mean = torch.randn_like(lse[0]), torch.randn_like(mean)
    for g, g_row, want_x, want_queue in ((g_mean, g_mean, True, True), (None, None, False, True)):
        arguments = (k, queue, *one, lse, mean, g_lse, g, g_row, want_x, want_queue, "triton", exclude)
        check(ops.lse_and_mean_vjp.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=gpu_only)])
def test_a_variant_compiles(backend):
    """`relssl tune` may choose one."""
    q, k, queue = to_device("triton", *batch(None, 6, 50, 16, torch.float32))

    def loss(name):
        return checks.losses(q, k, queue, backend=name)[0]

    compiled = torch.compile(loss, fullgraph=True, backend=backend)("triton/16x32x4x1")
    torch.testing.assert_close(compiled, loss("triton"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=gpu_only)])
def test_compiled_equals_eager(backend):
    inputs = to_device("triton", *batch(None, 6, 50, 16, torch.float32))
    results = []
    for run in (losses, torch.compile(losses, fullgraph=True, backend=backend)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = run(*leaves)
        results.append((*outputs, *torch.autograd.grad(sum(t.sum() for t in outputs), leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [DTYPES[0], *map(slow_if_interpreted, DTYPES[1:])], ids=str)
def test_bitwise_equal_from_run_to_run(dtype):
    inputs = to_device("triton", *batch(None, 20, 600, 40, dtype))
    for one, other in zip(with_gradients(*inputs), with_gradients(*inputs), strict=True):
        assert torch.equal(one, other)


def test_bad_values_on_a_device_make_nan(triton):
    """A temperature and a row's exclude are not checked there, to avoid a synchronisation."""
    x, queue = to_device("triton", unit(5, 16), unit(40, 16))
    scale = to_device("triton", torch.tensor([float("nan")] * 2))
    lse, mean = triton.lse_and_mean(x, queue, scale, 5, None, True)
    assert lse.isnan().all() and mean.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [3, slow_if_interpreted(64), slow_if_interpreted(100), 1024])
def test_enqueue(dim, dtype):
    """Against torch's own operations, of which test_queue.py has an oracle; versions move as theirs do."""
    for size, count, ids in itertools.product((1, 7, 100), (1, 5, 130), (False, True)):
        queue, plain = (FeatureQueue(size, dim, dtype=dtype, ids=ids) for _ in range(2))
        queue.to(device("triton"))
        for other, layout in (
            (dtype, lambda t: t),
            (torch.float32, lambda t: t.T.contiguous().T),
            (torch.float16, lambda t: t[:1].expand_as(t)),
            (torch.float64, lambda t: torch.cat((t, t), 1)[:, :dim]),
        ):
            keys, key_ids = layout(torch.randn(count, dim).to(other)), torch.arange(2 * count)[::2]
            versions = [t._version for t in queue.buffers()]
            moved = to_device("triton", keys), to_device("triton", key_ids) if ids else None
            queue.enqueue(*moved)
            assert all(t._version > old for t, old in zip(queue.buffers(), versions, strict=True))
            enqueuing._by_torch(plain.rows, plain.ids, plain.pointer, plain.count, keys, key_ids)
            for name, t in plain.state_dict().items():
                assert torch.equal(queue.state_dict()[name].cpu(), t), (size, count, name)
    assert enqueuing._way(queue.rows, queue.ids, queue.pointer, queue.count) is enqueuing._by_triton


def test_opcheck_of_enqueue():
    queue, keys = FeatureQueue(5, 16, ids=True, device=device("triton")), unit(16, 9).T
    arguments = queue.rows, queue.ids, queue.pointer, queue.count, *to_device("triton", keys, torch.arange(9))
    torch.library.opcheck(torch.ops.relssl.enqueue.default, arguments)


def test_enqueue_of_the_queues_own_memory():
    queue = FeatureQueue(5, 16, device=device("triton"))
    before = queue.rows.clone()
    with pytest.raises(RuntimeError, match="keys or ids share memory with the queue"):
        queue.enqueue(queue.rows[2:4])
    assert torch.equal(queue.rows, before) and queue.pointer.item() == 0
    queue.enqueue(queue.rows[2:4].clone())


@gpu_only
def test_enqueue_in_a_cuda_graph():
    queue, plain = FeatureQueue(10, 16, ids=True, device="cuda"), FeatureQueue(10, 16, ids=True)
    keys, ids = torch.zeros(4, 16), torch.zeros(4, dtype=torch.int64)
    given = keys.cuda(), ids.cuda()
    queue.enqueue(*given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        queue.enqueue(*given)
    plain.enqueue(keys, ids)
    for step in range(4):
        for t in (keys, ids, *given):
            t.fill_(step)
        graph.replay()
        plain.enqueue(keys, ids)
    for name, t in plain.state_dict().items():
        assert torch.equal(queue.state_dict()[name].cpu(), t), name


@pytest.mark.parametrize("rows", [1, 4, 11, 16])
def test_the_last_program_to_arrive_adds_up_the_losses(rows):
    total_of = pytest.importorskip("total").total_of
    loss, total, arrived = to_device("triton", torch.randn(rows + 3), torch.zeros(()), torch.zeros(1).int())
    total_of[(rows,)](loss, total, 0.3, arrived)
    assert arrived.item() == rows
    torch.testing.assert_close(total, 0.3 * loss[:rows].sum(), rtol=1e-6, atol=1e-6)
    arrived.fill_(-1)  # One is missing: none is the last.
    total_of[(rows,)](loss, total.fill_(7), 0.3, arrived)
    assert total.item() == 7
