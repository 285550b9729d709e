"""Tables from name to object that fill themselves: a new learner or data set edits no central list."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from utils.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """name -> object, with a near-name answer for an unknown name.

    kind: what the table holds, as the error sentence names it ("learner", "data set").
    """

    def __init__(self, kind: str, also: Sequence[str] = ()):
        """also: names that stand for themselves and something behind them ("npz:FILE"), told with the others."""
        self.kind, self._also = kind, tuple(also)
        self._table: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            if name in self._table:
                raise ValueError(f'{self.kind} "{name}" is registered twice')
            self._table[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._table:
            raise UserError(self.unknown(name))
        return self._table[name]

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._table))

    def unknown(self, name: str) -> str:
        """The sentence that answers an unknown name."""
        near = did_you_mean(name, [*self._table, *(form.partition(":")[0] for form in self._also)])
        for form in self._also:
            near = near.replace(f'"{form.partition(":")[0]}"', f'"{form}"')
        return f'unknown {self.kind} "{name}"{near or "."} Known: {", ".join([*self, *self._also])}'


def imported(name: str, kind: str) -> Any:
    """What "package.module:Name" stands for on the Python path.

    Raises UserError when the module cannot be imported or has no such name.
    """
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f'{kind} "{name}": the module "{module}" cannot be imported ({error}). It is looked for on the Python path '
            "(PYTHONPATH, or installed)"
        ) from None
    if not hasattr(found, attribute):
        near = did_you_mean(attribute, vars(found))
        raise UserError(f'{kind} "{name}": {found.__name__} has no "{attribute}"{near}')
    return getattr(found, attribute)
