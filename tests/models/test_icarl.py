"""iCaRL: the reference's runs, the paper's binary loss by hand."""

import pytest
import torch

from models.icarl import binary_loss
from tests.models.classic_runs import WholeRun, budget, schedule


@pytest.mark.parity
@pytest.mark.parametrize("name", ["icarl", "icarl_fixed"])
def test_run_of_the_reference(name, tmp_path, monkeypatch):
    keys = lambda s: schedule(s) | budget(s) | {"temperature": float(s["T"])}  # noqa: E731
    WholeRun(f"classic/{name}_run", "icarl", tmp_path, keys).run(monkeypatch)


def test_binary_loss_by_hand():
    """Summed over outputs, mean over images; the teacher's answers in the place of the old classes' labels."""
    logits, old = torch.tensor([[0.0, 2.0, -1.0]]), torch.tensor([[1.0]])
    sigmoid, log = torch.sigmoid, torch.log
    q = sigmoid(torch.tensor(1.0))
    old_term = -(q * log(torch.tensor(0.5)) + (1 - q) * log(torch.tensor(0.5)))
    new = -log(1 - sigmoid(torch.tensor(2.0))) - log(sigmoid(torch.tensor(-1.0)))
    torch.testing.assert_close(binary_loss(logits, old, torch.tensor([2])), old_term + new)
    one_hot = -log(torch.tensor(0.5)) + new
    torch.testing.assert_close(binary_loss(logits, None, torch.tensor([2])), one_hot)
