"""The first session of a stored run, which APER, RanPAC and FeCAM share."""

from typing import Any

import torch
from torch import Tensor

from tests.conftest import reference
from tests.convs.vits import adapter_parameters, bottleneck_of, fill, group, ssf_parameters
from tests.models.stored_runs import StoredRun, all_near, near


def session_keys(name: str) -> dict[str, Any]:
    """Sizes that the reference's start fixes."""
    start = group(reference(name), "start/")
    if "prompt" in start:
        return {"prompt_tokens": start["prompt"].shape[1]}
    adapted = any(key.endswith("adapter.down.bias") for key in start)
    return {"bottleneck": bottleneck_of(start)} if adapted else {}


def tuned_parameters(network: Any) -> dict[str, Tensor]:
    """What the first session moves, under the fixtures' names."""
    model = network.backbone.model
    if network.petl == "adapter":
        return adapter_parameters(model)
    if network.petl == "ssf":
        return ssf_parameters(model)
    if network.petl == "finetune":
        return dict(model.named_parameters())
    return {"prompt": torch.stack([prompt.tokens for prompt in network.tuned])}


def start_session(run: StoredRun) -> None:
    """The reference's start of what is tuned, and of the head."""
    network, start = run.learner.network, group(run.arrays, "start/")
    head = {name: start.pop(f"head.{name}") for name in ("weight", "sigma")}
    with torch.no_grad():
        network.head.set_stacked(head["weight"])
        network.head.scale.copy_(head["sigma"].squeeze())
        if "prompt" in start:
            for prompt, stored in zip(network.tuned, start["prompt"], strict=True):
                prompt.tokens.copy_(stored)
        elif start:
            fill(tuned_parameters(network), start)


def check_session(run: StoredRun, losses: list[float], tolerance: float) -> None:
    arrays, network = run.arrays, run.learner.network
    near(losses, arrays["losses"], tolerance, "losses")
    stored = group(arrays, "tuned/")
    head = {name: stored.pop(f"head.{name}") for name in ("weight", "sigma")}
    all_near(tuned_parameters(network), stored, tolerance)
    near(network.head.weight, head["weight"], tolerance, "head")
    near(network.head.scale, head["sigma"], tolerance, "sigma")
