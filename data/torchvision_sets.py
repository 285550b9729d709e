"""Any classification set of torchvision, by its own reader: "torchvision:NAME", "torchvision:EMNIST?split=letters".

What a set is like is asked of its class: `train` among its arguments, or `split`, or neither (then "split": "seeded"
draws the halves). Pictures that lie in files stay there and are decoded when they are read; arrays are taken as they
are; grey becomes RGB.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.checks import Findings
from data.layouts import Options
from data.named import (
    Half,
    converted,
    drawn,
    fixed_split,
    image_data,
    leaving_no_empty_folders,
    parsed,
    rgb,
    unknown_option,
)
from data.records import ImageData
from utils.errors import did_you_mean

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
    """A set is not there, and was not downloaded. sentence: where it was looked for."""


def load_torchvision(place: str, root: Path, options: Options, findings: Findings) -> ImageData | None:
    """place: what follows "torchvision:"."""
    name, given = parsed(place)
    if (official := _class(name, findings)) is None:
        return None
    key, arguments = f"torchvision:{place}", _arguments(official)
    halves: dict[str, str] = {
        half: given.pop(half) for half in ("train", "test") if half in given and "train" not in _all(official)
    }
    own = sorted(set(arguments) - OURS - ({"split"} if _halved_by_split(arguments) else set()))
    for option in given:
        if option not in own:
            more = [] if "train" in _all(official) else ["train", "test"]
            unknown_option(name, option, [*own, *more] or ["no option"], findings)
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
    except ValueError as error:  # a value that the set does not know: its own sentence names the others
        findings.error("D03", f"{name}: {error}")
    return None


def _read(
    key: str, official: Any, root: Path, keys: dict[str, Any], halves: dict[str, str], options: Options,
    findings: Findings,
) -> ImageData | None:  # fmt: skip
    names: list[str] = []

    def half(**choice: Any) -> Half:
        found = _made(official, root, keys | choice, options)
        known = getattr(found, "classes", None) or getattr(found, "categories", None) or ()
        names[:] = names or [str(name[0] if isinstance(name, tuple) else name) for name in known]
        return _half(found)

    def name_of(label: int) -> str:
        return names[label] if label < len(names) else str(label)

    arguments = _all(official)
    if "train" in arguments:
        if not fixed_split(key, options, findings):
            return None
        return image_data(key, half(train=True), half(train=False), name_of, "folder", findings)
    if _halved_by_split(arguments):
        if not fixed_split(key, options, findings):
            return None
        usual = arguments["split"] if arguments["split"].startswith("train") else "train"
        train = halves.get("train") or usual
        found = _joined([half(split=part) for part in train.split("+")])
        test = _first_known(half, halves.get("test"))
        return image_data(key, found, test, name_of, f"{train}/{halves.get('test', 'test')}", findings)
    both = drawn(key, half(), name_of, options, findings) if options.split != "folder" else None
    if both is None:
        drawn(key, ([], np.zeros(0, dtype=np.int64)), name_of, options, findings)
        return None
    return image_data(key, *both, name_of, options.split, findings)


def _first_known(half: Any, named: str | None) -> Half:
    """The test half, as this set calls it."""
    if named is not None:
        return _joined([half(split=part) for part in named.split("+")])
    for name in TEST_HALVES[:-1]:
        try:
            return half(split=name)
        except ValueError:  # the set has no half of this name
            continue
    return half(split=TEST_HALVES[-1])


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


def _made(official: Any, root: Path, keys: dict[str, Any], options: Options) -> Any:
    """The set; downloaded where it is missing and may be."""
    quiet = {"download": False} if "download" in _all(official) else {}
    with leaving_no_empty_folders(root):
        try:
            return official(str(root), **keys, **quiet)
        except (RuntimeError, OSError) as error:
            looked, reason = _looked_in(error, root), str(error).partition(". ")[0]
        if options.download and quiet:
            try:
                root.mkdir(parents=True, exist_ok=True)
                return official(str(root), **keys, download=True)
            except ValueError:
                raise
            except Exception as error:  # noqa: BLE001 - url, archive and checksum faults come as many types
                reason = f"{reason}; the download failed: {error}"
    raise Missing(
        f"'{looked}' is not there, or not whole ({reason}). Put torchvision's {official.__name__} there, point "
        "data_root (key, --data-root DIR, or PALIMPSEST_DATA) at the folder that holds it, or run "
        "`python main.py fetch CONFIG` where there is a network"
    )


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


def _half(found: Any) -> Half:
    """Images, as paths where they lie in files, and labels."""
    count = len(found)
    files, labels = _listed(found, count)
    if files is not None and labels is not None:
        order = sorted(range(count), key=lambda row: (labels[row], str(files[row])))  # some list as the disk does
        return [files[row] for row in order], labels[order]
    pairs = [found[row] for row in range(count)]
    if pairs and not (len(pairs[0]) == 2 and isinstance(pairs[0][1], int | np.integer)):
        raise ValueError("gives no number of a class for an image: it is no classification set")
    images = files if files is not None else [rgb(image) for image, _ in pairs]
    return images, np.array([int(label) for _, label in pairs], dtype=np.int64)


def _listed(found: Any, count: int) -> tuple[list[Path] | None, np.ndarray | None]:
    """Paths and labels as the set lists them in its attributes: two lists, or pairs. None where it does not."""
    files = labels = None
    for value in vars(found).values():
        if not isinstance(value, list | tuple) or len(value) != count or not count:
            continue
        if isinstance(value[0], str | Path) and Path(value[0]).is_file():
            files = files or [Path(entry) for entry in value]
        elif isinstance(value[0], tuple) and len(value[0]) == 2 and isinstance(value[0][0], str | Path):
            paths, numbers = zip(*value, strict=True)
            if Path(paths[0]).is_file():
                return [Path(path) for path in paths], _integers(numbers)
    for name in LABELS:
        value = getattr(found, name, None)
        one = value is not None and np.ndim(value) == 1 and len(value) == count
        if one and (labels := _integers(value)) is not None:
            break
    return files, labels


def _integers(values: Any) -> np.ndarray | None:
    numbers = np.asarray(values)
    return numbers.astype(np.int64) if np.issubdtype(numbers.dtype, np.integer) else None
