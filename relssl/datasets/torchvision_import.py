"""Import torchvision, also where its compiled operators do not load.

The CUDA build of torchvision beside a CPU-only torch lacks them, and then the import itself fails, since
it registers fake kernels for two operators that nobody has defined. Nothing here uses these operators.
"""

import torch


def _define_missing() -> torch.library.Library | None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_library = _define_missing()  # Kept alive: its operators go when it goes.

import torchvision  # noqa: E402

__all__ = ["torchvision"]
