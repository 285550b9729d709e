"""SimpleCIL (Zhou et al., 2023, "Revisiting class-incremental learning with pre-trained models"): nothing is trained.

w_c = mean of f(x) over the training images of class c, test transform, features not normalised
z_c = cos(f(x), w_c)
"""

from convs.heads import CosineHead
from models.base import LEARNERS, Learner, MakeBackbone
from models.parts.prototypes import ClassMeans
from utils.config import RunConfig
from utils.data_manager import Task
from utils.runtime import Runtime


@LEARNERS.register("simplecil")
class SimpleCIL(Learner):
    """A frozen backbone and one prototype per class; forgets nothing by construction."""

    def __init__(self, config: RunConfig, make_backbone: MakeBackbone, runtime: Runtime):
        super().__init__(config, make_backbone, runtime)
        self.network = self.build_network(make_backbone, lambda dim: CosineHead(dim, init="zeros"))
        self.network.requires_grad_(False)
        self.class_means = ClassMeans(self.network.feature_dim)

    def before_task(self, task: Task) -> None:
        self.network.head.grow(task.total_classes)
        self.network.head.requires_grad_(False)
        self.class_means.grow(task.total_classes)

    def epochs(self, task: Task) -> int:
        return 0

    def after_task(self, task: Task) -> None:
        self.eval()
        view, size = task.train.view("test"), self.config.test_batch_size
        self.class_means.update(self.network.features, view, self.runtime, size)
        head = self.network.head
        assert isinstance(head, CosineHead)
        head.set_weight(self.class_means.means)
