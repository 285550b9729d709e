"""Every table of exps/tables: sources for all numbers, and rows that load, check and build."""

from pathlib import Path

import pytest

from convs.backbones import NAMED
from data.stream import TaskInfo
from models.factory import build_learner, load_config
from tools.index import KINDS
from tools.table.spec import read_table
from utils.runtime import Runtime

TABLES = sorted((Path(__file__).resolve().parents[3] / "exps" / "tables").glob("*.json"))
FIRST = TaskInfo(0, 2, 20, (10, 10), 0, 10, range(10))
TINY = {"name": "vit", "img_size": 32, "patch_size": 16, "embed_dim": 128, "depth": 5, "num_heads": 2}
BUILT: set[str] = set()  # configs that rows of several tables share


@pytest.mark.slow
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_row_loads_checks_and_builds(path):
    """With random weights and a small network where the real one needs a download."""
    table = read_table(path, Path("runs"))
    for row in table.rows:
        if row.experiment is None:
            assert row.spec.published, f"{row.name} is neither here nor published"
            continue
        experiment = row.experiment
        if (told := f"{experiment.file} {sorted(experiment.set.items())}") in BUILT:
            continue
        BUILT.add(told)
        config = experiment.config
        if not (isinstance(config.backbone, str) and config.backbone in NAMED):
            small = {**experiment.set, "weights": "random", "backbone": TINY, "image_size": 32}
            config = load_config(str(experiment.file), None, small)
        learner = build_learner(config.with_seed(row.seeds[0]), Runtime("cpu", "fp32"), FIRST)
        assert learner.network.feature_dim > 0


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_number_has_a_source_and_a_kind(path):
    for row in read_table(path, Path("runs")).rows:
        for entry in row.spec.published:
            assert entry.source.strip() and entry.kind in KINDS
            assert any(entry.value(metric) for metric in ("last_acc", "avg_acc", "last_acc_task_mean"))
            if entry.curve is not None and entry.last_acc is not None:
                assert entry.curve[-1] == pytest.approx(entry.last_acc.mean, abs=0.06)


def test_the_tables_of_the_protocols_are_there():
    wanted = {
        "pilot_cifar_inc5", "pilot_cifar_inc10", "pilot_imagenetr_inc20", "pilot_cub_inc10", "pilot_imageneta_inc20",
        "slca_cifar", "slca_imagenetr", "slca_cub", "slca_cars", "raa_cifar", "raa_imagenetr", "raa_cub", "raa_cars",
        "raa_imageneta", "inflora_cifar_t10", "inflora_imagenetr_t10", "inflora_domainnet", "small",
    }  # fmt: skip
    assert wanted <= {path.stem for path in TABLES}


def test_cub_rows_use_the_split_of_their_source():
    """SLCA: the official one; all others: that of the APER archive."""
    for stem, dataset in (("slca_cub", "cub_official"), ("raa_cub", "cub"), ("pilot_cub_inc10", "cub")):
        table = read_table(next(path for path in TABLES if path.stem == stem), Path("runs"))
        assert {row.experiment.config.dataset for row in table.rows if row.experiment} == {dataset}
