"""Tests each CUDA kernel on a CPU (emulated.py), and on a GPU where there is one."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import checks
import cuda_resources
import emulated
import pytest
import torch
from checks import (
    Excluded,
    batch,
    check_info_nce,
    check_logsumexp,
    check_nt_xent,
    check_relation,
    check_weight,
    to_device,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import unit
from relssl.kernels.heuristics import Chip

from relssl import backends, info
from relssl.functional import queue_logsumexp, relation_loss

DTYPES = [torch.bfloat16, torch.float16]
WIDTHS = [64, 128, 256, 512]
PATHS = [80, 90]  # the capability that a kernel is for


@pytest.fixture(scope="session")
def module():
    return emulated.load(emulated.build())


@pytest.fixture(params=PATHS, ids=lambda path: f"sm_{path}")
def cuda(request, module, monkeypatch):
    """Returns the backend, with each kernel in turn."""
    module.seed(1)
    monkeypatch.setattr(checks, "EMULATED", True)
    return emulated.install(module, monkeypatch.setattr, request.param)


@pytest.fixture(params=PATHS, ids=lambda path: f"sm_{path}")
def on_gpu(request, monkeypatch):
    if request.param == 90:
        checks.ask_for_hoppers_kernel(monkeypatch)
    return backends.BACKENDS["cuda"]


def losses(*inputs, **options):
    return checks.losses(*inputs, backend="cuda", **options)


def with_gradients(q, k, queue, **options):
    leaf = q.clone().requires_grad_()
    outputs = losses(leaf, k, queue, **options)
    return *outputs, *torch.autograd.grad(sum(t.sum() for t in outputs[:3]), leaf)


def check_all(q, k, queue, tau_s=0.1, tau_t=0.04, exclude=None):
    check_relation(q, k, queue, tau_s, tau_t, "kl", "cuda")
    check_info_nce(q, k, queue, tau_s, "cuda")
    check_logsumexp(k, queue, tau_t, "cuda", exclude)


# ----------------------------------------------------------------------------------- against the oracle

# Views, B, K: one row of each; tiles and blocks of rows not filled, filled, and more; a block with rows of
# both stacks, and blocks of one.
SHAPES = [(None, 1, 1), (None, 3, 17), (2, 20, 130), (None, 70, 300), (None, 257, 200)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(cuda, dtype, dim, shape):
    q, k, queue = batch(*shape, dim, dtype)
    exclude = torch.randint(-1, len(queue), (len(k),)) if len(queue) > 1 else None
    check_all(q, k, queue, exclude=exclude)


# Of so many ids; all rows are filled, some, a split has none, none at all.
@pytest.mark.parametrize(("of", "filled"), [(1, None), (3, 290), (400, 70), (2, 0)])
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids(cuda, dtype, dim, of, filled):
    q, k, queue = batch(2, 20, 300, dim, dtype)
    drawn = [torch.randint(-1, of, (n,)) * (2**32 if dim == 64 else 1) for n in (20, 300)]
    excluded = Excluded("cuda", *drawn, filled)
    check_relation(q, k, queue, 0.1, 0.04, "kl", "cuda", excluded=excluded)
    check_info_nce(q, k, queue, 0.2, "cuda", "mean", excluded=excluded)
    check_nt_xent(q[0], k, queue, 0.5, "cuda", excluded=excluded)


def test_logits_below_all_floats(cuda):
    rows = torch.full((3, 64), 1e25).bfloat16()
    assert relation_loss(rows, rows, -rows, backend="cuda").isnan()


@pytest.mark.parametrize("views", [None, 2])
def test_sums_of_rows_and_their_gradients(cuda, views):
    check_weight(*batch(views, 5, 200, 64, torch.bfloat16), "cuda")


@given(st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_drawn_inputs(cuda, data):
    draw = data.draw
    dtype, dim = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(WIDTHS))
    shape = draw(st.sampled_from([None, 1, 3])), draw(st.integers(1, 90)), draw(st.integers(1, 300))
    tau_s, tau_t = (draw(st.floats(0.01, 2.0)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 1000)))
    most = 30.0 if dtype == torch.bfloat16 else 3.0  # larger gradients overflow float16
    norm = draw(st.sampled_from([1.0, 1e-3, most]))
    q, k, queue = batch(*shape, dim, dtype, norm)
    check_relation(q, k, queue, tau_s, tau_t, draw(st.sampled_from(["kl", "ce"])), "cuda", drawn=True)
    check_info_nce(q, k, queue, tau_s, "cuda", drawn=True)
    exclude = torch.randint(-1, len(queue), (len(k),)) if len(queue) > 1 else None
    check_logsumexp(k, queue, tau_t, "cuda", exclude, drawn=True)


# Views, B, K, D that would take too long in emulation. K is the published size and one row more.
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(None, 257, 1000), (2, 33, 4096), (None, 3, 65_537)], ids=str)
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_on_a_gpu(on_gpu, dtype, dim, shape):
    q, k, queue = batch(*shape, dim, dtype)
    check_all(q, k, queue, exclude=torch.randint(-1, len(queue), (len(k),)))


@pytest.mark.parametrize("dim", [64, 512])
@pytest.mark.parametrize(
    ("tau_s", "tau_t", "norm"),
    [
        (0.005, 0.005, 1.0),  # logits of 200: exp overflows float32 unless the maximum is subtracted
        (0.1, 0.04, 100.0),  # logits of 250,000: one-hot teachers
        (1e4, 1e4, 1.0),  # uniform
        (0.005, 50.0, 1.0),  # opposite extremes
    ],
)
def test_extremes(cuda, dim, tau_s, tau_t, norm):
    for dtype in DTYPES:
        check_all(*batch(None, 7, 200, dim, dtype, norm), tau_s, tau_t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_huge_logit_and_equal_ones(cuda, dtype):
    q, k, queue = batch(None, 4, 300, 64, dtype)
    queue[299] = q[1] * 1e3  # the last one, after many small ones
    check_all(q, k, queue)
    check_all(q, k, queue.flip(0))
    check_all(q, k, queue[:1].repeat(200, 1))


# -------------------------------------------------------------------------------------- layouts and values


def transposed(t):
    return t.mT.contiguous().mT


def shifted(t):
    """Returns rows that do not begin at multiples of 16 bytes."""
    store = t.new_zeros(t.numel() + 1)
    return store[1:].view(t.shape).copy_(t)


def with_gaps(t):
    """Returns rows with gaps between them, which are read in place."""
    return t.new_full((t.shape[0], 2 * t.shape[1]), torch.nan)[:, : t.shape[1]].copy_(t)


def expanded(t):
    return t[:1].expand_as(t)


@pytest.mark.parametrize("layout", [transposed, shifted, with_gaps, expanded])
def test_strides(cuda, layout):
    for which in range(3):
        inputs = batch(None, 6, 150, 64, torch.bfloat16)
        inputs = [layout(t) if i == which else t for i, t in enumerate(inputs)]
        check_all(*inputs)


def test_rows_beyond_32_bits(cuda):
    """Rows are 2**29 elements apart: from the fifth on, offsets exceed 32 bits. Few pages are touched."""
    for which in range(3):
        inputs = list(batch(None, 6, 6, 64, torch.bfloat16))
        store = inputs[which].new_empty(2**29 * 5 + 64)
        inputs[which] = store.as_strided((6, 64), (2**29, 1)).copy_(inputs[which])
        check_relation(*inputs, 0.1, 0.04, "kl", "cuda")


def test_nonfinite_rows_affect_only_their_own_results(cuda):
    q, k, queue = batch(None, 40, 200, 64, torch.bfloat16)
    good = losses(q, k, queue)
    q[3, 5], k[7, 0] = torch.nan, torch.inf
    for one, other in zip(losses(q, k, queue), good, strict=True):
        bad = one.flatten(1).isnan().any(1) if one.dim() > 1 else one.isnan()
        assert set(bad.nonzero().flatten().tolist()) <= {3, 7} and bad.any()
        # Rows in the block of a nonfinite one use a running maximum: their p is rounded differently.
        torch.testing.assert_close(one[~bad], other[~bad], rtol=1e-2, atol=1e-2)


def test_an_empty_row(cuda):
    x, queue = unit(2, 64, dtype=torch.bfloat16), unit(1, 64, dtype=torch.bfloat16)
    lse, mean = queue_logsumexp(x, queue, 0.1, exclude=torch.tensor([0, -1]), backend="cuda")
    assert lse[0] == -torch.inf and (mean[0] == 0).all()
    assert lse[1].isfinite() and torch.equal(mean[1], queue[0].float())


def test_float64_rows_for_a_narrower_queue(cuda):
    """Losses are computed in the queue's dtype; a temperature keeps that of q."""
    q, k, queue = batch(None, 5, 150, 64, torch.bfloat16)
    tau = torch.tensor(0.2, dtype=torch.float64)
    for one, other in zip(losses(q.double(), k.double(), queue, tau=tau), losses(q, k, queue), strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tau", [0.2, 0.005, 1e4])
def test_numbers_and_tensors_are_the_same_temperature(cuda, tau):
    inputs = batch(None, 5, 150, 64, torch.bfloat16)
    tensor = torch.tensor(tau)
    for one, other in zip(with_gradients(*inputs, tau=tau), with_gradients(*inputs, tau=tensor), strict=True):
        # One more rounding of 1 / tau, which logits of up to 200 multiply.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [64, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_the_same_without_gradients(cuda, dtype, dim):
    q, k, queue = batch(2, 5, 150, dim, dtype)
    for one, other in zip(losses(q, k, queue), losses(q.clone().requires_grad_(), k, queue), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------- the two paths


def shifts(cuda, x, queue, scale):
    """Returns the shifts and means: a shift is 0 if the first path was exact, else large."""
    (stats, means) = cuda.forward(x, x[:0], queue, cuda.kernel_scales([scale] * 2), None, True)
    return stats[0], means


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shift_of_unit_rows(cuda, dtype):
    shift, _ = shifts(cuda, unit(40, 64, dtype=dtype), unit(300, 64, dtype=dtype), 25.0)
    assert (shift == 0).all() if dtype == torch.bfloat16 else (shift != 0).all()


def test_large_logits_use_a_running_maximum(cuda):
    x, queue = unit(3, 64, dtype=torch.bfloat16), unit(300, 64, dtype=torch.bfloat16)
    queue[7] = x[0]  # a logit of 200
    shift, _ = shifts(cuda, x, queue, 200.0)
    assert (shift[:, 0] != 0).any()
    check_logsumexp(x, queue, 1 / 200, "cuda")


def test_an_overflowing_mean_is_redone(cuda):
    # 2^(c s) is about 2^90 and rows have norm 2^50: their product overflows float32, the mean does not.
    x, queue = torch.zeros(2, 64).bfloat16(), unit(50, 64, dtype=torch.bfloat16)
    queue[:, 0], x[:, 0] = 2.0**50, 2.0**-50
    shift, means = shifts(cuda, x, queue, 62.0)
    assert (shift != 0).all() and means.isfinite().all()
    _, mean = queue_logsumexp(x, queue, 1 / 62, backend="cuda")
    torch.testing.assert_close(mean[:, 0], torch.full((2,), 2.0**50))


def test_float16_keeps_small_probabilities(cuda):
    """Thousands of p are 2^-26 of the largest: if that were 1, they would underflow in float16."""
    x = torch.zeros(1, 64).half()
    x[0, 0] = 1
    queue = torch.zeros(2000, 64).half()
    queue[:, 0], queue[:, 1] = -18.0, 1.0
    queue[0, 0], queue[0, 1] = 0, 0
    _, mean = queue_logsumexp(x, queue, 1.0, backend="cuda")
    expected = 1999 * torch.exp(torch.tensor(-18.0))
    torch.testing.assert_close(mean[0, 1], expected, rtol=2e-2, atol=0)


# ------------------------------------------------------------------------------------ splits and launches


@pytest.mark.parametrize("processors", [1, 2, 64])
def test_any_number_of_splits(cuda, processors, monkeypatch):
    """The number of splits changes results by rounding only."""
    inputs = batch(2, 5, 600, 64, torch.bfloat16)
    expected = with_gradients(*inputs)
    chip = backends.cuda._chip(0)._replace(processors=processors)
    monkeypatch.setattr(backends.cuda, "_chip", lambda index: chip)
    for got, want in zip(with_gradients(*inputs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def partial_results(splits, rows, dim):
    """Returns partials followed by NaN, and in float64 lse, in units of log 2, and mean."""
    stats = torch.rand(3, splits, rows) + torch.tensor([-0.5, 0.5, 0.5])[:, None, None]
    means = torch.full((splits + 40, rows, dim), torch.nan)[:splits].normal_()
    shift, total, divisor = stats.double()
    weight = torch.exp2(10.0 * shift)
    lse = (weight * total).sum(0).log2()
    return (stats, means), lse, (weight[..., None] * means).sum(0) / (weight * divisor).sum(0)[:, None]


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("splits", [1, 33, 128, 256])  # in one load of a group's threads, in two, in all
def test_splits_are_combined(module, monkeypatch, splits, dim):
    cuda = emulated.install(module, monkeypatch.setattr, 80)
    partials, lse, mean = partial_results(splits, 5, dim)
    ln2 = torch.tensor(2.0, dtype=torch.float64).log()
    got, got_mean = torch.full((2, 5), torch.nan), torch.full((5, dim), torch.nan)
    scales = (10.0, 0), (10.0, 0)
    cuda.combine_lse_and_mean(partials, scales, 2, got, got_mean)
    torch.testing.assert_close(got.double().sum(0), lse * ln2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got_mean.double(), mean, rtol=1e-5, atol=1e-6)

    q, k = unit(3, dim).bfloat16(), unit(2, dim).bfloat16()  # rows 0 and 1 of the partials are the teacher's
    loss, entropy, lses = (torch.full(shape, torch.nan) for shape in [(3,), (2,), (2, 5)])
    grad, mean_t = torch.full((3, dim), torch.nan), torch.full((2, dim), torch.nan)
    cuda.combine_relation(
        q, k, scales, partials, partials, 2, "ce", 0.5, False, loss, None, entropy, grad, lses, mean_t
    )  # fmt: skip
    own = [0, 1, 0]  # each student's teacher
    torch.testing.assert_close(
        loss.double(), ln2 * (lse[2:] - 10 * (q * mean[own]).sum(1)), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        entropy.double(), ln2 * (lse[:2] - 10 * (k * mean[:2]).sum(1)), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(grad.double(), 5 * ln2 * (mean[2:] - mean[own]), rtol=1e-5, atol=1e-5)
    assert torch.equal(lses, got) and torch.equal(mean_t, got_mean[:2])

    partials, lse, mean = partial_results(splits, 3, dim)
    sigma, lses = torch.full((3,), torch.nan), torch.full((2, 3), torch.nan)
    cuda.combine_info_nce(q, k, scales[0], partials, 0.5, loss, None, sigma, grad, lses)
    z = ln2 * (lse - 10 * (q.double() * k[own].double()).sum(1))
    torch.testing.assert_close(loss.double(), torch.nn.functional.softplus(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sigma.double(), z.sigmoid(), rtol=1e-5, atol=1e-5)
    expected = 5 * ln2 * z.sigmoid()[:, None] * (mean - k[own].double())
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dim", [pytest.param(d, marks=[pytest.mark.slow] * (d in (128, 256))) for d in WIDTHS]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_schedule_gives_equal_results(cuda, module, dtype, dim):
    inputs = batch(None, 20, 400, dim, dtype)
    module.seed(2)
    expected = with_gradients(*inputs)
    for seed in range(3, 6):
        module.seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(*inputs), expected, strict=True))


def test_a_thread_that_never_set_a_device(cuda):
    """The driver has no context there until device 0 is set, although it is the current one."""
    inputs = batch(None, 5, 100, 64, torch.bfloat16)
    with ThreadPoolExecutor(1) as pool:
        for one, other in zip(pool.submit(losses, *inputs).result(), losses(*inputs), strict=True):
            assert torch.equal(one, other)


def test_launches_use_the_given_device(cuda, module, monkeypatch):
    inputs = batch(None, 5, 100, 64, torch.bfloat16)
    for device in (1, 0):
        monkeypatch.setattr(backends.cuda, "_place", lambda x, device=device: (device, 0))
        losses(*inputs)
        assert (module.launched_on(), module.device()) == (device, 0)
    monkeypatch.setattr(backends.cuda, "_place", lambda x: (2, 0))
    with pytest.raises(RuntimeError, match=r"for 5 rows .* on device 2: invalid device ordinal"):
        losses(*inputs)


@pytest.mark.gpu
def test_a_thread_that_never_set_a_device_on_a_gpu(on_gpu):
    inputs = to_device("cuda", *batch(None, 5, 1000, 64, torch.bfloat16))
    with ThreadPoolExecutor(1) as pool:
        for one, other in zip(pool.submit(losses, *inputs).result(), losses(*inputs), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("version", [12000, 12040, 12050, 13000])
def test_launch_code_compiles_with_each_toolkit(version, tmp_path):
    (tmp_path / "launch.cpp").write_text('#include "launch.h"\n')
    emulated.compile_to(
        tmp_path / "launch.o", tmp_path / "launch.cpp", f"-DCUDART_VERSION={version}", "-fsyntax-only"
    )


def test_opcheck(cuda):
    q, k, queue = unit(2, 5, 64).bfloat16(), unit(5, 64).bfloat16(), unit(40, 64).bfloat16()
    ops, check = torch.ops.relssl, torch.library.opcheck
    exclude = torch.tensor([0, -1, 3, 39, -1])
    for reduction, want in (("mean", True), ("none", False)):
        check(ops.relation.default, (q, k, queue, [10.0, 25.0], None, "kl", reduction, want, want, "cuda"))
        check(ops.info_nce.default, (q, k, queue, [], torch.tensor([10.0]), reduction, want, "cuda"))
        check(ops.lse_and_mean.default, (k, queue, [10.0, 25.0], None, 3, want, "cuda", exclude))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", WIDTHS)
def test_bitwise_equal_from_run_to_run(on_gpu, dim):
    inputs = to_device("cuda", *batch(None, 64, 20_000, dim, torch.bfloat16))
    for one, other in zip(with_gradients(*inputs), with_gradients(*inputs), strict=True):
        assert torch.equal(one, other)


# --------------------------------------------------------------------- unsupported and invalid arguments


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "reason"),
    [
        ("cpu", torch.bfloat16, 128, "NVIDIA GPUs, not on cpu"),
        ("cuda", torch.float32, 128, "not float32"),
        ("cuda", torch.bfloat16, 96, "rows of 64, 128, 256, 512, not of 96"),
        ("cuda", torch.bfloat16, 128, "compute capability 8.0, not 7.5"),
        ("cuda", torch.bfloat16, 512, "135680 bytes of shared memory, this GPU has 101376"),
    ],
)
def test_reasons(module, monkeypatch, device, dtype, dim, reason):
    capability = 75 if "7.5" in reason else 86
    monkeypatch.setattr(backends.cuda, "_cuda", module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends.cuda, "_chip", lambda index: Chip(capability, 100))
    monkeypatch.setattr(backends.cuda, "_shared", lambda index: 101_376)
    monkeypatch.setattr(backends.cuda, "_missing", lambda index: None)
    with pytest.raises(ValueError, match=f"backend 'cuda' cannot run this: .*{reason}"):
        backends.choose("cuda", device, dtype, dim)
    if capability == 86:
        assert backends.choose("cuda", "cuda", torch.float16, 128) == "cuda"


@pytest.mark.parametrize(
    ("toolkit", "driver", "why"),
    [
        (13000, 13010, None),
        (13000, 12080, "13.0, which needs a driver 580 or later, and the driver here is for CUDA 12.8"),
        (12060, 12020, None),  # minor versions are compatible
        (12060, 11080, "12.6, which needs a driver 525 or later, and the driver here is for CUDA 11.8"),
        (14010, 13000, "14.1, which needs a driver for CUDA 14, and the driver here is for CUDA 13.0"),
        (13000, 0, None),
    ],
)
def test_info_reports_an_old_driver(toolkit, driver, why, monkeypatch):
    failed = "CUDA driver version is insufficient for CUDA runtime version"
    found = {"toolkit": toolkit, "driver": lambda: driver, "missing": lambda index: failed}
    monkeypatch.setattr(backends.cuda, "_cuda", SimpleNamespace(architectures="sm_80", **found))
    backends.cuda._missing.cache_clear()
    reason = failed + (f": it was built with CUDA {why}" if why else "")
    assert backends.cuda._missing(0) == reason
    (line,) = (line for line in info.report().splitlines() if line.startswith("CUDA C++"))
    built_with = backends.cuda.built_with()
    assert line == f"CUDA C++ kernels built for sm_80 with {built_with} (cannot run here: {reason})"
    backends.cuda._missing.cache_clear()


def test_not_built(monkeypatch):
    monkeypatch.setattr(backends.cuda, "_cuda", None)
    monkeypatch.setattr(backends.cuda, "missing", "relssl._cuda is not built: no nvcc was found")
    with pytest.raises(ValueError, match=r"backend 'cuda' cannot run this: .*no nvcc was found"):
        backends.choose("cuda", "cuda", torch.bfloat16, 128)


def test_auto_does_not_select_it(monkeypatch):
    """No measurement has shown it to be faster."""
    monkeypatch.setattr(backends.BACKENDS["cuda"], "supports", lambda *arguments: None)
    monkeypatch.setattr(backends.BACKENDS["triton"], "supports", lambda *arguments: None)
    assert backends.choose("auto", "cuda", torch.bfloat16, 128) == "triton"


def test_the_hopper_kernel_is_a_variant(module, monkeypatch):
    cuda, queue, ran = backends.BACKENDS["cuda"], unit(100, 64, dtype=torch.bfloat16), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    emulated.install(module, monkeypatch.setattr, 90)
    monkeypatch.setattr(backends.cuda, "_runnable", lambda wanted, queue: ran.append(wanted) or 90)
    monkeypatch.setattr(checks, "EMULATED", True)
    check_logsumexp(queue[:9], queue, 0.1, "cuda/sm_90a")
    check_logsumexp(queue[:9], queue, 0.1, "cuda")
    assert set(ran[: len(ran) // 2]) == {90} and set(ran[len(ran) // 2 :]) == {80}
    assert cuda.variants(torch.bfloat16, 64) == ["sm_90a"]
    for capability in (80, 100):
        monkeypatch.setattr(backends.cuda, "_chip", lambda index, own=capability: Chip(own, 132))
        assert cuda.variants(torch.bfloat16, 64) == []
        with pytest.raises(ValueError, match=f"needs compute capability 9.0, not {capability / 10}"):
            backends.choose("cuda/sm_90a", "cuda", torch.bfloat16, 64)
    with pytest.raises(ValueError, match="its only variant is sm_90a, not 'sm_70'"):
        backends.choose("cuda/sm_70", "cuda", torch.bfloat16, 64)


def test_overlapping_rows_use_the_sm_80_kernel():
    queue = torch.zeros(10, 64)
    assert backends.cuda._runnable(90, queue) == 90
    assert backends.cuda._runnable(90, queue[:1].expand(10, 64)) == backends.cuda._runnable(80, queue) == 80


# Valid arguments of a forward kernel. The addresses are never read.
GOOD = {
    "place": (0, 0), "path": 80, "first": (4096, 128, 3), "scale_first": (1.0, 0), "second": (0, 128, 0),
    "scale_second": (1.0, 0), "queue": (8192, 128, 100), "dim": 128, "bf16": True, "ids": 0,
    "queue_ids": 0, "filled": 0,
    "splits": 1, "step": 128, "stats": 4096, "means": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"first": (0, 128, 3)}, "x is null"),
        ({"queue": (0, 128, 100)}, "queue is null"),
        ({"stats": 0}, "stats is null"),
        ({"first": (4098, 128, 3)}, "x has rows that do not begin at multiples of 16 bytes"),
        ({"queue": (8192, 129, 100)}, "queue has rows that do not begin at multiples of 16 bytes"),
        ({"queue": (8192, 128, 0)}, "queue has a size out of range: 0"),
        ({"queue": (8192, 128, 2**31)}, "queue has a size out of range: 2147483648"),
        ({"queue": (8192, 0, 2**31 - 500), "splits": 2, "step": 2**30}, "queue is too long"),
        (
            {"first": (4096, 128, 2**31 - 1), "second": (4096, 128, 1)},
            "x has a size out of range: 2147483648",
        ),
        ({"dim": 96}, "there is no kernel for rows of 96"),
        ({"path": 70}, "there is no kernel for sm_70"),
        ({"step": 96}, "1 splits of 96 rows do not cut a queue of 100"),
        ({"splits": 257}, "257 splits of 128 rows do not cut a queue of 100"),
        ({"splits": 2}, "2 splits of 128 rows do not cut a queue of 100"),
    ],
)
def test_invalid_arguments_are_refused(module, changed, message):
    with pytest.raises(ValueError, match=message):
        module.forward(*(GOOD | changed).values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a launch that fails")
def test_an_error_of_cuda_names_the_shape():
    _cuda = pytest.importorskip("relssl._cuda")
    message = "forward kernel for 3 rows of width 128 and a queue of 100 on device 0: CUDA"
    with pytest.raises(RuntimeError, match=message):
        _cuda.forward(*GOOD.values())
    assert "CUDA" in _cuda.missing(0)


# ----------------------------------------------------------------------------------------- compiled code


@pytest.fixture(scope="session")
def compiled():
    file = cuda_resources.extension()
    if file is None or cuda_resources.tools() is None:
        pytest.skip("the CUDA extension is not built, or there is no cuobjdump")
    return list(cuda_resources.kernels(file))


@pytest.mark.slow
@pytest.mark.xdist_group("nvcc")
def test_nothing_is_spilled(compiled):
    built = importlib.import_module("relssl._cuda").architectures
    chips = [name for name in built.split(", ") if name.startswith("sm_")]
    # Two dtypes, with the mean and without; five combinations.
    assert len(compiled) == len(chips) * (4 * len(WIDTHS) + 5) + 4 * len(WIDTHS) * ("sm_90a" in chips)
    assert {r.spilled for r in compiled} == {0}
    assert max(r.shared for r in compiled if r.kernel == "forward_sm80") <= 166_912  # of an A100
    assert max(r.shared for r in compiled) <= 232_448  # of Hopper


@pytest.mark.slow
@pytest.mark.xdist_group("nvcc")
def test_tensor_cores_and_asynchronous_copies_are_used(compiled):
    for r in compiled:
        if r.kernel == "forward_sm80":
            assert (
                r.instructions["HMMA"] >= 64 and r.instructions["LDGSTS"] > 0 and not r.instructions["HGMMA"]
            )
        if r.kernel == "forward_sm90":
            assert (
                r.instructions["HGMMA"] >= 8 and r.instructions["UTMALDG"] > 0 and not r.instructions["HMMA"]
            )
            assert not r.serialized, f"{r}: each product is waited for"
            # Where warpgroups do not share rows, exponentials overlap with the previous product.
            assert r.exposed == 0 or not r.mean or r.dim == 512, f"{r}: exponentials that nothing hides"


@pytest.mark.slow
@pytest.mark.xdist_group("nvcc")
def test_consumers_do_not_delay_others(compiled):
    """Only descriptors and counters are computed between a turn and the first product. Where warpgroups
    share rows (D = 512), a tile is released before the next one's similarities are complete."""
    for r in compiled:
        if r.kernel != "forward_sm90" or not r.mean:
            continue
        sweeps = 2 if r.dtype == "bf16" else 1  # float16 does not try the shift 0
        apart = r.dim != 512
        assert len(r.turns) == 2 * sweeps * apart, f"{r}: turns of all tiles but the last, and of the last"
        assert max(r.turns[::2], default=0) <= 20, f"{r}: work within a turn"
        assert max(r.turns[1::2], default=0) <= 40, f"{r}: work within the last turn of a block"
        assert r.early_releases == sweeps * (not apart), f"{r}: tiles given back late"


@pytest.mark.slow
@pytest.mark.xdist_group("nvcc")
def test_exclude_is_not_loaded_for_every_tile(compiled):
    kernels = [r for r in compiled if r.kernel.startswith("forward")]
    assert {r.waiting_votes for r in kernels} == {0}


@pytest.mark.slow
@pytest.mark.xdist_group("nvcc")
def test_combine_kernels_wait_for_few_loads(compiled):
    """They wait at most 8 times for 128 splits: once for their stats, then for their means, of which each of
    four groups of threads loads a quarter."""
    for r in compiled:
        if r.kernel.startswith("combine"):
            rows = 2 if r.kernel == "combine_relation" else 1  # student's and teacher's at the same time
            assert 1 + 128 / (4 * r.in_flight / rows) <= 8, f"{r}: loads that wait for each other"


@pytest.mark.slow
@pytest.mark.xdist_group("nvcc")
def test_docs_list_every_kernel(compiled):
    """Registers are not compared, since they depend on the version of nvcc."""
    built = importlib.import_module("relssl._cuda").architectures
    if built != "sm_80, sm_90a, compute_90":
        pytest.skip("built for other GPUs than the docs list")
    listed = set()
    for line in (emulated.ROOT / "docs/cuda.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9 and cells[0].startswith(("forward", "combine")):
            listed.add((*cells[:5], cells[6]))
    found = {
        (r.kernel, r.chip, r.dtype, str(r.dim or "any"), "yes" if r.mean else "no", str(r.spilled))
        for r in compiled
    }
    assert listed == found
