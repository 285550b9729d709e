"""Data sets of the Hugging Face hub, or saved in a folder, through the library `datasets`: "hf:NAME?label=fine_label".

A folder of that name (below data_root, or a path) is read without a network: what `save_to_disk` wrote, or anything
that `load_dataset` reads. The columns of the image and of its class are found by their types, or named.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.checks import Findings
from data.layouts import Options
from data.named import Half, drawn, fixed_split, image_data, parsed, rgb, same_classes, typed, unknown_option
from data.records import ImageData
from utils.errors import DataError, UserError, reason

OPTIONS = ("image", "label", "train", "test", "config")
TEST_HALVES = ("test", "validation", "valid", "val")


def load_hf(place: str, root: Path, options: Options, findings: Findings) -> ImageData | None:
    """place: what follows "hf:". Raises UserError where the library is missing."""
    name, given = parsed(place, findings)
    key = f"hf:{place}"
    if not name:
        findings.error("D01", 'no data set is named: write "hf:NAME"')
    for option in given:
        if option not in OPTIONS:
            unknown_option(key.partition("?")[0], option, OPTIONS, findings)
    found = None if findings.of("error") else _opened(name, given.get("config"), root, options, findings)
    if found is None:
        return None
    train = _half_named(found, given.get("train"), ("train",) if "train" in found else tuple(found)[:1], findings)
    test = _half_named(found, given.get("test"), TEST_HALVES, findings)
    if train is None or findings.of("error"):
        return None
    tables = {half: found[half] for half in dict.fromkeys((train, test)) if half is not None}
    columns = {half: _columns(half, table, given, findings) for half, table in tables.items()}
    if findings.of("error") or (names := _names(tables, columns, findings)) is None:
        return None

    def name_of(number: int) -> str:
        return names[number] if 0 <= number < len(names) else str(number)

    halves = [_half(half, table, columns[half], names) for half, table in tables.items()]
    if len(halves) == 1:
        both = drawn(key, halves[0], name_of, options, findings)
        return None if both is None else _placed(image_data(key, *both, name_of, options.split, findings), name, root)
    if not fixed_split(key, options, findings):
        return None
    return _placed(image_data(key, halves[0], halves[1], name_of, f"{train}/{test}", findings), name, root)


def _folder(name: str, root: Path) -> Path | None:
    return next((path for path in (root / name, Path(name).expanduser()) if path.is_dir()), None)


def _placed(data: ImageData | None, name: str, root: Path) -> ImageData | None:
    """With where it lies: its folder, or the library's cache."""
    import datasets

    place = _folder(name, root) or datasets.config.HF_DATASETS_CACHE
    return None if data is None else replace(data, place=str(place))


def _opened(name: str, config: str | None, root: Path, options: Options, findings: Findings) -> Any:
    """half -> table."""
    try:
        import datasets
    except ImportError:
        raise UserError('"hf:" needs the package datasets: pip install datasets') from None
    place = _folder(name, root)
    datasets.disable_progress_bars()
    try:
        found = _from_hub(name, config, options) if place is None else _from_folder(place, config)
    except Exception as error:  # noqa: BLE001 - the hub, parsers and caches raise types of their own
        looked = (
            f"neither folder '{root / name}' nor the hub gives it" if place is None else f"'{place}' cannot be read"
        )
        findings.error(
            "D01",
            f"{looked} ({typed(error)}). Without a network, put there what datasets' save_to_disk writes, or run "
            "`python main.py fetch CONFIG` where there is one",
        )
        return None
    return found if isinstance(found, dict) else {"train": found}


def _from_folder(place: Path, config: str | None) -> Any:
    import datasets

    if any((place / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return datasets.load_from_disk(str(place))
    return datasets.load_dataset(str(place), config)


def _from_hub(name: str, config: str | None, options: Options) -> Any:
    """From the library's cache, which asks no network; else from the hub, where that is allowed."""
    import datasets
    from huggingface_hub import constants

    try:
        with _offline():
            return datasets.load_dataset(name, config)
    except Exception:
        if not options.download or constants.HF_HUB_OFFLINE:
            raise
    return datasets.load_dataset(name, config)


@contextmanager
def _offline() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does: five attempts to reach a hub that cannot be reached take half a minute."""
    import datasets
    from huggingface_hub import constants

    owners: tuple[Any, Any] = (datasets.config, constants)
    before = [owner.HF_HUB_OFFLINE for owner in owners]
    try:
        for owner in owners:
            owner.HF_HUB_OFFLINE = True
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.HF_HUB_OFFLINE = value


def _half_named(found: Any, named: str | None, usual: tuple[str, ...], findings: Findings) -> str | None:
    if named is not None and named not in found:
        findings.error("D02", f'it has no half "{named}"; it has {", ".join(found)}')
    return named if named is not None else next((name for name in usual if name in found), None)


def _columns(half: str, table: Any, given: dict[str, str], findings: Findings) -> tuple[str, str]:
    """Columns of image and class; ("", "") with D03 where there are none of the right kind."""
    from datasets import ClassLabel, Image, Value

    features, chosen = table.features, {}
    kinds = {"image": (Image,), "label": (ClassLabel, Value)}
    for role, first in (("image", Image), ("label", ClassLabel)):
        fitting = [name for name, feature in features.items() if isinstance(feature, first)]
        if role == "label" and not fitting:
            fitting = [name for name in ("label", "labels", "class", "target") if name in features]
        if role in given and given[role] not in features:
            findings.error("D03", f'half "{half}" has no column "{given[role]}"; it has {", ".join(features)}')
        elif role in given:
            chosen[role] = given[role]
        elif len(fitting) == 1 or role in fitting:
            chosen[role] = role if role in fitting else fitting[0]
        else:
            several = f"several may be the {role}: {', '.join(fitting)}" if fitting else f"none is the {role}"
            more = " (of type datasets.Image: cast_column makes it one)" if role == "image" else ""
            findings.error(
                "D03",
                f'of the columns of half "{half}" ({", ".join(features)}) {several}{more}. Name it: ?{role}=COLUMN',
            )
        if role in chosen and not isinstance(feature := features[chosen[role]], kinds[role]):
            wanted = " or ".join(f"datasets.{kind.__name__}" for kind in kinds[role])
            findings.error(
                "D03",
                f'column "{chosen[role]}" of half "{half}" is {type(feature).__name__}, the {role} must be {wanted}: '
                f"name another (?{role}=COLUMN), or make it one with cast_column and save_to_disk",
            )
    return chosen.get("image", ""), chosen.get("label", "")


def _names(tables: Mapping[str, Any], columns: Mapping[str, tuple[str, str]], findings: Findings) -> list[str] | None:
    """Of the classes, in the order of their numbers: as the type of the column has them, or the values that occur."""
    own = [getattr(table.features[columns[half][1]], "names", None) for half, table in tables.items()]
    values: set[Any] = set()
    for half, table in tables.items():
        of_half = table[columns[half][1]]
        if lacking := sum(value is None for value in of_half):
            findings.error("D05", f'{lacking:,} images of half "{half}" have no class (None): leave them out')
        values |= set(of_half) - {None}
    if findings.of("error"):
        return None
    if any(own):
        names = [list(of_half or ()) for of_half in own]
        return names[0] if same_classes(names[0], names[-1], findings) else None
    return [str(value) for value in sorted(values, key=lambda value: (isinstance(value, str), value))]


def _half(half: str, table: Any, columns: tuple[str, str], names: list[str]) -> Half:
    """Pictures in memory, decoded. Raises DataError for one that cannot be."""
    image, label = columns
    if hasattr(table.features[label], "names"):
        numbers = list(table[label])
    else:
        number_of = {name: number for number, name in enumerate(names)}
        numbers = [number_of[str(value)] for value in table[label]]
    pictures = []
    for row in range(len(table)):
        try:
            pictures.append(rgb(table[row][image]))
        except Exception as error:  # noqa: BLE001 - decoders raise many types for damaged files
            why = "it is None" if isinstance(error, TypeError) else reason(error).partition(" <")[0]
            raise DataError(f'image number {row} of half "{half}" cannot be read ({why}): leave it out') from None
    return pictures, np.array(numbers, dtype=np.int64)
