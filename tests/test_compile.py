"""--compile: views and networks as whole graphs, whose loss and gradients are those of eager code."""

import pickle
from dataclasses import replace

import pytest
import torch

from relssl.methods import PRESETS
from relssl.train import train

SMALL = {"dim": 16, "batch_size": 8, "eval_every": 0}
CONFIGS = {
    "ressl": replace(PRESETS["ressl"]["digits"], **SMALL, hidden=32, queue_size=40, crops=2, predictor=8),
    "sacc": replace(PRESETS["sacc"]["digits"], **SMALL, clusters=10, randaugment=1),
}
BACKENDS = {
    "aot_eager": ({"backend": "aot_eager"}, 1e-6),
    "inductor": ({"options": {"fallback_random": True}}, 1e-4),
}


# What Dynamo reads of a tensor that one graph passes to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_eager_code(name, backend):
    options, error = BACKENDS[backend]
    torch.manual_seed(0)
    method = CONFIGS[name].build(torch.zeros(3), torch.ones(3)).train()
    start = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)

    def step():
        method.load_state_dict(start)
        method.zero_grad()
        torch.manual_seed(1)
        loss, _ = method(images)
        loss.backward()
        gradients = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
        return loss, torch.cat(gradients), torch.rand(3)

    expected = step()
    before = num_graphs()
    method.compile_parts(**options)
    compiled = step()
    # Crops of two sizes need two graphs of the student and of its predictor; SACC's weak view is one graph.
    assert num_graphs() - before == {"ressl": 3 + 2 + 1 + 1, "sacc": 2 + 3}[name]
    for ours, theirs in zip(compiled, expected, strict=True):
        assert (ours - theirs).norm() <= error * theirs.norm()


def test_evaluation_is_not_compiled():
    """Its batches have other shapes, each of which would be compiled."""
    method = replace(CONFIGS["ressl"], compile="default").build(torch.zeros(3), torch.ones(3)).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = method.embed(images)
    method.compile_parts(backend="aot_eager")
    before = num_graphs()
    with method.eager():
        assert torch.equal(method.embed(images), expected)
    assert num_graphs() == before


def test_a_copy_does_not_use_the_graphs_of_its_original():
    method = CONFIGS["ressl"].build(torch.zeros(3), torch.ones(3))
    method.compile_parts(backend="eager")
    method.discard_compiled()
    other = pickle.loads(pickle.dumps(method))
    with torch.no_grad():
        for weight in other.student.parameters():
            weight.zero_()
    assert not other.student(torch.rand(4, 3, 16, 16)).any()


@pytest.mark.slow
def test_a_run_that_is_compiled_says_so_and_may_go_on_without(tmp_path, capfd):
    config = replace(CONFIGS["ressl"], batch_size=256, crops=1, epochs=1, out=tmp_path, compile="default")
    assert not any("forward" in vars(module) for module in train(config).modules())
    lines = capfd.readouterr().err
    assert "compiling views, student and teacher, which takes minutes" in lines
    assert "compiled, and trained the first step, in " in lines
    train(replace(config, resume=True, compile="no"))
    assert "compile was default, is no from epoch 2 on" in capfd.readouterr().err
