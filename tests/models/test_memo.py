"""MEMO: the reference's runs, what its tasks share."""

import pytest

from models.parts.loop import learn
from tests.conftest import build_tiny
from tests.models.classic_runs import WholeRun, budget, schedule
from utils.errors import ConfigError


@pytest.mark.parity
@pytest.mark.parametrize("name", ["memo", "memo_base", "memo_bn"])
def test_run_of_the_reference(name, tmp_path, monkeypatch):
    def keys(s):
        own = {"align": True, "alpha_aux": s["alpha_aux"], "train_base": s["train_base"]}
        if s["scheduler"] == "cosine":
            own |= {"scheduler": "cosine", "t_max": s["t_max"]}
            own |= dict.fromkeys(("milestones", "init_milestones", "lrate_decay", "init_lr_decay"))
        return schedule(s) | budget(s) | own

    WholeRun(f"classic/{name}_run", "memo", tmp_path, keys).run(monkeypatch)


@pytest.mark.parametrize("train_base", [False, True])
def test_shared_layers_train_once_or_always(train_base, tmp_path):
    manager, learner = build_tiny(tmp_path, "memo", train_base=train_base)
    learn(learner, manager[0])
    shared = {name: value.clone() for name, value in learner.network.branches.shared.named_parameters()}
    learn(learner, manager[1])
    after = dict(learner.network.branches.shared.named_parameters())
    assert all((after[name] == value).all() for name, value in shared.items()) != train_base
    assert len(learner.network.branches.branches) == 2


def test_a_network_without_a_known_last_block_is_answered(tmp_path):
    with pytest.raises(ConfigError, match="has no known last block for MEMO"):
        build_tiny(tmp_path, "memo", backbone="small_lenet", weights=None, image_size=32)
