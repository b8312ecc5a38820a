"""relssl: fused losses and training for relational and contrastive self-supervised learning.

    relssl.functional    the losses as functions, which relssl has by the same names
    relssl.nn            the same as modules
    relssl.FeatureQueue  the ring of past embeddings

`relssl info` on the command line lists the backends.
"""

from relssl import functional, nn
from relssl.functional import (
    cluster_contrast,
    cluster_entropy_penalty,
    cluster_loss,
    info_nce,
    nt_xent,
    queue_logsumexp,
    relation_loss,
)
from relssl.queue import FeatureQueue
from relssl.version import __version__

__all__ = [
    "FeatureQueue",
    "__version__",
    "cluster_contrast",
    "cluster_entropy_penalty",
    "cluster_loss",
    "functional",
    "info_nce",
    "nn",
    "nt_xent",
    "queue_logsumexp",
    "relation_loss",
]
