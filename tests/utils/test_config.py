import json

import jsonschema
import pytest

from models.base import LEARNERS
from models.factory import config_from, load_config
from tests.conftest import tiny_values
from utils.checking import parse_set, read_json
from utils.errors import ConfigError
from utils.keys import json_schema


def test_precedence_is_default_then_file_then_command_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(tiny_values(tmp_path, epochs=7)))
    config = load_config(str(path), ["lrate=0.5", "backbone=small_vit"], {"device": "cpu"})
    assert (config.epochs, config.lrate, config.backbone, config.momentum) == (7, 0.5, "small_vit", 0.9)


def test_set_types_its_values_as_json():
    given = parse_set(["epochs=5", "lrate=1e-3", "shuffle=false", "task_sizes=[3,3]", "dataset=digits", "weights=null"])
    assert given == {
        "epochs": 5, "lrate": 1e-3, "shuffle": False, "task_sizes": [3, 3], "dataset": "digits", "weights": None,
    }  # fmt: skip


def test_first_task_values_default_to_the_later_ones(tmp_path):
    config = config_from(tiny_values(tmp_path, epochs=5, lrate=0.1, init_lr=0.3, weight_decay=0.0), "test")
    assert [config.of_task("epochs", i) for i in (0, 1)] == [5, 5]
    assert [config.of_task("lrate", i) for i in (0, 1)] == [0.3, 0.1]
    zero = config_from(tiny_values(tmp_path, epochs=5, init_epoch=0), "test")
    assert zero.of_task("epochs", 0) == 0, "0 is a value, not an absence"


def test_a_config_is_frozen(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        config_from(tiny_values(tmp_path), "test").epochs = 3


def test_a_whole_number_is_a_rate_but_a_rate_is_no_whole_number(tmp_path):
    assert config_from(tiny_values(tmp_path, lrate=1), "test").lrate == 1.0
    with pytest.raises(ConfigError, match=r'"epochs" must be whole number >= 0, got 2\.5'):
        config_from(tiny_values(tmp_path, epochs=2.5), "test")


def test_the_order_seed_defaults_to_the_seed(tmp_path):
    assert config_from(tiny_values(tmp_path, seed=5), "test").order_seed == 5
    assert config_from(tiny_values(tmp_path, seed=5, class_order_seed=0), "test").order_seed == 0
    many = config_from(tiny_values(tmp_path, seed=[5, 6]), "test")
    assert [many.with_seed(seed).order_seed for seed in many.seeds] == [5, 6]


def test_same_run_ignores_what_only_moves_the_run(tmp_path):
    config = config_from(tiny_values(tmp_path), "test")
    saved = config.model_dump(mode="json")
    assert config.same_run(saved | {"device": "cuda", "num_workers": 3, "seed": 4}) == []
    assert config.same_run(saved | {"epochs": 9, "precision": "bf16"}) == ["epochs", "precision"]


def test_schema_line_for_editors_is_no_key(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"$schema": "y", "epochs": 3}')
    assert read_json(path) == {"epochs": 3}


@pytest.mark.slow
@pytest.mark.parametrize("learner", list(LEARNERS))
def test_the_schema_refuses_what_the_config_refuses(learner, tmp_path):
    schema = json_schema(LEARNERS[learner].Config, learner)
    good = tiny_values(tmp_path, learner)
    jsonschema.validate(good, schema)
    for wrong in ({"lrte": 1}, {"epochs": "3"}, {"momentum": 2}, {"model_name": "other"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(good | wrong, schema)


@pytest.mark.parametrize("name", ["finetune", "hcl", "raa", "l2p", "ranpac", "slca"])
def test_upstream_computes_in_fp32_unless_told_otherwise(tmp_path, name):
    values = tiny_values(tmp_path, name, upstream=True)
    assert config_from(values, source="test").precision == "fp32"
    assert config_from(values | {"precision": "bf16"}, source="test").precision == "bf16"
    assert config_from(values | {"upstream": False}, source="test").precision == "auto"
