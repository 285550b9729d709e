"""The step that one would write by hand: what the learners' own steps are measured against."""

from collections.abc import Callable
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.base import Learner
from models.parts.optim import SAM


def bare_step(learner: Learner, images: Tensor) -> Callable[[], Tensor]:
    """One pass over the images by the stage's network, cross-entropy, backward, one optimiser step: same trainable
    modules, optimiser and precision as the learner's stage, nothing of its method. Called, it gives the loss. A network
    that images alone do not suffice passes them as in a prediction, whose frozen values are there already.

    images (B, 3, s, s), on the device.
    """
    assert learner.stage is not None
    network: nn.Module = getattr(learner, learner.stage.module)
    with torch.no_grad(), learner.runtime.autocast():
        frozen = learner.frozen(images, learner.frozen_names) if learner.frozen_names else {}
    takes_images = [entry.annotation for entry in signature(network.forward).parameters.values()] == [Tensor]
    optimizer, _ = learner.make_optimizer()
    base = optimizer.base if isinstance(optimizer, SAM) else optimizer

    targets = torch.zeros(len(images), dtype=torch.int64, device=images.device)  # a class that every head has

    def step() -> Tensor:
        base.zero_grad(set_to_none=True)
        with learner.runtime.autocast():
            outputs = network(images) if takes_images else learner.predict(images, frozen)
            several = outputs.values() if isinstance(outputs, dict) else outputs
            scores = outputs if isinstance(outputs, Tensor) else next(iter(several))
            loss = F.cross_entropy(scores.float(), targets)
        loss.backward()
        base.step()
        return loss.detach()

    return step


def work(step: Callable[[], object]) -> int:
    """Floating point operations of the matrix products, attentions and convolutions of a step."""
    counter = FlopCounterMode(display=False)
    with counter, torch.enable_grad():
        step()
    return counter.get_total_flops()
