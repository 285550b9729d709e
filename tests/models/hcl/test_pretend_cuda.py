"""An inversion that is resumed on a pretended CUDA device."""

import io

import pytest
import torch

from data.stream import DataManager
from models.factory import build_learner
from models.parts.loop import begin, learn
from models.parts.state import learner_state, restore
from tests.pretend_cuda import pretended
from tests.test_pretend_cuda import QDI, Stop, build, on_host

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*pin_memory.*")]


def test_an_inversion_goes_on_from_the_host(tmp_path):
    config, runtime = build(tmp_path, "hcl", QDI | {"inversion_steps": 4, "inversion_warmup": 2})
    with pretended():
        manager = DataManager(config, image_size=16)
        learner = build_learner(config, runtime, manager[0].info)
        learn(learner, manager[0])
        points, saved = iter(range(100)), {}

        def safe_point():
            if next(points) == 1:
                file = io.BytesIO()
                torch.save(learner_state(learner), file)
                file.seek(0)
                saved.update(torch.load(file, map_location="cpu", weights_only=True))
                raise Stop

        runtime.on_safe_point = safe_point
        with pytest.raises(Stop):
            begin(learner, manager[1])
        runtime.on_safe_point = None
        other = build_learner(config, runtime, manager[0].info)
        restore(other, saved)
        learn(other, manager[1])
        assert not on_host(other)
