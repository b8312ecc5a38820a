"""Times the views of ReSSL and SACC against the augmentations of other packages, with the same settings."""

import pytest
from machine import DEVICE
from operations import count
from peers import Unsupported
from timing import alternate
from torch._inductor import metrics
from work import Case

# The dependencies of training may be missing.
views = pytest.importorskip("views", exc_type=ImportError)

WORKS = "weak_view", "strong_view", "sacc_view"
CASES: list = [Case(work, 128, 0, 32) for work in WORKS]
CASES += [pytest.param(Case(work, 32, 0, 224), marks=pytest.mark.large) for work in WORKS]
ON_DEVICE = "relssl", "kornia"  # The others' operations are those of worker processes, or compiled.
SECONDS = 1.5


@pytest.mark.parametrize("peer", views.VIEWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_view(case, peer, benchmark, results, full):
    if peer == "torch.compile" and not full:
        pytest.skip("compiles for minutes: --full")
    images = views.pictures(case.rows, case.dim, DEVICE)
    view = views.view_of(case.work, case.dim)
    ours = views.ours(view, images)
    metrics.reset()
    try:
        run = views.VIEWS[peer](view, images)
        away = views.disagreement(ours(), run())
        assert away < 6, f"{away:.1f} standard errors away: not timed"
    except Unsupported as why:
        results.absent(case, peer, str(why))
        pytest.skip(str(why))
    extra = {}
    if peer in ON_DEVICE:
        extra["operations"], extra["synchronisations"] = count(run)
    if peer == "torch.compile":
        extra["kernels"] = metrics.generated_kernel_count
    benchmark.group, benchmark.name = str(case), peer
    seconds = alternate(benchmark, DEVICE, ours, run, images.float, SECONDS * (1 + full))
    benchmark.extra_info.update(results.timed(case, peer, seconds, None, None, extra=extra))
