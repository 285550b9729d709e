"""DER: the reference's runs, the auxiliary targets."""

import pytest
import torch

from models.der import new_or_old
from tests.models.classic_runs import WholeRun, budget, schedule


@pytest.mark.parity
@pytest.mark.parametrize("name", ["der", "der_bn"])
def test_run_of_the_reference(name, tmp_path, monkeypatch):
    WholeRun(f"classic/{name}_run", "der", tmp_path, lambda s: schedule(s) | budget(s) | {"align": True}).run(
        monkeypatch
    )


def test_auxiliary_targets():
    assert new_or_old(torch.tensor([0, 3, 4, 5, 6]), range(4, 7)).tolist() == [0, 0, 1, 2, 3]
