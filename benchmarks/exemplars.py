"""python -m benchmarks.exemplars: what the classic learners' own computations cost.

herding      500 x 768 features to 20 exemplars: running sums against the textbook loop, which measures every candidate
             at each pick and copies what is left
gem          a step of GEM over a step of fine-tuning, 1, 5 and 20 past tasks in the memory
transport    COIL's plan with equal masses against the published marginals, which never converge unless n = m

The least of alternating runs on one thread: other work on the machine only adds.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch

from convs.backbones import make_backbone
from convs.heads import LinearHead
from convs.network import Network
from models.coil.transport import plan
from models.gem import project
from models.parts.exemplars import herd, normalised
from models.parts.losses import slice_cross_entropy


def textbook_herding(features: np.ndarray, count: int) -> list[int]:
    """Normalised features (n, D): the loop as the papers' code has it."""
    left, positions = features.copy(), np.arange(len(features))
    mean, chosen, picked = features.mean(axis=0), [], []
    for k in range(1, count + 1):
        total = np.sum(picked, axis=0) if picked else np.zeros_like(mean)
        best = int(np.argmin(np.sqrt(np.sum((mean - (left + total) / k) ** 2, axis=1))))
        picked.append(left[best].copy())
        chosen.append(int(positions[best]))
        left, positions = np.delete(left, best, axis=0), np.delete(positions, best)
    return chosen


def least(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, alternating."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: min(values) for name, values in seconds.items()}


def herding(rounds: int) -> None:
    rng = np.random.RandomState(0)
    vectors = normalised(torch.from_numpy(rng.standard_normal((500, 768)) + rng.standard_normal(768)).float()).numpy()
    count = 20
    assert herd(vectors, count).tolist() == textbook_herding(vectors, count)
    runs = {"textbook": lambda: textbook_herding(vectors, count), "running sums": lambda: herd(vectors, count)}
    seconds = least(runs, rounds)
    ratio = seconds["textbook"] / seconds["running sums"]
    print(f"herding: textbook {_ms(seconds['textbook'])}, running sums {_ms(seconds['running sums'])}: {ratio:.0f}x")


def gem(rounds: int) -> None:
    """small_vit, batches of 32; every past task holds 20 exemplars in one batch, as the learner keeps them."""
    network = Network(make_backbone("small_vit", None, None), LinearHead, "half").train()
    network.head.grow(42)
    moved = list(network.parameters())
    optimizer = torch.optim.SGD(moved, lr=0.01, momentum=0.9)
    images, targets = torch.rand(32, 3, 32, 32), torch.randint(40, 42, (32,))
    memories = [
        (torch.rand(20, 3, 32, 32), torch.randint(2 * k, 2 * k + 2, (20,)), range(2 * k, 2 * k + 2)) for k in range(20)
    ]

    def gradient(images: torch.Tensor, targets: torch.Tensor, classes: range) -> torch.Tensor:
        loss = slice_cross_entropy(network(images), targets, classes)
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, moved)])

    def step(past_tasks: int) -> None:
        past = [gradient(*memory) for memory in memories[:past_tasks]]
        used = gradient(images, targets, range(40, 42))
        if past:
            used = project(used, torch.stack(past), eps=1e-3)
        for parameter, part in zip(moved, used.split([p.numel() for p in moved]), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()

    runs = {str(count): lambda count=count: step(count) for count in (0, 1, 5, 20)}
    seconds = least(runs, rounds)
    for count in ("1", "5", "20"):
        print(f"gem: {count} past tasks, a step is {seconds[count] / seconds['0']:.1f}x of fine-tuning's")


def transport(rounds: int) -> None:
    import ot

    rng = np.random.RandomState(0)
    for old, new in ((5, 5), (20, 10), (95, 5)):
        cost = torch.from_numpy(rng.uniform(0.5, 1.5, (old, new)))
        uniform = np.full(old, 1 / old), np.full(new, 1 / old)  # masses 1 and m / n

        def published(uniform=uniform, cost=cost) -> np.ndarray:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ot.sinkhorn(*uniform, cost.numpy(), 0.464)

        seconds = least({"published": published, "equal": lambda cost=cost, old=old: plan(cost, old, 0.464)}, rounds)
        ratio = seconds["published"] / seconds["equal"]
        both = f"published {_ms(seconds['published'])}, equal masses {_ms(seconds['equal'])}"
        print(f"transport: n {old}, m {new}: {both}: {ratio:.0f}x")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    herding(rounds)
    gem(rounds)
    transport(rounds)


if __name__ == "__main__":
    main()
