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

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from convs.backbones import BackboneMaker, renew_final_norm
from convs.heads import TaskHeads, combine_heads
from convs.lora import add_lora, lora_layers
from convs.network import Network
from data.stream import Task, TaskInfo
from models.base import LEARNERS, Learner
from models.parts.alignment import AlignmentConfig, align_head
from models.parts.losses import symmetric_cross_entropy
from models.parts.optim import group
from utils.config import Rate, Whole
from utils.keys import GIVEN, key, redefault

LIGHT = ("norm", "bias", "cls_token", "lora")  # what SLCA++ trains of the backbone, by name


@LEARNERS.register("slca")
class SLCA(Learner):
    """Slow fine-tuning, one Gaussian per class, aligned heads. Keeps no images."""

    class Config(AlignmentConfig):
        trainable: Literal["all", "light"] = key(
            "all", 'of the backbone; "light": LoRA, norms, biases and class token', only={"bcb_lrscale": GIVEN}
        )
        bcb_lrscale: Rate = key(0.01, "the backbone's learning rate over the head's; 0 freezes the backbone")
        fresh_final_norm: bool = key(True, "replace the pre-trained final norm by a fresh one, as the reference does")
        lora_rank: Whole = key(0, "rank of the branches in the attention's qkv layers; 0: none")
        lora_mlp: bool = key(
            False,
            "branches in the MLP layers too: described in the paper, never trained by the reference",
            only={"lora_rank": GIVEN},
        )
        lora_scale: float = key(0.8, "factor of the branches; constant in the reference", only={"lora_rank": GIVEN})
        lora_first_factor: Rate = key(
            0.5, "the branches' rate over the head's in the first task", only={"lora_rank": GIVEN}
        )
        sce_a: Rate = key(1.0, "weight of the cross-entropy")
        sce_b: Rate = key(0.0, "weight of the reverse cross-entropy")
        fc_scale_mu: Rate = key(
            0.0, "feature scaling per task of age of a head, in alignment undone; 0: none", only={"ca_epochs": GIVEN}
        )
        domain_head: Literal["per_domain", "shared"] = key(
            "per_domain", "domain-incremental: a head for each domain, or one for all"
        )
        domain_reduce: Literal["max", "mean", "sum_softmax"] = key(
            "max",
            "domain-incremental: a class's score from its scores over the domains' heads",
            only={"domain_head": "per_domain"},
        )
        upstream: bool = key(
            False,
            "reproduce the reference: a class's task counted as label // size of the current task (wrong "
            "with unequal tasks), torch seeded with 1 whatever the class order",
        )
        fixed_torch_seeds = {True: 1}

    streams = {"class", "domain"}

    def build(self, make_backbone: BackboneMaker) -> None:
        config = self.config
        self.network = Network(make_backbone(), TaskHeads, config.normalize)
        backbone = self.network.backbone
        if config.fresh_final_norm:
            renew_final_norm(backbone)
        if config.lora_rank:
            targets = ("attn.qkv", "mlp.fc1", "mlp.fc2") if config.lora_mlp else ("attn.qkv",)
            add_lora(backbone.model, config.lora_rank, config.lora_scale, targets)
        for name, parameter in backbone.model.named_parameters():
            chosen = config.trainable == "all" or any(part in name for part in LIGHT)
            parameter.requires_grad_(chosen and config.bcb_lrscale > 0)
        self.gaussians = config.class_gaussians(backbone.feature_dim, self.task, self.runtime)

    def before_task(self, task: Task) -> None:
        """The aligned heads served the evaluation: go on from the trained ones."""
        self.network.head.recall()
        if task.index == 0:
            for branch in lora_layers(self.network):
                branch.start_from_svd()
        self.network.head.grow(self._columns(task).stop)

    def param_groups(self) -> list[dict[str, Any]]:
        """lora_A, lora_B, the rest of the backbone, the current head; without the empty ones."""
        stage, config = self.stage, self.config
        assert stage is not None
        slow = stage.lrate * config.bcb_lrscale
        branch = stage.lrate * config.lora_first_factor if self.task.index == 0 else slow
        named = list(self.network.backbone.named_parameters())
        groups = [
            group([p for name, p in named if name.endswith("lora_A")], branch, stage.weight_decay),
            group([p for name, p in named if name.endswith("lora_B")], branch, stage.weight_decay),
            group([p for name, p in named if "lora" not in name], slow, stage.weight_decay),
            group(self.network.head.parameters(), stage.lrate, stage.weight_decay),
        ]
        return [entry for entry in groups if entry["params"]]

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        columns = self._columns(self.task)
        logits = net(inputs)[:, columns.start : columns.stop]  # (B, classes of the task)
        return symmetric_cross_entropy(logits, targets - self.task.classes.start, self.config.sce_a, self.config.sce_b)

    def after_task(self, task: Task) -> None:
        """Gaussians of the task's classes; from the second task on, alignment of all heads."""
        config, head = self.config, self.network.head
        if self.gaussians is None:
            return
        self.eval()
        view, size = task.train.view("test"), config.test_batch_size
        self.gaussians.measure(self.network.features, view, task.index, self.runtime, size)
        if task.index > 0:
            head.backup()
            # One head for all has no age.
            settings = config.alignment(task, distance_mu=config.fc_scale_mu if len(head.sizes) > 1 else 0.0)
            align_head(
                head,
                self.gaussians,
                settings,
                task,
                self.runtime,
                decay=config.mean_decay,
                upstream_index=config.upstream,
                reduce=self._class_scores,
                seed=config.torch_seed,
            )
            head.scale_by_age(config.fc_scale_mu)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        assert images is not None
        return self._class_scores(self.network(images))

    def _columns(self, task: TaskInfo) -> range:
        """The outputs that the task trains."""
        if not self._one_head_per_domain(task):
            return task.classes
        return range(task.index * task.total_classes, (task.index + 1) * task.total_classes)

    def _class_scores(self, logits: Tensor) -> Tensor:
        """(B, outputs of all heads) -> (B, classes)."""
        if not self._one_head_per_domain(self.task):
            return logits
        return combine_heads(logits, self.task.total_classes, self.config.domain_reduce)

    def _one_head_per_domain(self, task: TaskInfo) -> bool:
        return task.domain is not None and self.config.domain_head == "per_domain"


@LEARNERS.register("slcapp")
class SLCAPlusPlus(SLCA):
    """SLCA with other defaults: a light backbone, a symmetric loss, feature scaling by age."""

    class Config(SLCA.Config):
        trainable: Literal["all", "light"] = redefault(SLCA.Config, "trainable", "light")
        bcb_lrscale: Rate = redefault(SLCA.Config, "bcb_lrscale", 0.1)
        lora_rank: Whole = redefault(SLCA.Config, "lora_rank", 4)
        sce_b: Rate = redefault(SLCA.Config, "sce_b", 0.1)
        mean_decay: Rate = redefault(SLCA.Config, "mean_decay", 0.0)
        fc_scale_mu: Rate = redefault(SLCA.Config, "fc_scale_mu", 0.02)
        min_lr: Rate = redefault(
            SLCA.Config, "min_lr", 1e-4, "floor of cosine: the reference's is lrate * bcb_lrscale * 0.1^milestones"
        )
