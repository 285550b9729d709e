"""The first session: its dropout, and that nothing moves afterwards."""

import pytest

from tests.conftest import build_tiny
from tests.models.properties import check_dropout, check_standing_still

LEARNERS = ["aper", "ranpac", "fecam"]


@pytest.mark.parametrize("name", LEARNERS)
def test_adapters_alone_have_a_dropout(name, tmp_path):
    check_dropout(tmp_path, name)


@pytest.mark.parametrize("name", LEARNERS)
def test_what_was_tuned_stands_still(name, tmp_path):
    check_standing_still(tmp_path, name)


@pytest.mark.parametrize("name", LEARNERS)
def test_there_is_one_stage_in_the_first_task_and_none_later(name, tmp_path):
    manager, learner = build_tiny(tmp_path, name)
    assert [len(learner.stages(task)) for task in manager] == [1, 0, 0]
