"""Finished seeds of one experiment -> means over them. Runs that are not the same experiment are never mixed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.config import MACHINE_KEYS
from utils.errors import UserError
from utils.folders import read_result, seeds_below


@dataclass(frozen=True)
class Spread:
    """Of one number over seeds. std: of the sample, None for one seed."""

    mean: float
    std: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), std, len(values))


@dataclass(frozen=True)
class Runs:
    """The finished seeds of one experiment, by seed. folder: above them."""

    folder: Path
    results: tuple[Mapping[str, Any], ...]

    @property
    def seeds(self) -> list[int]:
        return [result["config"]["seed"] for result in self.results]

    @property
    def first(self) -> Mapping[str, Any]:
        return self.results[0]

    def metric(self, name: str) -> Spread | None:
        """Of a number in result.json; None where no seed has it."""
        values = [result[name] for result in self.results if result.get(name) is not None]
        return spread(values) if values else None

    @property
    def curves(self) -> np.ndarray:
        """(seeds, tasks): accuracy over all classes seen, after each task."""
        return np.array([result["curve"] for result in self.results], dtype=float)


def runs_of(folder: Path, results: Sequence[Mapping[str, Any]]) -> Runs:
    """Raises UserError where the results differ in anything but the seed."""
    if faults := differences(results):
        raise UserError(
            f"'{folder}' mixes runs that differ in more than the seed, so they have no common mean:\n"
            + "\n".join(f"  - {fault}" for fault in faults)
        )
    return Runs(folder, tuple(sorted(results, key=lambda result: result["config"]["seed"])))


def differences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps results from being seeds of one experiment, in sentences; none for one result."""
    faults: list[str] = []
    values = [_compared(result) for result in results]
    for key in sorted(set().union(*values)) if values else []:
        found: dict[str, list[int]] = {}
        for result, value in zip(results, values, strict=True):
            found.setdefault(json.dumps(value.get(key), sort_keys=True), []).append(result["config"]["seed"])
        if len(found) > 1:
            told = "; ".join(f"{text[:80]} in seed {', '.join(map(str, seeds))}" for text, seeds in found.items())
            faults.append(f"{key}: {told}")
    seeds = [result["config"]["seed"] for result in results]
    if double := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        faults.append(f"seed: {', '.join(map(str, double))} is there more than once")
    return faults


def _compared(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a result that seeds share: config, data, weights, tasks, precision."""
    config = {f'"{key}"': value for key, value in result["config"].items() if key not in MACHINE_KEYS}
    data, weights = result.get("data", {}), result.get("weights", {})
    return config | {
        "data": data.get("hash"),
        "split of the data": data.get("split"),
        "weights": weights.get("sha256") or weights.get("name"),
        "sizes of the tasks": result.get("task_sizes"),
        "precision": result.get("environment", {}).get("precision"),
    }


def finished_runs(folder: Path) -> Runs:
    """All finished seeds of a run's folder, or the one of a seed's folder.

    Raises UserError where there is none, and where they are not seeds of one experiment.
    """
    results = finished_results(folder)
    if not results:
        raise UserError(f"no seed in '{folder}' is finished: the command that started it goes on with --resume")
    return runs_of(folder, results)


def finished_results(folder: Path) -> list[dict[str, Any]]:
    """result.json of every finished seed. Raises UserError where there is no run, or a file that cannot be read."""
    found = []
    for path in seeds_below(folder):
        try:
            result = read_result(path)
        except ValueError as error:
            raise UserError(f"'{path / 'result.json'}' cannot be read ({error})") from None
        if result is not None and result.get("finished"):
            found.append(result)
    return found
