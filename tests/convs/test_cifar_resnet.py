"""ResNet-32 and its parts against the reference's, filled with the same numbers."""

import numpy as np
import pytest
import torch

from convs.cifar_resnet import CifarResNet, LastStage
from tests.conftest import reference

ATOL = {"eval": 1e-5, "train": 1e-4}  # of the largest entry
MAPS = (32, 16, 16)


@pytest.fixture(scope="module")
def arrays():
    return reference("classic/resnet")


def network(name: str, arrays) -> torch.nn.Module:
    if name == "resnet_short":
        return CifarResNet(int(arrays["short_depth"]))
    if name.startswith("memo"):
        return CifarResNet(32).split()[name == "memo_special"]
    return CifarResNet(32, cosine=name.startswith("cosine"))


def fill(module: torch.nn.Module, names, shapes, seed: int) -> None:
    """One stream of normal numbers in the order of the reference's names; it also has a classifier that we lack."""
    draws, state = np.random.RandomState(seed), module.state_dict()
    for name, shape in zip(names.tolist(), shapes.tolist(), strict=True):
        if name.endswith("num_batches_tracked"):
            continue
        shape = [size for size in shape if size]
        values = draws.standard_normal(shape)
        positive = name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight"))
        if name in state:
            state[name] = torch.from_numpy(1 + abs(values) / 5 if positive else 0.1 * values).float()
    module.load_state_dict(state)


NAMES = ["resnet32", "resnet_short", "cosine_resnet32", "memo_general", "memo_special"]


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_features_names_and_size(arrays, name):
    module, seed = network(name, arrays), int(arrays["seed"])
    names, shapes = arrays[f"{name}/names"], arrays[f"{name}/shapes"]
    classifier = {entry for entry in names if entry.startswith("fc.")}
    assert set(module.state_dict()) == set(names) - classifier
    sizes = {entry: np.prod(shape[shape > 0]) for entry, shape in zip(names.tolist(), shapes, strict=True)}
    unused = sum(sizes[entry] for entry in classifier)
    assert sum(p.numel() for p in module.parameters()) == int(arrays[f"{name}/parameters"]) - unused
    fill(module, names, shapes, seed)
    inputs = torch.from_numpy(arrays["images"])
    if isinstance(module, LastStage):
        maps = np.random.RandomState(seed + 2).standard_normal((len(inputs), *MAPS))
        inputs = torch.from_numpy(maps).float().relu()
    for mode, tolerance in ATOL.items():
        expected = arrays[f"{name}/{mode}"]
        found = module.train(mode == "train")(inputs).detach().numpy()
        found = found[:, :, ::3, ::3] if found.ndim == 4 else found
        np.testing.assert_allclose(found, expected, atol=tolerance * abs(expected).max(), rtol=0)
    norm = module.get_submodule(str(arrays[f"{name}/after_train/name"]))
    np.testing.assert_allclose(norm.running_mean, arrays[f"{name}/after_train/mean"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_var, arrays[f"{name}/after_train/var"], rtol=1e-4, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_fresh_weights_are_spread_as_the_references(arrays, name):
    """To five standard errors of the mean and of the standard deviation."""
    torch.manual_seed(0)
    state = network(name, arrays).state_dict()
    names = arrays[f"{name}/names"]
    means, stds = (dict(zip(names, arrays[f"{name}/init_{kind}"], strict=True)) for kind in ("mean", "std"))
    for entry, value in state.items():
        if entry.endswith("num_batches_tracked"):
            continue
        error = stds[entry] / np.sqrt(value.numel())
        assert abs(value.mean().item() - means[entry]) <= 5 * np.sqrt(2) * error + 1e-7, entry
        assert abs(value.std(unbiased=False).item() - stds[entry]) <= 5 * error + 1e-7, entry


def test_the_two_parts_are_the_whole():
    torch.manual_seed(0)
    whole = CifarResNet(8).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = whole(images)
    shared, last = whole.split()
    torch.testing.assert_close(last(shared(images)), expected)
