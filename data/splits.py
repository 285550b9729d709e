"""Splits that are not folders: drawn once with a seed, or read from a list; and lists of classes.

No file is moved. A drawn split is stored as JSON with its hash in the cache folder, so that it outlives changes of
this code; where the cache cannot be written it is drawn again, with the same result.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np

from data.checks import Findings
from data.images import IMAGE_SUFFIXES
from utils.errors import UserError, reason, shown
from utils.files import likely_cause, special
from utils.seed import mix
from utils.storage import expanded

TEST_SHARE = 0.2
Pool = Mapping[str, Sequence[Path]]  # class name -> images
Chosen = dict[str, dict[str, list[Path]]]  # half -> class name -> images


def cache_root(chosen: str | None) -> Path:
    """Where derived files lie: the key cache_root, then $PALIMPSEST_CACHE, then ~/.cache/palimpsest."""
    return expanded(chosen or os.environ.get("PALIMPSEST_CACHE") or "~/.cache/palimpsest")


def own_path(text: str, findings: Findings) -> Path | None:
    """A path that the user wrote; None, with D15, for a home directory of nobody."""
    try:
        return expanded(text)
    except UserError as error:
        findings.error("D15", str(error))
        return None


def split_hash(halves: Mapping[str, Iterable[str]]) -> str:
    """SHA-256 over "half<tab>class/file" lines, sorted: equal for one split in whatever form it came."""
    lines = sorted(f"{half}\t{entry}\n" for half, entries in halves.items() for entry in entries)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def seeded_split(key: str, pool: Pool, seed: int, store: Path, findings: Findings) -> Chosen:
    """80/20 per class from a private generator: the stored split of these files, or a new one, stored."""
    listing = split_hash({"all": _entries(pool)})
    name = re.sub(r"\W+", "_", key)[-40:]  # the key of a user's own folder is a path
    path = store / f"{name}-seeded{seed}-{listing[:12]}.json"
    by_entry = {entry: (name, image) for name in pool for entry, image in _named(name, pool[name])}
    stored = _read_stored(path, by_entry)
    if stored is None:
        stored = _draw(pool, seed)
        values = {"split": f"seeded:{seed}", "hash": split_hash(stored), **stored}
        try:
            store.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(values, indent=0), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            findings.note("D03", f"split drawn with seed {seed}, not stored ({error.strerror}: '{store}')")
        else:
            findings.note("D03", f"split drawn with seed {seed}, stored in '{path}'")
    chosen: Chosen = {half: {name: [] for name in pool} for half in ("train", "test")}
    for half, classes in chosen.items():
        for entry in stored[half]:
            of_class, image = by_entry[entry]
            classes[of_class].append(image)
    return chosen


def _draw(pool: Pool, seed: int) -> dict[str, list[str]]:
    """Test shares are rounded so that they add up to 20 % of all images; each class keeps at least one on each side."""
    names = list(pool)
    counts = np.array([len(pool[name]) for name in names])
    exact = TEST_SHARE * counts
    shares = np.minimum(np.maximum(np.floor(exact).astype(int), 1), np.maximum(counts - 1, 0))
    left = max(0, round(float(exact.sum())) - int(shares.sum()))
    shares[np.argsort(shares - exact, kind="stable")[:left]] += 1
    halves: dict[str, list[str]] = {"train": [], "test": []}
    for label, name in enumerate(names):
        entries = [entry for entry, _ in _named(name, pool[name])]
        order = np.random.RandomState(mix(seed, label) % (1 << 32)).permutation(len(entries))
        test = set(order[: shares[label]].tolist())
        for row, entry in enumerate(entries):
            halves["test" if row in test else "train"].append(entry)
    return halves


def _read_stored(path: Path, known: Mapping[str, object]) -> dict[str, list[str]] | None:
    """A stored split, or None when there is none or it was damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        halves = {half: list(values[half]) for half in ("train", "test")}
        whole = split_hash(halves) == values["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return halves if whole and all(entry in known for half in halves.values() for entry in half) else None


def listed_split(spec: str, pool: Pool, findings: Findings) -> Chosen | None:
    """The split in a list: JSON {"train": [...], "test": [...]}, or a pair of text or YAML files with one image a line,
    found by the word "train" in the name of the first. Only class folder and file name of an entry count.

    None, with findings, when the list cannot be used (D15).
    """
    path = own_path(spec, findings)
    lists = None if path is None else _read_lists(path, findings)
    if lists is None:
        return None
    by_entry = {entry: (name, image) for name in pool for entry, image in _named(name, pool[name])}
    chosen: Chosen = {half: {name: [] for name in pool} for half in ("train", "test")}
    seen: dict[str, str] = {}
    faults = []
    for half, lines in lists.items():
        for where, text in lines:
            entry = "/".join(_parts(text)[-2:])
            if entry not in by_entry:
                reason = "unknown class" if entry.partition("/")[0] not in pool else "no such image"
                faults.append(f"{where}: {reason} '{text}'")
            elif entry in seen:
                faults.append(f"{where}: '{text}' stands twice (first {seen[entry]})")
            else:
                seen[entry] = where
                name, image = by_entry[entry]
                chosen[half][name].append(image)
    report_lines(faults, f"list '{spec}'", findings)
    for classes in chosen.values():
        for images in classes.values():
            images.sort()
    return None if faults else chosen


def report_lines(faults: Sequence[str], what: str, findings: Findings) -> None:
    """D15: the first five offending lines of a list."""
    if faults:
        more = f"\n    and {len(faults) - 5} more" if len(faults) > 5 else ""
        shown = "".join(f"\n    {fault}" for fault in faults[:5])
        findings.error("D15", f"{what}: {len(faults)} faulty lines; correct them or complete the images:{shown}{more}")


def read_classes(path: Path, known: Iterable[str], findings: Findings) -> list[str] | None:
    """A class list: one name a line (what follows it is a remark; "#" begins a comment). None with D15 findings."""
    text = _read_text(path, findings)
    if text is None:
        return None
    names: dict[str, int] = {}
    known, faults = set(known), []
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := line.split()) or line.lstrip().startswith("#"):
            continue
        name = words[0]
        if name not in known:
            faults.append(f"line {number}: unknown class '{name}'")
        elif name in names:
            faults.append(f"line {number}: '{name}' stands twice (first line {names[name]})")
        else:
            names[name] = number
    report_lines(faults, f"class list '{path}'", findings)
    return None if faults else sorted(names)


def class_hash(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:12]


_REMARK = re.compile(r"^\s*(#.*)?$")
_YAML = re.compile(
    r"^(---|\.\.\.|\w[\w ]*:\s*(#.*)?|\s*-?\s*\d+\s*)$"
)  # a key, a label: YAML lists hold them beside the paths


def listed_images(path: Path, text: str) -> tuple[list[tuple[str, str]], list[str]]:
    """((line number in words, path) of each line that names an image, faults); a label behind the path is dropped.

    Empty lines and those that begin with "#" say nothing, in YAML also keys and labels; any other line is a fault.
    """
    suffixes = "|".join(re.escape(suffix) for suffix in sorted(IMAGE_SUFFIXES))
    pattern = re.compile(
        rf"^\s*(?:-\s+)?[\"']?(?P<path>.+?(?:{suffixes}))[\"']?\s*(?:[,;\s]\s*\d+)?,?\s*$", re.IGNORECASE
    )
    yaml = path.suffix.lower() in (".yaml", ".yml")
    found, faults = [], []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path.name} line {number}"
        if match := pattern.match(line):
            found.append((where, match["path"]))
        elif not _REMARK.match(line) and not (yaml and _YAML.match(line)):
            faults.append(f"{where}: not understood: '{shown(line.strip(), 80)}'")
    return found, faults


def read_list(path: Path, findings: Findings) -> list[tuple[str, str]] | None:
    """(where it stands, path) of each image in a text or YAML list; None, with findings, when a line is no image or
    there are none."""
    text = _read_text(path, findings)
    if text is None:
        return None
    lines, faults = listed_images(path, text)
    if faults:
        wanted = "expected one path a line, like <class>/<file>.jpg, with or without a label behind it"
        report_lines(faults, f"list '{path}' ({wanted})", findings)
    elif not lines:
        findings.error("D15", f"list '{path}' names no images: expected one path a line, like <class>/<file>.jpg")
    return None if faults else lines or None


def _read_lists(path: Path, findings: Findings) -> dict[str, list[tuple[str, str]]] | None:
    if path.suffix.lower() == ".json":
        text = _read_text(path, findings)
        if text is None:
            return None
        try:
            values = json.loads(text)
            return {
                half: [(f"{half} {i + 1}", str(e)) for i, e in enumerate(values[half])] for half in ("train", "test")
            }
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = '{"train": [paths], "test": [paths]}'
            findings.error("D15", f"list '{path}' is not {wanted} ({type(error).__name__}: {error})")
            return None
    if "train" not in path.name:
        findings.error(
            "D15",
            f"list '{path}': name the training list; its name must hold 'train', and the test list the same name "
            "with 'test' or 'val'. Or give one JSON file with both",
        )
        return None
    partners = [path.with_name(path.name.replace("train", other)) for other in ("test", "val")]
    partner = next((other for other in partners if other.is_file()), partners[0])
    train, test = read_list(path, findings), read_list(partner, findings)
    return None if train is None or test is None else {"train": train, "test": test}


def _read_text(path: Path, findings: Findings) -> str | None:
    try:
        if kind := special(path.stat().st_mode):
            findings.error("D15", f"list '{path}' is {kind}. Name a file that is text")
            return None
        if cause := likely_cause(path):
            findings.error("D15", f"list '{path}' cannot be read: {cause}")
            return None
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: other bytes than text, a NUL in the name
        why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason(error)
        findings.error("D15", f"list '{path}' cannot be read ({why}). Name a file that exists and is text")
        return None


def _parts(text: str) -> tuple[str, ...]:
    """Path components, whichever slash the list was written with."""
    return PureWindowsPath(text.strip()).parts


def _named(name: str, images: Iterable[Path]) -> list[tuple[str, Path]]:
    return [(f"{name}/{image.name}", image) for image in images]


def _entries(pool: Pool) -> list[str]:
    return [entry for name in pool for entry, _ in _named(name, pool[name])]
