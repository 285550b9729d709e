"""Flat JSON -> a frozen, checked configuration; every fault is reported at once.

Precedence: default < JSON file < --set key=value. The keys of the harness stand in `RunConfig`; a learner adds its
own by a subclass declared beside its formulas.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined, to_jsonable_python

from utils.errors import ConfigError, did_you_mean

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]

# Keys of the older toolboxes -> what they are called here.
RENAMED = {
    "convnet_type": "backbone",
    "backbone_type": "backbone",
    "net_type": "backbone",
    "lr": "lrate",
    "init_epochs": "init_epoch",
    "inc_epochs": "epochs",
    "tuned_epoch": "epochs",
    "optim": "optimizer",
    "data_path": "data_root",
    "lr_decay": "lrate_decay",
    "perturb": "sam",
    "rho": "sam",
    "adapter_num": "branches",
    "ffn_num": "bottleneck",
    "ssca": "shift",
    "ca": "ca_epochs",
}

# Keys of shipped configs that no line of their reference implementation reads.
UNREAD = frozenset({"use_RP", "M", "pass", "vpt_type", "prompt_token_num"})

# Keys that change where and how fast a run goes, not what it computes: a resumed run may change them.
MACHINE_KEYS = frozenset(
    {
        "device", "num_workers", "data_root", "cache", "cache_root", "strict_data", "checkpoint_minutes",
        "keep_checkpoints", "about", "seed",
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

    model_name: str = Field(description="learner; --list shows all")
    dataset: str = Field(description="data set by name, or npz:FILE, or folder:DIR")
    backbone: str | dict[str, Any] = Field(
        description='full timm tag, a bundled network ("small_vit"), or {"name": ..., constructor arguments}'
    )

    init_cls: Count | None = Field(None, description="classes of the first task; default: increment")
    increment: Count | None = Field(None, description="classes of every later task; the last takes the rest")
    task_sizes: tuple[Count, ...] | None = Field(
        None, min_length=1, description="classes of each task, instead of init_cls and increment"
    )
    shuffle: bool = Field(True, description="permute the classes by class_order_seed; false: natural order")
    class_order_seed: Whole | None = Field(None, description="seed of the class order; default: seed")
    domain_order: tuple[str, ...] | None = Field(
        None, min_length=1, description="order of the domains of a domain-incremental stream; default: the data set's"
    )
    dil_eval: Literal["seen", "all"] = Field(
        "seen", description="domain-incremental: evaluate on the domains seen so far, or always on all of them"
    )
    seed: Whole | tuple[Whole, ...] = Field(1993, description="seed of all randomness; a list runs one after another")

    weights: str | None = Field(
        None, description='file (.npz, .pth, .safetensors) or "random"; default: the weights of the timm tag'
    )
    data_root: str | None = Field(
        None, description="where data sets lie; default: $PALIMPSEST_DATA, then ~/.cache/palimpsest/data"
    )
    split: str = Field(
        "folder",
        pattern=r"^(folder|seeded(:\d+)?|list:.+)$",
        description='"folder": as the archive is split; "seeded" or "seeded:N": 80/20 per class, drawn once; '
        '"list:FILE": JSON {"train", "test"} or a pair of text or YAML lists (imagenet100: a list of classes)',
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of each class's training images kept apart for choices, drawn by seed; at least one"
    )
    evaluate_on: Literal["test", "val"] = Field(
        "test", description='"val": every reported accuracy is on the part that "validation" keeps apart'
    )
    strict_data: bool = Field(False, description="doubts about counts and checksums of the data are errors")
    cache: Literal["none", "ram", "disk"] = Field(
        "none", description="keep decoded images in memory, or in a memory map below cache_root"
    )
    cache_size: Count | None = Field(
        None, description="cached images are reduced to this short side in pixels; default: kept as decoded"
    )
    cache_root: str | None = Field(
        None, description="where derived files lie; default: $PALIMPSEST_CACHE, then ~/.cache/palimpsest"
    )
    image_size: Count | None = Field(None, description="pixels a side; default: the input size of the backbone")
    train_transform: str = Field("none", description="recipe for training images; --list shows all")
    augment_on: Literal["host", "device"] = Field(
        "host",
        description='"device": data sets in one array stay on the device and are cropped there, batch by batch: same '
        "distribution, other random numbers",
    )
    test_transform: str = Field("none", description="recipe for test images and statistics")
    normalize: Literal["none", "half", "imagenet", "cifar", "cifar10", "tinyimagenet", "model"] = Field(
        "none",
        description='mean and std that the network subtracts from pixels in [0, 1]; "model": the backbone\'s own',
    )

    batch_size: Count = Field(128, description="images per step, over all processes")
    test_batch_size: Count = Field(256, description="images per forward pass in evaluation and statistics")
    epochs: Whole = Field(20, description="epochs of every later task")
    init_epoch: Whole | None = Field(None, description="epochs of the first task; default: epochs")
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="built anew for each task")
    lrate: Rate = Field(0.01, description="learning rate of every later task")
    init_lr: Rate | None = Field(None, description="learning rate of the first task; default: lrate")
    weight_decay: Rate = Field(5e-4, description="weight decay of every later task")
    init_weight_decay: Rate | None = Field(None, description="weight decay of the first task; default: weight_decay")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of sgd")
    scheduler: Literal["constant", "multistep", "cosine"] = Field(
        "cosine", description="learning rate over the epochs of a task"
    )
    milestones: tuple[Count, ...] = Field((), description="epochs at which multistep multiplies by lrate_decay")
    lrate_decay: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="factor of multistep")
    min_lr: Rate = Field(0.0, description="floor of cosine")
    sam: Sam | None = Field(
        None,
        description="sharpness-aware minimisation: two passes a step, the second at weights that a step of length rho "
        "uphill has reached; damping T shortens steps along the ascent (SAM+), 0 does not (SAM)",
    )

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:1")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on CUDA, fp32 on CPU")
    compile: bool = Field(False, description="torch.compile the network in training")
    num_workers: Whole | None = Field(None, description="loader processes; default: chosen from machine and data")
    eval_every: Whole = Field(0, description="evaluate every so many epochs inside a task; 0: after each task only")
    probe: Literal["linear", "linear_raw", "knn"] | None = Field(
        None,
        description="after each task, also score the frozen features of all classes seen: by a linear layer on "
        "standardised features, by one on features as they are (SGD at 30), or by nearest neighbours",
    )
    probe_lrate: Rate | None = Field(None, description="of the linear probes; default: linear 0.1, linear_raw 30")
    checkpoint_minutes: Annotated[float, Field(gt=0)] = Field(
        10.0, description="minutes between checkpoints inside a task; one is always written after a task"
    )
    keep_checkpoints: Literal["last", "tasks"] = Field(
        "last", description='"tasks": also the one after each task, which --landscape draws the path between tasks from'
    )
    upstream: bool = Field(False, description="reproduce the quirks of the reference implementation")
    about: dict[str, Any] = Field(
        default_factory=dict, description="note: paper, table row, backbone file, reported value"
    )

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values that some of the user's raw values bring along; a key that the user names wins."""
        return {}

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(key, sentence) for keys that contradict one another; given: the user's raw values, unchecked."""
        sizes = {"init_cls", "increment"} & set(given)
        if given.get("task_sizes") is not None and any(given[key] is not None for key in sizes):
            yield "task_sizes", f"contradicts {_quoted(sizes)}: give either the list or the two numbers"
        if given.get("init_cls") is not None and given.get("increment") is None and not given.get("task_sizes"):
            yield "init_cls", 'needs "increment", the classes of every later task'
        scheduler = given.get("scheduler", cls.model_fields["scheduler"].default)
        milestones = given.get("milestones", cls.model_fields["milestones"].default)
        if scheduler == "multistep" and not milestones:
            yield "milestones", 'missing although "scheduler" is "multistep"'
        if scheduler != "multistep" and given.get("milestones"):
            yield (
                "milestones",
                f'has no effect with "scheduler": "{scheduler}": use "multistep" or drop the key',
            )
        if given.get("probe_lrate") is not None and given.get("probe") not in ("linear", "linear_raw"):
            yield "probe_lrate", 'needs "probe": "linear" or "linear_raw"'
        if given.get("evaluate_on") == "val" and not given.get("validation", cls.model_fields["validation"].default):
            yield "evaluate_on", 'needs "validation", the share of the training images to evaluate on'
        if given.get("cache_size") is not None and given.get("cache", "none") == "none":
            yield "cache_size", 'has no effect with "cache": "none": choose "ram" or "disk", or drop the key'
        if given.get("shuffle") is False and given.get("class_order_seed") is not None:
            yield "class_order_seed", 'has no effect with "shuffle": false: drop one of the two'

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.seed if isinstance(self.seed, tuple) else (self.seed,)

    def with_seed(self, seed: int) -> "RunConfig":
        return self.model_copy(update={"seed": seed})

    @property
    def order_seed(self) -> int:
        """Seed of the class order of a single-seed config."""
        return self.seeds[0] if self.class_order_seed is None else self.class_order_seed

    def epochs_of(self, task: int) -> int:
        return self.init_epoch if task == 0 and self.init_epoch is not None else self.epochs

    def lrate_of(self, task: int) -> float:
        return self.init_lr if task == 0 and self.init_lr is not None else self.lrate

    def weight_decay_of(self, task: int) -> float:
        return self.init_weight_decay if task == 0 and self.init_weight_decay is not None else self.weight_decay

    def same_run(self, other: Mapping[str, Any]) -> list[str]:
        """Keys, machine keys apart, in which this config differs from a saved one (as `config.json` holds it)."""
        mine = self.model_dump(mode="json")
        keys = sorted((set(mine) | set(other)) - MACHINE_KEYS)
        return [key for key in keys if mine.get(key) != other.get(key)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises ConfigError when the file is missing, is not JSON (with line and column), holds a key twice, a NaN,
    or anything but an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.json"))) if path.parent.is_dir() else ""
        raise ConfigError(str(path), [f"no such file{near}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(str(path), [f"not valid JSON at {where}: {error.msg}"]) from None
    except ValueError as error:
        raise ConfigError(str(path), [str(error)]) from None
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"holds a {type(values).__name__}; a config is one object {{...}}"])
    values.pop("$schema", None)  # for editors only
    return values


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """["epochs=5", "backbone=small_vit"] -> values; each is JSON where it parses as JSON, else text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError("--set", [f'"{assignment}" is not key=value, for example --set epochs=5'])
        try:
            values[key.strip()] = json.loads(text, parse_constant=_no_constant)
        except ValueError:
            values[key.strip()] = text
    return values


def build(cls: type[RunConfig], values: Mapping[str, Any], origin: Mapping[str, str], source: str) -> RunConfig:
    """Check `values` against `cls`.

    origin: key -> where it was given, for keys that do not come from `source`.
    Raises ConfigError listing every fault with key, value, what is allowed and the nearest known key.
    """
    faults = [_at(key, sentence, origin) for key, sentence in cls.conflicts(values)]
    try:
        config = cls.model_validate_json(json.dumps(cls.implied(values) | dict(values)))
    except ValidationError as error:
        faults = [*_describe(cls, error, origin), *faults]
    if faults:
        raise ConfigError(source, faults)
    return config


def written_keys(cls: type[RunConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a saved config, which holds every key: those whose value is neither the default nor implied by others."""
    defaults = {
        key: field.get_default(call_default_factory=True)
        for key, field in cls.model_fields.items()
        if not field.is_required()
    }
    defaults = json.loads(json.dumps(defaults | cls.implied(values), default=to_jsonable_python))
    return {key: value for key, value in values.items() if key not in defaults or defaults[key] != value}


def key_table(cls: type[RunConfig]) -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key, the learner's own first."""
    own = [key for key in cls.model_fields if key not in RunConfig.model_fields]
    rows = []
    for key in own + [key for key in cls.model_fields if key in RunConfig.model_fields]:
        field = cls.model_fields[key]
        missing = field.default is PydanticUndefined and field.default_factory is None
        value = None if missing else to_jsonable_python(field.get_default(call_default_factory=True))
        rows.append((key, allowed(cls, key), "required" if missing else json.dumps(value), field.description or ""))
    return rows


def json_schema(cls: type[RunConfig], learner: str) -> dict[str, Any]:
    """JSON schema of a learner's config files, for editors."""
    schema = cls.model_json_schema()
    schema["title"] = f"Palimpsest experiment: {learner}"
    schema["properties"]["$schema"] = {"type": "string"}
    schema["properties"]["model_name"]["const"] = learner
    return schema


def allowed(cls: type[RunConfig], key: str) -> str:
    """What a key accepts, in words: "whole number >= 1 or null"."""
    schema = cls.model_json_schema()
    return _allowed_by(schema["properties"][key], schema.get("$defs", {}))


def _allowed_by(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
        inside = [f'"{key}": {_allowed_by(value, definitions)}' for key, value in schema["properties"].items()]
        return f"object {{{', '.join(inside)}}}"
    if "anyOf" in schema:
        return " or ".join(_allowed_by(option, definitions) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_allowed_by(schema.get('items', {}), definitions)}"
    names = {"integer": "whole number", "boolean": "true | false", "string": "text", "null": "null"}
    text = names.get(schema.get("type", "any"), schema.get("type", "any"))
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    for name, sign in bounds.items():
        if name in schema:
            text += f" {sign} {schema[name]:g}"
    return text + (f" like {schema['pattern']}" if "pattern" in schema else "")


def _describe(cls: type[RunConfig], error: ValidationError, origin: Mapping[str, str]) -> list[str]:
    """One sentence per faulty key: a union reports one error per member, which is one fault."""
    faults: dict[str, str] = {}
    for item in error.errors(include_url=False):
        key = str(item["loc"][0])
        if key in faults:
            continue
        if item["type"] == "missing":
            faults[key] = f'missing key "{key}": {cls.model_fields[key].description}'
        elif item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            faults[key] = f'unknown key "{key}"{_known_as(cls, key)}'
        else:
            value = _value(error, item)
            faults[key] = f'"{key}" must be {allowed(cls, key)}, got {value}'
    return [_at(key, sentence, origin, named=True) for key, sentence in faults.items()]


def _known_as(cls: type[RunConfig], key: str) -> str:
    if key in UNREAD:
        return ": its reference implementation never reads it; drop the key"
    if key in RENAMED and RENAMED[key] in cls.model_fields:
        return f': it is called "{RENAMED[key]}" here'
    return did_you_mean(key, cls.model_fields) or ": --keys LEARNER prints the known ones"


def _value(error: ValidationError, item: Mapping[str, Any]) -> str:
    """The offending value as JSON, with its place when it stands inside a list."""
    place = [str(part) for part in item["loc"][1:] if isinstance(part, int)]
    inside = f" at position {place[0]}" if place else ""
    if item["type"] == "extra_forbidden":
        return f'the unknown "{item["loc"][-1]}"'
    return json.dumps(item["input"], default=str) + inside


def _at(key: str, sentence: str, origin: Mapping[str, str], named: bool = False) -> str:
    text = sentence if named else f'"{key}" {sentence}'
    return f"{text} ({origin[key]})" if key in origin else text


def _quoted(keys: set[str]) -> str:
    return " and ".join(f'"{key}"' for key in sorted(keys))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f'key "{key}" stands twice: keep one of the two')
        values[key] = value
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a config may hold")
