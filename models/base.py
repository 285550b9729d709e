"""The contract between a learner and the harness.

A learner is a module with a few hooks; the harness owns the loop, the loaders, the device, evaluation, results and
checkpoints. Order in one task:

    before_task -> [prepare -> loss -> after_backward -> after_step]* -> after_epoch ... -> after_task -> predict
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from convs.backbones import Backbone, BackboneInfo
from convs.heads import Head
from convs.network import Network
from data.transforms import MEAN_STD
from models.parts.optim import build_optimizer, build_scheduler, group
from utils.config import RunConfig
from utils.data_manager import Task, View
from utils.landscape import Weights
from utils.registry import Registry
from utils.runtime import Runtime

MakeBackbone = Callable[[], tuple[Backbone, BackboneInfo]]

LEARNERS: Registry[type["Learner"]] = Registry("learner")


@contextmanager
def _nobody_watches() -> Iterator[Callable[[], None]]:
    yield lambda: None


class Learner(nn.Module):
    """Base of every learner; a subclass overrides the hooks that it needs and registers itself.

    Config declares the method's own keys. upstream_seed: what the reference implementation seeds torch with
    whatever the config says, used with "upstream": true.
    """

    Config: ClassVar[type[RunConfig]] = RunConfig
    upstream_seed: ClassVar[int | None] = None
    network: Network
    task: Task

    def __init__(self, config: RunConfig, make_backbone: MakeBackbone, runtime: Runtime):
        """Build `self.network` from `make_backbone()` (see `build_network`)."""
        super().__init__()
        self.config, self.runtime = config, runtime
        # `with self.restartable() as safe_point:` is for a long stage of `before_task` that keeps its progress in a
        # part: at safe_point() the harness may save, and stop; the resumed run calls `before_task` again.
        self.restartable: Callable[[], AbstractContextManager[Callable[[], None]]] = _nobody_watches

    def build_network(self, make_backbone: MakeBackbone, head: Callable[[int], Head]) -> Network:
        """Backbone + head(feature_dim), normalising as the config says. Keeps `backbone_info` for the results."""
        return Network(*self.network_parts(make_backbone, head))

    def network_parts(
        self, make_backbone: MakeBackbone, head: Callable[[int], Head]
    ) -> tuple[Backbone, Head, tuple[float, ...], tuple[float, ...]]:
        """What a `Network` is made of, for a learner whose network is a class of its own."""
        backbone, self.backbone_info = make_backbone()
        own = (self.backbone_info.mean, self.backbone_info.std)
        mean, std = own if self.config.normalize == "model" else MEAN_STD[self.config.normalize]
        return backbone, head(backbone.feature_dim), mean, std

    def before_task(self, task: Task) -> None:
        """Make room for the task's classes: grow heads, freeze, design branches, undo what must not last."""
        raise NotImplementedError(
            f"{type(self).__name__}.before_task is missing: it has to make the head as wide as task.total_classes, "
            "for example self.network.head.grow(task.total_classes)"
        )

    def train_data(self, task: Task) -> View:
        """The images that `fit` trains on."""
        return task.train.view("train")

    def epochs(self, task: Task) -> int:
        """Epochs of `fit` in this task; 0 leaves the learner to `after_task`."""
        return self.config.epochs_of(task.index)

    def param_groups(self) -> list[dict[str, Any]]:
        """What the optimiser moves, as torch parameter groups; default: all of the network that is not frozen."""
        return [group(self.network.parameters(), self.lrate, self.weight_decay)]

    def make_optimizer(self, epochs: int) -> tuple[Optimizer, LRScheduler]:
        """Fresh for each task; the scheduler is stepped once an epoch."""
        optimizer = build_optimizer(self.config, self.param_groups(), fused=self.runtime.device.type == "cuda")
        return optimizer, build_scheduler(self.config, optimizer, epochs)

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Any, Any]:
        """Once a batch, before `loss`, which may run twice on it: what need not be computed twice."""
        return images, targets

    def loss(self, net: nn.Module, images: Any, targets: Tensor) -> Tensor:
        """Mean loss over the batch, on the device. Changes no state.

        net: the network, maybe wrapped for several processes or compiled: call it, not `self.network`.
        """
        raise NotImplementedError(
            f"{type(self).__name__}.loss is missing: return the mean loss of a batch, for example "
            "cross_entropy(net(images), targets), or override epochs() to return 0 if nothing is trained"
        )

    def after_backward(self) -> None:
        """Gradients are there and may be changed."""

    def after_step(self, images: Tensor, targets: Tensor) -> None:
        """Once a batch, after the optimiser's step: pixels in [0, 1] and labels of the batch."""

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Numbers for the epoch's log line."""
        return {}

    def after_task(self, task: Task) -> None:
        """Statistics, alignment, merging, memory. Evaluation comes after this."""

    def predict(self, images: Tensor) -> Tensor:
        """(B, 3, s, s) in [0, 1] -> scores of all classes seen (B, C); must not depend on the rest of the batch."""
        return self.network(images)

    def landscape_parameters(self) -> dict[str, Weights]:
        """After a task, what --landscape varies, by name; default: every weight that trained in the task."""
        return {name: Weights(p) for name, p in self.named_parameters() if p.requires_grad}

    def landscape_branches(self) -> Sequence[Mapping[str, Weights]]:
        """Sets of weights trained side by side, under the names of `landscape_parameters`, into whose place each of
        them can be put: --landscape draws the loss between them. Default: there are none."""
        return ()

    def landscape_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss that --landscape draws, in evaluation mode; default: the training loss. `self.task` may be an older
        task than the head's last."""
        return self.loss(self.network, *self.prepare(images, targets))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, s, s) in [0, 1] -> (B, D): what the probes read."""
        return self.network.features(images)

    def results(self) -> dict[str, Any]:
        """What the method adds to result.json, under its own keys."""
        return {}

    def pictures(self) -> dict[str, Tensor]:
        """name -> images (N, 3, s, s) in [0, 1] that `before_task` made, for the run's plots."""
        return {}

    def parts(self) -> dict[str, Any]:
        """Objects with state_dict and load_state_dict that are no modules; saved and restored with the learner."""
        return {}

    @property
    def lrate(self) -> float:
        return self.config.lrate_of(self.task.index)

    @property
    def weight_decay(self) -> float:
        return self.config.weight_decay_of(self.task.index)

    def trained_numbers(self) -> int:
        """How many numbers training moves in the task at hand."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def stored_bytes(self) -> int:
        """What the method keeps between tasks beyond the frozen pre-trained network: everything else in its state."""
        frozen = {id(p) for p in self.network.backbone.model.parameters() if not p.requires_grad}
        kept = [value for value in self.state_dict(keep_vars=True).values() if id(value) not in frozen]
        tensors = _tensors_in([*kept, *(part.state_dict() for part in self.parts().values())])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def statistics_bytes(self, tasks: Sequence[Task]) -> int:
        """What the statistics of these tasks will take in the state, known beforehand; 0 when the method keeps none."""
        return 0


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors_in(item)] if isinstance(value, list | tuple) else []
