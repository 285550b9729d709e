"""Every experiment file is checked and built, and its schema accepts it."""

import functools
import json
from pathlib import Path

import jsonschema
import pytest
import timm
import torch

import main
from convs.backbones import NAMED, input_size, make_backbone
from data import sources
from data.stream import DataManager, TaskInfo
from models.base import LEARNERS
from models.factory import build_learner, load_config
from tests.conftest import TINY_VIT, write_stream
from tools.index import experiment_tables, experiments
from utils.errors import WeightsError
from utils.keys import json_schema
from utils.runtime import Runtime

ROOT = Path(__file__).resolve().parent.parent


FILES = experiments(ROOT / "exps")


BUNDLED = ("digits", "glyphs", "glyphs_domains")


# As wide and deep as the largest rank or pool and the highest block that an experiment asks for.
FIRST = TaskInfo(0, 2, 20, (10, 10), 0, 10, range(10))
TINY = {"name": "vit", "img_size": 32, "patch_size": 16, "embed_dim": 128, "depth": 5, "num_heads": 2}


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(ROOT / "exps")))
def path(request):
    return request.param


def test_config_is_valid_and_says_what_it_is(path):
    config = load_config(str(path))
    assert config.about, "an experiment says what it reproduces or shows"
    input_size(config.backbone)  # a known backbone


@pytest.mark.slow
def test_learner_is_built(path):
    """With random weights and a small network where the real one needs a download."""
    config = load_config(str(path))
    if not (isinstance(config.backbone, str) and config.backbone in NAMED):
        config = load_config(str(path), ["weights=random"], {"backbone": TINY, "image_size": 32})
    learner = build_learner(config.with_seed(config.seeds[0]), Runtime("cpu", "fp32"), FIRST)
    assert learner.network.feature_dim > 0


@pytest.fixture(scope="module")
def loaded_once():
    """The bundled sets are rendered; once is enough for all files."""
    found: dict[tuple, object] = {}

    def load(*arguments):
        if arguments not in found:
            found[arguments] = read(*arguments)
        return found[arguments]

    read = sources.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "load", load)
        yield


@pytest.mark.usefixtures("loaded_once")
def test_tasks_are_made_where_the_data_are_bundled(path):
    config = load_config(str(path))
    if config.dataset in BUNDLED:
        tasks = DataManager(config.with_seed(config.seeds[0]), image_size=32)
        assert sum(len(task.train) + len(task.val or ()) for task in tasks) == len(tasks.data.train)


@functools.cache
def validator(learner: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json_schema(LEARNERS[learner].Config, learner))


def test_schema_accepts_the_file(path):
    values = json.loads(path.read_text())
    learner = values["model_name"]
    validator(learner).validate(values)
    assert (path.parent / values["$schema"]).resolve() == ROOT / "exps" / "schema" / f"{learner}.json"


@pytest.mark.parametrize("learner", list(LEARNERS))
def test_written_schemas_are_up_to_date(learner):
    written = json.loads((ROOT / "exps" / "schema" / f"{learner}.json").read_text())
    assert written == json_schema(LEARNERS[learner].Config, learner), "run `make index`"


def test_the_table_of_experiments_is_up_to_date():
    assert (ROOT / "exps" / "README.md").read_text() == experiment_tables(ROOT / "exps"), "run `make index`"


EXPS = Path(__file__).resolve().parent.parent / "exps"


FILES_SLCA = sorted(
    path
    for family in ("slca", "slcapp")
    for path in [*(EXPS / family).glob("*.json"), EXPS / "reference" / f"{family}.json"]
)


CLASSES = {"cifar224": 100, "imagenetr": 200, "cub_official": 200, "cars": 196, "domainnet_dil": 345}


# The 16 files of the reference repository.
SHIPPED = {
    f"{family}/{data}_{init}"
    for family in ("slca", "slcapp")
    for data in ("cifar224", "imagenetr", "cub_official", "cars")
    for init in ("in21k", "mocov3")
}


named = pytest.mark.parametrize("path", FILES_SLCA, ids=[f"{path.parent.name}/{path.stem}" for path in FILES_SLCA])


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A data set with as many classes (and domains) as the real one: two small images a class."""

    def make(name: str) -> str:
        domains = 6 if name == "domainnet_dil" else 0
        path = folder / f"{name.replace(':', '-').replace('/', '-')}.npz"
        if not path.is_file():
            write_stream(path, classes=CLASSES.get(name, 20), train=2, test=1, size=16, domains=domains)
        return f"npz:{path}"

    folder = tmp_path_factory.mktemp("streams")
    return make


@named
def test_loads_checks_and_builds(path, stream, capsys):
    """On a machine without data or weights: a stream of the same class count, and a tiny random ViT."""
    values = json.loads(path.read_text())
    sets = {"dataset": stream(values["dataset"]), "backbone": json.dumps(TINY_VIT), "weights": "random",
            "image_size": 16, "device": "cpu"}  # fmt: skip
    if "glyphs" in values["dataset"] or "digits" in values["dataset"]:
        del sets["dataset"]
    arguments = [argument for key, value in sets.items() for argument in ("--set", f"{key}={value}")]
    assert main.main(["--config", str(path), *arguments, "--check"]) == 0
    assert f"learner      {values['model_name']}" in capsys.readouterr().out


@named
def test_names_the_weights_that_are_missing(path, monkeypatch):
    def no_network(*args, pretrained=False, **keys):
        if pretrained:
            raise OSError("no network")
        return create(*args, **keys)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", no_network)
    values = json.loads(path.read_text())
    if values["backbone"] == "small_vit":
        pytest.skip("its weights are bundled")
    with torch.device("meta"), pytest.raises(WeightsError) as caught:
        make_backbone(values["backbone"], values.get("weights"), values.get("image_size"))
    assert (values.get("weights") or values["backbone"]) in str(caught.value)


def test_all_shipped_experiments_are_there():
    assert {f"{path.parent.name}/{path.stem}" for path in FILES_SLCA} >= SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_values_of_the_shipped_experiments(name):
    values = json.loads((EXPS / f"{name}.json").read_text())
    moco, plus, data = name.endswith("mocov3"), name.startswith("slcapp"), values["dataset"]
    assert values["epochs"] == (90 if moco else 20 if data == "cifar224" else 50)
    assert values["increment"] == (10 if data == "cifar224" else 20)
    assert values["ca_with_logit_norm"] == (0.05 if data == "cars" else 0.1)
    assert values["weight_decay"] == (0.0 if plus and data in ("imagenetr", "cars") else 5e-4)
    assert (values["lrate"], values["bcb_lrscale"], values["batch_size"]) == (0.01, 0.1 if plus else 0.01, 128)
    if plus:
        assert values["min_lr"] == pytest.approx(0.01 * 0.1 * 0.1 ** (2 if moco else 1))
        sce = (values["sce_a"], values["sce_b"])
        assert sce == ((0.5, 0.5) if data in ("imagenetr", "cars") else (1.0, 0.1))
        assert (values["lora_rank"], values["fc_scale_mu"]) == (4, 0.02)
    else:
        assert values["milestones"] == ([80] if moco else [18] if data == "cifar224" else [40])


def test_reference_runs_take_their_data_and_weights_from_the_command_line(tmp_path):
    path = write_stream(tmp_path / "other.npz", classes=8)
    config = load_config(str(EXPS / "reference" / "slca.json"), [f"dataset={path}", "weights=random"])
    assert config.upstream and config.dataset == path and config.weights == "random"
