"""A table file: JSON that names experiments beside the numbers that were published for them."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.factory import load_config
from tools.index import KINDS
from tools.table.places import below_experiments
from utils.checking import read_json
from utils.config import MACHINE_KEYS, RunConfig
from utils.errors import ConfigError, UserError, did_you_mean

READ_OFF = ("paper figure", "repo figure")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Value(_Strict):
    """A published mean, with what is known of its spread."""

    mean: float
    std: Annotated[float, Field(ge=0)] | None = None


class Conditions(_Strict):
    """What is known of a published run, where it could differ from ours; absent: not known, and taken as equal."""

    data: str | None = None
    split: str | None = None
    backbone: str | None = None
    weights: str | None = None
    precision: str | None = None
    class_order: Literal["natural", "unknown"] | list[int] | None = None


class Published(_Strict):
    """One source's numbers. n: runs behind the mean, None where the source does not say."""

    kind: Literal[KINDS]  # type: ignore[valid-type]
    source: Annotated[str, Field(min_length=1)]
    last_acc: Value | None = None
    avg_acc: Value | None = None
    last_acc_task_mean: Value | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seeds: list[int] | None = None
    curve: list[float] | None = None
    under: Conditions = Conditions()
    note: str | None = None

    def value(self, metric: str) -> Value | None:
        found = getattr(self, metric, None)
        return found if isinstance(found, Value) else None

    @property
    def runs(self) -> int | None:
        return len(self.seeds) if self.seeds else self.n


class RowSpec(_Strict):
    """config: relative to the table file; null: a method that is not here, shown with their numbers alone."""

    name: Annotated[str, Field(min_length=1)]
    config: str | None = None
    set: dict[str, Any] = {}
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    grid_validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    published: list[Published] = []
    note: str | None = None


class TableSpec(_Strict):
    """tolerance: points that two single runs may differ by, where no spread is known on either side."""

    title: Annotated[str, Field(min_length=1)]
    protocol: Annotated[str, Field(min_length=1)]
    metrics: Annotated[list[str], Field(min_length=1)] = ["last_acc", "avg_acc"]
    tolerance: Annotated[float, Field(ge=0)] = 1.0
    rows: Annotated[list[RowSpec], Field(min_length=1)]
    note: str | None = None


@dataclass(frozen=True)
class Experiment:
    """A config with what a row sets in it. file: what `--config` takes. folder: where its seeds lie."""

    file: Path
    set: Mapping[str, Any]
    folder: Path
    config: RunConfig


@dataclass(frozen=True)
class Row:
    """experiment: None for a method that is not here. grid: (keys of a point, its experiment on the validation part);
    empty once the best point is the row's experiment: chosen says which, and how good it was. swept: (keys of a point,
    last accuracy on the validation part), of the points that are finished."""

    spec: RowSpec
    experiment: Experiment | None
    seeds: tuple[int, ...]
    grid: tuple[tuple[Mapping[str, Any], Experiment], ...] = ()
    chosen: str = ""
    swept: tuple[tuple[Mapping[str, Any], float], ...] = ()

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class TableFile:
    path: Path
    spec: TableSpec
    rows: tuple[Row, ...]


def read_table(
    path: Path,
    root: Path,
    overrides: Mapping[str, Any] | None = None,
    names: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
) -> TableFile:
    """A table whose rows all resolve. root: above the result folders. overrides: keys for every row. names: rows, all
    where there are none. seeds: instead of the rows' own.

    Raises ConfigError with every fault of the file, UserError for rows that it does not have.
    """
    values = read_json(path)
    try:
        spec = TableSpec.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(str(path), [_sentence(item) for item in error.errors(include_url=False)]) from None
    if double := {row.name for row in spec.rows if sum(other.name == row.name for other in spec.rows) > 1}:
        raise ConfigError(str(path), [f'two rows are called "{name}"' for name in sorted(double)])
    known = [row.name for row in spec.rows]
    for name in names:
        if name not in known:
            raise UserError(f'no row "{name}" in {path}{did_you_mean(name, known) or "."} Rows: {", ".join(known)}')
    rows, faults = [], []
    for row in spec.rows:
        if names and row.name not in names:
            continue
        try:
            rows.append(_resolved(row, path, root, overrides or {}, seeds))
        except ConfigError as error:
            faults += [f'row "{row.name}": {fault}' for fault in error.faults]
    if faults:
        raise ConfigError(str(path), faults)
    return TableFile(path, spec, tuple(rows))


def _sentence(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    return f"{place}: {item['msg']}" + ("" if item["type"] == "missing" else f", got {json.dumps(item['input'])[:80]}")


def _resolved(row: RowSpec, table: Path, root: Path, overrides: Mapping[str, Any], seeds: Sequence[int] | None) -> Row:
    if row.config is None:
        if row.set or row.grid or row.seeds:
            raise ConfigError("", ['"set", "grid" and "seeds" need "config"'])
        return Row(row, None, ())
    file = (table.parent / row.config).resolve()
    file = Path(_relative(file))
    given = {**row.set, **overrides}
    experiment = resolve(file, given, root)
    grid = []
    if row.grid:
        for values in product(*row.grid.values()):
            point = dict(zip(row.grid, values, strict=True))
            on_val = {"validation": row.grid_validation, "evaluate_on": "val"}
            grid.append((point, resolve(file, {**given, **point, **on_val}, root)))
    chosen = tuple(seeds) if seeds else tuple(row.seeds) if row.seeds else experiment.config.seeds
    return Row(row, experiment, chosen, tuple(grid))


def resolve(file: Path, given: Mapping[str, Any], root: Path) -> Experiment:
    """Raises ConfigError where the config, with what is set, is not sound."""
    config = load_config(str(file), None, given)
    return Experiment(file, dict(given), root / _folder(file, given), config)


def _folder(file: Path, given: Mapping[str, Any]) -> Path:
    """As `main.py --config` has it, so that its runs count; with keys that are set behind the name."""
    told = {key: value for key, value in given.items() if key not in MACHINE_KEYS}
    named = "".join(f"+{key}={_short(value)}" for key, value in sorted(told.items()))
    place = below_experiments(file)
    return place.with_name(place.name + named)


def _short(value: Any) -> str:
    """A value as a part of a folder's name; long ones end in a digest, so that two never meet."""
    text = value if isinstance(value, str) else json.dumps(value)
    plain = re.sub(r"[^A-Za-z0-9.,_-]+", "-", text).strip("-")
    if plain == text and len(plain) <= 40:
        return plain
    return f"{plain[:32].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _relative(file: Path) -> str:
    """As seen from here where it lies below, so that messages and folders stay short."""
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)
