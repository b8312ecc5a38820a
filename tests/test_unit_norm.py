"""Tests normalize=True, and the warning of rows that do not have norm 1."""

import warnings

import pytest
import torch
from oracle import unit
from torch.nn import functional as F

import relssl
from relssl import unit_norm
from relssl.nn import InfoNCELoss, NTXentLoss, RelationLoss

pytestmark = pytest.mark.usefixtures("one_thread")

B, K, D = 5, 24, 8
QUEUE = unit(K, D)

# Of rows x and y [B, D] and further arguments.
LOSSES = {
    "relation": lambda x, y, **o: relssl.relation_loss(x, y, QUEUE, **o),
    "relation of views": lambda x, y, **o: relssl.relation_loss(torch.stack((x, x.flip(0))), y, QUEUE, **o),
    "info_nce": lambda x, y, **o: relssl.info_nce(x, y, QUEUE, **o),
    "nt_xent": lambda x, y, **o: relssl.nt_xent(x, y, **o),
    "nt_xent with a queue": lambda x, y, **o: relssl.nt_xent(x, y, queue=QUEUE, **o),
    "RelationLoss": lambda x, y, **o: RelationLoss(**o)(x, y, QUEUE),
    "InfoNCELoss": lambda x, y, **o: InfoNCELoss(**o)(x, y, QUEUE),
    "NTXentLoss": lambda x, y, **o: NTXentLoss(**o)(x, y),
}


@pytest.fixture
def first_call(monkeypatch):
    """Resets the count of calls that are checked."""
    monkeypatch.setattr(unit_norm, "calls_left", 3)


def raw_rows(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [(20 * torch.rand(B, 1, generator=g) * torch.randn(B, D, generator=g)).to(dtype) for _ in "xy"]


@pytest.mark.parametrize(
    ("loss", "compiled"), [*((loss, False) for loss in LOSSES), ("relation", True), ("nt_xent", True)]
)
def test_normalize_divides_by_the_norms(loss, compiled):
    """Value, and gradient through the norms, equal those of rows that were divided before."""
    x, y = (t.requires_grad_() for t in raw_rows())
    call = torch.compile(LOSSES[loss], fullgraph=True) if compiled else LOSSES[loss]
    found = call(x, y, normalize=True)
    expected = LOSSES[loss](F.normalize(x, dim=1), F.normalize(y, dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(v, (x, y)) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_normalize_in_float16():
    """The square of these rows' norms is above float16's largest number."""
    x, y = raw_rows(torch.float16)
    wide = [F.normalize(t.double(), dim=1) for t in (20 * x, y)]
    found = relssl.relation_loss(20 * x, y, QUEUE, normalize=True)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(relssl.relation_loss(*wide, QUEUE.double())), rel=2e-2)


@pytest.mark.parametrize("factor", [1e-9, 1e5])
@pytest.mark.parametrize("loss", ["relation", "info_nce", "nt_xent"])
def test_normalize_divides_before_it_casts(loss, factor):
    """Keys outside of float16's range, beside queries in float16."""
    x, y = raw_rows()
    found = LOSSES[loss](x.half(), factor * y, normalize=True)
    expected = LOSSES[loss](F.normalize(x.half().double(), dim=1), F.normalize(y.double(), dim=1))
    assert float(found) == pytest.approx(float(expected), rel=2e-2)


@pytest.mark.parametrize(
    ("loss", "name"), [("relation", "q"), ("relation of views", "q"), ("info_nce", "q"), ("nt_xent", "z1")]
)
def test_rows_without_norm_1_warn_once(loss, name, first_call):
    x, y = raw_rows()
    with pytest.warns(UserWarning, match=f"rows of {name} have a mean norm of .*pass normalize=True"):
        LOSSES[loss](x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LOSSES[loss](x, y)


def test_keys_and_queues_are_checked_too(first_call):
    x, _ = raw_rows()
    q = unit(B, D)
    with pytest.warns(UserWarning, match="rows of k have"):
        relssl.info_nce(q, x, QUEUE)
    unit_norm.calls_left = 3
    queue = relssl.FeatureQueue(K, D)
    relssl.info_nce(q, q, queue)
    queue.enqueue(x)
    for normalize in True, False:
        unit_norm.calls_left = 3
        with pytest.warns(UserWarning, match="rows of queue have .*enqueue normalised keys"):
            relssl.info_nce(q, q, queue, normalize=normalize)


@pytest.mark.parametrize(
    "case", ["unit", "temperature", "temperature tensor", "normalize", "later", "compiled", "zeros", "empty"]
)
def test_no_warning(case, first_call):
    """Rows of norm 1, even in bfloat16, or 0, temperatures of 1, normalize=True, later or compiled calls."""
    x, y = raw_rows()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rows of")
        if case == "unit":
            for dtype in torch.float32, torch.bfloat16:
                relssl.info_nce(unit(B, D).to(dtype), unit(B, D).to(dtype), QUEUE)
        elif case.startswith("temperature"):
            relssl.info_nce(x, y, QUEUE, temperature=torch.ones(()) if "tensor" in case else 1.0)
        elif case == "normalize":
            relssl.info_nce(x, y, QUEUE, normalize=True)
        elif case == "later":
            for rows in (unit(B, D), unit(B, D), unit(B, D), x):
                relssl.info_nce(rows, rows, QUEUE)
        elif case == "compiled":
            torch.compile(LOSSES["info_nce"], fullgraph=True)(x, y)
        else:
            queue = relssl.FeatureQueue(K, D, start=case)
            for _ in range(2):
                relssl.info_nce(unit(B, D), unit(B, D), queue)
                queue.enqueue(unit(B, D))


@pytest.mark.parametrize("loss", ["relation", "info_nce", "nt_xent"])
def test_tokens_are_to_be_flattened(loss):
    tokens = torch.randn(2, 3, D)
    name = "z1" if loss == "nt_xent" else "k"
    with pytest.raises(ValueError, match=rf"{name} must be .* pass {name}.flatten\(0, 1\)"):
        LOSSES[loss](tokens, tokens)
    if loss != "nt_xent":
        with pytest.raises(ValueError, match=r"for tokens \[B, N, D\] pass q.flatten\(0, 1\), too"):
            LOSSES[loss](tokens, tokens.flatten(0, 1))
