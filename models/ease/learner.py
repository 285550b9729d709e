"""EASE (Zhou et al., CVPR 2024, arXiv 2403.12030): a subspace of its own for each task, and prototypes in all of them.

    L = CE(sigma cos(f_t(x), w), y - K)      task t: fresh adapters beside the MLPs, a fresh head for its classes alone

Then the adapters are frozen. Classes of task t have prototypes in the subspaces 0 .. t, as means; in those that come
later they are written from classes that are known in both (subspaces.py). All subspaces together score:

    z_c = sum_j m_j cos(f_j, W[c, j]),   the own task's subspace weighs 1, others alpha / t, the plain ViT beta

Both grow with the number of tasks T: T passes per image, run as one batch that shares the patch embedding and the first
attention, and T adapter sets. The features of a finished subspace are computed once per image in a whole stream.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convs.adapter_sets import PLAIN, add_adapter_sets, named_subspaces
from convs.adapters import AdapterNetwork
from convs.backbones import BackboneMaker
from convs.heads import CosineHead
from data.stream import Task
from models.base import LEARNERS, Learner
from models.ease.subspaces import SubspacePrototypes, Synthesis, concatenated_scores, subspace_scores
from models.parts.drift import StoredMeans
from models.parts.optim import group
from models.parts.prototypes import ClassMeans
from utils.config import Count, Rate, TrainConfig
from utils.keys import key, redefault


def proxy_head(width: int) -> CosineHead:
    return CosineHead(width, init="uniform", learn_scale=True)


WRITTEN = (
    "prototypes of old classes in newer subspaces are written, not measured, and lie {ratio:.2f} times the distance "
    "between class means from the features there, which have not moved"
)
LESS_OF_THEM = '. A smaller "alpha" gives them less weight'


@LEARNERS.register("ease")
class EASE(Learner):
    """Adapters of every task kept side by side, and a prototype per class in each of their subspaces. No images."""

    class Config(TrainConfig):
        batch_size: Count = redefault(TrainConfig, "batch_size", 48)
        bottleneck: Count = key(64, "width of an adapter")
        adapter_scale: Rate = key(0.1, "factor of the adapters")
        adapter_dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.1, "behind an adapter's ReLU")
        use_init_ptm: bool = key(False, "the plain ViT as one more subspace")
        use_reweight: bool = key(True, "weigh the subspaces; false: one cosine over all of them")
        alpha: Rate = key(0.1, "weight of the other tasks' subspaces together", only={"use_reweight": True})
        beta: Rate = key(0.0, "weight of the plain subspace", only={"use_init_ptm": True, "use_reweight": True})
        use_diagonal: bool = key(False, "prototypes in the own task's subspace alone, zero in the others")
        recalc_sim: bool = key(
            True,
            "write all prototypes that cannot be measured anew in every task; false: those of the newest subspace",
            only={"use_diagonal": False},
        )
        upstream: bool = key(
            False, "reproduce the reference: the head of a short last task has as many outputs as the second task's"
        )

    example = {"bottleneck": 4}
    needs_images = False
    network: AdapterNetwork

    def build(self, make_backbone: BackboneMaker) -> None:
        config = self.config
        self.network = AdapterNetwork(make_backbone(), proxy_head, config.normalize)
        model = self.network.backbone.model
        self.adapters = add_adapter_sets(model, config.bottleneck, config.adapter_scale, config.adapter_dropout)
        self.prototypes = SubspacePrototypes(self.network.feature_dim)

    def before_task(self, task: Task) -> None:
        if task.index > 0:
            for adapter in self.adapters:
                adapter.restart()
        outputs = task.sizes[min(task.index, 1)] if self.config.upstream else len(task.classes)
        self.network.head = proxy_head(self.network.feature_dim).to(self.runtime.device, self.prototypes.matrix.dtype)
        self.network.head.grow(outputs)

    def param_groups(self) -> list[dict[str, Any]]:
        assert self.stage is not None
        trained = [p for part in (*self.adapters, self.network.head) for p in part.parameters()]
        return [group(trained, self.stage.lrate, self.stage.weight_decay)]

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(net(inputs), targets - self.task.classes.start)

    def after_task(self, task: Task) -> None:
        """Freeze the adapters; measure the task's classes in all subspaces; write what cannot be measured."""
        config = self.config
        for adapter in self.adapters:
            adapter.keep()
        self.eval()
        blocks, width = task.index + 1 + config.use_init_ptm, self.network.feature_dim
        means = ClassMeans(blocks * width).to(self.runtime.device)
        means.grow(task.total_classes)
        view, size = task.train.view("test"), config.test_batch_size
        means.update(lambda images: self._all_features(images).flatten(1), view, self.runtime, size)
        measured = means.exact_means[task.classes.start :].unflatten(1, (blocks, width))
        if config.use_diagonal:
            measured[:, int(config.use_init_ptm) : -1] = 0.0
        which: Synthesis = "none" if config.use_diagonal else "all" if config.recalc_sim else "newest"
        self.prototypes.add(measured, task.sizes[: task.index + 1], config.use_init_ptm, which)

    @property
    def frozen_names(self) -> tuple[str, ...]:  # type: ignore[override]
        plain = (PLAIN,) if self.config.use_init_ptm else ()
        return (*plain, *(str(index) for index in range(self.adapters[0].copies)))

    def _stored_means(self) -> StoredMeans | None:
        """The prototypes, of all subspaces side by side: those that were written are off from the start. With
        use_diagonal most blocks are zero, and a distance over all of them says nothing."""
        matrix = self.prototypes.matrix
        if self.config.use_diagonal or not len(matrix):
            return None
        labels = torch.arange(len(matrix), device=matrix.device)
        words = WRITTEN + LESS_OF_THEM * self.config.use_reweight
        return StoredMeans(matrix.flatten(1), labels, names=tuple(self.frozen_names), apart=words)

    def frozen(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return named_subspaces(self.network, images, names)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        names, matrix, total = self.frozen_names, self.prototypes.matrix, self.task.total_classes
        known = len(matrix)
        if not known:
            assert images is not None
            return images.new_full((len(images), total), -torch.inf)
        features = torch.stack([frozen[name] for name in names], dim=1).to(matrix.dtype)  # (B, J, D)
        sizes = self._measured_sizes(known)
        if self.config.use_reweight:
            beta = self.config.beta if self.config.use_init_ptm else None
            scores = subspace_scores(features, matrix, sizes, self.config.alpha, beta)
        else:
            scores = concatenated_scores(features, matrix)
        return F.pad(scores, (0, total - known), value=-torch.inf)

    def _all_features(self, images: Tensor) -> Tensor:
        """(B, J, D)."""
        return self.network.subspaces(images, 0, self.adapters[0].copies, self.config.use_init_ptm).transpose(0, 1)

    def _measured_sizes(self, classes: int) -> Sequence[int]:
        """Sizes of the tasks whose classes have prototypes."""
        sizes = list(self.task.sizes)
        while sum(sizes) > classes:
            sizes.pop()
        return sizes
