"""Any classification set of torchvision, by its own reader: "torchvision:NAME", "torchvision:EMNIST?split=letters".

What a set is like is asked of its class: `train` among its arguments, or `split`, or neither (then "split": "seeded"
draws the halves). Pictures that lie in files stay there and are decoded when they are read; arrays are taken as they
are; grey becomes RGB.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.checks import Findings
from data.downloads import cut_off, leaving_no_empty_folders, marked
from data.layouts import Options
from data.named import (
    Half,
    converted,
    drawn,
    fixed_split,
    image_data,
    parsed,
    rgb,
    same_classes,
    typed,
    unknown_option,
)
from data.records import ImageData
from utils.errors import UserError, did_you_mean, reason

# Arguments that are ours to give.
OURS = {"self", "root", "transform", "target_transform", "transforms", "download", "loader", "kwargs", "train"}
# The names by which the field knows some of them.
SHORT = {
    "mnist": "MNIST", "svhn": "SVHN", "food101": "Food101", "flowers102": "Flowers102", "pets": "OxfordIIITPet",
    "aircraft": "FGVCAircraft", "eurosat": "EuroSAT", "stl10": "STL10",
}  # fmt: skip
OTHERS = {"VisionDataset", "DatasetFolder", "ImageFolder"}  # what sets are made from; "folder:DIR" reads folders
TEST_HALVES = ("test", "val", "valid")
LABELS = ("targets", "_labels", "labels", "y")


class Missing(Exception):  # noqa: N818 - the caller says what to do
    """A set is not there, or damaged, and was not downloaded. sentence: where it was looked for."""


class Refused(Exception):  # noqa: N818 - the same
    """A set does not know the value of an option, or gives no classes."""


def load_torchvision(place: str, root: Path, options: Options, findings: Findings) -> ImageData | None:
    """place: what follows "torchvision:"."""
    name, given = parsed(place, findings)
    if (official := _class(name, findings)) is None:
        return None
    key, arguments = f"torchvision:{place}", _arguments(official)
    named = ("train", "test") if _halved_by_split(_all(official)) and "train" not in _all(official) else ()
    halves = {half: given.pop(half) for half in named if half in given}
    own = sorted(set(arguments) - OURS - ({"split"} if _halved_by_split(arguments) else set()))
    for option in given:
        if option not in own:
            unknown_option(name, option, [*own, *named] or ["no option"], findings)
    for option, default in arguments.items():
        if option in own and default is inspect.Parameter.empty and option not in given:
            values = getattr(official, f"{option}s", None)
            allowed = "|".join(values) if values else "..."
            findings.error("D03", f'{name} needs an option: "torchvision:{name}?{option}={allowed}"')
    keys = converted(given, arguments, findings)
    if findings.of("error"):
        return None
    try:
        return _read(key, official, root, keys, halves, options, findings)
    except Missing as error:
        findings.error("D01", str(error))
    except Refused as error:  # its own sentence names the values that it knows
        findings.error("D03", f"{name}: {error}")
    return None


def _read(
    key: str, official: Any, root: Path, keys: dict[str, Any], halves: dict[str, str], options: Options,
    findings: Findings,
) -> ImageData | None:  # fmt: skip
    known: list[list[str]] = []  # classes, as each half that was read names them

    def half(**choice: Any) -> Half:
        found, content = _made(official, root, keys | choice, options)
        classes = (
            () if _of_target(keys) else getattr(found, "classes", None) or getattr(found, "categories", None) or ()
        )
        known.append([str(name[0] if isinstance(name, tuple) else name) for name in classes])
        return content

    def name_of(label: int) -> str:
        return known[0][label] if 0 <= label < len(known[0]) else str(label)

    arguments = _all(official)
    if "train" in arguments or _halved_by_split(arguments):
        if not fixed_split(key, options, findings):
            return None
        if "train" in arguments:
            train, test, how = half(train=True), half(train=False), "folder"
        else:
            usual = arguments["split"] if arguments["split"].startswith("train") else "train"
            first = halves.get("train", usual)
            train = _joined([half(split=part) for part in first.split("+")])
            second, test = _first_known(half, halves.get("test"))
            how = f"{first}/{second}"
        if not all(same_classes(known[0], others, findings) for others in known[1:]):
            return None
        return image_data(key, train, test, name_of, how, findings)
    if options.split.partition(":")[0] != "seeded":
        drawn(key, ([], np.zeros(0, dtype=np.int64)), name_of, options, findings)
        return None
    both = drawn(key, half(), name_of, options, findings)
    return None if both is None else image_data(key, *both, name_of, options.split, findings)


def _first_known(half: Any, named: str | None) -> tuple[str, Half]:
    """The test half, and how this set calls it."""
    if named is not None:
        return named, _joined([half(split=part) for part in named.split("+")])
    for name in TEST_HALVES[:-1]:
        try:
            return name, half(split=name)
        except Refused:  # the set has no half of this name
            continue
    return TEST_HALVES[-1], half(split=TEST_HALVES[-1])


def _joined(halves: list[Half]) -> Half:
    images: Any = [image for some, _ in halves for image in some]
    return images, np.concatenate([labels for _, labels in halves])


def _class(name: str, findings: Findings) -> Any:
    from torchvision import datasets

    classes = {entry: getattr(datasets, entry) for entry in datasets.__all__ if entry not in OTHERS}
    known = {entry: found for entry, found in classes.items() if inspect.isclass(found) and "root" in _all(found)}
    same = [entry for entry in known if entry.lower() == name.lower()]
    if same:
        return known[same[0]]
    near = did_you_mean(name, known)
    findings.error("D01", f'torchvision has no set "{name}"{near or "."} Known: {", ".join(known)}')
    return None


def _arguments(official: Any) -> dict[str, Any]:
    """Of the constructor itself: name -> default."""
    return {name: entry.default for name, entry in inspect.signature(official.__init__).parameters.items()}


def _all(official: Any) -> dict[str, Any]:
    """With those that it passes on to the class that it is made from."""
    found: dict[str, Any] = {}
    for base in official.__mro__:
        if "__init__" in vars(base):
            own = _arguments(base)
            found = {**own, **found}
            if "kwargs" not in own:
                break
    return found


def _halved_by_split(arguments: dict[str, Any]) -> bool:
    return isinstance(arguments.get("split"), str)


def _made(official: Any, root: Path, keys: dict[str, Any], options: Options) -> tuple[Any, Half]:
    """The set and what it holds; downloaded where it is missing and may be."""
    quiet = {"download": False} if "download" in _all(official) else {}
    name = official.__name__
    if (mark := cut_off(root, name)) is not None and _there(official, root, keys | quiet):
        raise Missing(
            f"the download of torchvision's {name} into '{root}' was cut off, and what is there may be a part: remove "
            f"it and '{mark}', then run `python main.py fetch CONFIG` where there is a network"
        )
    with leaving_no_empty_folders(root):
        try:
            return _opened(official, root, keys | quiet)
        except (RuntimeError, OSError) as error:
            _raise_for_package(official, error)
            looked, why = _looked_in(error, root), reason(error).partition(". ")[0]
        except (Refused, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - parsers raise many types for damaged files
            _raise_for_package(official, error)
            raise _missing(official, _looked_in(error, root), typed(error)) from None
        if options.download and quiet:
            try:
                with marked(root, name, lambda: _there(official, root, keys | quiet)):
                    return _opened(official, root, keys | {"download": True})
            except Refused:
                raise
            except Exception as error:  # noqa: BLE001 - url, archive and checksum faults come as many types
                why += "" if reason(error).startswith(why) else f"; the download failed: {reason(error)}"
    raise _missing(official, looked, why)


def _there(official: Any, root: Path, keys: dict[str, Any]) -> bool:
    try:
        official(str(root), **keys)
    except Exception:  # noqa: BLE001 - as they read, they raise many types
        return False
    return True


def _missing(official: Any, looked: Path, why: str) -> Missing:
    return Missing(
        f"'{looked}' is not there, or not whole ({why}). Put torchvision's {official.__name__} there, point "
        "data_root (key, --data-root DIR, or PALIMPSEST_DATA) at the folder that holds it, or run "
        "`python main.py fetch CONFIG` where there is a network"
    )


def _opened(official: Any, root: Path, keys: dict[str, Any]) -> tuple[Any, Half]:
    """Raises Refused for a value of an option, whatever the reader raises for what lies on the disk."""
    try:
        found = official(str(root), **keys)
    except ValueError as error:  # of an argument, which it names; or of a file
        if any(re.search(rf"\b(argument|parameter) '?{key}\b", str(error), re.IGNORECASE) for key in keys):
            raise Refused(str(error)) from None
        raise
    return found, _half(found, listed=not _of_target(keys))


def _of_target(keys: Mapping[str, Any]) -> bool:
    """Whether an option says what an image's label is: then the set's own lists are of other labels."""
    return any(key.startswith("target") for key in keys)


def _raise_for_package(official: Any, error: BaseException | None) -> None:
    """UserError where a reader lacks a package, be it that it says so by another error."""
    while error is not None:
        if isinstance(error, ImportError):
            raise UserError(f"torchvision's {official.__name__} needs a package: {reason(error)}") from None
        error = error.__context__


def _looked_in(error: Exception, root: Path) -> Path:
    """The folder or file below `root` that a reader looked for: what the system, or the object that gave up, says."""
    if isinstance(error, OSError) and error.filename and Path(str(error.filename)).is_relative_to(root):
        return Path(str(error.filename))
    found, trace = root, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if hasattr(owner, "root"):
            below = [path for path in _paths_of(owner, root) if path != root and path.is_relative_to(root)]
            found = min(below, key=lambda path: len(path.parts), default=found)
        trace = trace.tb_next
    return found


def _paths_of(owner: Any, root: Path) -> Iterator[Path]:
    if isinstance(folder := getattr(owner, "raw_folder", None), str):
        yield Path(folder)
        return
    for value in vars(owner).values():
        if isinstance(value, str | Path) and str(value).startswith(str(root)):
            yield Path(value)
    for name in ("base_folder", "filename"):
        if isinstance(value := getattr(owner, name, None), str) and value:
            yield root / value


def _half(found: Any, listed: bool) -> Half:
    """Images, as paths where they lie in files, and labels: those that the set lists, or what it gives by image."""
    count = len(found)
    files, labels = _listed(found, count)
    labels = labels if listed else None
    if files is not None and labels is not None:
        order = sorted(range(count), key=lambda row: (labels[row], str(files[row])))  # some list as the disk does
        return [files[row] for row in order], labels[order]
    pairs = [found[row] for row in range(count)]
    if pairs and not (len(pairs[0]) == 2 and isinstance(pairs[0][1], int | np.integer)):
        raise Refused("gives no number of a class for an image: no classification set, or a half without labels")
    images = files if files is not None else [rgb(image) for image, _ in pairs]
    return images, np.array([int(label) for _, label in pairs], dtype=np.int64)


def _listed(found: Any, count: int) -> tuple[list[Path] | None, np.ndarray | None]:
    """Paths and labels as the set lists them in its attributes: two lists, or pairs. None where it does not."""
    files = labels = None
    for value in vars(found).values():
        if not isinstance(value, list | tuple) or len(value) != count or not count:
            continue
        if isinstance(value[0], str | Path) and _of_file(Path(value[0])):
            files = files or [Path(entry) for entry in value]
        elif isinstance(value[0], tuple) and len(value[0]) == 2 and isinstance(value[0][0], str | Path):
            paths, numbers = zip(*value, strict=True)
            if _of_file(Path(paths[0])):
                return [Path(path) for path in paths], _integers(numbers)
    for name in LABELS:
        value = getattr(found, name, None)
        one = value is not None and np.ndim(value) == 1 and len(value) == count
        if one and (labels := _integers(value)) is not None:
            break
    return files, labels


def _of_file(path: Path) -> bool:
    """Whether it names a file, be it gone, or a pipe, which decoding would wait for."""
    return path.is_file() or (len(path.parts) > 1 and path.parent.is_dir() and not path.is_dir())


def _integers(values: Any) -> np.ndarray | None:
    numbers = np.asarray(values)
    return numbers.astype(np.int64) if np.issubdtype(numbers.dtype, np.integer) else None
