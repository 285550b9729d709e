"""BatchNorm's running statistics: which networks have them, and passes that leave them alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The layers that normalise by the statistics of a batch in training."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


@contextmanager
def frozen_statistics(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Layers in training mode normalise by the batch as ever, and their running statistics are at the end what they
    were; backward passes belong inside. They are put back rather than left alone by a switch of the layer, which a
    compiled network would be compiled for once more."""
    moving = [layer for layer in layers if layer.training]
    found = [b for m in moving for b in (m.running_mean, m.running_var, m.num_batches_tracked) if b is not None]
    before = [buffer.clone() for buffer in found]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(found, before, strict=True):
                buffer.copy_(value)
