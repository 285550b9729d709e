"""Replay: fine-tuning on the new images and on the exemplars of the old classes, all of them alike.

    L = CE(z, y)     z (B, C): all classes seen; an exemplar is drawn as often as a new image

Exemplars are chosen by herding and predict by their class means too (models/parts/exemplars.py). Over a stream of
domains every class is kept in every domain.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import LEARNERS
from models.parts.exemplars import RehearsalConfig
from models.rehearsal import Rehearsal


@LEARNERS.register("replay")
class Replay(Rehearsal):
    """Trains everything; stores exemplars."""

    Config = RehearsalConfig
    streams = {"class", "domain"}
    example = {"exemplars": {"total": 12}}

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(net(inputs), targets)
