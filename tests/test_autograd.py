"""Tests derivatives of any order, under torch.func and autocast, and with a queue that changes."""

import pytest
import torch
from oracle import clusters, relation, unit
from oracle import info_nce as exact_info_nce
from torch.autograd import gradcheck, gradgradcheck

from relssl import FeatureQueue
from relssl.functional import (
    cluster_contrast,
    cluster_loss,
    info_nce,
    nt_xent,
    queue_logsumexp,
    relation_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["chunked", "reference"]  # those that support float64


def leaves(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def batch(*lead, rows=3, size=7, dim=4):
    return unit(*lead, rows, dim), unit(rows, dim), unit(size, dim)


TAU_S, TAU_T = torch.tensor(0.7), torch.tensor(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["kl", "ce"])
@pytest.mark.parametrize("lead", [(), (2,)], ids=["one view", "two views"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_relation_loss_to_second_order(backend, form, lead, reduction):
    def loss(q, k, queue, tau_s, tau_t):
        return relation_loss(
            q, k, queue, student_temperature=tau_s, teacher_temperature=tau_t,
            form=form, reduction=reduction, backend=backend,
        )  # fmt: skip

    inputs = leaves(*batch(*lead), TAU_S, TAU_T)
    assert gradcheck(loss, inputs) and gradgradcheck(loss, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_info_nce_to_second_order(backend):
    def loss(q, k, queue, tau):
        return info_nce(q, k, queue, temperature=tau, backend=backend)

    inputs = leaves(*batch(2), TAU_S)
    assert gradcheck(loss, inputs) and gradgradcheck(loss, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("negatives", [False, True], ids=["batch", "queue"])
def test_nt_xent_to_second_order(backend, reduction, negatives):
    def loss(z1, z2, tau, queue=None):
        return nt_xent(z1, z2, temperature=tau, queue=queue, reduction=reduction, backend=backend)

    z1, z2, queue = batch()
    inputs = leaves(z1, z2, TAU_S, *([queue] if negatives else []))
    assert gradcheck(loss, inputs) and gradgradcheck(loss, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [cluster_contrast, cluster_loss])
def test_clusters_to_second_order(backend, loss):
    def run(p1, p2, tau):
        return loss(p1, p2, temperature=tau, backend=backend)

    inputs = leaves(*(torch.randn(5, 3).softmax(1) for _ in range(2)), TAU_S)
    assert gradcheck(run, inputs) and gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queue_logsumexp_to_second_order(backend):
    exclude = torch.tensor([0, -1, 6])

    def both(x, queue, tau):
        return queue_logsumexp(x, queue, tau, exclude=exclude, backend=backend)

    inputs = leaves(*batch()[1:], TAU_S)
    assert gradcheck(both, inputs) and gradgradcheck(both, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [relation_loss, info_nce])
def test_enqueue_before_backward_changes_nothing(backend, loss):
    """The gradients of keys and temperature must come from the old queue, too."""
    q, k, _ = batch(rows=8, dim=16)
    grads = []
    for enqueue in (False, True):
        queue = FeatureQueue(16, 16)
        ours = [t.clone().requires_grad_() for t in (q, k)]
        value = loss(*ours, queue, backend=backend)
        if enqueue:
            queue.enqueue(k)
        value.backward()
        grads.append([t.grad for t in ours])
    for before, after in zip(*grads, strict=True):
        assert torch.equal(before, after) and before.norm() > 0


def test_double_backward_after_an_enqueue_raises():
    q, k, _ = batch(rows=8, dim=16)
    queue = FeatureQueue(16, 16)
    q.requires_grad_()
    losses = {
        "relation": relation_loss(q, k, queue),
        "info_nce": info_nce(q, k, queue),
        "lse": queue_logsumexp(q, queue, 0.1)[0].sum(),
    }
    mean = queue_logsumexp(q, queue, 0.1)[1].sum()
    (first,) = torch.autograd.grad(losses["relation"], q, create_graph=True, retain_graph=True)
    assert first.requires_grad
    queue.enqueue(k)
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="queue has changed since the forward pass"):
            torch.autograd.grad(loss, q, create_graph=True, retain_graph=True)
        assert torch.isfinite(torch.autograd.grad(loss, q)[0]).all()  # of the old queue
    with pytest.raises(RuntimeError, match="queue has changed since the forward pass"):
        mean.backward()


def test_changed_queue_that_requires_grad_raises():
    q, k, queue = batch(rows=8, dim=16)
    queue.requires_grad_()
    loss = relation_loss(q, k, queue)
    with torch.no_grad():
        queue[0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("wants", ["q", "all"])
def test_backward_twice_with_another_factor(wants):
    """Saved gradients must not be scaled in place: backward runs with grad_output 3 and then 1."""
    q, k, queue = (t.requires_grad_(wants == "all" or i == 0) for i, t in enumerate(batch(rows=5, dim=8)))
    inputs = [t for t in (q, k, queue) if t.requires_grad]
    loss = relation_loss(q, k, queue)
    tripled = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(tripled, once, again, strict=True):
        torch.testing.assert_close(a, 3 * b)
        assert torch.equal(b, c)


def test_loss_scale_is_applied_before_16_bit_rounding():
    """Gradients of 1e-7 and less underflow in float16, unless they are multiplied by 65,536 first."""
    q, k, queue = (t.half() for t in batch(rows=64, size=100, dim=16))
    q.requires_grad_()
    weight = 1e-5
    (scaled,) = torch.autograd.grad(weight * 65536 * relation_loss(q, k, queue), q)
    exact = q.detach().double().requires_grad_()
    value, _ = relation(exact, k.double(), queue.double(), 0.1, 0.04, "kl")
    (want,) = torch.autograd.grad(weight * value.mean(), exact)
    assert want.abs().median() < 2e-6
    error = (scaled.double() / 65536 - want).norm() / want.norm()
    assert error < 1e-3  # a rounding to float16 is 5e-4 at most


def test_torch_func():
    q, k, queue = (t.double() for t in batch(2, rows=5, dim=8))
    flat = q[0]

    def ours(x):
        return relation_loss(x, k, queue)

    def exact(x):
        return relation(x, k, queue, 0.1, 0.04, "kl")[0].mean()

    torch.testing.assert_close(torch.func.grad(ours)(flat), torch.func.grad(exact)(flat))
    torch.testing.assert_close(torch.func.vmap(ours)(q), torch.stack([exact(x) for x in q]))
    tangent = torch.randn_like(flat)
    found = torch.func.jvp(ours, (flat,), (tangent,))
    wanted = torch.func.jvp(exact, (flat,), (tangent,))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.func.hessian(ours)(flat), torch.func.hessian(exact)(flat))
    per_sample = torch.func.vmap(torch.func.grad(lambda x, y: info_nce(x[None], y[None], queue)))
    again = flat.clone().requires_grad_()
    exact_info_nce(again, k, queue, 0.2).sum().backward()
    torch.testing.assert_close(per_sample(flat, k), again.grad)


def test_torch_func_of_clusters():
    p = torch.randn(3, 6, 4).double().softmax(2)

    def ours(x):
        return cluster_loss(x, p[0], temperature=0.7)

    def exact(x):
        return clusters(x, p[0], 0.7, True)

    per_batch = torch.func.vmap(torch.func.grad(ours))(p)
    torch.testing.assert_close(per_batch, torch.stack([torch.func.grad(exact)(x) for x in p]))
    torch.testing.assert_close(torch.func.hessian(ours)(p[1]), torch.func.hessian(exact)(p[1]))


@pytest.mark.parametrize("backend", ["cpu", *BACKENDS])
def test_clusters_under_autocast(backend):
    """The products are of bfloat16's columns, with sums in float32; all else is float32."""
    p1, p2 = (torch.randn(20, 6).softmax(1).requires_grad_() for _ in range(2))
    exact = cluster_loss(p1, p2, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cluster_loss(p1, p2, backend=backend)
    assert loss.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=0)
    for got, want in zip(*(torch.autograd.grad(t, (p1, p2)) for t in (loss, exact)), strict=True):
        assert got.dtype == torch.float32 and (got - want).norm() < 2e-2 * want.norm()


def test_forward_mode():
    from torch.autograd import forward_ad

    q, k, queue = (t.double() for t in batch(rows=5, dim=8))
    tangent = torch.randn_like(q)
    with forward_ad.dual_level():
        loss = relation_loss(forward_ad.make_dual(q, tangent), k, queue)
        derivative = forward_ad.unpack_dual(loss).tangent
    q.requires_grad_()
    (grad,) = torch.autograd.grad(relation_loss(q, k, queue), q)
    torch.testing.assert_close(derivative, (grad * tangent).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [relation_loss, info_nce])
def test_autocast_computes_in_its_dtype_and_gives_float32(backend, loss):
    q, k, queue = batch(rows=6, size=50, dim=32)
    rounded = [t.bfloat16().float() for t in (q, k, queue)]
    values, grads = [], []
    for inputs, on in (((q, k, queue), True), (rounded, False)):
        x = inputs[0].clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            value = loss(x, *inputs[1:], backend=backend)
            if backend != "reference":  # Eager code must run backward outside autocast.
                (grad,) = torch.autograd.grad(value, x)
        if backend == "reference":
            (grad,) = torch.autograd.grad(value, x)
        values.append(value)
        grads.append(grad)
    assert values[0].dtype == grads[0].dtype == torch.float32
    # The same values, sums in float32, and a float32 gradient that was never rounded to bfloat16.
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


def test_autocast_leaves_float64_alone():
    q, k, queue = (t.double() for t in batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = relation_loss(q, k, queue)
    assert inside.dtype == torch.float64 and torch.equal(inside, relation_loss(q, k, queue))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_queue_determines_the_dtype(dtype):
    q, k, queue = batch(rows=6, size=50, dim=32)
    ours = q.clone().requires_grad_()
    # Chunked keeps p in float32. The C++ kernel rounds it to bfloat16 where the CPU multiplies that.
    value = relation_loss(ours, k, queue.to(dtype), backend="chunked")
    value.backward()
    exact = q.to(dtype).double().requires_grad_()
    want = relation(exact, k.to(dtype).double(), queue.to(dtype).double(), 0.1, 0.04, "kl")[0].mean()
    want.backward()
    assert value.dtype == ours.grad.dtype == torch.float32
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    q, k, queue = batch(rows=6, size=50, dim=32)
    q.requires_grad_()
    loss, entropy = relation_loss(q, k, queue, return_entropy=True)
    with mode():
        again, other = relation_loss(q, k, queue, return_entropy=True)
        lse, mean = queue_logsumexp(k, queue, 0.1)
    assert not again.requires_grad and lse.shape == (6,) and mean.shape == (6, 32)
    torch.testing.assert_close((again, other), (loss.detach(), entropy))
    assert loss.requires_grad and not entropy.requires_grad


def test_inference_tensors_as_queue():
    """They have no version counter: the first order works, the second raises."""
    q, k, _ = batch(rows=6, dim=32)
    with torch.inference_mode():
        queue = unit(50, 32)
    q.requires_grad_()
    loss = relation_loss(q, k, queue)
    with pytest.raises(RuntimeError, match="must read the queue again"):
        torch.autograd.grad(loss, q, create_graph=True, retain_graph=True)
    loss.backward()
    assert q.grad.norm() > 0


# --------------------------------------------------------------------- the gradient of q, rounded once


LOSSES = pytest.mark.parametrize("loss", [relation_loss, info_nce])


@LOSSES
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_16_bit_gradient_is_the_product_rounded_once(reduction, backend, loss):
    q, k, queue = (t.bfloat16() for t in batch(2, rows=5, size=50, dim=32))
    g = torch.rand((2, 5) if reduction == "none" else ()) + 0.5
    grads = []
    for leaf in (q.clone(), q.float()):  # of float32 rows, which are cast: the product as it is
        leaf.requires_grad_()
        loss(leaf, k, queue, reduction=reduction, backend=backend).backward(g)
        grads.append(leaf.grad)
    assert grads[0].dtype == torch.bfloat16 and torch.equal(grads[0], grads[1].bfloat16())


@LOSSES
def test_float16_gradients_keep_their_digits_until_the_loss_is_scaled_back(loss):
    """Gradients of 1e-7 have one digit in float16: a GradScaler's factor must precede the rounding."""
    q, k, queue = (t.half() for t in batch(rows=64, size=50, dim=32))
    name = "temperature" if loss is info_nce else "student_temperature"
    how = {name: 2000.0, "backend": "chunked"}
    exact = q.double().requires_grad_()
    loss(exact, k.double(), queue.double(), **how).backward()
    assert exact.grad.abs().median() < 1e-6
    ours = q.clone().requires_grad_()
    (loss(ours, k, queue, **how) * 65536).backward()
    torch.testing.assert_close(ours.grad.double() / 65536, exact.grad, rtol=2e-3, atol=1e-9)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand_as(t),
}


@LOSSES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bit_gradients_of_any_layout(layout, loss):
    q, k, queue = (t.bfloat16() for t in batch(rows=5, size=50, dim=32))
    q = LAYOUTS[layout](q)
    (grad,) = torch.autograd.grad(loss(q.requires_grad_(), k, queue), q)
    plain = q.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    (expected,) = torch.autograd.grad(loss(plain, k, queue), plain)
    assert grad.shape == q.shape and torch.equal(grad, expected)


@LOSSES
def test_16_bit_gradients_of_many_cotangents_at_once(loss):
    q, k, queue = (t.bfloat16() for t in batch(rows=5, size=50, dim=32))
    rows = loss(q.requires_grad_(), k, queue, reduction="none")
    (grads,) = torch.autograd.grad(rows, q, torch.eye(5), is_grads_batched=True, retain_graph=True)
    for g, grad in zip(torch.eye(5), grads, strict=True):
        torch.testing.assert_close(grad, torch.autograd.grad(rows, q, g, retain_graph=True)[0])


def test_an_unused_loss_has_no_gradient():
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    q, k, queue = batch(rows=5)
    q.requires_grad_()
    Nothing.apply(relation_loss(q, k, queue)).backward()
    assert q.grad is None
