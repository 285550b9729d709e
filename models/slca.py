"""SLCA (Zhang et al., ICCV 2023, arXiv 2303.05118) and SLCA++ (arXiv 2408.08295).

A pre-trained ViT fine-tuned task after task forgets for two reasons, and each gets its own remedy:

1. The representation moves too fast. Slow learner: the backbone's rate is a small fraction of the head's,
       lr_backbone = lr * bcb_lrscale                    SLCA: all parameters, 1/100
                                                         SLCA++: LoRA, norms, biases, class token, 1/10
2. Heads of different tasks never met. Classifier alignment: after each task, all heads are trained on features drawn
   from one Gaussian per class seen (models/parts/alignment.py), used for evaluation, and rolled back before the next
   task.

    loss of a task    a CE(z_t, y) + b RCE(z_t, y) on the current head's logits           SLCA: a = 1, b = 0
    evaluation        z_t = W_t (s_t f) + b_t,   s_t = 1 + mu (T - 1 - t)                 SLCA: mu = 0

Over a stream of domains each domain has a head for all classes (or all share one), and a class's score is the best
of its scores over the heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from convs.backbones import renew_final_norm
from convs.heads import TaskHeads, combine_heads
from convs.lora import add_lora, lora_layers
from models.base import LEARNERS, Learner, MakeBackbone
from models.parts.alignment import Alignment, align, mean_decay, upstream_tasks
from models.parts.gaussians import ClassGaussians
from models.parts.losses import symmetric_cross_entropy
from models.parts.optim import group
from utils.config import Count, Rate, RunConfig, Whole
from utils.data_manager import Task
from utils.runtime import Runtime
from utils.seed import mix

LIGHT = ("norm", "bias", "cls_token", "lora")  # what SLCA++ trains of the backbone, by name


class SlcaConfig(RunConfig):
    trainable: Literal["all", "light"] = Field(
        "all", description='of the backbone; "light": LoRA, norms, biases and class token'
    )
    bcb_lrscale: Rate = Field(0.01, description="the backbone's learning rate over the head's; 0 freezes the backbone")
    fresh_final_norm: bool = Field(
        True, description="replace the pre-trained final norm by a fresh one, as the reference does"
    )
    lora_rank: Whole = Field(0, description="rank of the branches in the attention's qkv layers; 0: none")
    lora_mlp: bool = Field(
        False, description="branches in the MLP layers too: described in the paper, never trained by the reference"
    )
    lora_scale: float = Field(0.8, description="factor of the branches; constant in the reference")
    lora_first_factor: Rate = Field(0.5, description="the branches' rate over the head's in the first task")
    sce_a: Rate = Field(1.0, description="weight of the cross-entropy")
    sce_b: Rate = Field(0.0, description="weight of the reverse cross-entropy")
    ca_epochs: Whole = Field(5, description="epochs of classifier alignment; 0: no alignment and no statistics")
    ca_lrate: Rate | None = Field(None, description="learning rate of the alignment; default: lrate")
    ca_samples: Count = Field(256, description="features drawn per class and alignment epoch, and per step")
    ca_with_logit_norm: Rate = Field(0.1, description="temperature of the normalised logits; 0: plain logits")
    mean_decay: Rate = Field(0.1, description="how far the means of the oldest classes shrink in alignment; 0: not")
    fc_scale_mu: Rate = Field(
        0.0, description="feature scaling per task of age of a head, in alignment undone; 0: none"
    )
    cov_storage: Literal["full", "diag", "low_rank", "shared"] = Field(
        "full", description='covariances: per class, per class and dimension, "cov_rank" directions, one per task'
    )
    cov_rank: Count = Field(32, description='directions per class of "cov_storage": "low_rank"')
    cov_ridge: Rate = Field(1e-4, description="added to every variance")
    domain_head: Literal["per_domain", "shared"] = Field(
        "per_domain", description="domain-incremental: a head for each domain, or one for all"
    )
    domain_reduce: Literal["max", "mean", "sum_softmax"] = Field(
        "max", description="domain-incremental: a class's score from its scores over the domains' heads"
    )
    upstream: bool = Field(
        False,
        description="reproduce the reference: a class's task counted as label // size of the current task (wrong "
        "with unequal tasks), torch seeded with 1 whatever the class order",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(given)
        if given.get("lora_mlp") and not given.get("lora_rank", cls.model_fields["lora_rank"].default):
            yield "lora_mlp", 'needs "lora_rank" of at least 1'
        if "cov_rank" in given and given.get("cov_storage") != "low_rank":
            yield "cov_rank", 'has no effect unless "cov_storage" is "low_rank": drop the key'


@LEARNERS.register("slca")
class SLCA(Learner):
    """Slow fine-tuning, one Gaussian per class, aligned heads. Keeps no images."""

    Config = SlcaConfig
    upstream_seed = 1
    config: SlcaConfig

    def __init__(self, config: SlcaConfig, make_backbone: MakeBackbone, runtime: Runtime):
        super().__init__(config, make_backbone, runtime)
        self.network = self.build_network(make_backbone, TaskHeads)
        backbone = self.network.backbone
        if config.fresh_final_norm:
            renew_final_norm(backbone)
        if config.lora_rank:
            targets = ("attn.qkv", "mlp.fc1", "mlp.fc2") if config.lora_mlp else ("attn.qkv",)
            add_lora(backbone.model, config.lora_rank, config.lora_scale, targets)
        for name, parameter in backbone.model.named_parameters():
            chosen = config.trainable == "all" or any(part in name for part in LIGHT)
            parameter.requires_grad_(chosen and config.bcb_lrscale > 0)
        self.gaussians = ClassGaussians(backbone.feature_dim, config.cov_storage, config.cov_ridge, config.cov_rank)

    @property
    def head(self) -> TaskHeads:
        assert isinstance(self.network.head, TaskHeads)
        return self.network.head

    def before_task(self, task: Task) -> None:
        """The aligned heads served the evaluation: go on from the trained ones."""
        self.head.recall()
        if task.index == 0:
            for branch in lora_layers(self.network):
                branch.start_from_svd()
        self.head.grow(self._columns(task).stop)

    def param_groups(self) -> list[dict[str, Any]]:
        """lora_A, lora_B, the rest of the backbone, the current head; without the empty ones."""
        lr, first = self.lrate, self.task.index == 0
        slow = lr * self.config.bcb_lrscale
        branch = lr * self.config.lora_first_factor if first else slow
        named = list(self.network.backbone.named_parameters())
        groups = [
            group([p for name, p in named if name.endswith("lora_A")], branch, self.weight_decay),
            group([p for name, p in named if name.endswith("lora_B")], branch, self.weight_decay),
            group([p for name, p in named if "lora" not in name], slow, self.weight_decay),
            group(self.head.parameters(), lr, self.weight_decay),
        ]
        return [entry for entry in groups if entry["params"]]

    def loss(self, net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        columns = self._columns(self.task)
        logits = net(images)[:, columns.start : columns.stop]  # (B, classes of the task)
        return symmetric_cross_entropy(logits, targets - self.task.classes.start, self.config.sce_a, self.config.sce_b)

    def after_task(self, task: Task) -> None:
        """Gaussians of the task's classes; from the second task on, alignment of all heads."""
        if self.config.ca_epochs == 0:
            return
        self.eval()
        view, size = task.train.view("test"), self.config.test_batch_size
        self.gaussians.measure(self.network.features, view, task.index, self.runtime, size)
        if task.index > 0:
            self.head.backup()
            with self.runtime.stopwatch("alignment"):
                self._align(task)
            self.head.scale_by_age(self.config.fc_scale_mu)

    def predict(self, images: Tensor) -> Tensor:
        return self._class_scores(self.network(images))

    def statistics_bytes(self, tasks: Sequence[Task]) -> int:
        if self.config.ca_epochs == 0:
            return 0
        classes = sum(len(np.unique(task.train.labels)) for task in tasks)
        return self.gaussians.planned_bytes(classes, len(tasks))

    def _align(self, task: Task) -> None:
        config, gaussians, head = self.config, self.gaussians, self.head
        tasks = gaussians.tasks
        if config.upstream and task.domain is None:
            tasks = upstream_tasks(gaussians.labels, len(task.classes))
        settings = Alignment(
            epochs=config.ca_epochs,
            lrate=self.lrate if config.ca_lrate is None else config.ca_lrate,
            weight_decay=self.weight_decay,
            momentum=config.momentum,
            samples=config.ca_samples,
            tau=config.ca_with_logit_norm,
            distance_mu=config.fc_scale_mu if len(head.sizes) > 1 else 0.0,  # one head for all has no age
        )
        weight, bias = head.stacked()
        aligned = align(
            weight,
            bias,
            head.sizes,
            gaussians,
            settings,
            mean_factor=mean_decay(tasks, task.index, config.mean_decay),
            ages=task.index - tasks,
            reduce=self._class_scores,
            generator=self._generator(task),
        )
        assert aligned.bias is not None
        head.set_stacked(aligned.weight, aligned.bias)

    def _generator(self, task: Task) -> torch.Generator:
        """Of the alignment alone: every process draws the same, wherever the run was interrupted."""
        seed = self.upstream_seed if self.config.upstream else self.config.seeds[0]
        return torch.Generator(self.runtime.device).manual_seed(mix(seed, task.index))

    def _columns(self, task: Task) -> range:
        """The outputs that the task trains."""
        if not self._one_head_per_domain(task):
            return task.classes
        return range(task.index * task.total_classes, (task.index + 1) * task.total_classes)

    def _class_scores(self, logits: Tensor) -> Tensor:
        """(B, outputs of all heads) -> (B, classes)."""
        if not self._one_head_per_domain(self.task):
            return logits
        return combine_heads(logits, self.task.total_classes, self.config.domain_reduce)

    def _one_head_per_domain(self, task: Task) -> bool:
        return task.domain is not None and self.config.domain_head == "per_domain"


class SlcappConfig(SlcaConfig):
    trainable: Literal["all", "light"] = Field(
        "light", description='of the backbone; "light": LoRA, norms, biases and class token'
    )
    bcb_lrscale: Rate = Field(0.1, description="the backbone's learning rate over the head's; 0 freezes the backbone")
    lora_rank: Whole = Field(4, description="rank of the branches in the attention's qkv layers; 0: none")
    sce_b: Rate = Field(0.1, description="weight of the reverse cross-entropy")
    mean_decay: Rate = Field(0.0, description="how far the means of the oldest classes shrink in alignment; 0: not")
    fc_scale_mu: Rate = Field(
        0.02, description="feature scaling per task of age of a head, in alignment undone; 0: none"
    )
    min_lr: Rate = Field(1e-4, description="floor of cosine: the reference's is lrate * bcb_lrscale * 0.1^milestones")


@LEARNERS.register("slcapp")
class SLCAPlusPlus(SLCA):
    """SLCA with other defaults: a light backbone, a symmetric loss, feature scaling by age."""

    Config = SlcappConfig
    config: SlcappConfig
