"""How much a frozen body still knows: a linear layer or nearest neighbours on its features, after each task.

The features of all classes seen are allowed, so a probe measures what the representation forgets, apart from what the
head forgets. Two linear recipes: on standardised features at a rate of 0.1, or ("linear_raw") the `eval` block of HCL's
configs, SGD at a rate of 30 on features as they are. Both: momentum 0.9, no weight decay, batches of 256, 100 epochs,
cosine to 0. Neighbours vote as in Wu et al. (CVPR 2018): cosine, k = 200, weights exp(sim/0.1).

Letters: N images to learn from, Q images to score, D width, C classes.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.loading import extract_features
from data.stream import Task
from utils.seed import mix

if TYPE_CHECKING:  # a part imports no learner; `probe` receives one
    from models.base import Learner

Kind = Literal["linear", "linear_raw", "knn"]
RATES = {"linear": 0.1, "linear_raw": 30.0}
EPOCHS, BATCH, MOMENTUM = 100, 256, 0.9
NEIGHBOURS, TEMPERATURE = 200, 0.1


def probe(learner: "Learner", task: Task, kind: Kind, lrate: float | None) -> np.ndarray:
    """(tasks seen,): correct predictions among all classes seen, on the test images of each task.

    Learns from the training images of all tasks seen, under the test transform. All draws come from (seed, task): the
    run itself goes on as if it had not been probed.
    """
    runtime, size = learner.runtime, learner.config.test_batch_size
    learner.eval()
    bank, labels = extract_features(learner.features, task.train_so_far.view("test"), runtime, size)
    queries = [extract_features(learner.features, seen.test.view("test"), runtime, size) for seen in task.seen]
    if kind == "knn":

        def scores(x: Tensor) -> Tensor:
            return knn_scores(x, bank, labels, task.total_classes)
    else:
        mean, std = bank.mean(dim=0), bank.std(dim=0).clamp(min=1e-6)
        shift, scale = (mean, std) if kind == "linear" else (torch.zeros_like(mean), torch.ones_like(std))
        rate = RATES[kind] if lrate is None else lrate
        seed = mix(learner.config.seeds[0], task.index)
        weight, bias = train_linear((bank - shift) / scale, labels, task.total_classes, rate, seed)

        def scores(x: Tensor) -> Tensor:
            return F.linear((x - shift) / scale, weight, bias)

    return np.array([float((scores(x).argmax(dim=1) == y).sum()) for x, y in queries])


def train_linear(features: Tensor, labels: Tensor, classes: int, lrate: float, seed: int) -> tuple[Tensor, Tensor]:
    """features (N, D), labels (N,) -> weight (C, D), bias (C,), from zero."""
    weight = features.new_zeros(classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lrate, momentum=MOMENTUM)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels), generator=generator).to(features.device).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(F.linear(features[rows], weight, bias), labels[rows]).backward()
            optimizer.step()
        scheduler.step()
    return weight.detach(), bias.detach()


def knn_scores(
    query: Tensor,
    bank: Tensor,
    labels: Tensor,
    classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """query (Q, D), bank (N, D), labels (N,) -> (Q, C): sum of exp(cosine / temperature) over the k nearest."""
    similarity = F.normalize(query, dim=1) @ F.normalize(bank, dim=1).T  # (Q, N)
    nearest = similarity.topk(min(k, len(bank)), dim=1)
    weights = (nearest.values / temperature).exp()
    return weights.new_zeros(len(query), classes).scatter_add_(1, labels[nearest.indices], weights)
