"""The table of experiments: what is published, of which kind, and ours."""

import json

from tools.index import experiment_tables, published_in_tables


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def entry(kind, last, **keys):
    return {"kind": kind, "source": "x", "last_acc": {"mean": last}, **keys}


def test_the_best_kind_of_number_is_shown_with_its_kind(tmp_path):
    config = {"model_name": "simplecil", "dataset": "digits", "increment": 2, "backbone": "small_vit"}
    about = {"row": "digits", "ours": {"last_acc": 90.5, "avg_acc": 95}}
    write(tmp_path / "a" / "one.json", config | {"about": about})
    write(tmp_path / "a" / "two.json", config | {"about": {"reported": {"last_acc": 80, "source": "a later table"}}})
    write(tmp_path / "a" / "three.json", config | {"about": {"row": "not published"}})
    rows = [
        {"name": "1", "config": "../a/one.json",
         "published": [entry("secondary text", 70), entry("shipped log", 91.25, avg_acc={"mean": 95.5})]},
        {"name": "2", "config": "../a/three.json", "set": {"increment": 5}, "published": [entry("shipped log", 1)]},
        {"name": "3", "published": [entry("paper table", 2)]},
    ]  # fmt: skip
    write(tmp_path / "tables" / "t.json", {"title": "T", "protocol": "P", "rows": rows})
    lines = experiment_tables(tmp_path).splitlines()
    assert "| one.json | digits, 2 a task | small_vit | digits | 91.25 / 95.5 (shipped log) | 90.5 / 95 |" in lines
    assert any(line.startswith("| two.json") and "| 80 (secondary text) |  |" in line for line in lines)
    assert any(line.startswith("| three.json") and line.endswith("| not published |  |  |") for line in lines)
    assert "| t.json | T | P | 3 | 2 |" in lines
    assert list(published_in_tables(tmp_path / "tables")) == [(tmp_path / "a" / "one.json").resolve()]


def test_a_folder_without_tables_has_no_section_of_them(tmp_path):
    assert "## tables" not in experiment_tables(tmp_path)
