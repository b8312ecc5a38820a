"""The losses. Each is a few lines over one primitive, the log-partition function of a queue.

Let the queue hold rows m_j. With A(theta) = log sum_j exp<theta, m_j>, grad A(theta) = sum_j p_j m_j is
the softmax-weighted mean of the queue, and ReSSL's relation loss is the Bregman divergence of A. Nothing
of the size batch x queue is ever needed, and the gradient costs no second pass.
"""

from typing import Literal

from torch import Tensor

from relssl import ops
from relssl.arguments import check_choice, check_lookup, check_pair, compute_dtype, queue_rows
from relssl.backends.common import Temperature
from relssl.queue import FeatureQueue

Reduction = Literal["mean", "sum", "none"]


def relation_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | FeatureQueue,
    *,
    student_temperature: Temperature = 0.1,
    teacher_temperature: Temperature = 0.04,
    form: Literal["kl", "ce"] = "kl",
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

    Any finite input is right; rows are not normalised here. The gradient is computed in the forward
    pass: enqueueing before backward is safe unless the queue requires grad. Double backward recomputes
    the loss in eager code and raises RuntimeError if the queue has changed since.

    Args:
        q: student embeddings, [B, D], or [V, B, D] for V student views of one teacher view.
        k: teacher embeddings, [B, D], q's dtype. Detach them where the teacher learns nothing.
        queue: [K, D], or a FeatureQueue. Any strides.
        student_temperature: number or 0-d tensor, which may require grad. Published: 0.1.
        teacher_temperature: number or 0-d tensor, which may require grad. Published: 0.04.
        form: "kl" or "ce".
        reduction: "mean" and "sum" over all rows, "none" for a loss of shape [B] or [V, B].
        return_entropy: also return the teacher's entropy H(p_t), reduced alike ([B] for "none"), detached.
        backend: "auto", or a name that `relssl info` lists.

    dtypes: float32, bfloat16, float16, float64. Computed in the queue's dtype if that is 16-bit, else
    under autocast in the autocast dtype, else in q's; sums and gradients in float32 (float64 for
    float64), and so is the loss. A queue of another dtype is converted in every call.

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: wrong shapes, an empty queue, an unknown option, a backend that cannot, or a
            temperature that is not positive and finite; where the temperature is a tensor on an
            accelerator, the loss becomes NaN instead.
        RuntimeError: tensors on different devices.
    """
    rows = queue_rows(queue)
    check_choice("form", form, ("kl", "ce"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_pair(q, k, rows, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    loss, entropy = ops.relation(
        q, k, rows, student_temperature, teacher_temperature, form, reduction, backend
    )
    return (loss, ops.reduce(entropy, reduction)) if return_entropy else loss


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor | FeatureQueue,
    *,
    temperature: Temperature = 0.2,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE with one positive and a queue of negatives, as in MoCo.

        -log( e^(<q,k>/tau) / (e^(<q,k>/tau) + sum_j e^(<q,m_j>/tau)) ) = log(1 + exp(A(q/tau) - <q,k>/tau))

    (van den Oord et al. 2018, eq. 4; He et al., MoCo, CVPR 2020, eq. 1; tau = 0.2 as in MoCo v2.)

    Arguments, dtypes and errors are those of `relation_loss`; k may require grad too.
    """
    rows = queue_rows(queue)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_pair(q, k, rows, temperature=temperature)
    return ops.info_nce(q, k, rows, temperature, reduction, backend)


def queue_logsumexp(
    x: Tensor,
    queue: Tensor | FeatureQueue,
    temperature: Temperature,
    *,
    exclude: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The log-partition function of a queue and its gradient, the primitive under every loss here.

        lse  = A(x / tau) = log sum_j exp(<x, m_j> / tau)
        mean = grad A(x / tau) = sum_j softmax_j(<x, m_j> / tau) m_j

    Both are differentiable in x, queue and temperature. A backward through lse alone needs the queue no
    more; one through mean reads it again, and raises RuntimeError if it has changed since.

    Args:
        x: [R, D].
        queue: [K, D], or a FeatureQueue. Any strides.
        temperature: number or 0-d tensor, which may require grad.
        exclude: int64 [R]: the queue row that row r leaves out, -1 for none.
        backend: "auto", or a name that `relssl info` lists.

    Returns:
        lse [R] and mean [R, D], float32 (float64 for float64 input). A row left with nothing has
        lse = -inf and mean = 0.

    dtypes and errors are those of `relation_loss`; an exclude out of range raises ValueError, on an
    accelerator it makes its row NaN.
    """
    rows = queue_rows(queue)
    check_lookup(x, rows, temperature, exclude)
    return ops.logsumexp(x, rows, temperature, exclude, compute_dtype(x, rows), True, backend)
