"""What every registered learner must do, whatever it computes.

python -m pytest tests/contract --learner my_package.my_module:MyLearner       runs these for one alone
"""

import copy
import gc

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from models.base import Learner
from models.factory import build_learner, learner_class
from models.parts.evaluation import evaluate, scored
from models.parts.frozen_store import FrozenStore
from models.parts.loop import Observer, Position, begin, fit, learn
from models.parts.peaks import Live
from models.parts.state import HARNESS, learner_state, restore
from tests.conftest import build_tiny, write_stream
from utils import checkpoint

pytestmark = pytest.mark.smoke

STREAMS = {
    "unequal tasks": {"task_sizes": [3, 1, 2], "increment": None},  # the second task has one class
    "equal tasks": {"increment": 2},
}


@pytest.fixture
def stream(request, learner_name, tmp_path):
    """(tasks, learner): 7 images a class in batches of 4, so some task ends in a batch of one."""
    if "class" not in learner_class(learner_name).streams:
        pytest.skip("takes no class-incremental stream")
    return build_tiny(tmp_path, learner_name, **STREAMS[getattr(request, "param", "unequal tasks")])


@pytest.mark.parametrize("stream", STREAMS, indirect=True)
def test_learns_and_counts_every_test_image_once(stream):
    manager, learner = stream
    names = set()
    for task in manager:
        seen = manager[: task.index + 1]
        begin(learner, task)
        assert evaluate(learner, seen).main.shape == (3, task.index + 1)  # before any training
        learn(learner, task, position=Position("fit"))
        found = evaluate(learner, seen)
        sizes = [len(t.test) for t in seen]
        names.add(found.names)
        assert ((found.correct >= 0) & (found.correct <= sizes)).all()
        assert (found.correct[:, 1] >= found.correct[:, 0]).all()  # fewer rivals with the task known
        assert (found.correct[:, 2] >= found.correct[:, 0]).all()  # the best is among the five best
        assert found.by_class.sum(axis=1) == pytest.approx(found.correct[:, 0].sum(axis=1))
    assert len(names) == 1, "the same scores after every task"
    accuracy = 100 * found.main[1].sum() / sum(sizes)
    assert accuracy > 60, "flat colours with the task known are easy: chance is 33 to 50"


def test_bf16_on_a_cpu_leaves_no_attention_to_fused_kernels(learner_name, tmp_path, monkeypatch):
    """Their backward pass is what a step would wait for; whatever a learner puts in a block does without."""
    if "class" not in learner_class(learner_name).streams:
        pytest.skip("takes no class-incremental stream")

    def fused(*inputs, **options):
        raise AssertionError("the fused kernel was asked")

    manager, learner = build_tiny(tmp_path, learner_name, precision="bf16", increment=2, epochs=1)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    for task in manager[:2]:
        learn(learner, task)
        evaluate(learner, manager[: task.index + 1])


# What these keep of a class, with their example's keys, is no mean of features that evaluation computes.
STORE_NO_MEANS = {
    "finetune", "joint", "lwf", "ewc", "derpp", "lae", "l2p", "dualprompt", "coda_prompt", "hcl", "ranpac",
    "inflora",
}  # fmt: skip


@pytest.mark.slow
def test_drift_stands_beside_accuracy_without_another_pass(stream, learner_name):
    """Whoever stores means of features is told how far the test images' lie from them; nothing is computed for it."""
    manager, learner = stream
    read, passes = [], []
    learner.network.backbone.register_forward_hook(lambda *_: passes.append(1))
    for task in manager:
        learn(learner, task)
        read.append(evaluate(learner, manager[: task.index + 1]))
        predicted, own, images = read[-1].newest
        assert 0 <= predicted <= images and own == len(task.test)
    if learner_name not in STORE_NO_MEANS:
        for task, found in zip(manager, read, strict=True):
            drift = found.drift
            assert drift.shift.shape == (task.total_classes,) and np.isfinite(drift.shift).all()
            assert (np.isfinite(drift.between) and drift.between > 0) or task.total_classes == 1
            assert 0 <= drift.nearest_stored <= 100 and 0 <= drift.nearest_present <= 100
    passes.clear()
    again = evaluate(learner, manager[:])
    with_drift, learner._stored_means = len(passes), lambda: None
    passes.clear()
    plain = evaluate(learner, manager[:])
    assert with_drift == len(passes) and plain.drift is None
    assert (plain.correct == again.correct).all()


def predictions(learner, task, size: int | None = None, store: FrozenStore | None = None) -> dict[str, torch.Tensor]:
    learner.eval()
    found = [scores for scores, _, _ in scored(learner, task.test, store, size)]
    return {name: torch.cat([scores[name] for scores in found]) for name in found[0]}


def test_predictions_do_not_depend_on_the_batch(stream):
    manager, learner = stream
    for task in manager[:2]:
        learn(learner, task)
    task = manager[1]
    whole = predictions(learner, task)
    for size in (1, 7, 64):
        for name, scores in predictions(learner, task, size).items():
            torch.testing.assert_close(scores, whole[name], atol=1e-5, rtol=1e-5)
    order = np.random.RandomState(0).permutation(len(task.test))
    mixed = [scores for scores, _, _ in scored(learner, task.test.take(order))]
    for name in whole:
        shuffled = torch.cat([scores[name] for scores in mixed])
        torch.testing.assert_close(shuffled, whole[name][torch.from_numpy(order)], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_frozen_values_never_change_and_give_the_same_predictions(stream):
    """What is stored after the first task is what would be computed at the end."""
    manager, learner = stream
    store, images = FrozenStore(1e9), torch.rand(3, 3, 16, 16)
    first: dict[str, torch.Tensor] = {}
    for task in manager:
        learn(learner, task)
        evaluate(learner, manager[: task.index + 1], store)
        with torch.inference_mode():
            found = learner.frozen(images, [name for name in learner.frozen_names if name not in first])
        first |= found
    assert set(first) == set(learner.frozen_names)
    with torch.inference_mode():
        for name, value in learner.frozen(images, learner.frozen_names).items():
            torch.testing.assert_close(value, first[name], rtol=1e-5, atol=1e-6)
    for task in manager:
        fresh = predictions(learner, task)
        for name, scores in predictions(learner, task, store=store).items():
            torch.testing.assert_close(scores, fresh[name], rtol=1e-5, atol=1e-6)


def contents(module: nn.Module) -> dict:
    """Everything plain that a module, its children and its other parts hold, by path."""
    found = {}
    for path, child in module.named_modules():
        skipped = HARNESS | getattr(child, "transient", set()) if isinstance(child, Learner) else set()
        for name, value in vars(child).items():
            if name not in skipped and not name.startswith(
                ("_parameters", "_buffers", "_modules", "_forward", "_back")
            ):
                found[f"{path}.{name}".strip(".")] = value
        found |= {f"{path}.{name}".strip("."): p for name, p in child.named_parameters(recurse=False)}
        found |= {f"{path}.{name}".strip("."): b for name, b in child.named_buffers(recurse=False)}
    return found


def plain(value):
    """A value as something that compares with ==; None where it holds nothing of its own (functions, settings)."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist(), value.requires_grad
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, int | float | str | bool | type(None)):
        return value
    if hasattr(value, "state_dict") and not isinstance(value, nn.Module):
        return plain(value.state_dict())
    return None


def test_all_that_two_tasks_change_is_in_the_state(stream, tmp_path):
    """A learner rebuilt and restored holds what the trained one holds, attribute by attribute: one that is neither in
    the state nor named in `transient` is found by its name."""
    manager, learner = stream
    for task in manager[:2]:
        learn(learner, task)
    checkpoint.save({"learner": learner_state(learner)}, tmp_path / "state.pt", {})
    state = checkpoint.load(tmp_path / "state.pt")[1]["learner"]
    torch.manual_seed(0)
    other = build_learner(learner.config, learner.runtime, manager[1].info)
    restore(other, state)
    expected, found = contents(learner), contents(other)
    assert set(found) == set(expected)
    wrong = [name for name in expected if name != "training" and plain(found[name]) != plain(expected[name])]
    wrong = [name for name in wrong if not name.endswith((".training", "low_precision", "_copied_from"))]
    assert not wrong, f"not restored: {wrong}"
    learner.eval(), other.eval()
    for name, scores in predictions(other, manager[0]).items():
        assert torch.equal(scores, predictions(learner, manager[0])[name])


def test_only_what_is_in_param_groups_changes_in_training(stream):
    manager, learner = stream
    for task in manager[:2]:
        begin(learner, task)
        for number, stage in enumerate(learner.stages(task)):
            learner.stage = stage
            before = {name: value.detach().clone() for name, value in learner.named_parameters()}
            trained = {id(p) for group in learner.param_groups() for p in group["params"]}
            fit(learner, task, number)
            for name, parameter in learner.named_parameters():
                if id(parameter) not in trained:
                    assert torch.equal(parameter, before[name]), f"{name} is in no group, yet it changed"
            learner.after_stage(task)
        learner.stage = None
        learner.after_task(task)


def test_no_gradient_outlives_its_stage(stream):
    """A network that is frozen afterwards would keep it for good: as much again as all networks of DER and MEMO."""
    manager, learner = stream

    class Looks(Observer):
        def stage_done(self, number: int) -> None:
            assert not [name for name, parameter in learner.named_parameters() if parameter.grad is not None]

    for task in manager[:2]:
        learn(learner, task, Looks())


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["equal tasks"], indirect=True)
def test_what_lives_beside_the_state_does_not_grow(stream):
    """Bytes of tensors made in learning that are still there after a task and are no part of what is saved."""
    manager, learner = stream
    learn(learner, manager[0])
    beside = []
    with Live() as live:
        before = state_bytes(learner)
        for task in manager[1:]:
            learn(learner, task)
            gc.collect()
            beside.append(live.now - (state_bytes(learner) - before))
    assert beside[1] <= beside[0] + 256


def state_bytes(learner: Learner) -> int:
    tensors = [value for value in tree_leaves(learner_state(learner)) if isinstance(value, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_stages_are_pure(stream):
    manager, learner = stream
    learn(learner, manager[0])
    begin(learner, manager[1])
    state, drawn = copy.deepcopy(learner_state(learner)), torch.get_rng_state()
    assert list(learner.stages(manager[1])) == list(learner.stages(manager[1]))
    assert torch.equal(torch.get_rng_state(), drawn) and plain(learner_state(learner)) == plain(state)


def test_loss_can_be_called_twice_on_a_batch(stream):
    """SAM needs two passes: the loss may not change any state."""
    manager, learner = stream
    begin(learner, manager[0])
    if learner.stage is None:
        pytest.skip("trains nothing")
    learner.eval()
    images, targets = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    inputs, labels = learner.prepare(images, targets)
    net = getattr(learner, learner.stage.module)
    first, second = (learner.loss(net, inputs, labels) for _ in range(2))
    assert torch.equal(first, second)


def test_runs_on_a_domain_incremental_stream_or_says_that_it_does_not(learner_name, tmp_path):
    from trainer import refuse_stream
    from utils.errors import ConfigError

    dataset = write_stream(tmp_path / "domains.npz", classes=3, domains=3)
    manager, learner = build_tiny(tmp_path, learner_name, dataset=dataset, shuffle=False, increment=None, init_cls=None)
    assert len(manager) == 3
    if "domain" not in learner.streams:
        with pytest.raises(ConfigError, match="domain-incremental stream"):
            refuse_stream(learner, manager)
        return
    for task in manager:
        learn(learner, task)
    assert evaluate(learner, manager[:]).main[0].sum() > 12, "of 36; chance is 12"


def test_every_public_name_is_one_of_the_contract(learner_name):
    """A learner adds no hook of its own: what is not answered to the harness begins with an underscore."""
    own = {name for name in vars(learner_class(learner_name)) if not name.startswith("_")}
    assert own <= set(dir(Learner)) | {"network", "Config"}
