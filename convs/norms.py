"""BatchNorm's running statistics: which networks have them, and passes that leave them alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The layers that normalise by the statistics of a batch in training."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


@contextmanager
def frozen_statistics(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Layers in training mode normalise by the batch as ever, and their running statistics stay as they are."""
    for layer in layers:
        layer.track_running_stats = not layer.training
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
