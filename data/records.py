"""What a data set is once it is read: two halves of images with labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Split:
    """Half of a data set. images: uint8 (N, H, W, 3), or N paths that are decoded when read, or N decoded images.

    labels (N,): original labels, 0..C-1. domains (N,): which domain each image belongs to, or None: no domains, or,
    for the test half of a domain-incremental stream, one test set that every domain shares.
    """

    images: np.ndarray | Sequence[Path] | Sequence[np.ndarray]
    labels: np.ndarray
    domains: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_files(self) -> bool:
        """Whether images are decoded when read; decoded ones are one array, or many of several sizes."""
        return len(self.images) > 0 and isinstance(self.images[0], Path)


@dataclass(frozen=True)
class ImageData:
    """A whole data set. domain_names is empty unless the data set is a domain-incremental stream.

    variant: which of the known splits, how it was made, and its hash. natural_order: published numbers use the
    unshuffled class order. place: where it was read, of data sets that look beside the data root.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...] = ()
    variant: str = ""
    natural_order: bool = False
    digest: str = field(default="", compare=False)
    place: str = field(default="", compare=False)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)
