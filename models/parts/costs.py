"""What a learner costs, asked from outside: numbers that train, bytes that it keeps between tasks.

A module or another part of a learner may answer for itself: `num_frozen()`, numbers of its trainable tensors that do
not move; `stored_bytes()`, what it keeps now; `expected_bytes(tasks)`, what it will keep, known beforehand.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from data.stream import Task
from models.parts.state import parts_of

if TYPE_CHECKING:
    from models.base import Learner


def num_trainable(learner: "Learner") -> int:
    """How many numbers training moves in the task at hand."""
    moving = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    return moving - sum(count() for m in learner.modules() if (count := getattr(m, "num_frozen", None)) is not None)


def stored_bytes(learner: "Learner") -> int:
    """What the method keeps between tasks beyond the frozen pre-trained network: everything else in its state."""
    frozen = {id(p) for p in learner.network.backbone.parameters() if not p.requires_grad}
    total = 0
    for owner in answering(learner):
        if hasattr(owner, "stored_bytes"):
            total += owner.stored_bytes()
        elif isinstance(owner, nn.Module):
            total += tensor_bytes([value for value in _own_tensors(owner) if id(value) not in frozen])
        else:
            total += tensor_bytes(owner.state_dict())
    return total


def expected_bytes(learner: "Learner", tasks: Sequence[Task]) -> int:
    """What the statistics of these tasks will take, as far as the parts know it beforehand."""
    return sum(owner.expected_bytes(tasks) for owner in answering(learner) if hasattr(owner, "expected_bytes"))


def tensor_bytes(value: Any) -> int:
    """Of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(tensor_bytes(item) for item in value) if isinstance(value, list | tuple) else 0


def answering(learner: "Learner") -> Iterator[Any]:
    """Every module once, without those below one that answers for its whole, and every other part."""
    waiting: list[nn.Module] = [learner]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        if not hasattr(module, "stored_bytes"):
            waiting += list(module.children())
    yield from (part for _, part in parts_of(learner))


def _own_tensors(module: nn.Module) -> list[Any]:
    """Parameters, saved buffers and extra state of a module, not those of its children."""
    kept = [v for k, v in module._buffers.items() if v is not None and k not in module._non_persistent_buffers_set]
    extra = module.get_extra_state() if type(module).get_extra_state is not nn.Module.get_extra_state else None
    return [*(p for p in module._parameters.values() if p is not None), *kept, extra]
