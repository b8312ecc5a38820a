"""Tests every backend on a GPU: CUDA graphs, streams, devices, synchronisation, memory, sizes."""

import pytest
import torch
from checks import ask_for_hoppers_kernel, batch, check_info_nce, check_logsumexp, check_relation, to_device
from peers import replayed

from relssl.functional import info_nce, queue_logsumexp, relation_loss

pytestmark = pytest.mark.gpu
BACKENDS = ["triton", "cuda", "cuda-sm_90a"]
WIDTHS = {"triton": [64, 128, 256, 512, 1024], "cuda": [64, 128, 256, 512]}
LARGE_LOGITS = 40, 1000  # B, K
PUBLISHED = 64, 65_536, 128  # B, K, D


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    name, _, kernel = request.param.partition("-")
    if kernel:
        ask_for_hoppers_kernel(monkeypatch)
    return name


def each(*widths):
    """Parametrizes a test by backend, its widths (or those given) and its dtypes."""
    cases = []
    for name in BACKENDS:
        dtypes = [torch.bfloat16, torch.float16] + [torch.float32] * (name == "triton")
        dims = widths or WIDTHS[name.partition("-")[0]]
        cases += [(name, dim, dtype) for dim in dims for dtype in dtypes]
    return pytest.mark.parametrize(("backend", "dim", "dtype"), cases, ids=str, indirect=["backend"])


def step(q, k, queue, backend):
    loss = relation_loss(q, k, queue, backend=backend)
    return loss, *torch.autograd.grad(loss, q)


def inputs(rows, size, dim, dtype=torch.bfloat16):
    q, k, queue = to_device("cuda", *batch(None, rows, size, dim, dtype))
    return q.requires_grad_(), k, queue


def test_a_graph_replays(backend):
    q, k, queue = inputs(64, 4096, 128)
    replay = replayed(lambda: step(q, k, queue, backend))
    with torch.no_grad():
        q.copy_(inputs(64, 1, 128)[0])
    for found, eager in zip(replay(), step(q, k, queue, backend), strict=True):
        assert torch.equal(found, eager)


def test_work_goes_to_the_current_stream(backend):
    """Earlier work on it comes first: here half a second, and then the keys."""
    q, k, queue = inputs(64, 4096, 128)
    expected = step(q, k, queue, backend)
    late = torch.zeros_like(k)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(1_000_000_000)
        late.copy_(k)
        got = step(q, late, queue, backend)
    torch.cuda.synchronize()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_goes_to_the_device_of_its_tensors(backend):
    q, k, queue = inputs(64, 4096, 128)
    expected = step(q, k, queue, backend)
    moved = [t.detach().to("cuda:1") for t in (q, k, queue)]
    got = step(moved[0].requires_grad_(), *moved[1:], backend)
    assert torch.cuda.current_device() == 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu())


def test_compiled_equals_eager(backend):
    q, k, queue = inputs(64, 4096, 128)
    compiled = torch.compile(lambda q: relation_loss(q, k, queue, backend=backend), fullgraph=True)
    loss = compiled(q)
    for one, other in zip((loss, *torch.autograd.grad(loss, q)), step(q, k, queue, backend), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_synchronisation(backend):
    q, k, queue = inputs(64, 4096, 128)

    def run():
        step(q, k, queue, backend)
        info_nce(q, k, queue, backend=backend).backward()
        queue_logsumexp(q, queue, 0.1, backend=backend)[0].sum().backward()

    run()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each(PUBLISHED[-1])
def test_the_published_size(backend, dim, dtype):
    """All splits and blocks are checked."""
    q, k, queue = batch(None, *PUBLISHED, dtype)
    check_relation(q, k, queue, 0.1, 0.04, "kl", backend)
    check_info_nce(q, k, queue, 0.2, backend)


@each()
def test_large_logits_at_every_width(backend, dim, dtype):
    """Each width has its own tiles and instructions; forward and backward must compute the same logits."""
    x, _, queue = batch(None, *LARGE_LOGITS, dim, dtype, norm=100.0)
    check_logsumexp(x, queue, 0.005, backend)
    check_relation(x, x.flip(0), queue, 0.1, 0.04, "kl", backend)


def test_little_memory(backend):
    q, k, queue = inputs(256, 1_048_576, 128)
    step(q, k, queue, backend)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(q, k, queue, backend)
    assert torch.cuda.max_memory_allocated() - before <= 64 << 20
