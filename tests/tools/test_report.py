"""The page of all runs: self-contained, safe, readable without its script, and right in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import main
from tests.made_results import made_config, write_seed
from tools.report.page import collect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Parsed(HTMLParser):
    """Tags and attributes, in their order; that every tag is closed."""

    VOID = frozenset({"meta", "input", "br", "link"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(tmp_path, folder="runs") -> str:
    assert main.main(["report", str(tmp_path / folder), "--output", str(tmp_path / "out" / "report.html")]) == 0
    return (tmp_path / "out" / "report.html").read_text()


def data_of(text: str) -> list[dict]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])["runs"]


@pytest.fixture
def runs(tmp_path):
    for name, last in (("a", 80.0), ("b/deeper", 90.0)):
        write_seed(tmp_path / "runs" / name, made_config(), 1993, curve=(99.0, 95.0, last))
    write_seed(tmp_path / "runs" / "b" / "deeper", made_config(), 1996, finished=False, tasks=5)
    place = write_seed(tmp_path / "runs" / "begun", made_config(normalize="half"), 1)
    (place / "result.json").unlink()
    return tmp_path


def test_every_seed_is_a_row_with_its_state(runs):
    text = page(runs)
    found = data_of(text)
    assert [(run["run"], run["state"]) for run in found] == [
        ("a/seed1993", "finished"), ("b/deeper/seed1993", "finished"), ("b/deeper/seed1996", "3 of 5 tasks"),
        ("begun/seed1", "no task done"),
    ]  # fmt: skip
    assert text.count('<tr data-run="') == 4 and '<td class="number">80.00</td>' in text
    assert found[3]["config"]["normalize"] == "half" and found[0]["phases"]["total"] == 13.0


def test_nothing_is_fetched_and_every_tag_is_closed(runs):
    text = page(runs)
    parsed = Parsed(text)
    assert parsed.open == []
    assert not any(
        "src" in attributes or attributes.get("href", "#").startswith("http") for _, attributes in parsed.tags
    )
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text and "@import" not in text and "fetch(" not in text


def test_it_can_be_used_by_keyboard_and_read_aloud(runs):
    parsed = Parsed(page(runs))
    by_tag = {tag: [attributes for name, attributes in parsed.tags if name == tag] for tag, _ in parsed.tags}
    assert by_tag["html"][0]["lang"] == "en"
    heads = [
        attributes for attributes in by_tag["th"] if attributes.get("scope") == "col" and "aria-sort" in attributes
    ]
    assert len(heads) == len([a for a in by_tag["button"] if "data-column" in a])
    assert all("aria-label" in a for a in by_tag["input"] if a.get("type") == "checkbox")
    labelled = {attributes["for"] for attributes in by_tag["label"]}
    assert {"filter", "left", "right"} <= labelled
    assert any(attributes.get("role") == "status" for _, attributes in parsed.tags)
    assert "prefers-color-scheme: dark" in page(runs)


def test_names_cannot_break_the_page(tmp_path):
    write_seed(tmp_path / "runs" / "<script>alert(1)<", made_config(), 1993)
    write_seed(tmp_path / "runs" / "{{data}} & co", made_config(about={"note": "</script><b>"}), 1993)
    text = page(tmp_path)
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/seed1993" in text
    assert len(data_of(text)) == 2 and "{{data}} &amp; co/seed1993" in text


def test_a_result_that_cannot_be_read_is_said_and_the_others_are_shown(runs, capsys):
    (runs / "runs" / "a" / "seed1993" / "result.json").write_text('{"curve": [1')
    text = page(runs)
    assert len(data_of(text)) == 3 and "cannot be read (JSONDecodeError" in text
    assert "cannot be read" in capsys.readouterr().out


def test_nothing_to_show_is_an_error(tmp_path, capsys):
    assert main.main(["report", str(tmp_path / "none")]) == 2
    (tmp_path / "empty").mkdir()
    assert main.main(["report", str(tmp_path / "empty"), "--output", str(tmp_path / "r.html")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_a_page_is_written_anew_and_another_file_is_left_alone(runs, capsys):
    page(runs)
    page(runs)
    (runs / "out" / "report.html").write_text("<p>mine</p>")
    assert main.main(["report", str(runs / "runs"), "--output", str(runs / "out" / "report.html")]) == 2
    assert "no page of this command" in capsys.readouterr().err
    assert (runs / "out" / "report.html").read_text() == "<p>mine</p>"


def test_500_runs_make_a_page_of_a_few_mib(tmp_path):
    for number in range(500):
        write_seed(tmp_path / "runs" / f"{number:03d}", made_config(), 1993)
    assert len(collect(tmp_path / "runs")[0]) == 500
    assert len(page(tmp_path)) < 3 * 2**20


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_sort_filter_curves_and_differences_work(runs):
    script = """<script>
    document.querySelector('button[data-column="last_acc"]').click();
    document.getElementById("filter").value = "state:finished last>75"; filter();
    choose([0, 1], true);
    document.getElementById("left").value = 0; document.getElementById("right").value = 3; differences();
    document.body.dataset.order = [...body.rows].map((row) => row.dataset.run).join(" ");
    document.body.dataset.shown = [...body.rows].filter((row) => !row.hidden).length;
    </script></body>"""
    file = runs / "driven.html"
    file.write_text(page(runs).replace("</body>", script))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={runs / 'profile'}",
               "--virtual-time-budget=2000", "--dump-dom", f"file://{file}"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert 'data-order="0 1 2 3"' in dom or 'data-order="0 2 1 3"' in dom
    assert 'data-shown="2"' in dom and 'aria-sort="ascending"' in dom
    assert dom.count("<polyline") == 2 and dom.count("<canvas") == 2
    assert "keys differ" in dom and '<th scope="row">normalize</th>' in dom
