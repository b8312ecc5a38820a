"""Triton (kernels/): the whole loss in two launches, on NVIDIA GPUs from Ampere on and on AMD's.

Here tensors become launches: dtypes and shapes have been checked, and what has no contiguous rows is copied
once. With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly, for tests.
"""

import importlib.util
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from relssl._compat import constant_result
from relssl.backends import launching
from relssl.backends.common import Cotangents, Exclude, Saved, Scale, row_contiguous, to_dtype
from relssl.backends.split_combine import SplitCombine, contiguous
from relssl.backends.tiles import positive_terms
from relssl.backends.triton_backward import Backward

WIDEST = 1024
_installed = importlib.util.find_spec("triton") is not None
Partials = tuple[Tensor, Tensor, int, int]  # stats, with a counter of arrivals behind them; means; R, S


class Triton(SplitCombine[Partials, Any]):
    """Triton (kernels/): the whole loss in two launches, on NVIDIA GPUs from Ampere on and on AMD's."""

    def __init__(self, variant: str = "") -> None:
        """The variant is one of heuristics.variant; "" is the default."""
        self._variant = variant

    def supports(self, device: str, dtype: torch.dtype, dim: int) -> str | None:
        if device == "cpu" and not launching.INTERPRETED:
            return "it runs on GPUs, and on the CPU only where TRITON_INTERPRET=1 was set at the start"
        if device not in ("cpu", "cuda"):
            return f"it runs on CUDA and ROCm, not on {device}"
        if not _installed:
            return "Triton is not installed (pip install 'relssl[triton]')"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if device == "cpu" and dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        if dim > WIDEST:
            return f"its tiles hold rows of at most {WIDEST}, not {dim}"
        return _too_old() if device == "cuda" else None

    def variants(self, dtype: torch.dtype, dim: int) -> list[str]:
        """The most promising come first, 16 at most."""
        names = launching.kernels().heuristics.variants(
            launching.current_chip(), launching.DTYPE_NAMES[dtype], dim
        )
        return [name for name in names if self.unsupported_variant(name, dtype, dim) is None]

    def unsupported_variant(self, variant: str, dtype: torch.dtype, dim: int) -> str | None:
        try:
            _tiles(variant, launching.current_chip(), launching.DTYPE_NAMES[dtype], dim)
        except ValueError as error:
            return str(error)
        return None

    def variant(self, name: str) -> "Triton":
        return Triton(name)

    def kernel_layout(self, t: Tensor) -> Tensor:
        return row_contiguous(t)

    def device_guard(self, x: Tensor) -> AbstractContextManager:
        return launching.device_guard(x)

    def kernel_scales(self, scale: Scale) -> tuple[Any, ...]:
        """Numbers in units of log 2, or addresses on the device."""
        if isinstance(scale, Tensor):
            return tuple(scale[i:] for i in range(len(scale)))
        return tuple(launching.kernels().heuristics.log2_scale(c) for c in scale)

    def forward(
        self, first: Tensor, second: Tensor, queue: Tensor, scales: tuple[Any, Any],
        exclude: Exclude | None, want_mean: bool,
    ) -> Partials:  # fmt: skip
        """What a kernel of specialised warps cannot take, the default kernel does."""
        device_scales = [c if isinstance(c, Tensor) else None for c in scales]  # numbers may vary
        # Not read from the arguments, but launches differ by it: see launching.precision.
        fp32_precision = queue.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision
        tensors = first, second, queue, *(exclude or launching.NOTHING)
        launch = launching.cached_launch(
            _forward_launch, queue.get_device(), *tensors, *device_scales, want_mean, fp32_precision,
            self._variant,
        )  # fmt: skip
        return launch(*tensors, *scales)

    def combine_lse_and_mean(
        self, partials: Partials, scales: tuple[Any, Any], num_first: int, lse: Tensor, mean: Tensor
    ) -> None:
        stats, means, count, num_splits = partials
        dim = mean.shape[1]
        flags = dim > 0, isinstance(scales[0], Tensor)
        combine = _combine("combine_lse_and_mean", lse, dim, num_splits, count, flags, *scales)
        combine(stats, means, *scales, lse, mean, num_first, count, num_splits)

    def combine_relation(
        self, q: Tensor, k: Tensor, scales: tuple[Any, Any], teacher: Partials, student: Partials,
        offset: int, form: str, weight: float, may_be_empty: bool, losses: Tensor, loss: Tensor | None,
        entropy: Tensor, grad_q: Tensor, lse: Tensor, mean_t: Tensor,
    ) -> None:  # fmt: skip
        (count, dim), batch = q.shape, k.shape[0]
        stats_t, means_t, rows_t, splits_t = teacher
        stats_s, means_s, rows_s, splits_s = student
        total, grad, on_device = loss is not None, grad_q.numel() > 0, isinstance(scales[0], Tensor)
        flags = form == "kl", total, grad, may_be_empty, on_device
        most = max(splits_t, splits_s)
        combine = _combine("combine_relation", lse, dim, most, count, flags, q, k, *scales)
        combine(
            q, k, *scales, weight, stats_t, means_t, stats_s, means_s, losses, loss, entropy, grad_q, lse,
            mean_t, q.stride(0), k.stride(0), batch, rows_t, splits_t, rows_s, splits_s, offset,
        )  # fmt: skip

    def combine_info_nce(
        self, q: Tensor, k: Tensor, scale: Any, partials: Partials, weight: float,
        losses: Tensor, loss: Tensor | None, sigma: Tensor, grad_q: Tensor, lse: Tensor,
    ) -> None:  # fmt: skip
        (count, dim), (stats, means, _, num_splits) = q.shape, partials
        flags = loss is not None, grad_q.numel() > 0, isinstance(scale, Tensor)
        combine = _combine("combine_info_nce", lse, dim, num_splits, count, flags, q, k, scale)
        combine(
            q, k, scale, weight, stats, means, losses, loss, sigma, grad_q, lse,
            q.stride(0), k.stride(0), k.shape[0], count, num_splits,
        )  # fmt: skip

    def vjp(
        self, saved: Saved, cotangents: Cotangents, want_x: bool, want_queue: bool
    ) -> tuple[Tensor, Tensor]:
        x, queue, scale, exclude, lse, mean = saved
        x, queue = row_contiguous(x), row_contiguous(queue)
        (rows, dim), lse = x.shape, lse.contiguous()
        g_lse, g_mean, g_row = (
            t if t is None else t.contiguous()
            for t in (cotangents.g_lse, cotangents.g_mean, cotangents.g_row)
        )
        grad_x = grad_queue = lse.new_empty(0, dim)
        g_lse = lse.new_zeros(rows) if g_lse is None else g_lse
        base = g_lse
        mean = lse.new_empty(0, dim) if mean is None else mean  # It is not read then.
        if g_mean is not None:
            base = base - (mean * g_mean).sum(1)
        with launching.device_guard(x):
            launch = Backward(x, queue, contiguous(exclude), scale, lse, g_mean)
            if want_x or g_mean is not None:
                totals, weighted = launch.x(base, want_x)
                # sum_j w_j must be g_lse. What rounding leaves goes out along the mean: without it a sharp
                # row loses every digit, since u_j - ubar nearly vanishes where p_j does not.
                rest = totals.sum(0) - g_lse
                base = base - rest
                if want_x:
                    grad_x = (weighted.sum(0) - rest[:, None] * mean) * scale
            if want_queue:
                grad_queue = launch.queue(base, g_row)
        return grad_x, grad_queue

    def nt_xent_vjp(self, z: Tensor, scale: Scale, lse: Tensor, g: Tensor) -> Tensor:
        z, lse, g = row_contiguous(z), lse.contiguous(), g.contiguous()
        with launching.device_guard(z):
            _, weighted = Backward(z, z, None, scale[0], lse, None).x(g, True, symmetric=True)
        return (weighted.sum(0) - positive_terms(to_dtype(z, lse.dtype), g)) * scale[0]


@constant_result
def _too_old() -> str | None:
    if torch.version.hip or torch.cuda.get_device_capability() >= (8, 0):
        return None
    return f"it needs compute capability 8.0, not {'.'.join(map(str, torch.cuda.get_device_capability()))}"


def _tiles(variant: str, chip: Any, dtype: str, dim: int) -> Any:
    tiles = _tiles_of_variant(variant, chip, dtype, dim)
    if tiles.specialised and not launching.kernels().specialises:
        raise ValueError(f"Triton {launching.kernels().version} has no specialised warps")
    return tiles


@cache
def _tiles_of_variant(variant: str, chip: Any, dtype: str, dim: int) -> Any:
    return launching.kernels().heuristics.variant(variant, chip, dtype, dim)


def _describable(t: Tensor) -> bool:
    """Whether TMA can address the rows of t."""
    stride = t.stride(0)
    return stride >= t.shape[1] and stride * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def _forward_launch(
    device: int, first: Tensor, second: Tensor, queue: Tensor, ids: Tensor | None, queue_ids: Tensor | None,
    filled: Tensor | None, *rest: Any,
) -> Any:  # fmt: skip
    *device_scales, want_mean, _fp32_precision, variant = rest
    kernels, chip = launching.kernels(), launching.chip(device)
    heuristics, (size, dim) = kernels.heuristics, queue.shape
    num_first, rows = first.shape[0], first.shape[0] + second.shape[0]
    dtype = launching.DTYPE_NAMES[queue.dtype]
    plain = heuristics.forward(chip, dtype, dim)
    tiles = _tiles(variant, chip, dtype, dim)
    all_in_use = ids is None and filled is None
    specialised = tiles.specialised and all_in_use and all(map(_describable, (first, second, queue)))
    if tiles.specialised and not specialised:
        tiles = plain
    if queue_ids is not None:
        tiles = heuristics.with_ids(tiles)
    tma = _describable(queue)

    def constants(tiles: Any, **flags: bool) -> dict[str, Any]:
        return {
            "DIM": dim, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_D": heuristics.width(dim),
            "MEAN": want_mean, "EVEN": size % tiles.block_n == 0 and filled is None,
            **launching.exclude_flags(ids, queue_ids, filled),
            "FIXED": dtype != "fp16", "DEVICE_SCALE": device_scales[0] is not None,
            "PRECISION": launching.precision(chip, queue.dtype), "CHUNK": tiles.chunk,
            "PACK": heuristics.packs(chip.capability), "TMA": tiles.tma and tma, "REDO": False,
        } | flags  # fmt: skip

    blocks, kernel = -(-rows // tiles.block_m), kernels.forward
    if specialised:  # whose blocks hold rows of one stack
        blocks = sum(-(-len(stack) // tiles.block_m) for stack in (first, second))
        kernel = kernels.specialised
    sizes = first.stride(0), second.stride(0), queue.stride(0), num_first, rows, size
    scales = [1.0 if c is None else c for c in device_scales]
    arguments = first, second, queue, ids, queue_ids, filled, *scales, torch.float32, torch.float32, *sizes, 1
    slots = launching.with_resident(chip, kernel, tiles, constants(tiles), *arguments)
    num_splits, step = heuristics.split_queue(blocks * tiles.block_m, size, dim, tiles, slots)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    runs = [launching.Launch(kernel, (blocks, num_splits), constants(tiles), **options)]
    if specialised and dtype != "fp16":
        # Steps are whole tiles for it, too.
        plain = plain._replace(block_n=min(plain.block_n, tiles.block_n))
        options = {"num_warps": plain.warps, "num_stages": plain.stages}
        again = constants(plain, FIXED=False, REDO=True)
        runs.append(
            launching.Launch(kernels.forward, (-(-rows // plain.block_m), num_splits), again, **options)
        )
    shape = (num_splits, rows, dim) if want_mean else (0,)
    allocates = tiles.tma and tma

    def launch(*arguments: Any) -> Partials:
        queue = arguments[2]
        stats = queue.new_empty(3 * num_splits * rows + 1, dtype=torch.float32)
        means = queue.new_empty(shape, dtype=torch.float32)
        if allocates:
            launching.set_allocator()
        for run in runs:
            run(*arguments, stats, means, *sizes, step)
        return stats, means, rows, num_splits

    return launch


FLAGS = {
    "combine_lse_and_mean": ("MEAN", "DEVICE_SCALE"),
    "combine_relation": ("KL", "TOTAL", "GRAD", "EXCLUDE", "DEVICE_SCALE"),
    "combine_info_nce": ("TOTAL", "GRAD", "DEVICE_SCALE"),
}


def _combine_launch(
    device: int, name: str, dim: int, num_splits: int, rows: int, flags: tuple, *tensors: Tensor
) -> launching.Launch:
    kernels = launching.kernels()
    constants, warps = kernels.heuristics.combine(launching.chip(device), dim, num_splits)
    constants |= zip(FLAGS[name], flags, strict=True)
    return launching.Launch(getattr(kernels, name), (rows,), constants, num_warps=warps)


def _combine(
    name: str, like: Tensor, dim: int, num_splits: int, rows: int, flags: tuple, *values: Any
) -> launching.Launch:
    """Returns the launch for values of which the tensors' layout decides what is compiled."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    return launching.cached_launch(
        _combine_launch, like.get_device(), name, dim, num_splits, rows, flags, *tensors
    )
