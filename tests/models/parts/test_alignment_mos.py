"""MOS's class statistics and alignment of a whole head on the columns seen, against the reference."""

import numpy as np
import pytest
import torch

from models.parts.alignment import AlignmentSettings, Draws, align
from models.parts.gaussians import ClassGaussians
from tests.conftest import reference
from tests.convs.vits import close, numbers

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("kind", "storage"), [("covariance", "full"), ("variance", "diag")])
def test_whole_stage_of_the_reference(kind, storage):
    """README: 1e-9, alignment 1e-8. The head has rows for classes that are not seen yet: decayed, without gradient."""
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in reference(f"mos/align_{kind}").items()}
    labels = numbers(arrays, r"features/(\d+)")
    features = [arrays[f"features/{label}"] for label in labels]
    owners = torch.tensor(labels).repeat_interleave(torch.tensor([len(rows) for rows in features]))
    gaussians = ClassGaussians(features[0].shape[1], storage).double()
    gaussians.add(torch.cat(features), owners, task=0)
    for label, mean, cov in zip(labels, gaussians.means, gaussians.dense_covariances(), strict=True):
        close(mean, arrays[f"mean/{label}"], 1e-9)
        close(cov if storage == "full" else cov.diagonal(), arrays[f"cov/{label}"], 1e-9)
    classes, weight = int(arrays["classes"]), arrays["before/weight"]
    settings = AlignmentSettings(
        epochs=int(arrays["epochs"]), lrate=arrays["lr"].item(), weight_decay=arrays["decay"].item(),
        samples=5 * int(arrays["batch"]),
    )  # fmt: skip

    def draws(epoch: int) -> Draws:
        return Draws(arrays["eps"].unflatten(0, (-1, classes))[epoch], torch.empty(0), arrays["perm"][epoch])

    aligned = align(
        weight, arrays["before/bias"], [len(weight)], gaussians, settings,
        reduce=lambda logits: logits[:, :classes], draws=draws,
    )  # fmt: skip
    close(aligned.losses.flatten(), arrays["losses"], 1e-8)
    close(aligned.weight, arrays["after/weight"], 1e-8)
    close(aligned.bias, arrays["after/bias"], 1e-8)
