import pytest
import timm
from safetensors.torch import save_file

from convs import hub
from convs.backbones import make_backbone

TAG = "test_vit.r160_in1k"


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """The hub's cache as huggingface_hub lays it out, and no network."""
    repository, (name, *_) = hub.hub_files(TAG)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    file = folder / "snapshots" / "abc" / name
    file.parent.mkdir(parents=True)
    model = timm.create_model("test_vit")
    save_file({key: value + 1 for key, value in model.state_dict().items()}, file)

    def refuse(*_, **__):
        raise AssertionError("the network was tried")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)
    return file


@pytest.mark.parametrize("name", ["vit_base_patch16_224.augreg_in21k", "vit_small_patch14_dinov2.lvd142m"])
def test_where_a_tag_lies(name):
    repository, names = hub.hub_files(name)
    assert repository == f"timm/{name}" and names[0].endswith(".safetensors")


def test_what_is_in_the_cache_is_used_without_a_network(filled):
    assert hub.cached(TAG) == filled and hub.fetch(TAG) == filled
    backbone = make_backbone(TAG, None, None)
    assert backbone.model.norm.weight.detach().mean() == pytest.approx(2.0)


def test_what_is_not_there_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub.cached(TAG) is None


def test_a_hub_that_is_not_reached_is_asked_once(tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repository, name):
        asked.append(name)
        raise LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(LocalEntryNotFoundError):
        hub.fetch(TAG)
    assert asked == [hub.SAFE]


def test_older_tags_have_the_pickle_alone(tmp_path, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repository, name):
        asked.append(name)
        if name == hub.SAFE:
            raise EntryNotFoundError("none")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert hub.fetch(TAG).name == hub.PICKLED and asked == [hub.SAFE, hub.PICKLED]
