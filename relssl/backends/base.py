"""The contract of a backend, and what a backend inherits where it has no faster way.

With theta_r = c_r x_r and the queue rows m_j, everything rests on one primitive and its vector-Jacobian
product:

    lse_r  = log sum_j exp<theta_r, m_j>    the log-partition function A(theta_r)
    mean_r = sum_j p_rj m_j                 its gradient, where p_rj = exp(<theta_r, m_j> - lse_r)

x [R, D] and queue [K, D] have one dtype and any strides. A scale consists of Python floats, or is a tensor
where a temperature is one. `exclude` is None or a common.Exclude of the rows. Everything else is float32
(float64 for float64 input), and so are results, which are contiguous, as torch.compile expects them, and
share no memory with the arguments. lse comes in two parts, [2, R], whose sum it is: rounded to one float, a
large one would carry its rounding into every p. A row for which every queue row is excluded has
lse = -inf and mean = 0; its relation loss, entropy and gradients are 0.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from relssl.backends import clusters, tiles
from relssl.backends.common import Cotangents, Exclude, Saved, Scale, accumulator, to_dtype, total


class Backend(ABC):
    """A way to compute the losses. Shapes, dtypes and devices have been checked when a method is called.

    A backend with several kernels has variants: its name alone stands for the default kernel, and
    "NAME/VARIANT" for each other. `relssl tune` measures them.
    """

    @property
    def local(self) -> "Backend":
        """The backend of losses that compare no rows with a queue."""
        return self

    def num_rows(self, queue: Tensor) -> int:
        """Returns the number of queue rows that indices refer to."""
        return queue.shape[0]

    @abstractmethod
    def supports(self, device: str, dtype: torch.dtype, dim: int) -> str | None:
        """Returns None, or the reason why rows of this width and dtype cannot be taken on this device."""

    @abstractmethod
    def lse_and_mean(
        self, x: Tensor, queue: Tensor, scale: Scale, num_first: int, exclude: Exclude | None, want_mean: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns lse [2, R] and mean [R, D], or [R, 0] without want_mean.

        c_r is scale[0] for r < num_first and scale[1] from there on.
        """

    def vjp(
        self, saved: Saved, cotangents: Cotangents, want_x: bool, want_queue: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns grad_x [R, D] and grad_queue [K, D]; [0, D] where one is not wanted.

        With u_rj = <m_j, g_mean_r>, ubar_r = <mean_r, g_mean_r> and
        w_rj = p_rj (g_lse_r + u_rj - ubar_r):

            grad_x_r     = c sum_j w_rj m_j
            grad_queue_j = sum_r w_rj theta_r + p_rj g_row_r

        saved.mean may be None where g_mean is None and want_x is false.
        """
        return tiles.vjp(saved, cotangents, want_x, want_queue)

    def relation(
        self, q: Tensor, k: Tensor, queue: Tensor, scale: Scale, form: str, weight: float | None,
        want_grad: bool, exclude: Exclude | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Computes functional.relation_loss of q [B, D] or [V, B, D], k [B, D] and the scales (student,
        teacher); exclude is that of the rows of k and then of q.

        Returns:
            loss: weight times the sum of the rows' losses, 0-d; these themselves, [B] or [V, B], if weight
                is None.
            entropy: that of the teacher's rows, [B].
            grad_q: weight scale[0] (mean_s - mean_t) in q's shape, where None weighs 1; [V*B, 0] without
                want_grad.
            lse: that of the rows of k and then of q, [2, B + V*B].
            mean_t: the teacher's means, [B, D].
        """
        batch, rows = k.shape[0], q.reshape(-1, q.shape[-1])
        if want_grad:
            both = scale.flip(0) if isinstance(scale, Tensor) else scale[::-1]
            lse, mean = self.lse_and_mean(torch.cat((k, rows)), queue, both, batch, exclude, True)
        else:  # The student's mean is a quarter of the work.
            of_k, of_q = exclude_parts(exclude, batch)
            lse_t, mean = self.lse_and_mean(k, queue, twice(scale[1:]), batch, of_k, True)
            lse_s, _ = self.lse_and_mean(rows, queue, twice(scale[:1]), len(rows), of_q, False)
            lse = torch.cat((lse_t, lse_s), 1)
        theta = torch.cat((to_dtype(k, lse.dtype) * scale[1], to_dtype(rows, lse.dtype) * scale[0]))
        return relation_of(theta, lse, mean, q, batch, scale, form, weight, exclude is not None)

    def info_nce(
        self, q: Tensor, k: Tensor, queue: Tensor, scale: Scale, weight: float | None, want_grad: bool,
        exclude: Exclude | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Computes functional.info_nce of q [B, D] or [V, B, D] and k [B, D], with one scale; exclude is that
        of q's rows.

        With z = A(theta) - <theta, k>, a row's loss is log(1 + exp z) and its sigma 1 / (1 + exp -z).

        Returns:
            loss: as in `relation`.
            sigma: [B] or [V, B].
            grad_q: weight scale[0] sigma (mean - k) in q's shape; [V*B, 0] without want_grad.
            lse: [2, V*B].
        """
        x = q.flatten(0, -2)
        lse, mean = self.lse_and_mean(x, queue, twice(scale), x.shape[0], exclude, want_grad)
        positive = (to_dtype(q, lse.dtype) * to_dtype(k, lse.dtype)).sum(-1) * scale[0]
        # With 0 times itself: an infinite one becomes NaN, as in a softmax with it.
        positive = torch.add(positive, positive, alpha=0)
        high, low = lse.view(2, *positive.shape)
        z = high - positive + low
        sigma, grad_q = z.sigmoid(), mean
        if want_grad:
            c = scale[0] if weight is None else weight * scale[0]
            grad_q = (mean.view(q.shape) - k).mul_((sigma * c)[..., None])
        loss = F.softplus(z, threshold=40)
        return loss if weight is None else total(loss, weight), sigma, grad_q, lse

    def nt_xent(
        self, z: Tensor, scale: Scale, queue_lse: Tensor | None, weight: float | None, want_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes functional.nt_xent of z [2N, D], both views, with one scale.

        queue_lse [2, 2N] is the log-sum-exp of further negatives, or None.

        Returns:
            loss: as in `relation`, [2N].
            grad: that of weight times the sum of the rows' losses, but for the further negatives, [2N, D];
            [0, D] without want_grad, which needs a weight.
            lse: that of all negatives and the positive, [2, 2N].
        """
        rows, (x1, x2) = len(z), to_dtype(z, accumulator(z.dtype)).chunk(2)
        own = Exclude(torch.arange(rows, device=z.device), None, None)
        lse, _ = self.lse_and_mean(z, z, twice(scale), rows, own, False)
        lse = lse if queue_lse is None else tiles.logaddexp(lse, queue_lse)
        high, low = lse.view(2, 2, -1)
        losses = (high - (x1 * x2).sum(1) * scale[0] + low).flatten()
        grad = x1[:0]
        if want_grad:
            grad = self.nt_xent_vjp(z, scale, lse, torch.full_like(losses, weight or 0.0))
        return losses if weight is None else total(losses, weight), grad, lse

    def nt_xent_vjp(self, z: Tensor, scale: Scale, lse: Tensor, g: Tensor) -> Tensor:
        """Returns the same gradient from lse [2, 2N], of the sum of g [2N] times the losses."""
        return tiles.nt_xent_vjp(z, scale, lse, g)

    def cluster_loss(
        self, p1: Tensor, p2: Tensor, scale: Scale, dtype: torch.dtype, penalize: bool, want_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes functional.cluster_loss of p1 and p2 [N, M], or cluster_contrast if not `penalize`.

        dtype is that of the unit columns in NT-Xent's products; p1 and p2 have the accumulator's.

        Returns:
            loss: 0-d.
            grad: its gradient for p1 and p2, [2, N, M]; [0, N, M] without want_grad.
            radial: NT-Xent's gradient for each unit column along that column, [2M]; [0] without want_grad.
        """
        return clusters.cluster_loss(self, p1, p2, scale, dtype, penalize, want_grad)

    def variants(self, dtype: torch.dtype, dim: int) -> list[str]:
        """Returns the variants worth a measurement here, for a dtype and width that `supports` accepts."""
        return []

    def unsupported_variant(self, variant: str, dtype: torch.dtype, dim: int) -> str | None:
        """Returns None, or the reason why this machine cannot run a variant, which may be any text."""
        return "it has no variants"

    def variant(self, name: str) -> "Backend":
        """Returns the backend that runs a variant. Raises ValueError, here or later, if it cannot run."""
        raise ValueError(self.unsupported_variant(name, torch.float32, 1))


def relation_of(
    theta: Tensor,
    lse: Tensor,
    mean: Tensor,
    q: Tensor,
    batch: int,
    scale: Scale,
    form: str,
    weight: float | None,
    may_be_empty: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns what Backend.relation returns, from theta and lse of the rows of k and then of q.

    mean is that of all these rows, or where grad_q is not wanted that of k's rows alone.
    """
    mean_t, mean_s = mean[:batch], mean[batch:]
    if len(mean_s):
        grad_q = mean_s.view(q.shape) - mean_t
        grad_q *= scale[0] if weight is None else weight * scale[0]
    else:
        grad_q = theta.new_empty(len(theta) - batch, 0)
    # Cross-entropies with the teacher: first its own, which is its entropy, then that of each student view.
    finite = lse.masked_fill(lse.sum(0) == -torch.inf, 0) if may_be_empty else lse
    high, low = finite.view(2, -1, batch)
    cross = high - (theta.view(-1, *mean_t.shape) * mean_t).sum(-1) + low
    entropy = cross[0]
    losses = (cross[1:] - entropy if form == "kl" else cross[1:].clone()).view(q.shape[:-1])
    return losses if weight is None else total(losses, weight), entropy, grad_q, lse, mean_t


def exclude_parts(exclude: Exclude | None, batch: int) -> tuple[Exclude | None, Exclude | None]:
    """Returns the exclusions of the first `batch` rows, and those of the rest."""
    if exclude is None:
        return None, None
    return exclude.of(slice(batch)), exclude.of(slice(batch, None))


def twice(scale: Scale) -> Scale:
    """Returns one scale as the pair that the primitive takes."""
    return scale.expand(2) if isinstance(scale, Tensor) else [*scale, *scale]
