"""Keys say what they need to have an effect, and a key without effect is refused, whatever the learner."""

import functools

import pytest
from pydantic import BaseModel

from models.base import LEARNERS
from models.factory import config_from
from tests.conftest import tiny_values
from utils.config import MACHINE_KEYS, RunConfig, TrainConfig
from utils.errors import ConfigError
from utils.keys import GIVEN, condition_text, conditions, holds, key, key_table


@functools.cache
def schema_of(cls: type[RunConfig]) -> dict:
    return cls.model_json_schema()


def other_value(cls: type[RunConfig], name: str):
    """A valid value of a key that is not its default."""
    default = cls.model_fields[name].get_default(call_default_factory=True)
    schema = schema_of(cls)
    entry = schema["properties"][name]
    for option in entry.get("anyOf", [entry]):
        if "$ref" in option:
            return {"rho": 0.07}
        if "enum" in option:
            return next(value for value in option["enum"] if value != default)
        kind = option.get("type")
        if kind == "boolean":
            return not default
        if kind in ("integer", "number"):
            step = 1 if kind == "integer" else 0.01
            low = option.get("minimum", option.get("exclusiveMinimum", 0)) + step
            return low if low != default else low + step
        if kind == "array":
            return [1] * option.get("minItems", 1)
        if kind == "string":
            return "pad_crop_flip"
    raise AssertionError(f"no value for {name}: {entry}")


def unmet(cls: type[RunConfig], name: str) -> dict:
    """Values under which a conditional key has no effect."""
    for other, wanted in conditions(cls, name).items():
        if wanted is GIVEN or wanted == GIVEN:
            default = cls.model_fields[other].get_default(call_default_factory=True)
            return {other: 0 if not isinstance(default, bool) else False}
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        if isinstance(values[0], bool):
            return {other: not values[0]}
        options = schema_of(cls)["properties"][other]
        found = [v for option in options.get("anyOf", [options]) for v in option.get("enum", [None])]
        return {other: next(value for value in found if value not in values)}
    raise AssertionError


@pytest.mark.parametrize("learner", list(LEARNERS))
def test_a_key_without_effect_is_refused(learner, tmp_path):
    cls = LEARNERS[learner].Config
    values = tiny_values(tmp_path, learner, dataset="digits")
    for name in filter(functools.partial(conditions, cls), cls.model_fields):
        with pytest.raises(ConfigError, match=f'"{name}" has no effect unless'):
            config_from(values | unmet(cls, name) | {name: other_value(cls, name)}, "test")


@pytest.mark.parametrize("learner", list(LEARNERS))
def test_every_key_changes_the_resolved_run_or_is_refused(learner, tmp_path):
    cls = LEARNERS[learner].Config
    values = tiny_values(tmp_path, learner, dataset="digits")
    before = config_from(values, "test")
    for name in set(cls.model_fields) - MACHINE_KEYS - {"model_name", "dataset", "backbone", "split"}:
        value, usual = other_value(cls, name), getattr(before, name)
        if value == (list(usual) if isinstance(usual, tuple) else usual):
            continue
        try:
            after = config_from(values | {name: value}, "test")
        except ConfigError as error:
            assert f'"{name}"' in str(error), name
        else:
            assert name in before.same_run(after.saved()) and before.fingerprint() != after.fingerprint(), name


def test_the_harness_s_training_keys_are_refused_by_a_learner_that_trains_nothing(tmp_path):
    for name in sorted(set(TrainConfig.model_fields) - set(RunConfig.model_fields)):
        values = tiny_values(tmp_path, "simplecil", dataset="digits") | {name: other_value(TrainConfig, name)}
        with pytest.raises(ConfigError, match=f'unknown key "{name}": simplecil trains nothing; drop the key'):
            config_from(values, "test")


def test_conditions_by_hand():
    class Toy(BaseModel):
        kind: str = key("a", "which")
        size: int = key(3, "of b and c", only={"kind": ("b", "c")})

    assert conditions(Toy, "kind") == {} and conditions(Toy, "size") == {"kind": ("b", "c")}
    assert holds("b", ("b", "c")) and not holds("a", ("b", "c")) and holds(True, True)
    assert holds(0.1, GIVEN) and not any(holds(value, GIVEN) for value in (None, 0, 0.0, False))
    assert condition_text("kind", ("b", "c")) == '"kind" is "b" or "c"'
    assert condition_text("size", GIVEN) == '"size" is given and not 0'


def test_the_table_of_keys_names_the_conditions():
    rows = {name: meaning for name, _, _, meaning in key_table(LEARNERS["slca"].Config, TrainConfig)}
    assert rows["milestones"].endswith('(only where "scheduler" is "multistep")')
    assert next(iter(rows)) not in TrainConfig.model_fields, "the learner's own come first"


WORDS = [
    ("inflora", "memory", 'it is called "subspace" here'),
    ("inflora", "memory_size", "inflora keeps no images of old classes; drop the key"),
    ("slca", "fixed_memory", "slca keeps no images of old classes; drop the key"),
    ("raa", "memory_per_class", "raa keeps no images of old classes; drop the key"),
    ("inflora", "num_heads", 'a timm tag fixes it; "backbone": {"name": "vit", ...} takes num_heads'),
    ("inflora", "embd_dim", "takes embed_dim"),
    ("inflora", "total_sessions", "the number of tasks follows from init_cls, increment and the data"),
    ("inflora", "EPSILON", "its reference implementation never reads it"),
    ("slca", "prefix", "its reference implementation never reads it"),
    ("slca", "model_postfix", "its reference implementation never reads it"),
    ("finetune", "lr", 'it is called "lrate" here'),
]


@pytest.mark.parametrize(("learner", "name", "sentence"), WORDS)
def test_words_of_elsewhere_get_an_answer_that_is_true_for_the_learner(learner, name, sentence, tmp_path):
    with pytest.raises(ConfigError) as caught:
        config_from(tiny_values(tmp_path, learner) | {name: 3}, "test")
    assert sentence in str(caught.value)


def test_values_are_looked_at_first_and_all_faults_come_at_once(tmp_path):
    values = tiny_values(tmp_path, "inflora", lamb=0.9, lame=0.8, epochs=-1, milestones=[3], lrte=1)
    with pytest.raises(ConfigError) as caught:
        config_from(values, "test")
    assert len(caught.value.faults) == 4 and '"epochs" must be' in str(caught.value)
    assert '"milestones" has no effect' in str(caught.value) and "must not fall" in str(caught.value)
