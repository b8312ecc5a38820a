"""Compares the losses of the package with the oracle, and parametrizes tests."""

import os

import pytest
import torch
from oracle import (
    agree,
    cluster_scales,
    clusters,
    cotangents_like,
    info_nce,
    info_nce_scales,
    largest_logit,
    left_of,
    logsumexp,
    logsumexp_scales,
    nt_xent,
    nt_xent_scales,
    relation,
    relation_scales,
    unit,
)

from relssl import FeatureQueue, backends
from relssl.functional import cluster_contrast, cluster_loss, queue_logsumexp, relation_loss
from relssl.functional import info_nce as our_info_nce
from relssl.functional import nt_xent as our_nt_xent

EMULATED = False  # set by tests while the CUDA kernels run on the CPU (emulated.py)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on the CPU
BACKENDS = ["cpu", "chunked", "reference", "triton"]


def device(backend):
    gpu = {"triton": not INTERPRETED, "cuda": not EMULATED}
    return "cuda" if gpu.get(backend) else "cpu"


def to_device(backend, *tensors):
    """Moves tensors to the device that the backend computes on."""
    moved = [t.to(device(backend)) for t in tensors]
    return moved if len(moved) > 1 else moved[0]


def marked(*values, backend):
    """Returns a pytest parameter, skipped without a GPU if the backend needs one."""
    return pytest.param(*values, marks=[pytest.mark.gpu] * (device(backend) == "cuda"))


def slow_if_interpreted(*values):
    """Returns a pytest parameter, which is slow in Triton's interpreter alone."""
    return pytest.param(*values, marks=[pytest.mark.slow] * INTERPRETED)


def backends_of(*names):
    return pytest.mark.parametrize("backend", [marked(name, backend=name) for name in names])


def every(*dtypes):
    """Parametrizes a test by the dtypes, each with every backend that supports it."""

    def takes(name, dtype):
        if device(name) == "cuda":
            return dtype != torch.float64
        return backends.BACKENDS[name].supports("cpu", dtype, 8) is None

    pairs = [marked(d, b, backend=b) for b in BACKENDS for d in dtypes if takes(b, d)]
    return pytest.mark.parametrize(("dtype", "backend"), pairs, ids=str)


def reduced(rows, reduction):
    return rows if reduction == "none" else getattr(rows, reduction)()


def temperature(value, like):
    return torch.tensor(value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def weigh(shape, reduction):
    """Returns a cotangent of the reduced loss, the rows' cotangents, and the norm of as many ones."""
    (g,) = cotangents_like(shape if reduction == "none" else ())
    rows = shape.numel()
    if reduction == "none":
        return g, g, rows**0.5
    weight, ones = (1, rows) if reduction == "sum" else (1 / rows, 1)
    return g, (g * weight).expand(shape), ones


class Excluded:
    """What is left out of a queue [K, D]: rows of the same id, and those behind the first `filled` ones."""

    def __init__(self, backend, ids, queue_ids, filled=None):
        self.rows = left_of(len(queue_ids), ids, queue_ids, filled=filled)
        self.ids, self.queue_ids = to_device(backend, ids, queue_ids)
        self.filled = filled

    def arguments(self, rows):
        """Returns the queue, which shares the rows, and other arguments, as a caller gives them."""
        if self.filled is None:
            return rows, {"ids": self.ids, "queue_ids": self.queue_ids}
        queue = FeatureQueue(*rows.shape, dtype=rows.dtype, device=rows.device, ids=True, start="empty")
        queue.rows, queue.ids = rows, self.queue_ids
        queue.count.fill_(self.filled)
        return queue, {"ids": self.ids}


def arguments(excluded, rows):
    return (rows, {}) if excluded is None else excluded.arguments(rows)


def check_relation(q, k, queue, tau_s, tau_t, form, backend, reduction="none", drawn=False, excluded=None):
    q, k, queue = to_device(backend, q, k, queue)
    left = excluded and excluded.rows
    g, weights, ones = weigh(q.shape[:-1], reduction)

    def ours(q, k, queue, tau_s, tau_t):
        queue, others = arguments(excluded, queue)
        return relation_loss(
            q, k, queue, student_temperature=tau_s, teacher_temperature=tau_t,
            form=form, reduction=reduction, backend=backend, **others,
        )  # fmt: skip

    agree(
        ours,
        lambda q, k, queue, tau_s, tau_t: reduced(
            relation(q, k, queue, tau_s, tau_t, form, left)[0], reduction
        ),
        {
            "q": q, "k": k, "queue": queue,
            "tau_s": temperature(tau_s, q), "tau_t": temperature(tau_t, q),
        },
        [g], relation_scales(q, k, queue, tau_s, tau_t, weights, ones), q.dtype,
        largest_logit((q, tau_s), (k, tau_t), queue=queue), drawn,
    )  # fmt: skip


def check_info_nce(q, k, queue, tau, backend, reduction="none", drawn=False, excluded=None):
    q, k, queue = to_device(backend, q, k, queue)
    left = excluded and excluded.rows
    g, weights, ones = weigh(q.shape[:-1], reduction)

    def ours(q, k, queue, tau):
        queue, others = arguments(excluded, queue)
        return our_info_nce(q, k, queue, temperature=tau, reduction=reduction, backend=backend, **others)

    agree(
        ours,
        lambda q, k, queue, tau: reduced(info_nce(q, k, queue, tau, left), reduction),
        {"q": q, "k": k, "queue": queue, "tau": temperature(tau, q)},
        [g], info_nce_scales(q, k, queue, tau, weights, ones), q.dtype,
        largest_logit((q, tau), queue=torch.cat((queue, k))), drawn,
    )  # fmt: skip


def check_nt_xent(z1, z2, queue, tau, backend, reduction="none", drawn=False, excluded=None):
    z1, z2 = to_device(backend, z1, z2)
    left = excluded and excluded.rows
    inputs = {"z1": z1, "z2": z2, "tau": temperature(tau, z1)}
    if queue is not None:
        inputs["queue"] = to_device(backend, queue)
    g, weights, ones = weigh(torch.Size([2 * len(z1)]), reduction)

    def ours(z1, z2, tau, queue=None):
        queue, others = arguments(excluded, queue)
        return our_nt_xent(
            z1, z2, temperature=tau, queue=queue, reduction=reduction, backend=backend, **others
        )

    agree(
        ours,
        lambda z1, z2, tau, queue=None: reduced(nt_xent(z1, z2, queue, tau, left), reduction),
        inputs, [g], nt_xent_scales(z1, z2, queue, tau, weights, ones), z1.dtype,
        largest_logit((z1, tau), (z2, tau), queue=torch.cat([z1, z2, inputs.get("queue", z1)])), drawn,
    )  # fmt: skip


def check_clusters(p1, p2, tau, penalize, backend, drawn=False):
    p1, p2 = to_device(backend, p1, p2)
    (g,) = cotangents_like(())
    ours = cluster_loss if penalize else cluster_contrast
    agree(
        lambda p1, p2, tau: ours(p1, p2, temperature=tau, backend=backend),
        lambda p1, p2, tau: clusters(p1, p2, tau, penalize),
        {"p1": p1, "p2": p2, "tau": temperature(tau, p1)},
        [g], cluster_scales(p1, p2, tau, penalize, g), p1.dtype, 1 / tau, drawn,
    )  # fmt: skip


def check_logsumexp(x, queue, tau, backend, exclude=None, drawn=False, excluded=None):
    x, queue = to_device(backend, x, queue)
    left = excluded and excluded.rows
    if exclude is not None:
        left, exclude = left_of(len(queue), exclude=exclude), to_device(backend, exclude)
    g = cotangents_like(x.shape[:1], x.shape)

    def ours(x, queue, tau):
        queue, others = arguments(excluded, queue)
        return queue_logsumexp(x, queue, tau, exclude=exclude, backend=backend, **others)

    agree(
        ours,
        lambda x, queue, tau: logsumexp(x, queue, tau, left),
        {"x": x, "queue": queue, "tau": temperature(tau, x)},
        g, logsumexp_scales(x, queue, tau, *g), x.dtype,
        largest_logit((x, tau), queue=queue), drawn,
    )  # fmt: skip


def check_weight(q, k, queue, backend):
    """Compares a backend's weighted sums, and their gradients of q, with the losses of the rows."""
    q, k, queue, tensor = to_device(backend, q, k, queue, torch.tensor([5.0]))
    own = backends.BACKENDS[backend]
    for run in (
        lambda *how: own.relation(q, k, queue, [10.0, 25.0], "kl", *how)[::2],
        lambda *how: own.info_nce(q, k, queue, tensor, *how)[::2],
    ):
        rows, grad, *_ = run(None, True)
        assert rows.shape == q.shape[:-1] and grad.shape == q.shape
        for weight in (1 / rows.numel(), 1.0, 0.3)[2 * INTERPRETED :]:
            total, weighted, *_ = run(weight, True)
            exact = weight * rows.double().sum()
            torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=1e-6 * weight)
            torch.testing.assert_close(weighted, weight * grad, rtol=1e-6, atol=0)
        alone, none, *_ = run(weight, False)
        torch.testing.assert_close(alone, total, rtol=1e-5, atol=1e-6)
        assert total.shape == alone.shape == () and none.shape == (rows.numel(), 0)


def losses(q, k, queue, backend, tau=0.2, exclude=None):
    """Returns each loss without reduction, and lse and mean."""
    how = {"reduction": "none", "backend": backend}
    return (
        relation_loss(q, k, queue, student_temperature=tau, **how),
        relation_loss(q, k, queue, form="ce", teacher_temperature=tau, **how),
        our_info_nce(q, k, queue, temperature=tau, **how),
        *queue_logsumexp(k, queue, tau, exclude=exclude, backend=backend),
    )


def ask_for_hoppers_kernel(monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a kernel for Hopper alone")
    monkeypatch.setattr(backends.cuda, "_path", lambda wanted, queue: 90)


def batch(views, rows, size, dim, dtype, norm=1.0):
    q = unit(*(() if views is None else (views,)), rows, dim, dtype=dtype, norm=norm)
    return q, unit(rows, dim, dtype=dtype, norm=norm), unit(size, dim, dtype=dtype, norm=norm)
