"""A device that is none: a tensor there lies on the CPU, and Python believes it to lie elsewhere.

So the CPU alone shows where code mixes devices, where the host waits for the device, and how many operations are
launched. Numbers are the CPU's.

    with OtherDevice() as device:
        lm = LM(device.moved(model), tokenizer)
        ...
    device.waits    # the lines where the host waited, and how often
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("mps")  # a device for which the library has no kernel of its own
ROOT = Path(__file__).parent.parent

_READS = {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
_WITH_UNKNOWN_SIZE = {Tensor.nonzero, torch.nonzero, Tensor.masked_select, Tensor.equal, torch.equal, Tensor.unique}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_MOVES = {Tensor.to, Tensor.cpu}
_ARRAYS = {Tensor.numpy, Tensor.__array__}


class Elsewhere(Tensor):
    """A tensor on the device; `inner` is the one on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        # torch's own code gets to see a device that this build knows.
        return Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device="meta")

    def __init__(self, inner: Tensor) -> None:
        device = OtherDevice.current
        if inner.dtype == torch.float64 and device is not None and not device.has_float64:
            raise TypeError(f"Cannot convert a {DEVICE} Tensor to float64 dtype.")
        self.inner = inner

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cpu(self) -> bool:
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        return memo.setdefault(id(self), Elsewhere(self.inner.clone()))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was not called through torch's functions")


class OtherGenerator(torch.Generator):
    """A generator for the device: the CPU's."""

    def __new__(cls, device: object = None) -> OtherGenerator:
        return super().__new__(cls, "cpu")


class OtherEvent:
    """An event of the device, which has always happened."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        return True


class OtherDevice(TorchFunctionMode):
    """The device, for as long as the context lasts.

    Args:
        has_float64: False for a device like MPS.

    Attributes:
        waits: the lines at which the host waited for the device, and how often.
        launches: how many functions of torch ran on the device.
        has_float64: see above.

    """

    current: OtherDevice | None = None

    def __init__(self, *, has_float64: bool = True) -> None:
        super().__init__()
        self.has_float64 = has_float64
        self.waits: Counter[str] = Counter()
        self.launches = 0
        self._apply: Any = nn.Module._apply
        self._run: Any = threading.Thread.run

    def __enter__(self) -> OtherDevice:
        OtherDevice.current = self
        nn.Module._apply = lambda *args: self._applied(*args)
        threading.Thread.run = lambda thread: self._run_there(thread)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        nn.Module._apply = self._apply
        threading.Thread.run = self._run
        OtherDevice.current = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.__deepcopy__ and not _is_elsewhere(args[0]):
            return func(*args, **kwargs)  # its memo knows tensors of all devices
        if func in _MOVES or _is_there(kwargs.get("device")) or any(map(_is_elsewhere, _leaves((args, kwargs)))):
            return _call(func, args, kwargs)
        return func(*args, **kwargs)

    def _applied(self, module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if any(_is_elsewhere(value) or _is_elsewhere(function(value.detach())) for value in module.parameters()):
            return _replaced(module, function)
        return self._apply(module, function, recurse)

    def _run_there(self, thread: threading.Thread) -> None:
        """Run a thread that starts within the context: a mode of torch holds in one thread alone."""
        super().__enter__()
        try:
            self._run(thread)
        finally:
            super().__exit__(None, None, None)

    def moved(self, model: nn.Module) -> nn.Module:
        """The same model, on the device; shared weights stay shared."""
        return _replaced(model, lambda value: value if _is_elsewhere(value) else Elsewhere(value.detach()))


def _replaced(model: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """The same model with other weights, as `model.to(dtype)` makes it; shared weights stay shared."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old ones, so that no new one gets the id of one
    for module in model.modules():
        for held, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, value in held.items():
                if value is not None:
                    if id(value) not in made:
                        made[id(value)] = (value, function(value.detach()))
                    _, held[name] = made[id(value)]
                    held[name]._is_param = is_parameter
    return model


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in _MOVES:
        return _moved(func, *args, **kwargs)
    if func in _ARRAYS and _is_elsewhere(args[0]):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy.")
    given = _leaves((args, kwargs))
    is_there = _is_there(kwargs.get("device")) or ("device" not in kwargs and any(map(_is_elsewhere, given)))
    if func is Tensor.copy_:
        is_there = _is_elsewhere(args[0])
    elif func not in _INDEXING:
        _check_one_device(func, given)
    _count(func, args)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    with torch._C.DisableTorchFunction():
        found = func(*_inner(args), **_inner(kwargs))
    if func in _READS or not is_there:
        return found
    return _wrapped(found, given)


def _moved(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What `tensor.to(...)` returns: an argument may be a device, a dtype or another tensor."""
    given = [*args, *kwargs.values()]
    devices = [arg.device if isinstance(arg, Tensor) else torch.device(arg) for arg in given if _names_device(arg)]
    dtypes = [arg if isinstance(arg, torch.dtype) else arg.dtype for arg in given if _names_dtype(arg)]
    target = torch.device("cpu") if func is Tensor.cpu else next(iter(devices), tensor.device)
    dtype = next(iter(dtypes), tensor.dtype)
    inner = _inner(tensor)
    is_there, goes_there = _is_elsewhere(tensor), _is_there(target)
    if not (is_there or goes_there):
        return func(tensor, *args, **kwargs)
    if is_there == goes_there and dtype == tensor.dtype and not kwargs.get("copy"):
        return tensor
    if is_there != goes_there and not (goes_there and _is_called_by("on_device")):
        _note_wait()
    with torch._C.DisableTorchFunction():
        moved = inner.to(dtype, copy=True)
    return Elsewhere(moved) if goes_there else moved


def _count(func: Any, args: Any) -> None:
    device = OtherDevice.current
    if device is None or getattr(func, "__name__", "") == "__get__":
        return
    is_wait = func in _READS or func in _WITH_UNKNOWN_SIZE
    if func in _INDEXING:
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        indices = [index for part in parts if not isinstance(part, slice) for index in _leaves(part)]
        is_wait = any(isinstance(index, Tensor) and _is_read(index) for index in indices)
        is_wait |= any(_is_elsewhere(bound) for part in parts if isinstance(part, slice) for bound in _leaves(part))
    if func in (Tensor.copy_, Tensor.__setitem__):
        value = args[1] if func is Tensor.copy_ else args[2]
        is_wait |= isinstance(value, Tensor) and _is_elsewhere(value) != _is_elsewhere(args[0])
    if is_wait:
        _note_wait()
    else:
        device.launches += 1


def _is_read(index: Tensor) -> bool:
    """Whether the host waits for an index: one on the CPU is copied, and a mask has an unknown number of rows."""
    return not _is_elsewhere(index) or index.dtype == torch.bool


def _note_wait() -> None:
    """Note the line of the library that waits, or else that of a test."""
    if OtherDevice.current is None:
        return
    lines = [
        f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        for frame in _frames()
        for path in [Path(frame.f_code.co_filename)]
        if path.is_relative_to(ROOT) and path != Path(__file__)
    ]
    found = [line for line in lines if line.startswith("backprompt")] or lines or ["elsewhere"]
    OtherDevice.current.waits[found[0]] += 1


def _is_called_by(name: str) -> bool:
    return any(frame.f_code.co_name == name for frame in _frames())


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _check_one_device(func: Any, given: list[Any]) -> None:
    """As torch does: a tensor without axes may come from the CPU, any other not."""
    if any(map(_is_elsewhere, given)):
        strangers = [value for value in given if isinstance(value, Tensor) and not _is_elsewhere(value) and value.ndim]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got some on {DEVICE} and the CPU."
            )


def _is_elsewhere(value: Any) -> bool:
    return type(value) is Elsewhere


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _names_device(value: Any) -> bool:
    return isinstance(value, (str, torch.device, Tensor))


def _names_dtype(value: Any) -> bool:
    return isinstance(value, (torch.dtype, Tensor))


def _inner(values: Any) -> Any:
    return _mapped(lambda value: value.inner if _is_elsewhere(value) else value, values)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same with other leaves, as by `torch.utils._pytree`, which is slower and takes a slice for a leaf."""
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(function, part) for part in value])
    if isinstance(value, dict):
        return {key: _mapped(function, part) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*_mapped(function, _bounds(value)))
    return function(value)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part)]
    if isinstance(value, dict):
        return _leaves(list(value.values()))
    return _leaves(_bounds(value)) if isinstance(value, slice) else [value]


def _bounds(index: slice) -> tuple[Any, Any, Any]:
    return index.start, index.stop, index.step


def _wrapped(found: Any, given: list[Any]) -> Any:
    """Results on the device; a tensor that was written in place stays the same object."""
    known = {id(value.inner): value for value in given if _is_elsewhere(value)}

    def wrap(value: Any) -> Any:
        return (known[id(value)] if id(value) in known else Elsewhere(value)) if isinstance(value, Tensor) else value

    return _mapped(wrap, found)
