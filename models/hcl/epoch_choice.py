"""Which epoch's network a task ends with."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

Rule = Literal["last", "best", "slack"]


class EpochChoice:
    """Keeps the network of the chosen epoch while later ones are trained. A part with a state.

    last: the last epoch. best: the first of those with the highest score. slack: the last epoch that did not fall by
    more than `slack` below the one accepted before it, the first accepted from 0 on (the rule of HCL's reference: the
    score may ratchet down by `slack` an epoch for ever). A score that is not a number is never accepted.
    """

    def __init__(self, rule: Rule, slack: float = 0.2):
        self.rule, self.slack = rule, slack
        self.restart()

    def restart(self) -> None:
        """A new task begins."""
        self.epoch: int | None = None  # the chosen one, from 0
        self._accepted = -math.inf if self.rule == "best" else 0.0
        self._kept: dict[str, Tensor] = {}  # the chosen network
        self._last: dict[str, Tensor] = {}  # the last epoch's, once `finish` has loaded the chosen one

    def offer(self, epoch: int, score: float, network: nn.Module) -> bool:
        """Whether the network of this epoch is the one to keep for now."""
        taken = score > self._accepted if self.rule == "best" else not score - self._accepted < -self.slack
        if self.rule == "last" or math.isnan(score) or not taken:
            return False
        self.epoch, self._accepted, self._kept = epoch, score, _copied(network)
        return True

    def finish(self, network: nn.Module, keep_last: bool = False) -> None:
        """Make `network` the chosen one; with keep_last `recall_last` can take it back."""
        if self._kept:
            self._last = _copied(network) if keep_last else {}
            network.load_state_dict(self._kept)
            self._kept = {}

    def recall_last(self, network: nn.Module) -> None:
        """Make `network` the one of the last epoch again."""
        if self._last:
            network.load_state_dict(self._last)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "accepted": self._accepted, "kept": self._kept, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self._accepted = state["epoch"], state["accepted"]
        self._kept, self._last = dict(state["kept"]), dict(state["last"])


def _copied(network: nn.Module) -> dict[str, Any]:
    """Where the network is: a copy to the host would wait for every tensor, once an epoch."""
    state = network.state_dict()
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in state.items()}
