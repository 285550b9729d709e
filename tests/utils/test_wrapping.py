"""What training calls instead of the network: in several processes, in the layout of convolutions."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from convs.small import SMALL
from models.parts.loop import Observer, begin, fit, learn
from tests.conftest import build_tiny, in_forks, write_stream
from tests.pretend_cuda import CUDA, pretended
from utils.runtime import Runtime
from utils.wrapping import WrappedNetwork, is_convolutional


class Searches(Observer):
    """Whether DDP looks for parameters that the loss leaves out, in each step."""

    def __init__(self, monkeypatch, found):
        made = DistributedDataParallel.forward

        def forward(network, *arguments, **options):
            found.append(network.find_unused_parameters)
            return made(network, *arguments, **options)

        monkeypatch.setattr(DistributedDataParallel, "forward", forward)


class Idle(nn.Module):
    """A parameter that no loss reaches."""

    def __init__(self, network):
        super().__init__()
        self.network, self.idle = network, nn.Parameter(torch.ones(3))

    def forward(self, images):
        return self.network(images)


def trained(folder, monkeypatch, idle: bool, compiled: bool = False, **keys):
    searches: list[bool] = []
    manager, learner = build_tiny(folder, optimizer="sgd", lrate=0.02, epochs=2, batch_size=5, **keys)
    begin(learner, manager[0])
    if idle:
        learner.network.backbone.model = Idle(learner.network.backbone.model)
    learner.runtime._compile = compiled
    fit(learner, manager[0], 0, Searches(monkeypatch, searches))
    return {"searches": searches, "weights": torch.cat([p.detach().flatten() for p in learner.parameters()])}


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [{}, {"sam": {"rho": 0.05, "damping": 0.0}}, {"accumulate": 2}], ids=["", "sam", "parts"]
)
@pytest.mark.parametrize("idle", [False, True], ids=["all used", "one idle"])
def test_processes_look_for_unused_parameters_only_where_there_are_some(idle, keys, tmp_path, monkeypatch):
    """Seen in the first backward pass; without looking, a parameter left out would stop the second step."""
    alone = trained(tmp_path, monkeypatch, idle, **keys)
    passes = keys.get("accumulate", 1)
    for found in in_forks(tmp_path, lambda folder: trained(folder, monkeypatch, idle, **keys)):
        torch.testing.assert_close(found["weights"], alone["weights"], atol=1e-5, rtol=1e-3)
        assert found["searches"][:passes] == [True] * passes and len(found["searches"]) > passes
        assert set(found["searches"][passes:]) == {idle}


@pytest.mark.slow
def test_several_processes_compile_behind_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    alone = trained(tmp_path, monkeypatch, idle=False)
    for found in in_forks(tmp_path, lambda folder: trained(folder, monkeypatch, False, compiled=True)):
        torch.testing.assert_close(found["weights"], alone["weights"], atol=1e-5, rtol=1e-3)


def test_on_the_cpu_a_network_is_called_as_it_is():
    network = SMALL["small_resnet18"](32)
    assert Runtime("cpu", "fp32").wrap(network) is network


@pytest.mark.parametrize("name", ["finetune", "der", "memo", "foster"])
def test_a_vit_is_not_convolutional_however_many_there_are(name, tmp_path):
    manager, learner = build_tiny(tmp_path, name)
    for task in manager[:2]:
        learn(learner, task)
    assert not is_convolutional(learner.network)


@pytest.mark.parametrize("backbone", ["small_lenet", "small_resnet18", "small_resnet32"])
def test_these_are_convolutional(backbone):
    assert is_convolutional(SMALL[backbone](32))


@pytest.mark.parametrize("backbone", ["small_resnet18", "small_resnet32"])
def test_a_convolutional_network_is_channels_last_on_the_device(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    stream = write_stream(tmp_path / "d.npz", classes=2, train=3)
    manager, learner = build_tiny(tmp_path, dataset=stream, backbone=backbone, image_size=16, epochs=1)
    seen = []
    with pretended():
        learner.runtime.device = CUDA
        learner.to(CUDA)
        begin(learner, manager[0])
        learner.network.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
        fit(learner, manager[0])
        layout = {"memory_format": torch.channels_last}
        assert seen and all(images.held.is_contiguous(**layout) for images in seen)
        kernels = [m.weight for m in learner.modules() if isinstance(m, nn.Conv2d)]
        assert kernels and all(weight.held.is_contiguous(**layout) for weight in kernels)
        assert torch.backends.cudnn.benchmark


def test_a_vit_on_the_device_keeps_its_layout_and_cudnn_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    manager, learner = build_tiny(tmp_path, epochs=1)
    learner.runtime.device = CUDA
    assert not isinstance(learner.runtime.wrap(learner.network), WrappedNetwork)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("stance", ["default", "force_eager"])
def test_a_network_that_torch_does_not_compile_is_said(stance, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    network = WrappedNetwork(nn.Linear(3, 2), torch.device("cpu"), shared=False, compiled=True, channels_last=False)
    with torch.compiler.set_stance(stance):
        for _ in range(2):
            network(torch.ones(4, 3))
    assert caplog.text.count("torch compiled nothing") == (stance == "force_eager")
