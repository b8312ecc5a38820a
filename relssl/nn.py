"""The losses of relssl.functional as modules that store their settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from relssl import functional
from relssl.backends.common import Temperature
from relssl.functional import Form, Reduction
from relssl.groups import Group
from relssl.queue import FeatureQueue

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Loss(nn.Module):
    """Keeps the keyword arguments of a functional; tensors among them as parameters or buffers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.names = tuple(settings)
        for name, value in settings.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class RelationLoss(_Loss):
    """`functional.relation_loss` as a module that stores its settings; call it with (q, k, queue[, ids]).

    A temperature given as nn.Parameter (of one element) is learned.
    """

    def __init__(
        self,
        *,
        student_temperature: Temperature = 0.1,
        teacher_temperature: Temperature = 0.04,
        form: Form = "kl",
        normalize: bool = False,
        reduction: Reduction = "mean",
        return_entropy: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            form=form,
            normalize=normalize,
            reduction=reduction,
            return_entropy=return_entropy,
            backend=backend,
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        queue: Tensor | FeatureQueue,
        ids: Tensor | None = None,
        queue_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return functional.relation_loss(q, k, queue, ids=ids, queue_ids=queue_ids, **self.settings())


class InfoNCELoss(_Loss):
    """`functional.info_nce` as a module that stores its settings; call it with (q, k, queue[, ids]).

    A temperature given as nn.Parameter (of one element) is learned.
    """

    def __init__(
        self,
        *,
        temperature: Temperature = 0.2,
        normalize: bool = False,
        reduction: Reduction = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__(temperature=temperature, normalize=normalize, reduction=reduction, backend=backend)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        queue: Tensor | FeatureQueue,
        ids: Tensor | None = None,
        queue_ids: Tensor | None = None,
    ) -> Tensor:
        return functional.info_nce(q, k, queue, ids=ids, queue_ids=queue_ids, **self.settings())


class NTXentLoss(_Loss):
    """`functional.nt_xent` as a module that stores its settings; call it with (z1, z2[, queue[, ids]]).

    A temperature given as nn.Parameter (of one element) is learned.
    """

    def __init__(
        self,
        *,
        temperature: Temperature = 0.5,
        normalize: bool = False,
        reduction: Reduction = "mean",
        backend: str = "auto",
        group: ProcessGroup | Group | None = None,
    ) -> None:
        group = None if group is None else Group.of(group)  # which can be copied and pickled
        super().__init__(
            temperature=temperature, normalize=normalize, reduction=reduction, backend=backend, group=group
        )

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        queue: Tensor | FeatureQueue | None = None,
        ids: Tensor | None = None,
        queue_ids: Tensor | None = None,
    ) -> Tensor:
        return functional.nt_xent(z1, z2, queue=queue, ids=ids, queue_ids=queue_ids, **self.settings())


class ClusterLoss(_Loss):
    """`functional.cluster_loss` as a module that stores its settings; call it with (p1, p2).

    A temperature given as nn.Parameter (of one element) is learned.
    """

    def __init__(
        self,
        *,
        temperature: Temperature = 1.0,
        backend: str = "auto",
        group: ProcessGroup | Group | None = None,
    ) -> None:
        group = None if group is None else Group.of(group)  # which can be copied and pickled
        super().__init__(temperature=temperature, backend=backend, group=group)

    def forward(self, p1: Tensor, p2: Tensor) -> Tensor:
        return functional.cluster_loss(p1, p2, **self.settings())
