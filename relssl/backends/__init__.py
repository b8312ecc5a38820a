"""The backends: who computes, and the contract each of them keeps.

A backend is a module with

    supports(device, dtype, dim) -> str | None
        None, or the reason why it cannot take rows of this width and dtype on this device type.

    rows(x, queue, scale, split, exclude, want_mean) -> lse [2, R], mean [R, D]
        With theta_r = c_r x_r, where c_r is scale[0] for r < split and scale[1] from there on:
            lse_r  = log sum_j exp<theta_r, m_j>         the log-partition function A(theta_r)
            mean_r = sum_j p_rj m_j                      its gradient
        over the queue rows m_j, leaving out j == exclude[r]. Without want_mean, mean is [R, 0].

    vjp(x, queue, scale, exclude, lse, mean, g_lse, g_mean, g_row, want_x, want_queue)
            -> grad_x [R, D], grad_queue [K, D]
        With one scale c for all rows and
            u_rj         = <m_j, g_mean_r>, ubar_r = <mean_r, g_mean_r>
            w_rj         = p_rj (g_lse_r + u_rj - ubar_r)
        these are
            grad_x_r     = c sum_j w_rj m_j
            grad_queue_j = sum_r w_rj theta_r + p_rj g_row_r
        g_row is g_mean for the vjp of `rows`; a loss whose terms cancel on paper passes what is left.
        g_lse, g_mean and g_row may be None (zero). What is not wanted comes back as [0, D].

    relation(q, k, queue, scale, form, weight, want_grad)
            -> loss, entropy [B], grad_q, lse [2, B + V*B], mean_t [B, D]
        The relation loss of functional.relation_loss in one pass over the rows of k [B, D] and then q
        [B, D] or [V, B, D]. With a float as weight, loss is weight times the sum of the rows' losses, 0-d;
        with None, these themselves, in the shape of q without D. grad_q, in q's shape, is the gradient of
        q but for the factor grad_output: weight scale[0] (mean_s - mean_t), where None weighs 1. Without
        want_grad it is [V*B, 0].

    info_nce(q, k, queue, scale, weight, want_grad) -> loss, sigma, grad_q, lse [2, V*B]
        InfoNCE as in functional.info_nce; scale is one, weight as above. With z = A(theta) - <theta, k>, a
        row's loss is log(1 + exp z), its sigma 1 / (1 + exp -z), in the shape of q without D, and grad_q is
        weight scale[0] sigma (mean - k). Without want_grad it is [V*B, 0]. A backend without info_nce gets
        common.info_nce over its own `rows`.

x [R, D] and queue [K, D] share their dtype and may have any strides; scale is made of Python floats, or
is a tensor where a temperature lives on the device; exclude is int64 [R] or None; everything else is
float32 (float64 for float64 input) and results are too. lse comes in two parts, [2, R], whose sum it is:
rounded to one float, a large one would carry its rounding into every p = exp(logit - lse). An empty row
(its only queue row excluded) has lse = -inf and mean = 0. A backend without `vjp` borrows chunked's.

Where a backend has several kernels, its name alone stands for the default, and "NAME/VARIANT" for each other:

    variants(dtype, dim) -> list[str]
        Those worth trying beside the default on this machine, for a dtype and width that `supports` accepts.

    unsupported_variant(variant, dtype, dim) -> str | None
        None, or the reason why this machine cannot run a variant. The text may be anything.

    variant(name) -> object
        With the functions above, by that variant; ValueError, from here or from them, where it cannot run.

The reference stands apart: it has `supports`, and whole differentiable functions in place of the rest.
"""

from collections.abc import Sequence, Sized
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from relssl import tuned
from relssl.backends import chunked, cpu, cuda, reference, triton

MODULES: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "chunked": chunked,
    "reference": reference,
}
# As "auto" tries them where `relssl tune` has measured nothing.
DEFAULTS = ("cpu", "triton", "chunked", "reference")


@cache
def get(name: str) -> Any:
    """What keeps the contract under this name, "NAME" or "NAME/VARIANT"."""
    own, _, variant = name.partition("/")
    return MODULES[own].variant(variant) if variant else MODULES[own]


def unsupported(name: str, device: str, dtype: torch.dtype, dim: int) -> str | None:
    """Why the backend cannot run this, or None. ValueError for an unknown name."""
    own, _, variant = str(name).partition("/")
    if own not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(('auto', *MODULES))}; got {name!r}")
    module = MODULES[own]
    reason = module.supports(device, dtype, dim)
    if reason or own == name:
        return reason
    if not hasattr(module, "unsupported_variant"):
        return f"{own} has no variants"
    if torch.compiler.is_compiling():  # The width may be symbolic, and what depends on it: the op raises.
        return None
    return module.unsupported_variant(variant, dtype, dim)


def choose(
    name: str,
    device: str,
    dtype: torch.dtype,
    dim: int,
    stacks: Sequence[Tensor] = (),
    queue: Sized = (),
) -> str:
    """The backend to run: `name`, or where that is "auto" the one that `relssl tune` found the fastest for a
    size near that of the stacks [..., D] of rows and the queue, or else the first default that can.

    Raises ValueError for an unknown name, or with the reason why the named backend cannot.
    """
    if name == "auto":
        if stacks and (choices := tuned.choices(device, dtype)):
            rows = sum(stack.numel() // dim for stack in stacks)
            if chosen := measured(choices, device, dtype, dim, rows, len(queue)):
                return chosen
        for name in DEFAULTS:  # the last of which takes anything
            if MODULES[name].supports(device, dtype, dim) is None:
                return name
    if reason := unsupported(name, device, dtype, dim):
        raise ValueError(f"backend {name!r} cannot run this: {reason}")
    return name


def measured(
    choices: Sequence[tuned.Choice], device: str, dtype: torch.dtype, dim: int, rows: int, queue: int
) -> str | None:
    """The nearest of the choices, if it can run this."""
    chosen = tuned.nearest(choices, dim, rows, queue)
    if chosen and available(chosen.backend, device, dtype, chosen.dim):
        return chosen.backend
    return None


def available(name: str, device: str, dtype: torch.dtype, dim: int) -> bool:
    """Whether a backend is there, and can run this."""
    return name.partition("/")[0] in MODULES and unsupported(name, device, dtype, dim) is None
