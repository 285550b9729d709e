"""Where the results of an experiment lie."""

from pathlib import Path


def below_experiments(config: Path) -> Path:
    """<stem>, with the folders below exps/ in front: exps/slca/cars.json and exps/raa/cars.json differ."""
    parts = config.resolve().with_suffix("").parts
    return Path(*(parts[len(parts) - parts[::-1].index("exps") :] if "exps" in parts[:-1] else parts[-1:]))
