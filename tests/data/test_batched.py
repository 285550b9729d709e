"""A batch cropped on the device: each image as the host's recipe makes it, boxes distributed as torchvision's."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2, ks_2samp
from torchvision.transforms import v2

import main
import trainer
from data.batched import BATCHED, DRAWS, Batched, Resident, apply, random_boxes, resize_and_crop, uniforms
from data.loading import EpochLoader, for_each_batch
from data.stream import DataManager
from data.transforms import RECIPES, Transform
from models.factory import config_from
from tests.conftest import tiny_values
from utils.errors import ConfigError, Interrupted
from utils.runtime import Runtime
from utils.seed import mix, mix_rows

N = 4000


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    """Noise of a contrast at which no filter's overshoot is cut: cutting depends on which axis comes first."""
    rng = np.random.RandomState(0)
    return torch.from_numpy(rng.randint(64, 192, (count, height, width, 3)).astype(np.uint8))


def assert_equal_up_to_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Two passes, in either order, that each round to whole numbers: by 2 at most, and by nothing in the mean."""
    difference = (ours.int() - theirs.int()).float()
    assert difference.abs().max() <= 2 and difference.abs().mean() < 0.4 and difference.mean().abs() < 0.08


@pytest.mark.parametrize("name", [name for name in RECIPES if not RECIPES[name].random])
@pytest.mark.parametrize("shape", [(32, 32), (17, 17), (70, 70), (40, 60)])
def test_recipes_without_chance_agree_with_the_host(name, shape):
    images = pictures(3, *shape)
    batch = apply(images, BATCHED[name], 32, np.zeros(3, dtype=np.uint64))
    host = torch.stack([Transform(name, 32)(image.numpy()) for image in images])
    assert_equal_up_to_rounding(batch, host)


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("size", [24, 64])
def test_a_random_box_is_resized_as_pillow_does(bicubic, size):
    images, seeds = pictures(40, 40, 48), np.arange(40, dtype=np.uint64) * np.uint64(977)
    recipe = Batched(BATCHED["crop_flip"].geometry, bicubic=bicubic, flip=True)
    batch = apply(images, recipe, size, seeds)
    draws = uniforms(seeds, DRAWS)
    how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    for n, (top, left, h, w) in enumerate(zip(*random_boxes(40, 48, 0.08, draws[:, :40]), strict=True)):
        picture = Image.fromarray(images[n].numpy()).crop((int(left), int(top), int(left + w), int(top + h)))
        picture = picture.resize((size, size), how)
        if draws[n, -2] < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert_equal_up_to_rounding(batch[n], torch.from_numpy(np.array(picture)).permute(2, 0, 1))


@pytest.mark.parametrize(("height", "width", "smallest"), [(32, 32, 0.08), (64, 48, 0.05), (20, 90, 0.5)])
def test_boxes_are_distributed_as_torchvisions(height, width, smallest):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    crop = v2.RandomResizedCrop(32, (smallest, 1.0), (3 / 4, 4 / 3))
    theirs = [crop.make_params([image]) for _ in range(N)]
    ours = random_boxes(height, width, smallest, uniforms(np.arange(N, dtype=np.uint64), DRAWS)[:, :40])
    for name, mine in zip(("top", "left", "height", "width"), ours, strict=True):
        other = np.array([params[name] for params in theirs])
        assert ks_2samp(mine, other).pvalue > 1e-4, name
        assert (mine >= 0).all()
    assert (ours[0] + ours[2] <= height).all() and (ours[1] + ours[3] <= width).all()
    area = np.array([params["height"] * params["width"] for params in theirs])
    assert ks_2samp(ours[2] * ours[3], area).pvalue > 1e-4


def test_a_box_that_never_fits_becomes_the_largest_in_the_middle():
    draws = np.zeros((2, 40))  # area 0.9 of a very wide image, ratio 3/4: taller than the image
    top, left, h, w = random_boxes(10, 100, 0.9, draws)
    assert (top.tolist(), left.tolist(), h.tolist(), w.tolist()) == ([0, 0], [43, 43], [10, 10], [13, 13])
    crop = v2.RandomResizedCrop(10, (0.9, 1.0), (3 / 4, 3 / 4 + 1e-9))
    assert crop.make_params([torch.empty(3, 10, 100)])["height"] == 10


def test_flips_jitter_and_shifts_are_distributed_as_torchvisions():
    ramp = torch.arange(16, dtype=torch.uint8).mul(10).expand(16, 16)[..., None].expand(16, 16, 3)
    images, seeds = ramp[None].expand(N, 16, 16, 3), np.arange(N, dtype=np.uint64) * np.uint64(31)
    flipped = apply(images, BATCHED["crop_flip"], 16, seeds)[:, 0, 8, :]
    share = (flipped[:, 0] > flipped[:, -1]).float().mean()
    assert abs(float(share) - 0.5) < 4 * math.sqrt(0.25 / N)
    shifted = apply(images, BATCHED["pad_crop"], 16, seeds)  # padding 2: shifts -2 .. 2 on both axes, black outside
    found = torch.stack([shifted[:, 0, 8, 8].int() // 10 - 8, (shifted[:, 0, :, 8] == 0).int().argmax(dim=1)], dim=1)
    counts = np.bincount(found[:, 0].numpy() + 2, minlength=5)
    assert counts.sum() == N and ((counts - N / 5) ** 2 / (N / 5)).sum() < chi2.ppf(1 - 1e-4, 4)
    white = torch.full((N, 8, 8, 3), 100, dtype=torch.uint8)
    bright = apply(white, BATCHED["crop_flip_bicubic_jitter"], 8, seeds)[:, 0, 0, 0].numpy()
    torch.manual_seed(0)
    jitter = v2.ColorJitter(brightness=63 / 255)
    theirs = [np.asarray(jitter(Image.new("L", (1, 1), 100)))[0, 0] for _ in range(N)]
    assert ks_2samp(bright, theirs).pvalue > 1e-4


def test_every_recipe_has_a_form_on_the_device():
    assert set(BATCHED) == set(RECIPES)


def test_draws_are_uniform_and_a_function_of_the_seed():
    draws = uniforms(np.arange(1000, dtype=np.uint64), DRAWS)
    assert ks_2samp(draws.reshape(-1), (np.arange(42_000) + 0.5) / 42_000).pvalue > 1e-4
    assert np.abs(np.corrcoef(draws[:, :8].T) - np.eye(8)).max() < 0.15
    assert np.array_equal(uniforms(np.array([7], dtype=np.uint64), DRAWS)[0], draws[7])


def test_mix_rows_is_mix():
    rows = np.array([0, 1, 17, 1_281_166])
    assert mix_rows(1993, rows).tolist() == [mix(1993, int(row)) for row in rows]
    assert mix_rows(mix(3, 4), rows).tolist() == [mix(mix(3, 4), int(row)) for row in rows]


def manager(tmp_path, **keys) -> DataManager:
    values = tiny_values(tmp_path, train_transform="crop_flip", augment_on="device", **keys)
    return DataManager(config_from(values, source="test"), image_size=24)


def test_batches_do_not_depend_on_how_they_are_cut_nor_on_where_a_run_resumes(tmp_path):
    view = manager(tmp_path)[0].train.view("train")
    runtime = Runtime("cpu", "fp32")
    whole = list(EpochLoader(view, 4, runtime, seed=5).epoch(2, 0))
    late = list(EpochLoader(view, 4, runtime, seed=5).epoch(2, 2))
    assert len(whole) == 4 and len(late) == 2
    for (a, x, *_), (b, y, *_) in zip(whole[2:], late, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)
    again = list(EpochLoader(view, 4, runtime, seed=5).epoch(3, 0))
    assert not torch.equal(again[0][0], whole[0][0])


def test_test_images_are_those_of_the_host(tmp_path):
    seen: dict[str, list[torch.Tensor]] = {"device": [], "host": []}
    for where, images in seen.items():
        values = tiny_values(tmp_path, test_transform="resize_crop_bicubic", augment_on=where)
        view = DataManager(config_from(values, source="test"), image_size=24)[0].test.view("test")
        for_each_batch(view, lambda x, y, images=images: images.append(x), Runtime("cpu", "fp32", 0), 4)
    assert torch.allclose(torch.cat(seen["device"]), torch.cat(seen["host"]), atol=2.01 / 255)


def test_images_in_files_are_refused(tmp_path):
    from tests.data import trees

    trees.split_folders(tmp_path / "mine", ["a", "b"])
    with pytest.raises(ConfigError, match='"augment_on" must be "host" for folder:.*: its images are files'):
        manager(tmp_path, dataset=f"folder:{tmp_path / 'mine'}")


def test_the_array_is_placed_once():
    images = pictures(5, 8, 8).numpy()
    resident = Resident(images)
    assert resident.on(torch.device("cpu")) is resident.on(torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "memory", "keys", "where"),
    [
        ("cuda", 2**30, {}, "device"),
        ("cuda", 2**30, {"augment_on": "host"}, "host"),
        ("cuda", 1000, {}, "host"),  # no room
        ("cpu", 2**30, {}, "host"),
        ("cuda", 2**30, {"files": True}, "host"),
    ],
)
def test_auto_is_the_device_where_it_has_room(device, memory, keys, where, tmp_path, monkeypatch):
    from tests.data import trees

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    values = tiny_values(tmp_path, train_transform="crop_flip", **{k: v for k, v in keys.items() if k != "files"})
    if "files" in keys:
        trees.split_folders(tmp_path / "mine", ["a", "b"])
        values["dataset"] = f"folder:{tmp_path / 'mine'}"
    found = DataManager(config_from(values, source="test"), 24, torch.device(device))
    assert found.augment_on == where and found[0].train.view("train").on_device == (where == "device")


def test_a_run_goes_on_where_its_images_were_made(tmp_path, monkeypatch):
    """Begun on a machine where "auto" is the device, stopped, resumed where it would be the host."""
    values = tiny_values(tmp_path, train_transform="crop_flip", epochs=2)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))

    def run(name, *arguments, place):
        with monkeypatch.context() as patch:
            patch.setattr(DataManager, "_place", lambda self, device: place)
            status = main.main(["--config", str(path), "--output", str(tmp_path / name), *arguments])
        return status, tmp_path / name / "seed1993"

    status, whole = run("whole", place="device")
    assert status == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer.SeedRun, "_evaluate", stop_in_second_task(trainer.SeedRun._evaluate))
        assert run("cut", place="device")[0] == 3
    status, cut = run("cut", "--resume", place="host")
    assert status == 0
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, cut)]
    assert [result["config"]["augment_on"] for result in results] == ["device", "device"]
    losses = [[json.loads(line)["loss"] for line in (folder / "epochs.jsonl").read_text().splitlines()]
              for folder in (whole, cut)]  # fmt: skip
    assert losses[0] == losses[1] and results[0]["acc"] == results[1]["acc"]


NAMED = [None, "auto", "device", "host"]


@pytest.mark.parametrize("begun", NAMED)
@pytest.mark.parametrize("now", NAMED)
def test_a_run_is_the_same_whoever_names_the_place_where_its_images_are_made(begun, now, tmp_path, monkeypatch):
    """ "auto" is the device here when the run begins, and the host where it goes on."""
    path = tmp_path / "run.json"
    places = {None: "device", "auto": "device"}

    def run(named, place, *arguments):
        path.write_text(json.dumps(tiny_values(tmp_path, train_transform="crop_flip", epochs=1, augment_on=named)))
        with monkeypatch.context() as patch:
            patch.setattr(DataManager, "_place", lambda self, device: place)
            return main.main(["--config", str(path), "--output", str(tmp_path / "run"), *arguments])

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SeedRun, "_evaluate", stop_in_second_task(trainer.SeedRun._evaluate))
        assert run(begun, "device") == 3
    before = json.loads((tmp_path / "run" / "seed1993" / "config.json").read_text())
    place = places.get(begun, begun)
    same = now in (None, "auto", place)
    assert run(now, "host", "--resume") == (0 if same else 2)
    after = json.loads((tmp_path / "run" / "seed1993" / "config.json").read_text())
    assert after == before and after["augment_on"] == place


def stop_in_second_task(evaluate):
    def stopping(self, task):
        if task.index == 1:
            raise Interrupted("SIGTERM")
        evaluate(self, task)

    return stopping


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_makes_the_same_images():
    images, seeds = pictures(64, 32, 32), np.arange(64, dtype=np.uint64)
    for name, recipe in BATCHED.items():
        there = (
            apply(images.cuda(), recipe, 48, seeds) if "pad" not in name else apply(images.cuda(), recipe, 32, seeds)
        )
        here = apply(images, recipe, there.shape[-1], seeds)
        assert (there.cpu().int() - here.int()).abs().max() <= 1, name


def test_a_geometry_keeps_the_aspect_ratio():
    vertical, horizontal = resize_and_crop(lambda s: s)(10, 20, 40, np.zeros((1, DRAWS)))
    assert (vertical.grid.item(), horizontal.grid.item(), horizontal.offset.item()) == (10, 20, 5)
