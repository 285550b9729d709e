"""A network as training calls it: compiled, in several processes, in the layout that convolutions are fast in."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

log = logging.getLogger(__name__)


class WrappedNetwork(nn.Module):
    """What the network answers, whatever it is called with.

    shared: under DDP, with the other processes. Whether the loss leaves parameters out is seen in the first backward
    pass: DDP looks for them in every pass until `settle` finds that there are none.
    compiled: by torch.compile, once. The number of images is left open, so that an epoch's smaller last batch needs no
    compilation of its own; a batch of one, which torch always compiles apart, is computed as it is. Tensors are made
    contiguous, since slices of a batch would be compiled for beside whole ones. In several processes from the second
    step on. Where torch compiles nothing (it can be switched off from outside) a warning says so.
    channels_last: weights and images in this layout; no value changes.
    """

    def __init__(self, network: nn.Module, device: torch.device, shared: bool, compiled: bool, channels_last: bool):
        super().__init__()
        self._ids = [device] if device.type == "cuda" else None
        self._to_compile, self._channels_last, self._settled = compiled, channels_last, not shared
        if channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network
        self._compiled_before: int | None = None  # until the first compiled call has been looked at
        self._called: Any = self._distributed(search=True) if shared else network
        self._compiled: Any = self._compile() if compiled and not shared else None

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if self._channels_last or self._compiled is not None:
            arguments = tree_map_only(Tensor, self._laid_out, arguments)
        if self._compiled is None or not _open_rows(arguments):
            return self._called(*arguments, **options)
        outputs = self._compiled(*arguments, **options)
        if self._compiled_before is not None:
            if _compiled_frames() == self._compiled_before:
                log.warning(
                    '"compile": torch compiled nothing, so the network runs as without it; TORCH_COMPILE_DISABLE, '
                    "TORCHDYNAMO_DISABLE or torch.compiler.set_stance can be the reason, TORCH_LOGS=dynamo tells"
                )
            self._compiled_before = None
        return outputs

    def _laid_out(self, value: Tensor) -> Tensor:
        images = self._channels_last and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last if images else torch.contiguous_format)

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, gradients stay with their process."""
        return self._called.no_sync() if hasattr(self._called, "no_sync") else nullcontext()

    def settle(self, anywhere: Callable[[bool], bool]) -> None:
        """Behind the first backward pass. anywhere: whether something holds in any process."""
        if self._settled:
            return
        self._settled = True
        if not anywhere(any(p.requires_grad and p.grad is None for p in self.network.parameters())):
            self._called = self._distributed(search=False)
        if self._to_compile:
            self._compiled = self._compile()

    def _distributed(self, search: bool) -> DistributedDataParallel:
        return DistributedDataParallel(self.network, device_ids=self._ids, find_unused_parameters=search)

    def _compile(self) -> Any:
        """Anew, with nothing left of networks before: torch counts compilations of a function over all of them, and
        past eight falls back to plain execution without a word. Random numbers are drawn as without."""
        torch._dynamo.reset()
        self._compiled_before = _compiled_frames()
        torch._inductor.config.fallback_random = True
        return torch.compile(self._called)


def _compiled_frames() -> int:
    return torch._dynamo.utils.counters["frames"]["ok"]


def is_convolutional(network: nn.Module) -> bool:
    """Whether there are convolutions beside those that cut images into a transformer's patches."""
    patches = {id(layer) for embedding in network.modules() if isinstance(embedding, PatchEmbed)
               for layer in embedding.modules()}  # fmt: skip
    return any(isinstance(layer, nn.Conv2d) and id(layer) not in patches for layer in network.modules())


def _open_rows(arguments: Any) -> bool:
    """Tell torch.compile that the number of images is any; False where it is one."""
    tensors = list(_tensors(arguments))
    rows = len(tensors[0]) if tensors else 1
    if rows > 1:
        for tensor in tensors:
            if len(tensor) == rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return rows > 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
