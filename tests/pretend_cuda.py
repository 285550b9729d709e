"""A device called cuda:0 where there is none: what would break or wait on CUDA is found on a CPU.

A `DeviceTensor` says that it lies on cuda:0; a CPU tensor inside does the arithmetic, so code that reads values runs as
it is. What CUDA refuses raises `Refused`: operands on two devices, a generator of the other device, numpy. What makes
the host wait is recorded with its place: values that are read ("sync"), blocking copies ("d2h", "h2d"). Copies with
non_blocking are recorded as "async". Autograd sees CPU tensors, so no driver is needed.

    with pretended() as device:  ...  device.waits()
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent
WAITS = ("sync", "d2h", "h2d")
# The size of their answer depends on values, or they check their answer: the host waits.
READS_BACK = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::equal", "aten::is_nonzero", "aten::_linalg_check_errors",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# A number on the host is a fine operand for these, although they are not marked as pointwise.
TAKE_NUMBERS = ("aten::_foreach", "aten::where", "aten::fill", "aten::masked_fill", "aten::_fused", "aten::lerp")


class Refused(RuntimeError):  # noqa: N818 - what the device did, not what went wrong
    """What a CUDA device would not do."""


class Recorder:
    """What was done on the device. events: (kind, operator, place) -> times. kernels: operators, views and allocations
    apart."""

    def __init__(self) -> None:
        self.events: Counter[tuple[str, str, str]] = Counter()
        self.kernels: Counter[str] = Counter()
        self.generators: dict[int, str] = {}  # address -> kind of device that a generator was made for

    def note(self, kind: str, operator: str) -> None:
        self.events[kind, operator, _place()] += 1

    def waits(self) -> Counter[tuple[str, str, str]]:
        """The events for which the host stands still."""
        return Counter({event: count for event, count in self.events.items() if event[0] in WAITS})

    def kind_of(self, generator: torch.Generator | None) -> str | None:
        """None for torch's own generators, of which every device has one."""
        return None if generator is None else self.generators.get(generator._cdata, "cpu")


_recorder = Recorder()


def _place() -> str:
    """The line of the project that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def _on_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class DeviceTensor(torch.Tensor):
    """Says cuda:0; `held` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "DeviceTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device="cpu",
        )  # fmt: skip
        made.held = held
        return made

    # Module.to keeps the identity of parameters that can be taken apart, as it does on CUDA.
    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return DeviceTensor(inner["held"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _ANSWERS:
            return _ANSWERS[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self, **_) -> str:
        return f"DeviceTensor({self.held!r})"

    def __array__(self, *_, **__):
        return _no_numpy()

    def __reduce_ex__(self, protocol):
        _recorder.note("d2h", "pickle")
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = DeviceTensor(self.held.detach().clone())
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if parameter else copied
        return memo[id(self)]


class _Download(torch.autograd.Function):
    """Tensor.cpu() with its gradient."""

    @staticmethod
    def forward(ctx, values):
        return values.held.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(CUDA)


def _no_numpy(*_, **__):
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")


def _native(func, *args, **kwargs):
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _move(self, *args, **kwargs):
    """Tensor.to: torch itself would go by the device that it believes in."""
    args, device, dtype = list(args), kwargs.pop("device", None), kwargs.pop("dtype", None)
    if args and isinstance(args[0], torch.Tensor):
        like = args.pop(0)
        device, dtype = like.device, like.dtype
    for kind in ("device", "dtype"):
        if args and isinstance(args[0], torch.dtype):
            dtype = args.pop(0)
        elif args and kind == "device" and isinstance(args[0], str | torch.device | int):
            device = args.pop(0)
    late = bool(kwargs.pop("non_blocking", False) or (args and args[0]))
    copy, layout = kwargs.pop("copy", False), kwargs.pop("memory_format", torch.preserve_format)
    if layout is not torch.preserve_format:  # a layout of one's own is a copy behind the move
        return _move(self, device=device, dtype=dtype, copy=copy, non_blocking=late).contiguous(memory_format=layout)
    if isinstance(self, DeviceTensor) and device is not None and not _on_cuda(device):
        _recorder.note("async" if late else "d2h", "to")
        host = _Download.apply(self) if self.requires_grad else self.held.clone()
        return host if dtype is None else host.to(dtype)
    if not isinstance(self, DeviceTensor) and _on_cuda(device):
        return _native(torch.Tensor.to, self, CUDA, dtype or self.dtype, non_blocking=late)
    return self if dtype is None and not copy else _native(torch.Tensor.to, self, dtype or self.dtype, copy=copy)


def _listed(self):
    _recorder.note("sync", "tolist")
    return self.held.tolist()


def _one_hot(labels, num_classes=-1):
    """Reads nothing back where the number of classes is given."""
    if num_classes == -1:
        _recorder.note("sync", "one_hot")
        num_classes = int(labels.held.max()) + 1
    return labels.new_zeros(*labels.shape, num_classes).scatter_(-1, labels.unsqueeze(-1), 1)


def _new_tensor(self, data, dtype=None, device=None, requires_grad=False):
    return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, requires_grad=requires_grad)


_ANSWERS = {
    torch.Tensor.device.__get__: lambda self: CUDA,
    torch.Tensor.is_cuda.__get__: lambda self: True,
    torch.Tensor.is_cpu.__get__: lambda self: False,
    torch.Tensor.get_device: lambda self: 0,
    torch.Tensor.to: _move,
    torch.Tensor.type_as: lambda self, other: _move(self, other),
    torch.Tensor.cpu: lambda self, *_, **__: _move(self, "cpu"),
    torch.Tensor.cuda: lambda self, *_, **__: _move(self, "cuda"),
    torch.Tensor.numpy: _no_numpy,
    torch.Tensor.tolist: _listed,
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.data_ptr: lambda self: self.held.data_ptr(),
    torch.Tensor.untyped_storage: lambda self: self.held.untyped_storage(),
    torch.nn.functional.one_hot: _one_hot,
}


def _run(func, args, kwargs):
    """One operator: refuse, record, compute on what is held."""
    name = func._schema.name
    flat, spec = tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, DeviceTensor)]
    host = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor)]
    made_there = _on_cuda(kwargs.get("device"))
    if not ours and not made_there:
        if _recorder.kind_of(kwargs.get("generator")) == "cuda":
            raise Refused(f"{func}: a generator of cuda for a tensor on the cpu, at {_place()}")
        return func(*args, **kwargs)
    held_args, held_kwargs = tree_unflatten([x.held if isinstance(x, DeviceTensor) else x for x in flat], spec)
    if made_there:
        held_kwargs = {k: v for k, v in held_kwargs.items() if k != "pin_memory"} | {"device": torch.device("cpu")}
    if name == "aten::_to_copy" and not ours:
        _recorder.note("async" if kwargs.get("non_blocking") else "h2d", "to")
        made = func(*held_args, **held_kwargs)
        return DeviceTensor(made.clone() if made is args[0] else made)
    if name == "aten::copy_" and host:
        late = (len(args) > 2 and args[2]) or kwargs.get("non_blocking")
        _recorder.note("async" if late else "h2d" if isinstance(args[0], DeviceTensor) else "d2h", "copy_")
        func(*held_args, **held_kwargs)
        return args[0]
    if name in ("aten::lift_fresh", "aten::lift"):
        return args[0]
    if name == "aten::_local_scalar_dense":
        _recorder.note("sync", "item")
        return func(*held_args)
    _refuse_mixtures(func, name, args, kwargs, host)
    if name in READS_BACK or (
        name == "aten::repeat_interleave" and isinstance(args[0], torch.Tensor) and len(args) < 2
    ):
        _recorder.note("sync", name)
    return _computed(func, name, args, kwargs, held_args, held_kwargs)


def _refuse_mixtures(func, name: str, args, kwargs, host: list[torch.Tensor]) -> None:
    if name in INDEXING:
        indices = [x for x in args[1] if x is not None]
        if not isinstance(args[0], DeviceTensor):
            raise Refused(f"{func}: indices on cuda:0 into a tensor on the cpu, at {_place()}")
        if any(not isinstance(x, DeviceTensor) for x in indices):
            _recorder.note("h2d", "indices on the host")
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            _recorder.note("sync", "mask as index")
        host = [x for x in host if not any(x is index for index in indices)]
    if any(x.dim() for x in host):
        shapes = [tuple(x.shape) for x in host if x.dim()]
        raise Refused(f"{func}: operands on cuda:0 and, of shapes {shapes}, on the cpu, at {_place()}")
    number = torch.Tag.pointwise in func.tags or name.startswith(TAKE_NUMBERS) or name in INDEXING
    if host and not number:
        raise Refused(f"{func}: a number on the cpu, which only pointwise operators take, at {_place()}")
    if _recorder.kind_of(kwargs.get("generator")) == "cpu":
        raise Refused(f"{func}: a generator of the cpu for a tensor on cuda:0, at {_place()}")


def _computed(func, name: str, args, kwargs, held_args, held_kwargs):
    """The answer as device tensors; what an operator writes to and returns stays the object that it was."""
    schema = func._schema
    written = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
    view = any(a.alias_info and not a.alias_info.is_write for a in schema.arguments)
    if not view and not name.startswith(("aten::empty", "aten::new_empty")):  # memory alone: nothing is launched
        _recorder.kernels[name] += 1
    out = func(*held_args, **held_kwargs)
    if written and any(r.alias_info and r.alias_info.is_write for r in schema.returns):
        back = tuple(args[i] if i < len(args) else kwargs[key] for i, key in written)
        return back[0] if len(back) == 1 else back
    return tree_map_only(torch.Tensor, lambda x: x if isinstance(x, DeviceTensor) else DeviceTensor(x), out)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Generator:
    """Remembers the device that it was made for. A class, since annotations join it with None."""

    real = torch.Generator

    def __new__(cls, device="cpu"):
        made = cls.real("cpu")
        _recorder.generators[made._cdata] = torch.device(device).type
        return made


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _enter(self):
    """inference_mode as no_grad: a wrapped tensor has no version counter in it."""
    self.before = torch.is_grad_enabled()
    torch.set_grad_enabled(self.before and not self.mode)


def _leave(self, *_):
    torch.set_grad_enabled(self.before)


@contextlib.contextmanager
def pretended():
    """Inside, cuda:0 computes. Gives the recorder of what is done there."""
    global _recorder
    _recorder = Recorder()
    lifts = torch._C._only_lift_cpu_tensors()
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    replaced = [
        (torch, "Generator", _Generator),
        (torch, "autocast", _Autocast),
        (torch, "is_autocast_enabled", lambda kind="cpu": enabled("cpu" if kind == "cuda" else kind)),
        (torch, "get_autocast_dtype", lambda kind="cpu": dtype("cpu" if kind == "cuda" else kind)),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "mem_get_info", lambda *_: (80 << 30, 80 << 30)),
        (torch.inference_mode, "__enter__", _enter),
        (torch.inference_mode, "__exit__", _leave),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Dispatch():
            yield _recorder
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        for owner, name, value in before:
            setattr(owner, name, value)
