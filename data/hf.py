"""Data sets of the Hugging Face hub, or saved in a folder, through the library `datasets`: "hf:NAME?label=fine_label".

A folder of that name (below data_root, or a path) is read without a network: what `save_to_disk` wrote, or anything
that `load_dataset` reads. The columns of the image and of its class are found by their types, or named.
"""

from pathlib import Path
from typing import Any

import numpy as np

from data.checks import Findings
from data.layouts import Options
from data.named import Half, drawn, fixed_split, image_data, parsed, rgb, unknown_option
from data.records import ImageData
from utils.errors import UserError, reason

OPTIONS = ("image", "label", "train", "test", "config")
TEST_HALVES = ("test", "validation", "valid", "val")


def load_hf(place: str, root: Path, options: Options, findings: Findings) -> ImageData | None:
    """place: what follows "hf:". Raises UserError where the library is missing."""
    name, given = parsed(place)
    key = f"hf:{place}"
    for option in given:
        if option not in OPTIONS:
            unknown_option(key.partition("?")[0], option, OPTIONS, findings)
    found = None if findings.of("error") else _opened(name, given.get("config"), root, options, findings)
    if found is None:
        return None
    train = _half_named(found, given.get("train"), ("train",) if "train" in found else tuple(found)[:1], findings)
    test = _half_named(found, given.get("test"), TEST_HALVES, findings, needed=False)
    if train is None or findings.of("error"):
        return None
    columns = _columns(found[train], given, findings)
    if columns is None:
        return None
    image, label, names = columns

    def name_of(number: int) -> str:
        return names[number] if number < len(names) else str(number)

    first = _half(found[train], image, label, names)
    if test is None or test == train:
        both = drawn(key, first, name_of, options, findings)
        return None if both is None else image_data(key, *both, name_of, options.split, findings)
    if not fixed_split(key, options, findings):
        return None
    return image_data(key, first, _half(found[test], image, label, names), name_of, f"{train}/{test}", findings)


def _opened(name: str, config: str | None, root: Path, options: Options, findings: Findings) -> Any:
    """half -> table."""
    try:
        import datasets
    except ImportError:
        raise UserError('"hf:" needs the package datasets: pip install datasets') from None
    place = next((path for path in (root / name, Path(name).expanduser()) if path.is_dir()), None)
    datasets.disable_progress_bars()
    try:
        if place is not None and any((place / f).is_file() for f in ("dataset_dict.json", "dataset_info.json")):
            found = datasets.load_from_disk(str(place))
        elif place is not None:
            found = datasets.load_dataset(str(place), config)
        elif options.download:
            found = datasets.load_dataset(name, config)
        else:
            offline = datasets.DownloadConfig(local_files_only=True)
            found = datasets.load_dataset(name, config, download_config=offline)
    except Exception as error:  # noqa: BLE001 - the hub, parsers and caches raise types of their own
        findings.error(
            "D01",
            f"neither folder '{root / name}' nor the hub gives it ({reason(error)}). Without a network, put there what "
            "datasets' save_to_disk writes, or run `python main.py fetch CONFIG` where there is one",
        )
        return None
    return found if isinstance(found, dict) else {"train": found}


def _half_named(
    found: Any, named: str | None, usual: tuple[str, ...], findings: Findings, needed: bool = True
) -> str | None:
    if named is not None and named not in found:
        findings.error("D02", f'it has no half "{named}"; it has {", ".join(found)}')
    return named if named is not None else next((name for name in usual if name in found), None)


def _columns(table: Any, given: dict[str, str], findings: Findings) -> tuple[str, str, list[str]] | None:
    """Columns of image and class, and names of the classes (none: the values are their names)."""
    from datasets import ClassLabel, Image

    features = table.features
    chosen = {}
    for role, kind in (("image", Image), ("label", ClassLabel)):
        fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
        if role == "label" and not fitting:
            fitting = [name for name in ("label", "labels", "class", "target") if name in features]
        if given.get(role, role) not in features and role in given:
            findings.error("D03", f'it has no column "{given[role]}"; it has {", ".join(features)}')
        elif role in given:
            chosen[role] = given[role]
        elif len(fitting) == 1 or role in fitting:
            chosen[role] = role if role in fitting else fitting[0]
        else:
            several = f"several may be the {role}: {', '.join(fitting)}" if fitting else f"none is the {role}"
            findings.error("D03", f"of its columns ({', '.join(features)}) {several}. Name it: ?{role}=COLUMN")
    if len(chosen) < 2:
        return None
    names = features[chosen["label"]].names if isinstance(features[chosen["label"]], ClassLabel) else []
    return chosen["image"], chosen["label"], names or [str(value) for value in sorted(set(table[chosen["label"]]))]


def _half(table: Any, image: str, label: str, names: list[str]) -> Half:
    """Pictures in memory, decoded."""
    values = list(table[label])
    numbers = {name: number for number, name in enumerate(names)}
    written = [value if isinstance(value, int) else numbers.get(str(value), len(names)) for value in values]
    if values and isinstance(values[0], int) and not hasattr(table.features[label], "names"):
        written = [numbers[str(value)] if str(value) in numbers else len(names) for value in values]
    return [rgb(table[row][image]) for row in range(len(table))], np.array(written, dtype=np.int64)
