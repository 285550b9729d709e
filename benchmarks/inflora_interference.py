"""How far later tasks move the key and value outputs on the first task's inputs: InfLoRA against plain LoRA.

    python -m benchmarks.inflora_interference --config exps/reference/inflora_tight.json [--set K=V ...] [--seed S]

After the first task the inputs h of every adapted projection are summed to C0 = mean h h^T. From then on, per layer,

    change = E ||dW h||^2 / E ||W h||^2             how far the outputs on those inputs have moved, W: key and value
    hit    = E ||dW h||^2 / (||dW||^2 E ||h||^2)    the same for an update of unit norm: what the direction alone does

Printed: the mean over layers after each task, and what the threshold allows `hit` to be at most (`allowed`).
"""

import argparse
import logging

import torch
from torch import Tensor

from data.stream import DataManager
from models.factory import load_config
from models.inflora.learner import InfLoRA
from models.parts.evaluation import evaluate
from models.parts.loop import learn
from trainer import prepare
from utils.runtime import Runtime


def key_value(learner: InfLoRA) -> Tensor:
    """(L, 2D, D): the key and value weights, past branches folded in."""
    return torch.stack([layer.weight.detach()[layer.width :].double() for layer in learner.layers])


def change(before: Tensor, after: Tensor, moments: Tensor) -> Tensor:
    """(L,): E ||dW h||^2 / E ||W h||^2; weights (L, 2D, D), moments C0 (L, D, D)."""
    return energy(after - before, moments) / energy(before, moments)


def hit(before: Tensor, after: Tensor, moments: Tensor) -> Tensor:
    """(L,): E ||dW h||^2 / (||dW||^2 E ||h||^2), spectral norm of dW."""
    moved = after - before
    size = torch.linalg.matrix_norm(moved, ord=2).square()
    return energy(moved, moments) / (size * moments.diagonal(dim1=1, dim2=2).sum(dim=1))


def allowed(learner: InfLoRA, moments: Tensor) -> Tensor:
    """(L,): what the first task's memory leaves out of E ||h||^2: no update in the free space can hit more."""
    assert learner.subspace is not None
    free = learner.subspace.free_projector()
    return (free @ moments).diagonal(dim1=1, dim2=2).sum(dim=1) / moments.diagonal(dim1=1, dim2=2).sum(dim=1)


def energy(weights: Tensor, moments: Tensor) -> Tensor:
    """(L,): E ||W h||^2 = tr(W C W^T)."""
    return (weights @ moments * weights).sum(dim=(1, 2))


def report(name: str, manager: DataManager, learner: InfLoRA) -> None:
    learn(learner, manager[0])
    before, moments = key_value(learner), learner._input_moments(manager[0]).double()
    most = f"allowed {allowed(learner, moments).mean():.4f}" if learner.subspace else "allowed -"
    for task in manager[1:]:
        learn(learner, task)
        after = key_value(learner)
        print(
            f"{name:8} after task {task.index + 1}: change {change(before, after, moments).mean():.5f}  "
            f"hit {hit(before, after, moments).mean():.4f}  {most}"
        )
    correct = evaluate(learner, list(manager))
    print(f"{name:8} last accuracy {100 * correct[0].sum() / sum(len(task.test) for task in manager):.2f}")


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", nargs="*", default=[], action="extend")
    parser.add_argument("--seed", type=int, default=1993)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set, {"seed": arguments.seed})
    runtime = Runtime(config.device, config.precision, config.num_workers)
    for name, used in (("InfLoRA", config), ("LoRA", config.model_copy(update={"memory": "none"}))):
        manager, learner = prepare(used, runtime)
        assert isinstance(learner, InfLoRA)
        report(name, manager, learner)


if __name__ == "__main__":
    main()
