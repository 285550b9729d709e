"""DER (Yan et al., 2021, "Dynamically expandable representation"): a network more for every task.

Task t adds a copy of the newest network, the older ones are frozen; one head reads the features of all,
f = [h_0(x), ..., h_t(x)]. So that the new network does not lean on the old features, an auxiliary head of m + 1 outputs
reads its features alone: one for every new class, one for all the old ones.

    L = CE(z, y) + CE(z_aux, y_aux),   y_aux = 0 for an old class, y - K + 1 for a new one      (first task: CE(z, y))

The paper's masks and pruning are in none of the published versions, and not here.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.expanding import Branches, ExpandingNetwork
from data.stream import Task
from models.base import LEARNERS
from models.parts.exemplars import RehearsalConfig
from models.parts.weight_aligning import align_new_rows
from models.rehearsal import Rehearsal
from utils.keys import key


@LEARNERS.register("der")
class DER(Rehearsal):
    """One backbone a task; stores all of them and exemplars."""

    class Config(RehearsalConfig):
        align: bool = key(False, "align the head after each task but the first, as from-scratch runs do")

    example = {"exemplars": {"total": 12}}
    network: ExpandingNetwork

    def build(self, make_backbone: BackboneMaker) -> None:
        backbone = make_backbone()
        self.network = ExpandingNetwork(self._branches(backbone.model), backbone.info, self.config.normalize)
        self._remember()

    def _branches(self, model: nn.Module) -> Branches:
        """What every task gets one of."""
        return Branches(nn.Identity(), model)

    @property
    def _auxiliary_weight(self) -> float:
        return 1.0

    def before_task(self, task: Task) -> None:
        if task.index > 0:
            self.network.grow()
            self.network.renew_aux_head(len(task.classes) + 1)
        self.network.head.grow(task.total_classes)

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.task.index == 0:
            return F.cross_entropy(net(inputs), targets)
        logits, auxiliary = net(inputs, auxiliary=True)
        distinct = F.cross_entropy(auxiliary, new_or_old(targets, self.task.classes))
        return F.cross_entropy(logits, targets) + self._auxiliary_weight * distinct

    def after_stage(self, task: Task) -> None:
        if self.config.align and task.index > 0:
            align_new_rows(self.network.head.weight, task.known_classes)


def new_or_old(targets: Tensor, classes: range) -> Tensor:
    """(B,) -> (B,): 0 for an old class, y - K + 1 for one of the task's."""
    return (targets - classes.start + 1).clamp(min=0)
