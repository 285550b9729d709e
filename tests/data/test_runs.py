"""Whole runs on data sets of the table: nothing beside the results is written, and the result says what was read."""

import json
from pathlib import Path

import pytest

import main
from data.rows import ROWS
from tests.conftest import tiny_values
from tests.data import trees

DOCS = Path(__file__).resolve().parents[2] / "docs" / "datasets.md"


def run(tmp_path, capsys, **keys) -> dict:
    config = tmp_path / "run.json"
    config.write_text(json.dumps(tiny_values(tmp_path, epochs=1, batch_size=64, seed=1, **keys)))
    output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    status = main.main(["--config", str(config), "--output", str(output)])
    assert status == 0, capsys.readouterr().err
    return json.loads((output / "seed1" / "result.json").read_text())


def snapshot(root: Path) -> list[tuple]:
    return [(p, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in sorted(root.rglob("*"))]


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_a_run_leaves_the_data_as_they_are_and_names_the_split(tmp_path, capsys, cache):
    root = tmp_path / "data"
    trees.unsplit(root / "mine", ["b 1", "a", "大", "d"], count=10)
    before = snapshot(root)
    keys = {"dataset": f"folder:{root / 'mine'}", "split": "seeded:3", "cache": cache}
    result = run(tmp_path, capsys, cache_root=str(tmp_path / "cache"), train_transform="crop_flip", **keys)
    assert snapshot(root) == before
    stored = json.loads(next((tmp_path / "cache" / "splits").iterdir()).read_text())
    assert result["data"]["split"] == f"own, seeded:3, split {stored['hash'][:12]}"
    assert (result["data"]["train"], result["data"]["test"]) == (32, 8)


def test_caching_changes_no_number(tmp_path, capsys):
    trees.split_folders(tmp_path / "mine", ["a", "b", "c"])
    found = []
    for cache in ("none", "ram", "disk"):
        keys = {"dataset": f"folder:{tmp_path / 'mine'}", "increment": 3, "cache": cache}
        keys |= {"cache_root": str(tmp_path / "cache"), "train_transform": "crop_flip_bicubic_jitter"}
        found.append(run(tmp_path, capsys, **keys))
    losses = [(tmp_path / f"out{n}" / "seed1" / "epochs.jsonl").read_text() for n in range(3)]
    assert len({json.loads(text)["loss"] for text in losses}) == 1
    assert len({json.dumps(result["acc"]) for result in found}) == 1


def test_a_run_on_the_device_pipeline(tmp_path, capsys):
    keys = {"train_transform": "crop_flip", "test_transform": "resize", "augment_on": "device", "num_workers": None}
    first = run(tmp_path, capsys, **keys)
    again = run(tmp_path, capsys, **keys)
    assert first["acc"] == again["acc"] and first["finished"]


def test_vtab_in_its_natural_order(tmp_path, capsys):
    trees.split_folders(tmp_path / "vtab", trees.class_names("vtab"))
    result = run(tmp_path, capsys, dataset="vtab", data_root=str(tmp_path), increment=10, shuffle=False)
    assert result["task_sizes"] == [10] * 5 and result["class_order"] == list(range(50))
    assert result["data"]["split"].startswith("unknown counts, folder, split ")


@pytest.mark.parametrize("key", ROWS)
def test_the_manual_has_a_section_and_the_counts_of_each_row(key):
    text = DOCS.read_text(encoding="utf-8")
    assert f"\n### {key}\n" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| [") and f"(#{key})" in line]
    variant, row = ROWS[key].variants[0], ROWS[key]
    if key != "domainnet_dil":  # "the same"
        for count, sure in zip((variant.train, variant.test), variant.sure, strict=True):
            if count is not None:
                assert f"{count:,} {sure}" in line or key == "imagenet100" and f"{count:,}" in line
        assert f"| {row.classes}" in line
    assert f"`{row.folders[0]}`" in line or key == "domainnet_dil"


def test_every_code_is_in_the_manual():
    text = DOCS.read_text(encoding="utf-8")
    assert all(f"| D{number:02d} |" in text for number in range(1, 21))
