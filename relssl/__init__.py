"""relssl: fused losses and training for relational and contrastive self-supervised learning.

    relssl.functional    the losses as functions
    relssl.nn            the same as modules
    relssl.FeatureQueue  the ring of past embeddings

`relssl info` on the command line lists the backends.
"""

from relssl import functional, nn
from relssl.queue import FeatureQueue
from relssl.version import __version__

__all__ = ["FeatureQueue", "__version__", "functional", "nn"]
