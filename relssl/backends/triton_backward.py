"""The launches of kernels/backward.py."""

from typing import Any

import torch
from torch import Tensor

from relssl.backends import launching
from relssl.backends.common import Exclude


class Backward:
    """Launches for rows and a queue, with the arguments that all of the kernels take."""

    def __init__(
        self, x: Tensor, queue: Tensor, exclude: Exclude | None, scale: float | Tensor, lse: Tensor,
        g_mean: Tensor | None,
    ) -> None:  # fmt: skip
        self.kernels, self.chip = launching.kernels(), launching.chip(x.get_device())
        heuristics, on_device = self.kernels.heuristics, isinstance(scale, Tensor)
        self.tensors, self.exclude, self.g_mean = (x, queue), exclude or launching.NOTHING, g_mean
        self.dtype = launching.DTYPE_NAMES[x.dtype]
        self.c = scale.float() if isinstance(scale, Tensor) else heuristics.log2_scale(scale)
        self.common = {
            "DIM": x.shape[1], "BLOCK_D": heuristics.width(x.shape[1]), "G_MEAN": g_mean is not None,
            "DEVICE_SCALE": on_device, "PRECISION": launching.precision(self.chip, x.dtype),
            "PACK": heuristics.packs(self.chip.capability), **launching.exclude_flags(*self.exclude),
        }  # fmt: skip
        self.lse = torch.empty_like(lse)
        self.kernels.lse_to_log2[(-(-len(x) // 256),)](
            lse, self.c, self.lse, len(x), BLOCK=256, DEVICE_SCALE=on_device
        )

    def fitting(self, tiles: Any) -> Any:
        return tiles if self.exclude[1] is None else self.kernels.heuristics.with_ids(tiles)

    def x(self, base: Tensor, want_weighted: bool, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """Returns the totals [S, R] of S splits, and weighted [S, R, D] or [0]."""
        (x, queue), c, lse = self.tensors, self.c, self.lse
        (rows, dim), size = x.shape, len(queue)
        tiles = self.fitting(self.kernels.heuristics.backward(self.chip, self.dtype, dim, symmetric))
        options = self.common | {
            "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
            "EVEN": size % tiles.block_n == 0 and not self.common["FILLED"],
            "WEIGHTED": want_weighted, "CHUNK": tiles.chunk, "SYMMETRIC": symmetric,
        }  # fmt: skip
        like = c if isinstance(c, Tensor) else 1.0
        num_splits, step = launching.cached_launch(
            _backward_x_splits, x.get_device(), x, queue, *self.exclude, like, lse, self.g_mean,
            tuple(options.items()), tiles,
        )  # fmt: skip
        totals = lse.new_empty(num_splits, rows)
        weighted = lse.new_empty((num_splits, rows, dim) if want_weighted else 0)
        self.kernels.backward_x[(-(-rows // tiles.block_m), num_splits)](
            x, queue, *self.exclude, c, lse, base, self.g_mean, totals, weighted,
            x.stride(0), queue.stride(0), rows, size, step,
            num_warps=tiles.warps, num_stages=tiles.stages, **options,
        )  # fmt: skip
        return totals, weighted

    def queue(self, base: Tensor, g_row: Tensor | None) -> Tensor:
        """Returns grad_queue [K, D]."""
        (x, queue), size = self.tensors, len(self.tensors[1])
        tiles = self.fitting(self.kernels.heuristics.backward_queue(self.chip, self.dtype, x.shape[1]))
        grad_queue = self.lse.new_empty(queue.shape)
        self.kernels.backward_queue[(-(-size // tiles.block_n),)](
            x, queue, *self.exclude, self.c, self.lse, base, self.g_mean, g_row, grad_queue,
            x.stride(0), queue.stride(0), len(x), size,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, G_ROW=g_row is not None,
            CHUNK=tiles.chunk, num_warps=tiles.warps, num_stages=tiles.stages, **self.common,
        )  # fmt: skip
        return grad_queue


def _backward_x_splits(
    device: int, x: Tensor, queue: Tensor, ids: Tensor | None, queue_ids: Tensor | None,
    filled: Tensor | None, scale: float | Tensor, lse: Tensor, g_mean: Tensor | None,
    options: tuple[tuple[str, Any], ...], tiles: Any,
) -> tuple[int, int]:  # fmt: skip
    kernels, (rows, dim), size = launching.kernels(), x.shape, queue.shape[0]
    sizes = x.stride(0), queue.stride(0), rows, size, 1
    arguments = (
        x,
        queue,
        ids,
        queue_ids,
        filled,
        scale,
        lse,
        lse,
        g_mean,
        torch.float32,
        torch.float32,
        *sizes,
    )
    chip = launching.with_resident(
        launching.chip(device), kernels.backward_x, tiles, dict(options), *arguments
    )
    return kernels.heuristics.split_queue(rows, size, dim, tiles, chip)
