"""Flat JSON -> a frozen, checked configuration; every fault is reported at once.

Precedence: default < JSON file < --set key=value. The keys of the harness stand in `RunConfig`, those of training in
`TrainConfig`; a learner adds its own by a subclass nested in its class. What a key needs to have an effect stands
beside it (`key(..., only=...)`), what relates two keys in `faults`; both are asked on checked values.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from utils.keys import GIVEN, key

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

# Keys that change where and how fast a run goes, not what it computes: a resumed run may change them.
MACHINE_KEYS = frozenset(
    {
        "device", "num_workers", "data_root", "cache", "cache_root", "strict_data", "checkpoint_minutes",
        "keep_checkpoints", "frozen_gib", "about", "seed", "save_predictions", "log_to", "init_from",
        "cov_device",
    }
)  # fmt: skip


class Sam(BaseModel):
    """The value of "sam"."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    rho: Annotated[float, Field(gt=0)] = Field(0.05, description="radius of the ascent")
    damping: Rate = Field(25.0, description="T of SAM+; 0: plain SAM")


class RunConfig(BaseModel):
    """Keys that every learner has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    # What the reference implementation seeds torch with whatever its config says, by the value of "upstream".
    fixed_torch_seeds: ClassVar[Mapping[bool | str, int]] = {}
    _written: frozenset[str] = PrivateAttr(frozenset())  # the keys that the user named

    model_name: str = Field(description='learner; `list` shows all; or "package.module:Class" from the Python path')
    dataset: str = Field(
        description='data set by name, npz:FILE, folder:DIR, torchvision:NAME, hf:NAME, or "package.module:function"'
    )
    backbone: str | dict[str, Any] = Field(
        description='full timm tag, a bundled network ("small_vit"), or {"name": ..., constructor arguments}'
    )

    init_cls: Count | None = key(None, "classes of the first task; default: increment")
    increment: Count | None = key(None, "classes of every later task; the last takes the rest")
    task_sizes: tuple[Count, ...] | None = key(
        None, "classes of each task, instead of init_cls and increment", min_length=1
    )
    shuffle: bool = key(True, "permute the classes by class_order_seed; false: natural order")
    class_order_seed: Whole | None = key(None, "seed of the class order; default: seed", only={"shuffle": True})
    class_order: tuple[Whole, ...] | None = key(
        None,
        "the classes in the order in which they come, by their numbers in the data set, each once: instead of a "
        "shuffle; the same for every seed",
        min_length=1,
    )
    domain_order: tuple[str, ...] | None = key(
        None, "order of the domains of a domain-incremental stream; default: the data set's", min_length=1
    )
    dil_eval: Literal["seen", "all"] = key(
        "seen", "domain-incremental: evaluate on the domains seen so far, or always on all of them"
    )
    seed: Whole | Annotated[tuple[Whole, ...], Field(min_length=1)] = key(
        1993, "seed of all randomness; a list runs one after another"
    )

    weights: str | None = key(None, 'file (.npz, .pth, .safetensors) or "random"; default: the weights of the timm tag')
    weights_entry: str | None = key(
        None,
        'which network of the weight file: the names that lead to it ("model_ema", "teacher", "momentum_encoder"), or '
        '"raw", "ema"; default: the one that its authors evaluate, said in the report',
        only={"weights": GIVEN},
    )
    resample_patch: bool = key(
        False, "resample a patch embedding of another size to the backbone's", only={"weights": GIVEN}
    )
    data_root: str | None = key(None, "where data sets lie; default: $PALIMPSEST_DATA, then ~/.cache/palimpsest/data")
    split: str = key(
        "folder",
        '"folder": as the archive is split; "seeded" or "seeded:N": 80/20 per class, drawn once; '
        '"list:FILE": JSON {"train", "test"} or a pair of text or YAML lists (imagenet100: a list of classes)',
        pattern=r"^(folder|seeded(:\d+)?|list:.+)$",
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0, "share of each class's training images kept apart for choices, drawn by seed; at least one"
    )
    on_bad_image: Literal["error", "skip"] = key(
        "error",
        '"skip": leave out image files that cannot be read, counted and listed in result.json; every file is decoded '
        "once before the run",
    )
    evaluate_on: Literal["test", "val"] = key(
        "test", '"val": every reported accuracy is on the part that "validation" keeps apart'
    )
    strict_data: bool = key(False, "doubts about counts and checksums of the data are errors")
    cache: Literal["none", "ram", "disk"] = key(
        "none", "keep decoded images in memory, or in a memory map below cache_root"
    )
    cache_size: Count | None = key(
        None,
        "cached images are reduced to this short side in pixels; default: kept as decoded",
        only={"cache": ("ram", "disk")},
    )
    cache_root: str | None = key(None, "where derived files lie; default: $PALIMPSEST_CACHE, then ~/.cache/palimpsest")
    image_size: Annotated[int, Field(ge=1, le=8192)] | None = key(
        None, "pixels a side; default: the input size of the backbone"
    )
    augment_on: Literal["auto", "host", "device"] = key(
        "auto",
        '"device": data sets in one array stay on the device and are cropped there, batch by batch: same '
        'distribution, other random numbers; auto: on CUDA, where recipes and memory allow it, else "host"; settled '
        "when a run begins, and kept wherever it goes on",
    )
    test_transform: str = key("none", "recipe for test images and statistics")
    normalize: Literal["none", "half", "imagenet", "cifar", "cifar10", "tinyimagenet", "model"] = key(
        "none", 'mean and std that the network subtracts from pixels in [0, 1]; "model": the backbone\'s own'
    )

    test_batch_size: Count = key(256, "images per forward pass in evaluation and statistics")
    frozen_gib: Rate = key(
        4.0,
        "memory for values of test images that never change (features of a frozen network), kept between evaluations; "
        "beyond it they go to a file below cache_root, without room there they are computed again",
    )

    device: str = key("auto", "auto, cpu, cuda or cuda:1", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = key(
        "auto",
        "auto: bf16 on CUDA cards that compute in it, else fp32 (with upstream: fp32); tf32: fp32 with products of 19 "
        "bits on CUDA",
    )
    deterministic: bool = key(False, "on CUDA: the same digits again after a stop, at a cost (docs/costs.md)")
    num_workers: Whole | None = key(None, "loader processes; default: chosen from machine and data")
    probe: Literal["linear", "linear_raw", "knn"] | None = key(
        None,
        "after each task, also score the frozen features of all classes seen: by a linear layer on "
        "standardised features, by one on features as they are (SGD at 30), or by nearest neighbours",
    )
    probe_lrate: Rate | None = key(
        None,
        "of the linear probes; default: linear 0.1, linear_raw 30",
        only={"probe": ("linear", "linear_raw")},
    )
    checkpoint_minutes: Annotated[float, Field(gt=0)] = key(
        10.0, "minutes between checkpoints inside a task; one is always written after a task"
    )
    keep_checkpoints: Literal["last", "first", "tasks"] = key(
        "last",
        '"tasks": also the one after each task, which `landscape` draws the path between tasks from; "first": also the '
        'one after the first, which other runs can begin with ("init_from")',
    )
    init_from: str | None = key(
        None,
        "folder of a run that kept the checkpoint after its first task: this one begins behind that task, where data, "
        "class order, backbone, weights and the keys of the task are the same",
    )
    save_predictions: bool = key(
        False, "after each task write file, label, prediction and scores of every test image to predictions/taskN.npz"
    )
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = key(
        (), "also feed these loggers from the records of epochs and tasks; each needs its package"
    )
    upstream: bool = key(False, "reproduce the quirks of the reference implementation")
    about: dict[str, Any] = Field(
        default_factory=dict, description="note: paper, table row, backbone file, reported value"
    )

    def implied(self) -> dict[str, Any]:
        """Values that others bring along; a key that the user names wins. The references compute in fp32."""
        return {"precision": "fp32"} if self.upstream else {}

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, sentence) for keys that contradict one another; `self.names(key)` asks what the user wrote."""
        sizes = [name for name in ("init_cls", "increment") if getattr(self, name) is not None]
        if self.task_sizes is not None and sizes:
            yield "task_sizes", f"contradicts {_quoted(sizes)}: give either the list or the two numbers"
        if self.class_order is not None:
            for name in ("shuffle", "class_order_seed"):
                if self.names(name) and getattr(self, name) is not False:
                    yield name, 'contradicts "class_order", which is an order already: drop one of the two'
        if self.init_cls is not None and self.increment is None and self.task_sizes is None:
            yield "init_cls", 'needs "increment", the classes of every later task'
        if self.weights == "random":
            for name in ("weights_entry", "resample_patch"):
                if getattr(self, name):
                    yield name, 'has no effect where "weights" is "random": drop it, or name a file'
        if self.evaluate_on == "val" and not self.validation:
            yield "evaluate_on", 'needs "validation", the share of the training images to evaluate on'

    def names(self, name: str) -> bool:
        """Whether the user gave this key a value."""
        return name in self._written and getattr(self, name) is not None

    @property
    def written(self) -> frozenset[str]:
        """The keys that the user named; the others are at their default or implied."""
        return self._written

    @property
    def seeds(self) -> tuple[int, ...]:
        """Each once, in the order given."""
        return tuple(dict.fromkeys(self.seed)) if isinstance(self.seed, tuple) else (self.seed,)

    def with_seed(self, seed: int) -> "RunConfig":
        return self.model_copy(update={"seed": seed})

    @property
    def torch_seed(self) -> int:
        """Seed of all randomness but the class order, of a single-seed config."""
        return self.fixed_torch_seeds.get(self.upstream, self.seeds[0])

    @property
    def order_seed(self) -> int:
        """Seed of the class order of a single-seed config."""
        return self.seeds[0] if self.class_order_seed is None else self.class_order_seed

    @property
    def batch_dependent(self) -> bool:
        """Whether a prediction depends on the rest of its batch, as in published forms of prompt methods. Evaluation
        then goes class by class, in batches of `batch_size`, in one process, as they do."""
        return False

    @property
    def architectures(self) -> int:
        """Leading tasks whose networks are not all of one kind: what each refuses is said before the run."""
        return 1

    @property
    def recipes(self) -> dict[Literal["train", "test"], str]:
        """Names of the transforms of training and of test images."""
        return {"train": self.test_transform, "test": self.test_transform}

    def settled(self, augment_on: str, named: bool | None = None) -> "RunConfig":
        """With what "auto" turned out to mean in a run; no key that the user named. named: whether it was one when the
        run began; whoever names the same place now, or no longer does, goes on with that run."""
        if self.augment_on != "auto" and (named is None or self.augment_on != augment_on):
            return self
        config = self.model_copy(update={"augment_on": augment_on})
        config._written = self._written - {"augment_on"} | ({"augment_on"} if named else set())
        return config

    def same_run(self, other: Mapping[str, Any]) -> list[str]:
        """Keys, machine keys apart, in which this config differs from a saved one (as `config.json` holds it). What
        "auto" became there is not asked, what somebody named is."""
        mine = self.model_dump(mode="json")
        named = self.names("augment_on") or "augment_on" in other.get(WRITTEN, ())
        keys = sorted((set(mine) | set(other)) - MACHINE_KEYS - {WRITTEN} - (set() if named else {"augment_on"}))
        return [key for key in keys if mine.get(key) != other.get(key)]

    def fingerprint(self) -> str:
        """16 hexadecimal digits of what makes a run this run: every key but those of the machine."""
        values = self.model_dump(mode="json") | ({} if self.names("augment_on") else {"augment_on": "auto"})
        text = json.dumps({name: values[name] for name in sorted(set(values) - MACHINE_KEYS)})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def saved(self) -> dict[str, Any]:
        """What config.json holds: every key resolved, and which of them the user wrote."""
        return self.model_dump(mode="json") | {WRITTEN: sorted(self._written)}


WRITTEN = "$written"


class TrainConfig(RunConfig):
    """Keys of training, of every learner that trains."""

    train_transform: str = key("none", "recipe for training images")
    batch_size: Count = key(128, "images per step, over all processes")
    drop_last: bool = key(False, "leave out an epoch's last batch where it is smaller and not the only one")
    epochs: Whole = key(20, "epochs of every later task")
    init_epoch: Whole | None = key(None, "epochs of the first task; default: epochs")
    optimizer: Literal["sgd", "adam", "adamw"] = key("sgd", "built anew for each stage of a task")
    lrate: Rate = key(0.01, "learning rate of every later task")
    init_lr: Rate | None = key(None, "learning rate of the first task; default: lrate")
    weight_decay: Rate = key(5e-4, "weight decay of every later task")
    init_weight_decay: Rate | None = key(None, "weight decay of the first task; default: weight_decay")
    momentum: Annotated[float, Field(ge=0, lt=1)] = key(0.9, "of sgd", only={"optimizer": "sgd"})
    scheduler: Literal["constant", "multistep", "cosine"] = key("cosine", "learning rate over the epochs of a task")
    milestones: tuple[Count, ...] = key(
        (), "epochs at which multistep multiplies by lrate_decay", only={"scheduler": "multistep"}
    )
    init_milestones: tuple[Count, ...] | None = key(
        None, "milestones of the first task; default: milestones", only={"scheduler": "multistep"}
    )
    lrate_decay: Annotated[float, Field(gt=0, le=1)] = key(0.1, "factor of multistep", only={"scheduler": "multistep"})
    init_lr_decay: Annotated[float, Field(gt=0, le=1)] | None = key(
        None, "lrate_decay of the first task; default: lrate_decay", only={"scheduler": "multistep"}
    )
    min_lr: Rate = key(0.0, "floor of cosine", only={"scheduler": "cosine"})
    sam: Sam | None = key(
        None,
        "sharpness-aware minimisation: two passes a step, the second at weights that a step of length rho "
        "uphill has reached; damping T shortens steps along the ascent (SAM+), 0 does not (SAM)",
    )
    accumulate: Count = key(
        1,
        "parts in which a batch goes through the network, one step of the optimiser: the same gradient in less memory",
    )
    clip_norm: Positive | None = key(
        None,
        "largest norm of the gradient over all weights that train: a longer one is scaled to it (SAM: the second); the "
        "alignment of a head to drawn features has steps of its own",
    )
    compile: bool = key(False, "torch.compile the network in training")
    eval_every: Whole = key(0, "evaluate every so many epochs inside a task; 0: after each task only")

    def faults(self) -> Iterator[tuple[str, str]]:
        yield from super().faults()
        if self.scheduler == "multistep" and not self.milestones:
            yield "milestones", 'missing although "scheduler" is "multistep"'
        if self.accumulate > self.batch_size:
            yield "accumulate", f"is {self.accumulate}, more parts than a batch has images ({self.batch_size})"
        if self.accumulate > 1 and (why := self.undivided()) is not None:
            yield (
                "accumulate",
                f"is {self.accumulate}, but {self.model_name} needs the whole batch at once: {why}; use 1",
            )

    def undivided(self) -> str | None:
        """Why the gradient of a batch is not the mean of its parts' gradients; None: it is. In words, for "accumulate"
        above 1."""
        return "a vote of the batch chooses its prompts, or its rows mix" if self.batch_dependent else None

    @property
    def recipes(self) -> dict[Literal["train", "test"], str]:
        return {"train": self.train_transform, "test": self.test_transform}

    def of_task(self, name: str, index: int) -> Any:
        """The value of a schedule's key in a task: its `init_*` form in the first, where that is given."""
        first = getattr(self, INIT[name]) if index == 0 else None
        return getattr(self, name) if first is None else first


# Keys of a schedule -> their form for the first task.
INIT = {
    "epochs": "init_epoch",
    "lrate": "init_lr",
    "weight_decay": "init_weight_decay",
    "milestones": "init_milestones",
    "lrate_decay": "init_lr_decay",
}


def _quoted(keys: list[str]) -> str:
    return " and ".join(f'"{key}"' for key in keys)
