"""Imports torchvision, even where its compiled operators cannot be loaded.

The CUDA build of torchvision cannot load them beside a CPU-only torch. Its import then fails, since it
registers fake kernels for two operators that are not defined. relssl uses neither.
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


_library = _define_missing()  # Its operators are removed with it.

import torchvision  # noqa: E402

__all__ = ["torchvision"]
