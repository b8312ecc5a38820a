"""The losses. Each is a few lines over one primitive, the log-partition function of a queue.

Let the queue hold rows m_j. With A(theta) = log sum_j exp<theta, m_j>, grad A(theta) = sum_j p_j m_j is
the softmax-weighted mean of the queue, and ReSSL's relation loss is the Bregman divergence of A. Nothing
of the size batch x queue is ever needed, and the gradient costs no second pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload
from warnings import warn

from torch import Tensor
from torch.compiler import is_compiling

from relssl import backends, clusters, dispatch, grouped, in_batch, ops, unit_norm
from relssl.autograd import reduce
from relssl.backends.common import Temperature, accumulator, device_type, to_dtype
from relssl.groups import Group
from relssl.queue import FeatureQueue
from relssl.unit_norm import normalized, warn_unless_unit
from relssl.validation import (
    check_choice,
    check_exclude,
    check_logsumexp,
    check_pair,
    check_views,
    queue_rows,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Form = Literal["kl", "ce"]
Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = "mean", "sum", "none"


@overload
def relation_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | FeatureQueue,
    *,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    student_temperature: Temperature = 0.1,
    teacher_temperature: Temperature = 0.04,
    form: Form = "kl",
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_entropy: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def relation_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | FeatureQueue,
    *,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    student_temperature: Temperature = 0.1,
    teacher_temperature: Temperature = 0.04,
    form: Form = "kl",
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_entropy: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
@overload
def relation_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | FeatureQueue,
    *,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    student_temperature: Temperature = 0.1,
    teacher_temperature: Temperature = 0.04,
    form: Form = "kl",
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_entropy: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def relation_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | FeatureQueue,
    *,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    student_temperature: Temperature = 0.1,
    teacher_temperature: Temperature = 0.04,
    form: Form = "kl",
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """ReSSL's relation loss between a student's queries and a teacher's keys over a queue.

    With theta_s = q / student_temperature, theta_t = k / teacher_temperature and p = softmax_j <theta, m_j>:

        kl = KL(p_t || p_s) = A(theta_s) - A(theta_t) - <theta_s - theta_t, grad A(theta_t)>
        ce = H(p_t, p_s)    = A(theta_s) - <theta_s, grad A(theta_t)>  = kl + H(p_t)
        d/dq                = (grad A(theta_s) - grad A(theta_t)) / student_temperature

    "ce" is the value that ReSSL's published code reports; for q both have the same gradient.
    (Zheng et al., ReSSL: Relational Self-Supervised Learning with Weak Augmentation, NeurIPS 2021.)

    Any finite input is accepted; rows are normalised with normalize=True alone. A UserWarning is given, once
    in a process, if the first calls' rows clearly lack norm 1 with a temperature below 1, where that is free
    to see: on a CPU, in eager code. The gradient is computed in the forward
    pass: enqueueing before backward is safe unless the queue requires grad. Double backward recomputes
    the loss in eager code and raises RuntimeError if the queue has changed since. Activation checkpointing
    runs the forward pass again in backward: around this loss, enqueue after backward. Otherwise
    checkpoint(..., use_reentrant=False) raises RuntimeError; use_reentrant=True does not detect it, and the
    gradient is the changed queue's. Nor is it detected where the queue is made inside the checkpoint, as by
    rows.clone(), or where the loss is compiled.

    Args:
        q: student embeddings, [B, D], or [V, B, D] for V student views of one teacher view.
        k: teacher embeddings, [B, D], cast to q's dtype. Detach them where the teacher is not trained.
        queue: [K, D], or a FeatureQueue. Any strides. The rows of FeatureQueue(start="empty") that have not
            been written yet are excluded.
        ids: int64 [B], an id for each row of k, such as its image's index or its class: the queue rows of the
            same id are excluded from both softmaxes. A negative id matches nothing. Where every queue row is
            excluded, the loss, the entropy and the gradient are 0. Without ids no row is excluded by its id,
            even where the queue keeps ids.
        queue_ids: int64 [K], the ids of the queue's rows, where the queue is a tensor; a FeatureQueue keeps
            them.
        student_temperature: number or tensor of one element, which may require grad. Published: 0.1. Where it
            changes under torch.compile, pass a tensor: each new number is compiled anew.
        teacher_temperature: number or tensor of one element, which may require grad. Published: 0.04.
        form: "kl" or "ce".
        normalize: divide the rows of q and k by their norms first, in float32 (float64 for float64). The
            queue's rows are used as they are: enqueue normalised keys.
        reduction: "mean" and "sum" over all rows, "none" for a loss of shape [B] or [V, B].
        return_entropy: also return the teacher's entropy H(p_t), reduced alike ([B] for "none"), detached.
        backend: "auto", a name that `relssl info` lists, or a variant of one, such as "cpu/avx2".

    dtypes: float32, bfloat16, float16, float64. Computed in the queue's dtype if that is 16-bit, else
    under autocast in the autocast dtype, else in q's; sums and gradients in float32 (float64 for
    float64), and so is the loss. A queue of another dtype is converted in every call.

    Raises:
        TypeError: an argument of a wrong type or dtype, or a tensor that is not dense.
        ValueError: wrong shapes, an empty queue, an unknown option, a backend that cannot run this, or a
            temperature that is not positive and finite; where the temperature is a tensor on an
            accelerator, the loss becomes NaN instead.
        RuntimeError: tensors on different devices.
    """
    rows, exclude, backend = queue_rows(queue, ids, queue_ids, backend)
    if form != "kl":
        check_choice("form", form, ("kl", "ce"))
    if reduction != "mean":
        check_choice("reduction", reduction, REDUCTIONS)
    tau_s, tau_t = check_pair(
        q, k, rows, student_temperature=student_temperature, teacher_temperature=teacher_temperature
    )
    if exclude:
        check_exclude(q, rows, exclude)
    if normalize:
        q, k = normalized(q), normalized(k)
    k = to_dtype(k, q.dtype)
    if not is_compiling() and unit_norm.calls_left:
        warn_unless_unit(tau_t, q=q, k=k, queue=rows)
    loss, entropy = dispatch.relation(q, k, rows, tau_s, tau_t, form, reduction, backend, exclude)
    return (loss, reduce(entropy, reduction)) if return_entropy else loss


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor | FeatureQueue,
    *,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    temperature: Temperature = 0.2,
    normalize: bool = False,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE with one positive and a queue of negatives, as in MoCo.

        -log( e^(<q,k>/tau) / (e^(<q,k>/tau) + sum_j e^(<q,m_j>/tau)) )
            = log(1 + exp(A(q/tau) - <q,k>/tau))

    (van den Oord et al. 2018, eq. 4; He et al., MoCo, CVPR 2020, eq. 1; tau = 0.2 as in MoCo v2.)

    Arguments, dtypes and errors are those of `relation_loss`; k may require grad too. ids exclude negatives
    alone, never the positive: a row without negatives has the loss 0.
    """
    rows, exclude, backend = queue_rows(queue, ids, queue_ids, backend)
    if reduction != "mean":
        check_choice("reduction", reduction, REDUCTIONS)
    (tau,) = check_pair(q, k, rows, temperature=temperature)
    if exclude:
        check_exclude(q, rows, exclude)
    if normalize:
        q, k = normalized(q), normalized(k)
    k = to_dtype(k, q.dtype)
    if not is_compiling() and unit_norm.calls_left:
        warn_unless_unit(tau, q=q, k=k, queue=rows)
    return dispatch.info_nce(q, k, rows, tau, reduction, backend, exclude)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Temperature = 0.5,
    normalize: bool = False,
    queue: Tensor | FeatureQueue | None = None,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: str = "auto",
    group: ProcessGroup | Group | None = None,
) -> Tensor:
    """NT-Xent between two views of a batch: each row's positive is the other view's, the rest are negatives.

    With z = [z1; z2] and i' the other view of i, over the 2N rows

        loss_i = -log( e^(<z_i,z_i'>/tau) / sum_(j != i) e^(<z_i,z_j>/tau) ) = A_i - <z_i,z_i'>/tau

    where A_i is the log-partition function of z without row i; nothing of size 2N x 2N is stored. A queue
    adds its rows to the negatives. (Chen et al., SimCLR, ICML 2020, eq. 1; the instance loss of CC and SACC,
    with tau = 0.5.)

    Any finite input is accepted; the papers' rows have norm 1, and are normalised with normalize=True alone.

    Args:
        z1, z2: embeddings of the two views, [N, D]; z2 is cast to z1's dtype.
        temperature: number or tensor of one element, which may require grad.
        normalize: divide the rows of both views by their norms first, as in `relation_loss`.
        queue: [K, D] or a FeatureQueue of further negatives, which may require grad; None for the paper.
        ids: int64 [N], one for each image: the queue rows of the same id are excluded from the negatives of
            both views. Rows of the batch are never excluded, even where their ids are equal.
        queue_ids: int64 [K], the ids of the queue's rows, where the queue is a tensor.
        reduction: "mean" and "sum" over all 2N rows, "none" for a loss of shape [2N], z1's rows first.
        backend: "auto", a name that `relssl info` lists, or a variant of one, such as "cpu/avx2".
        group: processes whose rows are the negatives, such as torch.distributed.group.WORLD; each gives its
            own N images, equally many, and gets the loss of its own rows. The gradient is that of the sum of
            all processes' losses, which must have equal weights: for "mean", the averages of loss and
            gradients over the processes, as DistributedDataParallel takes them, are those of one process with
            the whole batch. Double backward and torch.func do not work. None: the negatives are this
            process's alone, also under DistributedDataParallel.

    dtypes and errors are those of `relation_loss`, the loss's dtype among them; ValueError, in every process,
    for different numbers of images.
    """
    if queue is None and (ids is not None or queue_ids is not None):
        raise ValueError("ids exclude rows of a queue, but queue is None")
    rows: Tensor | None = None
    exclude: ops.Excluded = ()
    if queue is not None:
        rows, exclude, backend = queue_rows(queue, ids, queue_ids, backend)
    if reduction != "mean":
        check_choice("reduction", reduction, REDUCTIONS)
    (tau,) = check_views(z1, z2, rows, ("z1", "z2"), "[N, D]", temperature=temperature)
    if exclude:
        check_exclude(z1, rows, exclude)  # type: ignore[arg-type]
    if normalize:
        z1, z2 = normalized(z1), normalized(z2)
    z2 = to_dtype(z2, z1.dtype)
    if not is_compiling() and unit_norm.calls_left:
        warn_unless_unit(tau, z1=z1, z2=z2, queue=rows)
    if processes := _several(group):
        return grouped.nt_xent(z1, z2, rows, tau, reduction, backend, processes, exclude)
    return in_batch.nt_xent(z1, z2, rows, tau, reduction, backend, exclude)


def cluster_contrast(
    p1: Tensor,
    p2: Tensor,
    *,
    temperature: Temperature = 1.0,
    backend: str = "auto",
    group: ProcessGroup | Group | None = None,
) -> Tensor:
    """NT-Xent between the clusters of two views: the columns of the assignment matrices, by their cosines.

    A column holds the images' shares in a cluster; its positive is the same cluster's column in the other
    view. Returns the mean over the 2M columns, a scalar. (Li et al., Contrastive Clustering, AAAI 2021,
    eq. 5; SACC; tau = 1.)

    Args:
        p1, p2: soft assignments of N images to M clusters in each view, [N, M]; p2 is cast to p1's dtype.
        temperature: number or tensor of one element, which may require grad.
        group: processes whose images the columns have, as in `nt_xent`, each with its own p1 and p2; every
            process returns the loss of all, in float32 (float64 for float64) by torch's operations. Numbers
            of images may differ. None: this process's alone, also under DistributedDataParallel.

    dtypes and errors are those of `relation_loss`. A column shorter than 1e-8 is that of an
    empty cluster, and has the cosine 0.
    """
    (tau,) = check_views(p1, p2, None, ("p1", "p2"), "[N, M]", temperature=temperature)
    return _cluster_loss(p1, p2, tau, False, backend, group)


def cluster_loss(
    p1: Tensor,
    p2: Tensor,
    *,
    temperature: Temperature = 1.0,
    backend: str = "auto",
    group: ProcessGroup | Group | None = None,
) -> Tensor:
    """The cluster loss of Contrastive Clustering and SACC, in one call.

    It is `cluster_contrast` plus `cluster_entropy_penalty` of each view, and takes the arguments of
    `cluster_contrast`. (Li et al., Contrastive Clustering, AAAI 2021, eq. 6.)
    """
    (tau,) = check_views(p1, p2, None, ("p1", "p2"), "[N, M]", temperature=temperature)
    return _cluster_loss(p1, p2, tau, True, backend, group)


def _cluster_loss(
    p1: Tensor, p2: Tensor, tau: Temperature, penalize: bool, backend: str, group: ProcessGroup | Group | None
) -> Tensor:
    p2 = to_dtype(p2, p1.dtype)
    processes = _several(group)
    if processes is None:
        return clusters.cluster_loss(p1, p2, tau, penalize, backend)
    backends.choose(backend, device_type(p1), p1.dtype, p1.shape[1])  # It may be unknown.
    return grouped.cluster_loss(p1, p2, tau, penalize, processes)


def _several(group: ProcessGroup | Group | None) -> Group | None:
    """Returns a group of more than one process, otherwise None."""
    if group is None:
        return None
    processes = Group.of(group)
    return processes if processes.size > 1 else None


def cluster_entropy_penalty(p: Tensor, *, group: ProcessGroup | Group | None = None) -> Tensor:
    """Computes log M - H(P), by which a batch's assignments differ from M equal clusters, where it is 0.

    P_m = sum_n p_nm / sum_nm p_nm. Added to the cluster loss of each view, it keeps clusters from dying.
    (Li et al., Contrastive Clustering, AAAI 2021, eq. 6, and SACC, up to the constant log M.)

    Args:
        p: soft assignments [N, M], not negative.
        group: see `cluster_contrast`.

    Returns:
        A scalar, float32 (float64 for float64). Finite, and so is its gradient, where clusters are empty;
        NaN where all are.
    """
    check_views(p, p, None, ("p", "p"), "[N, M]")
    p = to_dtype(p, accumulator(p.dtype))
    processes = _several(group)
    return clusters.penalty(grouped.cluster_sizes(p, processes) if processes else p.sum(0))


def cluster_entropy(p: Tensor) -> Tensor:
    """Deprecated name of `cluster_entropy_penalty`, to be removed in 0.2; it falls as the entropy rises."""
    warn("cluster_entropy is now cluster_entropy_penalty", DeprecationWarning, stacklevel=2)
    return cluster_entropy_penalty(p)


def queue_logsumexp(
    x: Tensor,
    queue: Tensor | FeatureQueue,
    temperature: Temperature,
    *,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    exclude: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Computes the log-partition function of a queue and its gradient, the primitive of every loss here.

        lse  = A(x / tau) = log sum_j exp(<x, m_j> / tau)
        mean = grad A(x / tau) = sum_j softmax_j(<x, m_j> / tau) m_j

    Both are differentiable in x, queue and temperature. A backward through lse alone does not read the
    queue; one through mean does, and raises RuntimeError if the queue has changed since.

    Args:
        x: rows [R, D].
        queue: [K, D], or a FeatureQueue. Any strides.
        temperature: number or tensor of one element, which may require grad.
        ids, queue_ids: int64 [R] and [K]: the queue rows of its id are excluded for each row of x, as in
            `relation_loss`.
        exclude: int64 [R], instead of ids: the index of the queue row that is excluded for each row of x, or
            -1 for none.
        backend: "auto", a name that `relssl info` lists, or a variant of one, such as "cpu/avx2".

    Returns:
        lse: [R], float32 (float64 for float64 input); -inf where every queue row is excluded.
        mean: [R, D], of the same dtype; 0 there.

    dtypes and errors are those of `relation_loss`; an index in exclude that is out of range
    raises ValueError, or on an accelerator makes its row NaN.
    """
    rows, excluded, backend = queue_rows(queue, ids, queue_ids, backend)
    tau = check_logsumexp(x, rows, temperature, exclude, len(queue))
    if excluded:
        check_exclude(x, rows, excluded)
    if exclude is not None:
        if ids is not None:
            raise ValueError("either ids or exclude can be given, not both")
        excluded = (exclude, None, excluded[2] if excluded else None)
    return dispatch.logsumexp(x, rows, tau, backend, excluded)
