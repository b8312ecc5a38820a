"""The queue in tiles of torch.mm and torch.softmax: the fallback of every device."""

import torch
from torch import Tensor

from relssl.backends import tiles
from relssl.backends.base import Backend, exclude_parts, relation_of
from relssl.backends.common import Exclude, Scale, accumulator, to_dtype, total


class Chunked(Backend):
    """Tiles of the queue through torch.mm and torch.softmax: exact, any device, O(R·D) memory."""

    def supports(self, device: str, dtype: torch.dtype, dim: int) -> None:
        return None

    def lse_and_mean(
        self, x: Tensor, queue: Tensor, scale: Scale, num_first: int, exclude: Exclude | None, want_mean: bool
    ) -> tuple[Tensor, Tensor]:
        theta = x.to(accumulator(x.dtype), copy=True)
        theta[:num_first].mul_(scale[0])
        theta[num_first:].mul_(scale[1])
        return tiles.lse_and_mean(theta, queue, exclude, want_mean)

    def nt_xent(
        self, z: Tensor, scale: Scale, queue_lse: Tensor | None, weight: float | None, want_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With similarities that fit a tile, these are kept: two products instead of three."""
        rows, x = len(z), to_dtype(z, accumulator(z.dtype))
        if weight is None or rows * rows > tiles.tile_size(z):
            return super().nt_xent(z, scale, queue_lse, weight, want_grad)
        logits = torch.mm(x * scale[0], x.T)
        positive = logits.diagonal(rows // 2).repeat(2)
        logits.fill_diagonal_(-torch.inf)
        p = logits.softmax(1)
        lse = torch.stack((logits.amax(1), p.amax(1).log_().neg_()))
        if queue_lse is not None:
            own, lse = lse, tiles.logaddexp(lse, queue_lse)
            high, low = own - lse
            p *= (high + low).exp_()[:, None]
        loss = total(lse[0] - positive + lse[1], weight)
        if not want_grad:
            return loss, x[:0], lse
        w = p + p.T
        for diagonal in (rows // 2, -(rows // 2)):
            w.diagonal(diagonal).sub_(2)
        return loss, torch.mm(w, x).mul_(scale[0] * weight), lse

    def relation(
        self, q: Tensor, k: Tensor, queue: Tensor, scale: Scale, form: str, weight: float | None,
        want_grad: bool, exclude: Exclude | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The inherited method with each row scaled once: small problems are bound by the number of calls."""
        batch, dtype = k.shape[0], accumulator(q.dtype)
        student = to_dtype(q.reshape(-1, q.shape[-1]), dtype) * scale[0]
        teacher = to_dtype(k, dtype) * scale[1]
        theta = torch.cat((teacher, student))
        if want_grad:
            lse, mean = tiles.lse_and_mean(theta, queue, exclude, True)
        else:  # The student's mean is a quarter of the work.
            of_k, of_q = exclude_parts(exclude, batch)
            lse_t, mean = tiles.lse_and_mean(teacher, queue, of_k, True)
            lse_s, _ = tiles.lse_and_mean(student, queue, of_q, False)
            lse = torch.cat((lse_t, lse_s), 1)
        return relation_of(theta, lse, mean, q, batch, scale, form, weight, exclude is not None)
