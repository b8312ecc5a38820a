"""BatchNorm in parts of the batch, against BatchNorm on each part, and what it costs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from checks import INTERPRETED, device, marked, to_device
from torch import nn

from relssl.backends import launching
from relssl.methods import batch_norm
from relssl.methods.batch_norm import SplitBatchNorm2d

triton = pytest.importorskip("triton")
from operations import Operations  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

BACKENDS = [marked(name, backend=name) for name in ("cpu", "triton") if name == "triton" or not INTERPRETED]


def layer(channels, splits, dtype, backend, **options):
    norm = SplitBatchNorm2d(channels, splits, **options).to(device(backend), dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
        norm.running_mean.uniform_(-1, 1)
    return norm


def batch(backend, count, channels, side, dtype, memory_format=torch.channels_last):
    x = to_device(backend, (torch.randn(count, channels, side, side + 1) * 2 + 1).to(dtype))
    return x.contiguous(memory_format=memory_format).requires_grad_()


def on_each_part(norm, x, grad):
    """Returns y, the gradients and the mean of the running statistics of nn.BatchNorm2d on the parts."""
    x = x.detach().requires_grad_()
    whole = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum).to(x.device, x.dtype)
    whole.load_state_dict(norm.state_dict())
    parts = [copy.deepcopy(whole) for _ in range(norm.splits)]
    y = torch.cat([part(own) for part, own in zip(parts, x.chunk(norm.splits), strict=True)])
    y.backward(grad)
    running = [sum(getattr(p, name) for p in parts) / norm.splits for name in ("running_mean", "running_var")]
    return y, x.grad, sum(p.weight.grad for p in parts), sum(p.bias.grad for p in parts), *running


# One chunk of few rows, several chunks with a rest, and more channels than a tile has.
SHAPES = [(8, 4, 5, 1), (4, 2, 3, 9), (6, 3, 70, 7)]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(("count", "splits", "channels", "side"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_batch_norm_on_each_part(backend, count, splits, channels, side, memory_format):
    dtype = torch.float64 if backend == "cpu" else torch.float32
    norm = layer(channels, splits, dtype, backend, momentum=0.3, eps=1e-3)
    x = batch(backend, count, channels, side, dtype, memory_format)
    grad = torch.randn_like(x)
    expected = on_each_part(norm, x, grad)
    y = norm(x)
    y.backward(grad)
    assert y.is_contiguous(memory_format=memory_format) and x.grad.stride() == x.stride()
    found = y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    assert norm.num_batches_tracked == 1


def test_eval_mode_and_other_batches():
    norm = layer(3, 4, torch.float64, "cpu")
    x = batch("cpu", 8, 3, 2, torch.float64)
    expected = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert torch.equal(norm.eval()(x), expected)
    with pytest.raises(ValueError, match="batch of 6 does not divide into 4"):
        norm.train()(x[:6])
    with pytest.raises(ValueError, match="two values per channel in each part"):
        norm(x[:4, :, :1, :1])


def test_running_statistics_can_be_left_alone():
    norm = layer(3, 2, torch.float32, "cpu")
    x = batch("cpu", 8, 3, 2, torch.float32)
    before = {name: b.clone() for name, b in norm.named_buffers()}
    norm.track_running_stats = False
    y = norm(x)
    assert all(torch.equal(before[name], b) for name, b in norm.named_buffers())
    norm.track_running_stats = True
    assert torch.equal(norm(x), y)
    assert not any(torch.equal(before[name], b) for name, b in norm.named_buffers())


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_float32_under_autocast(backend):
    if backend == "triton" and INTERPRETED:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    norm, exact = layer(4, 2, torch.float32, backend), layer(4, 2, torch.float64, backend)
    exact.load_state_dict(norm.state_dict())
    x = batch(backend, 64, 4, 8, torch.bfloat16)
    grad = torch.randn_like(x)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = norm(x)
    y.backward(grad)
    expected = on_each_part(exact, x.double(), grad.double())
    assert y.dtype == x.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == torch.float32
    for ours, theirs, tolerance in zip(
        (y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var),
        expected,
        (1e-2, 1e-2, 1e-4, 1e-4, 1e-6, 1e-6),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_compiles_whole_and_passes_opcheck():
    norm, x = layer(4, 2, torch.float32, "cpu"), batch("cpu", 8, 4, 5, torch.float32)
    grad = torch.randn_like(x)
    expected = on_each_part(norm, x, grad)
    y = torch.compile(norm, fullgraph=True, backend="aot_eager")(x)
    y.backward(grad)
    found = y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    given = x.detach(), norm.weight.detach(), norm.bias.detach()
    torch.library.opcheck(torch.ops.relssl.split_batch_norm.default, (*given, 2, 1e-5))
    _, stats, rstd = torch.ops.relssl.split_batch_norm(*given, 2, 1e-5)
    arguments = grad, *given[:2], stats, rstd, 1e-5
    torch.library.opcheck(torch.ops.relssl.split_batch_norm_backward.default, arguments)


def test_launches_on_a_gpu(monkeypatch):
    """Two launches of Triton forward, and three of torch for the running statistics; two backward."""
    launches = []
    monkeypatch.setattr(batch_norm, "_triton_supports", lambda x: True)
    monkeypatch.setattr(launching, "chip", lambda index: SimpleNamespace(processors=132))
    monkeypatch.setattr(launching, "_cache", {})
    monkeypatch.setattr(launching.Launch, "__call__", lambda self, *_: launches.append(self.grid))
    norm, x = layer(64, 8, torch.float32, "cpu"), batch("cpu", 64, 64, 16, torch.float32)
    with Operations() as own:
        y, stats, rstd = outputs = batch_norm._forward_fake(x, norm.weight, norm.bias, 8, 1e-5)
        batch_norm._forward_by_triton(x, norm.weight, norm.bias, 1e-5, *outputs)
        # 132 processors have four programs each; 64 for each of 8 parts of 2048 rows.
        assert launches == [(1, 64, 8)] * 2
        grads = tuple(torch.empty_like(t) for t in (x, norm.weight, norm.bias))
        batch_norm._backward_by_triton(y, x, norm.weight, stats, rstd, grads)
    assert len(launches) == 4 and own.names == []
    with Operations(within=True) as own:
        norm(x).sum().backward()
    assert own.names[:3] == ["aten::mean.dim", "aten::_foreach_lerp_.Scalar", "aten::add_.Tensor"]
    assert len(launches) == 8 and "aten::clone" not in own.names


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=str)
@pytest.mark.parametrize("name", ["moments", "normalize", "sums", "backward"])
def test_triton_compiles_without_spills(name, target):
    """For channels that are a multiple of 16, as those of all encoders are."""
    kernel = getattr(launching.kernels().batch_norm, name)
    _, constants = launching.kernels().batch_norm.chunks(8, 32 * 1024, 64, 132)
    numbers = {"size": "i32", "channels": "i32", "rows": "i32", "eps": "fp32"} | dict.fromkeys(
        constants, "constexpr"
    )
    images = dict.fromkeys(("x", "y", "grad", "grad_x"), "*bf16")
    types = {n: (numbers | images).get(n, "*fp32") for n in kernel.arg_names}
    aligned = [i for i, (n, t) in enumerate(types.items()) if t[0] == "*" or n in ("size", "channels")]
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget(*target), options={"num_warps": 4})
    if target[0] == "cuda":
        ptx = compiled.asm["ptx"]
        assert ".local" not in ptx and ("ld.global.v4" in ptx or "v4.b32" in ptx)
