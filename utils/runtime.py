"""Where and how a run computes: device, precision, processes, stopwatch. Learners ask for it, none owns a device."""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.config import RunConfig
from utils.errors import UserError
from utils.wrapping import WrappedNetwork, is_convolutional


class Stopwatch:
    """Seconds by name: {"train", "statistics", "eval", ...}. Nested names count in both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Runtime:
    """device: "auto", "cpu", "cuda", "cuda:1". precision: "fp32"; "tf32", products and convolutions of CUDA in 19 bits;
    "bf16"; "auto": bf16 on CUDA cards that compute in it (capability 8), else fp32. deterministic: the deterministic
    algorithms of torch on CUDA, where sums otherwise come in any order.

    Under torchrun it joins the process group (NCCL on CUDA, gloo on CPU) and takes this process's device.
    Raises UserError when the device is not there.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: str = "auto",
        num_workers: int | None = None,
        compile: bool = False,
        deterministic: bool = False,
    ):
        self.rank, self.world = _processes()
        self.device = _find_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        bf16 = precision == "bf16" or (precision == "auto" and computes_bf16(self.device))
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
            if deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
            torch.use_deterministic_algorithms(deterministic)
        self.autocast_dtype = torch.bfloat16 if bf16 else None
        self._num_workers, self._compile = num_workers, compile
        self.stopwatch = Stopwatch()
        self._has_run = False
        self.on_safe_point: Callable[[], None] | None = None  # set by whoever can save a run

    @classmethod
    def of(cls, config: RunConfig) -> "Runtime":
        """As a config asks for it."""
        compiled = getattr(config, "compile", False)
        return cls(config.device, config.precision, config.num_workers, compiled, config.deterministic)

    def begin_run(self) -> None:
        """Measure from here on: what a finished run has left in memory goes first."""
        self.stopwatch.seconds.clear()
        if self._has_run or self.device.type == "cuda":
            gc.collect()  # a fifth of a second
        self._has_run = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def fused_attention(self) -> bool:
        """Whether torch's fused attention is the faster one: not for bf16 on a CPU, where a training step with it takes
        1.3 (ViT-B) to 3.7 times (small ViT) as long as with products and a softmax."""
        return self.device.type != "cpu" or self.autocast_dtype is None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def safe_point(self) -> None:
        """For a long piece of `before_task` that keeps its progress in a part: here the run may be saved, and stopped.

        A resumed run calls `before_task` again, which goes on from what the part holds; what comes before the piece
        must bear being repeated.
        """
        if self.on_safe_point is not None:
            self.on_safe_point()

    def workers(self, cheap: bool) -> int:
        """Loader processes: as many as the cores of the job allow, shared among the training processes of a machine
        (8 feed about 1,200 JPEGs of 224 pixels a second, half of what a ViT-B/16 takes). cheap: batches are copies from
        memory, which no process speeds up."""
        if self._num_workers is not None:
            return self._num_workers
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share this machine's cores
        return 0 if cheap or os.name == "nt" else max(1, available_cpus() // local)

    def prefetch(self, batch_bytes: int, workers: int) -> int:
        """Batches that each loader process keeps ready: 4, fewer where they would fill a sixteenth of the memory."""
        free = available_memory()
        return 4 if free is None else max(1, min(4, free // 16 // max(1, batch_bytes * workers)))

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Mixed precision when it was asked for; nothing otherwise."""
        if self.autocast_dtype is None:
            yield
        else:
            with torch.autocast(self.device.type, dtype=self.autocast_dtype):
                yield

    def to_device(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) -> float in [0, 1] on the device; targets (B,) on the device. Does not synchronise."""
        images = images.to(self.device, non_blocking=True)
        return images.float().div_(255), targets.to(self.device, non_blocking=True)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as training calls it: compiled when asked for, under DDP when there are several processes, in the
        layout of its convolutions on CUDA; the network itself where nothing of this applies.

        Wrapped anew for each stage, since networks grow and freeze.
        Raises UserError for BatchNorm in several processes.
        """
        shared = self.world > 1 and any(p.requires_grad for p in network.parameters())
        if shared and any(isinstance(layer, _BatchNorm) for layer in network.modules()):
            raise UserError(
                f"BatchNorm would see each batch in {self.world} parts, and train another network than in one "
                "process: run it in one process"
            )
        convolutional = self.device.type == "cuda" and is_convolutional(network)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = convolutional and not torch.are_deterministic_algorithms_enabled()
        if not (shared or self._compile or convolutional):
            return network
        return WrappedNetwork(network, self.device, shared, self._compile, convolutional)

    def settle(self, net: nn.Module) -> None:
        """After the first backward pass through what `wrap` gave."""
        if isinstance(net, WrappedNetwork):
            net.settle(self.any)

    def reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """(n, D) of each process -> the rows of all, in the order of ranks, (sum of counts, D). Does not synchronise.

        counts: rows that each process has; what it has more is left out. Own rows alone carry a gradient.
        """
        if self.world == 1:
            return rows
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: counts[self.rank]] = rows.detach()[: counts[self.rank]]
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        parts = [part[:count] for part, count in zip(found, counts, strict=True)]
        parts[self.rank] = rows[: counts[self.rank]]
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. Synchronises the processes."""
        if self.world == 1:
            return flag
        return bool(self.reduce_sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def gather_tensors(self, values: Tensor) -> list[Tensor]:
        """Each process's tensor (n_i, ...), on this process's device, in the order of ranks: no copy to the host, and
        none to another process's card."""
        if self.world == 1:
            return [values]
        counts = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(values)], device=values.device))
        sizes = [int(count) for count in counts]
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: len(values)] = values
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return [rows[:size] for rows, size in zip(found, sizes, strict=True)]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def device_memory(self) -> float:
        """Bytes: of the card; on a CPU what this process can still take, infinity where nobody says."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[1]
        free = available_memory()
        return math.inf if free is None else free

    def peak_memory_mib(self) -> float:
        """Of the device on CUDA, of the process on CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        try:
            import resource
        except ImportError:  # not on every platform
            return 0.0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def describe(self) -> dict[str, Any]:
        """What a result file says of the machine."""
        import platform

        import timm
        import torchvision

        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor()
        return {
            "device": str(self.device),
            "device_name": name or platform.machine(),
            "precision": "bf16" if self.autocast_dtype else "fp32",
            "processes": self.world,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        }


def computes_bf16(device: torch.device) -> bool:
    """Whether a card has bf16 in its matrix units; older ones emulate it, slower than fp32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def available_cpus() -> int:
    """Cores that this process may use; a scheduler often grants fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return max(1, len(affinity(0)) if affinity is not None else os.cpu_count() or 1)


def available_memory() -> int | None:
    """Bytes that this process can still take, by the machine and by its control group; None where nobody says."""
    found = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))
    return min(found, default=None)


def _processes() -> tuple[int, int]:
    """(rank, number of processes) as torchrun says it. Raises UserError for what no launcher sets."""
    found: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.strip().isdecimal():
            raise UserError(f'the environment variable {name} is "{text[:50]}", no whole number. {_UNSET}')
        found[name] = int(text)
    world, rank = found.get("WORLD_SIZE", 1), found.get("RANK", 0)
    if ("RANK" in found) != ("WORLD_SIZE" in found):
        raise UserError(f"of the environment variables RANK and WORLD_SIZE one is set alone. {_UNSET}")
    if not 0 <= rank < world or found.get("LOCAL_WORLD_SIZE", 1) < 1:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {world}, LOCAL_WORLD_SIZE at least 1: ranks count from 0. {_UNSET}"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if world > 1 and name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {world}, but {' and '.join(missing)} not set. {_UNSET}")
    return rank, world


_UNSET = "torchrun sets them all; unset them for a single process"


def _find_device(name: str) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not count:
        raise UserError(f'device "{name}" was asked for, but torch sees no CUDA device. Use --device cpu or auto')
    index = int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise UserError(f'device "cuda:{index}" was asked for, but there are {count} CUDA devices (0..{count - 1})')
    return torch.device("cuda", index)
