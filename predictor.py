"""A finished run without its data set: `Predictor("runs/x/seed1993")(images)`.

Network, head, statistics, class names, transform and normalisation come from the run's folder alone; neither the data
set nor the weight file that the run began with need be there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convs.backbones import input_size
from data.images import read_image
from data.stream import TaskInfo
from data.transforms import Transform
from models.base import Learner
from models.factory import build_learner, saved_config
from models.parts.state import restore
from utils import checkpoint
from utils.config import RunConfig
from utils.errors import DataError, UserError
from utils.folders import finished_result, single_seed
from utils.runtime import Runtime
from utils.storage import expanded

Picture = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Predictions:
    """Of N images. names: of the predicted classes. labels (N,): in the data set's own numbering. scores (N, C): of the
    classes in `Predictor.labels`, in their order."""

    names: list[str]
    labels: np.ndarray
    scores: np.ndarray


class Predictor:
    """What a run has learned, ready to classify.

    folder: of a seed, or of a run with one. names, labels: of the classes, in the data set's own numbering.
    Raises UserError when there is no run, when it is unfinished, of a version that cannot be read, or another's.
    """

    def __init__(self, folder: str | Path, device: str = "auto"):
        seed = single_seed(Path(folder))
        result = finished_result(seed)
        self.config: RunConfig = saved_config(seed / "config.json", {"device": device})
        if self.config.batch_dependent:
            raise UserError(
                f"predictions of the run in '{seed}' depend on the rest of their batch (\"upstream\" of "
                f"{self.config.model_name}), so a single image has none. `python main.py evaluate RUN` gives "
                "its accuracy"
            )
        self.learner = restored(self.config, seed / "checkpoint" / "last.pt")
        size = self.config.image_size or input_size(self.config.backbone)
        self._transform = Transform(self.config.recipes["test"], size)
        own = np.array(result["class_order"][: self.learner.task.total_classes])
        self._columns = np.argsort(own)  # of the scores, in the order of the data set's own labels
        self.labels: np.ndarray = own[self._columns]
        self.names: list[str] = [result["class_names"][column] for column in self._columns]

    def __call__(self, images: Picture | Tensor | Iterable[Picture | Tensor]) -> Predictions:
        """images: one or any number of: paths, PIL images, uint8 arrays (H, W, 3) or (N, H, W, 3), float tensors
        (3, s, s) or (N, 3, s, s) in [0, 1], which are taken as the test transform leaves images.

        Raises DataError for an image that cannot be read, UserError for what is no image.
        """
        batches, found = batched(self._pixels(images), self.config.test_batch_size), [np.zeros((0, len(self.labels)))]
        for batch in batches:
            found.append(self._scores(torch.stack(batch)))
        scores = np.concatenate(found)
        best = scores.argmax(axis=1)
        return Predictions([self.names[index] for index in best], self.labels[best], scores)

    def _pixels(self, images) -> Iterable[Tensor]:
        """Single images in [0, 1] (3, s, s)."""
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        if isinstance(images, np.ndarray | Tensor) and images.ndim == 3:
            images = images[None]
        return (self.pixels(image) for image in images)

    def pixels(self, image: Picture | Tensor) -> Tensor:
        """One image as the network takes it: (3, s, s) in [0, 1]."""
        size = self._transform.size
        if isinstance(image, Tensor):
            if not image.is_floating_point() or image.shape != (3, size, size):
                raise UserError(
                    f"a tensor must be float (3, {size}, {size}) in [0, 1], as the test transform leaves images; got "
                    f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}. Arrays, PIL images and paths are "
                    "transformed here"
                )
            return image.to(torch.float32)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise UserError(f"an array must be uint8 (H, W, 3), got {image.dtype} {list(image.shape)}")
            return self._transform(image).float() / 255
        if isinstance(image, str | Path):
            if not expanded(image).is_file():
                raise DataError(f"image '{image}' cannot be read (no such file)")
            return self._transform(read_image(expanded(image))).float() / 255
        if isinstance(image, Image.Image):
            return self._transform(image.convert("RGB")).float() / 255
        raise UserError(f"{type(image).__name__} is no image: give paths, PIL images, uint8 arrays or float tensors")

    @torch.inference_mode()
    def _scores(self, images: Tensor) -> np.ndarray:
        learner, runtime = self.learner, self.learner.runtime
        images = images.to(runtime.device)
        with runtime.autocast():
            scores = learner.predict(images, learner.frozen(images, learner.frozen_names))
        main = next(iter(scores.values())) if isinstance(scores, dict) else scores
        return main.float().cpu().numpy()[:, self._columns]


def batched(items: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Lists of `size` of the items, the last one with what is left."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def restored(config: RunConfig, path: Path, runtime: Runtime | None = None) -> Learner:
    """The learner of a checkpoint, in evaluation mode, for the task that it was saved in.

    Raises UserError when the checkpoint is missing, damaged, of another version, or another learner's.
    """
    if not path.is_file():
        raise UserError(f"'{path}' is missing, and with it the weights that the run ended in")
    identity, state = checkpoint.load(path)
    if identity["learner"] != config.model_name:
        raise UserError(
            f"checkpoint '{path}' is of {identity['learner']}, the run's config.json of {config.model_name}: one of "
            "the two does not belong into this folder"
        )
    runtime = runtime or Runtime.of(config)
    learner = build_learner(config, runtime, TaskInfo.from_state(state["learner"]["task"]), restoring=True)
    restore(learner, state["learner"])
    return learner.eval()
