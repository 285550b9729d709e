"""Optimisers and learning rate schedules by name."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR

from convs.network import Network
from utils.config import RunConfig


def build_optimizer(config: RunConfig, groups: Iterable[dict[str, Any]], fused: bool) -> Optimizer:
    """config.optimizer over `groups`, each with its own lr and weight_decay.

    fused: one kernel a step, on CUDA; on a CPU torch's default is as fast.
    """
    groups = list(groups)
    if config.optimizer == "sgd":
        return SGD(groups, momentum=config.momentum, fused=fused)
    return (Adam if config.optimizer == "adam" else AdamW)(groups, fused=fused)


def build_scheduler(config: RunConfig, optimizer: Optimizer, epochs: int) -> LRScheduler:
    """Stepped once an epoch. cosine: lr_e = min_lr + (lr_0 - min_lr)(1 + cos(pi e / E)) / 2, e = 0..E-1."""
    if config.scheduler == "multistep":
        return MultiStepLR(optimizer, list(config.milestones), gamma=config.lrate_decay)
    if config.scheduler == "cosine":
        return CosineAnnealingLR(optimizer, T_max=epochs, eta_min=config.min_lr)
    return ConstantLR(optimizer, factor=1.0)


def group(parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
    """A parameter group of those parameters that train."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return {"params": trainable, "lr": lr, "weight_decay": weight_decay}


def backbone_and_head(
    network: Network, lr: float, weight_decay: float, backbone_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Two groups, the backbone's at lr * backbone_factor; a frozen backbone has none."""
    backbone = group(network.backbone.parameters(), lr * backbone_factor, weight_decay)
    head = group(network.head.parameters(), lr, weight_decay)
    return [backbone, head] if backbone["params"] else [head]
