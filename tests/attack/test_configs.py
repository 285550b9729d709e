"""Seeded fuzz of configs: every one is accepted and plans, or is answered in one text under 2,000 characters."""

import json
import random

import pytest

import main
from models.base import LEARNERS
from tests.conftest import tiny_values

pytestmark = pytest.mark.long

ODD = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**31, 2**63, 10**30, 0.0, 0.5, 1.0, -0.5, 1e-300, 1e300, "", " ", "x",
    "random", "test", "none", "null", "0", "1e3", "\n", "\u202e", "é" * 300, "../..", "/", "~nobody/x", "a\0b", [], [1],
    [0], [-1], [2, 2, 2], [[1]], ["a"], [None], list(range(500)), {}, {"rho": 0.05}, {"name": "vit"}, {"total": 3},
    {"a": {"b": {"c": []}}},
]  # fmt: skip
CASES = 400


def mutated(rng: random.Random, values: dict, keys: list[str]) -> dict:
    values = dict(values)
    for _ in range(rng.randint(1, 3)):
        kind, name = rng.random(), rng.choice(keys)
        if kind < 0.75:
            values[name] = rng.choice(ODD)
        elif kind < 0.85:
            values.pop(rng.choice(list(values)), None)
        else:
            values[name[: rng.randint(0, len(name))] + rng.choice(["", "s", "_", "é", name])] = rng.choice(ODD)
    return values


@pytest.mark.parametrize("block", range(8))
def test_a_config_is_right_or_answered(block, tmp_path, capsys, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "run.json"
    for case in range(block * CASES // 8, (block + 1) * CASES // 8):
        rng = random.Random(case)
        learner = rng.choice(list(LEARNERS))
        keys = list(LEARNERS[learner].Config.model_fields)
        path.write_text(json.dumps(mutated(rng, tiny_values(tmp_path, learner), keys)))
        capsys.readouterr()
        status = main.main(["--config", str(path), "--check"])
        said = capsys.readouterr()
        shown = f"seed {case}: {path.read_text()[:1000]}"
        assert status in (0, 2), shown
        assert status == 0 or (0 < len(said.err) < 2000 and "Traceback" not in said.err), f"{shown}\n{said.err[:3000]}"
