"""Triton (kernels/): the whole loss in two launches, on NVIDIA GPUs from Ampere on and on AMD's.

Here tensors become launches: dtypes and shapes have been checked, and what has no contiguous rows is copied
once. With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly, for tests.
"""

import importlib.util
import os
import sys
from contextlib import nullcontext
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from relssl.backends import two_steps
from relssl.backends.common import Scale, dense

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # as heuristics.py has them
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDEST = 1024
_installed = importlib.util.find_spec("triton") is not None


def supports(device: str, dtype: torch.dtype, dim: int) -> str | None:
    if device == "cpu" and not INTERPRETED:
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


def _too_old() -> str | None:
    if torch.version.hip or torch.cuda.get_device_capability() >= (8, 0):
        return None
    return f"it needs compute capability 8.0, not {'.'.join(map(str, torch.cuda.get_device_capability()))}"


# torch.compiler.assume_constant_result does this, too, after importing all of Dynamo.
_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _kernels() -> SimpleNamespace:
    from triton import __version__
    from triton.runtime._allocation import NullAllocator, _allocator

    from relssl.kernels import combine, heuristics, lookup, specialised, vjp

    return SimpleNamespace(
        NullAllocator=NullAllocator,
        allocator=_allocator,
        combine_info_nce=combine.combine_info_nce,
        combine_relation=combine.combine_relation,
        combine_rows=combine.combine_rows,
        heuristics=heuristics,
        lookup=lookup.lookup,
        reference=vjp.reference,
        specialised=specialised.specialised,
        specialises=specialised.specialises,
        version=__version__,
        vjp_queue=vjp.vjp_queue,
        vjp_x=vjp.vjp_x,
    )


@cache
def _chip(index: int) -> Any:
    """Of a CUDA device, or of -1, the CPU."""
    heuristics = _kernels().heuristics
    if index < 0:
        return heuristics.Chip(heuristics.INTERPRETER, 4)  # four, so that there are splits
    of = torch.cuda.get_device_properties(index)
    capability = heuristics.AMD if torch.version.hip else 10 * of.major + of.minor
    version = heuristics.version(_kernels().version)
    return heuristics.Chip(capability, of.multi_processor_count, version)


def on(x: Tensor) -> Any:
    """The device that launches go to is the current one."""
    if x.device.type == "cpu" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _precision(chip: Any, dtype: torch.dtype) -> str:
    """Of float32 products, as torch says; the gradient's beside float16 lose nothing in TF32."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return _kernels().heuristics.precision(chip.capability, exact=exact)


def scales(scale: Scale) -> tuple[Any, ...]:
    """The scales as kernels take them: numbers in units of log 2, or addresses on the device."""
    if isinstance(scale, Tensor):
        return tuple(scale[i:] for i in range(len(scale)))
    return tuple(_kernels().heuristics.log2_scale(c) for c in scale)


class _Launch:
    """A kernel's launches with arguments that are alike in all but values, worked out once.

    Triton looks at every argument of every launch to find what it has compiled, which takes longer than all
    that is left here; with small batches that is as long as the GPU's work (bench/launch.py).
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], **options: int) -> None:
        self.kernel, self.grid, self.options = kernel, (*grid, 1, 1)[:3], options
        self.constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self.values = tuple(self.constants.values())
        self.run: Any = None

    def __call__(self, *arguments: Any) -> None:
        if self.run is not None:
            self.run(*arguments, *self.values)
            return
        compiled = self.kernel[self.grid](*arguments, **self.constants, **self.options)
        if compiled is not None:  # It is, when interpreted.
            self.run = compiled[self.grid]


Found = tuple[Tensor, Tensor, int, int]  # stats, with a counter of arrivals behind them; means; R, S
_plans: dict[tuple, Any] = {}  # launches and what goes with them, by what they were worked out from


def _planned(work_out: Any, device: int, *arguments: Any) -> Any:
    """work_out(device, *arguments), remembered for what is alike: tensors in layout, all else in value.

    A plan holds functions that were loaded on one device, the one that all its tensors are on.
    """
    key = (work_out, device, *(_look(a) if isinstance(a, Tensor) else a for a in arguments))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = work_out(device, *arguments)
    return plan


def _look(t: Tensor) -> tuple:
    """All of a tensor that Triton compiles apart, and that tiles are chosen by."""
    return t.dtype, t.shape, t.stride(), t.data_ptr() % 16


def _current_chip() -> Any:
    return _chip(-1 if INTERPRETED else torch.cuda.current_device())


def variants(dtype: torch.dtype, dim: int) -> list[str]:
    """What `lookup` takes beside the default on the current device, the most promising first: 16 at most."""
    names = _kernels().heuristics.variants(_current_chip(), NAMES[dtype], dim)
    return [name for name in names if unsupported_variant(name, dtype, dim) is None]


def unsupported_variant(variant: str, dtype: torch.dtype, dim: int) -> str | None:
    """The reason why `lookup` cannot take a variant on the current device, or None."""
    try:
        _tiles(variant, _current_chip(), NAMES[dtype], dim)
    except ValueError as error:
        return str(error)
    return None


def _tiles(variant: str, chip: Any, dtype: str, dim: int) -> Any:
    tiles = _of_name(variant, chip, dtype, dim)
    if tiles.specialised and not _kernels().specialises:
        raise ValueError(f"Triton {_kernels().version} has no specialised warps")
    return tiles


@cache
def _of_name(variant: str, chip: Any, dtype: str, dim: int) -> Any:
    return _kernels().heuristics.variant(variant, chip, dtype, dim)


def lookup(
    first: Tensor,
    second: Tensor,
    queue: Tensor,
    scales: tuple[Any, ...],
    exclude: Tensor | None,
    want_mean: bool,
    variant: str = "",
) -> Found:
    """For each split of the queue and row of the stack: stats [3, S, R] and means [S, R, D], or [0].

    The variant, as heuristics.variant has it, says which kernel and tiles; what a kernel of specialised warps
    does not take, the default does.
    """
    kinds = [c if isinstance(c, Tensor) else None for c in scales]  # numbers may vary
    allowed = queue.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision
    device = queue.get_device()
    launch = _planned(
        _lookup_launch, device, first, second, queue, exclude, *kinds, want_mean, allowed, variant
    )
    return launch(first, second, queue, exclude, *scales)


def _describable(t: Tensor) -> bool:
    """Whether the copy engine can address the rows of t."""
    stride = t.stride(0)
    return stride >= t.shape[1] and stride * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def _slots(chip: Any, kernel: Any, tiles: Any, constants: dict[str, Any], *arguments: Any) -> Any:
    """The chip with as many processors as it runs programs of a kernel at once, by what the compiler made."""
    heuristics = _kernels().heuristics
    if chip.capability == heuristics.INTERPRETER:
        return chip
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    compiled = kernel.warmup(
        *arguments, **constants, grid=(1, 1, 1), num_warps=tiles.warps, num_stages=tiles.stages
    )
    _ = compiled.run  # loads it, which counts its registers
    made = compiled.metadata
    count = heuristics.resident(
        chip, made.num_warps, compiled.n_regs, made.shared, getattr(made, "tmem_size", None) or 0
    )
    return chip._replace(processors=chip.processors * count)


def _lookup_launch(
    device: int,
    first: Tensor,
    second: Tensor,
    queue: Tensor,
    exclude: Tensor | None,
    *rest: Any,
) -> Any:
    *kinds, want_mean, _, variant = rest
    kernels, chip = _kernels(), _chip(device)
    heuristics, (size, dim) = kernels.heuristics, queue.shape
    split, rows = first.shape[0], first.shape[0] + second.shape[0]
    dtype = NAMES[queue.dtype]
    plain = heuristics.forward(chip, dtype, dim)
    tiles = _tiles(variant, chip, dtype, dim)
    specialised = tiles.specialised and exclude is None and all(map(_describable, (first, second, queue)))
    if tiles.specialised and not specialised:
        tiles = plain
    tma = _describable(queue)

    def constants(tiles: Any, **flags: bool) -> dict[str, Any]:
        return {
            "DIM": dim, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_D": heuristics.width(dim),
            "MEAN": want_mean, "EXCLUDE": exclude is not None, "EVEN": size % tiles.block_n == 0,
            "FIXED": dtype != "fp16", "DEVICE_SCALE": kinds[0] is not None,
            "PRECISION": _precision(chip, queue.dtype), "CHUNK": tiles.chunk,
            "PACK": heuristics.packs(chip.capability), "TMA": tiles.tma and tma, "REDO": False,
        } | flags  # fmt: skip

    blocks, kernel = -(-rows // tiles.block_m), kernels.lookup
    if specialised:  # whose blocks hold rows of one stack
        blocks = sum(-(-len(stack) // tiles.block_m) for stack in (first, second))
        kernel = kernels.specialised
    sizes = first.stride(0), second.stride(0), queue.stride(0), split, rows, size
    scales = [1.0 if c is None else c for c in kinds]
    arguments = first, second, queue, exclude, *scales, torch.float32, torch.float32, *sizes, 1
    slots = _slots(chip, kernel, tiles, constants(tiles), *arguments)
    splits, step = heuristics.splits(blocks * tiles.block_m, size, dim, tiles, slots)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    runs = [_Launch(kernel, (blocks, splits), constants(tiles), **options)]
    if specialised and dtype != "fp16":
        # Steps are whole tiles for it, too.
        plain = plain._replace(block_n=min(plain.block_n, tiles.block_n))
        options = {"num_warps": plain.warps, "num_stages": plain.stages}
        again = constants(plain, FIXED=False, REDO=True)
        runs.append(_Launch(kernels.lookup, (-(-rows // plain.block_m), splits), again, **options))
    shape = (splits, rows, dim) if want_mean else (0,)
    allocates = tiles.tma and tma

    def launch(*arguments: Any) -> Found:
        bank = arguments[2]
        stats = bank.new_empty(3 * splits * rows + 1, dtype=torch.float32)
        means = bank.new_empty(shape, dtype=torch.float32)
        if allocates and isinstance(kernels.allocator.get(), kernels.NullAllocator):
            kernels.allocator.set(_scratch)  # the caller has set none
        for run in runs:
            run(*arguments, stats, means, *sizes, step)
        return stats, means, rows, splits

    return launch


FLAGS = {
    "combine_rows": ("MEAN", "DEVICE_SCALE"),
    "combine_relation": ("KL", "TOTAL", "GRAD", "DEVICE_SCALE"),
    "combine_info_nce": ("TOTAL", "GRAD", "DEVICE_SCALE"),
}


def _combine_launch(
    device: int, name: str, dim: int, splits: int, rows: int, flags: tuple, *tensors: Tensor
) -> _Launch:
    kernels = _kernels()
    constants, warps = kernels.heuristics.combine(_chip(device), dim, splits)
    constants |= zip(FLAGS[name], flags, strict=True)
    return _Launch(getattr(kernels, name), (rows,), constants, num_warps=warps)


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    """Those whose look decides what is compiled."""
    return [v for v in values if isinstance(v, Tensor)]


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory on the current device for the descriptors that a launch makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


# What two_steps.py needs: lookup, on and scales above, and these.

readable = dense


def combine_rows(found: Found, scales: tuple, split: int, lse: Tensor, mean: Tensor) -> None:
    stats, means, count, splits = found
    dim = mean.shape[1]
    flags = dim > 0, isinstance(scales[0], Tensor)
    apart = _tensors(scales)
    combine = _planned(_combine_launch, lse.get_device(), "combine_rows", dim, splits, count, flags, *apart)
    combine(stats, means, *scales, lse, mean, split, count, splits)


def combine_relation(
    q: Tensor, k: Tensor, scales: tuple, teacher: Found, student: Found, offset: int, form: str,
    weight: float, loss: Tensor, total: Tensor | None, entropy: Tensor, grad_q: Tensor,
    lse: Tensor, mean_t: Tensor,
) -> None:  # fmt: skip
    (count, dim), batch = q.shape, k.shape[0]
    stats_t, means_t, rows_t, splits_t = teacher
    stats_s, means_s, rows_s, splits_s = student
    flags = form == "kl", total is not None, grad_q.numel() > 0, isinstance(scales[0], Tensor)
    most, apart = max(splits_t, splits_s), _tensors((q, k, *scales))
    combine = _planned(_combine_launch, q.get_device(), "combine_relation", dim, most, count, flags, *apart)
    combine(
        q, k, *scales, weight, stats_t, means_t, stats_s, means_s, loss, total, entropy, grad_q, lse, mean_t,
        q.stride(0), k.stride(0), batch, rows_t, splits_t, rows_s, splits_s, offset,
    )  # fmt: skip


def combine_info_nce(
    q: Tensor, k: Tensor, scales: tuple, found: Found, weight: float,
    loss: Tensor, total: Tensor | None, sigma: Tensor, grad_q: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    (count, dim), (stats, means, _, splits) = q.shape, found
    flags = total is not None, grad_q.numel() > 0, isinstance(scales[0], Tensor)
    apart = _tensors((q, k, *scales))
    combine = _planned(_combine_launch, q.get_device(), "combine_info_nce", dim, splits, count, flags, *apart)
    combine(
        q, k, *scales, weight, stats, means, loss, total, sigma, grad_q, lse,
        q.stride(0), k.stride(0), k.shape[0], count, splits,
    )  # fmt: skip


rows = partial(two_steps.rows, sys.modules[__name__])
relation = partial(two_steps.relation, sys.modules[__name__])
info_nce = partial(two_steps.info_nce, sys.modules[__name__])


def _vjp_x_splits(
    device: int, x: Tensor, queue: Tensor, exclude: Tensor | None, scale: float | Tensor, lse: Tensor,
    g_mean: Tensor | None, options: tuple[tuple[str, Any], ...], tiles: Any,
) -> tuple[int, int]:  # fmt: skip
    kernels, (rows, dim), size = _kernels(), x.shape, queue.shape[0]
    sizes = x.stride(0), queue.stride(0), rows, size, 1
    arguments = x, queue, exclude, scale, lse, lse, g_mean, torch.float32, torch.float32, *sizes
    chip = _slots(_chip(device), kernels.vjp_x, tiles, dict(options), *arguments)
    return kernels.heuristics.splits(rows, size, dim, tiles, chip)


def vjp(
    x: Tensor,
    queue: Tensor,
    scale: float | Tensor,
    exclude: Tensor | None,
    lse: Tensor,
    mean: Tensor,  # Unread where nothing but the queue's gradient through lse is wanted.
    g_lse: Tensor | None,
    g_mean: Tensor | None,
    g_row: Tensor | None,
    want_x: bool,
    want_queue: bool,
) -> tuple[Tensor, Tensor]:
    x, queue = dense(x), dense(queue)
    (rows, dim), size, lse = x.shape, queue.shape[0], lse.contiguous()
    exclude, g_lse, g_mean, g_row = (
        t if t is None else t.contiguous() for t in (exclude, g_lse, g_mean, g_row)
    )
    grad_x = grad_queue = lse.new_empty(0, dim)
    g_lse = lse.new_zeros(rows) if g_lse is None else g_lse
    base = g_lse
    if g_mean is not None:
        base = base - (mean * g_mean).sum(1)
    with on(x):
        kernels, device = _kernels(), x.get_device()
        chip = _chip(device)
        common = {
            "DIM": dim, "BLOCK_D": kernels.heuristics.width(dim), "EXCLUDE": exclude is not None,
            "G_MEAN": g_mean is not None, "DEVICE_SCALE": isinstance(scale, Tensor),
            "PRECISION": _precision(chip, x.dtype), "PACK": kernels.heuristics.packs(chip.capability),
        }  # fmt: skip
        c = scale.float() if isinstance(scale, Tensor) else kernels.heuristics.log2_scale(scale)
        of_lse = torch.empty_like(lse)
        kernels.reference[(-(-rows // 256),)](
            lse, c, of_lse, rows, BLOCK=256, DEVICE_SCALE=isinstance(scale, Tensor)
        )
        if want_x or g_mean is not None:
            tiles = kernels.heuristics.backward(chip, NAMES[x.dtype], dim)
            options = common | {
                "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "EVEN": size % tiles.block_n == 0,
                "WEIGHTED": want_x, "CHUNK": tiles.chunk,
            }  # fmt: skip
            like = c if isinstance(c, Tensor) else 1.0
            splits, step = _planned(
                _vjp_x_splits, device, x, queue, exclude, like, lse, g_mean, tuple(options.items()), tiles
            )
            totals = lse.new_empty(splits, rows)
            weighted = lse.new_empty((splits, rows, dim) if want_x else 0)
            kernels.vjp_x[(-(-rows // tiles.block_m), splits)](
                x, queue, exclude, c, of_lse, base, g_mean, totals, weighted,
                x.stride(0), queue.stride(0), rows, size, step,
                num_warps=tiles.warps, num_stages=tiles.stages, **options,
            )  # fmt: skip
            # sum_j w_j must be g_lse. What rounding leaves goes out along the mean: without it a sharp row
            # loses every digit, since u_j - ubar nearly vanishes where p_j does not.
            rest = totals.sum(0) - g_lse
            base = base - rest
            if want_x:
                grad_x = (weighted.sum(0) - rest[:, None] * mean) * scale
        if want_queue:
            tiles = kernels.heuristics.backward_queue(chip, NAMES[x.dtype], dim)
            grad_queue = lse.new_empty(size, dim)
            kernels.vjp_queue[(-(-size // tiles.block_n),)](
                x, queue, exclude, c, of_lse, base, g_mean, g_row, grad_queue,
                x.stride(0), queue.stride(0), rows, size,
                BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, G_ROW=g_row is not None,
                CHUNK=tiles.chunk, num_warps=tiles.warps, num_stages=tiles.stages, **common,
            )  # fmt: skip
    return grad_x, grad_queue


def variant(name: str) -> Any:
    return two_steps.variant(sys.modules[__name__], partial(lookup, variant=name))
