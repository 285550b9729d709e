"""Every experiment file is checked and built, and its schema accepts it."""

import json
from pathlib import Path

import jsonschema
import pytest

from convs.backbones import NAMED, input_size
from models.base import LEARNERS
from utils.config import json_schema
from utils.data_manager import DataManager
from utils.factory import build_learner, load_config
from utils.listing import experiment_tables, experiments
from utils.runtime import Runtime

ROOT = Path(__file__).resolve().parent.parent
FILES = experiments(ROOT / "exps")
BUNDLED = ("digits", "glyphs", "glyphs_domains")
# As wide and deep as the largest rank and the highest block that an experiment asks for.
TINY = {"name": "vit", "img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 5, "num_heads": 2}


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(ROOT / "exps")))
def path(request):
    return request.param


def test_config_is_valid_and_says_what_it_is(path):
    config = load_config(str(path))
    assert config.about, "an experiment says what it reproduces or shows"
    input_size(config.backbone)  # a known backbone


def test_learner_is_built(path):
    """With random weights and a small network where the real one needs a download."""
    config = load_config(str(path))
    if not (isinstance(config.backbone, str) and config.backbone in NAMED):
        config = load_config(str(path), ["weights=random"], {"backbone": TINY, "image_size": 32})
    learner = build_learner(config.with_seed(config.seeds[0]), Runtime("cpu", "fp32"))
    assert learner.network.feature_dim > 0


def test_tasks_are_made_where_the_data_are_bundled(path):
    config = load_config(str(path))
    if config.dataset in BUNDLED:
        tasks = DataManager(config.with_seed(config.seeds[0]), image_size=32)
        assert sum(len(task.train) + len(task.val or ()) for task in tasks) == len(tasks.data.train)


def test_schema_accepts_the_file(path):
    values = json.loads(path.read_text())
    learner = values["model_name"]
    jsonschema.validate(values, json_schema(LEARNERS[learner].Config, learner))
    assert (path.parent / values["$schema"]).resolve() == ROOT / "exps" / "schema" / f"{learner}.json"


@pytest.mark.parametrize("learner", list(LEARNERS))
def test_written_schemas_are_up_to_date(learner):
    written = json.loads((ROOT / "exps" / "schema" / f"{learner}.json").read_text())
    assert written == json_schema(LEARNERS[learner].Config, learner), "run `make index`"


def test_the_table_of_experiments_is_up_to_date():
    assert (ROOT / "exps" / "README.md").read_text() == experiment_tables(ROOT / "exps"), "run `make index`"
