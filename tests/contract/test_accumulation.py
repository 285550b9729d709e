"""A batch in parts: the weights of the whole batch, for every learner, or a sentence before the run."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from models.factory import learner_class
from models.parts.loop import Observer, begin, fit, learn
from tests.conftest import build_tiny, write_stream
from utils.config import TrainConfig
from utils.errors import ConfigError

pytestmark = pytest.mark.smoke

STEPS = 2


class Enough(Exception):  # noqa: N818 - no error
    pass


def steps(learner, task, count: int = STEPS) -> dict[str, torch.Tensor]:
    """So many steps of each stage of a task; the weights behind them."""

    class Stop(Observer):
        def step_done(self, state):
            if state.step == count:
                raise Enough

    begin(learner, task)
    for number, stage in enumerate(learner.stages(task)):
        learner.stage = stage
        # What is drawn for single images is drawn in another order: another run, not another gradient.
        for module in learner.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with suppress(Enough):
            fit(learner, task, number, Stop())
        learner.after_stage(task)
    return {name: value.detach().clone() for name, value in learner.named_parameters()}


def build(tmp_path, name, parts, **keys):
    """5 images a batch, so that 2 and 3 parts are uneven; plain SGD, which hides no factor of the gradient."""
    streams = learner_class(name).streams
    stream = {}
    if "class" not in streams:
        dataset = write_stream(tmp_path / "d.npz", domains=2)
        stream = {"dataset": dataset, "shuffle": False, "increment": None}
    settings = {"batch_size": 5, "epochs": 2, "optimizer": "sgd", "lrate": 0.05, "accumulate": parts}
    return build_tiny(tmp_path, name, **settings | stream | keys)


def weights_after(tmp_path, name, parts, **keys):
    """Behind two steps of the first task; and of the second, where the first was trained by whole batches."""
    manager, learner = build(tmp_path, name, parts, **keys)
    first = steps(learner, manager[0])
    manager, learner = build(tmp_path, name, 1, **keys)
    learn(learner, manager[0])
    learner.config = learner.config.model_copy(update={"accumulate": parts})
    return first, steps(learner, manager[1])


def same(found, expected) -> None:
    for task, (mine, whole) in enumerate(zip(found, expected, strict=True)):
        for name, value in whole.items():
            if value.numel():  # small numbers beside large ones hold the rounding of the large ones
                scale = max(0.01, float(value.abs().max()))
                error = float((mine[name] - value).abs().max())
                assert error <= 1e-5 * scale, f"task {task + 1}, {name}: off by {error:.1e} of {scale:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("sam", [None, {"rho": 0.05, "damping": 25.0}], ids=["", "sam"])
def test_parts_give_the_weights_of_the_whole_batch(learner_name, sam, tmp_path):
    if not issubclass(learner_class(learner_name).Config, TrainConfig):
        pytest.skip("trains nothing")
    keys = {} if sam is None else {"sam": sam}
    torch.manual_seed(0)
    try:
        build(tmp_path, learner_name, 2, **keys)
    except ConfigError as error:
        assert '"accumulate"' in str(error) and learner_name in str(error)
        assert learner_name in UNDIVIDED, f"{learner_name} refuses: {error}"
        return
    whole = weights_after(tmp_path, learner_name, 1, **keys)
    for parts in (2, 3) if sam is None else (3,):
        same(weights_after(tmp_path, learner_name, parts, **keys), whole)


UNDIVIDED = {"mos"}  # with the keys of its example
