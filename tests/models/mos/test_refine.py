"""MOS's choice of adapters and its regulariser against the reference, and against a loop over images."""

import pytest
import torch

from models.mos.refine import ensemble, refined, self_match
from models.parts.prototypes import cosines
from tests.conftest import reference
from tests.convs.vits import close


def by_image(features, first, weight, bias, owner):
    """The rule for one image after another, which stops where it settles."""
    found = []
    for row, start in zip(features, first, strict=True):
        task = owner[start.argmax()]
        for _ in range(4):
            logits = row[task] @ weight.T + bias
            before, task = task, owner[logits.argmax()]
            if task == before:
                break
        found.append(logits)
    return torch.stack(found)


@pytest.mark.parity
def test_predictions_of_the_reference():
    arrays = {name: torch.from_numpy(value) for name, value in reference("mos/predict").items()}
    features, prototypes, owner = arrays["features"], arrays["prototypes"], arrays["owner"]
    assert (arrays["settles"] == 1).any() and (arrays["settles"] != 1).any()
    first = cosines(features[:, 0], prototypes)
    weight, bias = arrays["head.weight"][: len(owner)], arrays["head.bias"][: len(owner)]
    logits = refined(features, first, weight, bias, owner)
    close(logits, arrays["refined"], 1e-12)
    close(logits, by_image(features, first, weight, bias, owner), 1e-12)
    close(ensemble(logits, first, features.shape[1]), arrays["ensemble"], 1e-12)


@pytest.mark.parity
def test_regulariser_of_the_reference():
    arrays = {name: torch.from_numpy(value) for name, value in reference("mos/regulariser").items()}
    for case, means in (("first", arrays["means"][:0]), ("later", arrays["means"])):
        features = arrays["features"].clone().requires_grad_()
        loss = arrays["reg"] * self_match(features, means)
        loss.backward()
        close(loss, arrays[f"{case}/loss"], 1e-12)
        close(features.grad, arrays[f"{case}/grad"], 1e-12)
