"""HCL's keys: what they need, and the words of other versions."""

import pytest

from models.factory import config_from
from models.hcl.learner import HCL
from tests.conftest import tiny_values
from utils.config import TrainConfig
from utils.errors import ConfigError
from utils.keys import key_table


def test_the_table_names_what_a_key_needs():
    rows = {name: meaning for name, _, _, meaning in key_table(HCL.Config, TrainConfig)}
    assert rows["memory_size"].endswith('(only where "variant" is "distilbuf")')
    assert next(iter(rows)) == "variant"


def test_the_list_of_networks_has_a_name_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match='it is called "networks" here'):
        config_from(tiny_values(tmp_path, "hcl") | {"stream": 3}, "test")
