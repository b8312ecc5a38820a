"""The peers that are timed: relssl's backends, plain PyTorch, and other packages, each running its own code.

A peer makes, from a Problem, a function without arguments that returns the mean loss. It prepares beforehand
what it needs beyond the inputs (a queue of another layout, a compiled function). A peer that cannot run
raises Unsupported with the reason. relssl computes the cross-entropy form, the value of the published code.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import eager
import torch
from torch import Tensor
from torch.nn import functional as F
from work import INFO_NCE, NT_XENT, STUDENT, TEACHER, Case, Problem

from relssl import FeatureQueue, backends
from relssl.functional import info_nce, nt_xent, queue_logsumexp, relation_loss
from relssl.nn import ClusterLoss, NTXentLoss

Loss = Callable[[], Tensor]
GRAPH = ", graph"  # The names of peers that are replayed as CUDA graphs end so.


class Unsupported(Exception):
    """The reason why a peer cannot run."""


@dataclass(frozen=True)
class Peer:
    make: Callable[[Problem], Loss]
    form: str = "ce"  # of the relation loss
    normalises: bool = False  # it normalises its rows, so gradients are orthogonal to them
    memory: Callable[[Case], int] = lambda case: 0  # bytes, roughly


PEERS: dict[str, dict[str, Peer]] = {}


def peer(work: str, name: str, **traits):
    def register(make: Callable[[Problem], Loss]) -> Callable[[Problem], Loss]:
        PEERS.setdefault(work, {})[name] = Peer(make, **traits)
        return make

    return register


def matrices(case: Case) -> int:
    """Returns the bytes of eager code: some five matrices of similarities, and as many temporaries."""
    return 40 * case.pairs


def package(name: str, module: str) -> ModuleType:
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise Unsupported(f"{name} is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise Unsupported(f"{name}: {missing}") from missing


def solo_learn(path: str) -> ModuleType:
    """Imports a file of solo-learn that needs torch and torchvision alone; the package imports Lightning."""
    found = importlib.util.find_spec("solo")
    if found is None or not found.submodule_search_locations:
        raise Unsupported("solo-learn is not installed")
    file = Path(found.submodule_search_locations[0]) / f"{path}.py"
    spec = importlib.util.spec_from_file_location(f"solo_{file.stem}", file)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def lightly(module: str) -> ModuleType:
    importlib.import_module("relssl.datasets.torchvision_import")  # lightly imports it; it may be broken
    return package("lightly", module)


def needs_gpu(p: Problem, name: str) -> None:
    if p.device == "cpu":
        raise Unsupported(f"{name}: its kernels need a GPU")


# ------------------------------------------------------------------------------------------------ relssl


def check_backend(p: Problem, backend: str) -> str:
    if backend != "auto":
        why = backends.unsupported(backend, p.device, p.q.dtype, p.case.dim)
        if why is not None:
            raise Unsupported(why)
    return backend


def ours(p: Problem, backend: str) -> Loss:
    """Returns relssl's loss by one of its backends; "auto" is the default."""
    name, case = check_backend(p, backend), p.case
    if case.work in ("nt_xent", "nt_xent_queue"):
        queue = p.queue if case.size else None
        return lambda: nt_xent(p.q, p.k, temperature=NT_XENT, queue=queue, backend=name)
    if case.work == "sacc":
        instance = NTXentLoss(temperature=NT_XENT, backend=name)
        clusters = ClusterLoss(temperature=1.0, backend=name)

        def sacc() -> Tensor:
            (w1, w2, s), (p1, p2, p3) = p.q, p.assigned
            loss = instance(w1, w2) + instance(w2, s)
            return loss + clusters(p1, p2) + clusters(p1, p3) + clusters(p2, p3)

        return sacc
    if case.work == "info_nce":
        return lambda: info_nce(p.q, p.k, p.queue, temperature=INFO_NCE, backend=name)
    if case.work == "in_queue":

        def in_queue() -> Tensor:
            lse, _ = queue_logsumexp(p.q, p.queue, INFO_NCE, backend=name)
            return (lse - (p.q * p.k).sum(1) / INFO_NCE).mean()

        return in_queue
    ids, queue_ids = (p.ids, p.queue_ids) if case.work == "relation_ids" else (None, None)
    return lambda: relation_loss(p.q, p.k, p.queue, ids=ids, queue_ids=queue_ids, form="ce", backend=name)


for _work in (
    "relation",
    "relation_ids",
    "multi_crop",
    "info_nce",
    "in_queue",
    "nt_xent",
    "nt_xent_queue",
    "sacc",
):
    for _name in backends.BACKENDS:
        _traits = {"memory": matrices} if _name == "reference" else {}
        peer(_work, f"relssl {_name}", **_traits)(partial(ours, backend=_name))
peer("relation_ids", "relssl without ids")(lambda p: lambda: relation_loss(p.q, p.k, p.queue, form="ce"))
peer("relation", "relssl triton" + GRAPH)(partial(ours, backend="triton"))
peer("relation", "relssl cuda/sm_90a")(partial(ours, backend="cuda/sm_90a"))


def find(work: str, name: str) -> Peer:
    """Returns a peer by name; "relssl" is relssl's backend "auto"."""
    return Peer(partial(ours, backend="auto")) if name == "relssl" else PEERS[work][name]


def runner(problem: Problem, name: str) -> Callable[[], tuple]:
    """Returns a peer's function that computes the loss and, if the case has them, its gradients."""
    if name.endswith(GRAPH):
        return replayed(runner(problem, name.removesuffix(GRAPH)))
    loss, leaves = find(problem.case.work, name).make(problem), problem.leaves

    def forward() -> tuple:
        with torch.no_grad():
            return loss(), ()

    def both() -> tuple:
        value = loss()
        return value, torch.autograd.grad(value, leaves)

    return both if problem.case.grad else forward


def replayed(run: Callable[[], tuple]) -> Callable[[], tuple]:
    """Captures a function in a CUDA graph, and returns one that replays it, without the host's launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> tuple:
        graph.replay()
        return results

    return replay


# ------------------------------------------------------------------------------------------------ PyTorch

EAGER: dict[str, Callable[[Problem], tuple]] = {
    "relation": lambda p: (eager.relation_loss, p.q, p.k, p.columns, STUDENT, TEACHER),
    "relation_ids": lambda p: (
        eager.relation_loss_with_ids,
        p.q,
        p.k,
        p.columns,
        p.ids,
        p.queue_ids,
        STUDENT,
        TEACHER,
    ),
    "multi_crop": lambda p: (eager.multi_crop, p.q, p.k, p.columns, STUDENT, TEACHER),
    "info_nce": lambda p: (eager.info_nce, p.q, p.k, p.columns, INFO_NCE),
    "in_queue": lambda p: (eager.queue_cross_entropy, p.q, p.queue, p.targets, INFO_NCE),
    "nt_xent": lambda p: (eager.nt_xent, p.q, p.k, NT_XENT),
    "nt_xent_queue": lambda p: (eager.nt_xent, p.q, p.k, NT_XENT, p.queue),
    "sacc": lambda p: (eager.sacc, p.q, p.assigned, NT_XENT),
}


def plain(p: Problem) -> Loss:
    loss, *arguments = EAGER[p.case.work](p)
    return lambda: loss(*arguments)


compile_once = cache(torch.compile)


def compiled(p: Problem) -> Loss:
    """Compiles as by default: the first shape on its own, at the next one once for all others."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of running eager code
    loss, *arguments = EAGER[p.case.work](p)
    fast = compile_once(loss)
    return lambda: fast(*arguments)


for _work in EAGER:
    peer(_work, "eager", memory=matrices)(plain)
    peer(_work, "torch.compile", memory=matrices)(compiled)


@peer("nt_xent", "published code", memory=matrices)
def _(p: Problem) -> Loss:
    return lambda: eager.published_nt_xent(p.q, p.k, NT_XENT)


class _Attention(torch.autograd.Function):
    """torch's own flash attention with keys = values = queue, which also returns the log-sum-exp.

    relssl's epilogue follows, with the gradient in forward: the fastest code that a user could write from
    parts. A queue in one piece occupies as many processors as there are blocks of rows (on a GPU more, where
    the kernel itself splits keys); in `num_splits` pieces, which are heads whose results are merged, all.
    """

    @staticmethod
    def forward(ctx, q, p, num_splits):
        x, case = q.flatten(0, -2), p.case
        if case.work in ("relation", "multi_crop"):
            mean, lse = attend(x, p.queue, STUDENT, num_splits)
            target, _ = attend(p.k, p.queue, TEACHER, num_splits)
            target = target.repeat(case.views, 1)
            tau = STUDENT
        else:
            mean, lse = attend(x, p.queue, INFO_NCE, num_splits)
            target, tau = p.k.float(), INFO_NCE
        similarity = (x.float() * target).sum(1) / tau
        if case.work == "info_nce":
            surprise = lse - similarity
            ctx.save_for_backward((surprise.sigmoid() / (tau * len(x)))[:, None] * (mean - target))
            loss = F.softplus(surprise)
        else:
            ctx.save_for_backward((mean - target) / (tau * len(x)))
            loss = lse - similarity
        ctx.like = q
        return loss.mean()

    @staticmethod
    def backward(ctx, g):
        return (g * ctx.saved_tensors[0]).to(ctx.like.dtype).view_as(ctx.like), None, None


def attend(x: Tensor, queue: Tensor, tau: float, num_splits: int) -> tuple[Tensor, Tensor]:
    """Returns the softmax-weighted mean of the queue and the log-sum-exp of rows x / tau, in float32."""
    pieces = queue.view(1, num_splits, -1, queue.shape[1])
    rows = x.expand(1, num_splits, *x.shape)
    if queue.is_cuda:
        mean, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            rows, pieces, pieces, scale=1 / tau
        )
    else:
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, pieces, pieces, scale=1 / tau
        )
    if num_splits == 1:
        return mean[0, 0].float(), lse.view(-1).float()
    whole = lse[0].logsumexp(0)
    return torch.einsum("sb,sbd->bd", (lse[0] - whole).exp(), mean[0].float()), whole


def attention(p: Problem) -> Loss:
    if p.device != "cpu" and (p.case.dim > 256 or p.q.dtype == torch.float32):
        raise Unsupported("torch's flash attention takes 16-bit rows up to 256 wide")
    return lambda: _Attention.apply(p.q, p, 1)


def split_attention(p: Problem) -> Loss:
    """Splits the queue into as many equal pieces as fill the device's processors with blocks of 128 rows."""
    attention(p)
    rows, size = p.q.flatten(0, -2).shape[0], p.case.size
    if p.device == "cpu":
        processors = torch.get_num_threads()
    else:
        processors = torch.cuda.get_device_properties(0).multi_processor_count
    num_splits = 1
    while num_splits * -(-rows // 128) < processors and size % (2 * num_splits) == 0:
        num_splits *= 2
    if num_splits == 1:
        raise Unsupported("its rows fill the device without splitting the queue")
    return lambda: _Attention.apply(p.q, p, num_splits)


for _work in ("relation", "multi_crop", "info_nce", "in_queue"):
    peer(_work, "attention")(attention)
    peer(_work, "attention, split queue")(split_attention)


@peer("in_queue", "torch linear_cross_entropy, chunked")
def _(p: Problem) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unsupported(f"torch {torch.__version__} has no linear_cross_entropy")
    # Its default is a row at a time where K is much larger than B D, which takes 16 times as long.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64, chunking_method=None)
    return lambda: F.linear_cross_entropy(p.q / INFO_NCE, p.queue, p.targets, options=options)


# ------------------------------------------------------------------------------------------------ packages


@peer("relation", "liger-kernel", form="kl", memory=lambda case: 40 * min(case.rows, 1024) * case.size)
def _(p: Problem) -> Loss:
    """Distils a linear head in PyTorch, 1,024 rows at a time; it computes the head's gradient, too."""
    jsd = package("liger-kernel", "liger_kernel.chunked_loss.jsd_loss")
    loss = jsd.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    return lambda: loss(p.q / STUDENT, p.queue, p.k / TEACHER, p.queue, p.targets)


@peer("relation", "liger-kernel, Triton", form="kl")
def _(p: Problem) -> Loss:
    needs_gpu(p, "liger-kernel, Triton")
    jsd = package("liger-kernel", "liger_kernel.transformers.fused_linear_jsd")
    loss = jsd.LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda: loss(p.q / STUDENT, p.queue, p.k / TEACHER, p.queue, None)


@peer("in_queue", "liger-kernel")
def _(p: Problem) -> Loss:
    needs_gpu(p, "liger-kernel's linear cross-entropy")
    module = package("liger-kernel", "liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(p.queue, p.q / INFO_NCE, p.targets)


@peer("in_queue", "cut-cross-entropy")
def _(p: Problem) -> Loss:
    """Runs its Triton kernels on a GPU, its torch.compile implementation elsewhere."""
    loss = package("cut-cross-entropy", "cut_cross_entropy").linear_cross_entropy
    implementation = "torch_compile" if p.device == "cpu" else "cce"
    # Its default omits small terms of the gradient: here, all of the queue's.
    return lambda: loss(p.q / INFO_NCE, p.queue, p.targets, filter_eps=None, impl=implementation)


@peer("in_queue", "inf-cl")
def _(p: Problem) -> Loss:
    needs_gpu(p, "inf-cl")
    loss, head = package("inf-cl", "inf_cl").cal_flash_loss, min(p.case.dim, 256)
    return lambda: loss(p.q, p.queue, p.targets, 1 / INFO_NCE, head).mean()


@peer("relation", "solo-learn", memory=matrices)
def _(p: Problem) -> Loss:
    """Clones the queue, as its training step does before enqueueing."""
    loss = solo_learn("losses/ressl").ressl_loss_func
    return lambda: loss(p.q, p.k, p.queue.clone().detach(), STUDENT, TEACHER)


@peer("info_nce", "solo-learn", memory=matrices)
def _(p: Problem) -> Loss:
    loss = solo_learn("losses/moco").moco_loss_func
    return lambda: loss(p.q, p.k, p.columns.clone().detach(), INFO_NCE)


@peer("nt_xent", "solo-learn", normalises=True, memory=matrices)
def _(p: Problem) -> Loss:
    loss = solo_learn("losses/simclr").simclr_loss_func
    return lambda: loss(p.q, p.k, NT_XENT)


@peer("info_nce", "lightly", normalises=True, memory=matrices)
def _(p: Problem) -> Loss:
    """Clones its memory bank for every batch and enqueues: both are in its time."""
    module = lightly("lightly.loss.ntx_ent_loss")
    loss = module.NTXentLoss(temperature=INFO_NCE, memory_bank_size=(p.case.size, p.case.dim)).to(p.device)
    loss.memory_bank.bank = p.queue.clone()
    return lambda: loss(p.q, p.k)


@peer("nt_xent", "lightly", normalises=True, memory=matrices)
def _(p: Problem) -> Loss:
    loss = lightly("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=NT_XENT)
    return lambda: loss(p.q, p.k)


@peer(
    "nt_xent",
    "pytorch-metric-learning",
    normalises=True,
    memory=lambda case: 24 * case.pairs * 2 * case.rows,  # each positive with all pairs of the batch
)
def _(p: Problem) -> Loss:
    losses = package("pytorch-metric-learning", "pytorch_metric_learning.losses")
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=NT_XENT))
    return lambda: loss(p.q, p.k)


# ------------------------------------------------------------------------------------------------ queues


class Enqueue:
    """A queue: a function that enqueues keys, and one that returns its rows, [K, D]."""

    def __init__(self, enqueue: Callable[[Tensor], object], rows: Callable[[], Tensor]) -> None:
        self.enqueue, self.rows = enqueue, rows


def _relssl_queue(rows: Tensor) -> Enqueue:
    queue = FeatureQueue(*rows.shape, dtype=rows.dtype, device=rows.device)
    queue.rows.copy_(rows)
    return Enqueue(queue.enqueue, lambda: queue.rows)


def _eager_queue(rows: Tensor) -> Enqueue:
    queue = eager.Queue(rows)
    return Enqueue(queue.enqueue, lambda: queue.columns.T)


def _lightly_queue(rows: Tensor) -> Enqueue:
    """Its memory bank returns a clone of itself with every batch."""
    bank = lightly("lightly.models.modules.memory_bank").MemoryBankModule(size=tuple(rows.shape))
    bank = bank.to(rows.device)
    bank.bank = rows.clone()
    return Enqueue(lambda keys: bank(keys, update=True), lambda: bank.bank)


def _metric_learning_queue(rows: Tensor) -> Enqueue:
    losses = package("pytorch-metric-learning", "pytorch_metric_learning.losses")
    memory = losses.CrossBatchMemory(losses.NTXentLoss(), rows.shape[1], memory_size=len(rows)).to(
        rows.device
    )
    memory.embedding_memory = rows.clone()
    labels: dict[int, Tensor] = {}

    def enqueue(keys: Tensor) -> None:
        own = labels.setdefault(len(keys), torch.arange(len(keys), device=keys.device))
        memory.add_to_memory(keys, own, len(keys))

    return Enqueue(enqueue, lambda: memory.embedding_memory)


QUEUES: dict[str, Callable[[Tensor], Enqueue]] = {
    "relssl": _relssl_queue,
    "eager": _eager_queue,
    "lightly": _lightly_queue,
    "pytorch-metric-learning": _metric_learning_queue,
}
